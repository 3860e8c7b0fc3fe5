//! A copy of an image from a remote: what the store has already is not read, everything else is compared with its name.

use std::{
    collections::HashSet,
    io::{BufReader, Read},
    ops::Range,
};

use burgeon_api::{Error, Result};
use bytes::Bytes;
use futures_util::future::join_all;

use super::{Manifest, Remote, StoredFile, index::Index};
use crate::{
    ChunkId, Place,
    catalog::NewRoot,
    chunk::Kind,
    chunk_store::{ChunkStore, MapBytes, Watch, Writer, object_name},
    map::{self, Map, Node, NodeSink, Root},
    pack::{self, Wanted, reads, record_bytes},
};

/// Names in one request to the catalog.
const NAMES: usize = 4096;
/// The most bytes of one read, and how many reads are under way together.
const MOST_READ: u64 = 8 << 20;
const TOGETHER: usize = 4;

/// What a pull did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulled {
    /// All chunks of the image, and their plain bytes.
    pub chunks: u64,
    pub bytes: u64,
    /// Those that were not here, and the bytes that were read for them.
    pub new_chunks: u64,
    pub new_bytes: u64,
    pub read_bytes: u64,
    /// Bytes of the disk that stand in chunks.
    pub held_bytes: u64,
}

/// The phases of [`super::push`] and [`pull`] whose progress is told in bytes; that of the others is a count.
pub const PHASES_IN_BYTES: [&str; 3] = ["push", "nodes", "pull"];

/// Copies all that a manifest needs into the store. `file` then gets the image's files one by one; after that the root
/// `keep` makes of the disk's map is set. Chunks stay at least for the store's grace even without one.
///
/// # Errors
/// `Damaged` names the pack and the byte of a chunk that is not what it should be, or the chunk that is in no pack. Those
/// of the store, the remote, `file` and `watch`.
pub fn pull(
    store: &ChunkStore,
    remote: &Remote,
    manifest: &Manifest,
    keep: impl FnOnce(ChunkId) -> NewRoot,
    file: &mut dyn FnMut(&StoredFile, &mut dyn Read) -> Result<()>,
    watch: &mut Watch<'_>,
) -> Result<Pulled> {
    let mut index = Index::default();
    index.add(remote, &manifest.packs, watch)?;
    let disk: Option<ChunkId> = manifest.image.map.as_deref().map(str::parse).transpose()?;
    let files = manifest.files.iter().map(|file| file.map.parse()).collect::<Result<Vec<ChunkId>>>()?;
    let mut fetch = Fetch {
        store,
        remote,
        index: &index,
        image: &manifest.image.name,
        writer: Writer::new(store),
        pulled: Pulled::default(),
    };
    let data = fetch.nodes(disk.iter().chain(&files), watch)?;
    fetch.data(data, watch)?;
    let Fetch { mut writer, mut pulled, .. } = fetch;
    writer.flush()?;
    watch("check", 0, 0)?;
    // That each node is of the kind and the height that belong where it stands.
    for root in disk.iter().chain(&files) {
        map::chunks(store, *root, &mut |_, _| Ok(true))?;
    }
    if let Some(root) = disk {
        let map = Map::open(store, root)?;
        if manifest.image.disk.is_none_or(|size| size.bytes() != map.length()) {
            return Err(Error::damaged(format!("the map of the disk has {} bytes, unlike the image", map.length())));
        }
        pulled.held_bytes = held_bytes(store, &map)?;
    }
    for (stored, root) in manifest.files.iter().zip(&files) {
        let map = Map::open(store, *root)?;
        if stored.length > map.length() {
            return Err(Error::damaged(format!("{} is longer than its map", stored.name)));
        }
        // Each read of a map looks its chunks up, and may ask a bucket for them.
        file(stored, &mut BufReader::with_capacity(1 << 20, MapBytes::new(store, map)).take(stored.length))?;
    }
    if let Some(root) = disk {
        watch("keep", 0, 0)?;
        writer.finish(keep(root))?;
    }
    Ok(pulled)
}

/// Bytes of a map that stand in chunks.
///
/// # Errors
/// As [`Map::lookup`].
pub fn held_bytes(store: &ChunkStore, map: &Map) -> Result<u64> {
    held_bytes_in(store, map, 0..map.length())
}

/// [`held_bytes`] of a range.
///
/// # Errors
/// As there.
pub fn held_bytes_in(store: &ChunkStore, map: &Map, range: Range<u64>) -> Result<u64> {
    let mut held = 0;
    let mut at = range.start;
    while at < range.end {
        // A piece takes more memory than its name: a large disk is not looked at in one.
        let end = (at + (1 << 30)).min(range.end);
        let pieces = map.lookup(store, at..end)?;
        let data = pieces.iter().filter(|piece| piece.source.is_some());
        held += data.map(|piece| piece.range.end - piece.range.start).sum::<u64>();
        at = end;
    }
    Ok(held)
}

struct Fetch<'a> {
    store: &'a ChunkStore,
    remote: &'a Remote,
    index: &'a Index,
    image: &'a str,
    writer: Writer<'a>,
    pulled: Pulled,
}

