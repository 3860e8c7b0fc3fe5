//! Reading everything that is stored, and comparing it with its name.

use std::collections::HashSet;

use burgeon_api::{Error, ErrorKind, Result, store::Checked};

use super::{ChunkStore, Watch, collect::problem_at, object_name, repack::rows_of};
use crate::{
    ChunkId, PackId, Place,
    catalog::PackState,
    objects::OpenObject,
    pack::{FILE_HEADER_BYTES, RECORD_HEADER_BYTES, Tail, read_file_header, read_index, read_record},
};

/// The end of a pack that is read first: the index of most packs.
const TAIL_BYTES: u64 = 64 << 10;

/// Verifies every record of every pack. `watch` is told the bytes read after each record, so that it may hold them to a
/// rate.
///
/// # Errors
/// Those of the catalog and of `watch`. What is damaged is in the answer.
pub fn scrub(store: &ChunkStore, watch: &mut Watch<'_>) -> Result<Checked> {
    let packs = store.catalog.blocking_packs()?;
    let live = |state: &PackState| *state == PackState::Live;
    let total = packs.iter().filter(|(_, _, state)| live(state)).map(|(_, length, _)| length).sum();
    let mut checked = Checked::default();
    // Packs whose index does not read: of those, what the catalog knows of is looked at.
    let mut lost_index = HashSet::new();
    watch("scrub", 0, total)?;
    for (pack, length, _) in packs.iter().filter(|(_, _, state)| live(state)) {
        let records = store.objects.open_object(&object_name(*pack)).and_then(|object| {
            let records = index(&object, *pack, *length)?;
            Ok((object, records))
        });
        match records {
            Ok((object, records)) => {
                checked.packs += 1;
                check(store, &object, records, total, &mut checked, watch)?;
            }
            Err(_) if is_dropped(store, *pack)? => {}
            Err(error) => {
                checked.packs += 1;
                checked.problems.push(problem_at(store, *pack, None, error.message));
                if error.kind != ErrorKind::NotFound {
                    lost_index.insert(*pack);
                }
            }
        }
    }
    for (pack, rows) in rows_of(store, &lost_index, watch)? {
        if let Ok(object) = store.objects.open_object(&object_name(pack)) {
            let records = rows.iter().map(|row| (row.id, row.place)).collect();
            check(store, &object, records, total, &mut checked, watch)?;
        }
    }
    Ok(checked)
}

fn index(object: &OpenObject, pack: PackId, length: u64) -> Result<Vec<(ChunkId, Place)>> {
    if object.length() != length {
        return Err(Error::damaged(format!("it has {} bytes, and {length} by the catalog", object.length())));
    }
    let mut header = [0; FILE_HEADER_BYTES];
    object.read_at(0, &mut header)?;
    if read_file_header(&header)? != pack {
        return Err(Error::damaged("it is another pack, by its header"));
    }
    let mut range = length.saturating_sub(TAIL_BYTES)..length;
    loop {
        let mut tail = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        object.read_at(range.start, &mut tail)?;
        match read_index(pack, &tail, length)? {
            Tail::Index(entries) => return Ok(entries.iter().map(|entry| (entry.id, entry.place)).collect()),
            Tail::More(wider) => range = wider,
        }
    }
}

fn check(
    store: &ChunkStore,
    object: &OpenObject,
    mut records: Vec<(ChunkId, Place)>,
    total: u64,
    checked: &mut Checked,
    watch: &mut Watch<'_>,
) -> Result<()> {
    records.sort_unstable_by_key(|(_, place)| place.offset);
    for (id, place) in records {
        let mut bytes = vec![0; RECORD_HEADER_BYTES + usize::try_from(place.stored).unwrap_or(0)];
        let read = object.read_at(place.offset, &mut bytes).and_then(|()| read_record(&bytes, id).map(drop));
        checked.chunks += 1;
        checked.bytes += bytes.len() as u64;
        if let Err(error) = read {
            let used = store.catalog.blocking_places(vec![id])?.first().copied().flatten() == Some(place);
            let what = format!("{}{}", error.message, if used { "" } else { " (not in use)" });
            checked.problems.push(problem_at(store, place.pack, Some(place.offset), what));
        }
        watch("scrub", checked.bytes, total)?;
    }
    Ok(())
}

/// Whether a collection has dropped the pack meanwhile.
fn is_dropped(store: &ChunkStore, pack: PackId) -> Result<bool> {
    Ok(!store.catalog.blocking_packs()?.iter().any(|(id, _, state)| *id == pack && *state == PackState::Live))
}
