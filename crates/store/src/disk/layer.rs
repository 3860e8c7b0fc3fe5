//! A layer: the blocks that a disk has of its own, in a sparse file, and a map that tells which they are.
//!
//! ```text
//! ID.data   the blocks, each at its own place
//! ID.map    header (4,096 bytes) | live states | synced states        two bits a block, in words of 64 bits
//! ```
//!
//! A write goes to `data`, then to the live states, then it is acknowledged: what was acknowledged is in the kernel's
//! hands and survives this process. A flush syncs `data` and then copies what has changed into the synced states and
//! syncs those. After a power cut the live states mean nothing, because the kernel writes pages in any order: they hold
//! only within the boot of the machine that the header names. So a block that was never flushed is as it was below, and
//! not zeros; and what was flushed is there.
//!
//! Nothing here knows SQL or hashes. Calls block, and may come from many threads.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use burgeon_api::{Error, Result};

use super::states::{BLOCK, BLOCKS_IN_WORD, State, States};

const MAGIC: &[u8; 8] = b"BgnLayer";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
const HEADER_USED: usize = 60;
/// Locks that the words share.
const STRIPES: usize = 64;
/// The largest disk.
pub const MOST_BYTES: u64 = 1 << 46;

/// A layer on its files. See the module.
pub(crate) struct Layer {
    data: File,
    map: File,
    size: u64,
    states: States,
    /// Held while the words that they stand for change, so that the file's words follow memory's in order.
    stripes: [Mutex<()>; STRIPES],
    /// Words that are not in the synced states yet.
    dirty: Mutex<BTreeSet<u64>>,
    /// Data was written since the last flush began.
    written: AtomicBool,
    /// A sync has failed: what the kernel then still holds is not known, so no later sync may claim success.
    failed: AtomicBool,
    flushing: Mutex<()>,
    /// The files were made by this process: their names are to be synced with the first flush.
    nameless: AtomicBool,
    path: PathBuf,
}

/// Fills a part of a block from below: its offset and where to put it.
pub(crate) type Below<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is whole after each statement, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn damaged(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::damaged(format!("the layer {} is damaged: {why}", path.display()))
}

/// The number that the kernel gave to this boot of the machine.
///
/// # Errors
/// Where /proc is not there.
pub(crate) fn boot_id() -> Result<[u8; 16]> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(format!("read {path}"), &error))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(|_| Error::internal(format!("{path} holds no number")))?;
    Ok(number.to_be_bytes())
}

/// # Errors
/// `Invalid` for a size that no disk has.
pub(crate) fn check_size(size: u64) -> Result<()> {
    if size == 0 || size > MOST_BYTES || !size.is_multiple_of(512) {
        return Err(Error::invalid(format!("a disk of {size} bytes: 512 to {MOST_BYTES}, in steps of 512")));
    }
    Ok(())
}

