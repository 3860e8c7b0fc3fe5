//! What nobody else deletes: small packs, roots whose time is over, caches.

use std::path::PathBuf;

use super::{
    collect::{FUTURE, GRACE, PAST, assert_sound, open_at, pack_files, remove, run},
    *,
};
use crate::disk::{Base, ImageBase};

fn small(store: &ChunkStore, count: u64) -> Vec<(Map, Vec<u8>)> {
    (0..count)
        .map(|number| {
            let bytes = noise(100 + number, 150_000);
            let (map, _) = store_bytes(store, &format!("small-{number}"), &bytes, Cutter::Fixed64K, None);
            (map, bytes)
        })
        .collect()
}

#[test]
fn many_small_packs_are_joined_and_a_few_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    let mut images = small(&store, 7);
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    assert_eq!((run(&store).packs_joined, pack_files(directory.path()).len()), (0, 7));

    // One more makes many; a damaged one stays where it is, and one that is young.
    let bytes = noise(200, 150_000);
    images.push((store_bytes(&store, "eighth", &bytes, Cutter::Fixed64K, None).0, bytes));
    let bytes = noise(201, 150_000);
    store_bytes(&store, "damaged", &bytes, Cutter::Fixed64K, None);
    let place = store.catalog.blocking_places(vec![ChunkId::of(&bytes[..65_536])]).unwrap()[0].unwrap();
    let damaged = store.describe(place.pack);
    let mut content = std::fs::read(&damaged).unwrap();
    content[usize::try_from(place.offset).unwrap() + RECORD_HEADER_BYTES] ^= 1;
    std::fs::write(&damaged, content).unwrap();
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    let young = noise(202, 150_000);
    let young = (store_bytes(&store, "young", &young, Cutter::Fixed64K, None).0, young);
    let report = run(&store);
    assert_eq!((report.packs_joined, report.packs_repacked, report.packs_dropped), (8, 0, 0), "{report:?}");
    assert_eq!(report.problems.len(), 1, "{report:?}");
    assert_eq!(pack_files(directory.path()).len(), 3);
    assert!(damaged.exists());
    remove(&store, "damaged");
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    run(&store);
    assert_sound(&store);
    let store = open_at(directory.path(), &clock);
    for (map, bytes) in images.into_iter().chain([young]) {
        assert!(read_back(&store, map, bytes.len()) == bytes);
    }
    let before = pack_files(directory.path());
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    assert_eq!(run(&store).packs_joined, 0);
    assert_eq!(pack_files(directory.path()), before, "what was joined is not written again and again");
}

#[test]
fn a_joining_that_dies_at_any_step_is_finished_by_the_next() {
    for step in 0.. {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(AtomicU64::new(FUTURE));
        let store = open_at(directory.path(), &clock);
        let images = small(&store, 8);
        clock.fetch_add(2 * GRACE, Ordering::Relaxed);
        let mut steps = 0;
        let died = collect(&store, GRACE, &mut |_, _, _| {
            steps += 1;
            if steps > step { Err(Error::internal("killed")) } else { Ok(()) }
        });
        drop(store);
        let store = open_at(directory.path(), &clock);
        assert_sound(&store);
        for _ in 0..2 {
            clock.fetch_add(2 * GRACE, Ordering::Relaxed);
            run(&store);
        }
        assert_sound(&store);
        for (map, bytes) in &images {
            assert!(read_back(&store, *map, bytes.len()) == *bytes);
        }
        assert_eq!((pack_files(directory.path()).len(), store.catalog.blocking_packs().unwrap().len()), (1, 1));
        if died.is_ok() {
            assert!(step > 15, "{step} steps");
            return;
        }
    }
}

#[test]
fn a_root_whose_time_is_over_keeps_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    let bytes = noise(1, 200_000);
    let mut writer = Writer::new(&store);
    let map = ingest(&store, &mut writer, &bytes[..], Cutter::Fixed64K, None, &mut |_| {}).unwrap().map;
    let expires_us = Some(FUTURE + 3 * GRACE);
    writer.finish(NewRoot { expires_us, ..root("for a while", map.root()) }).unwrap();
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    let report = run(&store);
    assert_eq!((report.roots_expired, report.roots, report.chunks_deleted), (0, 1, 0));
    clock.fetch_add(GRACE, Ordering::Relaxed);
    let report = run(&store);
    assert_eq!((report.roots_expired, report.roots, report.packs_dropped), (1, 0, 1), "{report:?}");
    assert!(report.chunks_deleted > 3);
}

fn files(cache: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(cache).unwrap().map(|file| file.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension != "lock"));
    found.sort();
    found
}

#[test]
fn a_cache_goes_when_no_root_names_its_map_and_who_reads_it_notices_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    let drop_caches = |store: &ChunkStore| {
        let mut report = burgeon_api::store::Collected::default();
        read_cache::drop_caches(store, &cache, GRACE, &mut |_, _, _| Ok(()), &mut report).unwrap();
        (report.caches_removed, report.cache_bytes_freed)
    };
    assert_eq!(drop_caches(&store), (0, 0), "there is no cache at all");

    let (bytes, other) = (noise(1, 200_704), noise(2, 200_704));
    let (map, _) = store_bytes(&store, "one", &bytes, Cutter::Fixed64K, None);
    let (kept, _) = store_bytes(&store, "kept", &other, Cutter::Fixed64K, None);
    let held = read_cache::hold(&cache).unwrap();
    let open =
        |map: Map| ImageBase::open(store.clone(), map.root(), &cache.join(map.root().to_string()), None).unwrap();
    let (base, other_base) = (open(map), open(kept));
    drop(held);
    let mut read = vec![0; 100_000];
    base.read(0, &mut read).unwrap();
    assert!(read == bytes[..100_000]);
    other_base.read(0, &mut read).unwrap();
    std::fs::write(cache.join(format!("{}.trace", map.root())), "{}").unwrap();
    std::fs::write(cache.join("notes.data"), "not ours").unwrap();
    assert_eq!(files(&cache).len(), 6);
    assert_eq!(drop_caches(&store), (0, 0), "roots name both");
    remove(&store, "one");
    let early = open_at(directory.path(), &Arc::new(AtomicU64::new(PAST)));
    assert_eq!(drop_caches(&early), (0, 0), "it was written to within the grace");
    let (removed, freed) = drop_caches(&store);
    assert!(removed == 1 && freed >= 100_000, "{removed} {freed}");
    assert_eq!(files(&cache).len(), 3);

    // Who has it open goes on; who opens it anew, because the image came back, begins with nothing.
    store_bytes(&store, "again", &bytes, Cutter::Fixed64K, None);
    let again = open(map);
    for base in [&base, &again, &base] {
        let mut read = vec![0; bytes.len()];
        base.read(0, &mut read).unwrap();
        assert!(read == bytes);
    }
    assert_eq!(again.fetched_bytes(), 200_704, "nothing of the old files was believed");
}
