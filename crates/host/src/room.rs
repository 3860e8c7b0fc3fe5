//! The machine's memory, and what is promised of it to VMs that are on their way.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burgeon_api::{ByteSize, Error, Result};
use burgeon_plan::admission::{Memory, admit, need};

#[derive(Debug, Default)]
pub(crate) struct Room {
    promised: Arc<AtomicU64>,
    reserve: Option<ByteSize>,
}

/// Room for one VM, until it has taken it.
#[derive(Debug)]
pub(crate) struct Taken {
    promised: Arc<AtomicU64>,
    bytes: u64,
}

impl Room {
    /// `reserve`: what a user wants to have left to others.
    pub(crate) fn new(reserve: Option<ByteSize>) -> Room {
        Room { reserve, ..Room::default() }
    }

    /// Takes room for a VM that goes on from a captured state.
    ///
    /// # Errors
    /// `Unavailable` where there is none.
    pub(crate) fn take(&self, memory: ByteSize) -> Result<Taken> {
        let need = need(memory);
        // Promised first, so that two who ask together do not both get the last of it.
        let before = self.promised.fetch_add(need.bytes(), Ordering::Relaxed);
        let taken = Taken { promised: self.promised.clone(), bytes: need.bytes() };
        let about = fs::read_to_string("/proc/meminfo").map_err(|error| Error::io("read /proc/meminfo", &error))?;
        let (Some(total), Some(available)) = (value(&about, "MemTotal:"), value(&about, "MemAvailable:")) else {
            return Err(Error::internal("/proc/meminfo does not tell how much memory there is"));
        };
        admit(Memory { total, available, promised: ByteSize(before), reserve: self.reserve }, need)?;
        Ok(taken)
    }

    /// Whether there is room for a VM now.
    pub(crate) fn has(&self, memory: ByteSize) -> bool {
        self.take(memory).is_ok()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.promised.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn value(about: &str, key: &str) -> Option<ByteSize> {
    let rest = about.lines().find_map(|line| line.strip_prefix(key))?;
    rest.trim().strip_suffix(" kB")?.parse().ok().map(ByteSize::kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_given_back() {
        assert_eq!(value("MemTotal:  16 kB\nMemAvailable:    7 kB\n", "MemAvailable:"), Some(ByteSize::kib(7)));
        let room = Room::default();
        let taken = room.take(ByteSize::mib(128)).unwrap();
        assert_eq!(room.promised.load(Ordering::Relaxed), need(ByteSize::mib(128)).bytes());
        drop(taken);
        assert!(room.take(ByteSize(u64::MAX / 16)).unwrap_err().message.starts_with("no capacity"));
        assert_eq!(room.promised.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn of_a_burst_only_as_many_are_admitted_as_there_is_room_for() {
        // What the machine has beside this is none of the test's business, as long as it has this much for a moment.
        let about = fs::read_to_string("/proc/meminfo").unwrap();
        let available = value(&about, "MemAvailable:").unwrap();
        let room = Room::new(Some(ByteSize(available.bytes() / 2)));
        let each = ByteSize(available.bytes());
        let taken: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..24).map(|_| scope.spawn(|| room.take(each))).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let admitted = taken.iter().filter(|one| one.is_ok()).count();
        // Each needs an eighth of what is available, and half of that is to be had.
        assert!((1..=5).contains(&admitted), "{admitted}");
        assert!(taken.iter().flat_map(|one| one.as_ref().err()).all(|error| error.message.starts_with("no capacity")));
    }
}
