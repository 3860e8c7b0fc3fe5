//! A guest's memory outside its QEMU: what many VMs begin with, and what one of them has written since.
//!
//! ```text
//!   base (sealed memfd) ---mapped private---> QEMU of a VM: its own pages above the base's
//!                                                |
//!   written (here)  <----------capture-----------+      ----apply----> QEMU of its fork
//! ```
//! QEMU never writes a base: its pages are copied by the kernel when the guest writes them. Which ones were copied, the
//! kernel tells in `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst), and their content lies in
//! `/proc/PID/mem`. A guest that was booted has no base: all that it has touched is written.
//!
//! Memory that a guest may be given while it runs is a second block: for all but QEMU one range of offsets, the first block
//! and then the second. A base is mapped for the first alone. The device of the second one makes holes in its file where the
//! guest has none of it, which a file that others share does not bear; so that block is each QEMU's own, what a base
//! holds of it is copied, and all that the guest has touched there is written.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use burgeon_api::{Error, Result};
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};

use crate::process::{Identity, identity_of};

/// Bytes of a page on x86-64.
pub const PAGE: u64 = PAGE_BYTES as u64;
const PAGE_BYTES: usize = 4096;
/// Bytes of the page map that are read with one call: they stay in the processor's cache.
const ENTRIES: usize = 64 << 10;
/// Pages that are moved with one call.
const PIECE: u64 = 256 * PAGE;
/// Less than this is not worth a thread.
const PART: u64 = 2 << 20;
const MOST_THREADS: usize = 4;

/// Memories have it in `/proc`.
pub(crate) const MEMORY_NAME: &str = "burgeon-memory";

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, or of shared memory: not copied by a write.
const OF_FILE: u64 = 1 << 61;

fn failed(action: &str) -> impl Fn(io::Error) -> Error {
    move |error| Error::io(action.to_string(), &error)
}

/// Memory that VMs begin with. It is held for as long as a VM or this value uses it.
#[derive(Debug)]
pub struct Base {
    file: File,
    length: u64,
}

impl Base {
    /// Memory of zeros, which takes no room until it is filled. Who maps it privately sees what is filled in later.
    ///
    /// # Errors
    /// The system's.
    pub fn empty(length: u64) -> Result<Base> {
        let file = memfd(length)?;
        Ok(Base { file, length })
    }

    /// Nobody can change it from now on, whoever has it open.
    ///
    /// # Errors
    /// The system's.
    pub fn seal(&self) -> Result<()> {
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        rustix::fs::fcntl_add_seals(&self.file, seals).map_err(|error| failed("seal a memory")(error.into()))
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes that it holds in the machine's memory.
    pub fn held(&self) -> u64 {
        rustix::fs::fstat(&self.file).map_or(0, |about| u64::try_from(about.st_blocks).unwrap_or(0) * 512)
    }

    /// What it is known by in `/proc`, among the memories that are there.
    pub fn number(&self) -> Option<u64> {
        rustix::fs::fstat(&self.file).ok().map(|about| about.st_ino)
    }

    /// Where it holds anything.
    ///
    /// # Errors
    /// The system's.
    pub fn data(&self) -> Result<Vec<Range<u64>>> {
        data(&self.file)
    }

    /// Takes over what another base holds in front of an offset.
    ///
    /// # Errors
    /// The system's.
    pub fn copy_from(&self, other: &Base, end: u64) -> Result<()> {
        let read = |at: u64, buffer: &mut [u8]| other.file.read_exact_at(buffer, at);
        let write = |at: u64, bytes: &[u8]| self.file.write_all_at(bytes, at);
        copy_all(&within(other.data()?, &(0..end)), read, write)
    }

    /// Fills a part that holds zeros, from a multiple of the page's size on; pages of zeros take no room.
    ///
    /// # Errors
    /// The system's.
    pub fn fill(&self, at: u64, bytes: &[u8]) -> Result<()> {
        fill(&self.file, at, bytes).map_err(failed("fill a memory"))
    }
}

fn memfd(length: u64) -> Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(MEMORY_NAME, flags)
        .map(File::from)
        .map_err(|error| failed("make a memory")(error.into()))?;
    file.set_len(length).map_err(failed("make a memory"))?;
    Ok(file)
}

fn fill(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    without_zeros(at, bytes, |at, bytes| file.write_all_at(bytes, at))
}

