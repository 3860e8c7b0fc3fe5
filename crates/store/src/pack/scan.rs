//! Saving what can be read of a pack whose footer is missing or damaged.

use std::io::{self, Read};

use burgeon_api::{Error, Result};

use super::{
    ENTRY_BYTES, Entry, FILE_HEADER_BYTES, MOST_PACK, RECORD_HEADER_BYTES, RecordHeader, TRAILER_BYTES, Tail,
    check_pack, read_file_header, read_index,
};
use crate::{
    chunk::MOST_CHUNK,
    ids::{PackId, Place},
};

/// What a walk over a pack's records found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salvage {
    /// The records that are whole, in their order, each verified against its name.
    pub entries: Vec<Entry>,
    /// Where they end.
    pub end: u64,
    /// Why the walk ended there; none where a whole footer follows.
    pub stopped: Option<Error>,
}

/// Walks the records of a pack from its front to the first bad one. Holds one record at a time.
///
/// # Errors
/// `Damaged` or `Refused` where not even the pack's header reads, and the reader's.
pub fn scan(expected: PackId, mut reader: impl Read) -> Result<Salvage> {
    let failed = |error: io::Error| Error::io(format!("read {expected:?}"), &error);
    let mut head = [0; FILE_HEADER_BYTES];
    if fill(&mut reader, &mut head).map_err(failed)? < head.len() {
        return Err(Error::damaged(format!("{expected:?} ends within its header")));
    }
    let found = read_file_header(&head).map_err(|error| error.context(format!("read {expected:?}")))?;
    check_pack(found, expected)?;

    let mut salvage = Salvage { entries: Vec::new(), end: FILE_HEADER_BYTES as u64, stopped: None };
    let mut stored = Vec::new();
    loop {
        let mut block = [0; RECORD_HEADER_BYTES];
        let got = fill(&mut reader, &mut block).map_err(failed)?;
        let next = if got < block.len() {
            Err(Error::damaged("the pack ends within a record's header"))
        } else {
            RecordHeader::decode(&block)
        };
        let header = match next {
            Ok(header) if salvage.end + header.record_bytes() <= MOST_PACK => header,
            Ok(_) => {
                salvage.stop(Error::damaged("the pack is longer than packs are"));
                return Ok(salvage);
            }
            Err(error) => {
                if !footer_follows(expected, &salvage, &block[..got], &mut reader).map_err(failed)? {
                    salvage.stop(error);
                }
                return Ok(salvage);
            }
        };
        stored.resize((header.stored as usize).min(MOST_CHUNK), 0);
        if fill(&mut reader, &mut stored).map_err(failed)? < stored.len() {
            salvage.stop(Error::damaged("the pack ends within a record"));
            return Ok(salvage);
        }
        if let Err(error) = header.read(&stored) {
            salvage.stop(error);
            return Ok(salvage);
        }
        let place = Place { pack: expected, offset: salvage.end, stored: header.stored, length: header.length };
        salvage.entries.push(Entry { id: header.id, kind: header.kind, place });
        salvage.end += header.record_bytes();
    }
}

impl Salvage {
    fn stop(&mut self, error: Error) {
        self.stopped = Some(error.context(format!("byte {}", self.end)));
    }
}

/// Whether what begins with `read` and goes on in `reader` is the footer of the records found.
fn footer_follows(pack: PackId, salvage: &Salvage, read: &[u8], reader: impl Read) -> io::Result<bool> {
    let most = salvage.entries.len() * ENTRY_BYTES + TRAILER_BYTES;
    let mut tail = read.to_vec();
    // One byte more tells a longer file from a footer.
    reader.take((most + 1 - read.len().min(most)) as u64).read_to_end(&mut tail)?;
    let mut known = salvage.entries.clone();
    known.sort_unstable_by_key(|entry| entry.id);
    Ok(matches!(read_index(pack, &tail, salvage.end + tail.len() as u64), Ok(Tail::Index(index)) if index == known))
}

/// Reads until `bytes` are full or the reader is at its end, and says how many came.
pub(crate) fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match reader.read(&mut bytes[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}
