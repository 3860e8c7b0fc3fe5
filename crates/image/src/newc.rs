//! Archives for the kernel's initramfs: cpio in its `newc` form.
//!
//! Each entry is a header of `070701` and thirteen numbers of eight hexadecimal digits, the name
//! with a NUL, padding to 4, the bytes, padding to 4. Archives may follow one another; the kernel
//! unpacks all of them, later entries over earlier ones
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{collections::BTreeMap, io::Write};

use burgeon_api::{Error, Result};

/// What an entry is, with its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Directory,
    File(Vec<u8>),
    Link(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) body: Body,
    /// Permission bits.
    pub(crate) mode: u32,
}

/// Entries by path without a leading slash.
#[derive(Clone, Debug, Default)]
pub(crate) struct Archive {
    entries: BTreeMap<Vec<u8>, Entry>,
}

impl Archive {
    pub(crate) fn put(&mut self, path: impl Into<Vec<u8>>, mode: u32, body: Body) {
        self.entries.insert(path.into(), Entry { body, mode });
    }

    /// Writes the archive, padded to a multiple of 512 bytes. The bytes depend on the entries only:
    /// order is that of the paths, times are 0, owners are root, inode numbers count from 1.
    pub(crate) fn write(&self, out: &mut dyn Write) -> Result<()> {
        let mut writer = Writer { out, written: 0, inode: 0 };
        for (path, entry) in &self.entries {
            let (kind, links, bytes): (u32, u32, &[u8]) = match &entry.body {
                Body::Directory => (0o040_000, 2, &[]),
                Body::File(bytes) => (0o100_000, 1, bytes),
                Body::Link(target) => (0o120_000, 1, target),
            };
            writer.entry(path, kind | entry.mode, links, bytes)?;
        }
        writer.inode = 0;
        writer.header(b"TRAILER!!!", 0, 0, 1, 0)?;
        writer.pad(512)
    }

    pub(crate) fn bytes(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write(&mut out)?;
        Ok(out)
    }
}

struct Writer<'a> {
    out: &'a mut dyn Write,
    written: usize,
    inode: u32,
}

impl Writer<'_> {
    fn entry(&mut self, path: &[u8], mode: u32, links: u32, bytes: &[u8]) -> Result<()> {
        let size = u32::try_from(bytes.len()).map_err(|_| Error::invalid("a file of the initramfs exceeds 4 GiB"))?;
        self.inode += 1;
        self.header(path, self.inode, mode, links, size)?;
        self.raw(bytes)?;
        self.pad(4)
    }

    fn header(&mut self, path: &[u8], inode: u32, mode: u32, links: u32, size: u32) -> Result<()> {
        let name = u32::try_from(path.len() + 1).map_err(|_| Error::invalid("a path is too long"))?;
        let mut header = String::from("070701");
        // inode, mode, uid, gid, links, mtime, size, device (2), special (2), name, check
        for number in [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name, 0] {
            header.push_str(&format!("{number:08x}"));
        }
        self.raw(header.as_bytes())?;
        self.raw(path)?;
        self.raw(&[0])?;
        self.pad(4)
    }

    fn pad(&mut self, to: usize) -> Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.raw(&vec![0; missing])
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|error| Error::io("cannot write the initramfs", &error))?;
        self.written += bytes.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_fixed() {
        let mut archive = Archive::default();
        archive.put("d/f", 0o640, Body::File(b"hello".to_vec()));
        archive.put("d", 0o755, Body::Directory);
        archive.put("l", 0o777, Body::Link(b"d/f".to_vec()));
        let bytes = archive.bytes().unwrap();
        let zero = "00000000";
        let header = |inode: u32, mode: u32, links: u32, size: u32, name: u32| {
            format!(
                "070701{inode:08x}{mode:08x}{zero}{zero}{links:08x}{zero}{size:08x}{zero}{zero}{zero}{zero}{name:08x}{zero}"
            )
        };
        let expected = [
            header(1, 0o040_755, 2, 0, 2).as_str(),
            "d\0",
            header(2, 0o100_640, 1, 5, 4).as_str(),
            "d/f\0\0\0hello\0\0\0",
            header(3, 0o120_777, 1, 3, 2).as_str(),
            "l\0d/f\0",
            header(0, 0, 1, 0, 11).as_str(),
            "TRAILER!!!\0\0\0\0",
        ]
        .concat();
        assert_eq!(bytes.len(), 512);
        assert_eq!(String::from_utf8_lossy(&bytes[..expected.len()]), expected);
        assert!(bytes[expected.len()..].iter().all(|byte| *byte == 0));
    }
}
