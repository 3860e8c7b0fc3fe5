//! Packs: files that hold many chunks. It owns the format (docs/formats.md, "Packs"): what a writer makes, what a
//! reader refuses, and what can be saved of a pack that breaks off. Pure: bytes come in, bytes go out; where packs
//! lie is the business of [`crate::objects`].
//!
//! A pack is written once from front to back, closed by its footer, and never changed. Its records stand on their
//! own: each names its chunk, so that [`scan`] finds them without the footer.

mod footer;
#[cfg(feature = "s3")]
mod reads;
mod record;
mod scan;
#[cfg(test)]
mod tests;
mod writer;

use burgeon_api::{Error, Result};

pub use footer::{ENTRY_BYTES, TRAILER_BYTES, Tail, Trailer, read_index};
#[cfg(feature = "s3")]
pub(crate) use reads::{Wanted, reads, record_bytes};
pub use record::{RECORD_HEADER_BYTES, Record, RecordHeader, read_record};
pub(crate) use scan::fill;
pub use scan::{Salvage, scan};
pub use writer::{Finished, PackWriter};

use crate::{
    chunk::Kind,
    ids::{ChunkId, PackId, Place},
    wire,
};

/// Where a pack on a local disk is closed, in bytes.
pub const PACK_BYTES_LOCAL: u64 = 16 << 20;
/// Where a pack for a remote store is closed, in bytes: requests cost more there than the bytes they carry.
pub const PACK_BYTES_REMOTE: u64 = 64 << 20;
/// The longest pack that is written or read.
pub const MOST_PACK: u64 = 1 << 30;

/// The one version that this code writes and reads.
pub const VERSION: u8 = 1;
pub const FILE_HEADER_BYTES: usize = 32;
const FILE_MAGIC: [u8; 4] = *b"BgnP";
const RECORD_MAGIC: [u8; 4] = *b"BgnR";
const TRAILER_MAGIC: [u8; 4] = *b"BgnI";

/// One chunk of a pack: what it is, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: ChunkId,
    pub kind: Kind,
    pub place: Place,
}

/// The first bytes of a pack.
#[must_use]
pub fn file_header(pack: PackId) -> [u8; FILE_HEADER_BYTES] {
    let mut block = [0; FILE_HEADER_BYTES];
    wire::put(&mut block, 0, &FILE_MAGIC);
    block[4] = VERSION;
    wire::put(&mut block, 12, &pack.0);
    wire::seal(&mut block);
    block
}

/// Which pack the first bytes of a file are of.
///
/// # Errors
/// `Damaged` for bytes that are no header, `Refused` for one of another version.
pub fn read_file_header(block: &[u8; FILE_HEADER_BYTES]) -> Result<PackId> {
    let what = "the header of a pack";
    wire::check_sealed(block, FILE_MAGIC, VERSION, what)?;
    wire::check_reserved(block, 5..12, what)?;
    Ok(PackId(wire::array(block, 12)))
}

fn check_pack(found: PackId, expected: PackId) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::damaged(format!("{found:?} lies where {expected:?} should be")))
}
