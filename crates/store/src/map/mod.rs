//! Block maps: which bytes of which chunk stand at each address of a disk, a file or a memory. It owns the format of
//! map nodes (docs/formats.md, "Block maps") and everything that is done with it. Pure: nodes come from [`Nodes`] and
//! go to a [`NodeSink`].
//!
//! A map is a tree by address. A leaf covers [`LEAF_BYTES`] and holds extents; an inner node has up to 256 children; a
//! root holds the length. What is absent reads as zeros. Every node is a chunk, named by its BLAKE3 and never changed,
//! so a clone is the name of a root, and an edit makes new nodes from the changed leaves up.
//!
//! Maps are canonical: extents end at leaf borders, neighbours that go on in the same chunk are one, nothing is empty,
//! and the height follows from the length. So the same extents give the same root, in whatever order they were
//! written, and readers refuse nodes that break these rules.

mod diff;
mod edit;
mod node;
mod reader;
#[cfg(test)]
mod tests;
mod walk;

use std::{ops::Range, sync::Arc};

use burgeon_api::{Error, Result};
use bytes::Bytes;

pub use diff::diff;
pub use edit::Edit;
pub use node::{Extent, MOST_EXTENTS, Node, Root};
pub use reader::MapReader;
pub use walk::{all_chunks, chunks};

use crate::ids::ChunkId;

/// Address space that a leaf covers.
pub const LEAF_BYTES: u64 = 1 << LEAF_BITS;
/// The longest address space.
pub const MOST_LENGTH: u64 = 1 << 60;
/// What the length of an address space is a multiple of.
pub const SECTOR_BYTES: u64 = 512;
const LEAF_BITS: u32 = 22;
const CHILD_BITS: u32 = 8;

/// Where nodes are read. The source answers for their bytes: it has compared them with their name.
pub trait Nodes {
    /// # Errors
    /// `NotFound` or `Damaged` where the node is not to be had.
    fn get(&self, id: ChunkId) -> Result<Bytes>;
}

impl<N: Nodes + ?Sized> Nodes for &N {
    fn get(&self, id: ChunkId) -> Result<Bytes> {
        (**self).get(id)
    }
}

impl<N: Nodes + ?Sized> Nodes for Arc<N> {
    fn get(&self, id: ChunkId) -> Result<Bytes> {
        (**self).get(id)
    }
}

/// Where new nodes go: children before their parents, the root last.
pub trait NodeSink {
    /// Takes a node, whose name is the BLAKE3 of its bytes.
    ///
    /// # Errors
    /// The sink's; they end the edit.
    fn put(&mut self, id: ChunkId, bytes: Vec<u8>) -> Result<()>;
}

/// Collects nodes for a caller that stores them afterwards.
impl NodeSink for Vec<(ChunkId, Vec<u8>)> {
    fn put(&mut self, id: ChunkId, bytes: Vec<u8>) -> Result<()> {
        self.push((id, bytes));
        Ok(())
    }
}

/// Where decoded nodes come from: any [`Nodes`], or a [`MapReader`], which remembers them.
pub trait Load {
    /// # Errors
    /// The source's, and `Damaged` for a node that breaks the rules of maps.
    fn load(&self, id: ChunkId) -> Result<Arc<Node>>;
}

impl<N: Nodes + ?Sized> Load for N {
    fn load(&self, id: ChunkId) -> Result<Arc<Node>> {
        Ok(Arc::new(Node::decode(id, &self.get(id)?)?))
    }
}

/// A map, as its root tells it. As cheap to copy as its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    root: ChunkId,
    length: u64,
    child: Option<ChunkId>,
}

/// A stretch of an address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub range: Range<u64>,
    /// The chunk and where in it the stretch begins; none means zeros.
    pub source: Option<(ChunkId, u32)>,
}

impl Map {
    /// A map of zeros. Its root is stored by [`Edit::finish`], as any.
    ///
    /// # Errors
    /// `Invalid` for a length that no map has.
    pub fn empty(length: u64) -> Result<Map> {
        check_length(length)?;
        Ok(Map::new(length, None))
    }

    /// The map with this root.
    ///
    /// # Errors
    /// `Damaged` for a node that is no root, and the source's.
    pub fn open(nodes: &(impl Load + ?Sized), root: ChunkId) -> Result<Map> {
        match &*nodes.load(root)? {
            Node::Root(Root { length, child }) => Ok(Map { root, length: *length, child: *child }),
            _ => Err(node::damaged(root, "it is no root")),
        }
    }

    fn new(length: u64, child: Option<ChunkId>) -> Map {
        Map { root: ChunkId::of(&Root { length, child }.encode()), length, child }
    }

    /// The name of the map.
    #[must_use]
    pub fn root(&self) -> ChunkId {
        self.root
    }

