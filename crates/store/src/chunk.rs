//! Chunks: how the bytes behind a [`ChunkId`] are stored. It owns the choice of a codec, the bound of a chunk, and the
//! rule that nothing is handed out whose BLAKE3 is not its name. No input or output.

use std::cell::RefCell;

use burgeon_api::{Error, Result};
use zstd::bulk::{Compressor, Decompressor};

use crate::ids::ChunkId;

/// The longest chunk, in plain bytes. No chunk is empty.
pub const MOST_CHUNK: usize = 1 << 20;
/// The level of compression. Higher ones cost more time than the bytes they save are worth: see `examples/speed.rs`.
const LEVEL: i32 = 1;
/// Shorter chunks are not sampled: compressing them costs little more than the sample.
const LEAST_SAMPLED: usize = 16 << 10;
/// Bytes of the middle of a chunk that are compressed to see whether the rest is worth the time.
const SAMPLE_BYTES: usize = 4 << 10;
const ZEROS: [u8; 4096] = [0; 4096];

/// How a chunk's bytes are stored. The numbers are part of the pack format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    Raw = 0,
    Zstd = 1,
}

/// What a chunk is to those who look for what it refers to. The numbers are part of the pack format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Bytes of a user; refers to nothing.
    Data = 1,
    /// A node of a block map; refers to other chunks.
    MapNode = 2,
}

impl Kind {
    /// The kind with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Kind> {
        match number {
            1 => Some(Kind::Data),
            2 => Some(Kind::MapNode),
            _ => None,
        }
    }
}

/// A chunk ready to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub id: ChunkId,
    pub codec: Codec,
    /// Of the plain bytes.
    pub length: u32,
    pub stored: Vec<u8>,
}

/// What a reader must know of stored bytes before it decodes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declared {
    pub id: ChunkId,
    pub codec: Codec,
    /// Of the plain bytes.
    pub length: u32,
}

/// Encodes chunks; keeps the compressor's tables between them.
pub struct Encoder {
    compressor: Compressor<'static>,
    scratch: Vec<u8>,
}

impl Encoder {
    /// # Errors
    /// `Internal` where zstd finds no memory.
    pub fn new() -> Result<Encoder> {
        let compressor = Compressor::new(LEVEL).map_err(|error| Error::internal(format!("start zstd: {error}")))?;
        Ok(Encoder { compressor, scratch: Vec::new() })
    }

    /// Names a chunk and chooses how it is stored: compressed, unless that saves less than 5 %.
    ///
    /// # Errors
    /// `Invalid` for an empty chunk or one beyond [`MOST_CHUNK`].
    pub fn encode(&mut self, plain: &[u8]) -> Result<Encoded> {
        let length = checked_length(plain.len())?;
        self.encode_named(ChunkId::of(plain), length, plain)
    }

    /// The same for a chunk whose name is known already, because the caller looked whether it is stored.
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn encode_as(&mut self, id: ChunkId, plain: &[u8]) -> Result<Encoded> {
        let length = checked_length(plain.len())?;
        self.encode_named(id, length, plain)
    }

    fn encode_named(&mut self, id: ChunkId, length: u32, plain: &[u8]) -> Result<Encoded> {
        if self.worth_compressing(plain) {
            self.compress(plain)?;
            if saves(self.scratch.len(), plain.len()) {
                return Ok(Encoded { id, codec: Codec::Zstd, length, stored: self.scratch.as_slice().to_vec() });
            }
        }
        Ok(Encoded { id, codec: Codec::Raw, length, stored: plain.to_vec() })
    }

    /// A wrong guess costs space or time, never bytes.
    fn worth_compressing(&mut self, plain: &[u8]) -> bool {
        if plain.len() < LEAST_SAMPLED || !looks_random(plain) {
            return true;
        }
        // Bytes that are spread evenly may still repeat, so zstd has the last word, on a part of them.
        let middle = (plain.len() - SAMPLE_BYTES) / 2;
        let sample = &plain[middle..middle + SAMPLE_BYTES];
        self.compress(sample).is_ok() && saves(self.scratch.len(), SAMPLE_BYTES)
    }

    fn compress(&mut self, plain: &[u8]) -> Result<()> {
        self.scratch.clear();
        self.scratch.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        self.compressor
            .compress_to_buffer(plain, &mut self.scratch)
            .map(|_| ())
            .map_err(|error| Error::internal(format!("compress a chunk: {error}")))
    }
}

