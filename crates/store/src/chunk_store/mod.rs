//! Chunks by their names: found through the catalog, read from packs, verified, and kept in memory for a while.
//!
//! One [`ChunkStore`] serves a process; several processes may have one on the same directory. Calls block. What a read
//! gives has its name's BLAKE3: a copy that has not is reported with where it lies, and never handed out.

mod cache;
mod collect;
mod flights;
mod fsck;
mod identity;
mod ingest;
pub mod read_cache;
mod rebuild;
mod records;
mod repack;
mod scrub;
#[cfg(feature = "s3")]
mod together;
mod writer;

use std::sync::{Arc, Mutex, PoisonError};

use burgeon_api::{Error, ErrorKind, Result};
use bytes::Bytes;

pub use collect::{GRACE_US, collect};
pub use fsck::fsck;
pub(crate) use identity::adopt;
pub use ingest::{Ingested, MapBytes, ingest};
pub(crate) use rebuild::settle as settle_file;
pub use rebuild::{NamedRoot, rebuild};
pub use scrub::scrub;
pub use writer::{Writer, Written};

use self::{cache::Cache, flights::Flights};
use crate::{
    ChunkId, PackId, Place,
    catalog::Catalog,
    map::{Map, Nodes},
    objects::{Blocking, OpenObject},
    pack::{self, RECORD_HEADER_BYTES},
    places::Places,
};

/// Plain bytes of chunks in memory.
const CACHE_BYTES: usize = 64 << 20;
/// Packs that are held open.
const OPEN_PACKS: usize = 64;

/// The time and the random numbers that a store needs; its owner provides them.
#[derive(Clone)]
pub struct Source {
    /// Microseconds since 1970.
    pub now_us: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// A new UUID, version 7.
    pub uuid: Arc<dyn Fn() -> [u8; 16] + Send + Sync>,
}

/// Told what long work does, before each of its steps: the phase, and how much of it is done. An error ends the work
/// there; that is also how it is cancelled.
pub type Watch<'a> = dyn FnMut(&'static str, u64, u64) -> Result<()> + 'a;

/// See the module.
pub struct ChunkStore {
    catalog: Catalog,
    objects: Blocking,
    pub(crate) source: Source,
    cache: Mutex<Cache<ChunkId, Bytes>>,
    packs: Mutex<Cache<PackId, Arc<OpenObject>>>,
    flights: Flights,
}

/// The name of a pack's object. Two digits spread the packs over folders.
pub(crate) fn object_name(pack: PackId) -> String {
    format!("packs/{:02x}/{pack}.pack", pack.0[15])
}

impl ChunkStore {
    /// Opens or creates a store: its packs and its catalog, in a directory or where [`Places`] says.
    ///
    /// # Errors
    /// As [`Catalog::open`]; those of the place of the packs: `Refused` for wrong keys, `NotFound` without the bucket,
    /// `Unavailable` without the server. `Damaged` where there are packs and no catalog; `Refused` where packs and catalog
    /// are those of two stores.
    pub fn open(places: impl Into<Places>, source: Source) -> Result<Arc<ChunkStore>> {
        let places = places.into();
        let objects = places.open_objects()?;
        let marked = identity::marker(&objects)?;
        identity::check_file(&places, &objects)?;
        let catalog = Catalog::open(places.catalog_address()).map_err(|error| match error.kind {
            ErrorKind::Damaged => error.with_hint(
                "stop the server, and run burgeon store fsck --rebuild, which makes a new catalog of the packs",
            ),
            _ => error,
        })?;
        if let (Some(owner), None) = (&places.owner, places.catalog_file()) {
            catalog.blocking_claim_owner(owner)?;
        }
        identity::settle(&places, &objects, &catalog, marked, &source)?;
        Ok(Arc::new(ChunkStore {
            catalog,
            objects,
            source,
            cache: Mutex::new(Cache::new(CACHE_BYTES)),
            packs: Mutex::new(Cache::new(OPEN_PACKS)),
            flights: Flights::default(),
        }))
    }

