use std::{collections::BTreeMap, fs};

use proptest::prelude::*;

use super::*;

/// A base whose bytes tell where they are.
struct Pattern(u64);

impl Pattern {
    fn byte(&self, at: u64) -> u8 {
        // The second half of each 16 KiB is zeros.
        if at >= self.0 || at % 16_384 >= 8192 { 0 } else { u8::try_from(at / 512 % 251).unwrap() | 1 }
    }
}

impl Base for Pattern {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = self.byte(at));
        Ok(())
    }

    fn run(&self, range: Range<u64>) -> io::Result<(bool, u64)> {
        let zero = self.byte(range.start) == 0;
        let length = range.clone().take_while(|at| (self.byte(*at) == 0) == zero).count() as u64;
        Ok((zero, length))
    }

    fn is_near(&self, _: Range<u64>) -> bool {
        true
    }
}

const SIZE: u64 = 300 * 1024 + 512;
const BYTES: usize = 300 * 1024 + 512;

fn open(directory: &Path, layers: &[String]) -> Disk {
    Disk::open(directory, SIZE, layers, Arc::new(Pattern(200_000))).unwrap()
}

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

#[derive(Clone, Debug)]
enum Step {
    Write { offset: u64, length: u64, byte: u8 },
    Zero { offset: u64, length: u64 },
    Trim { offset: u64, length: u64 },
    Flush,
    Seal,
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
        1 => Just(Step::Reopen),
        1 => Just(Step::PowerCut),
    ];
    prop::collection::vec(step, 1..40)
}

/// What a power cut leaves of a layer at worst: the synced states; of the data, whatever was written. The kernel may
/// have brought any of the rest to the disk, so the live states are made nonsense.
fn cut_power(directory: &Path, layer: &str) {
    let path = directory.join(layer).with_extension("map");
    let mut map = fs::read(&path).unwrap();
    let words = BYTES.div_ceil(4096).div_ceil(32) * 8;
    map[4096..4096 + words].fill(0x55);
    // Another boot.
    map[24..40].fill(7);
    let check = crc32fast::hash(&map[..56]);
    map[56..60].copy_from_slice(&check.to_le_bytes());
    fs::write(&path, map).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// The disk beside a plain vector of bytes, through kills and power cuts.
    #[test]
    fn a_disk_is_as_a_vector(steps in steps()) {
        let directory = tempfile::tempdir().unwrap();
        let mut layers = vec!["layer-0".to_string()];
        let mut disk = open(directory.path(), &layers);
        let mut model = contents(&disk);
        // What is promised after a power cut, and for each block what it may be instead: it was written since.
        let mut flushed = model.clone();
        let mut since: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
        let mut sealed: Vec<Vec<u8>> = Vec::new();
        for step in steps {
            let position = |at: u64| usize::try_from(at).unwrap();
            let mut changed = None;
            match step {
                Step::Write { offset, length, byte } => {
                    disk.write(offset, &vec![byte; position(length)]).unwrap();
                    model[position(offset)..position(offset + length)].fill(byte);
                    changed = Some((offset, length));
                }
                Step::Zero { offset, length } => {
                    disk.zero(offset, length).unwrap();
                    model[position(offset)..position(offset + length)].fill(0);
                    changed = Some((offset, length));
                }
                Step::Trim { offset, length } => {
                    disk.trim(offset, length).unwrap();
                    let end = if offset + length == SIZE { SIZE } else { (offset + length) / 4096 * 4096 };
                    let start = offset.next_multiple_of(4096);
                    if start < end {
                        model[position(start)..position(end)].fill(0);
                    }
                    changed = Some((offset, length));
                }
                Step::Flush => {
                    disk.flush().unwrap();
                    flushed = model.clone();
                    since.clear();
                }
                Step::Seal => {
                    layers.push(format!("layer-{}", layers.len()));
                    disk.seal(layers.last().unwrap()).unwrap();
                    sealed.push(model.clone());
                    flushed = model.clone();
                    since.clear();
                }
                Step::Reopen => {
                    // As after kill -9: nothing was flushed for it.
                    drop(disk);
                    disk = open(directory.path(), &layers);
                }
                Step::PowerCut => {
                    drop(disk);
                    cut_power(directory.path(), layers.last().unwrap());
                    disk = open(directory.path(), &layers);
                    let found = contents(&disk);
                    for (block, bytes) in found.chunks(512).enumerate() {
                        let old = &flushed[block * 512..block * 512 + bytes.len()];
                        let allowed = old == bytes
                            || since.get(&block).is_some_and(|written| written.iter().any(|new| new == bytes));
                        prop_assert!(allowed, "sector {block} holds what it never held since the last flush");
                    }
                    model = found;
                    disk.flush().unwrap();
                    flushed = model.clone();
                    since.clear();
                }
            }
            if let Some((offset, length)) = changed {
                for block in position(offset) / 512..position(offset + length).div_ceil(512) {
                    since.entry(block).or_default().push(model[block * 512..(block * 512 + 512).min(model.len())].to_vec());
                }
            }
            prop_assert!(contents(&disk) == model);
        }
        // What lies where adds up, and tells the truth.
        let mut at = 0;
        while at < SIZE {
            let (extent, length) = disk.extent(at, SIZE).unwrap();
            let range = usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap();
            prop_assert!(extent != Extent::Zero || model[range].iter().all(|byte| *byte == 0));
            at += length;
        }
        // Sealed layers hold what the disk held then.
        for (count, old) in sealed.iter().enumerate() {
            let below = open(directory.path(), &layers[..=count]);
            prop_assert!(contents(&below) == *old);
        }
    }
}

