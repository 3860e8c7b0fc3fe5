//! Storing chunks: those that are here already are claimed, the others go into new packs.
//!
//! A pack is durable before the catalog names it, and the catalog names a chunk before a root relies on it. So a writer
//! that dies leaves at worst a pack that nobody names.

use std::{collections::HashSet, num::NonZero, thread};

use burgeon_api::{Error, Result};

use super::{ChunkStore, object_name};
use crate::{
    ChunkId, PackId,
    catalog::{Entry, NewRoot},
    chunk::{Encoded, Encoder, Kind},
    map::NodeSink,
    pack::{PACK_BYTES_LOCAL, PackWriter},
    steps::{Step, reached},
};

/// Bytes that are gathered before they are hashed, looked up and compressed together, on all CPUs.
const BATCH_BYTES: usize = 8 << 20;
/// Names in one request to the catalog.
const CLAIMS: usize = 4096;
/// How often a writer looks at its chunks, piece by piece, while a collection deletes others.
const LOOKS: u32 = 4;

/// What was stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Chunks and plain bytes that came.
    pub chunks: u64,
    pub bytes: u64,
    /// Those that were not here before; and the bytes they take in packs.
    pub new_chunks: u64,
    pub new_bytes: u64,
    pub new_stored: u64,
}

/// A chunk on its way; the name of a node is known already.
struct Unnamed {
    kind: Kind,
    name: Option<ChunkId>,
    bytes: Vec<u8>,
}

/// Stores chunks for one root. See the module.
pub struct Writer<'a> {
    store: &'a ChunkStore,
    batch: Vec<Unnamed>,
    batch_bytes: usize,
    /// The names of data chunks, in the order in which they came.
    names: Vec<ChunkId>,
    pack: Option<PackWriter<Vec<u8>>>,
    /// Everything that came, so that a second time costs nothing; the root relies on all of it.
    seen: HashSet<ChunkId>,
    written: Written,
}

