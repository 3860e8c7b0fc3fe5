//! The names of stored things: a chunk by its contents, a pack by a number chosen before it is written.

use std::{fmt, str::FromStr};

use burgeon_api::Error;
use serde::{Deserialize, Serialize};

/// A chunk: the BLAKE3-256 hash of its plain bytes. In documents it is written in hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChunkId(pub [u8; 32]);

/// A pack: 16 bytes of a UUID (version 7), chosen before its first byte is written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub [u8; 16]);

/// A store: its packs and its catalog have the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub [u8; 16]);

/// A data directory, for databases that several could reach.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerId(pub [u8; 16]);

/// Where a chunk's record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub pack: PackId,
    /// Of the record's header in the pack, in bytes.
    pub offset: u64,
    /// Bytes of the chunk as stored, behind the record's header.
    pub stored: u32,
    /// Bytes of the chunk itself.
    pub length: u32,
}

impl ChunkId {
    /// The name of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(bytes).as_bytes())
    }
}

impl TryFrom<String> for ChunkId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<ChunkId> for String {
    fn from(id: ChunkId) -> String {
        id.to_string()
    }
}

macro_rules! hexadecimal {
    ($name:ident, $bytes:literal, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!($what, " {}"), self)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                let wrong = || {
                    let text = burgeon_api::path_text::printable(text);
                    Error::invalid(format!(concat!("\"{}\" is no ", $what, ": {} hexadecimal digits"), text, $bytes * 2))
                };
                if text.len() != $bytes * 2 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
                    return Err(wrong());
                }
                let mut bytes = [0; $bytes];
                for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
                    *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
                }
                Ok($name(bytes))
            }
        }
    };
}

hexadecimal!(ChunkId, 32, "chunk");
hexadecimal!(PackId, 16, "pack");
hexadecimal!(StoreId, 16, "store");
hexadecimal!(OwnerId, 16, "owner");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_what_they_print() {
        let chunk = ChunkId::of(b"burgeon");
        assert_eq!(chunk.to_string().parse::<ChunkId>().unwrap(), chunk);
        assert_eq!(
            ChunkId::of(b"").to_string(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
            "BLAKE3 of nothing, as the specification has it"
        );
        for wrong in ["", "af", &"AF".repeat(32), &"+f".repeat(32), &"zz".repeat(32)] {
            assert!(wrong.parse::<ChunkId>().is_err(), "{wrong}");
        }
    }
}
