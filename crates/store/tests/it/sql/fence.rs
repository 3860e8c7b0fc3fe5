//! Sweeps and roots that do not know of each other: by hand, step by step, and by lot. Nothing here lies within a grace.

use std::{
    collections::{HashMap, HashSet},
    hash::BuildHasher,
    sync::Mutex,
    thread,
};

use burgeon_api::ErrorKind;
use burgeon_store::{
    ChunkId,
    catalog::{Catalog, NewRoot},
};

use super::{
    Home,
    catalog::{chunk, entries, pack, root, sweep},
    on_both_engines,
};

/// A sweep with this deletes whatever nothing else protects.
const NO_GRACE: u64 = 1 << 60;

on_both_engines! {
    a_root_that_a_sweep_came_before_is_not_set,
    a_sweep_that_a_root_came_before_is_refused,
    a_shared_root_needs_no_second_look,
    a_damaged_copy_that_is_let_go_of_counts_as_deleted,
    roots_and_sweeps_by_lot,
}

/// Runs what waits, outside the test's own runtime.
fn waiting<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join().unwrap())
}

async fn a_root_that_a_sweep_came_before_is_not_set(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 9_000, 10, entries(pack(1), 0..4)).await.unwrap();
    waiting(|| {
        let before = catalog.blocking_removals().unwrap();
        catalog.blocking_verify_claims(vec![chunk(0), chunk(1)], 20).unwrap();
        assert_eq!(sweep(&catalog, vec![chunk(1)], NO_GRACE), [chunk(1)]);
        let set = catalog.blocking_set_root_since(root("web", None, chunk(0)), before, 20).unwrap();
        assert!(!set, "what it relies on has to be looked at again");
        assert_eq!(catalog.blocking_roots(None).unwrap(), []);
        let before = catalog.blocking_removals().unwrap();
        let gone = catalog.blocking_verify_claims(vec![chunk(0), chunk(1)], 20).unwrap_err();
        assert_eq!(gone.kind, ErrorKind::Conflict);
        catalog.blocking_verify_claims(vec![chunk(0), chunk(2)], 20).unwrap();
        assert_eq!(sweep(&catalog, vec![chunk(9)], NO_GRACE), [], "nothing was deleted");
        assert_eq!(sweep(&catalog, vec![chunk(3)], 1), [], "nor here");
        assert!(catalog.blocking_set_root_since(root("web", None, chunk(0)), before, 20).unwrap());
        // The same request again, as after a lost answer.
        assert!(catalog.blocking_set_root_since(root("web", None, chunk(0)), before, 20).unwrap());
    });
}

async fn a_sweep_that_a_root_came_before_is_refused(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 9_000, 10, entries(pack(1), 0..4)).await.unwrap();
    waiting(|| {
        let (roots, seen) = catalog.blocking_see_roots().unwrap();
        assert_eq!(roots, []);
        let before = catalog.blocking_removals().unwrap();
        assert!(catalog.blocking_set_root_since(root("web", None, chunk(0)), before, 20).unwrap());
        assert_eq!(catalog.blocking_sweep(vec![chunk(0), chunk(1)], NO_GRACE, seen).unwrap(), None);
        assert!(catalog.blocking_places(vec![chunk(1)]).unwrap()[0].is_some());
        let (roots, seen) = catalog.blocking_see_roots().unwrap();
        assert_eq!(roots.len(), 1);
        // One that goes makes no difference.
        catalog.blocking_remove_root("image", "web", None).unwrap();
        let swept = catalog.blocking_sweep(vec![chunk(1)], NO_GRACE, seen).unwrap();
        assert_eq!(swept, Some(vec![chunk(1)]));
        // Nor does a request that is refused.
        catalog.blocking_set_root(root("web", None, chunk(1)), 20).unwrap_err();
        assert_eq!(catalog.blocking_sweep(vec![chunk(2)], NO_GRACE, seen).unwrap(), Some(vec![chunk(2)]));
        // A root that is set in one go counts as well.
        catalog.blocking_set_root(root("web", None, chunk(0)), 20).unwrap();
        assert_eq!(catalog.blocking_sweep(vec![chunk(3)], NO_GRACE, seen).unwrap(), None);
    });
}

async fn a_shared_root_needs_no_second_look(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 9_000, 10, entries(pack(1), 0..4)).await.unwrap();
    waiting(|| {
        catalog.blocking_set_root(root("web", None, chunk(0)), 20).unwrap();
        let (_, seen) = catalog.blocking_see_roots().unwrap();
        let disk = NewRoot { kind: "disk".into(), ..root("vm", None, chunk(0)) };
        catalog.blocking_share_root(disk, 20).unwrap();
        assert_eq!(catalog.blocking_sweep(vec![chunk(3)], NO_GRACE, seen).unwrap(), Some(vec![chunk(3)]));
    });
}

async fn a_damaged_copy_that_is_let_go_of_counts_as_deleted(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 9_000, 10, entries(pack(1), 0..4)).await.unwrap();
    waiting(|| {
        let place = catalog.blocking_places(vec![chunk(1)]).unwrap()[0].unwrap();
        let before = catalog.blocking_removals().unwrap();
        catalog.blocking_verify_claims(vec![chunk(0), chunk(1)], 20).unwrap();
        let elsewhere = burgeon_store::Place { offset: place.offset + 1, ..place };
        assert_eq!(catalog.blocking_let_go_of_copies(vec![(chunk(1), elsewhere)]).unwrap(), 0);
        assert_eq!(catalog.blocking_let_go_of_copies(vec![(chunk(1), place)]).unwrap(), 1);
        assert_eq!(catalog.blocking_let_go_of_copies(vec![(chunk(1), place)]).unwrap(), 0);
        assert!(!catalog.blocking_set_root_since(root("web", None, chunk(0)), before, 20).unwrap());
    });
}

