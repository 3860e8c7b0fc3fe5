//! Disks that QEMU has before they are made.
//!
//! A QEMU that waits for a captured state has its disks open; which disk it is, is known when the state is. Until then
//! it only looks at what the disk is going to be made of, and writes nothing.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use burgeon_qemu::nbd::Export;
use burgeon_store::disk::Disk;

pub(crate) struct Late {
    before: Arc<Disk>,
    disk: OnceLock<Arc<Disk>>,
}

impl Late {
    /// `before`: the disk that it is going to be a clone of.
    pub(crate) fn new(before: Arc<Disk>) -> Late {
        Late { before, disk: OnceLock::new() }
    }

    /// From now on it is this one. The first that is told counts.
    pub(crate) fn bind(&self, disk: Arc<Disk>) {
        let _the_first_stays = self.disk.set(disk);
    }

    fn now(&self) -> &Disk {
        self.disk.get().unwrap_or(&self.before)
    }

    fn bound(&self) -> io::Result<&Disk> {
        let unbound = || io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is not made yet");
        self.disk.get().map(|disk| &**disk).ok_or_else(unbound)
    }
}

impl Export for Late {
    fn size(&self) -> u64 {
        self.now().size()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn is_near(&self, offset: u64, length: u64) -> bool {
        self.now().is_near(offset, length)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.now().read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.bound()?.write(offset, bytes)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.bound()?.zero(offset, length)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.bound()?.trim(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        // A QEMU that waits flushes too; there is nothing of its own yet.
        self.disk.get().map_or(Ok(()), |disk| disk.flush())
    }

    fn hole(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        Export::hole(self.now(), offset, end)
    }
}
