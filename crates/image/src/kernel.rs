//! The kernel package: its kernel, its modules, and which of them a guest gets.

use std::{collections::BTreeMap, fs, io::Read, path::Path, process::Command, time::Duration};

use burgeon_api::{
    Error, Result,
    document::{Document, Part},
    recipe::Recipe,
};

use crate::{
    modules::{Module, Modules, name_of},
    process::{self, Limits, Tools},
    tree::{Meta, Tree},
};

/// What the agent's channel needs, on a PCI machine. The kernel may have any of it built in.
const CHANNEL: [&str; 4] = ["virtio_ring", "virtio", "virtio_pci", "virtio_console"];
/// What a root disk, a network and entropy need, and the file system that joins a base and changes.
const ROOT: [&str; 5] = ["virtio_blk", "ext4", "virtio_net", "virtio_rng", "overlay"];
/// What ends connections that a clone has inherited. Kernels without it have guests that refuse to.
const OF_CLONES: [&str; 2] = ["inet_diag", "tcp_diag"];
/// What takes memory that a guest is given while it runs. Guests of kernels without it keep what they began with.
const OF_GROWTH: [&str; 1] = ["virtio_mem"];

/// Parts of the module tree that a virtual machine of ours can use: file systems, networks without
/// hardware, block layers, virtio. Drivers for hardware that is never there stay out, which
/// leaves half of the bytes.
const DISK_MODULES: [&str; 29] = [
    "arch/",
    "block/",
    "crypto/",
    "drivers/block/",
    "drivers/cdrom/",
    "drivers/char/hw_random/virtio",
    "drivers/char/virtio",
    "drivers/crypto/virtio/",
    "drivers/dax/",
    "drivers/md/",
    "drivers/net/bonding/",
    "drivers/net/ipvlan/",
    "drivers/net/macv",
    "drivers/net/dummy",
    "drivers/net/ifb",
    "drivers/net/tap",
    "drivers/net/tun",
    "drivers/net/veth",
    "drivers/net/vrf",
    "drivers/net/vxlan/",
    "drivers/net/wireguard/",
    "drivers/nvdimm/",
    "drivers/scsi/",
    "drivers/vhost/",
    "drivers/virtio/",
    "fs/",
    "lib/",
    "mm/",
    "net/",
];
/// Of these, what needs hardware or belongs to clusters of other machines.
const NOT_DISK_MODULES: [&str; 31] = [
    "arch/x86/kvm/",
    "drivers/block/drbd/",
    "drivers/block/mtip32xx/",
    "drivers/block/rbd",
    "drivers/block/xen",
    "drivers/md/bcache/",
    "drivers/scsi/BusLogic",
    "drivers/scsi/aacraid/",
    "drivers/scsi/ch.ko",
    "drivers/scsi/device_handler/",
    "drivers/scsi/fnic/",
    "drivers/scsi/hv_",
    "drivers/scsi/ipr",
    "drivers/scsi/libsas/",
    "drivers/scsi/megaraid",
    "drivers/scsi/mp",
    "drivers/scsi/qla",
    "drivers/scsi/scsi_transport_",
    "drivers/scsi/smartpqi/",
    "drivers/scsi/st.ko",
    "drivers/scsi/vmw",
    "drivers/scsi/xen",
    "drivers/vhost/vhost_scsi",
    "fs/ceph/",
    "fs/dlm/",
    "fs/gfs2/",
    "fs/ocfs2/",
    "fs/orangefs/",
    "fs/smb/server/",
    "net/ceph/",
    "net/sunrpc/xprtrdma/",
];
/// Protocols that hardly a guest speaks.
const RARE: [&str; 6] = ["net/dccp/", "net/l2tp/", "net/rds/", "net/smc/", "net/tipc/", "net/vmw_vsock/hv_sock"];

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) release: String,
    pub(crate) image: Vec<u8>,
    pub(crate) modules: Modules,
    /// Lists that `depmod` reads: `modules.builtin` and the like.
    lists: BTreeMap<String, Vec<u8>>,
}

/// What an initramfs carries.
#[derive(Debug)]
pub(crate) struct Selection {
    /// Loaded before the agent opens its channel, in order.
    pub(crate) early: Vec<String>,
    /// Loaded before the root disk is mounted, in order.
    pub(crate) root: Vec<String>,
    /// Loaded behind the early ones, where there is memory to grow into.
    pub(crate) growth: Vec<String>,
}

impl Kernel {
    /// Reads a kernel package.
    pub(crate) fn read(package: &Path, tools: &Tools, work: &Path, limits: Limits<'_>) -> Result<Kernel> {
        let mut command = process::command(&tools.dpkg_deb);
        command.arg("--fsys-tarfile").arg(package);
        let mut archive = tar::Archive::new(process::stream(command)?);
        let kernel = Self::read_archive(&mut archive, limits).map_err(|error| error.context("the kernel package"))?;
        archive.into_inner().finish()?;
        kernel.decompressed(tools, work, limits)
    }

