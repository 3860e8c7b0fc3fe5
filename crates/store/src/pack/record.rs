//! Records: a chunk as it stands in a pack.

use burgeon_api::{Error, Result};

use super::{RECORD_MAGIC, VERSION};
use crate::{
    chunk::{self, Codec, Declared, Encoded, Kind, MOST_CHUNK},
    ids::ChunkId,
    wire,
};

pub const RECORD_HEADER_BYTES: usize = 64;
const WHAT: &str = "a record's header";

/// What stands in front of a chunk's stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    pub id: ChunkId,
    pub kind: Kind,
    pub codec: Codec,
    /// Of the plain bytes.
    pub length: u32,
    /// Bytes that follow this header.
    pub stored: u32,
}

/// A chunk read from a pack, verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: ChunkId,
    pub kind: Kind,
    pub plain: Vec<u8>,
}

impl RecordHeader {
    /// Of a chunk as the encoder made it.
    ///
    /// # Errors
    /// `Invalid` for one that is longer as stored than a chunk may be.
    pub(crate) fn of(kind: Kind, encoded: &Encoded) -> Result<RecordHeader> {
        let stored = u32::try_from(encoded.stored.len()).unwrap_or(u32::MAX);
        let header = RecordHeader { id: encoded.id, kind, codec: encoded.codec, length: encoded.length, stored };
        header.check().map_err(|why| Error::invalid(format!("{:?}: {why}", encoded.id)))?;
        Ok(header)
    }

    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut block = [0; RECORD_HEADER_BYTES];
        wire::put(&mut block, 0, &RECORD_MAGIC);
        block[4] = VERSION;
        block[5] = self.codec as u8;
        block[6] = self.kind as u8;
        wire::put(&mut block, 8, &self.length.to_le_bytes());
        wire::put(&mut block, 12, &self.stored.to_le_bytes());
        wire::put(&mut block, 16, &self.id.0);
        wire::seal(&mut block);
        block
    }

    /// Reads a header and bounds what it declares.
    ///
    /// # Errors
    /// `Damaged` for bytes that are no header; `Refused` for a version, codec or kind that this program does not know.
    pub fn decode(block: &[u8; RECORD_HEADER_BYTES]) -> Result<RecordHeader> {
        wire::check_sealed(block, RECORD_MAGIC, VERSION, WHAT)?;
        wire::check_reserved(block, 7..8, WHAT)?;
        wire::check_reserved(block, 48..60, WHAT)?;
        let codec = match block[5] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            other => return Err(Error::refused(format!("a record has codec {other}; this Burgeon knows 0 and 1"))),
        };
        let Some(kind) = Kind::from_number(block[6]) else {
            return Err(Error::refused(format!("a record has kind {}; this Burgeon knows 1 and 2", block[6])));
        };
        let header = RecordHeader {
            id: ChunkId(wire::array(block, 16)),
            kind,
            codec,
            length: wire::u32_at(block, 8),
            stored: wire::u32_at(block, 12),
        };
        header.check().map_err(|why| Error::damaged(format!("{:?}: {why}", header.id)))?;
        Ok(header)
    }

    /// Bytes of header and chunk in the pack.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES as u64 + u64::from(self.stored)
    }

    fn check(&self) -> Result<(), String> {
        let RecordHeader { length, stored, .. } = *self;
        check_lengths(length, stored)?;
        match self.codec {
            Codec::Raw if stored != length => Err(format!("{length} bytes are stored raw as {stored}")),
            _ => Ok(()),
        }
    }

    pub(crate) fn read(&self, stored: &[u8]) -> Result<Record> {
        let declared = Declared { id: self.id, codec: self.codec, length: self.length };
        Ok(Record { id: self.id, kind: self.kind, plain: chunk::decode(&declared, stored)? })
    }
}

/// What holds of every stored chunk: it is not empty, not too long, and no longer than its plain bytes.
pub(super) fn check_lengths(length: u32, stored: u32) -> Result<(), String> {
    if length == 0 || length as usize > MOST_CHUNK {
        return Err(format!("{length} bytes are declared; a chunk has 1 to {MOST_CHUNK}"));
    }
    if stored == 0 || stored > length {
        return Err(format!("{length} bytes are stored as {stored}"));
    }
    Ok(())
}

/// The chunk in `bytes`, which are a record from its header to its end, as a [`crate::Place`] tells them. It is read
/// only if it is the expected one, and its BLAKE3 is its name.
///
/// # Errors
/// `Damaged` where it is not; `Refused` for what a newer Burgeon wrote.
pub fn read_record(bytes: &[u8], expected: ChunkId) -> Result<Record> {
    let lost = |error: Error| error.context(format!("read {expected:?}"));
    let Some((block, stored)) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>() else {
        return Err(lost(Error::damaged(format!("a record of {} bytes is none", bytes.len()))));
    };
    let header = RecordHeader::decode(block).map_err(lost)?;
    if header.id != expected {
        return Err(lost(Error::damaged(format!("{:?} lies in its place", header.id))));
    }
    if stored.len() as u64 != u64::from(header.stored) {
        return Err(lost(Error::damaged(format!("{} bytes follow where {} should", stored.len(), header.stored))));
    }
    header.read(stored)
}
