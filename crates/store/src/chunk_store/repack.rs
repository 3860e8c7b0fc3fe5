//! Writing a sparse pack anew: what of it is used goes to a new pack, as it is stored.

use std::collections::{HashMap, HashSet};

use burgeon_api::{ErrorKind, Result, store::Problem};

use super::{
    ChunkStore, Watch,
    collect::{PAGE, problem_at},
    object_name,
};
use crate::{
    PackId,
    catalog::{Candidate, Entry, PackUsage},
    chunk::{Encoded, Kind},
    pack::{ENTRY_BYTES, FILE_HEADER_BYTES, PackWriter, RECORD_HEADER_BYTES, RecordHeader, TRAILER_BYTES, read_record},
};

/// Whether less than half of a pack is used. What a new pack needs beside the chunks counts too, or packs of small
/// chunks would be written anew for ever.
pub(super) fn is_sparse(pack: &PackUsage) -> bool {
    let around = (FILE_HEADER_BYTES + TRAILER_BYTES) as u64;
    let needed = pack.live_stored + pack.live_chunks * (RECORD_HEADER_BYTES + ENTRY_BYTES) as u64 + around;
    needed.saturating_mul(2) < pack.length
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

/// Moves these chunks, which are all that lie in the pack, to a new one, whose length it answers. A pack in which one
/// cannot be read stays as it is.
pub(super) fn repack(
    store: &ChunkStore,
    from: PackId,
    mut rows: Vec<Candidate>,
    watch: &mut Watch<'_>,
) -> Result<Result<u64, Problem>> {
    rows.sort_unstable_by_key(|row| row.place.offset);
    let mut writer = PackWriter::new(PackId((store.source.uuid)()), Vec::new())?;
    for row in &rows {
        match read(store, row) {
            Ok((kind, encoded)) => writer.append(kind, &encoded).map(drop)?,
            Err(error) if matches!(error.kind, ErrorKind::Damaged | ErrorKind::NotFound | ErrorKind::Refused) => {
                return Ok(Err(problem_at(store, from, Some(row.place.offset), error.message)));
            }
            Err(error) => return Err(error),
        }
    }
    let pack = writer.finish()?;
    watch("repack", 0, 0)?;
    store.objects.put_new(&object_name(pack.pack), &pack.sink)?;
    watch("repack", 0, 0)?;
    let entries = pack.entries.iter().map(|entry| Entry { id: entry.id, kind: entry.kind as u8, place: entry.place });
    store.catalog.blocking_move_chunks(from, pack.pack, pack.length, entries.collect(), store.now_us())?;
    Ok(Ok(pack.length))
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
