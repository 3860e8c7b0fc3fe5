//! What the kernel unpacks into memory at boot: modules with their lists, busybox, the agent.
//!
//! ```text
//! /init               the agent, put in front when a VM starts
//! /burgeon/modules    file names below /burgeon, one per line, in the order of loading: the agent's channel
//! /burgeon/modules.root   likewise: root disk, network, entropy, and what the recipe names
//! /burgeon/modules.growth likewise: memory that comes and goes; loaded in guests that have such
//! /burgeon/NAME.ko
//! ```

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use burgeon_api::{Error, Result, image::Image};

use crate::{
    deb,
    kernel::{Kernel, Selection},
    newc::{Archive, Body},
    process::{Limits, Tools},
    tree::{Kind, Meta, Tree},
};

/// Writes the initramfs that a VM of an image boots with: an archive that holds the agent as
/// `/init`, followed by the image's own.
///
/// # Errors
/// `NotFound` where the image has no initramfs; errors of writing.
pub fn compose_initramfs(image_directory: &Path, agent: &[u8], out: &Path) -> Result<()> {
    let mut front = Archive::default();
    front.put("init", 0o755, Body::File(agent.to_vec()));
    let from = image_directory.join(Image::INITRAMFS);
    let mut image = File::open(&from).map_err(|error| Error::io(format!("cannot open {}", from.display()), &error))?;
    let write = |error: io::Error| Error::io(format!("cannot write {}", out.display()), &error);
    let mut file = BufWriter::new(File::create(out).map_err(write)?);
    front.write(&mut file)?;
    io::copy(&mut image, &mut file).map_err(write)?;
    file.flush().map_err(write)
}

/// The modules and their lists.
pub(crate) fn put_modules(archive: &mut Archive, kernel: &Kernel, selection: &Selection) {
    archive.put("burgeon", 0o755, Body::Directory);
    let Selection { early, root, growth } = selection;
    for (list, names) in [("modules", early), ("modules.root", root), ("modules.growth", growth)] {
        let text: String = names.iter().map(|name| format!("{name}.ko\n")).collect();
        archive.put(format!("burgeon/{list}"), 0o644, Body::File(text.into_bytes()));
        for name in names {
            let bytes = kernel.modules.files[name].bytes.clone();
            archive.put(format!("burgeon/{name}.ko"), 0o644, Body::File(bytes));
        }
    }
}

/// The busybox program out of its package.
pub(crate) fn busybox(package: &Path, tools: &Tools, limits: Limits<'_>) -> Result<Vec<u8>> {
    let deb = deb::read(package, tools, limits)?;
    let mut archive = tar::Archive::new(deb.data.as_slice());
    let damaged = |error: io::Error| Error::damaged(format!("the busybox package cannot be read: {error}"));
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        if entry.header().entry_type().is_file() && entry.path_bytes().ends_with(b"bin/busybox") {
            let mut bytes = Vec::new();
            io::copy(&mut entry, &mut bytes).map_err(damaged)?;
            return Ok(bytes);
        }
    }
    Err(Error::damaged("the busybox package holds no bin/busybox"))
}

/// Busybox alone: what the builder's own VM works with.
pub(crate) fn put_busybox(archive: &mut Archive, busybox: &[u8]) {
    archive.put("bin", 0o755, Body::Directory);
    archive.put("bin/busybox", 0o755, Body::File(busybox.to_vec()));
    for directory in ["dev", "proc", "sys"] {
        archive.put(directory, 0o755, Body::Directory);
    }
}

