//! A whole store on each pair of places: packs in a directory or a bucket, catalog in SQLite or PostgreSQL.

use std::{
    io::Read,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use burgeon_api::{
    Error, ErrorKind,
    store::{Checked, Relocated},
};
use burgeon_store::{
    ChunkId, OwnerId,
    catalog::NewRoot,
    chunk_store::{self, ChunkStore, GRACE_US, MapBytes, NamedRoot, Source, Writer, ingest},
    cut::Cutter,
    disk::{Base, ImageBase},
    map::Map,
    meta::Meta,
    objects::S3Settings,
    places::{Elsewhere, Files, Owner, Places, relocate},
    sql::Address,
};

use crate::{
    s3,
    s3_server::Server,
    sql::server::{Server as Postgres, shared},
};

/// Later than the time of any object that a test makes.
const FUTURE: u64 = 4_000_000_000_000_000;

struct Pair {
    directory: tempfile::TempDir,
    bucket: Option<Server>,
    catalog: Option<Address>,
    clock: Arc<AtomicU64>,
}

impl Pair {
    fn new(bucket: bool, postgres: bool) -> Pair {
        Pair {
            directory: tempfile::tempdir().unwrap(),
            bucket: bucket.then(Server::start),
            catalog: postgres.then(|| shared().new_database()),
            clock: Arc::new(AtomicU64::new(FUTURE)),
        }
    }

    fn places(&self) -> Places {
        Places {
            objects: self.bucket.as_ref().map(settings),
            catalog: self.catalog.clone(),
            ..Places::from(self.directory.path())
        }
    }

    fn open(&self) -> Arc<ChunkStore> {
        ChunkStore::open(self.places(), source(&self.clock)).unwrap()
    }

    /// Where the packs' files are.
    fn packs(&self) -> std::path::PathBuf {
        match &self.bucket {
            Some(server) => server.root.path().join("burgeon/of/this-test/packs"),
            None => self.directory.path().join("packs"),
        }
    }
}

/// Short deadlines, so that a server that is gone is told soon.
fn settings(server: &Server) -> S3Settings {
    S3Settings { deadline: Duration::from_secs(20), ..s3::settings(server) }
}

fn source(clock: &Arc<AtomicU64>) -> Source {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let clock = clock.clone();
    Source {
        now_us: Arc::new(move || clock.load(Ordering::Relaxed)),
        uuid: Arc::new(|| u128::from(NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes()),
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn keep(store: &ChunkStore, name: &str, bytes: &[u8]) -> Map {
    let mut writer = Writer::new(store);
    let map = ingest(store, &mut writer, bytes, Cutter::FastCdc16K, None, &mut |_| {}).unwrap().map;
    writer.finish(NewRoot::new("image", name.into(), map.root())).unwrap();
    map
}

fn read(store: &ChunkStore, map: Map) -> Vec<u8> {
    let mut bytes = Vec::new();
    MapBytes::new(store, map).read_to_end(&mut bytes).unwrap();
    bytes
}

fn check(store: &ChunkStore) -> Vec<Checked> {
    let quiet = &mut |_: &'static str, _, _| Ok(());
    vec![chunk_store::fsck(store, quiet).unwrap(), chunk_store::scrub(store, false, quiet).unwrap()]
}

fn assert_sound(store: &ChunkStore) {
    for checked in check(store) {
        assert!(checked.problems.is_empty(), "{checked:?}");
    }
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let folders = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| std::fs::read_dir(folder.path()).unwrap().flatten());
    files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|kind| kind == "pack")).collect()
}

fn refused(places: Places) -> Error {
    ChunkStore::open(places, source(&Arc::new(AtomicU64::new(FUTURE)))).err().expect("it was opened")
}

/// Stores, reads through every way, collects, repairs, and makes the catalog anew.
fn lives(bucket: bool, postgres: bool) {
    let pair = Pair::new(bucket, postgres);
    let (bytes, other) = (noise(1, 5 << 20), noise(2, 1 << 20));
    let store = pair.open();
    let map = keep(&store, "kept", &bytes);
    keep(&store, "gone", &other);
    assert_eq!(files(&pair.packs()).len(), 2);
    // Another process, one chunk at a time, all together, and as they are stored.
    let reader = pair.open();
    assert!(read(&reader, map) == bytes);
    let pieces = map.lookup(&*reader, 0..bytes.len() as u64).unwrap();
    let ids: Vec<ChunkId> = pieces.iter().filter_map(|piece| piece.source.map(|(id, _)| id)).collect();
    let together = reader.get_all(&[&ids[..], &ids[..1]].concat()).unwrap();
    assert!(ids.iter().zip(&together).all(|(id, bytes)| ChunkId::of(bytes) == *id) && together.len() == ids.len() + 1);
    assert!(ids.iter().all(|id| pair.open().get(*id).is_ok_and(|bytes| ChunkId::of(&bytes) == *id) || ids.len() > 20));
    assert_eq!(reader.encoded(&ids).unwrap().len(), ids.len());
    assert_sound(&store);

    store.catalog().blocking_remove_root("image", "gone", None).unwrap();
    pair.clock.fetch_add(2 * GRACE_US, Ordering::Relaxed);
    let collected = chunk_store::collect(&store, GRACE_US, &mut |_, _, _| Ok(())).unwrap();
    assert!(collected.packs_dropped == 1 && collected.chunks_deleted > 10, "{collected:?}");
    let left = files(&pair.packs());
    assert_eq!(left.len(), 1);
    assert!(read(&pair.open(), map) == bytes);

    // A bad copy is told, let go of, and stored anew.
    let mut pack = std::fs::read(&left[0]).unwrap();
    pack[100_000] ^= 1;
    std::fs::write(&left[0], &pack).unwrap();
    let error = pair.open().read_map(&map, 0, &mut vec![0; bytes.len()]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
    let repaired = chunk_store::scrub(&pair.open(), true, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!((repaired.repaired, repaired.needed_by), (1, vec!["image kept".to_string()]));
    assert_eq!(keep(&pair.open(), "again", &bytes).root(), map.root());
    assert_sound(&pair.open());
    assert!(read(&pair.open(), map) == bytes);

    drop((store, reader));
    let roots = vec![NamedRoot { kind: "image".into(), name: "kept".into(), map: map.root() }];
    let rebuilt = chunk_store::rebuild(pair.places(), &source(&pair.clock), &roots, &mut |_, _, _| Ok(())).unwrap();
    // The pack that was repaired is there until it is collected, with its one bad record.
    assert_eq!((rebuilt.roots, rebuilt.packs_lost), (1, 0), "{rebuilt:?}");
    let again = pair.open();
    assert_eq!(again.catalog().blocking_roots(None).unwrap().len(), 1);
    drop(again);
}

#[test]
fn a_store_in_a_directory() {
    lives(false, false);
}

#[test]
fn a_store_in_a_bucket() {
    lives(true, false);
}

#[test]
fn a_store_with_its_catalog_on_postgres() {
    lives(false, true);
}

#[test]
fn a_store_in_a_bucket_with_its_catalog_on_postgres() {
    lives(true, true);
}

#[test]
fn what_does_not_belong_together_is_refused_and_not_changed() {
    for postgres in [false, true] {
        let (mut ours, theirs) = (Pair::new(true, postgres), Pair::new(true, postgres));
        let maps = [(&ours, noise(1, 100_000)), (&theirs, noise(2, 200_000))].map(|(pair, bytes)| {
            let store = pair.open();
            (keep(&store, "one", &bytes), bytes)
        });
        let mixed = Places { objects: theirs.places().objects, ..ours.places() };
        let error = refused(mixed.clone());
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
        assert!(error.message.contains("s3://burgeon/of/this-test") && error.message.contains("store 0"), "{error}");
        let empty = Places {
            objects: Some(S3Settings { prefix: "empty".into(), ..settings(ours.bucket.as_ref().unwrap()) }),
            ..ours.places()
        };
        let error = refused(empty);
        assert!(error.kind == ErrorKind::Refused && error.message.contains("another store"), "{error}");
        let rebuilt = chunk_store::rebuild(mixed, &source(&ours.clock), &[], &mut |_, _, _| Ok(()));
        assert_eq!(rebuilt.is_err(), postgres, "a catalog in a file has a copy kept beside it");
        if !postgres {
            std::fs::rename(
                ours.directory.path().join("catalog.db.replaced"),
                ours.directory.path().join("catalog.db"),
            )
            .unwrap();
        }

        // A catalog that is lost.
        let lost = Pair::new(false, postgres);
        let lost = Places { objects: ours.places().objects, ..lost.places() };
        let error = refused(lost);
        assert!(error.kind == ErrorKind::Damaged && error.hint.unwrap().contains("--rebuild"), "{}", error.message);

        for (pair, (map, bytes)) in [&ours, &theirs].into_iter().zip(&maps) {
            let store = pair.open();
            assert!(read(&store, *map)[..bytes.len()] == bytes[..]);
            assert_sound(&store);
        }
        // A pair that a kill has left without its marker is one all the same.
        let marker = ours.packs().with_file_name("burgeon-store.json");
        let before = std::fs::read(&marker).unwrap();
        std::fs::remove_file(&marker).unwrap();
        ours.open();
        assert_eq!(std::fs::read(&marker).unwrap(), before);

        let right = ours.places();
        let wrong = |change: &dyn Fn(&mut S3Settings)| {
            let mut places = right.clone();
            change(places.objects.as_mut().unwrap());
            refused(places)
        };
        assert_eq!(wrong(&|settings| settings.secret_key = "wrong".into()).kind, ErrorKind::Refused);
        let error = wrong(&|settings| settings.endpoint = Some("https://key:hidden@host".into()));
        assert!(error.kind == ErrorKind::Invalid && !error.message.contains("hidden"), "{error}");
        let error = wrong(&|settings| settings.bucket = "elsewhere".into());
        assert!(error.kind == ErrorKind::NotFound && error.hint.unwrap().contains("create the bucket"));
        let store = ours.open();
        ours.bucket.as_mut().unwrap().stop();
        let away = chunk_store::scrub(&store, true, &mut |_, _, _| Ok(())).unwrap_err();
        assert_eq!(away.kind, ErrorKind::Unavailable, "nothing is damaged because it cannot be reached");
        let error = wrong(&|_| ());
        assert!(error.kind == ErrorKind::Unavailable && error.hint.unwrap().contains("can be reached"));
    }
}

#[test]
fn a_catalog_on_a_server_is_one_owners() {
    let pair = Pair::new(false, true);
    let owned = |number: u8| Places {
        owner: Some(Owner { id: OwnerId([number; 16]), name: format!("host{number}:/data") }),
        ..pair.places()
    };
    drop(ChunkStore::open(owned(1), source(&pair.clock)).unwrap());
    drop(ChunkStore::open(owned(1), source(&pair.clock)).unwrap());
    let error = refused(owned(2));
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("host1:/data") && error.hint.is_some(), "{error}");
}

/// A guest's read waits for a bucket that is away, and for a database that is.
#[test]
fn a_read_waits_for_what_is_away_and_goes_on() {
    let mut postgres = Postgres::new();
    let mut pair = Pair { catalog: Some(postgres.new_database()), ..Pair::new(true, false) };
    let bytes = noise(3, 4 << 20);
    let map = keep(&pair.open(), "one", &bytes);
    let store = pair.open();
    let base = ImageBase::open(store, map.root(), &pair.directory.path().join("cache"), None).unwrap();
    let half = bytes.len() / 2;
    let mut first = vec![0; half];
    base.read(0, &mut first).unwrap();
    assert!(first == bytes[..half]);
    pair.bucket.as_mut().unwrap().stop();
    postgres.stop();
    thread::scope(|scope| {
        let (base, bytes) = (&base, &bytes);
        let waiting: Vec<_> = (0..4)
            .map(|part| {
                scope.spawn(move || {
                    let at = half + part * half / 4;
                    let mut read = vec![0; half / 4];
                    base.read(at as u64, &mut read).unwrap();
                    assert!(read == bytes[at..at + half / 4]);
                })
            })
            .collect();
        // What was read before is read still.
        let mut again = vec![0; half];
        base.read(0, &mut again).unwrap();
        assert!(again == bytes[..half] && waiting.iter().all(|reader| !reader.is_finished()));
        pair.bucket.as_mut().unwrap().start_again();
        postgres.start();
        waiting.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

/// A move that is broken off at any step leaves the data directory as it was, and the next one goes on.
#[test]
fn a_store_moves_out_of_its_directory_wherever_it_is_broken_off() {
    let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
    let files = Files {
        record: home.path().join("places.json"),
        store: home.path().join("store"),
        meta: home.path().join("meta.db"),
        name: "host:/data".into(),
    };
    let clock = Arc::new(AtomicU64::new(FUTURE));
    let (bytes, row) = (noise(5, 3 << 20), crate::sql::meta::row("web"));
    let map = {
        let store = ChunkStore::open(&files.store, source(&clock)).unwrap();
        keep(&store, "gone", &noise(6, 100_000));
        store.catalog().blocking_remove_root("image", "gone", None).unwrap();
        keep(&store, "one", &bytes)
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(Meta::open(&files.meta).unwrap().create_vm(row.clone())).unwrap();
    let before =
        ChunkStore::open(&files.store, source(&clock)).unwrap().catalog().blocking_chunks_after(None, 4096).unwrap();

    let address = shared().new_database();
    let elsewhere =
        Elsewhere { objects: Some(settings(&server)), catalog: Some(address.clone()), meta: Some(address.clone()) };
    let nothing = Elsewhere::default();
    assert_eq!(
        relocate(&nothing, &files, &source(&clock), &mut |_, _, _| Ok(())).unwrap_err().kind,
        ErrorKind::Invalid
    );
    let moved = (0..)
        .find_map(|steps| {
            let mut rest = steps;
            let done = relocate(&elsewhere, &files, &source(&clock), &mut |_, _, _| {
                rest -= 1;
                if rest < 0 { Err(Error::new(ErrorKind::Cancelled, "killed")) } else { Ok(()) }
            });
            let Err(error) = done else { return done.ok() };
            assert_eq!(error.kind, ErrorKind::Cancelled, "{error}");
            // It is still here; and the settings are refused until it is there.
            assert_eq!(elsewhere.settle(&files, [1; 16]).unwrap_err().kind, ErrorKind::Refused);
            let here = nothing.settle(&files, [1; 16]).unwrap();
            assert!(read(&ChunkStore::open(here, source(&clock)).unwrap(), map)[..bytes.len()] == bytes[..]);
            assert!(steps < 100);
            None
        })
        .unwrap();
    assert!(moved.packs == 2 && moved.rows > 100, "{moved:?}");
    let again = relocate(&elsewhere, &files, &source(&clock), &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(again, Relocated::default());

    assert!(nothing.settle(&files, [1; 16]).unwrap_err().message.contains("s3://burgeon/of/this-test"));
    let left: Vec<_> = std::fs::read_dir(&files.store).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["catalog.db.moved"]);
    let store = ChunkStore::open(elsewhere.settle(&files, [1; 16]).unwrap(), source(&clock)).unwrap();
    assert!(read(&store, map)[..bytes.len()] == bytes[..]);
    assert_eq!(store.catalog().blocking_chunks_after(None, 4096).unwrap(), before);
    assert_sound(&store);
    let meta = Meta::open(&address).unwrap();
    assert_eq!(runtime.block_on(meta.vms()).unwrap(), [row]);
    drop(meta);

    // Nobody's place is taken.
    let other = tempfile::tempdir().unwrap();
    let others = Files {
        record: other.path().join("places.json"),
        store: other.path().join("store"),
        meta: other.path().join("meta.db"),
        name: "other:/data".into(),
    };
    keep(&ChunkStore::open(&others.store, source(&clock)).unwrap(), "one", &noise(7, 100_000));
    let only = |objects, catalog| Elsewhere { objects, catalog, meta: None };
    for taken in [only(Some(settings(&server)), None), only(None, Some(address))] {
        let error = relocate(&taken, &others, &source(&clock), &mut |_, _, _| Ok(())).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
        std::fs::remove_file(others.record.with_extension("json.moving")).unwrap();
    }
    ChunkStore::open(&others.store, source(&clock)).unwrap();
}

/// What a guest needs at once comes in a few requests, and once for all who want it.
#[test]
fn a_bucket_is_asked_seldom() {
    let pair = Pair::new(true, false);
    let bytes = noise(8, 4 << 20);
    let map = keep(&pair.open(), "one", &bytes);
    let store = pair.open();
    let chunks = map.lookup(&*store, 0..4 << 20).unwrap().len();
    assert!(chunks > 150, "{chunks}");
    let base = ImageBase::open(store.clone(), map.root(), &pair.directory.path().join("cache"), None).unwrap();
    let before = store.requests();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut read = vec![0; 2 << 20];
                base.read(0, &mut read).unwrap();
                assert!(read == bytes[..2 << 20]);
            });
        }
    });
    let whole = store.requests() - before;
    assert!((2..=12).contains(&whole), "{whole} requests for 2 MiB, four times");
    let one = store.requests();
    for at in (2 << 20..4 << 20).step_by(64 << 10) {
        base.read(at, &mut vec![0; 64 << 10]).unwrap();
    }
    let in_order = store.requests() - one;
    assert!(in_order < 16, "{in_order} requests for 32 reads in order");
}