/// Writes the pages that hold anything.
fn without_zeros(at: u64, bytes: &[u8], write: impl Fn(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    for run in runs(bytes.chunks(PAGE_BYTES).map(|page| page.iter().any(|byte| *byte != 0))) {
        let part = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        write(at + run.start, &bytes[part(run.start)..part(run.end)])?;
    }
    Ok(())
}

fn data(file: &File) -> Result<Vec<Range<u64>>> {
    let (mut all, mut at) = (Vec::new(), 0);
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(all),
            Err(error) => return Err(failed("look through a memory")(error.into())),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))
            .map_err(|error| failed("look through a memory")(error.into()))?;
        all.push(start..end);
        at = end;
    }
}

/// Copies runs of pages, by several threads where there is much of it.
fn copy_all(
    pages: &[Range<u64>],
    read: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
    write: impl Fn(u64, &[u8]) -> io::Result<()> + Sync,
) -> Result<()> {
    side_by_side(split(pages, threads(bytes(pages))), |part: Vec<Range<u64>>| {
        part.into_iter().try_for_each(|range| copy(range, &read, &write))
    })
}

/// How many threads move so many bytes.
fn threads(bytes: u64) -> usize {
    let most = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    usize::try_from(bytes / PART).unwrap_or(usize::MAX).clamp(1, most)
}

/// Does one thing for each part at the same time.
fn side_by_side<T: Send>(mut parts: Vec<T>, one: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    // This thread takes one, and is the only one where there is little.
    let own = parts.pop();
    let one = &one;
    std::thread::scope(|scope| {
        let others: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || one(part))).collect();
        let done = own.map_or(Ok(()), one);
        let lost = || Error::internal("a thread that copied memory has panicked");
        others.into_iter().fold(done, |done, other| done.and(other.join().unwrap_or_else(|_| Err(lost()))))
    })
}

/// Splits runs of pages into so many parts of about one size.
fn split(pages: &[Range<u64>], count: usize) -> Vec<Vec<Range<u64>>> {
    let each = bytes(pages).div_ceil(count.max(1) as u64).next_multiple_of(PAGE);
    let mut parts = vec![Vec::new()];
    let mut room = each;
    for range in pages {
        let mut at = range.start;
        while at < range.end {
            if room == 0 {
                parts.push(Vec::new());
                room = each;
            }
            let end = range.end.min(at + room);
            parts.last_mut().expect("it begins with one").push(at..end);
            room -= end - at;
            at = end;
        }
    }
    parts
}

fn copy(
    range: Range<u64>,
    read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    write: impl Fn(u64, &[u8]) -> io::Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; usize::try_from(PIECE.min(range.end - range.start)).unwrap_or(0)];
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(PIECE.min(range.end - at)).unwrap_or(0);
        read(at, &mut buffer[..length]).map_err(failed("read a guest's memory"))?;
        write(at, &buffer[..length]).map_err(failed("copy a guest's memory"))?;
        at += length as u64;
    }
    Ok(())
}

/// A part of a guest's memory that QEMU has in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Where QEMU has it.
    pub address: u64,
    pub length: u64,
}

/// The memory of a guest inside a running QEMU.
#[derive(Debug)]
pub struct Guest {
    memory: File,
    pagemap: File,
    /// The one that its base is mapped for.
    main: Block,
    /// What it may be given while it runs.
    growth: Option<Block>,
}

/// Which pages to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those that the guest has written since it began with its base.
    Written,
    /// All: for a guest whose base is not at hand.
    All,
}

impl Guest {
    /// Opens the memory of a process: the block that a base is mapped for, and the one of its growth.
    ///
    /// # Errors
    /// `Refused` where this process may not; `NotFound` where it is gone; the system's.
    pub fn open(process: &Identity, main: Block, growth: Option<Block>) -> Result<Guest> {
        let pid = process.pid;
        let open = |name: &str, write: bool| {
            let path = format!("/proc/{pid}/{name}");
            File::options().read(true).write(write).open(&path).map_err(|error| {
                let told = Error::io(format!("open {path}"), &error);
                match error.kind() {
                    io::ErrorKind::PermissionDenied => {
                        told.with_hint("the system keeps QEMU's memory from this user: see kernel.yama.ptrace_scope")
                    }
                    _ => told,
                }
            })
        };
        let guest = Guest { memory: open("mem", true)?, pagemap: open("pagemap", false)?, main, growth };
        // What is open now stays that of one process, whoever gets its number later.
        if identity_of(pid).as_ref() != Some(process) {
            return Err(Error::not_found(format!("process {pid} is gone")));
        }
        Ok(guest)
    }

