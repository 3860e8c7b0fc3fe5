//! Collections, and the checks of what they leave.

use std::{path::PathBuf, sync::Condvar, thread};

use super::*;
use crate::{catalog::PackState, map::chunks, testing::Seeded};

pub(super) const GRACE: u64 = GRACE_US;
/// Later than the time of any file that a test makes.
pub(super) const FUTURE: u64 = 4_000_000_000_000_000;
/// Earlier.
pub(super) const PAST: u64 = 1_000_000_000_000;

pub(super) fn open_at(directory: &Path, clock: &Arc<AtomicU64>) -> Arc<ChunkStore> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let clock = clock.clone();
    let source = Source {
        now_us: Arc::new(move || clock.load(Ordering::Relaxed)),
        uuid: Arc::new(|| u128::from(NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes()),
    };
    ChunkStore::open(directory, source).unwrap()
}

pub(super) fn run(store: &ChunkStore) -> burgeon_api::store::Collected {
    collect(store, GRACE, &mut |_, _, _| Ok(())).unwrap()
}

pub(super) fn assert_sound(store: &ChunkStore) {
    for checked in [fsck(store, &mut |_, _, _| Ok(())).unwrap(), scrub(store, false, &mut |_, _, _| Ok(())).unwrap()] {
        assert!(checked.problems.is_empty(), "{checked:?}");
    }
}

pub(super) fn pack_files(directory: &Path) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(directory.join("packs")).unwrap().flatten();
    folders.flat_map(|folder| std::fs::read_dir(folder.path()).unwrap().flatten()).map(|file| file.path()).collect()
}

pub(super) fn remove(store: &ChunkStore, name: &str) {
    assert!(store.catalog.blocking_remove_root("image", name, None).unwrap());
}

/// Every chunk of a map, past what is in memory.
fn read_all(store: &ChunkStore, map: ChunkId) {
    let mut all = Vec::new();
    let mut visit = |_, id| {
        all.push(id);
        Ok(true)
    };
    chunks(store, map, &mut visit).unwrap();
    store.get_many(&all).unwrap();
}

/// Two images, of which the second has a part of the first and something of its own; then the first is removed.
fn two(store: &ChunkStore) -> (Map, Vec<u8>, Map) {
    let first = noise(1, 2 << 20);
    let second = [&first[..256 << 10], &noise(2, 512 << 10)].concat();
    let (old, _) = store_bytes(store, "first", &first, Cutter::Fixed64K, None);
    let (map, written) = store_bytes(store, "second", &second, Cutter::Fixed64K, None);
    assert!(written.new_bytes < 600_000, "{written:?}");
    remove(store, "first");
    (map, second, old)
}

#[test]
fn what_roots_lead_to_stays_and_the_rest_goes_after_its_grace() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    let (map, bytes, _) = two(&store);
    store_bytes(&store, "third", &noise(3, 1 << 20), Cutter::Fixed64K, None);
    remove(&store, "third");
    clock.fetch_add(GRACE, Ordering::Relaxed);
    assert_eq!(run(&store).chunks_deleted, 0, "the grace is not over");

    clock.fetch_add(1, Ordering::Relaxed);
    let shared = *store
        .catalog
        .blocking_chunks_after(None, 1000)
        .unwrap()
        .iter()
        .find(|chunk| {
            let (first, ..) = &map.lookup(&*store, 0..512).unwrap()[0].source.unwrap();
            chunk.id == *first
        })
        .unwrap();
    let reader = open_at(directory.path(), &clock);
    let report = run(&store);
    // Data of the first but its first four blocks, all of the third, and the nodes of both.
    assert_eq!(
        (report.roots, report.chunks_deleted, report.packs_dropped, report.packs_repacked),
        (1, 28 + 16 + 4, 1, 1)
    );
    assert!(report.bytes_freed > 2_500_000 && report.problems.is_empty(), "{report:?}");
    assert_eq!(pack_files(directory.path()).len(), 2);
    assert_sound(&store);
    assert!(read_back(&open_at(directory.path(), &clock), map, bytes.len()) == bytes);

    // A reader that looked the place up before the pack was written anew, and opens it only now.
    let stale = reader.read_or_look_again(shared.id, shared.place).unwrap();
    assert!(stale == bytes[..64 << 10]);
    let moved = store.catalog.blocking_places(vec![shared.id]).unwrap()[0].unwrap();
    assert_ne!(moved.pack, shared.place.pack);

    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    let again = run(&store);
    assert_eq!((again.chunks_deleted, again.packs_dropped, again.packs_repacked, again.bytes_freed), (0, 0, 0, 0));
}

