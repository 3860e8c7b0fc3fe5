//! Whether what the catalog says fits together: roots, maps, chunks and packs. Chunks of data are not read; that is what
//! [`super::scrub`] does.

use std::collections::{HashMap, HashSet};

use burgeon_api::{
    Error, ErrorKind, Result,
    store::{Checked, Problem},
};
use bytes::Bytes;

use super::{
    ChunkStore, Watch,
    collect::{PAGE, problem_at},
    is_away, object_name,
};
use crate::{
    ChunkId, PackId,
    catalog::{Candidate, PackState, Root},
    chunk::Kind,
    map,
    pack::RECORD_HEADER_BYTES,
};

/// Names in one request to the catalog.
const LOOKED_UP: usize = 4096;

/// Checks that every root's map can be read, that the catalog has every chunk it names, and that every chunk lies in a
/// pack that is there.
///
/// # Errors
/// Those of the catalog and of `watch`. What is damaged is in the answer.
pub fn fsck(store: &ChunkStore, watch: &mut Watch<'_>) -> Result<Checked> {
    let mut checked = Checked::default();
    roots(store, &mut checked, watch)?;
    let lengths = packs(store, &mut checked, watch)?;
    rows(store, lengths, &mut checked, watch)?;
    Ok(checked)
}

fn roots(store: &ChunkStore, checked: &mut Checked, watch: &mut Watch<'_>) -> Result<()> {
    let roots = store.catalog.blocking_roots(None)?;
    let mut seen = HashSet::new();
    for (index, root) in roots.iter().enumerate() {
        watch("roots", index as u64, roots.len() as u64)?;
        let mut new = Vec::new();
        let what = match map_problem(store, root, &mut seen, &mut new, watch) {
            Ok(None) => None,
            Ok(Some(missing)) => Some(missing),
            Err(error) if error.kind == ErrorKind::Cancelled || is_away(&error) => return Err(error),
            Err(error) => Some(error.message),
        };
        checked.roots += 1;
        let Some(what) = what else { continue };
        // Another root that leads to the same is told too.
        for known in &new {
            seen.remove(known);
        }
        let now = store.catalog.blocking_roots(Some(&root.kind))?;
        if now.iter().any(|now| now.name == root.name && now.map == root.map) {
            checked.problems.push(Problem { place: format!("{} {}", root.kind, root.name), what });
        }
    }
    Ok(())
}

/// Nodes as they are on the disk, whatever is in memory.
struct PastCache<'a>(&'a ChunkStore);

impl map::Nodes for PastCache<'_> {
    fn get(&self, id: ChunkId) -> Result<Bytes> {
        let found = self.0.get_many(&[id])?.pop();
        found.map(Bytes::from).ok_or_else(|| Error::internal("a chunk that was found is missing"))
    }
}

/// Walks a map beyond what was seen; what was not goes to `new`. Tells the first chunk that the catalog misses, and how
/// many it misses.
fn map_problem(
    store: &ChunkStore,
    root: &Root,
    seen: &mut HashSet<(Kind, ChunkId)>,
    new: &mut Vec<(Kind, ChunkId)>,
    watch: &mut Watch<'_>,
) -> Result<Option<String>> {
    map::chunks(&PastCache(store), root.map, &mut |kind, id| {
        let is_new = seen.insert((kind, id));
        if is_new {
            new.push((kind, id));
            if new.len().is_multiple_of(LOOKED_UP) {
                watch("roots", 0, 0)?;
            }
        }
        Ok(is_new)
    })?;
    let mut missing = Vec::new();
    for some in new.chunks(LOOKED_UP) {
        let ids: Vec<ChunkId> = some.iter().map(|(_, id)| *id).collect();
        let places = store.catalog.blocking_places(ids)?;
        missing.extend(some.iter().zip(places).filter(|(_, place)| place.is_none()).map(|((_, id), _)| *id));
    }
    Ok(missing
        .first()
        .map(|first| format!("{} chunks of its map are not in the store, {first:?} the first", missing.len())))
}

/// Lengths of the packs that are there.
fn packs(store: &ChunkStore, checked: &mut Checked, watch: &mut Watch<'_>) -> Result<HashMap<PackId, u64>> {
    let mut lengths = HashMap::new();
    let packs = store.catalog.blocking_packs()?;
    for (index, (pack, length, state)) in packs.iter().enumerate() {
        watch("packs", index as u64, packs.len() as u64)?;
        if *state == PackState::Dropping {
            continue;
        }
        checked.packs += 1;
        lengths.insert(*pack, *length);
        let what = match store.objects.length(&object_name(*pack)) {
            Ok(found) if found == *length => continue,
            Ok(found) => format!("it has {found} bytes, and {length} by the catalog"),
            Err(error) if is_away(&error) => return Err(error),
            Err(error) => error.message,
        };
        // One in which nothing is used, as a repair leaves it, goes with a collection.
        if live_packs(store)?.contains_key(pack) && store.catalog.blocking_is_used(*pack)? {
            checked.problems.push(problem_at(store, *pack, None, what));
        }
    }
    Ok(lengths)
}

fn live_packs(store: &ChunkStore) -> Result<HashMap<PackId, u64>> {
    let packs = store.catalog.blocking_packs()?.into_iter();
    Ok(packs.filter(|(_, _, state)| *state == PackState::Live).map(|(id, length, _)| (id, length)).collect())
}

fn rows(
    store: &ChunkStore,
    mut lengths: HashMap<PackId, u64>,
    checked: &mut Checked,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let mut cursor = None;
    loop {
        watch("chunks", checked.chunks, 0)?;
        let page = store.catalog.blocking_chunks_after(cursor, PAGE)?;
        let Some(last) = page.last() else { return Ok(()) };
        cursor = Some(last.id);
        checked.chunks += page.len() as u64;
        if page.iter().any(|row| !lengths.contains_key(&row.place.pack)) {
            // Writers may have added packs since.
            lengths = live_packs(store)?;
        }
        for row in &page {
            if let Some(what) = row_problem(row, lengths.get(&row.place.pack).copied()) {
                // Only a row that still says so is wrong.
                let now = store.catalog.blocking_places(vec![row.id])?.first().copied().flatten();
                if now == Some(row.place) {
                    let place = row.place;
                    checked.problems.push(problem_at(store, place.pack, Some(place.offset), what));
                }
            }
        }
    }
}

fn row_problem(row: &Candidate, pack: Option<u64>) -> Option<String> {
    let place = row.place;
    let end = place.offset.saturating_add(RECORD_HEADER_BYTES as u64).saturating_add(u64::from(place.stored));
    match pack {
        None => Some(format!("{:?} is said to lie in a pack that is not there", row.id)),
        Some(length) if end > length => Some(format!("{:?} is said to lie beyond the pack's end", row.id)),
        Some(_) => None,
    }
}
