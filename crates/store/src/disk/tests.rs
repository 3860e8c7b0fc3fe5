use std::{collections::BTreeMap, fs};

use proptest::prelude::*;

use super::*;
use crate::{
    catalog::NewRoot,
    chunk_store::{Source, Writer, ingest},
    cut::Cutter,
};

fn nothing(_: Option<ChunkId>, _: Option<ChunkId>) -> Result<Arc<dyn Base>> {
    Ok(Arc::new(Nothing))
}

const SIZE: u64 = 300 * 1024 + 512;
/// The image below is shorter than the disk.
const IMAGE: usize = 200_192;

/// A store with an image in it, and the caches of maps.
struct Lab {
    directory: tempfile::TempDir,
    store: Arc<ChunkStore>,
    image: ChunkId,
    picture: Vec<u8>,
}

impl Lab {
    fn new() -> Lab {
        // In memory where that is possible: a power cut is played here, and real syncs would only cost time.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let count = std::sync::atomic::AtomicU64::new(1);
        let uuid = move || u128::from(count.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
        let source = Source { now_us: Arc::new(|| 1), uuid: Arc::new(uuid) };
        let store = ChunkStore::open(&directory.path().join("store"), source).unwrap();
        let mut picture = crate::testing::noise(1, IMAGE);
        picture[60_000..100_000].fill(0);
        let mut writer = Writer::new(&store);
        let map = ingest(&store, &mut writer, &picture[..], Cutter::FastCdc16K, None, &mut |_| {}).unwrap().map;
        writer.flush().unwrap();
        Lab { directory, store, image: map.root(), picture }
    }

    fn cache(&self, root: ChunkId) -> PathBuf {
        self.directory.path().join(format!("cache-{root}"))
    }

    fn base(&self, root: Option<ChunkId>, origin: Option<ChunkId>) -> Result<Arc<dyn Base>> {
        assert_eq!(origin, Some(self.image));
        let Some(root) = root else { return Ok(Arc::new(Nothing)) };
        let open = |root, parent| ImageBase::open(self.store.clone(), root, &self.cache(root), parent).map(Arc::new);
        let parent = (root != self.image).then(|| open(self.image, None)).transpose()?;
        Ok(open(root, parent)?)
    }

    fn open(&self, directory: &Path) -> Disk {
        Disk::open(directory, &|root, origin| self.base(root, origin)).unwrap()
    }

    /// Stores the next sealed layer of the disk.
    fn absorb(&self, disk: &Disk) {
        let record = disk.record();
        let Some((base, layer)) = record.unstored() else { return };
        let root = |map| NewRoot {
            kind: "disk".into(),
            name: format!("{}/{map}", disk.directory().display()),
            expected: None,
            map,
            relied: Vec::new(),
            expires_us: None,
            note: String::new(),
        };
        let path = disk.directory().join(layer);
        let (map, _) = absorb(&self.store, base, &path, root, &mut |_, _, _| Ok(())).unwrap();
        let mut retire = |path: &Path| {
            for extension in ["data", "map"] {
                fs::rename(path.with_extension(extension), self.cache(map.root()).with_extension(extension)).unwrap();
            }
        };
        disk.stored(base, layer, map.root(), &mut retire, &|root, origin| self.base(root, origin)).unwrap();
    }
}

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write {
        offset: u64,
        length: u64,
        byte: u8,
    },
    Zero {
        offset: u64,
        length: u64,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    Flush,
    Seal,
    Snapshot,
    /// Store a sealed layer.
    Absorb,
    /// Go on with a clone, and leave the disk behind.
    Clone,
    RollBack {
        snapshot: usize,
    },
    Grow {
        by: u64,
    },
    Reopen,
    PowerCut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..SIZE / 512, 1_u64..200).prop_map(|(start, count)| {
        let offset = start * 512;
        (offset, (count * 512).min(SIZE - offset))
    });
    let step = prop_oneof![
        8 => (range.clone(), 1_u8..).prop_map(|((offset, length), byte)| Step::Write { offset, length, byte }),
        3 => range.clone().prop_map(|(offset, length)| Step::Zero { offset, length }),
        1 => range.prop_map(|(offset, length)| Step::Trim { offset, length }),
        2 => Just(Step::Flush),
        1 => Just(Step::Seal),
        2 => Just(Step::Snapshot),
        2 => Just(Step::Absorb),
        1 => Just(Step::Clone),
        1 => (0_usize..4).prop_map(|snapshot| Step::RollBack { snapshot }),
        1 => (1_u64..20).prop_map(|by| Step::Grow { by: by * 512 }),
        1 => Just(Step::Reopen),
        1 => Just(Step::PowerCut),
    ];
    prop::collection::vec(step, 1..40)
}

