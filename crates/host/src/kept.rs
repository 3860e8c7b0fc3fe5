//! What a VM that has stopped takes into its next start: its disk, and the very files that the disk stands on.
//! The image may have been removed or built anew since; an overlay above other bytes would be rubble.
//!
//! QEMU's directory belongs to QEMU's user, so whatever is found in it is looked at before it is used. While
//! the directory is made anew, the files lie in one beside it. Each of them is in exactly one of the two at any
//! time: after a crash in between, the next start finds them all.

use std::{
    fs,
    io::Read,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, host::Launch, image::Boot};
use burgeon_qemu::{command::file, process::RunAs};
use rustix::fs::CWD;

const DIRECTORY: &str = "kept";
const FILES: [&str; 4] = [file::KERNEL, file::INITRAMFS, file::BASE, file::OVERLAY];

/// The files, out of the way.
pub(crate) struct Kept {
    directory: PathBuf,
}

impl Kept {
    /// Moves them out of QEMU's directory, which may then be removed.
    pub(crate) fn take(vm: &Path) -> Result<Kept> {
        let directory = vm.join(DIRECTORY);
        let failed = |error: &std::io::Error| Error::io("keep the VM's disk", error);
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(&error)),
            _ => {}
        }
        for name in FILES {
            let from = vm.join(file::QEMU_DIRECTORY).join(name);
            // No link is followed: only what is a file itself is taken.
            if fs::symlink_metadata(&from).is_ok_and(|about| about.is_file()) {
                fs::rename(&from, directory.join(name)).map_err(|error| failed(&error))?;
            }
        }
        Ok(Kept { directory })
    }

    /// Moves them into the new directory.
    pub(crate) fn give_back(self, directory: &Path, launch: &Launch, run_as: RunAs) -> Result<()> {
        let mut needed = Vec::new();
        if launch.image.boot == Boot::Agent {
            needed.extend([file::KERNEL, file::INITRAMFS]);
        }
        if let Some(size) = launch.image.disk.filter(|_| launch.image.map.is_none()) {
            needed.extend([file::BASE, file::OVERLAY]);
            let length = fs::metadata(self.directory.join(file::BASE)).map_or(0, |about| about.len());
            if length != size.bytes() {
                return Err(damaged(launch, &format!("{} has {length} bytes, not {}", file::BASE, size.bytes())));
            }
            check_overlay(&self.directory.join(file::OVERLAY), launch, run_as)?;
        }
        for name in needed {
            let from = self.directory.join(name);
            match fs::rename(&from, directory.join(name)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(damaged(launch, &format!("{name} is gone")));
                }
                moved => moved.map_err(|error| Error::io(format!("give {name} to the VM again"), &error))?,
            }
        }
        match fs::remove_dir_all(&self.directory) {
            Err(error) => Err(Error::io(format!("remove {}", self.directory.display()), &error)),
            Ok(()) => Ok(()),
        }
    }
}

/// Gives a clone the kernel and the initramfs that its source was started with, whatever has become of the image.
/// QEMU's user may have put anything in their place: only what is a file is taken, and it is the opened file itself that
/// is shared, not whatever has its name a moment later.
pub(crate) fn share(source: &Path, directory: &Path, launch: &Launch) -> Result<()> {
    for name in [file::KERNEL, file::INITRAMFS] {
        let failed = |error: &std::io::Error| {
            let shown = &launch.name;
            Error::io(format!("give VM {shown} the {name} of the VM that it is cloned from"), error)
        };
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
        let from = source.join(file::QEMU_DIRECTORY).join(name);
        let mut opened =
            fs::File::options().read(true).custom_flags(flags).open(&from).map_err(|error| failed(&error))?;
        if !opened.metadata().map_err(|error| failed(&error))?.is_file() {
            return Err(Error::damaged(format!("{} is no file", from.display())));
        }
        let to = directory.join(name);
        let itself = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let linked = rustix::fs::linkat(CWD, itself, CWD, &to, rustix::fs::AtFlags::SYMLINK_FOLLOW);
        if linked.is_err() {
            let mut copy = fs::File::create_new(&to).map_err(|error| failed(&error))?;
            std::io::copy(&mut opened, &mut copy).map_err(|error| failed(&error))?;
            opened = copy;
        }
        opened.set_permissions(fs::Permissions::from_mode(0o444)).map_err(|error| failed(&error))?;
    }
    Ok(())
}

fn damaged(launch: &Launch, what: &str) -> Error {
    let name = &launch.name;
    Error::damaged(format!("VM {name} cannot be started again: {what}"))
        .with_hint(format!("remove it and create another: burgeon vm rm {name}"))
}

/// What QEMU had in its hands must still be a disk that leads to no other file, and goes to the VM's user.
fn check_overlay(path: &Path, launch: &Launch, run_as: RunAs) -> Result<()> {
    let failed = |error: &std::io::Error| damaged(launch, &format!("{}: {error}", file::OVERLAY));
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut overlay = fs::File::options().read(true).custom_flags(flags).open(path).map_err(|error| failed(&error))?;
    let about = overlay.metadata().map_err(|error| failed(&error))?;
    if about.nlink() != 1 {
        return Err(damaged(launch, &format!("{} has another name elsewhere", file::OVERLAY)));
    }
    let mut head = Vec::new();
    (&mut overlay).take(burgeon_image::QCOW2_HEAD).read_to_end(&mut head).map_err(|error| failed(&error))?;
    burgeon_image::check_qcow2(&head).map_err(|error| damaged(launch, &error.message))?;
    if let RunAs::User { number, .. } = run_as {
        std::os::unix::fs::fchown(&overlay, Some(number), Some(number)).map_err(|error| failed(&error))?;
    }
    Ok(())
}