#[test]
fn a_map_that_cannot_be_read_stops_a_collection_before_anything_is_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    two(&store);
    let (bad, _) = store_bytes(&store, "bad", &noise(4, 100_000), Cutter::Fixed64K, None);
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    let place = store.catalog.blocking_places(vec![bad.root()]).unwrap()[0].unwrap();
    let path = store.describe(place.pack);
    let mut content = std::fs::read(&path).unwrap();
    content[usize::try_from(place.offset).unwrap() + 70] ^= 1;
    std::fs::write(&path, &content).unwrap();

    let store = open_at(directory.path(), &clock);
    let before = store.catalog.blocking_chunks_after(None, 1000).unwrap();
    let error = collect(&store, GRACE, &mut |_, _, _| Ok(())).unwrap_err();
    assert!(error.message.contains("the image \"bad\""), "{error}");
    assert_eq!(store.catalog.blocking_chunks_after(None, 1000).unwrap(), before);
    let checked = fsck(&store, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(checked.problems.len(), 1, "{checked:?}");
    assert_eq!(checked.problems[0].place, "image bad");
    let checked = scrub(&store, false, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(checked.problems.len(), 1, "{checked:?}");
    assert_eq!(checked.problems[0].place, format!("{} at byte {}", path.display(), place.offset));

    // A broken index hides no record, and a missing pack is told once by the one and with its root by the other.
    let end = content.len() - 1;
    content[end] ^= 1;
    std::fs::write(&path, &content).unwrap();
    let checked = scrub(&store, false, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(checked.problems.len(), 2, "{checked:?}");
    std::fs::remove_file(&path).unwrap();
    let store = open_at(directory.path(), &clock);
    assert_eq!(scrub(&store, false, &mut |_, _, _| Ok(())).unwrap().problems.len(), 1);
    let checked = fsck(&store, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(checked.problems.len(), 2, "{checked:?}");
    assert!(collect(&store, GRACE, &mut |_, _, _| Ok(())).is_err());
    // Without the root there is nothing to keep.
    remove(&store, "bad");
    run(&store);
    assert_sound(&store);
}

#[test]
fn data_with_the_bytes_of_a_node_hides_nothing_below_the_node() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    let bytes = noise(5, 300_000);
    let (map, _) = store_bytes(&store, "z", &bytes, Cutter::Fixed64K, None);
    // An image that comes first, with the chunks of the other's nodes as data.
    let mut nodes = Vec::new();
    chunks(&*store, map.root(), &mut |kind, id| {
        if kind == crate::chunk::Kind::MapNode {
            nodes.push(id);
        }
        Ok(true)
    })
    .unwrap();
    let mut writer = Writer::new(&store);
    let mut edit = Map::empty(1 << 20).unwrap().edit();
    for (index, id) in nodes.iter().enumerate() {
        let node = store.get(*id).unwrap();
        let start = index as u64 * 65536;
        edit.set(start..start + node.len() as u64, *id, 0).unwrap();
        writer.put(node.to_vec()).unwrap();
    }
    let copy = edit.finish(&*store, &mut writer).unwrap();
    writer.finish(root("a", copy.root())).unwrap();
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    assert_eq!(run(&store).chunks_deleted, 0);
    assert!(read_back(&open_at(directory.path(), &clock), map, bytes.len()) == bytes);
}

#[test]
fn what_dead_writers_left_goes_and_they_cannot_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(PAST));
    let store = open_at(directory.path(), &clock);
    let (map, ..) = two(&store);
    let pack = PackId([9; 16]);
    store.objects.put_new(&object_name(pack), b"a pack that was never added").unwrap();
    std::fs::write(directory.path().join("packs/.new-1-1"), "half").unwrap();
    std::fs::write(directory.path().join("packs/other"), "not ours").unwrap();
    assert_eq!(run(&store).files_removed, 0, "they are younger than the grace");
    clock.store(FUTURE, Ordering::Relaxed);
    assert_eq!(run(&store).files_removed, 2);
    assert!(!store.describe(pack).exists() && directory.path().join("packs/other").exists());
    let late = store.catalog.blocking_add_pack(pack, 27, FUTURE, Vec::new()).unwrap_err();
    assert_eq!(late.kind, ErrorKind::Conflict);
    assert!(store.catalog.blocking_packs().unwrap().contains(&(pack, 0, PackState::Dropping)));
    assert_sound(&store);
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    run(&store);
    assert!(!store.catalog.blocking_packs().unwrap().iter().any(|(id, ..)| *id == pack));
    let later = store.catalog.blocking_add_pack(pack, 27, FUTURE, Vec::new()).unwrap_err();
    assert_eq!(later.kind, ErrorKind::Conflict);
    read_all(&open_at(directory.path(), &clock), map.root());
}