/// Removes a layer's files, as far as they are there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    for extension in ["data", "map"] {
        match std::fs::remove_file(path.with_extension(extension)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl Layer {
    /// Opens the layer at `path` (without its extension); one that was never written to is made, for a disk of `size`.
    ///
    /// # Errors
    /// `Damaged` for files that are no layer or of another size; `Refused` for those of a newer version.
    pub(crate) fn open(path: &Path, size: u64) -> Result<Layer> {
        check_size(size)?;
        let open = |extension: &str| {
            let path = path.with_extension(extension);
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|error| Error::io(format!("open {}", path.display()), &error))
        };
        let (data, map) = (open("data")?, open("map")?);
        let states = States::new(size.div_ceil(BLOCK));
        let layer = Layer {
            data,
            map,
            size,
            states,
            stripes: [const { Mutex::new(()) }; STRIPES],
            dirty: Mutex::default(),
            written: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            flushing: Mutex::default(),
            nameless: AtomicBool::new(true),
            path: path.to_path_buf(),
        };
        layer.read_map()?;
        Ok(layer)
    }

    /// The size that the layer at `path` was made for; `None` where there is none.
    pub(crate) fn size_of(path: &Path) -> Result<Option<u64>> {
        let path = path.with_extension("map");
        let mut header = [0; HEADER_USED];
        match File::open(&path).and_then(|map| map.read_exact_at(&mut header, 0)) {
            Ok(()) if header == [0; HEADER_USED] => Ok(None),
            Ok(()) => Ok(Some(u64::from_le_bytes(<[u8; 8]>::try_from(&header[16..24]).unwrap_or_default()))),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => Ok(None),
            Err(error) => Err(Error::io(format!("read {}", path.display()), &error)),
        }
    }

    fn live_at(&self, word: u64) -> u64 {
        HEADER_BYTES + word * 8
    }

    fn synced_at(&self, word: u64) -> u64 {
        HEADER_BYTES + (self.states.words() + word) * 8
    }

    fn header(&self, boot: [u8; 16]) -> [u8; HEADER_USED] {
        let mut header = [0; HEADER_USED];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&u32::try_from(BLOCK).unwrap_or(0).to_le_bytes());
        header[16..24].copy_from_slice(&self.size.to_le_bytes());
        header[24..40].copy_from_slice(&boot);
        let check = crc32fast::hash(&header[..HEADER_USED - 4]);
        header[HEADER_USED - 4..].copy_from_slice(&check.to_le_bytes());
        header
    }

    /// Reads the states that hold, and makes the live ones the same where the machine was started anew.
    fn read_map(&self) -> Result<()> {
        let path = self.path.with_extension("map");
        let failed = |error: io::Error| Error::io(format!("read {}", path.display()), &error);
        let boot = boot_id()?;
        let wanted = HEADER_BYTES + 2 * self.states.words() * 8;
        let mut header = [0; HEADER_USED];
        let length = self.map.metadata().map_err(failed)?.len();
        if length > 0 {
            self.map.read_exact_at(&mut header, 0).map_err(|error| damaged(&path, error))?;
        }
        self.data.set_len(self.size.next_multiple_of(BLOCK)).map_err(failed)?;
        if header == [0; HEADER_USED] {
            // New; or the power was cut before anything of it was synced, so that nothing of it was promised.
            self.map.set_len(0).and_then(|()| self.map.set_len(wanted)).map_err(failed)?;
            return self.map.write_all_at(&self.header(boot), 0).map_err(failed);
        }
        if header[..8] != *MAGIC {
            return Err(damaged(&path, "it does not begin as a layer's map does"));
        }
        let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if version != VERSION {
            return Err(Error::refused(format!(
                "{} has version {version}; this Burgeon knows {VERSION}",
                path.display()
            ))
            .with_hint("use the Burgeon that wrote it, or a newer one"));
        }
        let mut of_boot = [0; 16];
        of_boot.copy_from_slice(&header[24..40]);
        if header != self.header(of_boot) {
            return Err(damaged(&path, format!("its header does not fit a disk of {} bytes", self.size)));
        }
        if self.map.metadata().map_err(failed)?.len() < wanted {
            return Err(damaged(&path, "it is cut short"));
        }
        let live = of_boot == boot;
        self.load(if live { self.live_at(0) } else { self.synced_at(0) }, live).map_err(failed)?;
        if live {
            return Ok(());
        }
        self.forget_live().map_err(failed)?;
        self.map.sync_data().map_err(failed)?;
        self.map.write_all_at(&self.header(boot), 0).map_err(failed)
    }

    /// Makes the live states what the synced ones are.
    fn forget_live(&self) -> io::Result<()> {
        let (mut live, mut synced) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        let mut word = 0;
        while word < self.states.words() {
            let count = (self.states.words() - word).min(live.len() as u64 / 8);
            let bytes = usize::try_from(count * 8).unwrap_or(0);
            self.map.read_exact_at(&mut live[..bytes], self.live_at(word))?;
            self.map.read_exact_at(&mut synced[..bytes], self.synced_at(word))?;
            if live[..bytes] != synced[..bytes] {
                self.map.write_all_at(&synced[..bytes], self.live_at(word))?;
            }
            word += count;
        }
        Ok(())
    }

    /// Reads states into memory. Where they are the live ones, what differs from the synced ones is dirty.
    fn load(&self, from: u64, live: bool) -> io::Result<()> {
        let mut piece = vec![0; 64 << 10];
        let mut synced = vec![0; 64 << 10];
        let end = self.states.words();
        let mut word = 0;
        let mut dirty = lock(&self.dirty);
        while word < end {
            let count = (end - word).min(piece.len() as u64 / 8);
            let bytes = usize::try_from(count * 8).unwrap_or(0);
            self.map.read_exact_at(&mut piece[..bytes], from + word * 8)?;
            if live {
                self.map.read_exact_at(&mut synced[..bytes], self.synced_at(word))?;
            }
            for (index, (value, synced)) in piece[..bytes].chunks_exact(8).zip(synced.chunks_exact(8)).enumerate() {
                let number = u64::from_le_bytes(<[u8; 8]>::try_from(value).unwrap_or_default());
                if number != 0 {
                    self.states.set_word(word + index as u64, number);
                }
                if live && value != synced {
                    dirty.insert(word + index as u64);
                }
            }
            word += count;
        }
        drop(dirty);
        self.written.store(live, Ordering::Release);
        Ok(())
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What the layer has of the bytes from `offset` on: its state, and for how many bytes up to `end` it holds.
    pub(crate) fn run(&self, offset: u64, end: u64) -> (State, u64) {
        let (state, blocks) = self.states.run(offset / BLOCK, end.div_ceil(BLOCK));
        (state, ((offset / BLOCK + blocks) * BLOCK).min(end) - offset)
    }

    /// Reads bytes whose state is `Data`.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.data.read_exact_at(bytes, offset)
    }

    /// Writes bytes. Blocks that are only partly written, and are not here yet, are filled from below first.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8], below: Below<'_>) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        self.written.store(true, Ordering::Release);
        if self.run(offset, end) == (State::Data, end - offset) {
            return self.data.write_all_at(bytes, offset);
        }
        // Word by word, each under its lock: a block becomes ours at one moment, for readers and for other writers.
        let word_bytes = BLOCKS_IN_WORD * BLOCK;
        let mut at = offset;
        while at < end {
            let word = at / word_bytes;
            let stop = end.min((word + 1) * word_bytes);
            let guard = self.stripe(word);
            self.fill_edges(at, stop, below)?;
            let piece = &bytes[usize::try_from(at - offset).unwrap_or(0)..usize::try_from(stop - offset).unwrap_or(0)];
            self.data.write_all_at(piece, at)?;
            self.set(at / BLOCK..stop.div_ceil(BLOCK), State::Data, &guard)?;
            at = stop;
        }
        Ok(())
    }

    fn stripe(&self, word: u64) -> MutexGuard<'_, ()> {
        lock(&self.stripes[usize::try_from(word).unwrap_or(0) % STRIPES])
    }

    /// Puts what is below into the parts of the first and last block that a write leaves alone.
    fn fill_edges(&self, from: u64, to: u64, below: Below<'_>) -> io::Result<()> {
        let fill = |range: Range<u64>| -> io::Result<()> {
            // The last block of a disk may reach beyond its end.
            let range = range.start..range.end.min(self.size);
            if range.is_empty() {
                return Ok(());
            }
            let mut bytes = [0; 4096];
            let bytes = &mut bytes[..usize::try_from(range.end - range.start).unwrap_or(0)];
            match self.states.get(range.start / BLOCK) {
                State::Data => return Ok(()),
                State::Zero => {}
                State::Absent => below(range.start, bytes)?,
            }
            self.data.write_all_at(bytes, range.start)
        };
        fill(from / BLOCK * BLOCK..from)?;
        if !to.is_multiple_of(BLOCK) {
            fill(to..to.next_multiple_of(BLOCK))?;
        }
        Ok(())
    }

    /// Changes states of blocks within one word, in memory and in the file.
    fn set(&self, blocks: Range<u64>, state: State, _guard: &MutexGuard<'_, ()>) -> io::Result<()> {
        let (word, value, _) = self.states.changed(blocks.start, blocks.end, state);
        if self.states.word(word) == value {
            return Ok(());
        }
        self.map.write_all_at(&value.to_le_bytes(), self.live_at(word))?;
        self.states.set_word(word, value);
        lock(&self.dirty).insert(word);
        Ok(())
    }

    /// Makes bytes zero. Whole blocks give up their place in the file.
    pub(crate) fn zero(&self, offset: u64, length: u64, below: Below<'_>) -> io::Result<()> {
        let end = offset + length;
        // The last block of a disk may be a part of one, and is whole for all that can be read of it.
        let whole_end = if end == self.size { end.next_multiple_of(BLOCK) } else { end / BLOCK * BLOCK };
        let whole = offset.next_multiple_of(BLOCK)..whole_end;
        if whole.start >= whole.end {
            return self.write(offset, &vec![0; usize::try_from(length).unwrap_or(0)], below);
        }
        if offset < whole.start {
            self.write(offset, &[0; 4096][..usize::try_from(whole.start - offset).unwrap_or(0)], below)?;
        }
        if whole.end < end {
            self.write(whole.end, &[0; 4096][..usize::try_from(end - whole.end).unwrap_or(0)], below)?;
        }
        self.written.store(true, Ordering::Release);
        let mut block = whole.start / BLOCK;
        while block < whole.end / BLOCK {
            let word = block / BLOCKS_IN_WORD;
            let stop = (whole.end / BLOCK).min((word + 1) * BLOCKS_IN_WORD);
            let guard = self.stripe(word);
            self.set(block..stop, State::Zero, &guard)?;
            block = stop;
        }
        // Only room is won by this; a file system that cannot do it keeps the bytes, which nobody reads.
        let _room_is_kept = rustix::fs::fallocate(
            &self.data,
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            whole.start,
            whole.end - whole.start,
        );
        Ok(())
    }

    /// Returns once all that was written before survives a power cut.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let _one_at_a_time = lock(&self.flushing);
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier sync of this disk has failed"));
        }
        if !self.written.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        // These states' data is in the file already, so the sync that follows covers it.
        let words: Vec<(u64, u64)> =
            std::mem::take(&mut *lock(&self.dirty)).into_iter().map(|word| (word, self.states.word(word))).collect();
        let outcome = self.data.sync_data().and_then(|()| {
            for (word, value) in &words {
                self.map.write_all_at(&value.to_le_bytes(), self.synced_at(*word))?;
            }
            if !words.is_empty() {
                self.map.sync_data()?;
            }
            if self.nameless.load(Ordering::Acquire)
                && let Some(directory) = self.path.parent()
            {
                File::open(directory)?.sync_all()?;
                self.nameless.store(false, Ordering::Release);
            }
            Ok(())
        });
        if outcome.is_err() {
            self.failed.store(true, Ordering::Release);
            self.written.store(true, Ordering::Release);
        }
        outcome
    }

    /// Opens a layer that was sealed: its files tell its size.
    ///
    /// # Errors
    /// `Damaged` where they are not there; else as [`Self::open`].
    pub(crate) fn open_sealed(path: &Path) -> Result<Layer> {
        let size = Self::size_of(path)?.ok_or_else(|| damaged(path, "it is gone, or was never whole"))?;
        Self::open(path, size)
    }

    /// Whether it has nothing of its own.
    pub(crate) fn is_empty(&self) -> bool {
        let blocks = self.size.div_ceil(BLOCK);
        self.states.run(0, blocks) == (State::Absent, blocks)
    }

    /// Adds where it has something of its own.
    pub(crate) fn add_runs(&self, ranges: &mut Vec<Range<u64>>) {
        let mut at = 0;
        while at < self.size {
            let (state, length) = self.run(at, self.size);
            if state != State::Absent {
                ranges.push(at..at + length);
            }
            at += length;
        }
    }

    /// Bytes of blocks that are here as data.
    pub(crate) fn data_bytes(&self) -> u64 {
        (0..self.states.words())
            .map(|word| u64::from((self.states.word(word) & 0x5555_5555_5555_5555).count_ones()) * BLOCK)
            .sum()
    }
}
