//! What a disk is made of: the record in its directory, and what each change makes of it. Pure; [`super::journal`]
//! keeps it.

use burgeon_api::{Error, Result};
use serde::{Deserialize, Serialize};

use super::layer::{MOST_BYTES, check_size};
use crate::ChunkId;

/// The version of the record.
const FORMAT: u32 = 1;
const PREFIX: &str = "layer-";

/// What never changes any more: sealed layers, the lowest first, above a map in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// None: zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<ChunkId>,
    #[serde(default)]
    pub layers: Vec<String>,
}

/// What a disk held at an instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub name: String,
    /// Seconds since 1970.
    pub taken_s: u64,
    /// Bytes of the disk then.
    pub size: u64,
    pub stack: Stack,
}

/// A disk, as its directory tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// Bytes.
    pub size: u64,
    /// The map that the first of its line was made above: what others read of that need not be read again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<ChunkId>,
    pub below: Stack,
    /// The layer that takes all writes.
    pub top: String,
    /// The number of the next layer. Numbers are never used again.
    next: u64,
    pub snapshots: Vec<Snapshot>,
}

impl Record {
    /// A new disk above what another one has sealed, with that one's origin; or above a map, or nothing.
    ///
    /// # Errors
    /// `Invalid` for a size that no disk has.
    pub(super) fn new(size: u64, below: Stack, origin: Option<ChunkId>) -> Result<Record> {
        let number = |name: &String| name.strip_prefix(PREFIX)?.parse::<u64>().ok();
        let next = below.layers.iter().filter_map(number).max().map_or(0, |most| most + 1);
        let (top, snapshots) = (String::new(), Vec::new());
        let record = Record { format: FORMAT, size, origin, below, top, next, snapshots }.with_new_top();
        record.check()?;
        Ok(record)
    }

    /// # Errors
    /// `Refused` for a record of a newer version; `Invalid` for one that makes no sense.
    pub(super) fn check(&self) -> Result<()> {
        if self.format != FORMAT {
            return Err(Error::refused(format!("it has version {}; this Burgeon knows {FORMAT}", self.format))
                .with_hint("use the Burgeon that wrote it, or a newer one"));
        }
        check_size(self.size)?;
        let strange = |name: &&String| {
            name.strip_prefix(PREFIX)
                .is_none_or(|digits| digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()))
        };
        let mut names = self.stacks().flat_map(|stack| &stack.layers).chain([&self.top]);
        match names.find(strange) {
            Some(name) => Err(Error::invalid(format!("\"{name}\" is no layer's name"))),
            None => Ok(()),
        }
    }

    fn stacks(&self) -> impl Iterator<Item = &Stack> {
        [&self.below].into_iter().chain(self.snapshots.iter().map(|snapshot| &snapshot.stack))
    }

    fn with_new_top(mut self) -> Record {
        self.top = format!("{PREFIX}{}", self.next);
        self.next += 1;
        self
    }

    /// Whether the layer's files are needed.
    pub(super) fn uses(&self, layer: &str) -> bool {
        self.top == layer || self.stacks().any(|stack| stack.layers.iter().any(|name| name == layer))
    }

    /// The maps that must stay in the store for this disk, each once. The origin is one of them: what later maps have in
    /// common with it is read through it, and its nodes are not all theirs.
    #[must_use]
    pub fn maps(&self) -> Vec<ChunkId> {
        let mut maps: Vec<ChunkId> = self.stacks().filter_map(|stack| stack.base).chain(self.origin).collect();
        maps.sort_unstable();
        maps.dedup();
        maps
    }

    /// The next sealed layer to be stored: it lies on a map, or on nothing, whose name comes with it.
    #[must_use]
    pub fn unstored(&self) -> Option<(Option<ChunkId>, &str)> {
        self.stacks().find_map(|stack| Some((stack.base, stack.layers.first()?.as_str())))
    }

    /// Sealed layers that are not stored yet.
    #[must_use]
    pub fn unstored_layers(&self) -> usize {
        let mut names: Vec<&String> = self.stacks().flat_map(|stack| &stack.layers).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }

    /// The record once the top is sealed, and the disk has `size` bytes. An empty top need not be sealed, only replaced
    /// where it has another size.
    pub(super) fn sealed(&self, size: u64, top_is_empty: bool) -> Record {
        let mut record = Record { size, ..self.clone() };
        if top_is_empty && size == self.size {
            return record;
        }
        if !top_is_empty {
            record.below.layers.push(self.top.clone());
        }
        record.with_new_top()
    }

    /// With a snapshot of what is below the top.
    ///
    /// # Errors
    /// `Conflict` where the name is taken.
    pub(super) fn with_snapshot(mut self, name: &str, taken_s: u64, size: u64) -> Result<Record> {
        if self.snapshot(name).is_ok() {
            return Err(Error::conflict(format!("the disk has a snapshot {name} already"))
                .with_hint("choose another name, or remove that one first"));
        }
        self.snapshots.push(Snapshot { name: name.into(), taken_s, size, stack: self.below.clone() });
        Ok(self)
    }

    /// The snapshots that users have named; others have a name that begins with a dot.
    pub fn named(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.iter().filter(|snapshot| !snapshot.name.starts_with('.'))
    }

    /// A snapshot by name.
    ///
    /// # Errors
    /// `NotFound`, with those there are.
    pub fn snapshot(&self, name: &str) -> Result<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.named().map(|snapshot| snapshot.name.as_str()).collect();
            let there = if names.is_empty() { "it has none".into() } else { format!("it has {}", names.join(", ")) };
            Error::not_found(format!("the disk has no snapshot {name}: {there}"))
        })
    }

    pub(super) fn without_snapshot(&self, name: &str) -> Result<Record> {
        self.snapshot(name)?;
        let mut record = self.clone();
        record.snapshots.retain(|snapshot| snapshot.name != name);
        Ok(record)
    }

    /// The record once the disk is what a snapshot holds. All snapshots stay.
    pub(super) fn rolled_back(&self, name: &str) -> Result<Record> {
        let snapshot = self.snapshot(name)?.clone();
        let record = Record { size: snapshot.size, below: snapshot.stack, ..self.clone() };
        Ok(record.with_new_top())
    }

    /// The record once `map` holds what the layer above `base` was the last to change.
    pub(super) fn stored(&self, base: Option<ChunkId>, layer: &str, map: ChunkId) -> Record {
        let mut record = self.clone();
        let stacks = [&mut record.below].into_iter();
        for stack in stacks.chain(record.snapshots.iter_mut().map(|snapshot| &mut snapshot.stack)) {
            if stack.base == base && stack.layers.first().is_some_and(|first| first == layer) {
                stack.base = Some(map);
                stack.layers.remove(0);
            }
        }
        record
    }
}

