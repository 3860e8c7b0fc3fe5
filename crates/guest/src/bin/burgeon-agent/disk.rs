//! The guest's file systems on disks that the host has changed: one that has grown, one that was cloned.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    path::Path,
};

use burgeon_guest::protocol::{Answer, Failure, FailureKind};

use crate::{spawn::failure, sys, system::console};

const EXT4_MAGIC: u64 = 0xEF53;
/// Tells which VM a disk was last renewed for.
const INSTANCE: &str = "var/lib/burgeon/instance";
/// What two machines must not share, and what makes itself anew where it is missing.
const OWN: [&str; 4] = [
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/lib/urandom/random-seed",
    "var/lib/systemd/credential.secret",
];

/// Makes a file system of ext4 as large as its device. One that is that large already stays as it is.
pub(crate) fn grow_one(device: &str, mounted_at: &str) -> io::Result<bool> {
    let directory = File::open(mounted_at)?;
    let about = rustix::fs::fstatfs(&directory)?;
    if u64::try_from(about.f_type).ok() != Some(EXT4_MAGIC) {
        return Ok(false);
    }
    let block = u64::try_from(about.f_bsize).unwrap_or(4096).max(1024);
    let blocks = File::open(device)?.seek(SeekFrom::End(0))? / block;
    sys::grow_ext4(&directory, blocks)?;
    Ok(true)
}

/// Makes all mounted file systems as large as their disks, as far as the kernel can do that.
pub(crate) fn grow_all() -> Result<Answer, Failure> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut failed = None;
    for line in mounts.lines() {
        let mut words = line.split(' ');
        let (Some(device), Some(target)) = (words.next(), words.next()) else { continue };
        if !device.starts_with("/dev/") {
            continue;
        }
        if let Err(error) = grow_one(device, target) {
            failed = Some(failure(FailureKind::Io, format!("cannot grow the file system on {device}: {error}")));
        }
    }
    failed.map_or(Ok(Answer::Done), Err)
}

/// Removes from a cloned system, before it starts, what makes it the machine that it was cloned from: once for each
/// clone.
pub(crate) fn renew(root: &Path, instance: &str) -> io::Result<()> {
    let marker = root.join(INSTANCE);
    if fs::read_to_string(&marker).is_ok_and(|known| known.trim() == instance) {
        return Ok(());
    }
    forget_own(root)?;
    if let Some(parent) = marker.parent() {
        fs::create_dir_all(parent)?;
    }
    // Last: where it breaks off before, the next start does all of it.
    rustix::fs::sync();
    fs::write(&marker, format!("{instance}\n"))?;
    console("this is a clone: its machine id and host keys are made anew");
    Ok(())
}

/// Removes what makes the system below `root` a certain machine.
pub(crate) fn forget_own(root: &Path) -> io::Result<()> {
    for path in OWN {
        remove(&root.join(path))?;
    }
    for entry in fs::read_dir(root.join("etc/ssh")).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            remove(&entry.path())?;
        }
    }
    let machine_id = root.join("etc/machine-id");
    if fs::symlink_metadata(&machine_id).is_ok() {
        // Empty, it is filled at boot; absent, it would make systemd take this for an installation's first boot.
        remove(&machine_id)?;
        fs::write(&machine_id, "")?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_is_renewed_once() {
        let root = std::env::temp_dir().join(format!("burgeon-renew-{}", std::process::id()));
        let at = |path: &str| root.join(path);
        for directory in ["etc/ssh", "var/lib/dbus"] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        let own = ["etc/ssh/ssh_host_rsa_key", "etc/ssh/ssh_host_rsa_key.pub", "var/lib/dbus/machine-id"];
        let write = |text: &str| {
            own.iter()
                .chain(&["etc/machine-id", "etc/ssh/sshd_config"])
                .for_each(|path| fs::write(at(path), text).unwrap())
        };
        write("old");
        renew(&root, "a").unwrap();
        assert!(own.iter().all(|path| !at(path).exists()));
        assert_eq!(fs::read_to_string(at("etc/machine-id")).unwrap(), "");
        assert_eq!(fs::read_to_string(at("etc/ssh/sshd_config")).unwrap(), "old");
        // What it has made for itself since stays, until it is cloned again.
        write("own");
        renew(&root, "a").unwrap();
        assert!(own.iter().all(|path| fs::read_to_string(at(path)).unwrap() == "own"));
        renew(&root, "b").unwrap();
        assert!(own.iter().all(|path| !at(path).exists()));
        fs::remove_dir_all(&root).unwrap();
    }
}
