//! Writes to a disk, past the page cache, and checks that each block holds what was last written to it. It runs in a guest,
//! as a static program without dependencies: `verifier DEVICE DIRECTORY`.
//!
//! Each block of 4 KiB tells its own number, how often it was written, and a checksum of what follows from both, so that a
//! block that is old, of another place, or torn is told from a good one. Threads have blocks of their own, so each knows
//! what its blocks must hold. `DIRECTORY/rounds` counts what was done; once `DIRECTORY/stop` is there, all blocks are read
//! again, and `DIRECTORY/result` says `good` or what was found.

use std::{
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

const BLOCK: usize = 4096;
const THREADS: u64 = 4;
/// The longest write, in blocks.
const MOST: u64 = 16;
/// O_DIRECT of Linux on x86-64.
const DIRECT: i32 = 0o40000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Memory that begins at a block's boundary, as transfers past the page cache need it.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(length: usize) -> Aligned {
        let bytes = vec![0; length + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Aligned { bytes, start }
    }

    fn part(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

/// What a block holds after so many writes; zeros before the first.
fn fill(block: &mut [u8], number: u64, generation: u64) {
    if generation == 0 {
        return block.fill(0);
    }
    let mut random = Random((number << 32 ^ generation) | 1);
    let (mut sum, (head, body)) = (0_u64, block.split_at_mut(24));
    for word in body.chunks_exact_mut(8) {
        let value = random.next();
        sum = sum.rotate_left(5) ^ value;
        word.copy_from_slice(&value.to_le_bytes());
    }
    for (word, value) in head.chunks_exact_mut(8).zip([number, generation, sum]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn check(found: &[u8], number: u64, generation: u64) -> Result<(), String> {
    let mut expected = [0; BLOCK];
    fill(&mut expected, number, generation);
    if found == expected {
        return Ok(());
    }
    let word = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().unwrap());
    let byte = found.iter().zip(expected).position(|(a, b)| *a != b).unwrap_or(0);
    Err(format!(
        "block {number} differs from byte {byte} on: it should be of write {generation}, and says block {}, write {}",
        word(0),
        word(8)
    ))
}

/// One thread's blocks: from `first` on, and how often each was written.
struct Region {
    first: u64,
    writes: Vec<u64>,
}

impl Region {
    fn work(&mut self, disk: &File, rounds: &AtomicU64, stop: &Path) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("the disk: {error}");
        let mut random = Random(self.first * 2 + 0x9e37_79b9);
        let mut memory = Aligned::new(MOST as usize * BLOCK);
        while rounds.fetch_add(1, Ordering::Relaxed) % 64 != 0 || !stop.exists() {
            let start = random.below(self.writes.len() as u64);
            let count = (1 + random.below(MOST)).min(self.writes.len() as u64 - start) as usize;
            let (bytes, offset) = (memory.part(count * BLOCK), (self.first + start) * BLOCK as u64);
            match random.below(8) {
                0 => disk.sync_data().map_err(failed)?,
                1..3 => {
                    disk.read_exact_at(bytes, offset).map_err(failed)?;
                    self.check(bytes, start)?;
                }
                _ => {
                    for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                        let writes = &mut self.writes[start as usize + index];
                        *writes += 1;
                        fill(block, self.first + start + index as u64, *writes);
                    }
                    disk.write_all_at(bytes, offset).map_err(failed)?;
                }
            }
        }
        // All of it once more.
        for start in (0..self.writes.len() as u64).step_by(MOST as usize) {
            let count = MOST.min(self.writes.len() as u64 - start) as usize;
            let bytes = memory.part(count * BLOCK);
            disk.read_exact_at(bytes, (self.first + start) * BLOCK as u64).map_err(failed)?;
            self.check(bytes, start)?;
        }
        Ok(())
    }

    fn check(&self, bytes: &[u8], start: u64) -> Result<(), String> {
        bytes.chunks_exact(BLOCK).enumerate().try_for_each(|(index, block)| {
            let at = start as usize + index;
            check(block, self.first + at as u64, self.writes[at])
        })
    }
}

fn run(device: &str, directory: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("open {device}: {error}");
    let mut disk = OpenOptions::new().read(true).write(true).custom_flags(DIRECT).open(device).map_err(failed)?;
    let blocks = disk.seek(SeekFrom::End(0)).map_err(failed)? / BLOCK as u64;
    let (disk, rounds, stop) = (&disk, &AtomicU64::new(1), &directory.join("stop"));
    let share = blocks / THREADS;
    thread::scope(|scope| {
        let work = |thread: u64| {
            let mut region = Region { first: thread * share, writes: vec![0; share as usize] };
            scope.spawn(move || region.work(disk, rounds, stop))
        };
        let threads: Vec<_> = (0..THREADS).map(work).collect();
        while !threads.iter().all(|thread| thread.is_finished()) {
            fs::write(directory.join("rounds"), format!("{}\n", rounds.load(Ordering::Relaxed))).unwrap();
            thread::sleep(std::time::Duration::from_millis(50));
        }
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let directory = Path::new(&words[2]);
    let result = run(&words[1], directory).map_or_else(|error| error, |()| "good".into());
    // In one step, so that no half of it is read.
    fs::write(directory.join("result.new"), result + "\n").unwrap();
    fs::rename(directory.join("result.new"), directory.join("result")).unwrap();
}