    fn length(&self) -> u64 {
        self.main.length + self.growth.map_or(0, |growth| growth.length)
    }

    /// Where pages of the scope lie; no run of them is of both blocks. Costs about 8 ms for each GiB that is mapped, and
    /// half a millisecond for each that the guest was not given yet.
    ///
    /// # Errors
    /// The system's.
    pub fn pages(&self, scope: Scope) -> Result<Vec<Range<u64>>> {
        let main = self.main.length;
        let mut pages = match scope {
            Scope::All => std::iter::once(0..main).collect(),
            Scope::Written => self.written(self.main)?,
        };
        if let Some(growth) = self.growth {
            pages.extend(self.written(growth)?.into_iter().map(|range| range.start + main..range.end + main));
        }
        Ok(pages)
    }

    /// The pages of a block that are the process's own, from the block's beginning on.
    fn written(&self, block: Block) -> Result<Vec<Range<u64>>> {
        let mut pages: Vec<Range<u64>> = Vec::new();
        let mut buffer = vec![0; ENTRIES];
        let mut at = 0;
        while at < block.length {
            let count = ((block.length - at) / PAGE).min(ENTRIES as u64 / 8);
            let entries = &mut buffer[..usize::try_from(count * 8).unwrap_or(ENTRIES)];
            self.pagemap
                .read_exact_at(entries, (block.address + at) / PAGE * 8)
                .map_err(failed("ask which pages a guest has written"))?;
            let entries = entries.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry));
            // Of most parts of a large memory a guest may have nothing.
            if entries.clone().fold(0, |all, entry| all | entry) & (PRESENT | SWAPPED) != 0 {
                append(&mut pages, runs(entries.map(is_own)), at);
            }
            at += count * PAGE;
        }
        Ok(pages)
    }

    /// Where QEMU has what lies at an offset.
    fn address(&self, at: u64) -> u64 {
        match self.growth {
            Some(growth) if at >= self.main.length => growth.address + (at - self.main.length),
            _ => self.main.address + at,
        }
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(buffer, self.address(at))
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, self.address(at))
    }

    /// Copies pages into a memory that holds zeros.
    ///
    /// # Errors
    /// The system's.
    pub fn fill(&self, pages: &[Range<u64>], base: &Base) -> Result<()> {
        let write = |at: u64, bytes: &[u8]| fill(&base.file, at, bytes);
        copy_all(pages, |at, buffer| self.read(at, buffer), write)
    }

    /// Copies pages over a memory that may hold others of the first block, zeros and all. Behind that it holds zeros.
    ///
    /// # Errors
    /// The system's.
    pub fn overwrite(&self, pages: &[Range<u64>], base: &Base) -> Result<()> {
        let write = |at: u64, bytes: &[u8]| match at < self.main.length {
            true => base.file.write_all_at(bytes, at),
            false => fill(&base.file, at, bytes),
        };
        copy_all(pages, |at, buffer| self.read(at, buffer), write)
    }

    /// Copies pages aside.
    ///
    /// # Errors
    /// The system's.
    pub fn capture(&self, pages: Vec<Range<u64>>, Aside(mut content): Aside) -> Result<Written> {
        content.resize(usize::try_from(bytes(&pages)).map_err(|_| Error::internal("a memory beyond all bounds"))?, 0);
        let mut rest = content.as_mut_slice();
        let parts = split(&pages, threads(bytes(&pages))).into_iter().map(|part| {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(length_of(&part));
            rest = others;
            (part, own)
        });
        side_by_side(parts.collect(), |(part, own): (Vec<Range<u64>>, &mut [u8])| {
            let mut own = own;
            part.into_iter().try_for_each(|range| {
                let (buffer, others) = std::mem::take(&mut own).split_at_mut(length_of(std::slice::from_ref(&range)));
                own = others;
                self.read(range.start, buffer).map_err(failed("read a guest's memory"))
            })
        })?;
        Ok(Written { length: self.length(), pages, content })
    }

    /// Has this guest own pages in which its base's content stays: what is going to be put there need not wait for room.
    ///
    /// # Errors
    /// The system's.
    pub fn own(&self, pages: &[Range<u64>], base: &Base) -> Result<()> {
        // Where no base is mapped there are zeros, and they stay zeros where the other guest has no more than that.
        let pages = within(pages.to_vec(), &(0..self.main.length));
        let read = |at: u64, buffer: &mut [u8]| base.file.read_exact_at(buffer, at);
        copy_all(&pages, read, |at, bytes| self.write(at, bytes))
    }

    /// Puts into a guest that has not run yet what it lacks of the memory it is to go on with: what another one has written
    /// above the base that both begin with; or what the base holds where it is not mapped.
    ///
    /// # Errors
    /// `Invalid` where it does not fit; the system's.
    pub fn complete(&self, base: &Base, written: Option<&Written>) -> Result<()> {
        let length = written.map_or(base.length, |written| written.length);
        if length != self.length() {
            return Err(Error::invalid("the guests' memories are not of one size"));
        }
        // A guest that clears what it is given has much of it that holds nothing.
        let write = |at: u64, bytes: &[u8]| match at < self.main.length {
            true => self.write(at, bytes),
            false => without_zeros(at, bytes, |at, bytes| self.write(at, bytes)),
        };
        let Some(written) = written else {
            let growth = match self.growth {
                Some(_) => within(base.data()?, &(self.main.length..base.length)),
                None => return Ok(()),
            };
            return copy_all(&growth, |at, buffer| base.file.read_exact_at(buffer, at), write);
        };
        let mut rest = written.content.as_slice();
        let parts = split(&written.pages, threads(bytes(&written.pages))).into_iter().map(|part| {
            let (own, others) = rest.split_at(length_of(&part));
            rest = others;
            (part, own)
        });
        side_by_side(parts.collect(), |(part, mut own): (Vec<Range<u64>>, &[u8])| {
            part.into_iter().try_for_each(|range| {
                let (content, others) = own.split_at(length_of(std::slice::from_ref(&range)));
                own = others;
                write(range.start, content).map_err(failed("write a guest's memory"))
            })
        })
    }
}

