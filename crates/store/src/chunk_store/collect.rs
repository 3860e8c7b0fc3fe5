//! Garbage collection, beside everybody who reads and writes.
//!
//! Mark: everything that the roots lead to. Sweep: chunks that are not marked, and that nobody touched since `cut`, the
//! collection's start less its grace, are deleted. Then packs without chunks go, sparse ones are written anew, many
//! small ones are joined, and what dead writers left goes too.
//!
//! Why no root ever misses a chunk. Maps never change, so a marked map is marked for good. A sweep runs only while no root
//! was set since the roots were last read, and all that those lead to is marked before it is asked for: see the
//! catalog's `fence`. So in the transaction of a sweep, take a root, and see how it came to its map:
//!
//! - It was there when the roots were read. Then all of its map is marked, and stays.
//! - It was set since. Then the sweep is refused.
//! - It shares another root's map, since ([`Catalog::blocking_share_root`](crate::catalog::Catalog)). That happened in a
//!   transaction that saw the other root, of which the same is true, and so on; the first of them did not share.
//!
//! And a root that is set after a sweep has all its chunks, because its [`Writer`](super::Writer) saw each of them in a
//! transaction, and no chunk was deleted between the first of these and the one that sets the root. Whoever sets a root
//! over an edited map has to rely on what the edit left as it was, too.
//!
//! None of this asks a clock, or how long anybody is stopped. The grace is a kindness: a writer whose chunks are deleted
//! under its hands would have to begin again.
//!
//! A map that cannot be read ends the collection before anything is deleted, since what it leads to is not known. Marks
//! are kept by kind: somebody may store bytes that are those of a map's node, as data.
//!
//! A root whose time is over is removed first; until then, it keeps its chunks.
//!
//! A kill between any two steps leaves at worst an object without a row, or a pack that is dropping. The next
//! collections, once their grace has passed, remove both.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, SystemTime},
};

use burgeon_api::{
    Result,
    store::{Collected, Problem},
};

use super::{ChunkStore, Watch, object_name, repack};
use crate::{
    ChunkId, PackId,
    catalog::{PackState, PackUsage, Root, RootsSeen},
    chunk::Kind,
    map,
    steps::{Step, reached},
};

/// What was touched so short a time ago stays, if nobody says otherwise.
pub const GRACE_US: u64 = 3600 * 1_000_000;
/// Rows in one request to the catalog.
pub(super) const PAGE: u32 = 4096;

/// Everything that roots lead to.
#[derive(Default)]
struct Marks {
    nodes: HashSet<ChunkId>,
    data: HashSet<ChunkId>,
}

impl Marks {
    fn contains(&self, id: &ChunkId) -> bool {
        self.nodes.contains(id) || self.data.contains(id)
    }

    /// Whether it is new.
    fn add(&mut self, kind: Kind, id: ChunkId) -> bool {
        match kind {
            Kind::Data => self.data.insert(id),
            Kind::MapNode => self.nodes.insert(id),
        }
    }

    fn count(&self) -> u64 {
        (self.nodes.len() + self.data.len()) as u64
    }
}

/// Deletes what no root leads to. See the module.
///
/// # Errors
/// A root's map that cannot be read, by the root's name: then nothing was deleted. Those of the store, and of `watch`.
pub fn collect(store: &ChunkStore, grace_us: u64, watch: &mut Watch<'_>) -> Result<Collected> {
    let cut_us = store.now_us().saturating_sub(grace_us);
    watch("roots", 0, 0)?;
    let roots_expired = store.catalog.blocking_expire_roots(store.now_us())?;
    let mut report = Collected { roots_expired, ..Collected::default() };
    sweep(store, cut_us, watch, &mut report)?;
    packs(store, cut_us, watch, &mut report)?;
    left_over(store, cut_us, watch, &mut report)?;
    Ok(report)
}

/// Marks what the roots lead to, beyond what is marked already.
fn mark(store: &ChunkStore, marks: &mut Marks, watch: &mut Watch<'_>, report: &mut Collected) -> Result<RootsSeen> {
    loop {
        let (roots, seen) = store.catalog.blocking_see_roots()?;
        report.roots = roots.len() as u64;
        let new: Vec<&Root> = roots.iter().filter(|root| !marks.nodes.contains(&root.map)).collect();
        if new.is_empty() {
            report.chunks_kept = marks.count();
            return Ok(seen);
        }
        for (index, root) in new.iter().enumerate() {
            let mut since = 0_u32;
            let (done, total) = (index as u64, new.len() as u64);
            watch("mark", done, total)?;
            let walked = map::chunks(store, root.map, &mut |kind, id| {
                let new = marks.add(kind, id);
                since += u32::from(new);
                if since == PAGE {
                    since = 0;
                    watch("mark", done, total)?;
                }
                Ok(new)
            });
            walked.map_err(|error| {
                error
                    .context(format!("read what the {} \"{}\" keeps", root.kind, root.name))
                    .with_hint("nothing was deleted; burgeon store fsck tells what is damaged")
            })?;
        }
    }
}

fn sweep(store: &ChunkStore, cut_us: u64, watch: &mut Watch<'_>, report: &mut Collected) -> Result<()> {
    let mut marks = Marks::default();
    let mut seen = mark(store, &mut marks, watch, report)?;
    let mut cursor = None;
    loop {
        watch("sweep", report.chunks_seen, 0)?;
        let page = store.catalog.blocking_chunks_after(cursor, PAGE)?;
        let Some(last) = page.last() else { return Ok(()) };
        cursor = Some(last.id);
        report.chunks_seen += page.len() as u64;
        loop {
            let unmarked = page.iter().filter(|chunk| chunk.touched_us < cut_us && !marks.contains(&chunk.id));
            let unmarked: Vec<ChunkId> = unmarked.map(|chunk| chunk.id).collect();
            if unmarked.is_empty() {
                break;
            }
            watch("sweep", report.chunks_seen, 0)?;
            if let Some(deleted) = store.catalog.blocking_sweep(unmarked, cut_us, seen)? {
                report.chunks_deleted += deleted.len() as u64;
                reached(Step::ChunksSwept);
                break;
            }
            // A root was set meanwhile.
            seen = mark(store, &mut marks, watch, report)?;
        }
    }
}

