//! How much of the machine's memory a QEMU takes, and which part of that is its guest's own
//! (Documentation/filesystems/proc.rst, `smaps`).

use std::fs;

use burgeon_api::{Error, Result};

use crate::{
    memory::MEMORY_NAME,
    process::{Identity, identity_of},
};

/// What a QEMU takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Its proportional set size: what it shares counts for each who shares it in part.
    pub proportional: u64,
    /// Pages of its base that its guest has written, and has for itself since.
    pub own: u64,
    /// Which memory it began with, as [`crate::memory::Base::number`] tells them.
    pub base: Option<u64>,
}

impl Share {
    /// Of a process.
    ///
    /// # Errors
    /// `NotFound` where it is gone; the system's.
    pub fn of(process: &Identity) -> Result<Share> {
        let path = format!("/proc/{}/smaps", process.pid);
        let text = fs::read_to_string(&path).map_err(|error| Error::io(format!("read {path}"), &error))?;
        if identity_of(process.pid).as_ref() != Some(process) {
            return Err(Error::not_found(format!("process {} is gone", process.pid)));
        }
        Ok(read(&text))
    }
}

fn read(text: &str) -> Share {
    let mut share = Share::default();
    let mut of_guest = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
        let Some(name) = first.strip_suffix(':') else {
            // A mapping begins: range, rights, offset, device, inode, path.
            of_guest = line.contains(MEMORY_NAME);
            if of_guest {
                share.base = words.nth(2).and_then(|inode| inode.parse().ok());
            }
            continue;
        };
        let Ok(kib) = second.parse::<u64>() else { continue };
        match name {
            "Pss" => share.proportional += kib << 10,
            "Anonymous" | "Swap" if of_guest => share.own += kib << 10,
            _ => {}
        }
    }
    share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_has_written_is_told_from_what_it_shares() {
        let text = "\
55d0c4a00000-55d0c4b00000 r-xp 00000000 08:01 1234                       /usr/bin/qemu-system-x86_64
Rss:                 900 kB
Pss:                 300 kB
Anonymous:            40 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0006000000 rw-p 00000000 00:01 4711                       /memfd:burgeon-memory (deleted)
Rss:                2000 kB
Pss:                1000 kB
Pss_Dirty:           500 kB
Anonymous:            64 kB
Swap:                  4 kB
SwapPss:               4 kB
7f0006000000-7f0006100000 rw-p 00000000 00:00 0
Pss:                  10 kB
Anonymous:            10 kB
";
        assert_eq!(read(text), Share { proportional: 1310 << 10, own: 68 << 10, base: Some(4711) });
        assert_eq!(read(""), Share::default());
    }
}