/// Room for what a guest has written, taken ahead, so that copying does not wait for it.
#[derive(Debug)]
pub struct Aside(Vec<u8>);

impl Aside {
    /// For these pages, and some more: a guest goes on writing until it stands.
    pub fn room_for(pages: &[Range<u64>]) -> Aside {
        let length = length_of(pages);
        let mut room = vec![0; length + length / 8 + (1 << 20)];
        // It is there once it was written; zeros are only promised.
        room.fill(1);
        Aside(room)
    }
}

/// What a guest has written since it began with its base.
#[derive(Debug)]
pub struct Written {
    /// Of the guest's memory.
    length: u64,
    pages: Vec<Range<u64>>,
    /// Of the pages, one after the other.
    content: Vec<u8>,
}

fn length_of(pages: &[Range<u64>]) -> usize {
    usize::try_from(bytes(pages)).unwrap_or(usize::MAX)
}

/// The parts of runs that lie in a range.
fn within(pages: Vec<Range<u64>>, range: &Range<u64>) -> Vec<Range<u64>> {
    let clipped = pages.into_iter().map(|run| run.start.max(range.start)..run.end.min(range.end));
    clipped.filter(|run| run.start < run.end).collect()
}

/// How much runs of pages hold.
pub fn bytes(pages: &[Range<u64>]) -> u64 {
    pages.iter().map(|range| range.end - range.start).sum()
}

/// Whether an entry of the page map is a page of the process's own.
fn is_own(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0
}

/// Runs of pages of which the answer is yes, in bytes.
fn runs(pages: impl Iterator<Item = bool>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for (number, wanted) in (0..).zip(pages) {
        let page = number * PAGE..(number + 1) * PAGE;
        match all.last_mut() {
            Some(last) if wanted && last.end == page.start => last.end = page.end,
            _ if wanted => all.push(page),
            _ => {}
        }
    }
    all
}

