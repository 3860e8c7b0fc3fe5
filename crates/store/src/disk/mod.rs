//! Disks that VMs write to: a stack of layers above a base that never changes.
//!
//! ```text
//! top layer   takes all writes                    one file each, see [`layer`]
//! layers      sealed: never written again, and perhaps shared with other disks
//! base        a block map in the store, or nothing: zeros
//! ```
//!
//! A snapshot seals the top layer and puts an empty one above it: no data is moved, so it takes as long as one sync.
//! Calls block, and may come from many threads at once; requests that overlap while both are under way take effect in
//! any order, as on a real disk.

mod image_base;
mod layer;
mod states;

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use burgeon_api::{Error, Result};

pub use image_base::ImageBase;
use layer::Layer;
pub use layer::MOST_BYTES;
use states::State;

/// What is below all layers. It never changes.
pub trait Base: Send + Sync {
    /// Reads bytes; those beyond its end are zeros.
    ///
    /// # Errors
    /// Where they cannot be had, or are damaged.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Whether the bytes from the range's start on are known to be zeros, and for how many of them that holds.
    ///
    /// # Errors
    /// Where it cannot be told.
    fn run(&self, range: Range<u64>) -> io::Result<(bool, u64)>;

    /// Whether a read would be answered without waiting for anything slow.
    fn is_near(&self, range: Range<u64>) -> bool;
}

/// A disk without a base: zeros.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Base for Nothing {
    fn read(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn run(&self, range: Range<u64>) -> io::Result<(bool, u64)> {
        Ok((true, range.end - range.start))
    }

    fn is_near(&self, _: Range<u64>) -> bool {
        true
    }
}

struct Stack {
    /// The top one last.
    layers: Vec<Arc<Layer>>,
    base: Arc<dyn Base>,
}

/// A disk. See the module.
pub struct Disk {
    size: u64,
    directory: PathBuf,
    /// Taken for reading by each request, for writing by what changes the stack: so that waits for those under way.
    stack: RwLock<Stack>,
}

/// What is at some bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Written to a layer of the disk.
    Own,
    /// As in the base.
    Base,
    /// Zeros that take no place.
    Zero,
}

