//! Whether this machine has room for one more VM that goes on from a captured state.
//!
//! Such a VM shares most of its memory with others, so what it may ever need says little, and what is free says more: it
//! is admitted by what is free now, less what those take that are on their way.

use burgeon_api::{ByteSize, Error, Result};

/// What QEMU takes beside the guest's memory: measured 22 to 32 MiB under emulation.
const OF_QEMU: ByteSize = ByteSize::mib(32);
/// Of its memory, a guest that has just begun writes no more than one part in so many.
const WRITTEN: u64 = 8;
/// Left to everybody else unless a user says how much: one part in so many of the machine's memory, and not less than this.
const RESERVE: u64 = 20;
const LEAST_RESERVE: ByteSize = ByteSize::mib(256);

/// The machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub total: ByteSize,
    /// What programs could get now.
    pub available: ByteSize,
    /// What VMs that are on their way are going to take.
    pub promised: ByteSize,
    /// What a user wants to have left to everybody else.
    pub reserve: Option<ByteSize>,
}

/// What a VM of so much memory is going to take at first.
pub fn need(memory: ByteSize) -> ByteSize {
    ByteSize(OF_QEMU.bytes() + memory.bytes() / WRITTEN)
}

/// # Errors
/// `Unavailable`, with both figures.
pub fn admit(memory: Memory, need: ByteSize) -> Result<()> {
    let usual = LEAST_RESERVE.bytes().max(memory.total.bytes() / RESERVE);
    let reserve = memory.reserve.map_or(usual, ByteSize::bytes);
    let free = memory.available.bytes().saturating_sub(memory.promised.bytes()).saturating_sub(reserve);
    if need.bytes() <= free {
        return Ok(());
    }
    let (free, reserve) = (ByteSize(free), ByteSize(reserve));
    Err(Error::unavailable(format!(
        "no capacity: one more VM needs {need} at first, and {free} are free (beside {reserve} that are left to others)"
    ))
    .with_hint("park or remove VMs, or try again later; BURGEON_RESERVE says how much is left to others"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_ends_where_the_memory_does() {
        let mut memory = Memory {
            total: ByteSize::gib(2),
            available: ByteSize::mib(600),
            promised: ByteSize::default(),
            reserve: None,
        };
        let need = need(ByteSize::mib(128));
        assert_eq!(need, ByteSize::mib(48));
        let mut admitted = 0;
        while admit(memory, need).is_ok() {
            memory.promised = ByteSize(memory.promised.bytes() + need.bytes());
            admitted += 1;
        }
        assert_eq!(admitted, (600 - 256) / 48);
        assert!(admit(memory, need).unwrap_err().message.starts_with("no capacity"));
        assert!(admit(Memory { reserve: Some(ByteSize::mib(100)), ..memory }, need).is_ok());
    }
}
