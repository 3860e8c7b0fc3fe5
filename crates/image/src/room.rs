//! How large an import may become: by its user's limit, and by the space there is.

use std::{
    io::{self, Read},
    path::Path,
};

use burgeon_api::{ByteSize, Error, Result};

/// Refuses a disk beyond the limit.
pub(crate) fn check_size(size: u64, most: ByteSize) -> Result<()> {
    if size <= most.bytes() {
        return Ok(());
    }
    let whole = size.div_ceil(1 << 30);
    Err(Error::refused(format!("the disk would have {}, and at most {most} are allowed", ByteSize(size)))
        .with_hint(format!("allow more with --max-size {whole}G")))
}

/// Refuses to write what the file system of `directory` has no space for.
pub(crate) fn check_space(needed: u64, directory: &Path) -> Result<()> {
    let about = rustix::fs::statvfs(directory)
        .map_err(|error| Error::io(format!("look at the free space of {}", directory.display()), &error.into()))?;
    enough(needed, about.f_bavail.saturating_mul(about.f_frsize))
}

fn enough(needed: u64, free: u64) -> Result<()> {
    if needed <= free {
        return Ok(());
    }
    Err(Error::refused(format!("the import writes {}, and only {} are free", ByteSize(needed), ByteSize(free)))
        .with_hint("free some space, or put the data directory elsewhere with --data DIR"))
}

/// A stream that ends with an error once it has given more than a limit: what inflates must not do so for ever.
pub(crate) struct Bounded<R> {
    inner: R,
    left: u64,
    pub(crate) over: bool,
}

impl<R: Read> Bounded<R> {
    pub(crate) fn new(inner: R, most: ByteSize) -> Self {
        Self { inner, left: most.bytes(), over: false }
    }
}

impl<R> Bounded<R> {
    /// Bytes that may still come.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => {
                self.over = true;
                return Err(io::Error::other("more than the limit"));
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_numbers_are_named() {
        check_size(5 << 30, ByteSize::gib(5)).unwrap();
        let error = check_size((300 << 30) + 1, ByteSize::gib(256)).unwrap_err();
        assert!(error.message.contains("300 GiB") && error.message.contains("256 GiB"), "{error}");
        assert_eq!(error.hint.unwrap(), "allow more with --max-size 301G");
        enough(7, 7).unwrap();
        let error = enough(3 << 30, 2 << 30).unwrap_err();
        assert!(error.message.contains("3.0 GiB") && error.message.contains("2.0 GiB"), "{error}");
        check_space(0, Path::new("/")).unwrap();
        let error = check_space(u64::MAX, Path::new("/")).unwrap_err();
        assert!(error.message.contains("free") && error.hint.is_some(), "{error}");
    }

    #[test]
    fn a_stream_ends_at_its_limit() {
        let mut bounded = Bounded::new(&b"12345"[..], ByteSize(5));
        io::copy(&mut bounded, &mut io::sink()).unwrap();
        assert!(!bounded.over);
        let mut bounded = Bounded::new(io::repeat(0), ByteSize(1000));
        io::copy(&mut bounded, &mut io::sink()).unwrap_err();
        assert!(bounded.over);
    }
}
