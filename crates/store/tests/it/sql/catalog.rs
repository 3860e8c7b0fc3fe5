//! The catalog's behaviour.

use std::{hash::BuildHasher, thread};

use burgeon_api::ErrorKind;
use burgeon_store::{
    ChunkId, PackId, Place,
    catalog::{Catalog, Entry, NewRoot, PackState},
};

use super::{Home, on_both_engines};

pub(super) fn pack(number: u32) -> PackId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    PackId(id)
}

pub(super) fn chunk(number: u32) -> ChunkId {
    ChunkId::of(&number.to_le_bytes())
}

/// The chunks of these numbers, one behind the other in a pack.
pub(super) fn entries(pack: PackId, numbers: impl IntoIterator<Item = u32>) -> Vec<Entry> {
    let entry = |(index, number): (usize, u32)| {
        let place = Place { pack, offset: index as u64 * 1000, stored: 900 + number, length: 4096 };
        Entry { id: chunk(number), kind: 1, place }
    };
    numbers.into_iter().enumerate().map(entry).collect()
}

pub(super) fn root(name: &str, expected: Option<ChunkId>, map: ChunkId) -> NewRoot {
    NewRoot {
        kind: "image".into(),
        name: name.into(),
        expected,
        map,
        relied: Vec::new(),
        expires_us: None,
        note: String::new(),
    }
}

/// As a collection does that has just marked what all roots lead to.
pub(super) fn sweep(catalog: &Catalog, ids: Vec<ChunkId>, untouched_since_us: u64) -> Vec<ChunkId> {
    // The callers may be tasks.
    let sweep = || {
        let (_, seen) = catalog.blocking_see_roots().unwrap();
        catalog.blocking_sweep(ids, untouched_since_us, seen).unwrap().unwrap()
    };
    thread::scope(|scope| scope.spawn(sweep).join().unwrap())
}

on_both_engines! {
    chunks_have_the_place_of_the_first_pack,
    a_claim_keeps_a_chunk_from_a_sweep,
    roots_change_only_as_expected,
    a_root_relies_on_what_is_there,
    chunks_move_to_a_new_pack,
    a_pack_is_dropped_in_two_steps,
    chunks_are_listed_in_order,
    sums,
    a_claim_and_a_sweep_at_once,
}

async fn chunks_have_the_place_of_the_first_pack(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    let first = entries(pack(1), 0..10);
    assert!(catalog.add_pack(pack(1), 10_000, 5, first.clone()).await.unwrap().elsewhere.is_empty());
    let ids: Vec<_> = (0..12).map(chunk).collect();
    let places = catalog.places(ids.clone()).await.unwrap();
    assert_eq!(places[..10], first.iter().map(|entry| Some(entry.place)).collect::<Vec<_>>());
    assert_eq!(places[10..], [None, None]);

    let added = catalog.add_pack(pack(2), 3_000, 6, entries(pack(2), 9..12)).await.unwrap();
    assert_eq!(added.elsewhere, [(chunk(9), first[9].place)], "the first place stays, and the caller is told");
    assert_eq!(catalog.places(vec![chunk(9)]).await.unwrap(), [Some(first[9].place)]);
    let again = catalog.add_pack(pack(2), 3_000, 7, entries(pack(2), 9..12)).await.unwrap();
    assert_eq!(again, added, "the same pack again changes nothing");
    assert_eq!(catalog.packs().await.unwrap().len(), 2);

    let wrong = catalog.add_pack(pack(3), 1_000, 8, entries(pack(4), 0..1)).await.unwrap_err();
    assert_eq!(wrong.kind, ErrorKind::Invalid);
    assert_eq!(catalog.packs().await.unwrap().len(), 2, "a refused pack leaves nothing");
    assert!(catalog.add_pack(pack(5), 0, 8, Vec::new()).await.unwrap().elsewhere.is_empty());
    let twice = [entries(pack(6), [40]), entries(pack(6), [40])].concat();
    assert!(catalog.add_pack(pack(6), 1_000, 8, twice).await.unwrap().elsewhere.is_empty());
}