#[test]
fn a_root_is_shared_only_while_another_keeps_its_map() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let store = open_at(directory.path(), &clock);
    let (map, _, old) = two(&store);
    let disk = |map: Map| NewRoot { kind: "disk".into(), ..root("vm", map.root()) };
    let gone = store.catalog.blocking_share_root(disk(old), FUTURE).unwrap_err();
    assert_eq!(gone.kind, ErrorKind::Conflict);
    store.catalog.blocking_share_root(disk(map), FUTURE).unwrap();
    remove(&store, "second");
    store.catalog.blocking_share_root(disk(map), FUTURE).unwrap();
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    run(&store);
    read_all(&open_at(directory.path(), &clock), map.root());
}

#[test]
fn a_collection_that_dies_at_any_step_is_finished_by_the_next() {
    for step in 0.. {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(AtomicU64::new(FUTURE));
        let store = open_at(directory.path(), &clock);
        let (map, bytes, _) = two(&store);
        store_bytes(&store, "third", &noise(3, 100_000), Cutter::Fixed64K, None);
        remove(&store, "third");
        store.objects.put_new(&object_name(PackId([9; 16])), b"left").unwrap();
        clock.fetch_add(2 * GRACE, Ordering::Relaxed);
        let mut steps = 0;
        let died = collect(&store, GRACE, &mut |_, _, _| {
            steps += 1;
            if steps > step { Err(Error::internal("killed")) } else { Ok(()) }
        });
        drop(store);
        let store = open_at(directory.path(), &clock);
        assert_sound(&store);
        assert!(read_back(&store, map, bytes.len()) == bytes);
        for _ in 0..2 {
            clock.fetch_add(2 * GRACE, Ordering::Relaxed);
            run(&store);
            assert_sound(&store);
        }
        assert!(read_back(&open_at(directory.path(), &clock), map, bytes.len()) == bytes);
        let rows = store.catalog.blocking_packs().unwrap();
        assert_eq!((rows.len(), pack_files(directory.path()).len()), (2, 2), "step {step}");
        if died.is_ok() {
            assert!(step > 15, "{step} steps");
            return;
        }
    }
}

/// Lets two threads go one step at a time, in an order drawn by lot.
struct Turns {
    state: Mutex<(Seeded, usize, [bool; 2])>,
    changed: Condvar,
}

