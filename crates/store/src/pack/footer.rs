//! The footer of a pack: its index, sorted by chunk, and the trailer that says where the index is.

use std::ops::Range;

use burgeon_api::{Error, Result};

use super::{
    Entry, FILE_HEADER_BYTES, MOST_PACK, TRAILER_MAGIC, VERSION, check_pack,
    record::{RECORD_HEADER_BYTES, check_lengths},
};
use crate::{
    chunk::Kind,
    ids::{ChunkId, PackId, Place},
    wire,
};

pub const ENTRY_BYTES: usize = 52;
pub const TRAILER_BYTES: usize = 64;
const WHAT: &str = "a pack's trailer";

/// The last bytes of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub pack: PackId,
    /// Chunks in the pack.
    pub entries: u32,
    /// Where the records end and the index begins.
    pub index_offset: u64,
    pub index_crc32: u32,
    /// Bytes of the whole pack, this trailer included.
    pub length: u64,
}

/// What the end of a pack tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tail {
    /// The entries of the whole index, sorted by chunk.
    Index(Vec<Entry>),
    /// The index begins before the given bytes: call again with this range of the pack, which ends at its end.
    More(Range<u64>),
}

impl Trailer {
    #[must_use]
    pub fn encode(&self) -> [u8; TRAILER_BYTES] {
        let mut block = [0; TRAILER_BYTES];
        wire::put(&mut block, 0, &TRAILER_MAGIC);
        block[4] = VERSION;
        wire::put(&mut block, 8, &self.entries.to_le_bytes());
        wire::put(&mut block, 12, &self.index_crc32.to_le_bytes());
        wire::put(&mut block, 16, &self.index_offset.to_le_bytes());
        wire::put(&mut block, 24, &self.length.to_le_bytes());
        wire::put(&mut block, 32, &self.pack.0);
        wire::seal(&mut block);
        block
    }

    /// Reads a trailer, whose numbers then agree with each other.
    ///
    /// # Errors
    /// `Damaged` for bytes that are no trailer, `Refused` for one of another version.
    pub fn decode(block: &[u8; TRAILER_BYTES]) -> Result<Trailer> {
        wire::check_sealed(block, TRAILER_MAGIC, VERSION, WHAT)?;
        wire::check_reserved(block, 5..8, WHAT)?;
        wire::check_reserved(block, 48..60, WHAT)?;
        let trailer = Trailer {
            pack: PackId(wire::array(block, 32)),
            entries: wire::u32_at(block, 8),
            index_crc32: wire::u32_at(block, 12),
            index_offset: wire::u64_at(block, 16),
            length: wire::u64_at(block, 24),
        };
        let fits = trailer.length <= MOST_PACK
            && trailer.index_offset >= FILE_HEADER_BYTES as u64
            && trailer.index_offset < MOST_PACK
            && trailer.index_offset + trailer.index_bytes() + TRAILER_BYTES as u64 == trailer.length;
        if !fits {
            return Err(Error::damaged(format!("{WHAT} has numbers that do not fit each other: {trailer:?}")));
        }
        Ok(trailer)
    }

    fn index_bytes(&self) -> u64 {
        u64::from(self.entries) * ENTRY_BYTES as u64
    }

    /// Reads the index: all bytes between records and trailer.
    fn read_entries(&self, bytes: &[u8]) -> Result<Vec<Entry>> {
        if crc32fast::hash(bytes) != self.index_crc32 {
            return Err(Error::damaged("the index has a wrong checksum"));
        }
        let (blocks, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let mut entries: Vec<Entry> = Vec::with_capacity(blocks.len());
        let mut record_bytes = 0;
        for block in blocks {
            let entry = self.read_entry(block)?;
            if entries.last().is_some_and(|last| last.id >= entry.id) {
                return Err(Error::damaged(format!("the index is not sorted at {:?}", entry.id)));
            }
            record_bytes += RECORD_HEADER_BYTES as u64 + u64::from(entry.place.stored);
            entries.push(entry);
        }
        if record_bytes != self.index_offset - FILE_HEADER_BYTES as u64 {
            return Err(Error::damaged(format!(
                "the index tells of {record_bytes} bytes of records; there are others"
            )));
        }
        Ok(entries)
    }

    fn read_entry(&self, block: &[u8; ENTRY_BYTES]) -> Result<Entry> {
        let id = ChunkId(wire::array(block, 0));
        wire::check_reserved(block, 49..52, "an entry of a pack's index")?;
        let Some(kind) = Kind::from_number(block[48]) else {
            return Err(Error::refused(format!("an entry has kind {}; this Burgeon knows 1 and 2", block[48])));
        };
        let place = Place {
            pack: self.pack,
            offset: wire::u64_at(block, 32),
            stored: wire::u32_at(block, 40),
            length: wire::u32_at(block, 44),
        };
        check_lengths(place.length, place.stored).map_err(|why| Error::damaged(format!("{id:?}: {why}")))?;
        let record_bytes = RECORD_HEADER_BYTES as u64 + u64::from(place.stored);
        let inside = place.offset >= FILE_HEADER_BYTES as u64
            && place.offset.checked_add(record_bytes).is_some_and(|end| end <= self.index_offset);
        if !inside {
            return Err(Error::damaged(format!("{id:?} lies at {}, outside the pack's records", place.offset)));
        }
        Ok(Entry { id, kind, place })
    }
}

/// The bytes of the footer: the index of these entries, which are sorted by chunk, and the trailer.
pub(super) fn footer(pack: PackId, entries: &[Entry], index_offset: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES + TRAILER_BYTES);
    for entry in entries {
        bytes.extend_from_slice(&entry.id.0);
        bytes.extend_from_slice(&entry.place.offset.to_le_bytes());
        bytes.extend_from_slice(&entry.place.stored.to_le_bytes());
        bytes.extend_from_slice(&entry.place.length.to_le_bytes());
        bytes.extend_from_slice(&[entry.kind as u8, 0, 0, 0]);
    }
    let trailer = Trailer {
        pack,
        entries: u32::try_from(entries.len()).map_err(|_| Error::internal("a pack has too many chunks"))?,
        index_offset,
        index_crc32: crc32fast::hash(&bytes),
        length: index_offset + (bytes.len() + TRAILER_BYTES) as u64,
    };
    bytes.extend_from_slice(&trailer.encode());
    Ok(bytes)
}

/// The index of the expected pack, whose length is `length` bytes and which ends with the bytes of `tail`. How many
/// those are is the caller's choice, from 64 on; 16 KiB hold the index of most packs.
///
/// # Errors
/// `Damaged` where footer or length are not those of this pack; `Refused` for what a newer Burgeon wrote.
pub fn read_index(expected: PackId, tail: &[u8], length: u64) -> Result<Tail> {
    let lost = |error: Error| error.context(format!("read the index of {expected:?}"));
    let Some((before, block)) = tail.split_last_chunk::<TRAILER_BYTES>() else {
        return Err(lost(Error::damaged(format!("{} bytes are too few for a trailer", tail.len()))));
    };
    let trailer = Trailer::decode(block).map_err(lost)?;
    check_pack(trailer.pack, expected).map_err(lost)?;
    if trailer.length != length {
        let text = format!("it has {length} bytes, and {} by its trailer", trailer.length);
        return Err(lost(Error::damaged(text)));
    }
    let missing = usize::try_from(trailer.index_bytes()).ok().and_then(|index| before.len().checked_sub(index));
    match missing {
        Some(start) => trailer.read_entries(&before[start..]).map(Tail::Index).map_err(lost),
        None => Ok(Tail::More(trailer.index_offset..trailer.length)),
    }
}
