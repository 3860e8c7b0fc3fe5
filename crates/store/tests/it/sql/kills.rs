//! What was acknowledged is there after a kill, of the writer or of the server.

use std::{
    hash::BuildHasher,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use burgeon_api::ErrorKind;
use burgeon_store::{PackId, catalog::Catalog, sql::Address};

use super::{
    Home,
    catalog::{chunk, entries, pack},
    server::{Server, shared},
};

const ADDRESS: &str = "BURGEON_TEST_CHILD_ADDRESS";
const FIRST: &str = "BURGEON_TEST_CHILD_FIRST";
const WRITERS: u32 = 4;
const CHUNKS: u32 = 20;

/// Adds a pack; its chunks are numbered by it.
fn add(catalog: &Catalog, number: u32) -> burgeon_api::Result<()> {
    let own = number * CHUNKS..(number + 1) * CHUNKS;
    catalog.blocking_add_pack(pack(number), 20_000, 10, entries(pack(number), own)).map(drop)
}

/// Not a test of its own: what the others start, and kill.
#[test]
fn child() {
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let first: u32 = std::env::var(FIRST).unwrap().parse().unwrap();
    let catalog = Catalog::open(address.parse::<Address>().unwrap()).unwrap();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let catalog = &catalog;
            scope.spawn(move || {
                for number in (first + writer..).step_by(WRITERS as usize) {
                    add(catalog, number).unwrap();
                    println!("acknowledged {number}");
                }
            });
        }
    });
}

/// Every acknowledged pack is there, and every pack that is there has all of its chunks.
fn check(address: &Address, acknowledged: &[u32]) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let catalog = Catalog::open(address).unwrap();
    let packs: Vec<PackId> = runtime.block_on(catalog.packs()).unwrap().into_iter().map(|(id, ..)| id).collect();
    for number in acknowledged {
        assert!(packs.contains(&pack(*number)), "acknowledged pack {number} is lost");
    }
    for id in packs {
        let number = u32::from_be_bytes(id.0[..4].try_into().unwrap());
        let ids = (number * CHUNKS..(number + 1) * CHUNKS).map(chunk).collect();
        let places = catalog.blocking_places(ids).unwrap();
        assert!(
            places.iter().all(|place| place.is_some_and(|place| place.pack == id)),
            "pack {number} is there by half"
        );
    }
}

fn kill_writers(address: &Address, text: &str) {
    let random = std::collections::hash_map::RandomState::new();
    let mut acknowledged = Vec::new();
    for round in 0..8u32 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["sql::kills::child", "--exact", "--nocapture", "--test-threads=1"])
            .env(ADDRESS, text)
            .env(FIRST, (round * 100_000).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let enough = random.hash_one(round) % 200;
        let mut seen = 0;
        let mut read = |line: &str| {
            // The harness writes the test's name without a line's end before the first one.
            if let Some((_, number)) = line.split_once("acknowledged ") {
                acknowledged.push(number.parse::<u32>().unwrap());
                seen += 1;
            }
            seen
        };
        while read(&lines.next().expect("the child ended by itself").unwrap()) <= enough {}
        thread::sleep(Duration::from_micros(random.hash_one(round + 1000) % 3000));
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died counts too; the last line may be cut.
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        for line in rest.iter().take(rest.len().saturating_sub(1)) {
            read(line);
        }
    }
    check(address, &acknowledged);
}

#[test]
fn a_killed_writer_loses_nothing_on_sqlite() {
    let home = Home::sqlite();
    let Address::Sqlite(path) = &home.address else { unreachable!() };
    kill_writers(&home.address, &format!("sqlite:{}", path.display()));
}

#[test]
fn a_killed_writer_loses_nothing_on_postgres() {
    let (name, address) = shared().new_named_database();
    kill_writers(&address, &shared().text(&name));
}

#[test]
fn a_crashed_server_loses_nothing() {
    let mut server = Server::new();
    let address = server.new_database();
    let catalog = Catalog::open(&address).unwrap();
    let acknowledged = Mutex::new(Vec::new());
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (catalog, acknowledged, done) = (&catalog, &acknowledged, &done);
            scope.spawn(move || {
                for number in (writer..).step_by(WRITERS as usize) {
                    if done.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    // Every request may be repeated, whatever became of it.
                    while let Err(error) = add(catalog, number) {
                        assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
                    }
                    acknowledged.lock().unwrap_or_else(PoisonError::into_inner).push(number);
                }
            });
        }
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(300));
            server.stop();
            server.start();
        }
        thread::sleep(Duration::from_millis(300));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let acknowledged = acknowledged.into_inner().unwrap();
    assert!(acknowledged.len() > 20);
    check(&address, &acknowledged);
}
