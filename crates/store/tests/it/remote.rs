//! Images in a remote: a directory, and a bucket of a real S3 server.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burgeon_api::{
    ByteSize, Error, ErrorKind, Result,
    image::{Boot, Image},
    remote::{Remote as Address, S3Access},
};
use burgeon_store::{
    catalog::NewRoot,
    chunk_store::{ChunkStore, Source, Writer, ingest},
    cut::Cutter,
    map::Map,
    remote::{Pulled, Pushed, Remote, pull, push},
};
use tokio::runtime::Runtime;

use crate::s3_server::Server;

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// A machine: its store, and the directory of its one image.
struct Machine {
    directory: tempfile::TempDir,
    store: Arc<ChunkStore>,
    runtime: Runtime,
}

static NUMBER: AtomicU64 = AtomicU64::new(1);

fn go_on(_: &'static str, _: u64, _: u64) -> Result<()> {
    Ok(())
}

fn root(image: &str, map: burgeon_store::ChunkId) -> NewRoot {
    NewRoot {
        kind: "image".into(),
        name: format!("{image}/{map}"),
        expected: None,
        map,
        relied: Vec::new(),
        expires_us: None,
        note: String::new(),
    }
}

impl Machine {
    fn new() -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let uuid = || u128::from(NUMBER.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
        let source = Source { now_us: Arc::new(|| 1_000_000), uuid: Arc::new(uuid) };
        let store = ChunkStore::open(&directory.path().join("store"), source).unwrap();
        fs::create_dir(directory.path().join("image")).unwrap();
        Machine { directory, store, runtime: Runtime::new().unwrap() }
    }

    fn image_directory(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Makes an image of a disk, a kernel and an initramfs.
    fn image(&self, disk: &[u8], digest: char) -> Image {
        let mut writer = Writer::new(&self.store);
        let map = ingest(&self.store, &mut writer, disk, Cutter::FastCdc16K, None, &mut |_| {}).unwrap().map;
        writer.finish(root("web", map.root())).unwrap();
        fs::write(self.image_directory().join(Image::KERNEL), [b"MZ".as_slice(), &noise(70_001, 9)].concat()).unwrap();
        fs::write(self.image_directory().join(Image::INITRAMFS), b"070701").unwrap();
        Image {
            format: Image::FORMAT,
            name: "web".into(),
            description: "a test".into(),
            boot: Boot::Agent,
            digest: String::from(digest).repeat(64),
            recipe: String::new(),
            kernel_release: "6.1".into(),
            disk: Some(ByteSize(map.length())),
            map: Some(map.root().to_string()),
            modules: Vec::new(),
            kernel_parameters: Vec::new(),
            init: "/sbin/init".into(),
            created_s: 7,
            history: Vec::new(),
        }
    }

    fn push(&self, image: &Image, address: &Address) -> Result<Pushed> {
        self.push_watched(image, address, &mut go_on)
    }

    fn push_watched(
        &self,
        image: &Image,
        address: &Address,
        watch: &mut burgeon_store::chunk_store::Watch<'_>,
    ) -> Result<Pushed> {
        let remote = Remote::create(address, self.runtime.handle().clone())?;
        let hold = format!("web/{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let pushed = push(&self.store, &remote, image, &self.image_directory(), &hold, watch);
        assert!(self.store.catalog().blocking_roots(Some("pushed")).unwrap().is_empty(), "a hold is left");
        pushed
    }

    /// The image's disk and files as they arrive.
    fn pull(&self, address: &Address, digest: Option<&str>) -> Result<(Image, Pulled, BTreeMap<String, Vec<u8>>)> {
        let remote = Remote::open(address, self.runtime.handle().clone())?;
        let manifest = remote.manifest("web", digest)?;
        let mut files = BTreeMap::new();
        let pulled = pull(
            &self.store,
            &remote,
            &manifest,
            |map| root("web", map),
            &mut |file, reader| {
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).unwrap();
                files.insert(file.name.clone(), bytes);
                Ok(())
            },
            &mut go_on,
        )?;
        let map = Map::open(&*self.store, manifest.image.map.as_ref().unwrap().parse()?)?;
        let mut disk = vec![0; usize::try_from(map.length()).unwrap()];
        self.store.read_map(&map, 0, &mut disk)?;
        files.insert(Image::DISK.into(), disk);
        Ok((manifest.image, pulled, files))
    }
}

fn disk() -> Vec<u8> {
    let mut disk = noise(1 << 20, 1);
    disk.resize(5 << 20, 0);
    disk.extend(noise(1 << 20, 2));
    disk
}

/// What holds of every remote.
fn travels(address: &Address) {
    let here = Machine::new();
    let first = here.image(&disk(), 'a');
    let error = Remote::open(address, here.runtime.handle().clone()).unwrap_err();
    assert_eq!((error.kind, error.hint.is_some()), (ErrorKind::NotFound, true), "{error}");

    // Broken off before the image was named: nobody sees it, and the next push finishes it.
    let mut broken_off = |phase: &'static str, _: u64, _: u64| match phase {
        "publish" => Err(Error::new(ErrorKind::Cancelled, "cancelled")),
        _ => Ok(()),
    };
    let error = here.push_watched(&first, address, &mut broken_off).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled);
    let there = Machine::new();
    assert_eq!(there.pull(address, None).unwrap_err().kind, ErrorKind::NotFound);
    let pushed = here.push(&first, address).unwrap();
    assert_eq!((pushed.new_chunks, pushed.sent_bytes), (0, 0), "all was there");
    assert!(pushed.chunks > 100 && pushed.bytes > 2 << 20, "{pushed:?}");
    assert_eq!(here.push(&first, address).unwrap(), pushed);

    let (image, pulled, files) = there.pull(address, None).unwrap();
    assert_eq!(image, first);
    assert!(files[Image::DISK] == disk());
    for file in [Image::KERNEL, Image::INITRAMFS] {
        assert_eq!(files[file], fs::read(here.image_directory().join(file)).unwrap(), "{file}");
    }
    assert_eq!((pulled.chunks, pulled.bytes, pulled.new_chunks), (pushed.chunks, pushed.bytes, pushed.chunks));
    assert_eq!(there.store.catalog().blocking_roots(Some("image")).unwrap().len(), 1);
    let (_, again, _) = there.pull(address, None).unwrap();
    assert_eq!((again.new_chunks, again.read_bytes, again.bytes), (0, 0, pulled.bytes));

    // A new version moves what is new in it.
    let mut changed = disk();
    changed[5 << 20..][..100].copy_from_slice(&noise(100, 3));
    let second = here.image(&changed, 'b');
    let pushed = here.push(&second, address).unwrap();
    assert!(pushed.new_chunks > 0 && pushed.new_bytes < 300_000, "{pushed:?}");
    let (image, pulled, files) = there.pull(address, None).unwrap();
    assert!(image == second && files[Image::DISK] == changed);
    assert_eq!((pulled.new_chunks, pulled.new_bytes), (pushed.new_chunks, pushed.new_bytes));
    let (image, ..) = Machine::new().pull(address, Some(&first.digest)).unwrap();
    assert_eq!(image, first);
    let error = there.pull(address, Some(&"c".repeat(64))).unwrap_err();
    assert!(error.kind == ErrorKind::NotFound && error.hint.is_some(), "{error}");
    assert_eq!(there.pull(address, Some("../x")).unwrap_err().kind, ErrorKind::Invalid);

    let remote = Remote::open(address, here.runtime.handle().clone()).unwrap();
    let listed = remote.images().unwrap();
    let rows: Vec<_> = listed.iter().map(|row| (row.digest.as_str(), row.latest, &row.problem)).collect();
    assert_eq!(rows, [(second.digest.as_str(), true, &None), (first.digest.as_str(), false, &None)]);
}