    /// Bytes of the address space.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// What stands in a range, in order and without gaps.
    ///
    /// # Errors
    /// `Invalid` for a range beyond the address space, `Damaged` for nodes that break the rules, and the source's.
    pub fn lookup(&self, nodes: &(impl Load + ?Sized), range: Range<u64>) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        self.lookup_into(nodes, range, &mut pieces)?;
        Ok(pieces)
    }

    /// The same into a vector of the caller's, which is emptied first.
    ///
    /// # Errors
    /// As [`Map::lookup`].
    pub fn lookup_into(&self, nodes: &(impl Load + ?Sized), range: Range<u64>, pieces: &mut Vec<Piece>) -> Result<()> {
        pieces.clear();
        check_range(&range, self.length)?;
        if range.is_empty() {
            return Ok(());
        }
        lookup(nodes, self.top(), 0, &range, pieces)
    }

    /// Begins a change. Nothing of this map is touched by it.
    #[must_use]
    pub fn edit(&self) -> Edit {
        Edit::new(*self)
    }

    fn top(&self) -> Subtree {
        Subtree { node: self.child, height: height_of(self.length) }
    }
}

/// A part of a tree: a node, or nothing where all is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Subtree {
    node: Option<ChunkId>,
    /// 0 for a leaf.
    height: u8,
}

impl Subtree {
    /// Children of a subtree, in order. `height` is at least the subtree's own; where it is more, the subtree is its
    /// first child, as if the tree had grown.
    fn children(self, nodes: &(impl Load + ?Sized), height: u8) -> Result<Vec<(u8, ChunkId)>> {
        let Some(id) = self.node else { return Ok(Vec::new()) };
        if self.height < height {
            return Ok(vec![(0, id)]);
        }
        match &*nodes.load(id)? {
            Node::Inner { height: found, children } if *found == height => Ok(children.clone()),
            _ => Err(node::damaged(id, format_args!("it is no inner node of height {height}"))),
        }
    }
}

fn with_leaf<T>(nodes: &(impl Load + ?Sized), id: ChunkId, run: impl FnOnce(&[Extent]) -> T) -> Result<T> {
    match &*nodes.load(id)? {
        Node::Leaf(extents) => Ok(run(extents)),
        _ => Err(node::damaged(id, "it is no leaf")),
    }
}

/// Address space under a node of this height.
fn span(height: u8) -> u64 {
    LEAF_BYTES << (CHILD_BITS * u32::from(height))
}

/// The least height under which so many bytes find room.
fn height_of(length: u64) -> u8 {
    (0..).find(|height| span(*height) >= length).unwrap_or_default()
}

fn check_length(length: u64) -> Result<()> {
    if length.is_multiple_of(SECTOR_BYTES) && length <= MOST_LENGTH {
        return Ok(());
    }
    Err(Error::invalid(format!("{length} bytes are no length of a map: a multiple of 512, at most 2^60")))
}

fn check_range(range: &Range<u64>, length: u64) -> Result<()> {
    if range.start <= range.end && range.end <= length {
        return Ok(());
    }
    let Range { start, end } = range;
    Err(Error::invalid(format!("bytes {start} to {end} are no range of a map of {length} bytes")))
}

/// Adds what stands in the part of `range` under this subtree, which begins at `base`.
fn lookup(
    nodes: &(impl Load + ?Sized),
    subtree: Subtree,
    base: u64,
    range: &Range<u64>,
    pieces: &mut Vec<Piece>,
) -> Result<()> {
    let from = range.start.max(base);
    let to = range.end.min(base + span(subtree.height));
    let Some(id) = subtree.node else {
        add(pieces, from..to, None);
        return Ok(());
    };
    let node = nodes.load(id)?;
    match &*node {
        Node::Leaf(extents) if subtree.height == 0 => {
            look_in_leaf(extents, base, from..to, pieces);
            Ok(())
        }
        Node::Inner { height, children } if *height == subtree.height => {
            let below = subtree.height - 1;
            let child_span = span(below);
            let mut at = from;
            let first = children.partition_point(|(index, _)| base + (u64::from(*index) + 1) * child_span <= from);
            for (index, child) in &children[first..] {
                let start = base + u64::from(*index) * child_span;
                if start >= to {
                    break;
                }
                add(pieces, at..start, None);
                lookup(nodes, Subtree { node: Some(*child), height: below }, start, range, pieces)?;
                at = start + child_span;
            }
            add(pieces, at..to, None);
            Ok(())
        }
        _ => Err(node::damaged(id, format_args!("it does not belong at height {}", subtree.height))),
    }
}

fn look_in_leaf(extents: &[Extent], base: u64, range: Range<u64>, pieces: &mut Vec<Piece>) {
    let mut at = range.start;
    let first = extents.partition_point(|extent| base + extent.end() <= at);
    for extent in &extents[first..] {
        let start = (base + u64::from(extent.offset)).max(at);
        if start >= range.end {
            break;
        }
        add(pieces, at..start, None);
        let end = (base + extent.end()).min(range.end);
        let part = extent.part(start - base, end - base);
        add(pieces, start..end, Some((part.chunk, part.chunk_offset)));
        at = end;
    }
    add(pieces, at..range.end, None);
}

/// Adds a piece, or makes the last one longer where it goes on.
fn add(pieces: &mut Vec<Piece>, range: Range<u64>, source: Option<(ChunkId, u32)>) {
    if range.start >= range.end {
        return;
    }
    if let Some(last) = pieces.last_mut() {
        let goes_on = match (last.source, source) {
            (None, None) => true,
            (Some((before, from)), Some((chunk, offset))) => {
                before == chunk && u64::from(from) + (last.range.end - last.range.start) == u64::from(offset)
            }
            _ => false,
        };
        if goes_on {
            last.range.end = range.end;
            return;
        }
    }
    pieces.push(Piece { range, source });
}