/// What a power cut leaves of layers and caches at worst: the synced states; of the data, whatever was written. The
/// kernel may have brought any of the rest to the disk, so the live states are made nonsense.
fn cut_power(directory: &Path) {
    for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if path.extension().is_none_or(|extension| extension != "map") {
            continue;
        }
        let mut map = fs::read(&path).unwrap();
        let size = u64::from_le_bytes(map[16..24].try_into().unwrap());
        let words = usize::try_from(size).unwrap().div_ceil(4096).div_ceil(32) * 8;
        map[4096..4096 + words].fill(0x55);
        // Another boot.
        map[24..40].fill(7);
        let check = crc32fast::hash(&map[..56]);
        map[56..60].copy_from_slice(&check.to_le_bytes());
        fs::write(&path, map).unwrap();
    }
}

/// A disk beside a plain vector of bytes.
struct Pair<'a> {
    lab: &'a Lab,
    directory: PathBuf,
    disk: Option<Disk>,
    model: Vec<u8>,
    /// What is promised after a power cut, and for each sector what it may be instead: it was written since.
    flushed: Vec<u8>,
    since: BTreeMap<usize, Vec<Vec<u8>>>,
    snapshots: Vec<(String, Vec<u8>)>,
    clones: usize,
}

impl Pair<'_> {
    fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    fn is_flushed(&mut self) {
        self.flushed.clone_from(&self.model);
        self.since.clear();
    }

    fn changed(&mut self, offset: u64, length: u64) {
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
        for sector in from / 512..to.div_ceil(512) {
            let bytes = self.model[sector * 512..sector * 512 + 512].to_vec();
            self.since.entry(sector).or_default().push(bytes);
        }
    }

    fn fill(&mut self, range: Range<u64>, byte: u8) {
        self.model[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(byte);
    }

    fn reopen(&mut self) {
        self.disk = None;
        self.disk = Some(self.lab.open(&self.directory));
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Write { offset, length, byte } => {
                self.disk().write(offset, &vec![byte; usize::try_from(length).unwrap()]).unwrap();
                self.fill(offset..offset + length, byte);
                self.changed(offset, length);
            }
            Step::Zero { offset, length } => {
                self.disk().zero(offset, length).unwrap();
                self.fill(offset..offset + length, 0);
                self.changed(offset, length);
            }
            Step::Trim { offset, length } => {
                self.disk().trim(offset, length).unwrap();
                let size = self.disk().size();
                let end = if offset + length == size { size } else { (offset + length) / 4096 * 4096 };
                let start = offset.next_multiple_of(4096);
                if start < end {
                    self.fill(start..end, 0);
                }
                self.changed(offset, length);
            }
            Step::Flush => {
                self.disk().flush().unwrap();
                self.is_flushed();
            }
            Step::Seal => {
                self.disk().seal().unwrap();
                self.is_flushed();
            }
            Step::Snapshot => {
                let name = format!("s{}", self.snapshots.len());
                self.disk().snapshot(&name, 1).unwrap();
                self.snapshots.push((name, self.model.clone()));
                self.is_flushed();
            }
            Step::Absorb => self.lab.absorb(self.disk()),
            Step::Clone => {
                self.clones += 1;
                let directory = self.directory.with_extension(self.clones.to_string());
                fs::create_dir(&directory).unwrap();
                let mut kept = Vec::new();
                let mut keep = |map| {
                    kept.push(map);
                    Ok(())
                };
                let open_base = |root, origin| self.lab.base(root, origin);
                let clone = self.disk().clone_to(&directory, None, &mut keep, &open_base).unwrap();
                assert!(clone.record().maps().iter().all(|map| kept.contains(map)));
                // What happens to the source is nothing to the clone.
                self.disk().write(0, &[0xcc; 8192]).unwrap();
                self.disk = None;
                fs::remove_dir_all(&self.directory).unwrap();
                (self.disk, self.directory) = (Some(clone), directory);
                self.snapshots.clear();
                self.is_flushed();
            }
            Step::RollBack { snapshot } => {
                let Some((name, held)) = self.snapshots.get(snapshot) else { return };
                self.disk().roll_back(name, &|root, origin| self.lab.base(root, origin)).unwrap();
                self.model.clone_from(held);
                self.is_flushed();
            }
            Step::Grow { by } => {
                let size = self.disk().size() + by;
                self.disk().grow(size).unwrap();
                self.model.resize(usize::try_from(size).unwrap(), 0);
                self.is_flushed();
            }
            // As after kill -9: nothing was flushed for it.
            Step::Reopen => self.reopen(),
            Step::PowerCut => {
                self.disk = None;
                cut_power(&self.directory);
                cut_power(self.lab.directory.path());
                self.reopen();
                self.model = contents(self.disk());
                assert_eq!(self.model.len(), self.flushed.len());
                for (sector, bytes) in self.model.chunks(512).enumerate() {
                    let old = &self.flushed[sector * 512..sector * 512 + 512];
                    let allowed = old == bytes
                        || self.since.get(&sector).is_some_and(|written| written.iter().any(|new| new == bytes));
                    assert!(allowed, "sector {sector} holds what it never held since the last flush");
                }
                self.disk().flush().unwrap();
                self.is_flushed();
            }
        }
        assert!(contents(self.disk()) == self.model);
    }

    fn check(&self) {
        // What lies where adds up, and tells the truth.
        let (mut at, size) = (0, self.disk().size());
        while at < size {
            let (extent, length) = self.disk().extent(at, size).unwrap();
            let range = usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap();
            assert!(extent != Extent::Zero || self.model[range].iter().all(|byte| *byte == 0));
            at += length;
        }
        for (name, held) in &self.snapshots {
            // Where something differs from a snapshot, that is told.
            let record = self.disk().record();
            let snapshot = record.snapshot(name).unwrap();
            let changes = self.disk().changes(&self.lab.store, snapshot, None).unwrap();
            for (at, (now, then)) in (0..).zip(self.model.iter().zip(held)) {
                assert!(now == then || changes.iter().any(|range| range.contains(&at)), "{at} differs from {name}");
            }
        }
        for (name, held) in &self.snapshots {
            self.disk().roll_back(name, &|root, origin| self.lab.base(root, origin)).unwrap();
            assert!(contents(self.disk()) == *held, "{name} holds something else");
        }
    }
}