fn at(path: &Path) -> Address {
    Address { url: path.to_str().unwrap().into(), s3: None }
}

#[test]
fn images_travel_through_a_directory() {
    let root = tempfile::tempdir().unwrap();
    travels(&at(&root.path().join("remote")));
}

fn bucket(server: &Server, bucket: &str, secret: &str) -> Address {
    let access = S3Access {
        endpoint: Some(format!("http://127.0.0.1:{}", server.port)),
        region: "us-east-1".into(),
        access_key: "key".into(),
        secret_key: secret.into(),
        allow_http: true,
        certificate: None,
    };
    Address { url: format!("s3://{bucket}/of/images"), s3: Some(access) }
}

#[test]
fn images_travel_through_a_bucket() {
    let server = Server::start();
    travels(&bucket(&server, "burgeon", "secret"));
    assert!(server.root.path().join("burgeon/of/images/burgeon-remote.json").is_file());
}

#[test]
fn a_bucket_that_cannot_be_used_is_told_for_what_it_is() {
    let server = Server::start();
    let here = Machine::new();
    let image = here.image(&disk(), 'a');
    for (address, kind, hint) in [
        (bucket(&server, "burgeon", "wrong"), ErrorKind::Refused, "secret key"),
        (bucket(&server, "elsewhere", "secret"), ErrorKind::NotFound, "create the bucket elsewhere"),
    ] {
        for error in [here.push(&image, &address).unwrap_err(), here.pull(&address, None).unwrap_err()] {
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.hint.as_deref().unwrap().contains(hint), "{error:?}");
        }
    }
}

fn files_below(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            files_below(&entry, found);
        } else {
            found.push(entry);
        }
    }
}