    /// What chunks, packs and roots there are.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    pub(crate) fn now_us(&self) -> u64 {
        (self.source.now_us)()
    }

    /// A chunk's bytes. Callers that want the same one at the same time share one read.
    ///
    /// # Errors
    /// `NotFound` for a chunk that is not here; `Damaged` for one whose bytes are not what they were.
    pub fn get(&self, id: ChunkId) -> Result<Bytes> {
        if let Some(bytes) = self.cached(id) {
            return Ok(bytes);
        }
        self.flights.share(id, || {
            let places = self.catalog.blocking_places(vec![id])?;
            let place = places.first().copied().flatten().ok_or_else(|| missing(id))?;
            let bytes = Bytes::from(self.read_or_look_again(id, place)?);
            lock(&self.cache).put(id, bytes.clone(), bytes.len());
            Ok(bytes)
        })
    }

    /// Chunks that are needed at once, through the cache. What is far away is asked for together.
    ///
    /// # Errors
    /// As [`Self::get`], for the first one that cannot be had.
    pub fn get_all(&self, ids: &[ChunkId]) -> Result<Vec<Bytes>> {
        #[cfg(feature = "s3")]
        if let Blocking::Bucket(bucket) = &self.objects {
            return self.together(bucket, ids);
        }
        ids.iter().map(|id| self.get(*id)).collect()
    }

    /// A random number, for waits that are not to end together.
    pub(crate) fn random(&self) -> u8 {
        (self.source.uuid)()[15]
    }

    /// How often a bucket was asked for something since the store was opened; a directory is not counted.
    #[must_use]
    pub fn requests(&self) -> u64 {
        #[cfg(feature = "s3")]
        if let Blocking::Bucket(bucket) = &self.objects {
            return bucket.requests();
        }
        0
    }

    /// How many reads are worth being under way at the same time.
    #[must_use]
    pub fn lanes(&self) -> usize {
        #[cfg(feature = "s3")]
        if let Blocking::Bucket(_) = &self.objects {
            return crate::objects::AT_ONCE;
        }
        1
    }

    /// Several chunks: looked up together, and read in the order in which they lie. They do not go through the cache:
    /// for those who read much, once.
    ///
    /// # Errors
    /// As [`Self::get`], for the first one that cannot be had.
    pub fn get_many(&self, ids: &[ChunkId]) -> Result<Vec<Vec<u8>>> {
        let places = self.catalog.blocking_places(ids.to_vec())?;
        let mut order: Vec<(Place, usize)> = Vec::with_capacity(ids.len());
        for (index, (id, place)) in ids.iter().zip(places).enumerate() {
            order.push((place.ok_or_else(|| missing(*id))?, index));
        }
        order.sort_unstable_by_key(|(place, _)| (place.pack, place.offset));
        let mut found = vec![Vec::new(); ids.len()];
        #[cfg(feature = "s3")]
        if let Blocking::Bucket(bucket) = &self.objects {
            let wanted: Vec<_> = order.iter().map(|(place, index)| (*place, ids[*index])).collect();
            self.records(bucket, &wanted, &mut |number, record| {
                found[order[number].1] = record?;
                Ok(())
            })?;
            return Ok(found);
        }
        for (place, index) in order {
            found[index] = self.read_or_look_again(ids[index], place)?;
        }
        Ok(found)
    }

    /// Reads bytes of a map, past the cache: for those who read much, once.
    ///
    /// # Errors
    /// As [`Self::get`]; `Invalid` beyond the map's end.
    pub fn read_map(&self, map: &Map, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let pieces = map.lookup(self, offset..offset + bytes.len() as u64)?;
        let mut ids: Vec<ChunkId> = pieces.iter().filter_map(|piece| piece.source.map(|(id, _)| id)).collect();
        ids.sort_unstable();
        ids.dedup();
        let chunks = self.get_many(&ids)?;
        for piece in pieces {
            let position = |at: u64| usize::try_from(at - offset).unwrap_or(0);
            let target = &mut bytes[position(piece.range.start)..position(piece.range.end)];
            let Some((id, within)) = piece.source else {
                target.fill(0);
                continue;
            };
            let chunk = ids.binary_search(&id).ok().map(|index| chunks[index].as_slice());
            target.copy_from_slice(part(id, chunk.unwrap_or_default(), within, target.len())?);
        }
        Ok(())
    }

    /// Whether a chunk is in memory.
    pub fn is_cached(&self, id: ChunkId) -> bool {
        lock(&self.cache).get(&id).is_some()
    }

    fn cached(&self, id: ChunkId) -> Option<Bytes> {
        lock(&self.cache).get(&id)
    }

    fn read_or_look_again(&self, id: ChunkId, place: Place) -> Result<Vec<u8>> {
        self.read(id, place).or_else(|error| self.elsewhere(id, place, error))
    }

    /// Where a record could not be read, a collection may have moved the chunk since its place was looked up, and the pack
    /// may be gone: then it has another place, and that one is read.
    fn elsewhere(&self, id: ChunkId, place: Place, error: Error) -> Result<Vec<u8>> {
        if is_away(&error) {
            return Err(error);
        }
        match self.catalog.blocking_places(vec![id])?.first().copied().flatten() {
            Some(again) if again != place => self.read(id, again),
            Some(_) if error.kind == ErrorKind::NotFound => {
                Err(Error::damaged(format!("{id:?} is lost with its pack: {}", error.message))
                    .with_hint("burgeon store fsck tells what misses it"))
            }
            _ => Err(error),
        }
    }

    /// Reads a record and verifies it.
    fn read(&self, id: ChunkId, place: Place) -> Result<Vec<u8>> {
        let length = RECORD_HEADER_BYTES + usize::try_from(place.stored).unwrap_or(0);
        let read = || {
            #[cfg(feature = "s3")]
            if let Blocking::Bucket(bucket) = &self.objects {
                return self.read_ahead(bucket, id, place);
            }
            let mut bytes = vec![0; length];
            self.open_pack(place.pack)?.read_at(place.offset, &mut bytes)?;
            pack::read_record(&bytes, id).map(|record| record.plain)
        };
        read().map_err(|error| self.at_place(place, error))
    }

    /// Tells where a record lies that could not be read.
    fn at_place(&self, place: Place, error: Error) -> Error {
        let name = object_name(place.pack);
        let error = error.context(format!("{} at byte {}", self.objects.describe(&name), place.offset));
        if is_away(&error) {
            return error;
        }
        error.with_hint("find all damage with burgeon store scrub; the guide says how to replace it")
    }

    fn open_pack(&self, pack: PackId) -> Result<Arc<OpenObject>> {
        if let Some(object) = lock(&self.packs).get(&pack) {
            return Ok(object);
        }
        let object = Arc::new(self.objects.open_object(&object_name(pack))?);
        lock(&self.packs).put(pack, object.clone(), 1);
        Ok(object)
    }

    /// Forgets an open pack, so that its bytes on the disk are free once it is deleted.
    fn close_pack(&self, pack: PackId) {
        lock(&self.packs).remove(&pack);
    }

    /// The file of a pack in a directory.
    #[cfg(test)]
    pub(crate) fn describe(&self, pack: PackId) -> std::path::PathBuf {
        self.objects.describe(&object_name(pack)).into()
    }
}

impl Nodes for ChunkStore {
    fn get(&self, id: ChunkId) -> Result<Bytes> {
        self.get(id)
    }
}

/// Whether a place cannot be reached at the moment, which tells nothing of what is there.
pub(crate) fn is_away(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Deadline)
}

/// Bytes of a chunk that a map says are in it.
pub(crate) fn part(id: ChunkId, chunk: &[u8], within: u32, length: usize) -> Result<&[u8]> {
    let within = usize::try_from(within).unwrap_or(usize::MAX);
    chunk
        .get(within..within.saturating_add(length))
        .ok_or_else(|| Error::damaged(format!("{id:?} has {} bytes, and a map asks for more", chunk.len())))
}

fn missing(id: ChunkId) -> Error {
    Error::not_found(format!("{id:?} is not in the store")).with_hint("burgeon store fsck tells what misses it")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The caches are whole after each of their calls, so a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
