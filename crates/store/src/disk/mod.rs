//! Disks that VMs write to: a stack of layers above a base that never changes.
//!
//! ```text
//! top layer   takes all writes                    two files each, see [`layer`]
//! layers      sealed: never written again, and perhaps shared with other disks
//! base        a block map in the store, or nothing: zeros
//! ```
//!
//! Which these are stands in a record beside the layers, see [`Record`]. A snapshot seals the top layer
//! and puts an empty one above it: no data is moved, so it takes as long as the syncs. Sealed layers are stored one by
//! one ([`absorb`]); a map then takes the place of a base and the layer above it, and what was the layer is the map's
//! cache.
//!
//! Calls block, and may come from many threads at once; requests that overlap while both are under way take effect in
//! any order, as on a real disk.

mod absorb;
mod image_base;
mod journal;
mod layer;
mod live;
mod record;
mod states;

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use burgeon_api::{Error, Result};

pub use absorb::{absorb, lengthen};
pub use image_base::ImageBase;
use journal::Journal;
use layer::Layer;
pub use layer::MOST_BYTES;
use live::{Found, Live};
use record::check_growth;
pub use record::{Record, Snapshot, Stack};

use crate::{
    ChunkId,
    chunk_store::ChunkStore,
    map::{self, Map},
};

/// What is below all layers. It never changes.
pub trait Base: Send + Sync {
    /// Reads bytes; those beyond its end are zeros.
    ///
    /// # Errors
    /// Where they cannot be had, or are damaged.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Whether the bytes from the range's start on are known to be zeros, and for how many of them that holds.
    ///
    /// # Errors
    /// Where it cannot be told.
    fn run(&self, range: Range<u64>) -> io::Result<(bool, u64)>;

    /// Whether a read would be answered without waiting for anything slow.
    fn is_near(&self, range: Range<u64>) -> bool;
}

/// A disk without a base: zeros.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Base for Nothing {
    fn read(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn run(&self, range: Range<u64>) -> io::Result<(bool, u64)> {
        Ok((true, range.end - range.start))
    }

    fn is_near(&self, _: Range<u64>) -> bool {
        true
    }
}

/// Opens what is below all layers: a map of the store, or nothing; and the origin of the disk, see [`Record`].
pub type OpenBase<'a> = &'a dyn Fn(Option<ChunkId>, Option<ChunkId>) -> Result<Arc<dyn Base>>;

/// What is written down of the disk. Held while that changes.
struct Kept {
    journal: Journal,
    record: Record,
}

/// A disk. See the module.
pub struct Disk {
    directory: PathBuf,
    /// Taken for reading by each request, for writing by what changes the stack: so that waits for those under way.
    live: RwLock<Live>,
    kept: Mutex<Kept>,
    /// The record names a top that a power cut would undo: no flush may succeed before it is synced.
    unsynced: AtomicBool,
}

/// What is at some bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Written to a layer of the disk.
    Own,
    /// As in the base.
    Base,
    /// Zeros that take no place.
    Zero,
}

impl Disk {
    /// Makes a disk of `size` bytes in a directory, which holds the layers of `below` and is otherwise empty.
    ///
    /// # Errors
    /// `Invalid` for a size that no disk has; else as [`Self::open`].
    pub fn create(directory: &Path, size: u64, below: Stack, open_base: OpenBase<'_>) -> Result<Disk> {
        let origin = below.base;
        Disk::create_clone(directory, size, below, origin, open_base)
    }

    fn create_clone(
        directory: &Path,
        size: u64,
        below: Stack,
        origin: Option<ChunkId>,
        open_base: OpenBase<'_>,
    ) -> Result<Disk> {
        let record = Record::new(size, below, origin)?;
        let live = Live::open(directory, &record, open_base)?;
        let journal = Journal::create(directory, &record)?;
        Ok(Disk::new(directory, live, Kept { journal, record }))
    }

    /// Opens the disk in a directory. Files of layers that it does not need any more are removed.
    ///
    /// # Errors
    /// `NotFound` where none was made; `Damaged` where a part of it is gone or makes no sense; `Refused` for one of a newer
    /// version.
    pub fn open(directory: &Path, open_base: OpenBase<'_>) -> Result<Disk> {
        let (journal, record) = Journal::open(directory)?;
        remove_unused(directory, &record);
        let live = Live::open(directory, &record, open_base)?;
        Ok(Disk::new(directory, live, Kept { journal, record }))
    }

