//! Damaged copies are let go of, and stored anew by the next writer.

use std::path::PathBuf;

use super::*;

fn sound(store: &ChunkStore) {
    for checked in [fsck(store, &mut |_, _, _| Ok(())).unwrap(), scrub(store, false, &mut |_, _, _| Ok(())).unwrap()] {
        assert!(checked.problems.is_empty(), "{checked:?}");
    }
}

fn repair(store: &ChunkStore) -> burgeon_api::store::Checked {
    scrub(store, true, &mut |_, _, _| Ok(())).unwrap()
}

/// Breaks the copy of a chunk; answers the file.
fn break_copy(store: &ChunkStore, id: ChunkId) -> PathBuf {
    let place = store.catalog.blocking_places(vec![id]).unwrap()[0].unwrap();
    let path = store.describe(place.pack);
    let mut content = std::fs::read(&path).unwrap();
    content[usize::try_from(place.offset).unwrap() + RECORD_HEADER_BYTES] ^= 1;
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn a_damaged_copy_is_healed_by_storing_the_same_bytes_again() {
    let bytes = noise(21, 1 << 20);
    for node in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let (map, _) = store_bytes(&store, "one", &bytes, Cutter::Fixed64K, None);
        let shared = [&noise(22, 65_536), &bytes[..65_536]].concat();
        store_bytes(&store, "shares", &shared, Cutter::Fixed64K, None);
        store_bytes(&store, "other", &noise(23, 65_536), Cutter::Fixed64K, None);
        let mut ids = Vec::new();
        crate::map::chunks(&*store, map.root(), &mut |kind, id| {
            ids.push((kind, id));
            Ok(true)
        })
        .unwrap();
        // The first data chunk stands in both images; the last node of the first image in that alone.
        let (_, bad) = *if node {
            ids.iter().rfind(|(kind, _)| *kind == crate::chunk::Kind::MapNode).unwrap()
        } else {
            ids.iter().find(|(kind, _)| *kind == crate::chunk::Kind::Data).unwrap()
        };
        break_copy(&store, bad);
        let before = store.catalog.blocking_chunks_after(None, 1000).unwrap();

        let store = open(directory.path());
        let told = scrub(&store, false, &mut |_, _, _| Ok(())).unwrap();
        let needed_by: &[&str] = if node { &["image one"] } else { &["image one", "image shares"] };
        assert_eq!((told.problems.len(), told.repairable, told.repaired), (1, 1, 0), "{told:?}");
        assert_eq!(told.needed_by, needed_by);
        assert_eq!(store.catalog.blocking_chunks_after(None, 1000).unwrap(), before, "nothing is changed");
        let (_, again) = store_bytes(&store, "again", &bytes, Cutter::Fixed64K, None);
        assert_eq!(again.new_chunks, 0, "what the catalog knows is not stored anew");

        let repaired = repair(&store);
        assert_eq!((repaired.problems.len(), repaired.repaired), (1, 1), "{repaired:?}");
        assert_eq!(store.get_many(&[bad]).unwrap_err().kind, ErrorKind::NotFound);
        let missed = fsck(&store, &mut |_, _, _| Ok(())).unwrap();
        assert_eq!(missed.problems.len(), needed_by.len() + 1, "{missed:?}");
        assert_eq!(repair(&store).repaired, 0, "the rest of the pack is good, and has moved");

        // As a build does it: with the older version of the image to share with, which cannot be read.
        let (healed, written) = store_bytes(&store, "two", &bytes, Cutter::Fixed64K, Some(map));
        assert_eq!((healed.root(), written.new_chunks), (map.root(), 1));
        let store = open(directory.path());
        sound(&store);
        assert!(read_back(&store, map, bytes.len()) == bytes);
    }
}

#[test]
fn a_lost_pack_is_let_go_of_and_a_lost_disk_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let (lost, kept) = (noise(24, 1 << 20), noise(25, 200_000));
    let (map, _) = store_bytes(&store, "lost", &lost, Cutter::Fixed64K, None);
    store_bytes(&store, "kept", &kept, Cutter::Fixed64K, None);
    let place = store.catalog.blocking_places(vec![map.root()]).unwrap()[0].unwrap();
    std::fs::remove_file(store.describe(place.pack)).unwrap();

    let store = open(directory.path());
    let repaired = repair(&store);
    assert_eq!(repaired.needed_by, ["image lost"]);
    assert!(repaired.repaired > 16 && repaired.problems.len() == 1, "{repaired:?}");
    let (_, written) = store_bytes(&store, "again", &lost, Cutter::Fixed64K, None);
    assert_eq!(written.new_chunks, repaired.repaired);
    sound(&open(directory.path()));

    // As it is where the packs' disk is not mounted.
    let packs = directory.path().join("packs");
    std::fs::rename(&packs, directory.path().join("elsewhere")).unwrap();
    let store = open(directory.path());
    let refused = scrub(&store, true, &mut |_, _, _| Ok(())).unwrap_err();
    assert!(refused.kind == ErrorKind::Refused && refused.hint.is_some(), "{refused}");
    std::fs::rename(directory.path().join("elsewhere"), &packs).unwrap();
    sound(&open(directory.path()));
}

#[test]
fn a_pack_with_a_broken_index_is_written_anew() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let bytes = noise(26, 300_000);
    let (map, _) = store_bytes(&store, "one", &bytes, Cutter::Fixed64K, None);
    let place = store.catalog.blocking_places(vec![map.root()]).unwrap()[0].unwrap();
    let path = store.describe(place.pack);
    let mut content = std::fs::read(&path).unwrap();
    let end = content.len() - 1;
    content[end] ^= 1;
    std::fs::write(&path, content).unwrap();
    let store = open(directory.path());
    let repaired = repair(&store);
    assert_eq!((repaired.problems.len(), repaired.repaired), (1, 0), "{repaired:?}");
    let store = open(directory.path());
    sound(&store);
    assert!(read_back(&store, map, bytes.len()) == bytes);
}
