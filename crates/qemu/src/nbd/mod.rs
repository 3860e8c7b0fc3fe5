//! Disks for QEMU, by the NBD protocol on unix sockets: QEMU's own client needs no kernel module.
//!
//! [`Server`] serves one export on one socket. A connection's thread answers by itself what is answered from the
//! kernel's page cache, in the order of the requests, and gathers replies while more requests are waiting; what has to
//! wait (syncs, bytes that must be fetched) goes to a few helpers, so that nothing else waits for it.

#[cfg(fuzzing)]
mod fuzzing;
mod helpers;
mod protocol;
mod server;
mod session;

use std::io;

#[cfg(fuzzing)]
pub use fuzzing::converse;
pub use server::{Owner, Server};

/// What is served. Calls block, come from several threads, and may overlap.
pub trait Export: Send + Sync + 'static {
    /// Bytes of the export.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Whether a read would be answered without waiting for anything slow.
    fn is_near(&self, offset: u64, length: u64) -> bool;

    /// Reads bytes.
    ///
    /// # Errors
    /// As the storage below tells.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes bytes.
    ///
    /// # Errors
    /// As the storage below tells.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes bytes zero.
    ///
    /// # Errors
    /// As the storage below tells.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Says that bytes are not needed any more.
    ///
    /// # Errors
    /// As the storage below tells.
    fn trim(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes all that was written before survive a power cut.
    ///
    /// # Errors
    /// As the storage below tells.
    fn flush(&self) -> io::Result<()>;

    /// Whether the bytes from `offset` on are zeros that take no place, and for how many up to `end`.
    ///
    /// # Errors
    /// As the storage below tells.
    fn hole(&self, offset: u64, end: u64) -> io::Result<(bool, u64)>;
}

impl Export for burgeon_store::disk::Disk {
    fn size(&self) -> u64 {
        self.size()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn is_near(&self, offset: u64, length: u64) -> bool {
        self.is_near(offset, length)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(offset, bytes)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.trim(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.flush()
    }

    fn hole(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        let (extent, length) = self.extent(offset, end)?;
        Ok((extent == burgeon_store::disk::Extent::Zero, length))
    }
}