impl<'a> Writer<'a> {
    pub fn new(store: &'a ChunkStore) -> Writer<'a> {
        Writer {
            store,
            batch: Vec::new(),
            batch_bytes: 0,
            names: Vec::new(),
            pack: None,
            seen: HashSet::new(),
            written: Written::default(),
        }
    }

    /// Takes a data chunk. Its name is in [`Self::names`], behind those of the chunks that came before, once it is stored.
    ///
    /// # Errors
    /// Those of the store; they end the writer.
    pub fn put(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.take(Unnamed { kind: Kind::Data, name: None, bytes })
    }

    /// Counts on a chunk that is stored already. [`Self::finish`] sees to it that it still is.
    pub fn rely(&mut self, id: ChunkId) {
        self.seen.insert(id);
    }

    fn take(&mut self, chunk: Unnamed) -> Result<()> {
        self.batch_bytes += chunk.bytes.len();
        self.batch.push(chunk);
        if self.batch_bytes >= BATCH_BYTES { self.store_batch() } else { Ok(()) }
    }

    /// The names of all data chunks that came, in order.
    ///
    /// # Errors
    /// Those of the store.
    pub fn names(&mut self) -> Result<&[ChunkId]> {
        self.store_batch()?;
        Ok(&self.names)
    }

    fn store_batch(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let name = |chunk: &Unnamed| chunk.name.unwrap_or_else(|| ChunkId::of(&chunk.bytes));
        let ids = side_by_side(&batch, || Ok(()), |(), chunk| Ok(name(chunk)))?;
        let mut fresh: Vec<(ChunkId, Kind, &[u8])> = Vec::new();
        for (id, Unnamed { kind, bytes, .. }) in ids.iter().zip(&batch) {
            self.written.chunks += 1;
            self.written.bytes += bytes.len() as u64;
            if *kind == Kind::Data {
                self.names.push(*id);
            }
            if self.seen.insert(*id) {
                fresh.push((*id, *kind, bytes));
            }
        }
        let names: Vec<ChunkId> = fresh.iter().map(|(id, ..)| *id).collect();
        let places = self.store.catalog.blocking_claim(names, self.store.now_us())?;
        let mut places = places.into_iter();
        fresh.retain(|_| matches!(places.next(), Some(None)));
        let encoded = side_by_side(&fresh, Encoder::new, |encoder, (id, _, bytes)| encoder.encode_as(*id, bytes))?;
        for (encoded, (_, kind, bytes)) in encoded.iter().zip(&fresh) {
            self.written.new_chunks += 1;
            self.written.new_bytes += bytes.len() as u64;
            self.append(*kind, encoded)?;
        }
        Ok(())
    }

    fn append(&mut self, kind: Kind, encoded: &Encoded) -> Result<()> {
        let pack = match &mut self.pack {
            Some(pack) => pack,
            none => none.insert(PackWriter::new(PackId((self.store.source.uuid)()), Vec::new())?),
        };
        pack.append(kind, encoded)?;
        self.written.new_stored += encoded.stored.len() as u64;
        if pack.length() >= PACK_BYTES_LOCAL { self.close_pack() } else { Ok(()) }
    }

    /// Makes the pack durable, then known.
    fn close_pack(&mut self) -> Result<()> {
        let Some(pack) = self.pack.take() else { return Ok(()) };
        let pack = pack.finish()?;
        self.store.objects.put_new(&object_name(pack.pack), &pack.sink)?;
        reached(Step::PackWritten);
        let entries =
            pack.entries.iter().map(|entry| Entry { id: entry.id, kind: entry.kind as u8, place: entry.place });
        self.store.catalog.blocking_add_pack(pack.pack, pack.length, self.store.now_us(), entries.collect())?;
        reached(Step::PackKnown);
        Ok(())
    }

    /// Makes all that came durable and known. It is kept for as long as the catalog's grace, or until a root names it.
    ///
    /// # Errors
    /// Those of the store.
    pub fn flush(&mut self) -> Result<Written> {
        self.store_batch()?;
        self.close_pack()?;
        Ok(self.written)
    }

    /// Sets a root over what came, after a last look that all of it is still here.
    ///
    /// # Errors
    /// Those of the store; `Conflict` where the root is not as expected, or a chunk was collected meanwhile.
    pub fn finish(mut self, root: NewRoot) -> Result<Written> {
        let written = self.flush()?;
        let catalog = &self.store.catalog;
        for _ in 0..LOOKS {
            let removals = catalog.blocking_removals()?;
            let mut names = self.seen.iter().copied();
            loop {
                let some: Vec<ChunkId> = names.by_ref().take(CLAIMS).collect();
                if some.is_empty() {
                    break;
                }
                catalog.blocking_verify_claims(some, self.store.now_us())?;
            }
            if catalog.blocking_set_root_since(root.clone(), removals, self.store.now_us())? {
                reached(Step::RootSet);
                return Ok(written);
            }
        }
        // Somebody deletes all the time: one look that nobody can come between, while other writers wait.
        let relied = root.relied.iter().copied().chain(self.seen).collect();
        catalog.blocking_set_root(NewRoot { relied, ..root }, self.store.now_us())?;
        Ok(written)
    }
}

impl NodeSink for Writer<'_> {
    fn put(&mut self, id: ChunkId, bytes: Vec<u8>) -> Result<()> {
        self.take(Unnamed { kind: Kind::MapNode, name: Some(id), bytes })
    }
}

/// Does the same with each of many things, in order, on all CPUs. Each thread makes its own tool first.
fn side_by_side<I: Sync, O: Send, T>(
    things: &[I],
    tool: impl Fn() -> Result<T> + Sync,
    work: impl Fn(&mut T, &I) -> Result<O> + Sync,
) -> Result<Vec<O>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(things.len().div_ceil(16)).max(1);
    let part = |things: &[I]| -> Result<Vec<O>> {
        let mut tool = tool()?;
        things.iter().map(|thing| work(&mut tool, thing)).collect()
    };
    if threads == 1 {
        return part(things);
    }
    thread::scope(|scope| {
        let parts: Vec<_> =
            things.chunks(things.len().div_ceil(threads)).map(|things| scope.spawn(|| part(things))).collect();
        let mut all = Vec::with_capacity(things.len());
        for part in parts {
            all.extend(part.join().map_err(|_| Error::internal("a thread that stores chunks has panicked"))??);
        }
        Ok(all)
    })
}