#[test]
fn foreign_files_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let layers = ["one".to_string()];
    open(directory.path(), &layers).write(0, b"text").unwrap();
    let path = directory.path().join("one.map");
    let good = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Disk::open(directory.path(), SIZE, &layers, Arc::new(Nothing)).map(drop).unwrap_err().to_string()
    };
    let mut newer = good.clone();
    newer[8] = 2;
    assert!(refused(&newer).contains("version 2"));
    assert!(refused(b"BgnLaye").contains("damaged"));
    assert!(refused(&good[..4120]).contains("cut short"));
    let mut flipped = good.clone();
    flipped[17] ^= 1;
    assert!(refused(&flipped).contains("does not fit"));
    fs::write(&path, &good).unwrap();
    assert!(Disk::open(directory.path(), SIZE * 2, &layers, Arc::new(Nothing)).is_err());
}

#[test]
fn a_disk_grows_by_a_layer() {
    let directory = tempfile::tempdir().unwrap();
    let names = ["small".to_string(), "large".to_string()];
    let small = open(directory.path(), &names[..1]);
    small.write(SIZE - 512, &[9; 512]).unwrap();
    small.flush().unwrap();
    let large = Disk::open(directory.path(), SIZE * 3, &names, Arc::new(Pattern(200_000))).unwrap();
    let bytes = contents(&large);
    assert_eq!(bytes[..BYTES], contents(&small));
    assert!(bytes[BYTES..].iter().all(|byte| *byte == 0));
    large.write(SIZE, &[8; 4096]).unwrap();
    assert_eq!(contents(&large)[BYTES..][..4097], [[8; 4096].as_slice(), &[0]].concat());
}

#[test]
fn writers_side_by_side_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let disk = open(directory.path(), &["one".to_string()]);
    // Eight writers share each block; all of them find it absent at first.
    std::thread::scope(|scope| {
        for writer in 0..8_u8 {
            let disk = &disk;
            scope.spawn(move || {
                for block in 0..70 {
                    disk.write(block * 4096 + u64::from(writer) * 512, &[writer + 1; 512]).unwrap();
                }
            });
        }
    });
    let reopened = open(directory.path(), &["one".to_string()]);
    for (sector, bytes) in contents(&reopened)[..70 * 4096].chunks(512).enumerate() {
        assert!(bytes.iter().all(|byte| usize::from(*byte) == sector % 8 + 1), "sector {sector}");
    }
}

#[test]
fn an_image_below_is_fetched_once() {
    use crate::chunk_store::{ChunkStore, Source, Writer, ingest};
    let directory = tempfile::tempdir().unwrap();
    let source = Source { now_us: Arc::new(|| 1), uuid: Arc::new(|| [1; 16]) };
    let store = ChunkStore::open(&directory.path().join("store"), source).unwrap();
    let mut picture = crate::testing::noise(1, (9 << 20) + 512);
    picture[1 << 20..2 << 20].fill(0);
    picture[5_000_000..5_000_900].fill(0);
    let mut writer = Writer::new(&store);
    let cutter = crate::cut::Cutter::FastCdc16K;
    let ingested = ingest(&store, &mut writer, &picture[..], cutter, None, &mut |_| {}).unwrap();
    writer.flush().unwrap();
    let cache = directory.path().join("cache");
    let base = Arc::new(ImageBase::open(store.clone(), ingested.map.root(), &cache).unwrap());
    assert!(!base.is_near(0..512) && base.fetched_bytes() == 0);
    let disk = Disk::open(directory.path(), 12 << 20, &["top".into()], base.clone()).unwrap();
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
    let other = ImageBase::open(store, ingested.map.root(), &directory.path().join("other")).unwrap();
    other.prefetch(&base.trace()).unwrap();
    assert!(other.is_near(0..other.length()));
}