/// Writers set and remove roots over chunks of a small pool while collections delete whatever they have not marked.
/// Time stands still, and there is no grace: only the fence is left. Of every root, all chunks are there, always.
async fn roots_and_sweeps_by_lot(home: Home) {
    const POOL: u32 = 24;
    /// Each writer's at least; it goes on until every outcome was met, since the lot promises none in a given number.
    const ROUNDS: u32 = 60;
    const MOST_ROUNDS: u32 = 20_000;
    const OUTCOMES: [&str; 4] = ["set", "swept", "sweep refused", "looked again"];
    let random = std::collections::hash_map::RandomState::new();
    let lot = |what: (u32, u32, u32), below: u32| u32::try_from(random.hash_one(what) % u64::from(below)).unwrap();
    // What the chunk of a map leads to; maps are never changed, so that whoever knows one reads it right.
    let maps: Mutex<HashMap<ChunkId, Vec<ChunkId>>> = Mutex::default();
    let counts: Mutex<HashMap<&str, u32>> = Mutex::default();
    let count = |what| *counts.lock().unwrap().entry(what).or_default() += 1;
    let met_all = || {
        let counts = counts.lock().unwrap();
        OUTCOMES.iter().all(|what| counts.contains_key(what))
    };
    let write = |writer: u32| {
        let catalog = Catalog::open(&home.address).unwrap();
        let mut number = writer * 1_000_000_000;
        let mut own: HashMap<String, Vec<ChunkId>> = HashMap::new();
        for round in 0..MOST_ROUNDS {
            if round >= ROUNDS && met_all() {
                break;
            }
            let name = format!("{writer}-{}", lot((writer, round, 0), 3));
            // As long as a root is there, and nobody else removes this writer's, so are its chunks.
            if let Some(kept) = own.remove(&name) {
                assert!(catalog.blocking_places(kept).unwrap().iter().all(Option::is_some), "{name} misses chunks");
            }
            catalog.blocking_remove_root("image", &name, None).unwrap();
            let map = 1_000 + writer * MOST_ROUNDS + round;
            let mut needs: Vec<u32> = (1..5).map(|index| lot((writer, round, index), POOL)).collect();
            needs.push(map);
            let ids: Vec<ChunkId> = needs.iter().map(|number| chunk(*number)).collect();
            maps.lock().unwrap().insert(chunk(map), ids.clone());
            // Whoever finds a chunk gone begins again.
            loop {
                let places = catalog.blocking_claim(ids.clone(), 10).unwrap();
                let absent: HashSet<u32> =
                    needs.iter().zip(&places).filter(|(_, place)| place.is_none()).map(|(number, _)| *number).collect();
                number += 1;
                let id = pack(number);
                catalog.blocking_add_pack(id, 9_000, 10, entries(id, absent)).unwrap();
                let before = catalog.blocking_removals().unwrap();
                if catalog.blocking_verify_claims(ids.clone(), 10).is_err() {
                    count("a chunk was gone");
                } else if catalog.blocking_set_root_since(root(&name, None, chunk(map)), before, 10).unwrap() {
                    count("set");
                    own.insert(name, ids);
                    break;
                } else {
                    count("looked again");
                }
            }
        }
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let collect = || {
        let catalog = Catalog::open(&home.address).unwrap();
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            let (roots, seen) = catalog.blocking_see_roots().unwrap();
            let known = maps.lock().unwrap().clone();
            let marked: HashSet<ChunkId> = roots.iter().flat_map(|root| known[&root.map].clone()).collect();
            let all = catalog.blocking_chunks_after(None, 100_000).unwrap();
            let unmarked = all.iter().map(|chunk| chunk.id).filter(|id| !marked.contains(id)).collect();
            match catalog.blocking_sweep(unmarked, NO_GRACE, seen).unwrap() {
                Some(deleted) if !deleted.is_empty() => count("swept"),
                Some(_) => {}
                None => count("sweep refused"),
            }
        }
    };
    waiting(|| {
        thread::scope(|scope| {
            let collectors = [scope.spawn(collect), scope.spawn(collect)];
            let writers: Vec<_> = [0, 1].into_iter().map(|writer| scope.spawn(move || write(writer))).collect();
            let outcomes: Vec<_> = writers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            for outcome in outcomes.into_iter().chain(collectors.map(thread::ScopedJoinHandle::join)) {
                outcome.unwrap();
            }
        });
        let catalog = Catalog::open(&home.address).unwrap();
        let maps = maps.lock().unwrap();
        for root in catalog.blocking_roots(None).unwrap() {
            let places = catalog.blocking_places(maps[&root.map].clone()).unwrap();
            assert!(places.iter().all(Option::is_some), "{} misses chunks", root.name);
        }
    });
    let counts = counts.into_inner().unwrap();
    println!("{counts:?}");
    for what in OUTCOMES {
        assert!(counts.get(what).copied().unwrap_or_default() > 0, "never: {what}, of {counts:?}");
    }
}
