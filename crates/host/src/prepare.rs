//! The first phase of a VM's start: its directory, with links to the image's files and an empty overlay.

use std::{
    fs,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
};

use burgeon_api::{
    ByteSize, Error, Result, VmId,
    disk::MOST_ATTACHED,
    host::{Begin, Launch},
    image::{Boot, Image},
    vm::Accelerator,
};
use burgeon_qemu::{
    command::{DiskFrom, Machine, file},
    disk,
    memory::Base,
    process::{RunAs, give_directory},
};
use sha2::{Digest, Sha256};

use crate::{
    disks::Attached,
    kept::{self, Kept},
    layout::Layout,
    seed,
};

/// Which disk a VM starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    /// An empty overlay above the image's.
    New,
    /// The one that it had when it stopped.
    Kept,
}

/// Makes everything that QEMU will open, in a new directory `q` below `directory`: what an earlier try
/// has left there is not to be trusted. Nothing else (but the initramfs cache) changes.
pub(crate) async fn prepare(
    layout: &Layout,
    directory: &Path,
    launch: &Launch,
    disk: Disk,
    agent: &[u8],
    run_as: RunAs,
) -> Result<()> {
    let kept = match disk {
        Disk::New => None,
        Disk::Kept => Some(Kept::take(directory)?),
    };
    let directory = &directory.join(file::QEMU_DIRECTORY);
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("clear the VM's directory", &error));
        }
        _ => fs::create_dir(directory).map_err(|error| Error::io("create the VM's directory", &error))?,
    }
    if let Some(kept) = kept {
        kept.give_back(directory, launch, run_as)?;
        if launch.image.boot == Boot::Firmware {
            seed::write(directory, launch)?;
        }
        return give_directory(directory, run_as);
    }
    let image = PathBuf::from(&launch.image_directory);
    match &launch.source {
        _ if launch.image.boot != Boot::Agent => {}
        Some(source) => kept::share(&layout.vm(source.vm), directory, launch)?,
        None => {
            link(&image.join(Image::KERNEL), &directory.join(file::KERNEL))?;
            let initramfs = initramfs(layout, &image, &launch.image, agent)?;
            link(&initramfs, &directory.join(file::INITRAMFS))?;
        }
    }
    if let Some(size) = launch.image.disk.filter(|_| launch.image.map.is_none()) {
        let base = image.join(Image::DISK);
        link(&base, &directory.join(file::BASE))?;
        let length = fs::metadata(&base).map_err(|error| Error::io("look at the image's disk", &error))?.len();
        if length != size.bytes() {
            return Err(Error::damaged(format!(
                "image {}: its disk has {length} bytes where {} are told",
                launch.image.name,
                size.bytes()
            ))
            .with_hint("build or import it again"));
        }
        let overlay = directory.join(file::OVERLAY);
        disk::create_overlay(&overlay, disk_size(launch)).await?;
        give(&overlay, run_as, 0o600)?;
    }
    if launch.image.boot == Boot::Firmware {
        seed::write(directory, launch)?;
    }
    give_directory(directory, run_as)
}

/// Makes the directory of a VM that goes on from a captured state. Its kernel is for when it is started again.
pub(crate) fn prepare_activation(
    layout: &Layout,
    directory: &Path,
    launch: &Launch,
    source: VmId,
    run_as: RunAs,
) -> Result<()> {
    let directory = &directory.join(file::QEMU_DIRECTORY);
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("clear the VM's directory", &error));
        }
        _ => fs::create_dir(directory).map_err(|error| Error::io("create the VM's directory", &error))?,
    }
    kept::share(&layout.vm(source), directory, launch)?;
    give_directory(directory, run_as)
}

/// The machine of a VM that goes on from a captured state.
pub(crate) fn activation(launch: &Launch, accelerator: Accelerator, attached: Vec<Attached>, base: &Base) -> Machine {
    Machine { memory: Some(base.file().as_raw_fd()), ..machine(launch, accelerator, attached) }
}

