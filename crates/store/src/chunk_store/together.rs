//! Reads from a bucket: a request takes far longer than the bytes it brings, so that neighbours come in one, several are
//! under way at once, and what lies behind a single chunk comes along. All of it is verified as every read is.

use burgeon_api::{Error, Result};
use bytes::Bytes;

use super::{
    ChunkStore,
    flights::{Boarded, Pilot},
    lock, missing, object_name,
};
use crate::{
    ChunkId, Place,
    objects::Bucket,
    pack::{self, RECORD_HEADER_BYTES, RecordHeader, Wanted, reads, record_bytes},
};

/// Bytes behind a single chunk that come along: nodes of a map lie side by side.
const BEHIND: u64 = 128 << 10;
/// The most bytes of one request where several are under way.
const MOST_READ: u64 = 1 << 20;
/// Bytes that are in memory at once for who reads very much.
const MOST_HELD: u64 = 32 << 20;

impl ChunkStore {
    /// A record; those that lie behind it go into the cache.
    pub(super) fn read_ahead(&self, bucket: &Bucket, id: ChunkId, place: Place) -> Result<Vec<u8>> {
        let length = record_bytes(&place);
        let bytes = bucket.get_up_to(&object_name(place.pack), place.offset..place.offset + length + BEHIND)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (own, mut rest) = bytes.split_at_checked(length).ok_or_else(|| {
            Error::damaged(format!("it ends within {id:?}, which has {length} bytes with its header"))
        })?;
        let record = pack::read_record(own, id)?;
        while let Some((header, length)) = next_record(rest) {
            let (next, behind) = rest.split_at(length);
            let Ok(next) = pack::read_record(next, header.id) else { break };
            lock(&self.cache).put(header.id, next.plain.into(), header.length as usize);
            rest = behind;
        }
        Ok(record.plain)
    }

    /// Chunks through the cache, each read by one of those who want it.
    pub(super) fn together(&self, bucket: &Bucket, ids: &[ChunkId]) -> Result<Vec<Bytes>> {
        let mut found: Vec<Option<Bytes>> = ids.iter().map(|id| self.cached(*id)).collect();
        let (mut pilots, mut tickets) = (Vec::new(), Vec::new());
        for index in 0..ids.len() {
            if found[index].is_none() && !ids[..index].contains(&ids[index]) {
                match self.flights.board(ids[index]) {
                    Boarded::Reads(pilot) => pilots.push((index, pilot)),
                    Boarded::Waits(ticket) => tickets.push((index, ticket)),
                }
            }
        }
        let read = self.board_all(bucket, ids, &pilots, &mut found);
        if let Err(error) = &read {
            for (_, pilot) in &pilots {
                pilot.land(Err(error.clone()));
            }
        }
        for (index, ticket) in tickets {
            found[index] = Some(ticket.wait()?);
        }
        read?;
        // One that was asked for twice is in the place of the first.
        let at = |index: usize| ids.iter().position(|id| *id == ids[index]).and_then(|first| found[first].clone());
        (0..ids.len()).map(|index| at(index).ok_or_else(|| missing(ids[index]))).collect()
    }

    /// Reads what is this caller's to read, and lands each as it comes.
    fn board_all(
        &self,
        bucket: &Bucket,
        ids: &[ChunkId],
        pilots: &[(usize, Pilot<'_>)],
        found: &mut [Option<Bytes>],
    ) -> Result<()> {
        let places = self.catalog.blocking_places(pilots.iter().map(|(index, _)| ids[*index]).collect())?;
        let mut order = Vec::new();
        for (number, ((index, _), place)) in pilots.iter().zip(places).enumerate() {
            order.push((place.ok_or_else(|| missing(ids[*index]))?, number));
        }
        order.sort_unstable_by_key(|(place, _)| (place.pack, place.offset));
        let wanted: Vec<Wanted> = order.iter().map(|(place, number)| (*place, ids[pilots[*number].0])).collect();
        self.records(bucket, &wanted, &mut |at, record| {
            let (index, pilot) = &pilots[order[at].1];
            let bytes = Bytes::from(record?);
            lock(&self.cache).put(ids[*index], bytes.clone(), bytes.len());
            found[*index] = Some(bytes.clone());
            pilot.land(Ok(bytes));
            Ok(())
        })
    }

    /// Records that are sorted by place; each is given to `take` with its number.
    pub(super) fn records(
        &self,
        bucket: &Bucket,
        wanted: &[Wanted],
        take: &mut dyn FnMut(usize, Result<Vec<u8>>) -> Result<()>,
    ) -> Result<()> {
        let reads = reads(wanted, MOST_READ);
        let at_once = usize::try_from(MOST_HELD / MOST_READ).unwrap_or(1);
        for some in reads.chunks(at_once) {
            let ranges = some.iter().map(|read| (object_name(read.pack), read.range.clone())).collect();
            for (read, answer) in some.iter().zip(bucket.get_ranges(ranges)?) {
                for number in read.wanted.clone() {
                    let (place, id) = wanted[number];
                    let record = answer.as_ref().map_err(Clone::clone).and_then(|bytes| {
                        let from = usize::try_from(place.offset - read.range.start).unwrap_or(usize::MAX);
                        let length = usize::try_from(record_bytes(&place)).unwrap_or(usize::MAX);
                        let record = bytes.get(from..from.saturating_add(length)).unwrap_or_default();
                        pack::read_record(record, id).map(|record| record.plain)
                    });
                    // Moved by a collection, perhaps; or damaged, which this tells.
                    take(number, record.or_else(|error| self.elsewhere(id, place, self.at_place(place, error))))?;
                }
            }
        }
        Ok(())
    }
}

/// The header and the length of the record that is here, if it is whole.
fn next_record(bytes: &[u8]) -> Option<(RecordHeader, usize)> {
    let header = RecordHeader::decode(bytes.first_chunk::<RECORD_HEADER_BYTES>()?).ok()?;
    let length = usize::try_from(header.record_bytes()).ok()?;
    (length <= bytes.len()).then_some((header, length))
}
