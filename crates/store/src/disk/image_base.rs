//! A base that is a block map in the store, and a cache of its bytes on this machine's disk.
//!
//! What was read once lies plain in a sparse file, so that the kernel's page cache serves all disks above the same map,
//! and nothing is decompressed twice. The cache has the form of a [`Layer`] that is never flushed: what it holds is
//! valid within the boot of the machine in which it was read (and verified), and is read anew after the next one.
//!
//! A map that was made of another one by an edit has that for a parent: what both have is read through the parent, whose
//! bytes may be in its cache already.
//!
//! In which order a map is read is remembered for the first reads of it, so that the next start can fetch ahead.

use std::{
    io,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use burgeon_api::{Error, Result};

use super::{
    Base,
    layer::{self, Layer},
    states::{BLOCK, State},
};
use crate::{
    ChunkId,
    chunk_store::{ChunkStore, is_away, part},
    cut::MOST_CUT,
    map::{self, Map, MapReader, Piece},
};

/// Decoded nodes in memory: enough for the whole of a 16 GiB disk that is read all over.
const NODES: usize = 4096;
/// Reads that are remembered: the start of a system takes a few hundred.
const MOST_TRACED: usize = 4096;
/// Bytes fetched behind a read that goes on where the last one ended, doubled each time up to the second number.
const AHEAD: (u64, u64) = (64 << 10, 1 << 20);

/// How long a guest's read waits for a store that cannot be reached, before it fails.
const PATIENCE: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// See the module. One serves all disks of a process that have this base.
pub struct ImageBase {
    store: Arc<ChunkStore>,
    nodes: MapReader<Arc<ChunkStore>>,
    map: Map,
    cache: Layer,
    /// What this map was made of, and where it differs: sorted, and apart from each other.
    parent: Option<(Arc<ImageBase>, Vec<Range<u64>>)>,
    trace: Mutex<Vec<(u64, u64)>>,
    /// Where the last fetch ended, and how far ahead the next one goes if it begins there.
    streak: Mutex<(u64, u64)>,
    fetched: AtomicU64,
}

impl ImageBase {
    /// Opens the map `root`; `cache` is where its bytes are kept, a path without extension. With a `parent`, what that has
    /// too is read there.
    ///
    /// # Errors
    /// Where the map cannot be read, or the cache not be opened.
    pub fn open(
        store: Arc<ChunkStore>,
        root: ChunkId,
        cache: &Path,
        parent: Option<Arc<ImageBase>>,
    ) -> Result<ImageBase> {
        let map = Map::open(&*store, root)?;
        let cache = Layer::open(cache, map.length()).or_else(|error| {
            tracing::warn!(%error, "a cache is begun anew");
            layer::remove(cache).map_err(|error| Error::io("remove a cache", &error))?;
            Layer::open(cache, map.length())
        })?;
        let nodes = MapReader::new(store.clone(), NODES);
        let parent =
            parent.map(|parent| map::diff(&nodes, &parent.map, &map).map(|changed| (parent, changed))).transpose()?;
        Ok(ImageBase {
            store,
            nodes,
            map,
            cache,
            parent,
            trace: Mutex::default(),
            streak: Mutex::default(),
            fetched: AtomicU64::new(0),
        })
    }

    /// Bytes of the map.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.map.length()
    }

    /// Plain bytes that were fetched from the store since this was opened, for its parent as well.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        let parent = self.parent.as_ref().map_or(0, |(parent, _)| parent.fetched_bytes());
        self.fetched.load(Ordering::Relaxed) + parent
    }

    /// The reads that found nothing in the cache, in order: offset and length.
    #[must_use]
    pub fn trace(&self) -> Vec<(u64, u64)> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fetches what an earlier start needed, in its order. Whoever needs it meanwhile is served as always.
    ///
    /// # Errors
    /// The first that a fetch meets.
    pub fn prefetch(&self, trace: &[(u64, u64)]) -> Result<()> {
        let next = AtomicUsize::new(0);
        let fetch = || -> Result<()> {
            while let Some((offset, length)) = trace.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.fetch_absent(*offset, offset.saturating_add(*length).min(self.map.length()))?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let lanes: Vec<_> = (1..self.store.lanes()).map(|_| scope.spawn(fetch)).collect();
            let own = fetch();
            lanes.into_iter().fold(own, |first, lane| {
                first.and(lane.join().unwrap_or_else(|_| Err(Error::internal("a thread that fetches has panicked"))))
            })
        })
    }

    fn fetch_absent(&self, mut at: u64, end: u64) -> Result<()> {
        while at < end {
            let (state, length) = self.cache.run(at, end);
            if state == State::Absent {
                self.fetch(at..at + length)?;
            }
            at += length;
        }
        Ok(())
    }

    /// Fetches, and tries again where the store cannot be reached at the moment: a guest would rather wait than meet an
    /// error on its disk.
    fn fetch(&self, range: Range<u64>) -> Result<()> {
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            let error = match self.fetch_once(range.clone()) {
                Err(error) if is_away(&error) => error,
                done => return done,
            };
            let Some(pause) = pause(tries, begun.elapsed(), self.store.random()) else { return Err(error) };
            if tries == 0 {
                tracing::warn!(%error, "the store cannot be reached; a guest's read waits for it");
            }
            tries += 1;
            thread::sleep(pause);
        }
    }

    /// Fetches the bytes, which lie within the map, into the cache; with all else that is in their chunks nearby.
    fn fetch_once(&self, range: Range<u64>) -> Result<()> {
        let need = range.start / BLOCK * BLOCK..range.end.next_multiple_of(BLOCK).min(self.map.length());
        // Far enough to see the whole of the chunks that the needed bytes are in.
        let far = MOST_CUT as u64;
        let wide = need.start.saturating_sub(far)..(need.end + far).min(self.map.length());
        let pieces = self.map.lookup(&self.nodes, wide)?;
        let mut ids: Vec<ChunkId> = Vec::new();
        for piece in &pieces {
            if let Some((id, _)) = piece.source
                && piece.range.start < need.end
                && piece.range.end > need.start
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        let chunks = self.store.get_all(&ids)?;
        self.fetched.fetch_add(chunks.iter().map(|chunk| chunk.len() as u64).sum(), Ordering::Relaxed);
        // What is known now: the needed bytes, and their neighbours as far as they are in the same chunks.
        let known = |piece: &Piece| piece.source.is_some_and(|(id, _)| ids.contains(&id));
        let mut begin = need.start;
        for piece in pieces.iter().rev().skip_while(|piece| piece.range.start >= need.start) {
            if !known(piece) {
                break;
            }
            begin = piece.range.start;
        }
        let mut end = need.end;
        for piece in pieces.iter().skip_while(|piece| piece.range.end <= need.end) {
            if piece.range.start > end || (piece.range.start >= need.end && !known(piece)) {
                break;
            }
            if known(piece) {
                end = piece.range.end;
            }
        }
        let begin = begin.next_multiple_of(BLOCK).min(need.start);
        let end = if end == self.map.length() { end } else { (end / BLOCK * BLOCK).max(need.end) };
        let mut bytes = vec![0; usize::try_from(end - begin).unwrap_or(0)];
        for piece in &pieces {
            let within = piece.range.start.max(begin)..piece.range.end.min(end);
            let Some((id, offset)) = piece.source.filter(|_| within.start < within.end) else { continue };
            let Some(index) = ids.iter().position(|known| *known == id) else { continue };
            let position = |at: u64| usize::try_from(at - begin).unwrap_or(0);
            let target = &mut bytes[position(within.start)..position(within.end)];
            // An extent is within one leaf, so its length fits.
            let skipped = u32::try_from(within.start - piece.range.start).unwrap_or(u32::MAX);
            target.copy_from_slice(part(id, &chunks[index], offset.saturating_add(skipped), target.len())?);
        }
        self.cache
            .write(begin, &bytes, &|_, bytes| {
                // Only the end of the map is no whole block, and nothing is behind it.
                bytes.fill(0);
                Ok(())
            })
            .map_err(|error| Error::io("write the cache of an image", &error))
    }

    /// Who has the bytes from `at` on, and up to where: the parent, or this map alone.
    fn whose(&self, at: u64, end: u64) -> (Option<&Arc<ImageBase>>, u64) {
        let Some((parent, changed)) = &self.parent else { return (None, end) };
        let next = changed.partition_point(|range| range.end <= at);
        match changed.get(next) {
            Some(range) if range.start <= at => (None, end.min(range.end)),
            Some(range) => (Some(parent), end.min(range.start)),
            None => (Some(parent), end),
        }
    }

    /// Fetches for a reader: remembered, and further than asked where reads follow each other.
    fn fetch_for_reader(&self, range: Range<u64>) -> Result<()> {
        let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        if trace.len() < MOST_TRACED {
            trace.push((range.start, range.end - range.start));
        }
        drop(trace);
        let mut streak = self.streak.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, ahead) = *streak;
        // What a chunk held beyond the last read is here already, and the reader began behind it. Far away that is worth
        // taking for going on; nearby, reading too much costs more.
        let slack = if self.store.lanes() > 1 { MOST_CUT as u64 } else { 0 };
        let goes_on = (last..=last + slack).contains(&range.start) && last > 0;
        let ahead = if goes_on { (ahead * 2).clamp(AHEAD.0, AHEAD.1) } else { 0 };
        // Not into what the parent has.
        let (_, end) = self.whose(range.start, (range.end + ahead).min(self.map.length()));
        *streak = (end, ahead);
        drop(streak);
        self.fetch(range.start..end)
    }
}