thread_local! {
    // A decompressor holds 100 KiB and more, and every thread that reads decodes one chunk after the other.
    static DECODER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// The plain bytes of a stored chunk, verified against its name. Never makes more than the declared length.
///
/// # Errors
/// `Damaged` where length or contents are not as declared.
pub fn decode(declared: &Declared, stored: &[u8]) -> Result<Vec<u8>> {
    let length = declared.length as usize;
    let damaged = |why: String| Error::damaged(format!("{:?}: {why}", declared.id));
    if length == 0 || length > MOST_CHUNK {
        return Err(damaged(format!("declares {length} bytes; a chunk has 1 to {MOST_CHUNK}")));
    }
    let plain = match declared.codec {
        Codec::Raw => stored.to_vec(),
        Codec::Zstd => decompress(stored, length).map_err(|error| damaged(format!("does not decompress: {error}")))?,
    };
    if plain.len() != length {
        return Err(damaged(format!("has {} bytes where {length} are declared", plain.len())));
    }
    let found = ChunkId::of(&plain);
    if found != declared.id {
        return Err(damaged(format!("its contents are those of {found:?}")));
    }
    Ok(plain)
}

fn decompress(stored: &[u8], length: usize) -> std::io::Result<Vec<u8>> {
    DECODER.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(Decompressor::new()?),
        };
        // zstd writes to the capacity of the vector and no further, whatever the frame says of itself.
        let mut plain = Vec::with_capacity(length);
        decoder.decompress_to_buffer(stored, &mut plain)?;
        Ok(plain)
    })
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most blocks that are not zero say so at once. The rest is a comparison, which the C library does fastest.
    let (words, _) = bytes.as_chunks::<16>();
    if words.first().is_some_and(|word| u128::from_ne_bytes(*word) != 0) {
        return false;
    }
    bytes.chunks(ZEROS.len()).all(|part| part == &ZEROS[..part.len()])
}

fn checked_length(length: usize) -> Result<u32> {
    match u32::try_from(length) {
        Ok(short) if short > 0 && length <= MOST_CHUNK => Ok(short),
        _ => Err(Error::invalid(format!("a chunk has 1 to {MOST_CHUNK} bytes, not {length}"))),
    }
}

/// At least 5 %.
fn saves(stored: usize, plain: usize) -> bool {
    stored * 100 <= plain * 95
}

/// Whether the bytes are spread as evenly as those of compressed or encrypted data, judged by sixteen short stretches.
fn looks_random(plain: &[u8]) -> bool {
    const STRETCHES: usize = 16;
    const STRETCH: usize = 64;
    let mut counts = [0_u32; 256];
    let step = plain.len() / STRETCHES;
    for stretch in 0..STRETCHES {
        for byte in &plain[stretch * step..][..STRETCH] {
            counts[usize::from(*byte)] += 1;
        }
    }
    // For n even bytes the sum of squares is n + n * n / 256 on average: 5,120 for 1,024. Text has 40,000 and more.
    counts.iter().map(|count| count * count).sum::<u32>() < 6_500
}

#[cfg(test)]
mod tests {
    use burgeon_api::ErrorKind;

    use super::*;
    use crate::testing::noise;

    fn declared(encoded: &Encoded) -> Declared {
        Declared { id: encoded.id, codec: encoded.codec, length: encoded.length }
    }

    #[test]
    fn chunks_come_back() {
        let mut encoder = Encoder::new().unwrap();
        let text: Vec<u8> = b"a line of text that repeats itself\n".iter().copied().cycle().take(70_000).collect();
        for (plain, codec) in [
            (vec![7], Codec::Raw),
            (text, Codec::Zstd),
            (noise(1, 65_536), Codec::Raw),
            (noise(2, 300), Codec::Raw),
            (vec![0; MOST_CHUNK], Codec::Zstd),
        ] {
            let encoded = encoder.encode(&plain).unwrap();
            assert_eq!((encoded.codec, encoded.id), (codec, ChunkId::of(&plain)));
            assert!(encoded.stored.len() <= plain.len());
            assert_eq!(decode(&declared(&encoded), &encoded.stored).unwrap(), plain);
        }
        for wrong in [0, MOST_CHUNK + 1] {
            assert_eq!(encoder.encode(&vec![1; wrong]).unwrap_err().kind, ErrorKind::Invalid);
        }
    }

    #[test]
    fn repeated_noise_is_compressed_although_its_bytes_are_spread_evenly() {
        let plain = noise(3, 3000).repeat(21);
        assert!(looks_random(&plain));
        assert_eq!(Encoder::new().unwrap().encode(&plain).unwrap().codec, Codec::Zstd);
    }

    #[test]
    fn what_is_not_as_declared_is_damaged() {
        let encoded = Encoder::new().unwrap().encode(&[5; 4096]).unwrap();
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let good = declared(&encoded);
        for (wrong, stored) in [
            (Declared { length: 4095, ..good }, &encoded.stored),
            (Declared { length: 4097, ..good }, &encoded.stored),
            (Declared { length: 0, ..good }, &encoded.stored),
            (Declared { length: u32::MAX, ..good }, &encoded.stored),
            (Declared { codec: Codec::Raw, ..good }, &encoded.stored),
            (Declared { id: ChunkId([0; 32]), ..good }, &encoded.stored),
            (good, &bomb),
            (good, &Vec::new()),
        ] {
            assert_eq!(decode(&wrong, stored).unwrap_err().kind, ErrorKind::Damaged, "{wrong:?}");
        }
    }

    #[test]
    fn zeros_are_told_from_the_rest() {
        assert!(is_zero(&[]));
        for length in [1, 15, 16, 17, 4096, 4097, 70_000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in [0, length / 2, length - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