async fn a_claim_keeps_a_chunk_from_a_sweep(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 4_000, 10, entries(pack(1), 0..4)).await.unwrap();
    let claimed = catalog.claim(vec![chunk(0), chunk(9)], 20).await.unwrap();
    assert!(claimed[0].is_some() && claimed[1].is_none());
    // Another pack with the same chunk touches it too.
    catalog.add_pack(pack(2), 1_000, 20, entries(pack(2), [1])).await.unwrap();
    let all: Vec<_> = (0..4).map(chunk).collect();
    assert_eq!(sweep(&catalog, all.clone(), 10), [], "touched at that time is not before it");
    assert_eq!(sweep(&catalog, all.clone(), 20), [chunk(2), chunk(3)]);
    assert_eq!(sweep(&catalog, all.clone(), 20), []);
    // A clock that went back does not make a chunk older.
    catalog.claim(vec![chunk(0)], 3).await.unwrap();
    assert_eq!(sweep(&catalog, all, 20), []);
    catalog.verify_claims(vec![chunk(0), chunk(1)], 30).await.unwrap();
    let gone = catalog.verify_claims(vec![chunk(0), chunk(3), chunk(2)], 30).await.unwrap_err();
    assert_eq!(gone.kind, ErrorKind::Conflict);
    assert!(gone.message.contains(&chunk(3).to_string()), "{gone}");
    // Swept and stored again, in a new pack.
    catalog.add_pack(pack(3), 1_000, 31, entries(pack(3), [2])).await.unwrap();
    assert_eq!(catalog.places(vec![chunk(2)]).await.unwrap()[0].unwrap().pack, pack(3));
}

async fn roots_change_only_as_expected(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 4_000, 10, entries(pack(1), 0..4)).await.unwrap();
    catalog.set_root(root("web", None, chunk(0)), 11).await.unwrap();
    catalog.set_root(root("web", None, chunk(0)), 12).await.unwrap();
    let taken = catalog.set_root(root("web", None, chunk(1)), 12).await.unwrap_err();
    assert_eq!(taken.kind, ErrorKind::Conflict);
    let stale = catalog.set_root(root("web", Some(chunk(2)), chunk(1)), 12).await.unwrap_err();
    assert_eq!(stale.kind, ErrorKind::Conflict);
    let missing = catalog.set_root(root("db", Some(chunk(2)), chunk(1)), 12).await.unwrap_err();
    assert_eq!(missing.kind, ErrorKind::Conflict);
    let set = NewRoot { expires_us: Some(99), note: "naïve".into(), ..root("web", Some(chunk(0)), chunk(1)) };
    catalog.set_root(set.clone(), 13).await.unwrap();
    catalog.set_root(set, 13).await.unwrap();
    let web = catalog.root("image", "web").await.unwrap().unwrap();
    assert_eq!((web.map, web.created_us, web.expires_us, web.note.as_str()), (chunk(1), 13, Some(99), "naïve"));
    // Whoever has seen it before it was set again does not take it away.
    catalog.set_root(NewRoot { expires_us: Some(99), ..root("web", Some(chunk(1)), chunk(1)) }, 15).await.unwrap();
    assert!(!catalog.remove_root_as_seen(web).await.unwrap());
    catalog.set_root(root("seen", None, chunk(1)), 15).await.unwrap();
    let seen = catalog.root("image", "seen").await.unwrap().unwrap();
    assert!(catalog.remove_root_as_seen(seen.clone()).await.unwrap());
    assert!(!catalog.remove_root_as_seen(seen).await.unwrap());
    assert_eq!(catalog.root("disk", "web").await.unwrap(), None);

    // Names in the order of bytes, whatever the locale.
    for name in ["b", "B", "a-b", "ab"] {
        catalog.set_root(root(name, None, chunk(0)), 14).await.unwrap();
    }
    catalog.set_root(NewRoot { kind: "disk".into(), ..root("z", None, chunk(0)) }, 14).await.unwrap();
    let names = |roots: Vec<burgeon_store::catalog::Root>| roots.into_iter().map(|root| root.name).collect::<Vec<_>>();
    assert_eq!(names(catalog.roots(None).await.unwrap()), ["z", "B", "a-b", "ab", "b", "web"]);
    assert_eq!(names(catalog.roots(Some("disk")).await.unwrap()), ["z"]);

    assert_eq!(catalog.rename_root("image", "web", "b", chunk(1)).await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(catalog.rename_root("image", "web", "www", chunk(0)).await.unwrap_err().kind, ErrorKind::Conflict);
    catalog.rename_root("image", "web", "www", chunk(1)).await.unwrap();
    catalog.rename_root("image", "web", "www", chunk(1)).await.unwrap();
    assert_eq!(catalog.rename_root("image", "none", "x", chunk(1)).await.unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(catalog.remove_root("image", "www", Some(chunk(0))).await.unwrap_err().kind, ErrorKind::Conflict);
    assert!(catalog.remove_root("image", "www", Some(chunk(1))).await.unwrap());
    assert!(!catalog.remove_root("image", "www", None).await.unwrap());

    for (name, expires_us) in [("soon", Some(50)), ("later", Some(51)), ("never", None)] {
        catalog.set_root(NewRoot { expires_us, ..root(name, None, chunk(0)) }, 14).await.unwrap();
    }
    let expire = |now_us| thread::scope(|scope| scope.spawn(|| catalog.blocking_expire_roots(now_us)).join().unwrap());
    assert_eq!((expire(49).unwrap(), expire(50).unwrap(), expire(50).unwrap()), (0, 1, 0));
    assert!(catalog.root("image", "soon").await.unwrap().is_none());
    assert!(catalog.root("image", "later").await.unwrap().is_some());
}

async fn a_root_relies_on_what_is_there(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 4_000, 10, entries(pack(1), 0..4)).await.unwrap();
    let gone = catalog.set_root(root("web", None, chunk(7)), 11).await.unwrap_err();
    assert_eq!(gone.kind, ErrorKind::Conflict);
    assert!(gone.message.contains("gone") && gone.hint.as_ref().unwrap().contains("import"), "{gone}");
    let relied = vec![chunk(1), chunk(8)];
    let gone = catalog.set_root(NewRoot { relied, ..root("web", None, chunk(0)) }, 11).await.unwrap_err();
    assert!(gone.message.contains(&chunk(8).to_string()), "{gone}");
    assert_eq!(catalog.roots(None).await.unwrap(), []);
    // What a root relies on is touched with it.
    let relied = vec![chunk(1)];
    catalog.set_root(NewRoot { relied, ..root("web", None, chunk(0)) }, 30).await.unwrap();
    assert_eq!(sweep(&catalog, (0..4).map(chunk).collect(), 30), [chunk(2), chunk(3)]);
}

