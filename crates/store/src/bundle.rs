//! Bundles: a manifest and all chunks below some maps in one file, for a store elsewhere (docs/formats.md, "Bundles").
//!
//! ```text
//! header, 64 bytes | manifest | records, as in packs, nodes and data as they come | end, 64 bytes
//! ```
//! Written and read from front to back, one batch in memory. A reader relies on nothing that it has not compared with its
//! name: the header tells the manifest's, each record its chunk's. What the maps lead to and the file lacks is refused
//! before anything names it.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    path::Path,
    sync::Arc,
};

use burgeon_api::{Error, Result};

use crate::{
    ChunkId,
    chunk::{Encoded, Kind},
    chunk_store::{ChunkStore, Watch, Writer, ingest},
    cut::Cutter,
    hold::{Hold, Purpose},
    map::{self, NodeSink},
    pack::{RECORD_HEADER_BYTES, RecordHeader, fill},
    wire,
};

const MAGIC: [u8; 4] = *b"BgnB";
const END_MAGIC: [u8; 4] = *b"BgnE";
const VERSION: u8 = 1;
/// Of the header and of the end: as long as a record's header, so that what follows a record is read in one.
const BLOCK_BYTES: usize = RECORD_HEADER_BYTES;
/// The longest manifest that is read.
const MOST_MANIFEST: u32 = 16 << 20;
/// Chunks that are read at a time.
const BATCH: usize = 128;
/// Names in one request to the catalog.
const NAMES: usize = 4096;

/// Stores a file as chunks, for as long as the hold lives; how long it is.
///
/// # Errors
/// Those of the file and of the store.
pub fn hold_file(store: &Arc<ChunkStore>, purpose: Purpose, path: &Path, name: String) -> Result<(u64, Hold)> {
    let file = std::fs::File::open(path).map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    let mut writer = Writer::new(store);
    let reader = io::BufReader::with_capacity(1 << 20, file);
    let ingested = ingest(store, &mut writer, reader, Cutter::FastCdc16K, None, &mut |_| {})?;
    let root = Hold::root(store, purpose, name, ingested.map.root());
    writer.finish(root.clone())?;
    Ok((ingested.bytes, Hold::of(store, purpose, &root)))
}

/// Writes a bundle of all that is below `roots`, which somebody keeps meanwhile. Progress is in stored bytes.
///
/// # Errors
/// Those of the store, of `out` and of `watch`.
pub fn write(
    store: &ChunkStore,
    manifest: &[u8],
    roots: &[ChunkId],
    out: &mut dyn Write,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let length = u32::try_from(manifest.len()).ok().filter(|length| *length <= MOST_MANIFEST);
    let length = length.ok_or_else(|| Error::internal("a manifest beyond all bounds"))?;
    watch("look", 0, 0)?;
    let chunks = map::all_chunks(store, roots)?;
    let mut total = 0;
    for some in chunks.chunks(NAMES) {
        let places = store.catalog().blocking_places(some.iter().map(|(_, id)| *id).collect())?;
        // One that is gone is told when it is read.
        total += places.iter().flatten().map(|place| u64::from(place.stored)).sum::<u64>();
    }
    let mut header = [0; BLOCK_BYTES];
    wire::put(&mut header, 0, &MAGIC);
    header[4] = VERSION;
    wire::put(&mut header, 8, &length.to_le_bytes());
    wire::put(&mut header, 16, &ChunkId::of(manifest).0);
    wire::seal(&mut header);
    let failed = |error: io::Error| Error::io("write the file", &error);
    out.write_all(&header).and_then(|()| out.write_all(manifest)).map_err(failed)?;
    let mut done = 0;
    for some in chunks.chunks(BATCH) {
        watch("export", done, total)?;
        let ids: Vec<ChunkId> = some.iter().map(|(_, id)| *id).collect();
        for ((kind, _), encoded) in some.iter().zip(store.encoded(&ids)?) {
            out.write_all(&record_header(*kind, &encoded)?)
                .and_then(|()| out.write_all(&encoded.stored))
                .map_err(failed)?;
            done += encoded.stored.len() as u64;
        }
    }
    watch("export", done, total)?;
    let mut end = [0; BLOCK_BYTES];
    wire::put(&mut end, 0, &END_MAGIC);
    end[4] = VERSION;
    wire::put(&mut end, 8, &(chunks.len() as u64).to_le_bytes());
    wire::seal(&mut end);
    out.write_all(&end).and_then(|()| out.flush()).map_err(failed)
}

fn record_header(kind: Kind, encoded: &Encoded) -> Result<[u8; RECORD_HEADER_BYTES]> {
    RecordHeader::of(kind, encoded).map(|header| header.encode())
}

