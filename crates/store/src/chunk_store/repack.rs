//! Writing packs anew: what is used of some goes to new ones, as it is stored.

use std::collections::{HashMap, HashSet};

use burgeon_api::{ErrorKind, Result, store::Problem};

use super::{
    ChunkStore, Watch,
    collect::{PAGE, problem_at},
    object_name,
};
use crate::{
    ChunkId, PackId,
    catalog::{Candidate, Entry, PackUsage},
    chunk::{Encoded, Kind},
    pack::{
        ENTRY_BYTES, FILE_HEADER_BYTES, PACK_BYTES_LOCAL, PackWriter, RECORD_HEADER_BYTES, RecordHeader, TRAILER_BYTES,
        read_record,
    },
    steps::{Step, reached},
};

/// Small packs are joined once there are so many: with fewer, joining would write the same chunks again and again.
pub(super) const MANY: usize = 8;

/// Whether less than half of a pack is used. What a new pack needs beside the chunks counts too, or packs of small
/// chunks would be written anew for ever.
pub(super) fn is_sparse(pack: &PackUsage) -> bool {
    let around = (FILE_HEADER_BYTES + TRAILER_BYTES) as u64;
    let needed = pack.live_stored + pack.live_chunks * (RECORD_HEADER_BYTES + ENTRY_BYTES) as u64 + around;
    needed.saturating_mul(2) < pack.length
}

/// Whether a pack has less than a quarter of the usual length.
pub(super) fn is_small(pack: &PackUsage) -> bool {
    pack.length < PACK_BYTES_LOCAL / 4
}

/// The rows of the chunks in these packs.
pub(super) fn rows_of(
    store: &ChunkStore,
    packs: &HashSet<PackId>,
    watch: &mut Watch<'_>,
) -> Result<HashMap<PackId, Vec<Candidate>>> {
    let mut rows: HashMap<PackId, Vec<Candidate>> = HashMap::new();
    let mut cursor = None;
    while !packs.is_empty() {
        watch("packs", 0, 0)?;
        let page = store.catalog.blocking_chunks_after(cursor, PAGE)?;
        let Some(last) = page.last() else { break };
        cursor = Some(last.id);
        for chunk in page.into_iter().filter(|chunk| packs.contains(&chunk.place.pack)) {
            rows.entry(chunk.place.pack).or_default().push(chunk);
        }
    }
    Ok(rows)
}

/// What became of packs that were to be written anew.
#[derive(Default)]
pub(super) struct Repacked {
    /// Those in which nothing is left.
    pub(super) moved: Vec<PackId>,
    /// Bytes of the new packs.
    pub(super) bytes: u64,
    /// Why others stay as they are.
    pub(super) problems: Vec<Problem>,
}

/// A new pack, and where its chunks are from.
struct Joined {
    writer: PackWriter<Vec<u8>>,
    from: HashMap<ChunkId, PackId>,
}

/// Moves these chunks, which are all that lie in their packs, to new packs of the usual length. A pack in which one
/// cannot be read stays as it is.
pub(super) fn repack(
    store: &ChunkStore,
    packs: Vec<(PackId, Vec<Candidate>)>,
    watch: &mut Watch<'_>,
) -> Result<Repacked> {
    let mut repacked = Repacked::default();
    let mut joined: Option<Joined> = None;
    let total = packs.len() as u64;
    for (index, (pack, rows)) in packs.into_iter().enumerate() {
        watch("repack", index as u64, total)?;
        let records = match read_all(store, pack, rows)? {
            Ok(records) => records,
            Err(problem) => {
                repacked.problems.push(problem);
                continue;
            }
        };
        let into = match &mut joined {
            Some(joined) => joined,
            none => none.insert(Joined {
                writer: PackWriter::new(PackId((store.source.uuid)()), Vec::new())?,
                from: HashMap::new(),
            }),
        };
        for (kind, encoded) in &records {
            into.writer.append(*kind, encoded)?;
            into.from.insert(encoded.id, pack);
        }
        repacked.moved.push(pack);
        if into.writer.length() >= PACK_BYTES_LOCAL
            && let Some(full) = joined.take()
        {
            repacked.bytes += close(store, full, watch)?;
        }
    }
    if let Some(last) = joined {
        repacked.bytes += close(store, last, watch)?;
    }
    Ok(repacked)
}

/// Makes a new pack durable, then gives the chunks their places in it.
fn close(store: &ChunkStore, joined: Joined, watch: &mut Watch<'_>) -> Result<u64> {
    let pack = joined.writer.finish()?;
    watch("repack", 0, 0)?;
    store.objects.put_new(&object_name(pack.pack), &pack.sink)?;
    reached(Step::PackJoined);
    watch("repack", 0, 0)?;
    let moves = pack.entries.iter().filter_map(|entry| {
        let from = joined.from.get(&entry.id)?;
        Some((*from, Entry { id: entry.id, kind: entry.kind as u8, place: entry.place }))
    });
    store.catalog.blocking_move_chunks(pack.pack, pack.length, moves.collect(), store.now_us())?;
    reached(Step::ChunksMoved);
    Ok(pack.length)
}

fn read_all(
    store: &ChunkStore,
    pack: PackId,
    mut rows: Vec<Candidate>,
) -> Result<Result<Vec<(Kind, Encoded)>, Problem>> {
    rows.sort_unstable_by_key(|row| row.place.offset);
    let mut records = Vec::with_capacity(rows.len());
    for row in &rows {
        match read(store, row) {
            Ok(record) => records.push(record),
            Err(error) if matches!(error.kind, ErrorKind::Damaged | ErrorKind::NotFound | ErrorKind::Refused) => {
                return Ok(Err(problem_at(store, pack, Some(row.place.offset), error.message)));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Ok(records))
}

/// A record as it is stored, verified.
fn read(store: &ChunkStore, row: &Candidate) -> Result<(Kind, Encoded)> {
    let object = store.open_pack(row.place.pack)?;
    let mut bytes = vec![0; RECORD_HEADER_BYTES + usize::try_from(row.place.stored).unwrap_or(0)];
    object.read_at(row.place.offset, &mut bytes)?;
    read_record(&bytes, row.id)?;
    let (block, stored) = bytes
        .split_first_chunk::<RECORD_HEADER_BYTES>()
        .ok_or_else(|| burgeon_api::Error::internal("a record without a header"))?;
    let header = RecordHeader::decode(block)?;
    let encoded = Encoded { id: header.id, codec: header.codec, length: header.length, stored: stored.to_vec() };
    Ok((header.kind, encoded))
}