impl Base for ImageBase {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let position = |at: u64| usize::try_from(at - offset).unwrap_or(0);
            let within = end.min(self.map.length());
            if at >= within {
                bytes[position(at)..].fill(0);
                return Ok(());
            }
            let (state, length) = self.cache.run(at, within);
            let target = &mut bytes[position(at)..position(at + length)];
            match state {
                State::Data => self.cache.read(at, target)?,
                State::Zero => target.fill(0),
                State::Absent => {
                    let (whose, until) = self.whose(at, at + length);
                    let target = &mut target[..usize::try_from(until - at).unwrap_or(0)];
                    match whose {
                        Some(parent) => parent.read(at, target)?,
                        None => {
                            self.fetch_for_reader(at..until).map_err(io::Error::other)?;
                            self.cache.read(at, target)?;
                        }
                    }
                    at = until;
                    continue;
                }
            }
            at += length;
        }
        Ok(())
    }

    fn run(&self, range: Range<u64>) -> io::Result<(bool, u64)> {
        let within = range.end.min(self.map.length());
        if range.start >= within {
            return Ok((true, range.end - range.start));
        }
        let pieces = self.map.lookup(&self.nodes, range.start..within).map_err(io::Error::other)?;
        let zero = pieces.first().is_some_and(|piece| piece.source.is_none());
        let end = pieces.iter().take_while(|piece| piece.source.is_none() == zero).last().map(|piece| piece.range.end);
        Ok((zero, end.unwrap_or(range.end) - range.start))
    }

    fn is_near(&self, range: Range<u64>) -> bool {
        let within = range.end.min(self.map.length());
        let mut at = range.start;
        while at < within {
            let (state, length) = self.cache.run(at, within);
            if state != State::Absent {
                at += length;
                continue;
            }
            match self.whose(at, at + length) {
                (Some(parent), until) if parent.is_near(at..until) => at = until,
                _ => return false,
            }
        }
        true
    }
}

/// How long to wait before a fetch is tried again, if it is: ever longer, and never two at the same moment.
fn pause(tries: u32, waited: Duration, random: u8) -> Option<Duration> {
    let longest = FIRST_PAUSE.saturating_mul(1 << tries.min(8)).min(LONGEST_PAUSE);
    let pause = longest / 2 + longest / 2 * u32::from(random) / 255;
    (waited + pause <= PATIENCE).then_some(pause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_is_tried_again_for_a_bounded_time() {
        assert_eq!(pause(0, Duration::ZERO, 0), Some(FIRST_PAUSE / 2));
        assert_eq!(pause(0, Duration::ZERO, 255), Some(FIRST_PAUSE));
        assert_eq!(pause(u32::MAX, Duration::ZERO, 255), Some(LONGEST_PAUSE));
        assert_eq!(pause(9, PATIENCE, 0), None);
        let (mut waited, mut tries) = (Duration::ZERO, 0);
        while let Some(pause) = pause(tries, waited, 128) {
            waited += pause;
            tries += 1;
        }
        assert!(waited > PATIENCE - LONGEST_PAUSE && waited <= PATIENCE && tries < 100, "{waited:?} {tries}");
    }
}