impl Disk {
    /// Opens a disk of `size` bytes from its layers in `directory`, the top one last. Layers that were never written to
    /// are made.
    ///
    /// # Errors
    /// See [`Layer::open`]; `Invalid` without a layer.
    pub fn open(directory: &Path, size: u64, layers: &[String], base: Arc<dyn Base>) -> Result<Disk> {
        if layers.is_empty() {
            return Err(Error::invalid("a disk without a layer"));
        }
        // A layer below may be of a time when the disk was smaller.
        let layers: Result<Vec<_>> = layers
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let path = directory.join(name);
                let known = (index + 1 < layers.len()).then(|| Layer::size_of(&path)).transpose()?.flatten();
                Layer::open(&path, known.unwrap_or(size)).map(Arc::new)
            })
            .collect();
        Ok(Disk { size, directory: directory.to_path_buf(), stack: RwLock::new(Stack { layers: layers?, base }) })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    fn stack(&self) -> RwLockReadGuard<'_, Stack> {
        self.stack.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    /// Whether a read would be answered without waiting for anything but the machine's own disk.
    #[must_use]
    pub fn is_near(&self, offset: u64, length: u64) -> bool {
        let stack = self.stack();
        let mut near = true;
        let end = offset.saturating_add(length).min(self.size);
        // Only the base can be far away.
        let walked = stack.walk(stack.layers.len(), offset, end, &mut |found, range| {
            near &= !matches!(found, Found::Base) || stack.base.is_near(range);
            Ok(near)
        });
        walked.is_ok() && near
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Beyond the end, or where a layer or the base cannot be read.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        let stack = self.stack();
        stack.read(stack.layers.len(), offset, bytes)
    }

    /// Writes bytes. When it returns, they survive the end of this process; after the next [`Self::flush`] also a power cut.
    ///
    /// # Errors
    /// Beyond the end, or where the layer cannot be written or filled from below.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        let stack = self.stack();
        let below = stack.layers.len() - 1;
        stack.top().write(offset, bytes, &|offset, bytes| stack.read(below, offset, bytes))
    }

    /// Makes bytes zero, without keeping their place where that is possible.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let stack = self.stack();
        let below = stack.layers.len() - 1;
        stack.top().zero(offset, length, &|offset, bytes| stack.read(below, offset, bytes))
    }

    /// Says that nobody needs these bytes any more: whole blocks of them read as zeros from now on.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let end =
            if offset + length == self.size { self.size } else { (offset + length) / states::BLOCK * states::BLOCK };
        let start = offset.next_multiple_of(states::BLOCK);
        if start < end { self.zero(start, end - start) } else { Ok(()) }
    }

    /// Returns once all that was written before survives a power cut.
    ///
    /// # Errors
    /// Where the machine's disk fails; then every later flush fails as well, because what is lost is not known.
    pub fn flush(&self) -> io::Result<()> {
        let top = self.stack().top().clone();
        top.flush()
    }

    /// What lies from `offset` on, and for how many bytes up to `end`.
    ///
    /// # Errors
    /// Beyond the end, or where the base cannot tell.
    pub fn extent(&self, offset: u64, end: u64) -> io::Result<(Extent, u64)> {
        self.check(offset, end.saturating_sub(offset))?;
        let stack = self.stack();
        let mut first: Option<(Extent, u64)> = None;
        stack.walk(stack.layers.len(), offset, end, &mut |found, range| {
            let mut at = range.start;
            while at < range.end {
                let (extent, length) = match found {
                    Found::Layer(_) => (Extent::Own, range.end - at),
                    Found::Zero => (Extent::Zero, range.end - at),
                    Found::Base => match stack.base.run(at..range.end)? {
                        (true, length) => (Extent::Zero, length),
                        (false, length) => (Extent::Base, length),
                    },
                };
                match &mut first {
                    None => first = Some((extent, length)),
                    Some((known, sum)) if *known == extent => *sum += length,
                    Some(_) => return Ok(false),
                }
                at += length;
            }
            Ok(true)
        })?;
        first.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no bytes"))
    }

    /// Puts an empty layer on top. What was written before is in the layers below it from then on, and never changes
    /// there; it survives a power cut when this returns.
    ///
    /// # Errors
    /// Where the flush fails or the layer cannot be made; then the disk is as before.
    pub fn seal(&self, name: &str) -> Result<()> {
        let new = Arc::new(Layer::open(&self.directory.join(name), self.size)?);
        let mut stack = self.stack.write().unwrap_or_else(PoisonError::into_inner);
        stack.top().flush().map_err(|error| Error::io("sync the layer that is to be sealed", &error))?;
        stack.layers.push(new);
        Ok(())
    }

    /// Puts another base under the topmost `kept` layers, in place of the layers below them: what a sealed layer held
    /// is in the base now. The contents stay the same.
    pub fn rebase(&self, base: Arc<dyn Base>, kept: usize) {
        let mut stack = self.stack.write().unwrap_or_else(PoisonError::into_inner);
        let sealed = stack.layers.len().saturating_sub(kept.max(1));
        stack.layers.drain(..sealed);
        stack.base = base;
    }

    /// Bytes that the disk's top layer takes.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        self.stack().top().data_bytes()
    }
}

enum Found<'a> {
    Layer(&'a Layer),
    Zero,
    Base,
}

impl Stack {
    fn top(&self) -> &Arc<Layer> {
        // A disk is opened with a layer, and layers are only taken away below the top.
        &self.layers[self.layers.len() - 1]
    }

    /// Tells `visit` in order what the lowest `count` layers and the base have of the bytes, until it says to stop.
    /// Says whether it came to the end.
    fn walk(
        &self,
        count: usize,
        offset: u64,
        end: u64,
        visit: &mut dyn FnMut(Found<'_>, Range<u64>) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let Some(layer) = count.checked_sub(1).map(|index| &*self.layers[index]) else {
            return visit(Found::Base, offset..end);
        };
        let mut at = offset;
        while at < end {
            let (state, length) = match layer.size().min(end) {
                within if at < within => layer.run(at, within),
                // The disk has grown since.
                _ => (State::Absent, end - at),
            };
            let range = at..at + length;
            let go_on = match state {
                State::Data => visit(Found::Layer(layer), range)?,
                State::Zero => visit(Found::Zero, range)?,
                State::Absent => self.walk(count - 1, range.start, range.end, visit)?,
            };
            if !go_on {
                return Ok(false);
            }
            at += length;
        }
        Ok(true)
    }

    fn read(&self, count: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        self.walk(count, offset, end, &mut |found, range| {
            let position = |at: u64| usize::try_from(at - offset).unwrap_or(0);
            let piece = &mut bytes[position(range.start)..position(range.end)];
            match found {
                Found::Layer(layer) => layer.read(range.start, piece)?,
                Found::Zero => piece.fill(0),
                Found::Base => self.base.read(range.start, piece)?,
            }
            Ok(true)
        })
        .map(drop)
    }
}

#[cfg(test)]
mod tests;
