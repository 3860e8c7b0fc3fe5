//! The nodes of block maps and their bytes.

use std::fmt;

use burgeon_api::{Error, Result};

use super::{LEAF_BYTES, MOST_LENGTH, SECTOR_BYTES, height_of};
use crate::{chunk::MOST_CHUNK, ids::ChunkId, wire};

const VERSION: u8 = 1;
const ROOT_MAGIC: [u8; 4] = *b"BgnT";
const INNER_MAGIC: [u8; 4] = *b"BgnN";
const LEAF_MAGIC: [u8; 4] = *b"BgnL";
const ROOT_BYTES: usize = 48;
const HEADER_BYTES: usize = 12;
const CHILD_BYTES: usize = 33;
const EXTENT_BYTES: usize = 44;
/// The most extents of a leaf: as many as fit into a chunk.
pub const MOST_EXTENTS: usize = (MOST_CHUNK - HEADER_BYTES) / EXTENT_BYTES;
const MOST_HEIGHT: u8 = 5;

/// A node of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Root(Root),
    /// Children by index, in order. `height` counts the nodes below: 1 means that the children are leaves.
    Inner {
        height: u8,
        children: Vec<(u8, ChunkId)>,
    },
    /// Extents in order, none empty, none over another, none that goes on where the one before it ends.
    Leaf(Vec<Extent>),
}

/// What names a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Bytes of the address space.
    pub length: u64,
    /// The node under the root; its height follows from the length.
    pub child: Option<ChunkId>,
}

/// A stretch of a leaf that stands in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In the leaf, in bytes.
    pub offset: u32,
    pub length: u32,
    pub chunk: ChunkId,
    /// In the chunk, in bytes.
    pub chunk_offset: u32,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.length)
    }

    /// An extent between two addresses of a leaf.
    pub(super) fn at(from: u64, to: u64, chunk: ChunkId, chunk_offset: u32) -> Extent {
        // Addresses within a leaf fit into 32 bits.
        let short = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Extent { offset: short(from), length: short(to - from), chunk, chunk_offset }
    }

    /// The part of this extent between two addresses of the leaf, which lie within it.
    pub(super) fn part(&self, from: u64, to: u64) -> Extent {
        let part = Extent::at(from, to, self.chunk, self.chunk_offset);
        Extent { chunk_offset: self.chunk_offset + (part.offset - self.offset), ..part }
    }

    /// Whether `next` is more of the same chunk at the next address.
    pub(super) fn goes_on_in(&self, next: &Extent) -> bool {
        self.end() == u64::from(next.offset)
            && self.chunk == next.chunk
            && u64::from(self.chunk_offset) + u64::from(self.length) == u64::from(next.chunk_offset)
    }
}

impl Root {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; ROOT_BYTES];
        wire::put(&mut bytes, 0, &ROOT_MAGIC);
        bytes[4] = VERSION;
        bytes[5] = height_of(self.length);
        wire::put(&mut bytes, 8, &self.length.to_le_bytes());
        if let Some(child) = self.child {
            bytes[6] = 1;
            wire::put(&mut bytes, 16, &child.0);
        }
        bytes
    }
}

