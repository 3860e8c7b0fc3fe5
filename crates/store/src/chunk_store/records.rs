//! Chunks as they are stored, for a copy of the store elsewhere: verified, and not compressed anew.

use burgeon_api::Result;

use super::{ChunkStore, missing};
use crate::{
    ChunkId, Place,
    chunk::{Encoded, Encoder},
    pack::{self, RECORD_HEADER_BYTES, RecordHeader},
};

impl ChunkStore {
    /// The stored form of chunks, in the order of their names here. Each was decoded once and compared with its name.
    ///
    /// # Errors
    /// As [`ChunkStore::get_many`].
    pub fn encoded(&self, ids: &[ChunkId]) -> Result<Vec<Encoded>> {
        let places = self.catalog.blocking_places(ids.to_vec())?;
        let mut order: Vec<(Place, usize)> = Vec::with_capacity(ids.len());
        for (index, (id, place)) in ids.iter().zip(places).enumerate() {
            order.push((place.ok_or_else(|| missing(*id))?, index));
        }
        order.sort_unstable_by_key(|(place, _)| (place.pack, place.offset));
        let mut found: Vec<Option<Encoded>> = vec![None; ids.len()];
        for (place, index) in order {
            found[index] = Some(self.encoded_at(ids[index], place)?);
        }
        ids.iter().zip(found).map(|(id, encoded)| encoded.ok_or_else(|| missing(*id))).collect()
    }

    fn encoded_at(&self, id: ChunkId, place: Place) -> Result<Encoded> {
        if let Ok(encoded) = self.record_at(id, place) {
            return Ok(encoded);
        }
        // Moved by a collection, or damaged, which this tells.
        let plain = self.read_or_look_again(id, place)?;
        Encoder::new()?.encode_as(id, &plain)
    }

    fn record_at(&self, id: ChunkId, place: Place) -> Result<Encoded> {
        let mut bytes = vec![0; RECORD_HEADER_BYTES + usize::try_from(place.stored).unwrap_or(0)];
        self.open_pack(place.pack)?.read_at(place.offset, &mut bytes)?;
        pack::read_record(&bytes, id)?;
        let (block, stored) = bytes.split_first_chunk().ok_or_else(|| missing(id))?;
        let header = RecordHeader::decode(block)?;
        Ok(Encoded { id, codec: header.codec, length: header.length, stored: stored.to_vec() })
    }
}