/// Puts runs behind others, which end where these begin at the latest.
fn append(all: &mut Vec<Range<u64>>, more: Vec<Range<u64>>, offset: u64) {
    for run in more {
        let run = run.start + offset..run.end + offset;
        match all.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => all.push(run),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_and_apart() {
        let page = |number: u64| number * PAGE;
        let found = runs([true, true, false, true, false, false, true].into_iter());
        assert_eq!(found, [page(0)..page(2), page(3)..page(4), page(6)..page(7)]);
        assert_eq!(bytes(&found), page(4));
        assert_eq!(runs([false, false].into_iter()), []);
        assert!(is_own(PRESENT) && is_own(SWAPPED));
        assert!(!is_own(PRESENT | OF_FILE) && !is_own(0));
        // Found piece by piece they are no others.
        let mut pieces = runs([true, true].into_iter());
        append(&mut pieces, runs([true, false, true].into_iter()), page(2));
        append(&mut pieces, runs([false, true].into_iter()), page(5));
        assert_eq!(pieces, [page(0)..page(3), page(4)..page(5), page(6)..page(7)]);
    }

    #[test]
    fn parts_are_of_one_size_and_lose_nothing() {
        let runs =
            |numbers: &[(u64, u64)]| numbers.iter().map(|(start, end)| start * PAGE..end * PAGE).collect::<Vec<_>>();
        let pages = runs(&[(0, 3), (8, 9), (10, 16), (20, 22)]);
        let parts = [runs(&[(0, 3), (8, 9)]), runs(&[(10, 14)]), runs(&[(14, 16), (20, 22)])];
        assert_eq!(split(&pages, 3), parts);
        assert_eq!(split(&pages, 1), [pages]);
        assert_eq!(split(&[], 2), [Vec::new()]);
    }

    #[test]
    fn a_sealed_base_cannot_be_changed_and_zeros_take_no_room() {
        let base = Base::empty(64 * PAGE).unwrap();
        base.fill(3 * PAGE, &[7; 100]).unwrap();
        assert!(base.data().unwrap().into_iter().eq(std::iter::once(3 * PAGE..4 * PAGE)));
        base.seal().unwrap();
        assert!(base.fill(0, b"x").is_err());
        assert!(base.file().set_len(0).is_err());
        let copy = Base::empty(64 * PAGE).unwrap();
        copy.copy_from(&base, 64 * PAGE).unwrap();
        let mut page = [0; 100];
        copy.file().read_exact_at(&mut page, 3 * PAGE).unwrap();
        assert_eq!((page, copy.held()), ([7; 100], PAGE));
    }

    /// This process stands in for QEMU: a private mapping of a base, of which some pages were written.
    #[test]
    fn what_was_written_above_a_base_is_found_and_moved() {
        use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
        let length = 16 * PAGE;
        let base = Base::empty(length).unwrap();
        base.fill(2 * PAGE, &[1; 4096]).unwrap();
        base.seal().unwrap();
        let size = usize::try_from(length).unwrap();
        let map = || {
            // SAFETY: a new mapping of a file that nobody can shrink, at an address of the kernel's choice.
            unsafe {
                let rights = ProtFlags::READ | ProtFlags::WRITE;
                mmap(std::ptr::null_mut(), size, rights, MapFlags::PRIVATE, base.file(), 0).unwrap()
            }
        };
        let (source, child) = (map(), map());
        // SAFETY: both are mappings of `size` bytes that live until the end of this test, used by this thread alone.
        let (of_source, of_child) = unsafe {
            let slice = |at: *mut std::ffi::c_void| std::slice::from_raw_parts_mut(at.cast::<u8>(), size);
            (slice(source), slice(child))
        };
        // A page of the base is read, one is overwritten by zeros, a new one is written.
        assert_eq!(of_source[2 * 4096], 1);
        of_source[2 * 4096..3 * 4096].fill(0);
        of_source[5 * 4096..7 * 4096].fill(9);
        let own = identity_of(std::process::id()).unwrap();
        let block = |at: *mut std::ffi::c_void| Block { address: at as u64, length };
        let open = |at: *mut std::ffi::c_void| Guest::open(&own, block(at), None).unwrap();
        // Pages that are owned ahead hold what the base holds.
        let ahead = map();
        let owned = [2 * PAGE..3 * PAGE, 5 * PAGE..6 * PAGE];
        open(ahead).own(&owned, &base).unwrap();
        assert_eq!(open(ahead).pages(Scope::Written).unwrap(), owned);
        // SAFETY: the mapping is of `size` bytes, and nobody writes it any more.
        let of_ahead = unsafe { std::slice::from_raw_parts(ahead.cast::<u8>(), size) };
        assert_eq!((of_ahead[2 * 4096], of_ahead[5 * 4096]), (1, 0));
        let guest = open(source);
        let pages = guest.pages(Scope::Written).unwrap();
        assert_eq!(pages, [2 * PAGE..3 * PAGE, 5 * PAGE..7 * PAGE]);
        // More than was thought.
        let written = guest.capture(pages.clone(), Aside::room_for(&pages[..1])).unwrap();
        of_source[8 * 4096] = 4;
        open(child).complete(&base, Some(&written)).unwrap();
        assert_eq!((of_child[2 * 4096], of_child[6 * 4096], of_child[8 * 4096]), (0, 9, 0));
        // A new base out of the old one and what was written; one of all that there is.
        let (merged, whole) = (Base::empty(length).unwrap(), Base::empty(length).unwrap());
        merged.copy_from(&base, length).unwrap();
        guest.overwrite(&pages, &merged).unwrap();
        guest.fill(&guest.pages(Scope::All).unwrap(), &whole).unwrap();
        let at = |base: &Base, page: u64| {
            let mut byte = [0];
            base.file().read_exact_at(&mut byte, page * PAGE).unwrap();
            byte[0]
        };
        assert_eq!((at(&merged, 2), at(&merged, 5), at(&merged, 8)), (0, 9, 0));
        assert_eq!((at(&whole, 2), at(&whole, 5), at(&whole, 8)), (0, 9, 4));
        assert_eq!(whole.held(), 3 * PAGE);
        // SAFETY: no slice of the mappings is used from here on.
        unsafe {
            munmap(source, size).unwrap();
            munmap(child, size).unwrap();
            munmap(ahead, size).unwrap();
        }
    }

    /// A second block lies behind the first one in all that is captured, and each guest has its own.
    #[test]
    fn memory_that_a_guest_was_given_is_its_own() {
        use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
        let length = 8 * PAGE;
        let size = usize::try_from(length).unwrap();
        let base = Base::empty(2 * length).unwrap();
        base.fill(PAGE, &[1; 4096]).unwrap();
        // What stands there for the second block is copied, not mapped.
        base.fill(length + 2 * PAGE, &[2; 4096]).unwrap();
        base.seal().unwrap();
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let map = || {
            // SAFETY: new mappings, of a file that nobody can shrink and of none, at addresses of the kernel's choice.
            unsafe {
                let main = mmap(std::ptr::null_mut(), size, rights, MapFlags::PRIVATE, base.file(), 0).unwrap();
                (main, mmap_anonymous(std::ptr::null_mut(), size, rights, MapFlags::PRIVATE).unwrap())
            }
        };
        let (source, child) = (map(), map());
        let own = identity_of(std::process::id()).unwrap();
        let block = |at: *mut std::ffi::c_void| Block { address: at as u64, length };
        let open = |(main, growth)| Guest::open(&own, block(main), Some(block(growth))).unwrap();
        let byte = |at: *mut std::ffi::c_void, page: usize| {
            // SAFETY: a page within a mapping that lives until the end of this test, used by this thread alone.
            unsafe { &mut *at.cast::<u8>().add(page * 4096) }
        };
        let guest = open(source);
        guest.complete(&base, None).unwrap();
        assert_eq!((*byte(source.0, 1), *byte(source.1, 2)), (1, 2));
        *byte(source.0, 7) = 3;
        *byte(source.1, 0) = 4;
        let pages = guest.pages(Scope::Written).unwrap();
        assert_eq!(pages, [7 * PAGE..8 * PAGE, 8 * PAGE..9 * PAGE, 10 * PAGE..11 * PAGE]);
        let ends = |pages: &[Range<u64>]| (pages[0].clone(), pages[1].clone());
        assert_eq!(ends(&guest.pages(Scope::All).unwrap()), (0..8 * PAGE, 8 * PAGE..9 * PAGE));
        let written = guest.capture(pages.clone(), Aside::room_for(&pages)).unwrap();
        // A guest that waits for a fork owns nothing there until it gets what the other one has written.
        open(child).own(&pages, &base).unwrap();
        assert_eq!((*byte(child.1, 0), *byte(child.1, 2)), (0, 0));
        open(child).complete(&base, Some(&written)).unwrap();
        assert_eq!((*byte(child.0, 1), *byte(child.0, 7), *byte(child.1, 0), *byte(child.1, 2)), (1, 3, 4, 2));
        // A new base takes of the old one only what is mapped.
        let merged = Base::empty(2 * length).unwrap();
        merged.copy_from(&base, length).unwrap();
        let data = merged.data().unwrap();
        assert!(!data.is_empty() && data.iter().all(|run| run.end <= length), "{data:?}");
        // SAFETY: no part of the mappings is used from here on.
        unsafe {
            for at in [source.0, source.1, child.0, child.1] {
                munmap(at, size).unwrap();
            }
        }
    }
}