impl Fetch<'_> {
    /// Fetches the nodes of maps, one level after the other. Gives the chunks of data that they name.
    fn nodes<'b>(
        &mut self,
        roots: impl Iterator<Item = &'b ChunkId>,
        watch: &mut Watch<'_>,
    ) -> Result<HashSet<ChunkId>> {
        let mut level: Vec<ChunkId> = roots.copied().collect();
        let mut seen: HashSet<ChunkId> = HashSet::new();
        let mut data = HashSet::new();
        while !level.is_empty() {
            watch("map", seen.len() as u64, 0)?;
            level.retain(|id| seen.insert(*id));
            let (here, missing) = self.divide(&level)?;
            let mut below = Vec::new();
            let mut take = |id: ChunkId, bytes: &[u8]| -> Result<()> {
                match Node::decode(id, bytes)? {
                    Node::Root(Root { child, .. }) => below.extend(child),
                    Node::Inner { children, .. } => below.extend(children.into_iter().map(|(_, child)| child)),
                    Node::Leaf(extents) => data.extend(extents.into_iter().map(|extent| extent.chunk)),
                }
                Ok(())
            };
            for id in here {
                let bytes = self.store.get(id)?;
                self.pulled.bytes += bytes.len() as u64;
                take(id, &bytes)?;
            }
            self.fetch(Kind::MapNode, missing, &mut take, watch)?;
            level = below;
        }
        self.pulled.chunks += seen.len() as u64;
        Ok(data)
    }

    fn data(&mut self, data: HashSet<ChunkId>, watch: &mut Watch<'_>) -> Result<()> {
        let data: Vec<ChunkId> = data.into_iter().collect();
        self.pulled.chunks += data.len() as u64;
        let mut wanted = Vec::new();
        for some in data.chunks(NAMES) {
            let places = self.store.catalog().blocking_places(some.to_vec())?;
            self.pulled.bytes += places.iter().flatten().map(|place| u64::from(place.length)).sum::<u64>();
            wanted.extend(self.divide(some)?.1);
        }
        self.fetch(Kind::Data, wanted, &mut |_, _| Ok(()), watch)
    }

    /// Those that are here, which the writer relies on from now on, and those that are not, with where they lie.
    fn divide(&mut self, ids: &[ChunkId]) -> Result<(Vec<ChunkId>, Vec<Wanted>)> {
        let (mut here, mut missing) = (Vec::new(), Vec::new());
        for some in ids.chunks(NAMES) {
            let places = self.store.catalog().blocking_claim(some.to_vec(), self.store.now_us())?;
            for (id, place) in some.iter().zip(places) {
                if place.is_some() {
                    self.writer.rely(*id);
                    here.push(*id);
                } else {
                    let place = self.index.place(id).ok_or_else(|| self.lost(*id))?;
                    missing.push((place, *id));
                }
            }
        }
        Ok((here, missing))
    }

    fn lost(&self, id: ChunkId) -> Error {
        let why = self.index.problems.first().map(|error| format!(": {}", error.message)).unwrap_or_default();
        let text = format!("{id:?}, which image {} needs, is in no pack of {}{why}", self.image, self.remote.url());
        Error::damaged(text).with_hint(format!(
            "push the image again from where it is whole: burgeon image push {} {}",
            self.image,
            self.remote.url()
        ))
    }

    /// Reads chunks, neighbours together, and stores them.
    fn fetch(
        &mut self,
        kind: Kind,
        mut wanted: Vec<Wanted>,
        take: &mut dyn FnMut(ChunkId, &[u8]) -> Result<()>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let phase = if kind == Kind::Data { "pull" } else { "nodes" };
        wanted.sort_unstable_by_key(|(place, _)| (place.pack, place.offset));
        let total: u64 = wanted.iter().map(|(place, _)| record_bytes(place)).sum();
        let mut done = 0;
        for reads in reads(&wanted, MOST_READ).chunks(TOGETHER) {
            watch(phase, done, total)?;
            let answers =
                join_all(reads.iter().map(async |read| {
                    self.remote.objects.get_range(&object_name(read.pack), read.range.clone()).await
                }));
            let answers: Vec<Result<Bytes>> = self.remote.wait(answers);
            for (read, bytes) in reads.iter().zip(answers) {
                let bytes = bytes?;
                self.pulled.read_bytes += bytes.len() as u64;
                for (place, id) in &wanted[read.wanted.clone()] {
                    let plain = self.record(&bytes, read.range.start, place, *id)?;
                    take(*id, &plain)?;
                    done += record_bytes(place);
                    self.pulled.new_chunks += 1;
                    self.pulled.new_bytes += plain.len() as u64;
                    self.pulled.bytes += plain.len() as u64;
                    match kind {
                        Kind::Data => self.writer.put(plain)?,
                        Kind::MapNode => NodeSink::put(&mut self.writer, *id, plain)?,
                    }
                }
            }
        }
        if total > 0 {
            watch(phase, done, total)?;
        }
        Ok(())
    }

    /// A chunk in bytes of its pack that begin at `start`.
    fn record(&self, bytes: &[u8], start: u64, place: &Place, id: ChunkId) -> Result<Vec<u8>> {
        let from = usize::try_from(place.offset - start).unwrap_or(usize::MAX);
        let length = usize::try_from(record_bytes(place)).unwrap_or(usize::MAX);
        let record = bytes.get(from..from.saturating_add(length)).unwrap_or_default();
        pack::read_record(record, id).map(|record| record.plain).map_err(|error| {
            let name = self.remote.objects.describe(&object_name(place.pack));
            error.context(format!("{name} at byte {}", place.offset)).with_hint(format!(
                "remove that pack from the remote, then push the image again from where it is whole: burgeon image push {} {}",
                self.image,
                self.remote.url()
            ))
        })
    }
}
