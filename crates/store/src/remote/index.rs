//! Which chunks a remote has, by the indexes of its packs.

use std::collections::HashMap;

use burgeon_api::{Error, Result};

use super::{Remote, StoredPack};
use crate::{
    ChunkId, PackId, Place,
    chunk_store::{Watch, object_name},
    pack::{self, ENTRY_BYTES, TRAILER_BYTES, Tail},
};

/// Chunks, and where they lie in packs.
#[derive(Default)]
pub(super) struct Index {
    places: HashMap<ChunkId, Place>,
    packs: HashMap<PackId, StoredPack>,
    /// Packs whose index cannot be had, and why. What is in them counts as missing.
    pub(super) problems: Vec<Error>,
}

impl Index {
    /// Adds the chunks of packs, each told by one read of its end.
    pub(super) fn add(&mut self, remote: &Remote, packs: &[StoredPack], watch: &mut Watch<'_>) -> Result<()> {
        for (index, stored) in packs.iter().enumerate() {
            watch("index", index as u64, packs.len() as u64)?;
            let pack: PackId = stored.pack.parse()?;
            if self.packs.contains_key(&pack) {
                continue;
            }
            match read(remote, pack, stored) {
                Ok(entries) => {
                    for entry in entries {
                        self.places.entry(entry.id).or_insert(entry.place);
                    }
                    self.packs.insert(pack, stored.clone());
                }
                Err(error) if is_of_pack(&error) => self.problems.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds a pack that was just written.
    pub(super) fn add_written(&mut self, stored: StoredPack, pack: PackId, entries: &[pack::Entry]) {
        for entry in entries {
            self.places.entry(entry.id).or_insert(entry.place);
        }
        self.packs.insert(pack, stored);
    }

    pub(super) fn place(&self, id: &ChunkId) -> Option<Place> {
        self.places.get(id).copied()
    }

    /// The packs that hold these chunks, sorted.
    pub(super) fn packs_of<'a>(&self, ids: impl Iterator<Item = &'a ChunkId>) -> Vec<StoredPack> {
        let mut packs: Vec<PackId> = Vec::new();
        for id in ids {
            if let Some(place) = self.places.get(id)
                && packs.last() != Some(&place.pack)
            {
                packs.push(place.pack);
            }
        }
        packs.sort_unstable();
        packs.dedup();
        packs.iter().filter_map(|pack| self.packs.get(pack).cloned()).collect()
    }
}

/// Whether an error is the pack's, and not that of the way to it.
fn is_of_pack(error: &Error) -> bool {
    use burgeon_api::ErrorKind::{Damaged, NotFound};
    // A bucket that is gone comes with a hint.
    matches!(error.kind, Damaged) || (error.kind == NotFound && error.hint.is_none())
}

fn read(remote: &Remote, pack: PackId, stored: &StoredPack) -> Result<Vec<pack::Entry>> {
    let name = object_name(pack);
    let told = |error: Error| error.context(remote.objects.describe(&name));
    let footer = u64::from(stored.chunks) * ENTRY_BYTES as u64 + TRAILER_BYTES as u64;
    let mut start = stored.length.saturating_sub(footer);
    // A manifest that tells a wrong count costs a second read.
    for _ in 0..2 {
        let tail = remote.wait(remote.objects.get_range(&name, start..stored.length))?;
        match pack::read_index(pack, &tail, stored.length).map_err(told)? {
            Tail::Index(entries) => return Ok(entries),
            Tail::More(range) => start = range.start,
        }
    }
    Err(told(Error::damaged("its index does not read")))
}
