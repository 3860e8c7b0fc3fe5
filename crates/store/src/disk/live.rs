//! What a disk reads from and writes to: its layers, one above the other, and the base.

use std::{io, ops::Range, path::Path, sync::Arc};

use burgeon_api::Result;

use super::{Base, OpenBase, layer::Layer, record::Record, states::State};

/// The layers of an open disk, and what is below them.
pub(super) struct Live {
    /// The top one last.
    pub(super) layers: Vec<Arc<Layer>>,
    pub(super) base: Arc<dyn Base>,
    pub(super) size: u64,
}

/// Who has some bytes.
pub(super) enum Found<'a> {
    Layer(&'a Layer),
    Zero,
    Base,
}

impl Live {
    /// Layers below the top must be there; a top that was never written to is made.
    pub(super) fn open(directory: &Path, record: &Record, open_base: OpenBase<'_>) -> Result<Live> {
        let base = open_base(record.below.base, record.origin)?;
        let below = record.below.layers.iter().map(|name| Layer::open_sealed(&directory.join(name)));
        let top = Layer::open(&directory.join(&record.top), record.size);
        let layers = below.chain([top]).map(|layer| layer.map(Arc::new)).collect::<Result<_>>()?;
        Ok(Live { layers, base, size: record.size })
    }

    /// # Errors
    /// `InvalidInput` for bytes beyond the end.
    pub(super) fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    pub(super) fn top(&self) -> &Arc<Layer> {
        // A disk is opened with a layer, and layers are only taken away below the top.
        &self.layers[self.layers.len() - 1]
    }

    /// Tells `visit` in order what the lowest `count` layers and the base have of the bytes, until it says to stop.
    /// Says whether it came to the end.
    pub(super) fn walk(
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

    /// Reads what the lowest `count` layers and the base have.
    pub(super) fn read(&self, count: usize, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
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
