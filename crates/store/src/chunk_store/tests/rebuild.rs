//! A catalog that is lost, and made anew of the packs.

use super::{
    collect::{FUTURE, GRACE, assert_sound, open_at, pack_files, remove, run},
    *,
};

fn source() -> Source {
    Source { now_us: Arc::new(|| FUTURE), uuid: Arc::new(|| [7; 16]) }
}

fn named(name: &str, map: Map) -> NamedRoot {
    NamedRoot { kind: "image".into(), name: name.into(), map: map.root() }
}

fn again(directory: &Path, roots: &[NamedRoot]) -> burgeon_api::store::Rebuilt {
    rebuild(directory, &source(), roots, &mut |_, _, _| Ok(())).unwrap()
}

/// Two images and what a third has left; every store on the directory is closed.
fn filled(directory: &Path, clock: &Arc<AtomicU64>) -> Vec<(Map, Vec<u8>)> {
    let store = open_at(directory, clock);
    let pictures = [noise(31, 2 << 20), noise(32, 300_000)];
    let kept =
        pictures.map(|bytes| (store_bytes(&store, &bytes.len().to_string(), &bytes, Cutter::Fixed64K, None).0, bytes));
    store_bytes(&store, "gone", &noise(33, 100_000), Cutter::Fixed64K, None);
    remove(&store, "gone");
    kept.into()
}

fn lose(directory: &Path) {
    for ending in ["", "-wal", "-shm"] {
        drop(std::fs::remove_file(directory.join(format!("catalog.db{ending}"))));
    }
}

#[test]
fn a_lost_catalog_is_refused_and_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let kept = filled(directory.path(), &clock);
    let roots: Vec<NamedRoot> = kept.iter().map(|(map, bytes)| named(&bytes.len().to_string(), *map)).collect();
    let before = {
        let store = open_at(directory.path(), &clock);
        let mut rows = store.catalog.blocking_chunks_after(None, 1000).unwrap();
        rows.iter_mut().for_each(|row| row.touched_us = FUTURE);
        (rows, store.catalog.blocking_packs().unwrap())
    };
    lose(directory.path());
    for leave in [None, Some(&b""[..])] {
        if let Some(empty) = leave {
            std::fs::write(directory.path().join("catalog.db"), empty).unwrap();
        }
        let refused = ChunkStore::open(directory.path(), source()).err().unwrap();
        assert_eq!(refused.kind, ErrorKind::Damaged);
        assert!(refused.hint.unwrap().contains("--rebuild"));
    }
    let rebuilt = again(directory.path(), &roots);
    assert_eq!((rebuilt.packs, rebuilt.roots, rebuilt.problems.len()), (3, 2, 0), "{rebuilt:?}");
    let store = open_at(directory.path(), &clock);
    assert_eq!(
        (store.catalog.blocking_chunks_after(None, 1000).unwrap(), store.catalog.blocking_packs().unwrap()),
        before
    );
    assert_eq!(rebuilt.chunks, before.0.len() as u64);
    assert_sound(&store);
    for (map, bytes) in &kept {
        assert!(read_back(&store, *map, bytes.len()) == *bytes);
    }
    clock.fetch_add(2 * GRACE, Ordering::Relaxed);
    assert_eq!((run(&store).packs_dropped, pack_files(directory.path()).len()), (1, 2), "what nothing names goes");
    assert_sound(&store);
}

#[test]
fn a_damaged_catalog_is_kept_beside_the_new_one_with_its_log() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let kept = filled(directory.path(), &clock);
    let file = directory.path().join("catalog.db");
    std::fs::write(&file, [1; 5000]).unwrap();
    std::fs::write(directory.path().join("catalog.db-wal"), "a log of something else").unwrap();
    let refused = ChunkStore::open(directory.path(), source()).err().unwrap();
    assert_eq!(refused.kind, ErrorKind::Damaged, "{refused}");
    assert!(refused.hint.unwrap().contains("--rebuild"));
    for _ in 0..2 {
        let rebuilt = again(directory.path(), &[named("one", kept[0].0)]);
        assert_eq!((rebuilt.roots, rebuilt.problems.len()), (1, 0), "{rebuilt:?}");
        assert!(directory.path().join("catalog.db.replaced").exists());
        assert_sound(&open_at(directory.path(), &clock));
    }
    assert!(!directory.path().join("catalog.db.rebuilding").exists());
}

#[test]
fn what_cannot_be_read_is_told_and_the_rest_is_saved() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let kept = filled(directory.path(), &clock);
    let of = |map: Map| {
        let store = open_at(directory.path(), &clock);
        let place = store.catalog.blocking_places(vec![map.root()]).unwrap()[0].unwrap();
        store.describe(place.pack)
    };
    let (large, small) = (of(kept[0].0), of(kept[1].0));
    // One loses its footer, the other its header.
    let mut content = std::fs::read(&large).unwrap();
    content.truncate(content.len() - 100);
    std::fs::write(&large, content).unwrap();
    let mut content = std::fs::read(&small).unwrap();
    content[5] ^= 1;
    std::fs::write(&small, content).unwrap();
    lose(directory.path());
    let rebuilt = again(directory.path(), &[named("large", kept[0].0), named("small", kept[1].0)]);
    assert_eq!((rebuilt.packs, rebuilt.packs_salvaged, rebuilt.packs_lost), (2, 1, 1), "{rebuilt:?}");
    assert_eq!((rebuilt.roots, rebuilt.roots_lost, rebuilt.problems.len()), (1, 1, 3), "{rebuilt:?}");
    let store = open_at(directory.path(), &clock);
    assert!(read_back(&store, kept[0].0, kept[0].1.len()) == kept[0].1);
    assert!(fsck(&store, &mut |_, _, _| Ok(())).unwrap().problems.is_empty());
}

#[test]
fn a_rebuilding_that_dies_at_any_step_is_repeated() {
    for step in 0.. {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(AtomicU64::new(FUTURE));
        let kept = filled(directory.path(), &clock);
        let roots = [named("one", kept[0].0)];
        let mut steps = 0;
        let died = rebuild(directory.path(), &source(), &roots, &mut |_, _, _| {
            steps += 1;
            if steps > step { Err(Error::internal("killed")) } else { Ok(()) }
        });
        if died.is_err() {
            // The old one is where it was.
            let store = open_at(directory.path(), &clock);
            assert_eq!(store.catalog.blocking_roots(None).unwrap().len(), 2);
        }
        again(directory.path(), &roots);
        assert_sound(&open_at(directory.path(), &clock));
        if died.is_ok() {
            assert!(step >= 5, "{step} steps");
            return;
        }
    }
}
