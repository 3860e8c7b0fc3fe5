//! Little-endian fields of binary formats, and the checks that their fixed blocks share: magic in bytes 0 to 3,
//! version in byte 4, CRC-32 in the last four. That much is the same in every version of a format.

use burgeon_api::{Error, Result};

/// The `N` bytes at `at`, which the caller knows to be there.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Writes the checksum of all that stands before it into the last four bytes.
pub(crate) fn seal(block: &mut [u8]) {
    let at = block.len() - 4;
    let sum = crc32fast::hash(&block[..at]);
    put(block, at, &sum.to_le_bytes());
}

/// Whether a block is one of ours and of our version. The checksum goes before the version, so that a flipped bit is
/// not taken for another version.
pub(crate) fn check_sealed(block: &[u8], magic: [u8; 4], version: u8, what: &str) -> Result<()> {
    check_magic(block, magic, what)?;
    let at = block.len() - 4;
    if u32_at(block, at) != crc32fast::hash(&block[..at]) {
        return Err(Error::damaged(format!("{what} has a wrong checksum")));
    }
    check_version(block, version, what)
}

pub(crate) fn check_magic(block: &[u8], magic: [u8; 4], what: &str) -> Result<()> {
    if block[..4] == magic {
        return Ok(());
    }
    Err(Error::damaged(format!("{what} does not begin with \"{}\"", magic.escape_ascii())))
}

pub(crate) fn check_version(block: &[u8], version: u8, what: &str) -> Result<()> {
    if block[4] == version {
        return Ok(());
    }
    Err(Error::refused(format!("{what} has version {}; this Burgeon knows version {version}", block[4]))
        .with_hint("use the newer Burgeon that wrote it"))
}

/// Refuses what a later version may have put where this one has nothing.
pub(crate) fn check_reserved(block: &[u8], at: std::ops::Range<usize>, what: &str) -> Result<()> {
    if block[at.clone()].iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(Error::refused(format!("{what} has something in its reserved bytes {} to {}", at.start, at.end - 1))
        .with_hint("use the newer Burgeon that wrote it"))
}
