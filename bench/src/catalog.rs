//! How many chunks the catalog takes in a second, in durable groups, beside SQLite alone with the same rows and groups.

use std::{fs, path::Path, thread, time::Instant};

use anyhow::{Result, anyhow};
use burgeon_store::{
    ChunkId, PackId, Place,
    catalog::{Catalog, Entry},
};

use crate::{
    figures::{Outcome, take_turns},
    store::fresh,
    workspace::Workspace,
};

const CHUNKS_OF_A_PACK: u32 = 250;
/// Who add packs at the same time, each of whom waits for the disk; the packs of a commit of the rival.
const CALLERS: u32 = 16;
const PACKS: u32 = 125 * CALLERS;
const NOW_US: u64 = 1_790_000_000_000_000;

pub(crate) fn meta_inserts(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let ours = || {
        let directory = fresh(workspace, "inserts")?;
        let rate = through_catalog(&directory.join("ours.db"))?;
        fs::remove_dir_all(directory)?;
        Ok(rate)
    };
    let mut theirs = || {
        let directory = fresh(workspace, "inserts")?;
        let rate = through_sqlite(&directory.join("bare.db"))?;
        fs::remove_dir_all(directory)?;
        Ok(rate)
    };
    Ok(Outcome::of(take_turns(runs, |rate| rate, ours, Some(&mut theirs))?))
}

fn pack_id(number: u32) -> PackId {
    let mut id = [7; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    PackId(id)
}

fn entries(number: u32) -> Vec<Entry> {
    let pack = pack_id(number);
    let entry = |index: u32| {
        let place = Place { pack, offset: u64::from(index) * 16_384, stored: 9_000 + index, length: 16_384 };
        let id = ChunkId::of(&(number * CHUNKS_OF_A_PACK + index).to_le_bytes());
        Entry { id, kind: 1, place }
    };
    (0..CHUNKS_OF_A_PACK).map(entry).collect()
}

fn rate(begun: Instant) -> f64 {
    f64::from(PACKS * CHUNKS_OF_A_PACK) / begun.elapsed().as_secs_f64()
}

/// The ids are hashed before the clock starts: that is the work of those who cut chunks.
fn through_catalog(path: &Path) -> Result<f64> {
    let catalog = Catalog::open(path)?;
    let mut work: Vec<Vec<(u32, Vec<Entry>)>> = (0..CALLERS).map(|_| Vec::new()).collect();
    for (number, caller) in (0..PACKS).zip((0..work.len()).cycle()) {
        work[caller].push((number, entries(number)));
    }
    let begun = Instant::now();
    let callers: Vec<_> = work
        .into_iter()
        .map(|packs| {
            let catalog = catalog.clone();
            thread::spawn(move || {
                for (number, entries) in packs {
                    catalog.blocking_add_pack(pack_id(number), 4 << 20, NOW_US, entries)?;
                }
                Ok::<(), burgeon_api::Error>(())
            })
        })
        .collect();
    for caller in callers {
        caller.join().map_err(|_| anyhow!("a caller ended early"))??;
    }
    Ok(rate(begun))
}

/// The same rows, with the same settings, as many packs in a commit as there are callers.
fn through_sqlite(path: &Path) -> Result<f64> {
    let mut connection = rusqlite::Connection::open(path)?;
    for (name, value) in
        [("journal_mode", "WAL"), ("synchronous", "FULL"), ("cache_size", "-65536"), ("wal_autocheckpoint", "16384")]
    {
        connection.pragma_update(None, name, value)?;
    }
    connection.execute_batch(
        "CREATE TABLE pack (id BLOB PRIMARY KEY, length INTEGER, state TEXT, created_us INTEGER) STRICT, WITHOUT ROWID;
        CREATE TABLE chunk (id BLOB PRIMARY KEY, pack BLOB, position INTEGER, stored INTEGER, length INTEGER,
            kind INTEGER, touched_us INTEGER) STRICT, WITHOUT ROWID;",
    )?;
    let mut all: Vec<(u32, Vec<Entry>)> = (0..PACKS).map(|number| (number, entries(number))).collect();
    for (_, entries) in &mut all {
        entries.sort_by_key(|entry| entry.id);
    }
    let begun = Instant::now();
    for group in all.chunks(CALLERS as usize) {
        let transaction = connection.transaction()?;
        {
            let mut pack = transaction.prepare_cached("INSERT INTO pack VALUES (?1, ?2, 'live', ?3)")?;
            let mut chunk = transaction.prepare_cached("INSERT INTO chunk VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
            for (number, entries) in group {
                pack.execute((pack_id(*number).0, 4 << 20, NOW_US))?;
                for entry in entries {
                    let place = entry.place;
                    let row = (entry.id.0, place.pack.0, place.offset, place.stored, place.length, entry.kind, NOW_US);
                    chunk.execute(row)?;
                }
            }
        }
        transaction.commit()?;
    }
    Ok(rate(begun))
}