/// Through snapshots, clones, stores, kills and power cuts.
#[test]
fn a_disk_is_as_a_vector() {
    let lab = Lab::new();
    let config = ProptestConfig { cases: 300, source_file: Some(file!()), ..ProptestConfig::default() };
    let case = std::cell::Cell::new(0);
    let outcome = proptest::test_runner::TestRunner::new(config).run(&steps(), |steps| {
        case.set(case.get() + 1);
        let directory = lab.directory.path().join(format!("disk-{}", case.get()));
        fs::create_dir(&directory).unwrap();
        let below = Stack { base: Some(lab.image), layers: Vec::new() };
        let disk = Disk::create(&directory, SIZE, below, &|root, origin| lab.base(root, origin)).unwrap();
        let mut model = lab.picture.clone();
        model.resize(usize::try_from(SIZE).unwrap(), 0);
        let mut pair = Pair {
            lab: &lab,
            directory,
            disk: Some(disk),
            flushed: model.clone(),
            model,
            since: BTreeMap::new(),
            snapshots: Vec::new(),
            clones: 0,
        };
        steps.into_iter().for_each(|step| pair.run(step));
        pair.check();
        fs::remove_dir_all(&pair.directory).unwrap();
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn foreign_files_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    Disk::create(directory.path(), SIZE, Stack::default(), &nothing).unwrap().write(0, b"text").unwrap();
    let path = directory.path().join("layer-0.map");
    let good = fs::read(&path).unwrap();
    let refused = |path: &Path, bytes: &[u8]| {
        let good = fs::read(path).unwrap();
        fs::write(path, bytes).unwrap();
        let error = Disk::open(directory.path(), &nothing).map(drop).unwrap_err().to_string();
        fs::write(path, good).unwrap();
        error
    };
    let mut newer = good.clone();
    newer[8] = 2;
    assert!(refused(&path, &newer).contains("version 2"));
    assert!(refused(&path, b"BgnLaye").contains("damaged"));
    assert!(refused(&path, &good[..4120]).contains("cut short"));
    let mut flipped = good.clone();
    flipped[17] ^= 1;
    assert!(refused(&path, &flipped).contains("does not fit"));
    let record = directory.path().join("disk.record");
    assert!(refused(&record, b"").contains("no line of it is whole"));
    assert!(refused(&record, b"00000000 {}\n").contains("no line of it is whole"));
    let text = fs::read_to_string(&record).unwrap()[9..].trim_end().replace("\"format\":1", "\"format\":2");
    let newer = format!("{:08x} {text}\n", crc32fast::hash(text.as_bytes()));
    assert!(refused(&record, newer.as_bytes()).contains("version 2"));
    // A layer that was sealed cannot be missing.
    let disk = Disk::open(directory.path(), &nothing).unwrap();
    disk.snapshot("one", 1).unwrap();
    drop(disk);
    fs::remove_file(&path).unwrap();
    assert!(Disk::open(directory.path(), &nothing).map(drop).unwrap_err().to_string().contains("it is gone"));
    let none = Disk::open(&directory.path().join("none"), &nothing).map(drop).unwrap_err();
    assert_eq!(none.kind, burgeon_api::ErrorKind::NotFound);
}

#[test]
fn writers_side_by_side_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::create(directory.path(), SIZE, Stack::default(), &nothing).unwrap();
    // Eight writers share each block, and all of them find it absent at first; meanwhile the disk is sealed.
    std::thread::scope(|scope| {
        for writer in 0..8_u8 {
            let disk = &disk;
            scope.spawn(move || {
                for block in 0..70 {
                    disk.write(block * 4096 + u64::from(writer) * 512, &[writer + 1; 512]).unwrap();
                    if block % 16 == u64::from(writer) {
                        disk.flush().unwrap();
                    }
                }
            });
        }
        scope.spawn(|| (0..8).for_each(|_| drop(disk.seal().unwrap())));
    });
    drop(disk);
    let reopened = Disk::open(directory.path(), &nothing).unwrap();
    for (sector, bytes) in contents(&reopened)[..70 * 4096].chunks(512).enumerate() {
        assert!(bytes.iter().all(|byte| usize::from(*byte) == sector % 8 + 1), "sector {sector}");
    }
}

#[test]
fn an_image_below_is_fetched_once() {
    let directory = tempfile::tempdir().unwrap();
    let source = Source { now_us: Arc::new(|| 1), uuid: Arc::new(|| [1; 16]) };
    let store = ChunkStore::open(&directory.path().join("store"), source).unwrap();
    let mut picture = crate::testing::noise(1, (9 << 20) + 512);
    picture[1 << 20..2 << 20].fill(0);
    picture[5_000_000..5_000_900].fill(0);
    let mut writer = Writer::new(&store);
    let ingested = ingest(&store, &mut writer, &picture[..], Cutter::FastCdc16K, None, &mut |_| {}).unwrap();
    writer.flush().unwrap();
    let cache = directory.path().join("cache");
    let base = Arc::new(ImageBase::open(store.clone(), ingested.map.root(), &cache, None).unwrap());
    assert!(!base.is_near(0..512) && base.fetched_bytes() == 0);
    let of_image = |_, _| Ok::<Arc<dyn Base>, Error>(base.clone());
    fs::create_dir(directory.path().join("disk")).unwrap();
    let disk = Disk::create(&directory.path().join("disk"), 12 << 20, Stack::default(), &of_image).unwrap();
    // Here and there, in pieces that fit nothing.
    let mut seeded = crate::testing::Seeded::new(3);
    for _ in 0..400 {
        let offset = seeded.below(picture.len() / 512 - 1) * 512;
        let length = (seeded.below(60_000) + 1).min(picture.len() - offset);
        let mut bytes = vec![7; length];
        disk.read(offset as u64, &mut bytes).unwrap();
        assert!(bytes == picture[offset..offset + length], "{offset} {length}");
        assert!(disk.is_near(offset as u64, length as u64));
    }
    let mut bytes = contents(&disk);
    assert!(bytes[picture.len()..].iter().all(|byte| *byte == 0));
    bytes.truncate(picture.len());
    assert!(bytes == picture);
    assert_eq!(disk.extent(1 << 20, 2 << 20).unwrap().0, Extent::Zero);
    let fetched = base.fetched_bytes();
    contents(&disk);
    assert_eq!(base.fetched_bytes(), fetched, "nothing is fetched twice");
    // The next start of the same image, on another machine: what the first one read is there before it is asked for.
    let other = ImageBase::open(store, ingested.map.root(), &directory.path().join("other"), None).unwrap();
    other.prefetch(&base.trace()).unwrap();
    assert!(other.is_near(0..other.length()));
}
