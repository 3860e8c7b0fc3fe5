//! SHA-256 of files and of sparse disks.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use burgeon_api::{Error, Result};
use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};
use sha2::{Digest, Sha256};

/// Blocks of a disk that hold zeros only are left out of its digest, so that holes are free.
const BLOCK: u64 = 64 << 10;

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The SHA-256 of a file, as hexadecimal digits.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                return Ok(hex(&hasher.finalize()));
            }
            hasher.update(&buffer[..count]);
        }
    };
    read().map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))
}

/// A digest of a disk: its length, then offset and bytes of each block of [`DiskDigest::BLOCK`] bytes that is not all
/// zeros. It depends on the bytes only, not on where they lie.
pub struct DiskDigest(Sha256);

impl DiskDigest {
    pub const BLOCK: u64 = BLOCK;

    /// Of a disk of so many bytes.
    #[must_use]
    pub fn new(length: u64) -> DiskDigest {
        let mut hasher = Sha256::new();
        hasher.update(b"burgeon disk 1\0");
        hasher.update(length.to_le_bytes());
        DiskDigest(hasher)
    }

    /// Takes the next block; the last one of a disk may be shorter. Those that hold zeros only may be left out.
    pub fn add(&mut self, offset: u64, block: &[u8]) {
        if !is_zero(block) {
            self.0.update(offset.to_le_bytes());
            self.0.update(block);
        }
    }

    /// As hexadecimal digits.
    #[must_use]
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// The digest of a disk in a file.
pub(crate) fn of_disk(path: &Path) -> Result<String> {
    let read = || -> io::Result<String> {
        let file = File::open(path)?;
        let mut digest = DiskDigest::new(file.metadata()?.len());
        each_block(&file, |offset, block| {
            digest.add(offset, block);
            Ok(())
        })?;
        Ok(digest.finish())
    };
    read().map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))
}

/// Makes holes of a disk's blocks of zeros, such as its empty tables of inodes.
pub(crate) fn punch_zeros(path: &Path) -> Result<()> {
    let punch = || -> io::Result<()> {
        let file = File::options().read(true).write(true).open(path)?;
        each_block(&file, |offset, block| {
            if !is_zero(block) {
                return Ok(());
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&file, flags, offset, block.len() as u64) {
                // A file system without holes keeps its zeros.
                Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
                Err(error) => Err(error.into()),
            }
        })
    };
    punch().map_err(|error| Error::io(format!("cannot write {}", path.display()), &error))
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Calls `each` for the blocks of a file that may hold data, with their offsets.
fn each_block(file: &File, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut block = vec![0; usize::try_from(BLOCK).unwrap_or(usize::MAX)];
    let mut offset = 0;
    while offset < length {
        match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) => offset = data / BLOCK * BLOCK,
            Err(Errno::NXIO) => break,
            // A file system that cannot tell holes: read everything.
            Err(Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let want = usize::try_from(BLOCK.min(length - offset)).unwrap_or(block.len());
        file.read_exact_at(&mut block[..want], offset)?;
        each(offset, &block[..want])?;
        offset += BLOCK;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_do_not_change_the_digest_of_a_disk() {
        let directory = tempfile::tempdir().unwrap();
        let (sparse, dense) = (directory.path().join("a"), directory.path().join("b"));
        let mut bytes = vec![0u8; 1 << 20];
        bytes[300_000..300_004].copy_from_slice(b"data");
        std::fs::write(&dense, &bytes).unwrap();
        let file = File::create(&sparse).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"data", 300_000).unwrap();
        assert_eq!(of_disk(&sparse).unwrap(), of_disk(&dense).unwrap());
        punch_zeros(&dense).unwrap();
        assert_eq!(std::fs::read(&dense).unwrap(), bytes);
        file.set_len((1 << 20) + 1).unwrap();
        assert_ne!(of_disk(&sparse).unwrap(), of_disk(&dense).unwrap());
    }
}
