//! Figures of the store, which is linked in as a library: chunks in and out, the cache of an image, a rebuilt image.
//! The rivals are the raw mechanisms.

use std::{
    collections::HashSet,
    fs::{self, File},
    hint::black_box,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use burgeon_api::VmId;
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    chunk::is_zero,
    chunk_store::{ChunkStore, MapBytes, Source, Writer, Written},
    cut::Cutter,
    disk::{Base, Disk, ImageBase, Stack},
    map::Map,
};

use crate::{
    figures::{Outcome, take_turns},
    material::{Noise, cpu_seconds, files, library, millions},
    report::Samples,
    workspace::{self, Workspace},
};

/// Data of the figures that read and write much.
const DATA: usize = 256 << 20;
const BLOCK: usize = 4096;
/// Bytes of the raw mechanism's pieces: what the store's chunks have on the average.
const PIECE: usize = 16 << 10;
const LEVEL: i32 = 1;
/// Bytes of a read of a disk.
const READ: usize = 64 << 10;
/// Bytes of the tree that is made into an image twice.
const TREE: u64 = 150 << 20;
const TREE_IMAGE: &str = "400M";
const NEW_FILE: usize = 4_000_000;

/// The clock and the random numbers of a store.
#[expect(clippy::disallowed_methods, reason = "the store under measurement is told the time by its owner")]
fn source() -> Source {
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    };
    Source { now_us: Arc::new(now), uuid: Arc::new(|| *VmId::generate().uuid().as_bytes()) }
}

pub(crate) fn open(directory: &Path) -> Result<Arc<ChunkStore>> {
    Ok(ChunkStore::open(directory, source())?)
}

/// An empty directory of that name.
pub(crate) fn fresh(workspace: &Workspace, name: &str) -> Result<std::path::PathBuf> {
    let directory = workspace.path(name);
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir(&directory)?;
    Ok(directory)
}

/// As an image's disk is stored.
fn keep(store: &ChunkStore, name: &str, reader: impl Read, base: Option<Map>) -> Result<(Map, Written)> {
    let mut writer = Writer::new(store);
    let cutter = Cutter::FastCdc16K;
    let map = burgeon_store::chunk_store::ingest(store, &mut writer, reader, cutter, base, &mut |_| {})?.map;
    let root = NewRoot {
        kind: "bench".into(),
        name: name.into(),
        expected: None,
        map: map.root(),
        relied: Vec::new(),
        expires_us: None,
        note: String::new(),
    };
    Ok((map, writer.finish(root)?))
}

/// The map of an image that the product keeps; `None` for one without a disk there.
pub(crate) fn image(workspace: &Workspace, name: &str) -> Result<Option<(Arc<ChunkStore>, Map)>> {
    let text = fs::read(workspace.data().join("images").join(name).join("image.json")).context("read the image")?;
    let image: serde_json::Value = serde_json::from_slice(&text)?;
    let Some(root) = image["map"].as_str() else { return Ok(None) };
    let store = open(&workspace.data().join("store"))?;
    let map = Map::open(&*store, root.parse()?)?;
    Ok(Some((store, map)))
}

