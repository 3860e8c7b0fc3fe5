//! Reading everything that is stored, and comparing it with its name; and letting go of copies that are damaged.
//!
//! A writer leaves out what the catalog knows, so a damaged copy stays damaged however often its bytes come again. A
//! repair deletes the rows of such copies, after a second look at each: then the next writer that has the bytes stores
//! them anew, and all roots that miss them have them again. What is good of a damaged pack is moved to a new one, and
//! the old one, in which nothing is used any more, goes with a later collection.

use std::collections::{BTreeMap, HashSet};

use burgeon_api::{
    Error, ErrorKind, Result,
    store::{Checked, Problem},
};

use super::{ChunkStore, Watch, collect::problem_at, is_away, object_name, repack, repack::rows_of};
use crate::{
    ChunkId, PackId, Place,
    catalog::PackState,
    map,
    objects::OpenObject,
    pack::{Entry, FILE_HEADER_BYTES, RECORD_HEADER_BYTES, Tail, read_file_header, read_index, read_record},
};

/// The end of a pack that is read first: the index of most packs.
const TAIL_BYTES: u64 = 64 << 10;

/// What a walk over all packs has found.
#[derive(Default)]
struct Found {
    checked: Checked,
    /// Bytes of all packs.
    total: u64,
    /// Packs of which something is damaged, and what.
    packs: BTreeMap<PackId, Vec<Problem>>,
    /// Those of them that are not there at all.
    missing: HashSet<PackId>,
    /// Those whose index does not read: of these, what the catalog knows of is looked at.
    lost_index: HashSet<PackId>,
    /// Damaged copies that are in use, by the catalog.
    copies: Vec<(ChunkId, Place)>,
}

/// Verifies every record of every pack in which something is used. `watch` is told the bytes read after each record, so
/// that it may hold them to a rate. With `repair`, copies in use that are damaged are let go of.
///
/// # Errors
/// Those of the catalog and of `watch`; `Refused` for a repair of a store without any pack. What is damaged is in the
/// answer.
pub fn scrub(store: &ChunkStore, repair: bool, watch: &mut Watch<'_>) -> Result<Checked> {
    let mut found = Found::default();
    let packs = store.catalog.blocking_packs()?;
    let live: Vec<(PackId, u64)> = packs
        .into_iter()
        .filter(|(_, _, state)| *state == PackState::Live)
        .map(|(pack, length, _)| (pack, length))
        .collect();
    found.total = live.iter().map(|(_, length)| length).sum();
    watch("scrub", 0, found.total)?;
    for (pack, length) in &live {
        look_at_pack(store, *pack, *length, &mut found, watch)?;
    }
    let unread = found.missing.union(&found.lost_index).copied().collect();
    for (pack, rows) in rows_of(store, &unread, watch)? {
        let records = rows.iter().map(|row| (row.id, row.place)).collect();
        match store.objects.open_object(&object_name(pack)) {
            Ok(object) => check(store, &object, records, &mut found, watch)?,
            Err(error) if error.kind == ErrorKind::NotFound => found.copies.extend(records),
            Err(error) if is_away(&error) => return Err(error),
            Err(_) => {}
        }
    }
    found.checked.repairable = found.copies.len() as u64;
    if !found.copies.is_empty() {
        found.checked.needed_by = needed_by(store, &found.copies, watch)?;
    }
    // Where nothing of a pack is used, nobody misses anything: it goes with a collection.
    let mut damaged = Vec::new();
    for (pack, problems) in std::mem::take(&mut found.packs) {
        if store.catalog.blocking_is_used(pack)? {
            damaged.push(pack);
            found.checked.problems.extend(problems);
        }
    }
    if repair && !damaged.is_empty() {
        if found.missing.len() == live.len() {
            return Err(Error::refused(format!("none of the store's {} packs is there", live.len()))
                .with_hint("nothing was changed; see whether the disk that holds them is mounted"));
        }
        let_go(store, &damaged, &mut found, watch)?;
    }
    Ok(found.checked)
}

fn look_at_pack(store: &ChunkStore, pack: PackId, length: u64, found: &mut Found, watch: &mut Watch<'_>) -> Result<()> {
    let records = store.objects.open_object(&object_name(pack)).and_then(|object| {
        let records = index(&object, pack, length)?;
        Ok((object, records))
    });
    match records {
        Ok((object, records)) => {
            found.checked.packs += 1;
            let records = records.iter().map(|entry| (entry.id, entry.place)).collect();
            check(store, &object, records, found, watch)
        }
        Err(error) if is_away(&error) => Err(error),
        Err(_) if is_dropped(store, pack)? => Ok(()),
        Err(error) => {
            found.checked.packs += 1;
            if error.kind == ErrorKind::NotFound { &mut found.missing } else { &mut found.lost_index }.insert(pack);
            found.packs.entry(pack).or_default().push(problem_at(store, pack, None, error.message));
            Ok(())
        }
    }
}