fn packs(store: &ChunkStore, cut_us: u64, watch: &mut Watch<'_>, report: &mut Collected) -> Result<()> {
    watch("packs", 0, 0)?;
    let usage = store.catalog.blocking_pack_usage()?;
    let empty = usage.iter().filter(|pack| pack.live_chunks == 0);
    let lengths: Vec<(PackId, u64)> = empty.map(|pack| (pack.id, pack.length)).collect();
    drop_packs(store, &lengths, cut_us, watch, report)?;

    let old = |pack: &&PackUsage| pack.state == PackState::Live && pack.live_chunks > 0 && pack.created_us < cut_us;
    let (sparse, others): (Vec<&PackUsage>, Vec<&PackUsage>) =
        usage.iter().filter(old).partition(|pack| repack::is_sparse(pack));
    let small: Vec<&PackUsage> = others.into_iter().filter(|pack| repack::is_small(pack)).collect();
    let small = if small.len() >= repack::MANY { small } else { Vec::new() };
    let anew: HashMap<PackId, u64> = sparse.iter().chain(&small).map(|pack| (pack.id, pack.length)).collect();
    let mut rows = repack::rows_of(store, &anew.keys().copied().collect(), watch)?;
    let chosen = sparse.iter().chain(&small).map(|pack| (pack.id, rows.remove(&pack.id).unwrap_or_default()));
    let repacked = repack::repack(store, chosen.collect(), watch)?;
    report.problems.extend(repacked.problems);
    let joined = small.iter().filter(|pack| repacked.moved.contains(&pack.id)).count() as u64;
    report.packs_joined += joined;
    report.packs_repacked += repacked.moved.len() as u64 - joined;
    let moved: Vec<(PackId, u64)> = anew.into_iter().filter(|(pack, _)| repacked.moved.contains(pack)).collect();
    let (dropped, freed) = (report.packs_dropped, report.bytes_freed);
    drop_packs(store, &moved, cut_us, watch, report)?;
    // Those are told as repacked, and the new packs take their room.
    report.packs_dropped = dropped;
    report.bytes_freed = freed + (report.bytes_freed - freed).saturating_sub(repacked.bytes);
    Ok(())
}

/// Removes packs in which no chunk lies any more. The numbers are the bytes that this frees.
fn drop_packs(
    store: &ChunkStore,
    packs: &[(PackId, u64)],
    cut_us: u64,
    watch: &mut Watch<'_>,
    report: &mut Collected,
) -> Result<()> {
    if packs.is_empty() {
        return Ok(());
    }
    watch("drop", 0, packs.len() as u64)?;
    let ids = packs.iter().map(|(id, _)| *id).collect();
    let dropping: HashSet<PackId> = store.catalog.blocking_drop_packs(ids, cut_us)?.into_iter().collect();
    reached(Step::PackDropping);
    let dropping = packs.iter().filter(|(id, _)| dropping.contains(id));
    for (index, (pack, freed)) in dropping.enumerate() {
        let (done, total) = (index as u64, packs.len() as u64);
        watch("drop", done, total)?;
        store.close_pack(*pack);
        store.objects.delete(&object_name(*pack))?;
        reached(Step::PackDeleted);
        watch("drop", done, total)?;
        store.catalog.blocking_forget_pack(*pack)?;
        report.packs_dropped += 1;
        report.bytes_freed += freed;
    }
    Ok(())
}

/// Removes what writers left that died: unfinished files, and packs that the catalog was not told of.
fn left_over(store: &ChunkStore, cut_us: u64, watch: &mut Watch<'_>, report: &mut Collected) -> Result<()> {
    watch("tidy", 0, 0)?;
    let cut = SystemTime::UNIX_EPOCH + Duration::from_micros(cut_us);
    report.files_removed += store.objects.tidy(cut)? as u64;
    // First the objects: a row is made after its object, so that an old object without a row here has no living writer.
    let objects = store.objects.list("packs")?;
    let rows: HashSet<PackId> = store.catalog.blocking_packs()?.into_iter().map(|(id, ..)| id).collect();
    for object in objects {
        let stem = object.name.rsplit('/').next().and_then(|file| file.strip_suffix(".pack"));
        let Some(Ok(pack)) = stem.map(str::parse::<PackId>) else { continue };
        if object.name != object_name(pack) || rows.contains(&pack) || object.modified >= cut {
            continue;
        }
        watch("tidy", 0, 0)?;
        if store.catalog.blocking_condemn_pack(pack, store.now_us())? {
            reached(Step::PackCondemned);
            watch("tidy", 0, 0)?;
            store.objects.delete(&object.name)?;
            report.files_removed += 1;
            report.bytes_freed += object.length;
        }
    }
    Ok(())
}

/// What is wrong with a file at a byte.
pub(super) fn problem_at(store: &ChunkStore, pack: PackId, offset: Option<u64>, what: String) -> Problem {
    let file = store.objects.describe(&object_name(pack));
    let place = offset.map_or_else(|| file.clone(), |offset| format!("{file} at byte {offset}"));
    Problem { place, what }
}