    fn read_archive(archive: &mut tar::Archive<impl Read>, limits: Limits<'_>) -> Result<Kernel> {
        let io = |error: std::io::Error| Error::damaged(format!("it cannot be read: {error}"));
        let mut image = None;
        let mut release = None;
        let mut files = BTreeMap::new();
        let mut lists = BTreeMap::new();
        for entry in archive.entries().map_err(io)? {
            limits.check_cancelled()?;
            let mut entry = entry.map_err(io)?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let path = path.trim_start_matches("./").trim_start_matches("usr/");
            let mut read = || -> Result<Vec<u8>> {
                let mut bytes = Vec::with_capacity(usize::try_from(entry.size().min(64 << 20)).unwrap_or(0));
                entry.read_to_end(&mut bytes).map_err(io)?;
                Ok(bytes)
            };
            if let Some(version) = path.strip_prefix("boot/vmlinuz-") {
                release = Some(version.to_string());
                image = Some(read()?);
            } else if let Some((_, below)) = path.strip_prefix("lib/modules/").and_then(|rest| rest.split_once('/')) {
                if below.contains(".ko") {
                    files.insert(name_of(below), Module { path: below.to_string(), bytes: read()? });
                } else if below.starts_with("modules.") {
                    lists.insert(below.to_string(), read()?);
                }
            }
        }
        let (Some(release), Some(image)) = (release, image) else {
            return Err(Error::invalid("it holds no kernel /boot/vmlinuz-*"));
        };
        if release.is_empty() || !release.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-+_~".contains(&byte)) {
            return Err(Error::invalid("its release has an unusable name"));
        }
        let builtin = lists.get("modules.builtin").map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let builtin = builtin.unwrap_or_default().lines().map(name_of).collect();
        Ok(Kernel { release, image, modules: Modules { files, builtin }, lists })
    }

    /// Undoes the compression that newer kernel packages give their modules.
    fn decompressed(mut self, tools: &Tools, work: &Path, limits: Limits<'_>) -> Result<Kernel> {
        let directory = work.join("modules");
        let io = |error: std::io::Error| Error::io("cannot unpack kernel modules", &error);
        let packed: Vec<String> =
            self.modules.files.iter().filter(|(_, m)| m.path.ends_with(".ko.xz")).map(|(n, _)| n.clone()).collect();
        if let Some(other) =
            self.modules.files.values().find(|m| !m.path.ends_with(".ko") && !m.path.ends_with(".ko.xz"))
        {
            return Err(Error::invalid(format!("module {} is compressed in an unknown way", other.path)));
        }
        if packed.is_empty() {
            return Ok(self);
        }
        fs::create_dir(&directory).map_err(io)?;
        let mut command: Command = process::command(&tools.xz);
        command.args(["--decompress", "--quiet", "--"]);
        for name in &packed {
            let path = directory.join(format!("{name}.ko.xz"));
            fs::write(&path, &self.modules.files[name].bytes).map_err(io)?;
            command.arg(path);
        }
        process::run_ok(command, limits.within(Duration::from_secs(120)))?;
        for name in &packed {
            if let Some(module) = self.modules.files.get_mut(name) {
                module.bytes = fs::read(directory.join(format!("{name}.ko"))).map_err(io)?;
                module.path.truncate(module.path.len() - ".xz".len());
            }
        }
        fs::remove_dir_all(&directory).map_err(io)?;
        Ok(self)
    }

    /// Which modules the initramfs carries, in the order of loading.
    pub(crate) fn select(&self, recipe: &Recipe, document: &Document) -> Result<Selection> {
        let early = self.modules.order(&CHANNEL)?;
        let mut wanted: Vec<&str> = ROOT.to_vec();
        wanted.extend(OF_CLONES.iter().filter(|name| self.modules.order(&[name]).is_ok()));
        for (index, name) in recipe.modules.iter().enumerate() {
            self.modules
                .order(&[name])
                .map_err(|error| document.locate(&[Part::Key("modules"), Part::Index(index)], error))?;
            wanted.push(name);
        }
        let mut root = self.modules.order(&wanted)?;
        root.retain(|name| !early.contains(name));
        let mut growth = self.modules.order(&OF_GROWTH).unwrap_or_default();
        growth.retain(|name| !early.contains(name) && !root.contains(name));
        Ok(Selection { early, root, growth })
    }

    /// Puts the modules that a running guest may ask for into a disk's tree.
    pub(crate) fn install(&self, tree: &mut Tree, recipe: &Recipe) -> Result<()> {
        let usable = |path: &str| {
            let path = path.strip_prefix("kernel/").unwrap_or(path);
            DISK_MODULES.iter().any(|prefix| path.starts_with(prefix))
                && !NOT_DISK_MODULES.iter().chain(&RARE).any(|prefix| path.starts_with(prefix))
        };
        let mut wanted: Vec<&str> = Vec::new();
        for (name, module) in &self.modules.files {
            // A module whose needs are missing is of no use, and of no harm when left out.
            if usable(&module.path) && self.modules.order(&[name]).is_ok() {
                wanted.push(name);
            }
        }
        wanted.extend(recipe.modules.iter().map(String::as_str).chain(CHANNEL).chain(ROOT));
        let directory = tree.canonical(format!("lib/modules/{}", self.release).as_bytes())?;
        let directory = String::from_utf8_lossy(&directory).into_owned();
        for name in self.modules.order(&wanted)? {
            let module = &self.modules.files[&name];
            put(tree, &format!("{directory}/{}", module.path), &module.bytes)?;
        }
        for (name, bytes) in &self.lists {
            put(tree, &format!("{directory}/{name}"), bytes)?;
        }
        Ok(())
    }
}

fn put(tree: &mut Tree, path: &str, mut bytes: &[u8]) -> Result<()> {
    tree.make_parents(path.as_bytes())?;
    tree.put_file(path.as_bytes(), Meta::root(0o644), &mut bytes)
}