/// A new size for a disk.
///
/// # Errors
/// `Invalid` for one that no disk has, or less than it has.
pub(super) fn check_growth(now: u64, wanted: u64) -> Result<()> {
    check_size(wanted)?;
    if wanted < now {
        return Err(Error::invalid(format!("the disk has {now} bytes, and cannot shrink to {wanted}"))
            .with_hint("what lies behind the new end would be lost; make a smaller disk and copy to it"));
    }
    Ok(())
}

const _: () = assert!(MOST_BYTES <= crate::map::MOST_LENGTH);

#[cfg(test)]
mod tests {
    use super::*;

    fn names(stack: &Stack) -> Vec<&str> {
        stack.layers.iter().map(String::as_str).collect()
    }

    #[test]
    fn layers_move_below_and_then_into_the_map() {
        let new = Record::new(1 << 20, Stack::default(), None).unwrap();
        assert_eq!((new.top.as_str(), new.maps().len()), ("layer-0", 0));
        // Nothing was written: there is nothing to seal.
        assert_eq!(new.sealed(1 << 20, true), new);
        let one = new.sealed(1 << 20, false).with_snapshot("one", 7, 1 << 20).unwrap();
        let two = one.sealed(2 << 20, false).with_snapshot("two", 8, 2 << 20).unwrap();
        assert_eq!((names(&two.below), two.top.as_str()), (vec!["layer-0", "layer-1"], "layer-2"));
        assert!(two.clone().with_snapshot("one", 9, 0).is_err());
        assert_eq!((two.unstored(), two.unstored_layers()), (Some((None, "layer-0")), 2));
        let map = ChunkId::of(b"map");
        let stored = two.stored(None, "layer-0", map);
        assert_eq!((stored.below.base, names(&stored.below)), (Some(map), vec!["layer-1"]));
        assert_eq!(stored.snapshot("one").unwrap().stack, Stack { base: Some(map), layers: vec![] });
        assert_eq!((stored.unstored(), stored.maps()), (Some((Some(map), "layer-1")), vec![map]));
        assert!(!stored.uses("layer-0") && stored.uses("layer-1") && stored.uses("layer-2"));
        // Back to the first: what was written since is only in the other snapshot.
        let back = stored.rolled_back("one").unwrap();
        assert_eq!((back.size, back.top.as_str(), names(&back.below)), (1 << 20, "layer-3", vec![]));
        assert_eq!(back.unstored(), Some((Some(map), "layer-1")));
        assert!(!back.without_snapshot("two").unwrap().uses("layer-1"));
        assert_eq!(
            back.without_snapshot("three").unwrap_err().message,
            "the disk has no snapshot three: it has one, two"
        );
        // Its image's map stays, wherever the disk has moved to.
        let origin = ChunkId::of(b"image");
        let above = Stack { base: Some(origin), layers: Vec::new() };
        let moved = Record::new(1 << 20, above, Some(origin)).unwrap().sealed(1 << 20, false);
        assert!(moved.stored(Some(origin), "layer-0", map).maps().contains(&origin));
        // A clone's layers never get the names of those that it shares.
        assert_eq!(Record::new(2 << 20, two.below, None).unwrap().top, "layer-2");
    }

    #[test]
    fn strange_records_are_refused() {
        let good = Record::new(4096, Stack::default(), None).unwrap();
        let refused = |change: &dyn Fn(&mut Record)| {
            let mut record = good.clone();
            change(&mut record);
            record.check().unwrap_err().message
        };
        assert!(refused(&|record| record.format = 2).contains("version 2"));
        assert!(refused(&|record| record.size = 100).contains("100 bytes"));
        assert!(refused(&|record| record.top = "../x".into()).contains("no layer's name"));
        assert!(refused(&|record| record.below.layers.push("layer-".into())).contains("no layer's name"));
        assert!(check_growth(4096, 512).is_err() && check_growth(4096, 4096).is_ok());
    }
}