async fn chunks_move_to_a_new_pack(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 4_000, 10, entries(pack(1), 0..4)).await.unwrap();
    catalog.add_pack(pack(2), 1_000, 10, entries(pack(2), [5])).await.unwrap();
    sweep(&catalog, vec![chunk(0)], 11);
    let new = entries(pack(3), [0, 1, 2, 5]);
    for _ in 0..2 {
        let moves = new.iter().map(|entry| (pack(1), *entry)).collect();
        let moved = catalog.move_chunks(pack(3), 4_000, moves, 12).await.unwrap();
        assert_eq!(moved, 2, "one is gone, one lies elsewhere; and the same again changes nothing");
    }
    let places = catalog.places(vec![chunk(0), chunk(1), chunk(2), chunk(3), chunk(5)]).await.unwrap();
    let packs: Vec<_> = places.iter().map(|place| place.map(|place| place.pack)).collect();
    assert_eq!(packs, [None, Some(pack(3)), Some(pack(3)), Some(pack(1)), Some(pack(2))]);
    assert_eq!(places[2], Some(new[2].place));
    // Two packs are joined.
    let joined = entries(pack(4), [3, 5]);
    let moves = vec![(pack(1), joined[0]), (pack(2), joined[1])];
    assert_eq!(catalog.move_chunks(pack(4), 2_000, moves, 12).await.unwrap(), 2);
    assert_eq!(catalog.places(vec![chunk(3), chunk(5)]).await.unwrap(), [Some(joined[0].place), Some(joined[1].place)]);
    let moves = new.iter().map(|entry| (pack(1), *entry)).collect();
    let wrong = catalog.move_chunks(pack(5), 1_000, moves, 12).await.unwrap_err();
    assert_eq!(wrong.kind, ErrorKind::Invalid);
}

async fn a_pack_is_dropped_in_two_steps(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 4_000, 10, entries(pack(1), 0..2)).await.unwrap();
    catalog.add_pack(pack(2), 4_000, 10, entries(pack(2), 2..4)).await.unwrap();
    assert!(!catalog.drop_pack(pack(1), 50).await.unwrap(), "its chunks live");
    sweep(&catalog, vec![chunk(0), chunk(1), chunk(2)], 11);
    assert!(!catalog.drop_pack(pack(1), 10).await.unwrap(), "too young");
    assert_eq!(catalog.forget_pack(pack(1)).await.unwrap_err().kind, ErrorKind::Conflict);
    let asked = vec![pack(1), pack(2), pack(3)];
    for _ in 0..2 {
        assert_eq!(catalog.drop_packs(asked.clone(), 50).await.unwrap(), [pack(1)]);
    }
    // A kill between the steps leaves the row to the next collection.
    let catalog = Catalog::open(&home.address).unwrap();
    let packs = catalog.packs().await.unwrap();
    assert_eq!(packs, [(pack(1), 4_000, PackState::Dropping), (pack(2), 4_000, PackState::Live)]);
    let late = catalog.add_pack(pack(1), 4_000, 60, entries(pack(1), 0..2)).await.unwrap_err();
    assert_eq!(late.kind, ErrorKind::Conflict, "a pack that is being dropped comes not back");
    catalog.forget_pack(pack(1)).await.unwrap();
    catalog.forget_pack(pack(1)).await.unwrap();
    assert_eq!(catalog.packs().await.unwrap().len(), 1);
    let later = catalog.add_pack(pack(1), 4_000, 70, entries(pack(1), 0..2)).await.unwrap_err();
    assert_eq!(later.kind, ErrorKind::Conflict, "however late");
}

