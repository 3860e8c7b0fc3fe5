//! Writing a pack from front to back.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use burgeon_api::{Error, Result};

use super::{
    ENTRY_BYTES, Entry, FILE_HEADER_BYTES, MOST_PACK, RecordHeader, TRAILER_BYTES, file_header, footer::footer,
};
use crate::{
    chunk::{Encoded, Kind},
    ids::{ChunkId, PackId, Place},
};

/// A pack in the making. Bytes go to `sink` as they come; a sink that fails ends the pack, whose records up to there
/// [`super::scan`] can still find.
pub struct PackWriter<W> {
    pack: PackId,
    sink: W,
    written: u64,
    entries: HashMap<ChunkId, Entry>,
    /// A write failed, so that nobody knows where the next byte would go.
    broken: bool,
}

/// A closed pack.
#[derive(Debug)]
pub struct Finished<W> {
    pub pack: PackId,
    pub sink: W,
    /// Bytes of the whole pack.
    pub length: u64,
    /// Its chunks, sorted by name.
    pub entries: Vec<Entry>,
}

impl<W: Write> PackWriter<W> {
    /// Begins a pack. The id is chosen by the caller, before the first byte.
    ///
    /// # Errors
    /// The sink's.
    pub fn new(pack: PackId, mut sink: W) -> Result<PackWriter<W>> {
        sink.write_all(&file_header(pack)).map_err(|error| failed(pack, &error))?;
        Ok(PackWriter { pack, sink, written: FILE_HEADER_BYTES as u64, entries: HashMap::new(), broken: false })
    }

    /// Appends a chunk and says where it lies. A chunk that is in the pack already is not written again.
    ///
    /// # Errors
    /// `Invalid` for a chunk that no pack takes, `Refused` where the pack would become longer than [`MOST_PACK`], and
    /// the sink's, after which the writer takes nothing more.
    pub fn append(&mut self, kind: Kind, encoded: &Encoded) -> Result<Place> {
        if let Some(entry) = self.entries.get(&encoded.id) {
            return Ok(entry.place);
        }
        let header = RecordHeader::of(kind, encoded)?;
        if self.length() + header.record_bytes() + ENTRY_BYTES as u64 > MOST_PACK {
            return Err(Error::refused(format!("{:?} would become longer than {MOST_PACK} bytes", self.pack)));
        }
        self.write(&header.encode())?;
        self.write(&encoded.stored)?;
        let place = Place { pack: self.pack, offset: self.written, stored: header.stored, length: header.length };
        self.written += header.record_bytes();
        self.entries.insert(encoded.id, Entry { id: encoded.id, kind, place });
        Ok(place)
    }

    /// Writes the footer.
    ///
    /// # Errors
    /// The sink's.
    pub fn finish(mut self) -> Result<Finished<W>> {
        let mut entries: Vec<Entry> = self.entries.values().copied().collect();
        entries.sort_unstable_by_key(|entry| entry.id);
        let footer = footer(self.pack, &entries, self.written)?;
        self.write(&footer)?;
        self.sink.flush().map_err(|error| failed(self.pack, &error))?;
        Ok(Finished { pack: self.pack, sink: self.sink, length: self.written + footer.len() as u64, entries })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.broken {
            return Err(Error::internal(format!("write {:?}: an earlier write failed", self.pack)));
        }
        self.sink.write_all(bytes).map_err(|error| {
            self.broken = true;
            failed(self.pack, &error)
        })
    }
}

impl<W> PackWriter<W> {
    #[must_use]
    pub fn pack(&self) -> PackId {
        self.pack
    }

    /// Bytes of the pack if it were closed now.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.written + (self.entries.len() * ENTRY_BYTES + TRAILER_BYTES) as u64
    }

    /// Chunks in the pack.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.entries.len()
    }

    /// Where a chunk lies in this pack, if it does.
    #[must_use]
    pub fn place(&self, id: ChunkId) -> Option<Place> {
        self.entries.get(&id).map(|entry| entry.place)
    }

    /// What was written so far: for a sink in memory, chunks can be read from it before the pack is closed.
    #[must_use]
    pub fn sink(&self) -> &W {
        &self.sink
    }
}

fn failed(pack: PackId, error: &io::Error) -> Error {
    Error::io(format!("write {pack:?}"), error)
}
