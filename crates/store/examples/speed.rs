//! How fast chunks and maps are, on one core: `cargo run --release -p burgeon-store --example speed -- FILE`, with a
//! tar of `/usr/lib` or another file of real data, at most 512 MiB of which are used. Medians of five, in CPU time.
#![allow(clippy::print_stdout, reason = "it shows what it measured")]

use std::{collections::HashMap, env, fs::File, hint::black_box, io::Read};

use burgeon_api::{Error, Result};
use burgeon_store::{
    ChunkId, PackId,
    chunk::{Encoder, Kind, MOST_CHUNK, is_zero},
    cut::{Content, Cuts, Cutter},
    map::{Map, MapReader, NodeSink, Nodes},
    pack::{PackWriter, RECORD_HEADER_BYTES, read_record},
};
use bytes::Bytes;

const BLOCK: usize = 64 << 10;

#[derive(Default)]
struct Memory(HashMap<ChunkId, Bytes>);

impl Nodes for Memory {
    fn get(&self, id: ChunkId) -> Result<Bytes> {
        self.0.get(&id).cloned().ok_or_else(|| Error::not_found(id.to_string()))
    }
}

impl NodeSink for Memory {
    fn put(&mut self, id: ChunkId, bytes: Vec<u8>) -> Result<()> {
        self.0.insert(id, bytes.into());
        Ok(())
    }
}

/// Seconds that this thread had a CPU: others on the machine do not count.
fn cpu_seconds() -> f64 {
    let status = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = status.split(' ').next().and_then(|first| first.parse::<f64>().ok());
    nanoseconds.unwrap_or_default() / 1e9
}

/// The median of five runs, in seconds of CPU time.
fn time(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let begun = cpu_seconds();
        run()?;
        times.push(cpu_seconds() - begun);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[2])
}

fn megabytes(bytes: usize) -> f64 {
    f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) / 1e6
}

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

fn main() -> Result<()> {
    let path = env::args().nth(1).ok_or_else(|| Error::invalid("usage: speed FILE"))?;
    let mut data = Vec::new();
    let file = File::open(&path).map_err(|error| Error::io(format!("open {path}"), &error))?;
    file.take(512 << 20).read_to_end(&mut data).map_err(|error| Error::io(format!("read {path}"), &error))?;
    chunks("real data", &data)?;
    let mut seed = 7;
    let noise: Vec<u8> = (0..(64 << 20) / 8).flat_map(|_| random(&mut seed).to_le_bytes()).collect();
    chunks("random data", &noise)?;
    let zeros = vec![0_u8; 64 << 20];
    let seconds = time(|| {
        for _ in 0..20 {
            black_box(zeros.chunks(4096).filter(|block| is_zero(block)).count());
        }
        Ok(())
    })?;
    println!("zeros told, by 4 KiB        {:7.0} MB/s", 20.0 * megabytes(zeros.len()) / seconds);
    for cutter in Cutter::ALL {
        let seconds = time(|| {
            let mut cuts = Cuts::new(data.as_slice(), cutter);
            while let Some(cut) = cuts.next()? {
                black_box(matches!(cut.content, Content::Data(_)));
            }
            Ok(())
        })?;
        println!("cut, {cutter:16}       {:7.0} MB/s", megabytes(data.len()) / seconds);
    }
    maps()
}

fn chunks(what: &str, data: &[u8]) -> Result<()> {
    let mut encoder = Encoder::new()?;
    let mut pack = PackWriter::new(PackId([1; 16]), Vec::new())?;
    for chunk in data.chunks(BLOCK) {
        pack.append(Kind::Data, &encoder.encode(chunk)?)?;
    }
    let finished = pack.finish()?;
    let ratio = megabytes(data.len()) / megabytes(finished.sink.len());
    let seconds = time(|| {
        for chunk in data.chunks(BLOCK) {
            black_box(encoder.encode(chunk)?);
        }
        Ok(())
    })?;
    println!("{what}: hash and encode {:7.0} MB/s, {ratio:.2} times smaller", megabytes(data.len()) / seconds);
    let plain: usize = finished.entries.iter().map(|entry| entry.place.length as usize).sum();
    let seconds = time(|| {
        for entry in &finished.entries {
            let at = usize::try_from(entry.place.offset).unwrap_or(usize::MAX);
            let end = at + RECORD_HEADER_BYTES + entry.place.stored as usize;
            black_box(read_record(&finished.sink[at..end], entry.id)?);
        }
        Ok(())
    })?;
    println!("{what}: decode and verify {:5.0} MB/s", megabytes(plain) / seconds);
    Ok(())
}

fn maps() -> Result<()> {
    const WRITES: u32 = 160_000;
    let length: u64 = 64 << 30;
    let mut memory = Memory::default();
    let blocks = length / BLOCK as u64;
    let mut seed = 11;
    let mut map = Map::empty(length)?;
    let seconds = time(|| {
        let mut edit = Map::empty(length)?.edit();
        for write in 0..WRITES {
            let at = random(&mut seed) % blocks * BLOCK as u64;
            let chunk = ChunkId::of(&write.to_le_bytes());
            edit.set(at..at + BLOCK as u64, chunk, 0)?;
        }
        let empty = Memory::default();
        map = edit.finish(&empty, &mut memory)?;
        Ok(())
    })?;
    println!("map: {WRITES} random writes of 64 KiB into 64 GiB {seconds:.3} s");
    let full = map;
    let seconds = time(|| {
        for _ in 0..2000 {
            let mut edit = full.edit();
            let at = random(&mut seed) % blocks * BLOCK as u64;
            edit.set(at..at + 4096, ChunkId::of(b"new"), u32::try_from(MOST_CHUNK / 2).unwrap_or(0))?;
            let mut made = Vec::new();
            edit.finish(&memory, &mut made)?;
            black_box(made);
        }
        Ok(())
    })?;
    println!("map: one write of 4 KiB, stored {:.1} us", seconds / 2000.0 * 1e6);
    for (what, most) in [("all nodes in the cache", 20_000), ("a tenth of the nodes in the cache", 1_600)] {
        let reader = MapReader::new(&memory, most);
        let mut pieces = Vec::new();
        let lookups = 200_000;
        let seconds = time(|| {
            for _ in 0..lookups {
                let at = random(&mut seed) % blocks * BLOCK as u64;
                full.lookup_into(&reader, at..at + 4096, &mut pieces)?;
                black_box(&pieces);
            }
            Ok(())
        })?;
        println!("map: a look-up, {what} {:.0} ns", seconds / f64::from(lookups) * 1e9);
    }
    Ok(())
}