impl Turns {
    fn pass(&self, me: usize) {
        let mut state = lock(&self.state);
        if !state.2[1 - me] {
            state.1 = state.0.below(2);
            self.changed.notify_all();
        }
        while state.1 != me && !state.2[1 - me] {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn leave(&self, me: usize) {
        lock(&self.state).2[me] = true;
        self.changed.notify_all();
    }
}

#[test]
fn a_writer_that_counts_on_what_is_about_to_be_deleted_loses_nothing() {
    // In memory where that can be had: a thousand rounds make many commits.
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let clock = Arc::new(AtomicU64::new(PAST));
    let store = open_at(directory.path(), &clock);
    let pool: Vec<Vec<u8>> = (0..12).map(|seed| noise(seed, 4096)).collect();
    let (mut deleted, mut stored_again, mut kept) = (0, 0, 0);
    let mut last: Option<String> = None;
    for round in 0..1000_u64 {
        if let Some(name) = last.take() {
            remove(&store, &name);
        }
        clock.fetch_add(2 * GRACE, Ordering::Relaxed);
        let mut seeded = Seeded::new(round);
        let wanted: Vec<usize> = (0..6).map(|_| seeded.below(pool.len())).collect();
        let name = format!("round-{round}");
        // One half goes by turns, the other as the machine has it.
        let turns = Turns { state: Mutex::new((seeded, 0, [round % 2 == 1; 2])), changed: Condvar::new() };
        let (map, written, report) = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut writer = Writer::new(&store);
                let mut edit = Map::empty(6 * 4096).unwrap().edit();
                for (index, number) in wanted.iter().enumerate() {
                    turns.pass(0);
                    writer.put(pool[*number].clone()).unwrap();
                    if index % 2 == 1 {
                        writer.flush().unwrap();
                    }
                    let start = index as u64 * 4096;
                    edit.set(start..start + 4096, ChunkId::of(&pool[*number]), 0).unwrap();
                }
                turns.pass(0);
                let map = edit.finish(&*store, &mut writer).unwrap();
                turns.pass(0);
                writer.flush().unwrap();
                turns.pass(0);
                let written = writer.finish(root(&name, map.root())).unwrap();
                turns.leave(0);
                (map, written)
            });
            let collector = scope.spawn(|| {
                let report = collect(&store, GRACE, &mut |_, _, _| {
                    turns.pass(1);
                    Ok(())
                });
                turns.leave(1);
                report.unwrap()
            });
            let (map, written) = writer.join().unwrap();
            (map, written, collector.join().unwrap())
        });
        deleted += report.chunks_deleted;
        stored_again += written.new_chunks;
        kept += written.chunks - written.new_chunks;
        assert!(report.problems.is_empty());
        let wanted: Vec<u8> = wanted.iter().flat_map(|number| pool[*number].clone()).collect();
        assert!(read_back(&store, map, wanted.len()) == wanted, "round {round}");
        read_all(&store, map.root());
        if round % 50 == 0 {
            assert_sound(&store);
        }
        last = Some(name);
    }
    println!("deleted {deleted}, stored again {stored_again}, kept {kept}");
    // Both happened, often.
    assert!(deleted > 500 && stored_again > 500 && kept > 500, "{deleted} {stored_again} {kept}");
    assert_sound(&open_at(directory.path(), &clock));
}

/// Clocks that are a century apart, and no grace: the writer may have to begin again, and still nothing is lost.
#[test]
fn no_clock_can_make_a_collection_delete_what_a_root_needs() {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let behind = open_at(directory.path(), &Arc::new(AtomicU64::new(PAST)));
    let ahead = open_at(directory.path(), &Arc::new(AtomicU64::new(FUTURE)));
    let pool: Vec<Vec<u8>> = (0..12).map(|seed| noise(seed, 4096)).collect();
    let (mut deleted, mut begun_again) = (0, 0);
    for round in 0..300_u64 {
        let mut seeded = Seeded::new(round);
        let wanted: Vec<u8> = (0..6).flat_map(|_| pool[seeded.below(pool.len())].clone()).collect();
        let turns = Turns { state: Mutex::new((seeded, 0, [round % 2 == 1; 2])), changed: Condvar::new() };
        let name = format!("round-{round}");
        let map = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let map = loop {
                    turns.pass(0);
                    let mut writer = Writer::new(&behind);
                    let ingested = ingest(&behind, &mut writer, &wanted[..], Cutter::Fixed64K, None, &mut |_| {});
                    turns.pass(0);
                    let finished = ingested
                        .and_then(|ingested| writer.finish(root(&name, ingested.map.root())).map(|_| ingested.map));
                    match finished {
                        Ok(map) => break map,
                        Err(error) => {
                            assert!(matches!(error.kind, ErrorKind::Conflict | ErrorKind::NotFound), "{error}");
                            begun_again += 1;
                        }
                    }
                };
                turns.leave(0);
                map
            });
            let collector = scope.spawn(|| {
                let report = collect(&ahead, 0, &mut |_, _, _| {
                    turns.pass(1);
                    Ok(())
                });
                turns.leave(1);
                deleted += report.unwrap().chunks_deleted;
            });
            collector.join().unwrap();
            writer.join().unwrap()
        });
        assert!(read_back(&open_at(directory.path(), &Arc::new(AtomicU64::new(PAST))), map, wanted.len()) == wanted);
        if round % 25 == 0 {
            assert_sound(&ahead);
        }
        remove(&behind, &name);
    }
    println!("deleted {deleted}, begun again {begun_again}");
    assert!(deleted > 100, "{deleted}");
    assert_sound(&ahead);
}