/// Writes a map's bytes to a file, with holes where it has zeros.
pub(crate) fn export(store: &ChunkStore, map: Map, path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(map.length())?;
    let mut reader = MapBytes::new(store, map);
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let count = reader.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        for piece in buffer[..count].chunks(READ) {
            if !is_zero(piece) {
                file.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
    }
}

/// Bytes of a map that are not zeros.
pub(crate) fn data_bytes(store: &ChunkStore, map: &Map) -> Result<u64> {
    let pieces = map.lookup(store, 0..map.length())?;
    Ok(pieces.iter().filter(|piece| piece.source.is_some()).map(|piece| piece.range.end - piece.range.start).sum())
}

fn nonzero(data: &[u8]) -> u64 {
    data.chunks(BLOCK).filter(|block| !is_zero(block)).map(|block| block.len() as u64).sum()
}

/// Runs `work` and makes `bytes` a rate: millions in a second of CPU time. The rate by the clock goes to `walls`.
fn rate_of_cpu(bytes: u64, walls: &mut Vec<f64>, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (cpu, begun) = (cpu_seconds(None)?, Instant::now());
    work()?;
    walls.push(millions(bytes) / begun.elapsed().as_secs_f64());
    Ok(millions(bytes) / (cpu_seconds(None)? - cpu).max(0.01))
}

fn median(values: Vec<f64>) -> f64 {
    Samples { ours: values, theirs: Vec::new() }.median()
}

/// A piece as the raw mechanism keeps it: its hash, its length, its bytes compressed.
type Raw = ([u8; 32], usize, Vec<u8>);

fn raw_encode(data: &[u8]) -> Result<Vec<Raw>> {
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    let encode = |piece: &[u8]| Ok((*blake3::hash(piece).as_bytes(), piece.len(), compressor.compress(piece)?));
    data.chunks(PIECE).filter(|piece| !is_zero(piece)).map(encode).collect()
}

fn raw_decode(pieces: &[Raw]) -> Result<()> {
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    for (hash, length, stored) in pieces {
        let plain = decompressor.decompress(stored, *length)?;
        ensure!(blake3::hash(black_box(&plain)).as_bytes() == hash, "the raw mechanism made other bytes");
    }
    Ok(())
}

pub(crate) fn ingest(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let data = library(DATA)?;
    let bytes = nonzero(&data);
    let (mut walls, mut their_walls) = (Vec::new(), Vec::new());
    let ours = || {
        let store = open(&fresh(workspace, "ingest")?)?;
        rate_of_cpu(bytes, &mut walls, || keep(&store, "data", &data[..], None).map(drop))
    };
    let mut theirs =
        || rate_of_cpu(bytes, &mut their_walls, || raw_encode(&data).map(|pieces| drop(black_box(pieces))));
    let samples = take_turns(runs, |rate| rate, ours, Some(&mut theirs))?;
    fs::remove_dir_all(workspace.path("ingest"))?;
    let more = [("data_mb", millions(bytes)), ("wall_mb_s", median(walls)), ("rival_wall_mb_s", median(their_walls))];
    Ok(Outcome::of(samples).with(more))
}

pub(crate) fn cold_read(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let data = library(DATA)?;
    let bytes = nonzero(&data);
    let directory = fresh(workspace, "cold-read")?;
    let (map, _) = keep(&*open(&directory)?, "data", &data[..], None)?;
    let pieces = raw_encode(&data)?;
    let mut copy = vec![0; data.len()];
    MapBytes::new(&*open(&directory)?, map).read_exact(&mut copy)?;
    ensure!(copy == data, "the store gave other bytes than it got");
    drop((data, copy));
    let (mut walls, mut their_walls) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 1 << 20];
    let ours = || {
        rate_of_cpu(bytes, &mut walls, || {
            let store = open(&directory)?;
            let map = Map::open(&*store, map.root())?;
            let mut reader = MapBytes::new(&store, map);
            while reader.read(&mut buffer)? > 0 {
                black_box(&buffer);
            }
            Ok(())
        })
    };
    let mut theirs = || rate_of_cpu(bytes, &mut their_walls, || raw_decode(&pieces));
    let samples = take_turns(runs, |rate| rate, ours, Some(&mut theirs))?;
    fs::remove_dir_all(directory)?;
    let more = [("data_mb", millions(bytes)), ("wall_mb_s", median(walls)), ("rival_wall_mb_s", median(their_walls))];
    Ok(Outcome::of(samples).with(more))
}

/// Reads all of something, piece by piece; the rate in millions of bytes in a second.
fn read_through(length: u64, read: impl Fn(u64, &mut [u8]) -> io::Result<()>) -> Result<f64> {
    let mut buffer = vec![0; READ];
    let begun = Instant::now();
    let mut at = 0;
    while at < length {
        let count = usize::try_from(length - at).unwrap_or(READ).min(READ);
        read(at, &mut buffer[..count])?;
        black_box(&buffer);
        at += count as u64;
    }
    Ok(millions(length) / begun.elapsed().as_secs_f64())
}

pub(crate) fn cache_read(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let data = library(DATA)?;
    let directory = fresh(workspace, "cache-read")?;
    let store = open(&directory.join("store"))?;
    let (map, _) = keep(&store, "data", &data[..], None)?;
    fs::create_dir(directory.join("disk"))?;
    let base = Arc::new(ImageBase::open(store, map.root(), &directory.join("cache"), None)?);
    let of_map = |_, _| Ok::<Arc<dyn Base>, burgeon_api::Error>(base.clone());
    let disk = Disk::create(&directory.join("disk"), map.length(), Stack::default(), &of_map)?;
    fs::write(directory.join("plain"), &data)?;
    let plain = File::open(directory.join("plain"))?;
    // The first read of all, which fills the cache.
    let first = read_through(data.len() as u64, |at, bytes| disk.read(at, bytes))?;
    let fetched = base.fetched_bytes();
    let length = data.len() as u64;
    let samples = take_turns(
        runs,
        |rate| rate,
        || read_through(length, |at, bytes| disk.read(at, bytes)),
        Some(&mut || read_through(length, |at, bytes| plain.read_exact_at(bytes, at))),
    )?;
    ensure!(base.fetched_bytes() == fetched, "the second read went to the store again");
    drop(disk);
    fs::remove_dir_all(directory)?;
    Ok(Outcome::of(samples).with([("first_read_mb_s", first)]))
}