/// Names of busybox's commands, from the table that its program carries: sorted names, each ended
/// by NUL, the first two being `[` and `[[`. Reading it runs no foreign program on this machine.
fn applets(busybox: &[u8]) -> Result<Vec<String>> {
    let start = b"\0[\0[[\0";
    let missing = || Error::damaged("the busybox program holds no table of its commands");
    let at = busybox.windows(start.len()).position(|window| window == start).ok_or_else(missing)?;
    let mut names = Vec::new();
    for name in busybox[at + 1..].split(|byte| *byte == 0) {
        let usable = |byte: &u8| byte.is_ascii_alphanumeric() || b"[-_.+".contains(byte);
        if name.is_empty() || name.len() > 32 || !name.iter().all(usable) {
            break;
        }
        names.push(String::from_utf8_lossy(name).into_owned());
    }
    if names.iter().any(|name| name == "sh") { Ok(names) } else { Err(missing()) }
}

/// A small root file system around busybox, with all commands in `/bin`.
pub(crate) fn busybox_tree(directory: &Path, busybox: &[u8]) -> Result<Tree> {
    let mut tree = Tree::create(directory)?;
    for (path, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("mnt", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("var", 0o755),
        ("var/tmp", 0o1777),
    ] {
        tree.put_directory(path.as_bytes(), Meta::root(mode))?;
    }
    tree.put_file(b"bin/busybox", Meta::root(0o755), &mut { busybox })?;
    for name in applets(busybox)?.iter().filter(|name| *name != "busybox") {
        tree.put_link(format!("bin/{name}").as_bytes(), Meta::root(0o777), b"busybox")?;
    }
    for (path, target) in [
        ("sbin", "bin"),
        ("usr/bin", "../bin"),
        ("usr/sbin", "../bin"),
        ("var/run", "../run"),
        ("etc/mtab", "../proc/self/mounts"),
    ] {
        tree.put_link(path.as_bytes(), Meta::root(0o777), target.as_bytes())?;
    }
    for (path, text) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("etc/shells", "/bin/sh\n"),
        ("etc/profile", "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"),
    ] {
        tree.put_file(path.as_bytes(), Meta::root(0o644), &mut text.as_bytes())?;
    }
    tree.put_file(b"etc/shadow", Meta::root(0o600), &mut &b"root:*:::::::\nnobody:*:::::::\n"[..])?;
    Ok(tree)
}

/// Adds a tree to an archive. Owners other than root are not kept; an initramfs has none.
pub(crate) fn put_tree(archive: &mut Archive, tree: &Tree) -> Result<()> {
    for (path, node) in tree.iter().filter(|(path, _)| !path.is_empty()) {
        let body = match &node.kind {
            Kind::Directory => Body::Directory,
            Kind::File => Body::File(tree.read(path)?),
            Kind::Link(target) => Body::Link(target.clone()),
            Kind::Device { .. } | Kind::Fifo => continue,
        };
        archive.put(path, node.meta.mode, body);
    }
    Ok(())
}

/// Writes an archive to a file.
pub(crate) fn write(archive: &Archive, path: &Path) -> Result<()> {
    fs::write(path, archive.bytes()?).map_err(|error| Error::io(format!("cannot write {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_comes_first() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(Image::INITRAMFS), b"070701 the image's").unwrap();
        let out = directory.path().join("out");
        compose_initramfs(directory.path(), b"agent", &out).unwrap();
        let bytes = fs::read(&out).unwrap();
        assert!(bytes.starts_with(b"070701"));
        assert_eq!(&bytes[110..120], b"init\0\0agen");
        assert!(bytes[512..].starts_with(b"070701 the image's"));
        assert!(compose_initramfs(&directory.path().join("no"), b"", &out).is_err());
    }

    #[test]
    fn commands_of_busybox_are_found() {
        let program = b"junk\0Usage\0[\0[[\0acpid\0ls\0sh\0zcat\0\0ls";
        assert_eq!(applets(program).unwrap(), ["[", "[[", "acpid", "ls", "sh", "zcat"]);
        assert!(applets(b"nothing").is_err());
        let directory = tempfile::tempdir().unwrap();
        let tree = busybox_tree(&directory.path().join("t"), program).unwrap();
        assert_eq!(tree.canonical(b"usr/sbin/ls").unwrap(), b"bin/ls");
    }
}