#[test]
fn damage_in_a_remote_is_told_with_its_place_and_a_push_mends_it() {
    let root = tempfile::tempdir().unwrap();
    let address = at(root.path());
    let here = Machine::new();
    let image = here.image(&disk(), 'a');
    here.push(&image, &address).unwrap();
    let mut packs = Vec::new();
    files_below(&root.path().join("packs"), &mut packs);
    let [pack] = packs.as_slice() else { panic!("{packs:?}") };
    let good = fs::read(pack).unwrap();

    // A byte of a record.
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(pack, &bad).unwrap();
    let there = Machine::new();
    let error = there.pull(&address, None).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
    assert!(error.message.contains(pack.to_str().unwrap()) && error.message.contains("at byte"), "{error}");
    assert!(error.hint.as_deref().unwrap().contains("image push web"), "{error:?}");
    assert!(there.store.catalog().blocking_roots(None).unwrap().is_empty(), "something is left");

    // A pack that is cut short, and one that is gone.
    for cut in [Some(good.len() - 1), None] {
        match cut {
            Some(length) => fs::write(pack, &good[..length]).unwrap(),
            None => fs::remove_file(pack).unwrap(),
        }
        let error = there.pull(&address, None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged, "{error}");
        assert!(error.message.contains("is in no pack of"), "{error}");
        assert!(error.message.contains(&pack.file_name().unwrap().to_string_lossy().into_owned()), "{error}");
    }
    let pushed = here.push(&image, &address).unwrap();
    assert_eq!(pushed.new_chunks, pushed.chunks, "the pack is gone, so all is sent again");
    let (pulled, ..) = there.pull(&address, None).unwrap();
    assert_eq!(pulled, image);
}

#[test]
fn manifests_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let address = at(root.path());
    let here = Machine::new();
    let image = here.image(&disk(), 'a');
    here.push(&image, &address).unwrap();
    let manifest = root.path().join(format!("images/web/{}.json", image.digest));
    let good = fs::read_to_string(&manifest).unwrap();
    let there = Machine::new();
    let refused = |text: &str| {
        fs::write(&manifest, text).unwrap();
        there.pull(&address, None).unwrap_err()
    };
    let newer = refused(&good.replacen("\"format\": 1", "\"format\": 2", 1));
    assert!(newer.kind == ErrorKind::Refused && newer.hint.unwrap().contains("newer"), "{}", newer.message);
    let own = format!("\"format\": {}", Image::FORMAT);
    let newer = refused(&good.replacen(&own, "\"format\": 99", 1));
    assert!(
        newer.kind == ErrorKind::Refused && newer.message.contains("image.json has format 99"),
        "{}",
        newer.message
    );
    let map = image.map.clone().unwrap();
    let error = refused(&good.replace(&map, &"0".repeat(64)));
    assert!(error.kind == ErrorKind::Damaged && error.message.contains(&"0".repeat(64)), "{error}");
    assert!(error.hint.unwrap().contains("push"));
    for (what, text) in [
        ("nothing", String::new()),
        ("no format", good.replacen("\"format\": 1", "\"forma\": 1", 1)),
        ("another name", good.replace("\"name\": \"web\"", "\"name\": \"other\"")),
        ("a way out", good.replace(&format!("\"{}\"", Image::KERNEL), "\"../../x\"")),
        ("no map", good.replace(&map, "x")),
    ] {
        let error = refused(&text);
        assert_eq!(error.kind, ErrorKind::Damaged, "{what}: {error}");
        assert!(error.message.contains(&image.digest), "{what}: {error}");
    }
    let listed = Remote::open(&address, there.runtime.handle().clone()).unwrap().images().unwrap();
    assert!(listed[0].problem.is_some(), "{listed:?}");
    // What is damaged is written anew by who has it whole.
    here.push(&image, &address).unwrap();
    assert_eq!(there.pull(&address, None).unwrap().0, image);

    let others = tempfile::tempdir().unwrap();
    fs::write(others.path().join("letter"), "dear").unwrap();
    let error = here.push(&image, &at(others.path())).unwrap_err();
    assert!(error.kind == ErrorKind::Refused && error.hint.is_some(), "{error}");
    assert_eq!(fs::read_dir(others.path()).unwrap().count(), 1);
    let error = there.pull(&at(others.path()), None).unwrap_err();
    assert!(error.kind == ErrorKind::NotFound && error.message.contains("no remote of Burgeon"), "{error}");
    fs::write(others.path().join("oci-layout"), "{}").unwrap();
    assert!(there.pull(&at(others.path()), None).unwrap_err().hint.unwrap().contains("image import"));
    let nowhere = others.path().join("nowhere");
    assert_eq!(there.pull(&at(&nowhere), None).unwrap_err().kind, ErrorKind::NotFound);
    assert!(!nowhere.exists());
}