/// Copies files to a new tree until there are about [`TREE`] bytes.
fn copy_tree(to: &Path) -> Result<()> {
    let mut sources: Vec<_> = fs::read_dir("/usr/lib")?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path())
        .collect();
    sources.sort();
    sources.push("/usr/share".into());
    let mut sum = 0;
    for path in sources.iter().flat_map(|source| files(source)) {
        let Ok(content) = fs::read(&path) else { continue };
        let target = to.join(path.strip_prefix("/usr")?);
        fs::create_dir_all(target.parent().context("a file without a directory")?)?;
        fs::write(&target, &content)?;
        sum += content.len() as u64;
        if sum >= TREE {
            break;
        }
    }
    Ok(())
}

/// A file system of a tree, by mke2fs. The same tree gives the same bytes, but for the times of its files.
fn file_system(workspace: &Workspace, tree: &Path, to: &Path) -> Result<Vec<u8>> {
    const UUID: &str = "8f0b8c1e-6f5b-4a53-9d0b-2b7c1f0e6a11";
    let mut command = Command::new("mke2fs");
    command.env("E2FSPROGS_FAKE_TIME", "1700000000").env("MKE2FS_CONFIG", "/dev/null");
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", "65536", "-m", "0", "-U", UUID]);
    command.args(["-E", &format!("hash_seed={UUID},lazy_itable_init=0,root_owner=0:0"), "-d"]);
    command.arg(tree).arg(to).arg(TREE_IMAGE);
    if to.exists() {
        fs::remove_file(to)?;
    }
    workspace::run(&mut workspace.confine(command)?)?;
    let bytes = fs::read(to)?;
    fs::remove_file(to)?;
    Ok(bytes)
}

/// An insert into one file of twenty, and a new file.
fn change_tree(tree: &Path) -> Result<usize> {
    let mut noise = Noise(11);
    let changed: Vec<_> = files(tree).into_iter().step_by(20).collect();
    for path in &changed {
        let mut content = fs::read(path)?;
        let middle = content.len() / 2;
        content.splice(middle..middle, noise.bytes(104));
        fs::write(path, content)?;
    }
    fs::write(tree.join("new"), noise.bytes(NEW_FILE))?;
    Ok(changed.len())
}

/// The same in every run, so it is measured once.
pub(crate) fn rebuild(workspace: &Workspace) -> Result<Outcome> {
    let directory = fresh(workspace, "rebuild")?;
    let (tree, disk) = (directory.join("tree"), directory.join("disk.raw"));
    fs::create_dir(&tree)?;
    copy_tree(&tree)?;
    // The first read of a file changes its time of access, which is in the file system.
    drop(file_system(workspace, &tree, &disk)?);
    let old = file_system(workspace, &tree, &disk)?;
    let changed = change_tree(&tree)?;
    let new = file_system(workspace, &tree, &disk)?;

    let store = open(&directory.join("store"))?;
    let (base, first) = keep(&store, "old", &old[..], None)?;
    let (map, second) = keep(&store, "new", &new[..], Some(base))?;
    let mut copy = vec![0; new.len()];
    MapBytes::new(&store, map).read_exact(&mut copy)?;
    ensure!(copy == new, "the rebuilt image has other bytes in the store");
    let hashes = |bytes: &[u8]| -> HashSet<ChunkId> {
        bytes.chunks(BLOCK).filter(|block| !is_zero(block)).map(ChunkId::of).collect()
    };
    let known = hashes(&old);
    let floor = hashes(&new).difference(&known).count() * BLOCK;
    fs::remove_dir_all(directory)?;
    let samples = Samples { ours: vec![millions(second.new_bytes)], theirs: vec![millions(floor as u64)] };
    let more = [
        ("first_mb", millions(first.new_bytes)),
        ("new_stored_mb", millions(second.new_stored)),
        ("changed_files", millions(changed as u64) * 1e6),
    ];
    Ok(Outcome::of(samples).with(more))
}