impl Node {
    /// The bytes of a node. The caller keeps the rules of [`Node`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let header = |magic: [u8; 4], height: u8, count: usize| {
            let mut bytes = magic.to_vec();
            bytes.extend_from_slice(&[VERSION, height, 0, 0]);
            bytes.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
            bytes
        };
        match self {
            Node::Root(root) => root.encode(),
            Node::Inner { height, children } => {
                let mut bytes = header(INNER_MAGIC, *height, children.len());
                for (index, child) in children {
                    bytes.push(*index);
                    bytes.extend_from_slice(&child.0);
                }
                bytes
            }
            Node::Leaf(extents) => {
                let mut bytes = header(LEAF_MAGIC, 0, extents.len());
                for extent in extents {
                    bytes.extend_from_slice(&extent.offset.to_le_bytes());
                    bytes.extend_from_slice(&extent.length.to_le_bytes());
                    bytes.extend_from_slice(&extent.chunk_offset.to_le_bytes());
                    bytes.extend_from_slice(&extent.chunk.0);
                }
                bytes
            }
        }
    }

    /// Reads a node; `id` is its name, for errors. Takes memory in proportion to `bytes` only.
    ///
    /// # Errors
    /// `Damaged` for bytes that are no node or break a rule of maps; `Refused` for a version that this program does
    /// not know.
    pub fn decode(id: ChunkId, bytes: &[u8]) -> Result<Node> {
        if bytes.len() < HEADER_BYTES || bytes.len() > MOST_CHUNK {
            return Err(damaged(id, format_args!("it has {} bytes", bytes.len())));
        }
        let magic: [u8; 4] = wire::array(bytes, 0);
        if ![ROOT_MAGIC, INNER_MAGIC, LEAF_MAGIC].contains(&magic) {
            return Err(damaged(id, "it begins like no node"));
        }
        let named = |error: Error| error.context(format!("map node {id}"));
        wire::check_version(bytes, VERSION, "a map node").map_err(named)?;
        if magic == ROOT_MAGIC {
            return decode_root(id, bytes).map(Node::Root);
        }
        wire::check_reserved(bytes, 6..8, "a map node").map_err(named)?;
        let (height, count) = (bytes[5], wire::u32_at(bytes, 8) as usize);
        let size = if magic == INNER_MAGIC { CHILD_BYTES } else { EXTENT_BYTES };
        let body = &bytes[HEADER_BYTES..];
        if count == 0 || count.checked_mul(size) != Some(body.len()) {
            return Err(damaged(id, format_args!("{} bytes do not hold {count} entries", body.len())));
        }
        if magic == LEAF_MAGIC {
            if height != 0 {
                return Err(damaged(id, format_args!("a leaf with height {height}")));
            }
            return decode_leaf(id, body).map(Node::Leaf);
        }
        if !(1..=MOST_HEIGHT).contains(&height) {
            return Err(damaged(id, format_args!("an inner node with height {height}")));
        }
        Ok(Node::Inner { height, children: decode_children(id, body)? })
    }
}

fn decode_root(id: ChunkId, bytes: &[u8]) -> Result<Root> {
    if bytes.len() != ROOT_BYTES {
        return Err(damaged(id, format_args!("a root with {} bytes", bytes.len())));
    }
    wire::check_reserved(bytes, 7..8, "a map's root").map_err(|error| error.context(format!("map node {id}")))?;
    let length = wire::u64_at(bytes, 8);
    if !length.is_multiple_of(SECTOR_BYTES) || length > MOST_LENGTH {
        return Err(damaged(id, format_args!("{length} bytes are no length of a map")));
    }
    if bytes[5] != height_of(length) {
        return Err(damaged(id, format_args!("{length} bytes at height {}", bytes[5])));
    }
    let child = ChunkId(wire::array(bytes, 16));
    match bytes[6] {
        0 if child.0 == [0; 32] => Ok(Root { length, child: None }),
        1 if length > 0 => Ok(Root { length, child: Some(child) }),
        other => Err(damaged(id, format_args!("{other} does not tell whether it has a child"))),
    }
}

fn decode_children(id: ChunkId, body: &[u8]) -> Result<Vec<(u8, ChunkId)>> {
    let (blocks, _) = body.as_chunks::<CHILD_BYTES>();
    let children: Vec<(u8, ChunkId)> = blocks.iter().map(|block| (block[0], ChunkId(wire::array(block, 1)))).collect();
    if let Some(pair) = children.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
        return Err(damaged(id, format_args!("child {} follows child {}", pair[1].0, pair[0].0)));
    }
    Ok(children)
}

fn decode_leaf(id: ChunkId, body: &[u8]) -> Result<Vec<Extent>> {
    let (blocks, _) = body.as_chunks::<EXTENT_BYTES>();
    let mut extents: Vec<Extent> = Vec::with_capacity(blocks.len());
    for block in blocks {
        let extent = Extent {
            offset: wire::u32_at(block, 0),
            length: wire::u32_at(block, 4),
            chunk_offset: wire::u32_at(block, 8),
            chunk: ChunkId(wire::array(block, 12)),
        };
        let wrong = |why: &str| Err(damaged(id, format_args!("the extent at {} {why}", extent.offset)));
        if extent.length == 0 {
            return wrong("is empty");
        }
        if extent.end() > LEAF_BYTES {
            return wrong("ends beyond the leaf");
        }
        if u64::from(extent.chunk_offset) + u64::from(extent.length) > MOST_CHUNK as u64 {
            return wrong("ends beyond its chunk");
        }
        if let Some(last) = extents.last() {
            if extent.offset <= last.offset {
                return wrong("is not in order");
            }
            if last.end() > u64::from(extent.offset) {
                return wrong("lies over the one before it");
            }
            if last.goes_on_in(&extent) {
                return wrong("should be one with the one before it");
            }
        }
        extents.push(extent);
    }
    Ok(extents)
}

pub(super) fn damaged(id: ChunkId, why: impl fmt::Display) -> Error {
    Error::damaged(format!("map node {id}: {why}"))
}
