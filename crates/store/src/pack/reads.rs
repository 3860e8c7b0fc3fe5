//! Which reads give wanted records: neighbours together, since a request takes longer than the bytes between them.

use std::ops::Range;

use super::RECORD_HEADER_BYTES;
use crate::{ChunkId, PackId, Place};

/// Bytes between two records that are read rather than asked for apart.
const GAP: u64 = 32 << 10;

/// A record that is wanted.
pub(crate) type Wanted = (Place, ChunkId);

/// Bytes of a record with its header.
pub(crate) fn record_bytes(place: &Place) -> u64 {
    RECORD_HEADER_BYTES as u64 + u64::from(place.stored)
}

/// One read, and which of the wanted chunks it gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) pack: PackId,
    pub(crate) range: Range<u64>,
    pub(crate) wanted: Range<usize>,
}

/// The reads, of at most so many bytes each unless one record has more, for records that are sorted by place.
pub(crate) fn reads(wanted: &[Wanted], most: u64) -> Vec<Reading> {
    let mut reads: Vec<Reading> = Vec::new();
    for (index, (place, _)) in wanted.iter().enumerate() {
        let end = place.offset + record_bytes(place);
        match reads.last_mut() {
            Some(last)
                if last.pack == place.pack
                    && place.offset <= last.range.end + GAP
                    && end.saturating_sub(last.range.start) <= most =>
            {
                last.range.end = last.range.end.max(end);
                last.wanted.end = index + 1;
            }
            _ => reads.push(Reading { pack: place.pack, range: place.offset..end, wanted: index..index + 1 }),
        }
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = 8 << 20;

    #[test]
    fn neighbours_are_read_together() {
        let at = |pack: u8, offset: u64, stored: u32| {
            let place = Place { pack: PackId([pack; 16]), offset, stored, length: stored };
            (place, ChunkId([pack; 32]))
        };
        let wanted = [at(1, 32, 936), at(1, 1032, 936), at(1, 2032 + GAP, 10), at(1, 90_000_000, 10), at(2, 32, 10)];
        let reads = reads(&wanted, MOST);
        let told: Vec<_> = reads.iter().map(|read| (read.pack.0[0], read.range.clone(), read.wanted.clone())).collect();
        assert_eq!(told, [(1, 32..2032 + GAP + 74, 0..3), (1, 90_000_000..90_000_074, 3..4), (2, 32..106, 4..5),]);
        let large: Vec<_> = (0..20).map(|index| at(1, 32 + index * (1 << 20), (1 << 20) - 64)).collect();
        assert!(super::reads(&large, MOST).iter().all(|read| read.range.end - read.range.start <= MOST));
    }
}