/// A bundle that is read. Its bytes are nobody's until they are compared with their names.
pub struct Bundle<R> {
    reader: R,
    manifest: Vec<u8>,
    /// Bytes read so far.
    read: u64,
}

impl<R: Read> Bundle<R> {
    /// Reads the manifest.
    ///
    /// # Errors
    /// `Invalid` for what is no bundle, `Refused` for a newer version, `Damaged`; the reader's.
    pub fn open(mut reader: R) -> Result<Bundle<R>> {
        let mut header = [0; BLOCK_BYTES];
        let what = "the file's header";
        let got = fill(&mut reader, &mut header).map_err(unreadable)?;
        if got < 4 || header[..4] != MAGIC {
            return Err(Error::invalid("the file is no exported substrate")
                .with_hint("burgeon substrate export NAME FILE makes one"));
        }
        if got < BLOCK_BYTES {
            return Err(truncated(got as u64));
        }
        wire::check_sealed(&header, MAGIC, VERSION, what)?;
        wire::check_reserved(&header, 5..8, what)?;
        wire::check_reserved(&header, 12..16, what)?;
        wire::check_reserved(&header, 48..60, what)?;
        let length = wire::u32_at(&header, 8);
        if length > MOST_MANIFEST {
            return Err(Error::damaged(format!("{what} tells of a manifest of {length} bytes")));
        }
        let mut manifest = Vec::new();
        (&mut reader).take(length.into()).read_to_end(&mut manifest).map_err(unreadable)?;
        let read = (BLOCK_BYTES + manifest.len()) as u64;
        if manifest.len() as u64 != u64::from(length) {
            return Err(truncated(read));
        }
        if ChunkId::of(&manifest).0 != wire::array(&header, 16) {
            return Err(Error::damaged("the file's manifest is not the one that was written"));
        }
        Ok(Bundle { reader, manifest, read })
    }

    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// Stores the chunks, and holds what the maps lead to. Holds are named after `name`, which nobody else uses. Progress
    /// is in bytes read.
    ///
    /// # Errors
    /// `Damaged` names the byte where the file is not what it should be, or the chunk that it lacks; those of the store, the
    /// reader and `watch`. Then nothing names what was stored.
    pub fn store(
        mut self,
        store: &Arc<ChunkStore>,
        roots: &[ChunkId],
        name: &str,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Hold>> {
        let mut writer = Writer::new(store);
        let mut count = 0;
        loop {
            watch("import", self.read, 0)?;
            let mut block = [0; BLOCK_BYTES];
            let got = fill(&mut self.reader, &mut block).map_err(unreadable)?;
            if got < block.len() {
                return Err(truncated(self.read + got as u64));
            }
            let at = self.read;
            let here = |error: Error| error.context(format!("the file at byte {at}"));
            if block[..4] == END_MAGIC {
                wire::check_sealed(&block, END_MAGIC, VERSION, "the file's end").map_err(here)?;
                if wire::u64_at(&block, 8) != count {
                    return Err(here(Error::damaged(format!("{count} chunks were in front of the end, not as many"))));
                }
                break;
            }
            let header = RecordHeader::decode(&block).map_err(here)?;
            let mut stored = vec![0; header.stored as usize];
            let got = fill(&mut self.reader, &mut stored).map_err(unreadable)?;
            if got < stored.len() {
                return Err(truncated(at + (BLOCK_BYTES + got) as u64));
            }
            let record = header.read(&stored).map_err(here)?;
            self.read += header.record_bytes();
            count += 1;
            match record.kind {
                Kind::Data => writer.put(record.plain)?,
                Kind::MapNode => NodeSink::put(&mut writer, record.id, record.plain)?,
            }
        }
        if fill(&mut self.reader, &mut [0]).map_err(unreadable)? > 0 {
            return Err(Error::damaged(format!("the file goes on behind its end, at byte {}", self.read)));
        }
        writer.flush()?;
        watch("check", 0, 0)?;
        roots.iter().enumerate().map(|(index, root)| hold(store, *root, format!("{name}/{index}"))).collect()
    }
}

/// Holds all that is below a map, which must be there.
fn hold(store: &Arc<ChunkStore>, root: ChunkId, name: String) -> Result<Hold> {
    let lacks = |id: ChunkId| Error::damaged(format!("the file lacks {id:?}, which its manifest leads to"));
    let mut writer = Writer::new(store);
    if store.catalog().blocking_places(vec![root])?[0].is_none() {
        return Err(lacks(root));
    }
    let mut chunks = HashSet::new();
    map::chunks(&**store, root, &mut |_, id| Ok(chunks.insert(id)))?;
    let chunks: Vec<ChunkId> = chunks.into_iter().collect();
    for some in chunks.chunks(NAMES) {
        let places = store.catalog().blocking_claim(some.to_vec(), store.now_us())?;
        for (id, place) in some.iter().zip(places) {
            place.ok_or_else(|| lacks(*id))?;
            writer.rely(*id);
        }
    }
    let root = Hold::root(store, Purpose::Imported, name, root);
    writer.finish(root.clone())?;
    Ok(Hold::of(store, Purpose::Imported, &root))
}

fn truncated(at: u64) -> Error {
    Error::damaged(format!("the file ends at byte {at}, before its end")).with_hint("export the substrate again")
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn unreadable(error: io::Error) -> Error {
    Error::io("read the file", &error)
}

#[cfg(test)]
mod tests {
    use burgeon_api::ErrorKind;

    use super::*;
    use crate::chunk_store::{MapBytes, Source};

    fn store() -> (tempfile::TempDir, Arc<ChunkStore>) {
        let directory = tempfile::tempdir().unwrap();
        let count = std::sync::atomic::AtomicU8::new(0);
        let uuid = move || [count.fetch_add(1, std::sync::atomic::Ordering::Relaxed); 16];
        let source = Source { now_us: Arc::new(|| 1_000_000), uuid: Arc::new(uuid) };
        let store = ChunkStore::open(directory.path(), source).unwrap();
        (directory, store)
    }

    /// Random bytes and zeros.
    fn content() -> Vec<u8> {
        let mut state = 7_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..600_000).map(|at| if at / 100_000 % 2 == 0 { next() } else { 0 }).collect()
    }

    fn take(store: &Arc<ChunkStore>, bytes: &[u8], roots: &[ChunkId]) -> Result<(Vec<u8>, Vec<Hold>)> {
        let bundle = Bundle::open(bytes)?;
        let manifest = bundle.manifest().to_vec();
        Ok((manifest, bundle.store(store, roots, "test", &mut |_, _, _| Ok(()))?))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_written_is_read_and_nothing_else() {
        tokio::task::spawn_blocking(|| {
            let (directory, from) = store();
            let path = directory.path().join("file");
            std::fs::write(&path, content()).unwrap();
            let (length, held) = hold_file(&from, Purpose::Pushed, &path, "file".into()).unwrap();
            assert_eq!(length, 600_000);
            let mut bytes = Vec::new();
            write(&from, b"{}", &[held.map()], &mut bytes, &mut |_, _, _| Ok(())).unwrap();
            // Zeros cost nothing, and what is written first is pinned.
            assert!(bytes.len() < 310_000, "{}", bytes.len());
            assert_eq!(&bytes[..16], b"BgnB\x01\0\0\0\x02\0\0\0\0\0\0\0");

            let (_directory, to) = store();
            let (manifest, holds) = take(&to, &bytes, &[held.map()]).unwrap();
            assert_eq!((manifest.as_slice(), holds.len()), (b"{}".as_slice(), 1));
            let mut read = Vec::new();
            let map = map::Map::open(&*to, held.map()).unwrap();
            MapBytes::new(&to, map).take(length).read_to_end(&mut read).unwrap();
            assert!(read == content());
            drop(holds);
            assert!(to.catalog().blocking_roots(None).unwrap().is_empty());

            // Cut anywhere, with any byte changed, or with another file behind it, it is refused, and nothing is held.
            let (_directory, other) = store();
            for at in (0..bytes.len()).step_by(4999).chain([1, 63, 64, 65, 66, bytes.len() - 65, bytes.len() - 1]) {
                let cut = take(&other, &bytes[..at], &[held.map()]).err().unwrap();
                let wanted = if at < 4 { "is no exported" } else { "before its end" };
                assert!(cut.message.contains(wanted), "{at}: {cut}");
                let mut flipped = bytes.clone();
                flipped[at] ^= 16;
                let error = take(&other, &flipped, &[held.map()]).err().unwrap();
                assert!(
                    matches!(error.kind, ErrorKind::Damaged | ErrorKind::Invalid | ErrorKind::Refused),
                    "{at}: {error}"
                );
            }
            let longer = [bytes.as_slice(), b"more"].concat();
            assert!(take(&other, &longer, &[]).err().unwrap().message.contains("goes on behind its end"));
            let mut newer = bytes.clone();
            newer[4] = 2;
            let sum = crc32fast::hash(&newer[..60]).to_le_bytes();
            newer[60..64].copy_from_slice(&sum);
            let error = take(&other, &newer, &[]).err().unwrap();
            assert!(error.kind == ErrorKind::Refused && error.message.contains("version 2"), "{error}");
            let elsewhere = ChunkId::of(b"elsewhere");
            assert!(take(&other, &bytes, &[elsewhere]).err().unwrap().message.contains("the file lacks"));
            assert!(other.catalog().blocking_roots(None).unwrap().is_empty());
        })
        .await
        .unwrap();
    }
}
