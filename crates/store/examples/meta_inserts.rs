//! How many chunks the catalog takes in a second, in durable groups, beside SQLite alone with the same rows and groups.
//!
//! `cargo run --release -p burgeon-store --example meta_inserts [CHUNKS] [CALLERS] [ADDRESS]`; medians of five runs. With
//! the address of an empty PostgreSQL database it measures that instead, once.
#![allow(clippy::print_stdout, reason = "it prints what it measured")]

use std::{error::Error, path::Path, thread, time::Instant};

use burgeon_store::{
    ChunkId, PackId, Place,
    catalog::{Catalog, Entry},
    sql::Address,
};

const CHUNKS_OF_A_PACK: u32 = 250;
const RUNS: usize = 5;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u32| arguments.next().map_or(Ok(default), |text| text.parse());
    let (chunks, callers) = (number(500_000)?, number(16)?.max(1));
    let packs = chunks / CHUNKS_OF_A_PACK / callers * callers;
    if let Some(address) = arguments.next() {
        println!("{:.0} chunks/s", through_catalog(address.parse::<Address>()?, packs, callers)?);
        return Ok(());
    }
    println!("{packs} packs of {CHUNKS_OF_A_PACK} chunks, {callers} callers, each of whom waits for the disk");
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for run in 1..=RUNS {
        let directory = tempfile::tempdir()?;
        ours.push(through_catalog(Address::from(directory.path().join("ours.db").as_path()), packs, callers)?);
        bare.push(through_sqlite(&directory.path().join("bare.db"), packs, callers)?);
        println!("run {run}: catalog {:.0}, SQLite alone {:.0} chunks/s", ours[run - 1], bare[run - 1]);
    }
    let (ours, bare) = (median(ours), median(bare));
    println!("median: catalog {ours:.0}, SQLite alone {bare:.0} chunks/s, ratio {:.2}", ours / bare);
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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

/// The ids are hashed before the clock starts: that is the work of those who cut chunks.
fn prepared(packs: u32) -> Vec<Vec<Entry>> {
    (0..packs).map(entries).collect()
}

fn rate(packs: u32, started: Instant) -> f64 {
    f64::from(packs * CHUNKS_OF_A_PACK) / started.elapsed().as_secs_f64()
}

fn through_catalog(address: Address, packs: u32, callers: u32) -> Outcome<f64> {
    let catalog = Catalog::open(address)?;
    let mut work: Vec<Vec<(u32, Vec<Entry>)>> = (0..callers).map(|_| Vec::new()).collect();
    for ((number, entries), caller) in (0..).zip(prepared(packs)).zip((0..work.len()).cycle()) {
        work[caller].push((number, entries));
    }
    let started = Instant::now();
    let callers: Vec<_> = work
        .into_iter()
        .map(|packs| {
            let catalog = catalog.clone();
            thread::spawn(move || {
                for (number, entries) in packs {
                    catalog.blocking_add_pack(pack_id(number), 4 << 20, 1_790_000_000_000_000, entries)?;
                }
                Ok::<(), burgeon_api::Error>(())
            })
        })
        .collect();
    for caller in callers {
        caller.join().map_err(|_| "a caller ended early")??;
    }
    Ok(rate(packs, started))
}

/// The same rows, with the same settings, as many packs in a commit as there are callers.
fn through_sqlite(path: &Path, packs: u32, callers: u32) -> Outcome<f64> {
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
    let mut all = prepared(packs);
    for entries in &mut all {
        entries.sort_by_key(|entry| entry.id);
    }
    let now_us = 1_790_000_000_000_000u64;
    let started = Instant::now();
    for (numbers, group) in (0u32..).step_by(callers as usize).zip(all.chunks(callers as usize)) {
        let transaction = connection.transaction()?;
        {
            let mut pack = transaction.prepare_cached("INSERT INTO pack VALUES (?1, ?2, 'live', ?3)")?;
            let mut chunk = transaction.prepare_cached("INSERT INTO chunk VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
            for (number, entries) in (numbers..).zip(group) {
                pack.execute((pack_id(number).0, 4 << 20, now_us))?;
                for entry in entries {
                    let place = entry.place;
                    let row = (entry.id.0, place.pack.0, place.offset, place.stored, place.length, entry.kind, now_us);
                    chunk.execute(row)?;
                }
            }
        }
        transaction.commit()?;
    }
    Ok(rate(packs, started))
}
