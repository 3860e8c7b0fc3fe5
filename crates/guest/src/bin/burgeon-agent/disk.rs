//! The guest's file systems on disks that the host has changed: one that has grown, one that was cloned.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    path::Path,
};

use burgeon_guest::protocol::{Answer, Failure, FailureKind};

use crate::{server_keys, spawn::failure, sys, system::console};

const EXT4_MAGIC: u64 = 0xEF53;
/// Tells which VM a disk was last renewed for.
const INSTANCE: &str = "var/lib/burgeon/instance";
/// What two machines must not share, and what makes itself anew where it is missing.
const OWN: [&str; 3] =
    ["var/lib/systemd/random-seed", "var/lib/urandom/random-seed", "var/lib/systemd/credential.secret"];

const MACHINE_ID: &str = "etc/machine-id";
/// Of systems where it is a file of its own.
const DBUS_MACHINE_ID: &str = "var/lib/dbus/machine-id";

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
    server_keys::remove(root)?;
    remove(&root.join(DBUS_MACHINE_ID))?;
    let machine_id = root.join(MACHINE_ID);
    if fs::symlink_metadata(&machine_id).is_ok() {
        // Empty, it is filled at boot; absent, it would make systemd take this for an installation's first boot.
        remove(&machine_id)?;
        fs::write(&machine_id, "")?;
    }
    Ok(())
}

/// Forgets as well, in a system that goes on without booting: gives it another machine id, or an empty one to be given
/// another later. D-Bus's file, where it is one of its own, is written too: nothing makes it anew before the next boot.
pub(crate) fn replace_own(root: &Path, machine_id: &str) -> io::Result<()> {
    let is_file = |path: &str| fs::symlink_metadata(root.join(path)).is_ok_and(|about| about.is_file());
    let with_dbus = is_file(DBUS_MACHINE_ID);
    forget_own(root)?;
    if with_dbus {
        fs::write(root.join(DBUS_MACHINE_ID), machine_id)?;
    }
    if is_file(MACHINE_ID) {
        fs::write(root.join(MACHINE_ID), machine_id)?;
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
        // One that does not boot gets its ids at once, D-Bus's only where that is a file of its own.
        write("own");
        replace_own(&root, "new\n").unwrap();
        assert!(["etc/machine-id", own[2]].iter().all(|path| fs::read_to_string(at(path)).unwrap() == "new\n"));
        fs::remove_file(at(own[2])).unwrap();
        std::os::unix::fs::symlink("/etc/machine-id", at(own[2])).unwrap();
        replace_own(&root, "newer\n").unwrap();
        assert!(fs::symlink_metadata(at(own[2])).is_err());
        fs::remove_dir_all(&root).unwrap();
    }
}
