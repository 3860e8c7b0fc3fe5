mod collect;
mod heal;
mod left_over;
mod rebuild;

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::{catalog::NewRoot, cut::Cutter, testing::noise};

fn open(directory: &Path) -> Arc<ChunkStore> {
    // One for all, so that no two stores on a directory give the same number.
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let source = Source {
        now_us: Arc::new(|| NEXT.fetch_add(1, Ordering::Relaxed)),
        uuid: Arc::new(|| u128::from(NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes()),
    };
    ChunkStore::open(directory, source).unwrap()
}

fn root(name: &str, map: ChunkId) -> NewRoot {
    NewRoot {
        kind: "image".into(),
        name: name.into(),
        expected: None,
        map,
        relied: Vec::new(),
        expires_us: None,
        note: String::new(),
    }
}

fn store_bytes(store: &ChunkStore, name: &str, bytes: &[u8], cutter: Cutter, base: Option<Map>) -> (Map, Written) {
    let mut writer = Writer::new(store);
    let ingested = ingest(store, &mut writer, bytes, cutter, base, &mut |_| {}).unwrap();
    let written = writer.finish(root(name, ingested.map.root())).unwrap();
    (ingested.map, written)
}

fn read_back(store: &ChunkStore, map: Map, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut MapBytes::new(store, map), &mut bytes).unwrap();
    assert!(bytes[length..].iter().all(|byte| *byte == 0));
    bytes.truncate(length);
    bytes
}

/// Noise, with holes and repetitions.
fn picture() -> Vec<u8> {
    let mut bytes = noise(11, 20 << 20);
    bytes[3 << 20..5 << 20].fill(0);
    bytes.copy_within(0..1 << 20, 6 << 20);
    bytes.truncate((20 << 20) - 777);
    bytes
}

#[test]
fn what_is_stored_is_read_and_stored_once() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let bytes = picture();
    for cutter in [Cutter::Fixed64K, Cutter::FastCdc16K] {
        let name = cutter.name().replace('/', "-");
        let (map, written) = store_bytes(&store, &name, &bytes, cutter, None);
        assert!(read_back(&store, map, bytes.len()) == bytes);
        // The hole and, at equal cuts, the repetition cost nothing.
        assert!(written.new_bytes < 18_100_000, "{written:?}");
        let (again, written) = store_bytes(&store, &format!("{name}-2"), &bytes, cutter, None);
        assert_eq!((again.root(), written.new_chunks), (map.root(), 0));
    }
    // A relative whose bytes have moved by a few blocks.
    let (old, _) = store_bytes(&store, "old", &bytes, Cutter::FastCdc16K, None);
    let moved = [&noise(5, 12_288), &bytes[..9 << 20], &noise(6, 4096), &bytes[9 << 20..]].concat();
    let (new, written) = store_bytes(&store, "new", &moved, Cutter::FastCdc16K, Some(old));
    assert!(read_back(&store, new, moved.len()) == moved);
    assert!(written.new_bytes < 100_000, "{written:?}");
    // Another process sees the same.
    let other = open(directory.path());
    assert!(read_back(&other, new, moved.len()) == moved);
}

#[test]
fn a_bad_copy_is_told_and_never_given() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let bytes = noise(3, 200_000);
    let (map, _) = store_bytes(&store, "one", &bytes, Cutter::Fixed64K, None);
    let packs = directory.path().join("packs");
    let pack = std::fs::read_dir(&packs)
        .unwrap()
        .flatten()
        .find_map(|folder| std::fs::read_dir(folder.path()).unwrap().flatten().next().map(|file| file.path()));
    let pack = pack.unwrap();
    let mut content = std::fs::read(&pack).unwrap();
    content[100_000] ^= 1;
    std::fs::write(&pack, content).unwrap();
    let store = open(directory.path());
    let error = store.read_map(&map, 0, &mut vec![0; 200_000]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Damaged);
    assert!(error.message.contains(pack.to_str().unwrap()) && error.message.contains("at byte"), "{error}");
    std::fs::remove_file(&pack).unwrap();
    assert!(open(directory.path()).read_map(&map, 0, &mut [0; 512]).is_err());
}