    fn new(directory: &Path, live: Live, kept: Kept) -> Disk {
        Disk {
            directory: directory.to_path_buf(),
            live: RwLock::new(live),
            kept: Mutex::new(kept),
            unsynced: AtomicBool::new(false),
        }
    }

    /// What the disk in a directory is made of.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn record_in(directory: &Path) -> Result<Record> {
        Ok(Journal::open(directory)?.1)
    }

    /// What it is made of.
    #[must_use]
    pub fn record(&self) -> Record {
        self.kept().record.clone()
    }

    /// Where its layers are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.live().size
    }

    fn live(&self) -> RwLockReadGuard<'_, Live> {
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn live_mut(&self) -> RwLockWriteGuard<'_, Live> {
        self.live.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // It is whole after each statement, so a panic elsewhere does not spoil it.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a read would be answered without waiting for anything but the machine's own disk.
    #[must_use]
    pub fn is_near(&self, offset: u64, length: u64) -> bool {
        let live = self.live();
        let mut near = true;
        let end = offset.saturating_add(length).min(live.size);
        // Only the base can be far away.
        let walked = live.walk(live.layers.len(), offset, end, &mut |found, range| {
            near &= !matches!(found, Found::Base) || live.base.is_near(range);
            Ok(near)
        });
        walked.is_ok() && near
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Beyond the end, or where a layer or the base cannot be read.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let live = self.live();
        live.check(offset, bytes.len() as u64)?;
        live.read(live.layers.len(), offset, bytes)
    }

    /// Writes bytes. When it returns, they survive the end of this process; after the next [`Self::flush`] also a power cut.
    ///
    /// # Errors
    /// Beyond the end, or where the layer cannot be written or filled from below.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let live = self.live();
        live.check(offset, bytes.len() as u64)?;
        let below = live.layers.len() - 1;
        live.top().write(offset, bytes, &|offset, bytes| live.read(below, offset, bytes))
    }

    /// Makes bytes zero, without keeping their place where that is possible.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let live = self.live();
        live.check(offset, length)?;
        let below = live.layers.len() - 1;
        live.top().zero(offset, length, &|offset, bytes| live.read(below, offset, bytes))
    }

    /// Says that nobody needs these bytes any more: whole blocks of them read as zeros from now on.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        let live = self.live();
        live.check(offset, length)?;
        let size = live.size;
        drop(live);
        let end = if offset + length == size { size } else { (offset + length) / states::BLOCK * states::BLOCK };
        let start = offset.next_multiple_of(states::BLOCK);
        if start < end { self.zero(start, end - start) } else { Ok(()) }
    }

    /// Returns once all that was written before survives a power cut.
    ///
    /// # Errors
    /// Where the machine's disk fails; then every later flush fails as well, because what is lost is not known.
    pub fn flush(&self) -> io::Result<()> {
        let top = self.live().top().clone();
        if self.unsynced.load(Ordering::Acquire) {
            // Whoever has sealed the disk is about to sync the record that names this top.
            let _it_is_done = self.kept();
            if self.unsynced.load(Ordering::Acquire) {
                return Err(io::Error::other("an earlier sync of this disk's record has failed"));
            }
        }
        top.flush()
    }

    /// What lies from `offset` on, and for how many bytes up to `end`.
    ///
    /// # Errors
    /// Beyond the end, or where the base cannot tell.
    pub fn extent(&self, offset: u64, end: u64) -> io::Result<(Extent, u64)> {
        let live = self.live();
        live.check(offset, end.saturating_sub(offset))?;
        let mut first: Option<(Extent, u64)> = None;
        live.walk(live.layers.len(), offset, end, &mut |found, range| {
            let mut at = range.start;
            while at < range.end {
                let (extent, length) = match found {
                    Found::Layer(_) => (Extent::Own, range.end - at),
                    Found::Zero => (Extent::Zero, range.end - at),
                    Found::Base => match live.base.run(at..range.end)? {
                        (true, length) => (Extent::Zero, length),
                        (false, length) => (Extent::Base, length),
                    },
                };
                match &mut first {
                    None => first = Some((extent, length)),
                    Some((known, sum)) if *known == extent => *sum += length,
                    Some(_) => return Ok(false),
                }
                at += length;
            }
            Ok(true)
        })?;
        first.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no bytes"))
    }

    /// Seals the top layer, unless it is empty: what the disk holds now lies in the stack that is given, and never
    /// changes there. It survives a power cut when this returns.
    ///
    /// # Errors
    /// Where the sync fails or a layer cannot be made; then the disk is as before, or fails from then on.
    pub fn seal(&self) -> Result<Stack> {
        self.change(None, Ok).map(|record| record.below)
    }

    /// Keeps what the disk holds now under a name. No data is moved.
    ///
    /// # Errors
    /// `Conflict` where the name is taken; else as [`Self::seal`].
    pub fn snapshot(&self, name: &str, taken_s: u64) -> Result<()> {
        let taken = self.change(None, |record| {
            let size = record.size;
            record.with_snapshot(name, taken_s, size)
        });
        taken.map(drop)
    }

    /// Makes another disk, in an empty directory, that holds what this one holds now, or what a snapshot of it holds. No
    /// data is moved. `keep` sees to it that a map which the new one needs stays in the store.
    ///
    /// # Errors
    /// `NotFound` without that snapshot; those of `keep`; as [`Self::seal`] and [`Self::create`].
    pub fn clone_to(
        &self,
        directory: &Path,
        snapshot: Option<&str>,
        keep: &mut dyn FnMut(ChunkId) -> Result<()>,
        open_base: OpenBase<'_>,
    ) -> Result<Disk> {
        if snapshot.is_none() {
            self.change(None, Ok)?;
        }
        // While this is held, no layer moves into the store.
        let kept = self.kept();
        let (stack, size) = match snapshot {
            Some(name) => kept.record.snapshot(name).map(|snapshot| (&snapshot.stack, snapshot.size))?,
            None => (&kept.record.below, kept.record.size),
        };
        kept.record.origin.into_iter().chain(stack.base).try_for_each(keep)?;
        share_layers(&self.directory, directory, stack)?;
        Disk::create_clone(directory, size, stack.clone(), kept.record.origin, open_base)
    }

    /// Makes the disk longer, with zeros behind its old end.
    ///
    /// # Errors
    /// `Invalid` for a size that no disk has or that is less than it has; else as [`Self::seal`].
    pub fn grow(&self, size: u64) -> Result<()> {
        check_growth(self.size(), size)?;
        self.change(Some(size), Ok).map(drop)
    }

    /// Lets a snapshot go.
    ///
    /// # Errors
    /// `NotFound`; where the record cannot be written, then it stays.
    pub fn remove_snapshot(&self, name: &str) -> Result<()> {
        let mut kept = self.kept();
        let record = kept.record.without_snapshot(name)?;
        kept.write(record)?;
        kept.journal.sync()?;
        remove_unused(&self.directory, &kept.record);
        Ok(())
    }

    /// Makes the disk hold again what a snapshot holds; what was written since is lost, unless another snapshot holds
    /// it. For a disk that nobody reads at the moment.
    ///
    /// # Errors
    /// `NotFound`; as [`Self::open`]. Then the disk is as before.
    pub fn roll_back(&self, name: &str, open_base: OpenBase<'_>) -> Result<()> {
        let mut kept = self.kept();
        let record = kept.record.rolled_back(name)?;
        let new = Live::open(&self.directory, &record, open_base)?;
        let mut live = self.live_mut();
        kept.write(record)?;
        *live = new;
        kept.journal.sync()?;
        remove_unused(&self.directory, &kept.record);
        Ok(())
    }

    /// Seals the top and changes the record in one step. Guests wait only while the layers change hands, not for the
    /// record's sync.
    fn change(&self, size: Option<u64>, change: impl FnOnce(Record) -> Result<Record>) -> Result<Record> {
        let failed = |error: io::Error| Error::io("sync the layer that is to be sealed", &error);
        let mut kept = self.kept();
        let top = self.live().top().clone();
        // What this syncs is not waited for below.
        top.flush().map_err(failed)?;
        let size = size.unwrap_or(kept.record.size);
        // Made before anybody waits, though it may turn out that nothing was written and none is needed.
        let path = self.directory.join(kept.record.sealed(size, false).top);
        layer::remove(&path).map_err(|error| Error::io("make a layer", &error))?;
        let new = Arc::new(Layer::open(&path, size)?);
        let mut live = self.live_mut();
        let outcome = top.flush().map_err(failed).and_then(|()| {
            let empty = top.is_empty();
            let sealed = kept.record.sealed(size, empty);
            let is_needed = sealed.top != kept.record.top;
            kept.write(change(sealed)?)?;
            if is_needed {
                if empty {
                    live.layers.pop();
                }
                live.layers.push(new);
                live.size = size;
                self.unsynced.store(true, Ordering::Release);
            }
            Ok(is_needed)
        });
        drop(live);
        if !matches!(outcome, Ok(true)) {
            let _only_room_is_lost = layer::remove(&path);
        }
        outcome?;
        kept.journal.sync()?;
        self.unsynced.store(false, Ordering::Release);
        remove_unused(&self.directory, &kept.record);
        Ok(kept.record.clone())
    }

    /// Says that a map in the store holds what `layer` was the last to change, above `base`: from now on the map is read
    /// in their place. The contents stay the same. `retire` is given the layer's path when nothing needs it any more,
    /// and may take its files.
    ///
    /// # Errors
    /// Where the record cannot be written, or the map not be opened.
    pub fn stored(
        &self,
        base: Option<ChunkId>,
        layer: &str,
        map: ChunkId,
        retire: &mut dyn FnMut(&Path),
        open_base: OpenBase<'_>,
    ) -> Result<()> {
        let mut kept = self.kept();
        let record = kept.record.stored(base, layer, map);
        let is_live = record.below != kept.record.below;
        kept.write(record)?;
        kept.journal.sync()?;
        if !kept.record.uses(layer) {
            retire(&self.directory.join(layer));
            remove_unused(&self.directory, &kept.record);
        }
        if is_live {
            let base = open_base(Some(map), kept.record.origin)?;
            let mut live = self.live_mut();
            // Where an earlier map could not be opened, its layer is still here.
            let stored = live.layers.len() - 1 - kept.record.below.layers.len();
            live.layers.drain(..stored);
            live.base = base;
        }
        Ok(())
    }

    /// Where the disk, or what a snapshot of it held, may differ from what `from` held: sorted, and apart from each
    /// other. What was written with the bytes that were there counts as well.
    ///
    /// # Errors
    /// Where a layer or a map cannot be read.
    pub fn changes(&self, store: &ChunkStore, from: &Snapshot, to: Option<&Snapshot>) -> Result<Vec<Range<u64>>> {
        let kept = self.kept();
        let (stack, size) = to.map_or((&kept.record.below, self.size()), |to| (&to.stack, to.size));
        let top = to.is_none().then(|| self.live().top().clone());
        let same_base = from.stack.base == stack.base;
        let common = from.stack.layers.iter().zip(&stack.layers).take_while(|(a, b)| same_base && a == b).count();
        let mut ranges = Vec::new();
        if !same_base {
            let open = |base: Option<ChunkId>| base.map_or_else(|| Map::empty(0), |root| Map::open(store, root));
            ranges = map::diff(store, &open(from.stack.base)?, &open(stack.base)?)?;
        }
        let others = from.stack.layers[common..].iter().chain(&stack.layers[common..]);
        for layer in others {
            Layer::open_sealed(&self.directory.join(layer))?.add_runs(&mut ranges);
        }
        if let Some(top) = top {
            top.add_runs(&mut ranges);
        }
        if size != from.size {
            ranges.push(size.min(from.size)..size.max(from.size));
        }
        Ok(merged(ranges))
    }

    /// Bytes that the disk's top layer takes.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        self.live().top().data_bytes()
    }

    /// Bytes that all layers above the map take.
    #[must_use]
    pub fn layer_bytes(&self) -> u64 {
        self.live().layers.iter().map(|layer| layer.data_bytes()).sum()
    }
}

impl Kept {
    /// Writes a record down; where that fails, the old one holds.
    fn write(&mut self, record: Record) -> Result<()> {
        if record != self.record {
            self.journal.append(&record)?;
            self.record = record;
        }
        Ok(())
    }
}

/// Removes files of layers that the record does not name. They only take room, so it does not matter if some stay.
fn remove_unused(directory: &Path, record: &Record) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_layer = path.extension().is_some_and(|extension| extension == "data" || extension == "map");
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if is_layer && !record.uses(&name) && std::fs::remove_file(&path).is_err() {
            tracing::warn!(path = %path.display(), "a layer that nothing needs any more stays");
        }
    }
}

/// Gives another directory the layers of a stack. They are shared: nothing is copied.
fn share_layers(from: &Path, to: &Path, stack: &Stack) -> Result<()> {
    for layer in &stack.layers {
        for extension in ["data", "map"] {
            let name = Path::new(layer).with_extension(extension);
            std::fs::hard_link(from.join(&name), to.join(&name))
                .map_err(|error| Error::io(format!("share {}", from.join(&name).display()), &error))?;
        }
    }
    Ok(())
}

fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

#[cfg(test)]
mod tests;
