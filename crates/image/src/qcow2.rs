//! The header of a qcow2 file, as far as trust needs it (QEMU, `docs/interop/qcow2.txt`).

use burgeon_api::{Error, Result};

pub(crate) const MAGIC: &[u8] = b"QFI\xfb";
/// Bytes of the file that [`check`] wants to see, where it has as many.
pub const HEAD: u64 = 1 << 16;

/// Refuses what would make QEMU open another file: a backing file or an external data file. A
/// user's image must not name, say, `/etc/shadow`, and have it read into a disk.
///
/// # Errors
/// `Refused`, `Invalid` or `Damaged`, with what is wrong.
pub fn check(head: &[u8]) -> Result<()> {
    let damaged = || Error::damaged("the qcow2 file's header is malformed");
    let number = |at: usize, size: usize| -> Result<u64> {
        let bytes = head.get(at..at + size).ok_or_else(damaged)?;
        Ok(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    if !head.starts_with(MAGIC) {
        return Err(damaged());
    }
    let version = number(4, 4)?;
    if version != 2 && version != 3 {
        return Err(Error::invalid(format!("qcow2 version {version} is not known")));
    }
    let flatten = "make one file of it first: qemu-img convert -O qcow2 FILE NEW";
    if number(8, 8)? != 0 {
        return Err(Error::refused("the qcow2 file has a backing file").with_hint(flatten));
    }
    if number(32, 4)? != 0 {
        return Err(Error::refused("the qcow2 file is encrypted").with_hint("decrypt it first"));
    }
    let mut extension = 72;
    if version == 3 {
        const EXTERNAL_DATA: u64 = 1 << 2;
        if number(72, 8)? & EXTERNAL_DATA != 0 {
            return Err(Error::refused("the qcow2 file keeps its data in another file").with_hint(flatten));
        }
        extension = usize::try_from(number(100, 4)?).map_err(|_| damaged())?;
    }
    const END: u64 = 0;
    const BACKING_FORMAT: u64 = 0xe279_2aca;
    const DATA_FILE: u64 = 0x4441_5441;
    loop {
        let Ok(kind) = number(extension, 4) else { return Ok(()) };
        match kind {
            END => return Ok(()),
            BACKING_FORMAT | DATA_FILE => {
                return Err(Error::refused("the qcow2 file refers to another file").with_hint(flatten));
            }
            _ => {}
        }
        let length = usize::try_from(number(extension + 4, 4)?).map_err(|_| damaged())?;
        extension = extension.checked_add(8 + length.next_multiple_of(8)).ok_or_else(damaged)?;
    }
}

/// What a header that [`check`] has passed tells of the disk.
pub(crate) struct Shape {
    /// Bytes of the disk that a guest sees.
    pub(crate) size: u64,
    /// Bytes of a cluster.
    pub(crate) cluster: u64,
}

impl Shape {
    pub(crate) fn of(head: &[u8]) -> Result<Shape> {
        let damaged = || Error::damaged("the qcow2 file's header is malformed");
        let bits = head.get(20..24).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        let size = head.get(24..32).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        // QEMU takes clusters of 512 bytes to 2 MiB.
        let bits = bits.filter(|bits| (9..=21).contains(bits)).ok_or_else(damaged)?;
        Ok(Shape { size: size.ok_or_else(damaged)?, cluster: 1 << bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(MAGIC);
        head[7] = 3;
        head[103] = 104;
        head
    }

    #[test]
    fn files_that_lead_elsewhere_are_refused() {
        check(&header()).unwrap();
        for (at, value, word) in
            [(15, 1, "backing file"), (79, 4, "another file"), (35, 1, "encrypted"), (7, 9, "version 9")]
        {
            let mut head = header();
            head[at] = value;
            let error = check(&head).unwrap_err();
            assert!(error.message.contains(word), "{error}");
        }
        let mut head = header();
        head[104..112].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5]);
        head[120..124].copy_from_slice(b"DATA");
        assert!(check(&head).unwrap_err().message.contains("another file"));
        assert!(check(&header()[..20]).is_err());
        assert!(check(b"QFI").is_err());
    }
}