/// The size of the VM's disk: the profile's wish, and never less than the image's.
pub(crate) fn disk_size(launch: &Launch) -> ByteSize {
    let image = launch.image.disk.unwrap_or_default();
    launch.profile.disk.map_or(image, |wish| wish.max(image))
}

pub(crate) fn machine(launch: &Launch, accelerator: Accelerator, attached: Vec<Attached>) -> Machine {
    Machine {
        name: launch.name.clone(),
        uuid: launch.id.to_string(),
        profile: launch.profile.clone(),
        boot: launch.image.boot,
        accelerator,
        disk: launch.image.disk.map(|_| if launch.image.map.is_some() { DiskFrom::Socket } else { DiskFrom::Files }),
        is_clone: launch.source.is_some() || launch.image.was_a_machine(),
        seed: launch.image.boot == Boot::Firmware,
        init: launch.image.init.clone(),
        kernel_parameters: kernel_parameters(launch),
        tsc_khz: burgeon_qemu::facts::tsc_khz(),
        translation_cache: ByteSize::mib(64),
        ports: MOST_ATTACHED,
        attached: attached.into_iter().map(|attached| (attached.disk, attached.port)).collect(),
        extra_disks: Vec::new(),
        size: launch.profile.size(),
        memory: None,
    }
}

fn kernel_parameters(launch: &Launch) -> Vec<String> {
    let mut words = launch.image.kernel_parameters.clone();
    if launch.begin == Begin::BootForSubstrate {
        // What the guest has freed holds zeros, and zeros are not captured.
        words.push("init_on_free=1".into());
    }
    words
}

/// The image's initramfs with this program's agent in front, made once per pair of them.
pub(crate) fn initramfs(layout: &Layout, image: &Path, about: &Image, agent: &[u8]) -> Result<PathBuf> {
    let hash: String = Sha256::digest(agent).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let digest = about.digest.get(..16).unwrap_or(&about.digest);
    let directory = layout.cache().join("initramfs");
    fs::create_dir_all(&directory).map_err(|error| Error::io("create the initramfs cache", &error))?;
    let path = directory.join(format!("{}-{digest}-{hash}.cpio", about.name));
    if path.exists() {
        return Ok(path);
    }
    let unique = format!("{}-{digest}.{}.{:?}.new", about.name, std::process::id(), std::thread::current().id());
    let new = directory.join(unique);
    burgeon_image::compose_initramfs(image, agent, &new)?;
    fs::rename(&new, &path).map_err(|error| Error::io("keep an initramfs", &error))?;
    forget_others(&directory, &about.name, &path);
    Ok(path)
}

/// Removes what was made for earlier builds of the image; running VMs hold links of their own.
fn forget_others(directory: &Path, image: &str, keep: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // NAME-DIGEST-AGENT.cpio, where names may hold dashes and digests do not.
        let of_image = name.strip_suffix(".cpio").and_then(|stem| stem.rsplitn(3, '-').nth(2)) == Some(image);
        if of_image && path != keep && fs::remove_file(&path).is_err() {
            tracing::debug!(path = %path.display(), "a stale initramfs stays");
        }
    }
}

/// A hard link, so that the image may be removed or replaced while the VM lives; a copy where links
/// cannot be made. Readable for QEMU's user, writable for nobody.
fn link(from: &Path, to: &Path) -> Result<()> {
    let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !from.exists() {
        return Err(Error::damaged(format!("the image lacks its {name}")).with_hint("build or import it again"));
    }
    if to.exists() {
        fs::remove_file(to).map_err(|error| Error::io(format!("replace {name}"), &error))?;
    }
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).map_err(|error| Error::io(format!("copy {name}"), &error))?;
    }
    fs::set_permissions(to, fs::Permissions::from_mode(0o444))
        .map_err(|error| Error::io(format!("protect {name}"), &error))
}

fn give(path: &Path, run_as: RunAs, mode: u32) -> Result<()> {
    let act = || -> std::io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        if let RunAs::User { number, .. } = run_as {
            std::os::unix::fs::chown(path, Some(number), Some(number))?;
        }
        Ok(())
    };
    act().map_err(|error| Error::io(format!("hand over {}", path.display()), &error))
}
