//! Collections that die, as by kill -9, at each of their steps.

use std::{
    fs::{self, FileTimes},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use burgeon_api::store::Collected;
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    chunk_store::{ChunkStore, Source, Writer, collect, fsck, ingest, read_cache::drop_caches, scrub},
    cut::Cutter,
    map::Map,
    steps::{DIE_AT, Step},
};

const DIRECTORY: &str = "BURGEON_TEST_CHILD_DIRECTORY";

/// The steps of a collection, and of the writing before it those that no other test dies at.
const COLLECT: [Step; 8] = [
    Step::ChunksSwept,
    Step::PackDropping,
    Step::PackDeleted,
    Step::ObjectBeside,
    Step::PackJoined,
    Step::ChunksMoved,
    Step::PackCondemned,
    Step::CacheRemoved,
];

/// Those that the tests of the whole product die at.
const ELSEWHERE: [Step; 28] = [
    Step::Captured,
    Step::StateKept,
    Step::StateRecorded,
    Step::Spawned,
    Step::Claimed,
    Step::Handed,
    Step::Loaded,
    Step::Identified,
    Step::Thawed,
    Step::BundleStored,
    Step::TakenIn,
    Step::TakenInByHost,
    Step::SizeWritten,
    Step::SnapshotCaptured,
    Step::SnapshotKept,
    Step::RollbackWanted,
    Step::RollbackRecorded,
    Step::DisksRolledBack,
    Step::RolledBack,
    Step::PackWritten,
    Step::PackKnown,
    Step::RootSet,
    Step::DiskSealed,
    Step::LayerStored,
    Step::HandedOver,
    Step::HandoverReceived,
    Step::ImageKept,
    Step::ImagePublished,
];

/// Later than the time of any file.
const FILLED_US: u64 = 4_000_000_000_000_000;
/// And that is over.
const LATER_US: u64 = 2 * FILLED_US;

fn open(directory: &Path, now_us: u64) -> Arc<ChunkStore> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // No two processes give the same number.
    let process = u128::from(std::process::id()) << 64;
    let source = Source {
        now_us: Arc::new(move || now_us),
        uuid: Arc::new(move || (process + u128::from(NEXT.fetch_add(1, Ordering::Relaxed))).to_be_bytes()),
    };
    ChunkStore::open(directory, source).unwrap()
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length / 8).flat_map(|_| next()).collect()
}

fn put(store: &ChunkStore, name: &str, bytes: &[u8]) -> Map {
    let mut writer = Writer::new(store);
    let map = ingest(store, &mut writer, bytes, Cutter::Fixed64K, None, &mut |_| {}).unwrap().map;
    writer.finish(NewRoot::new("image", name.into(), map.root())).unwrap();
    map
}

fn remove(store: &ChunkStore, name: &str) {
    assert!(store.catalog().blocking_remove_root("image", name, None).unwrap());
}

/// What is to stay.
struct Kept {
    images: Vec<(Map, Vec<u8>)>,
}

/// A store with something for each step of a collection.
fn fill(directory: &Path) -> Kept {
    let store = open(directory, FILLED_US);
    // Small packs, enough of them to be joined; one that is sparse; and one that nothing needs.
    let mut images: Vec<(Map, Vec<u8>)> = (0..10)
        .map(|seed| {
            let bytes = noise(seed + 1, 128 << 10);
            (put(&store, &format!("small-{seed}"), &bytes), bytes)
        })
        .collect();
    let large = noise(50, 2 << 20);
    put(&store, "large", &large);
    let part = large[..256 << 10].to_vec();
    images.push((put(&store, "part", &part), part));
    put(&store, "gone", &noise(60, 1 << 20));
    remove(&store, "large");
    remove(&store, "gone");
    // What a writer left that died: a pack that the catalog does not know.
    let orphan = directory.join(format!("packs/ff/{}.pack", "f".repeat(32)));
    fs::create_dir_all(orphan.parent().unwrap()).unwrap();
    let old = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1));
    fs::File::create_new(&orphan).unwrap().set_times(old).unwrap();
    // A cache of a map that no root has.
    fs::create_dir_all(directory.join("cache")).unwrap();
    for extension in ["map", "data"] {
        fs::write(directory.join(format!("cache/{}.{extension}", ChunkId::of(b"none"))), "plain").unwrap();
    }
    Kept { images }
}

fn collect_all(directory: &Path, now_us: u64) -> Collected {
    let store = open(directory, now_us);
    let watch = &mut |_: &'static str, _, _| Ok(());
    let mut collected = collect(&store, 0, watch).unwrap();
    drop_caches(&store, &directory.join("cache"), 0, watch, &mut collected).unwrap();
    collected
}

fn assert_whole(directory: &Path, kept: &Kept, step: Step) {
    let store = open(directory, LATER_US);
    for (map, bytes) in &kept.images {
        let mut read = vec![0; bytes.len()];
        store.read_map(map, 0, &mut read).unwrap();
        assert!(read == *bytes, "{step:?}");
    }
    let watch = &mut |_: &'static str, _, _| Ok(());
    for checked in [fsck(&store, watch).unwrap(), scrub(&store, false, watch).unwrap()] {
        assert!(checked.problems.is_empty(), "{step:?}: {checked:?}");
    }
}

fn packs(directory: &Path) -> usize {
    let folders = fs::read_dir(directory.join("packs")).unwrap().flatten();
    folders.map(|folder| fs::read_dir(folder.path()).unwrap().count()).sum()
}

/// Not a test of its own: what the other starts, and what dies.
#[test]
fn child() {
    if let Ok(directory) = std::env::var(DIRECTORY) {
        collect_all(Path::new(&directory), LATER_US);
    }
}

#[test]
fn a_collection_that_dies_takes_nothing_that_is_kept() {
    for step in COLLECT {
        let directory = tempfile::tempdir().unwrap();
        let (store, die_at) = (directory.path().join("store"), directory.path().join("die-at"));
        let kept = fill(&store);
        fs::write(&die_at, format!("{step:?}")).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["deaths::child", "--exact", "--test-threads=1"])
            .env(DIRECTORY, &store)
            .env(DIE_AT, &die_at)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(!die_at.exists(), "{step:?} was never met");
        assert_eq!(status.signal(), Some(9), "{step:?}");
        assert_whole(&store, &kept, step);
        // What it has left by half goes with the next ones, and no more than that.
        for hour in 1..3 {
            collect_all(&store, LATER_US + hour * 3_600_000_000);
        }
        assert_whole(&store, &kept, step);
        assert_eq!(packs(&store), 1, "{step:?}");
        assert_eq!(fs::read_dir(store.join("cache")).unwrap().count(), 1, "{step:?}: the lock");
    }
}

#[test]
fn some_test_dies_at_every_step() {
    for step in Step::ALL {
        assert!(COLLECT.contains(&step) != ELSEWHERE.contains(&step), "{step:?}");
    }
}