async fn chunks_are_listed_in_order(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    catalog.add_pack(pack(1), 40_000, 10, entries(pack(1), 0..25)).await.unwrap();
    let mut ids: Vec<_> = (0..25).map(chunk).collect();
    ids.sort();
    let (mut cursor, mut seen) = (None, Vec::new());
    loop {
        let some = catalog.chunks_after(cursor, 10).await.unwrap();
        cursor = some.last().map(|chunk| chunk.id);
        seen.extend(some.iter().map(|chunk| chunk.id));
        if some.len() < 10 {
            break;
        }
    }
    assert_eq!(seen, ids);
    let first = catalog.chunks_after(None, 1).await.unwrap()[0];
    assert_eq!((first.kind, first.touched_us), (1, 10));
    assert_eq!(Some(first.place), catalog.places(vec![first.id]).await.unwrap()[0]);
}

async fn sums(home: Home) {
    let catalog = Catalog::open(&home.address).unwrap();
    assert_eq!(catalog.statistics().await.unwrap(), Default::default());
    catalog.add_pack(pack(1), 4_000, 10, entries(pack(1), 0..3)).await.unwrap();
    catalog.add_pack(pack(2), 2_000, 10, entries(pack(2), [7])).await.unwrap();
    catalog.set_root(root("web", None, chunk(0)), 20).await.unwrap();
    sweep(&catalog, vec![chunk(7)], 20);
    catalog.drop_pack(pack(2), 20).await.unwrap();
    let sums = catalog.statistics().await.unwrap();
    assert_eq!((sums.packs, sums.packs_dropping, sums.pack_bytes, sums.roots), (2, 1, 6_000, 1));
    assert_eq!((sums.chunks, sums.stored_bytes, sums.plain_bytes), (3, 2_703, 3 * 4_096));
    let usage = catalog.pack_usage().await.unwrap();
    assert_eq!((usage[0].id, usage[0].live_stored, usage[0].live_chunks), (pack(1), 2_703, 3));
    assert_eq!((usage[1].state, usage[1].live_stored, usage[1].live_chunks), (PackState::Dropping, 0, 0));
}

/// A writer claims a chunk while a sweep of it runs: it is told that the chunk is absent, or the chunk survives.
async fn a_claim_and_a_sweep_at_once(home: Home) {
    const TRIES: u32 = 1_000;
    let setup = Catalog::open(&home.address).unwrap();
    setup.add_pack(pack(1), 1, 10, entries(pack(1), 0..TRIES)).await.unwrap();
    // Connections of their own, as two processes have.
    let [writer, collector] = [Catalog::open(&home.address).unwrap(), Catalog::open(&home.address).unwrap()];
    let random = std::collections::hash_map::RandomState::new();
    let wait = |what: u32| {
        for _ in 0..random.hash_one(what) % 20_000 {
            std::hint::spin_loop();
        }
    };
    let (mut claimed, mut swept) = (0, 0);
    for number in 0..TRIES {
        let (place, deleted) = thread::scope(|scope| {
            let claim = scope.spawn(|| {
                wait(number);
                writer.blocking_claim(vec![chunk(number)], 30).unwrap()[0]
            });
            let sweep = scope.spawn(|| {
                wait(number + TRIES);
                sweep(&collector, vec![chunk(number)], 20)
            });
            (claim.join().unwrap(), sweep.join().unwrap())
        });
        let there = setup.places(vec![chunk(number)]).await;
        match place {
            Some(place) => {
                assert_eq!(there.unwrap(), [Some(place)], "claimed chunk {number} is gone");
                assert!(deleted.is_empty());
                claimed += 1;
            }
            None => {
                assert_eq!(there.unwrap(), [None]);
                assert_eq!(deleted, [chunk(number)]);
                swept += 1;
            }
        }
    }
    assert!(claimed > 0 && swept > 0, "{claimed} claims and {swept} sweeps came first: that is no race");
}

#[test]
fn a_catalog_of_the_first_version_is_brought_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("catalog.db");
    let catalog = Catalog::open(&path).unwrap();
    catalog.blocking_add_pack(pack(1), 4_000, 10, entries(pack(1), 0..4)).unwrap();
    catalog.blocking_set_root(root("web", None, chunk(0)), 11).unwrap();
    drop(catalog);
    let bare = rusqlite::Connection::open(&path).unwrap();
    bare.execute_batch(
        "DROP TABLE counter; DROP TABLE gone; DROP TABLE store_identity; UPDATE schema_version SET version = 1",
    )
    .unwrap();
    drop(bare);
    let catalog = Catalog::open(&path).unwrap();
    let (roots, seen) = catalog.blocking_see_roots().unwrap();
    assert_eq!(roots.len(), 1);
    assert_eq!(catalog.blocking_sweep(vec![chunk(3)], 20, seen).unwrap(), Some(vec![chunk(3)]));
}