/// What the index of a pack tells, which is of this length.
pub(super) fn index(object: &OpenObject, pack: PackId, length: u64) -> Result<Vec<Entry>> {
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
            Tail::Index(entries) => return Ok(entries),
            Tail::More(wider) => range = wider,
        }
    }
}

fn check(
    store: &ChunkStore,
    object: &OpenObject,
    mut records: Vec<(ChunkId, Place)>,
    found: &mut Found,
    watch: &mut Watch<'_>,
) -> Result<()> {
    records.sort_unstable_by_key(|(_, place)| place.offset);
    for (id, place) in records {
        found.checked.chunks += 1;
        found.checked.bytes += (RECORD_HEADER_BYTES as u64) + u64::from(place.stored);
        if let Err(error) = read(object, id, place) {
            if is_away(&error) {
                return Err(error);
            }
            let used = store.catalog.blocking_places(vec![id])?.first().copied().flatten() == Some(place);
            let what = format!("{}{}", error.message, if used { "" } else { " (not in use)" });
            let problem = problem_at(store, place.pack, Some(place.offset), what);
            found.packs.entry(place.pack).or_default().push(problem);
            if used && is_damage(&error) {
                found.copies.push((id, place));
            }
        }
        watch("scrub", found.checked.bytes, found.total)?;
    }
    Ok(())
}

fn read(object: &OpenObject, id: ChunkId, place: Place) -> Result<()> {
    let mut bytes = vec![0; RECORD_HEADER_BYTES + usize::try_from(place.stored).unwrap_or(0)];
    object.read_at(place.offset, &mut bytes).and_then(|()| read_record(&bytes, id).map(drop))
}

/// Whether the bytes are not there any more; not so of a record that a newer Burgeon wrote, and of a disk that fails,
/// which may be read another time.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Damaged | ErrorKind::NotFound)
}

/// The roots that lead to one of these chunks, by kind and name.
fn needed_by(store: &ChunkStore, copies: &[(ChunkId, Place)], watch: &mut Watch<'_>) -> Result<Vec<String>> {
    let lost: HashSet<ChunkId> = copies.iter().map(|(id, _)| *id).collect();
    let mut names = Vec::new();
    let roots = store.catalog.blocking_roots(None)?;
    for (index, root) in roots.iter().enumerate() {
        watch("roots", index as u64, roots.len() as u64)?;
        let (mut seen, mut needs) = (HashSet::new(), false);
        let walked = map::chunks(store, root.map, &mut |kind, id| {
            needs |= lost.contains(&id);
            // One is enough; the walk ends with the next load.
            Ok(!needs && seen.insert((kind, id)))
        });
        match walked {
            _ if needs => {
                let of_map = format!("/{}", root.map);
                names.push(format!("{} {}", root.kind, root.name.strip_suffix(&of_map).unwrap_or(&root.name)));
            }
            Err(error) if error.kind == ErrorKind::Cancelled || is_away(&error) => return Err(error),
            // What else is wrong with it is for fsck to tell.
            _ => {}
        }
    }
    names.dedup();
    Ok(names)
}

/// Deletes the rows of damaged copies, and moves what is good out of their packs.
fn let_go(store: &ChunkStore, damaged: &[PackId], found: &mut Found, watch: &mut Watch<'_>) -> Result<()> {
    watch("repair", 0, 0)?;
    // A second look, past all that is held open: a copy that can be read by now stays.
    let mut still = std::mem::take(&mut found.copies);
    still.retain(|(id, place)| {
        let object = store.objects.open_object(&object_name(place.pack));
        object.and_then(|object| read(&object, *id, *place)).is_err_and(|error| is_damage(&error))
    });
    found.checked.repaired = store.catalog.blocking_let_go_of_copies(still)?;
    let rest = rows_of(store, &damaged.iter().copied().collect(), watch)?;
    // What cannot be read though it is no damage stays where it is; it was told above.
    repack::repack(store, rest.into_iter().collect(), watch)?;
    Ok(())
}

/// Whether a collection has dropped the pack meanwhile.
fn is_dropped(store: &ChunkStore, pack: PackId) -> Result<bool> {
    Ok(!store.catalog.blocking_packs()?.iter().any(|(id, _, state)| *id == pack && *state == PackState::Live))
}
