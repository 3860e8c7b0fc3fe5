//! Storing a whole address space: an image, a file.

use std::io::{self, Read};

use burgeon_api::{Error, ErrorKind, Result};

use super::{ChunkStore, Writer};
use crate::{
    ChunkId,
    cut::{Blocks, Content, Cuts, Cutter},
    map::{Map, SECTOR_BYTES},
};

/// What became of the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Ingested {
    pub map: Map,
    /// Bytes that were read, before the length was rounded up to whole sectors.
    pub bytes: u64,
}

/// Bytes of the new space, in a chunk of that name, or of the name that the writer will give to its n-th.
struct Stretch {
    offset: u64,
    length: u64,
    chunk: std::result::Result<ChunkId, usize>,
    within: u32,
}

/// Cuts what `reader` gives, stores it through `writer`, and makes a map of it. `base` is an older version that shares
/// much with it: its blocks are found again wherever they now are. `progress` is told the bytes done.
///
/// # Errors
/// Those of the reader and of the store.
pub fn ingest(
    store: &ChunkStore,
    writer: &mut Writer<'_>,
    reader: impl Read,
    cutter: Cutter,
    base: Option<Map>,
    progress: &mut dyn FnMut(u64),
) -> Result<Ingested> {
    let (base, known) = match base.map(|base| (base, blocks(store, base))) {
        Some((base, Ok(known))) => (Some(base), Some(known)),
        // The older version only saves work; and storing all of the new one may be what heals it.
        Some((_, Err(error))) if matches!(error.kind, ErrorKind::Damaged | ErrorKind::NotFound) => {
            tracing::warn!(%error, "the older version cannot be read, so nothing is shared with it by its blocks");
            (None, None)
        }
        Some((_, Err(error))) => return Err(error),
        None => (None, None),
    };
    let mut cuts = match &known {
        Some(known) => Cuts::template(reader, known),
        None => Cuts::new(reader, cutter),
    };
    let mut stretches: Vec<Stretch> = Vec::new();
    // What the writer has got from others before.
    let first = writer.names()?.len();
    let mut count = first;
    let mut end = 0;
    while let Some(cut) = cuts.next()? {
        match cut.content {
            Content::Zeros => {}
            Content::Data(bytes) => {
                writer.put(bytes.to_vec())?;
                stretches.push(Stretch { offset: cut.offset, length: cut.length, chunk: Err(count), within: 0 });
                count += 1;
            }
            Content::Known(address) => {
                let Some(base) = &base else { return Err(Error::internal("a known block without a base")) };
                for piece in base.lookup(store, address..address + cut.length)? {
                    let (chunk, within) = piece.source.ok_or_else(|| Error::internal("a known block of zeros"))?;
                    let offset = cut.offset + (piece.range.start - address);
                    let length = piece.range.end - piece.range.start;
                    stretches.push(Stretch { offset, length, chunk: Ok(chunk), within });
                    writer.rely(chunk);
                }
            }
        }
        end = cut.offset + cut.length;
        progress(end);
    }
    let names = writer.names()?;
    let mut edit = Map::empty(end.next_multiple_of(SECTOR_BYTES).max(SECTOR_BYTES))?.edit();
    for Stretch { offset, length, chunk, within } in stretches {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(index) => *names.get(index).ok_or_else(|| Error::internal("a chunk without a name"))?,
        };
        edit.set(offset..offset + length, chunk, within)?;
    }
    // Only new nodes are read back by an edit of an empty map: none.
    let map = edit.finish(store, writer)?;
    Ok(Ingested { map, bytes: end })
}

/// The blocks of a stored address space.
fn blocks(store: &ChunkStore, map: Map) -> Result<Blocks> {
    let mut blocks = Blocks::default();
    let mut reader = MapBytes::new(store, map);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let at = reader.at;
        let count = reader.fill(&mut buffer).map_err(|error| error.context("read the older version"))?;
        if count == 0 {
            return Ok(blocks);
        }
        blocks.add(at, &buffer[..count]);
    }
}

/// The bytes of a map, one after the other.
pub struct MapBytes<'a> {
    store: &'a ChunkStore,
    map: Map,
    at: u64,
}

impl<'a> MapBytes<'a> {
    pub fn new(store: &'a ChunkStore, map: Map) -> MapBytes<'a> {
        MapBytes { store, map, at: 0 }
    }

    /// As [`Read::read`], with the store's own errors.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let end = (self.at + buffer.len() as u64).min(self.map.length());
        let count = usize::try_from(end - self.at).unwrap_or(0);
        if count > 0 {
            self.store.read_map(&self.map, self.at, &mut buffer[..count])?;
        }
        self.at = end;
        Ok(count)
    }
}

impl Read for MapBytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill(buffer).map_err(io::Error::other)
    }
}
