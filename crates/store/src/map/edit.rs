//! Changing a map: changes are gathered over the address space, the last one wins, and one pass from the root down
//! makes the new nodes. Memory is that of the changes and of one path, not of the map.

use std::{collections::BTreeMap, ops::Range};

use burgeon_api::{Error, Result};

use super::{
    Extent, LEAF_BYTES, Load, MOST_EXTENTS, Map, Node, NodeSink, Root, Subtree, check_length, check_range, height_of,
    span, with_leaf,
};
use crate::{chunk::MOST_CHUNK, ids::ChunkId};

/// Changes of a map that are not stored yet.
#[derive(Clone, Debug)]
pub struct Edit {
    base: Map,
    length: u64,
    /// By start; no two overlap.
    patches: BTreeMap<u64, Patch>,
}

#[derive(Clone, Copy, Debug)]
struct Patch {
    start: u64,
    end: u64,
    /// What stands there now; none means zeros.
    source: Option<(ChunkId, u32)>,
}

impl Patch {
    fn clipped(mut self, from: u64, to: u64) -> Patch {
        if from > self.start {
            // A patch with a source is no longer than a chunk.
            let skipped = u32::try_from(from - self.start).unwrap_or(u32::MAX);
            self.source = self.source.map(|(chunk, offset)| (chunk, offset.saturating_add(skipped)));
            self.start = from;
        }
        self.end = self.end.min(to);
        self
    }
}

impl Edit {
    pub(super) fn new(base: Map) -> Edit {
        Edit { base, length: base.length(), patches: BTreeMap::new() }
    }

    /// Bytes of the address space as changed so far.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Stretches that differ from the map that is edited: a measure of the memory in use, and of the work of
    /// [`Edit::finish`].
    #[must_use]
    pub fn pending(&self) -> usize {
        self.patches.len()
    }

    /// Puts bytes of a chunk, from `chunk_offset` on, at a range of addresses.
    ///
    /// # Errors
    /// `Invalid` for an empty range, one beyond the address space, or one that ends beyond the longest chunk.
    pub fn set(&mut self, range: Range<u64>, chunk: ChunkId, chunk_offset: u32) -> Result<()> {
        check_range(&range, self.length)?;
        let length = range.end - range.start;
        if length == 0 || u64::from(chunk_offset).saturating_add(length) > MOST_CHUNK as u64 {
            return Err(Error::invalid(format!("no chunk has {length} bytes at {chunk_offset}")));
        }
        self.place(range, Some((chunk, chunk_offset)));
        Ok(())
    }

    /// Puts zeros at a range of addresses, of any length.
    ///
    /// # Errors
    /// `Invalid` for a range beyond the address space.
    pub fn clear(&mut self, range: Range<u64>) -> Result<()> {
        check_range(&range, self.length)?;
        self.place(range, None);
        Ok(())
    }

    /// Changes the length of the address space. What is cut off is gone: it is zeros where the space grows again.
    ///
    /// # Errors
    /// `Invalid` for a length that no map has.
    pub fn resize(&mut self, length: u64) -> Result<()> {
        check_length(length)?;
        let old = std::mem::replace(&mut self.length, length);
        if length < old {
            self.carve(length..u64::MAX);
        }
        // All that the old tree could hold, so that a damaged one cannot bring bytes from beyond its end to light.
        let most = span(height_of(self.base.length())).max(length);
        self.place(length.min(old)..most, None);
        Ok(())
    }

    fn place(&mut self, range: Range<u64>, source: Option<(ChunkId, u32)>) {
        if range.start < range.end {
            self.carve(range.clone());
            self.patches.insert(range.start, Patch { start: range.start, end: range.end, source });
        }
    }

    /// Removes what patches say of a range.
    fn carve(&mut self, range: Range<u64>) {
        if let Some((_, before)) = self.patches.range_mut(..range.start).next_back()
            && before.end > range.start
        {
            let old = *before;
            *before = old.clipped(old.start, range.start);
            if old.end > range.end {
                self.patches.insert(range.end, old.clipped(range.end, old.end));
                return;
            }
        }
        while let Some((start, patch)) = self.patches.range(range.clone()).next() {
            let (start, patch) = (*start, *patch);
            self.patches.remove(&start);
            if patch.end > range.end {
                self.patches.insert(range.end, patch.clipped(range.end, patch.end));
                return;
            }
        }
    }

    /// Makes the new nodes and gives the new map. Only nodes on the way to a change are read or made; without a
    /// change, only the root is put. The sink must keep what it got before anything refers to the new root.
    ///
    /// # Errors
    /// `Refused` for a leaf with more than [`MOST_EXTENTS`] extents, `Damaged` for nodes that break the rules, and
    /// those of source and sink.
    pub fn finish(self, nodes: &(impl Load + ?Sized), sink: &mut (impl NodeSink + ?Sized)) -> Result<Map> {
        let patches: Vec<Patch> = self.patches.into_values().collect();
        let height = height_of(self.length);
        let mut old = self.base.top();
        // Where the space became so short that the tree loses height, all but first children lies beyond its end.
        while old.height > height {
            let first = old.children(nodes, old.height)?.first().filter(|(index, _)| *index == 0).map(|(_, id)| *id);
            old = Subtree { node: first, height: old.height - 1 };
        }
        let child = Run { nodes, sink: &mut *sink }.change(old, height, 0, &patches)?;
        let map = Map::new(self.length, child);
        sink.put(map.root(), Root { length: self.length, child }.encode())?;
        Ok(map)
    }
}

struct Run<'a, L: ?Sized, S: ?Sized> {
    nodes: &'a L,
    sink: &'a mut S,
}

impl<L: Load + ?Sized, S: NodeSink + ?Sized> Run<'_, L, S> {
    /// What stands in place of `old` at this height, which begins at `base`, after the patches.
    fn change(&mut self, old: Subtree, height: u8, base: u64, patches: &[Patch]) -> Result<Option<ChunkId>> {
        let end = base + span(height);
        let patches = overlapping(patches, base, end);
        if patches.is_empty() && (old.height == height || old.node.is_none()) {
            return Ok(old.node);
        }
        let all_clear = patches.iter().all(|patch| patch.source.is_none());
        if all_clear && (old.node.is_none() || patches.iter().any(|patch| patch.start <= base && patch.end >= end)) {
            return Ok(None);
        }
        if height == 0 {
            return self.change_leaf(old.node, base, patches);
        }
        let children = old.children(self.nodes, height)?;
        let below = height - 1;
        let mut rest = children.iter().peekable();
        let mut changed = Vec::with_capacity(children.len());
        for index in 0..=u8::MAX {
            let node = rest.next_if(|(at, _)| *at == index).map(|(_, id)| *id);
            let child = Subtree { node, height: below.min(old.height) };
            let start = base + u64::from(index) * span(below);
            if let Some(id) = self.change(child, below, start, patches)? {
                changed.push((index, id));
            }
        }
        if old.height == height && changed == children {
            return Ok(old.node);
        }
        if changed.is_empty() {
            return Ok(None);
        }
        self.put(&Node::Inner { height, children: changed }).map(Some)
    }

    fn change_leaf(&mut self, old: Option<ChunkId>, base: u64, patches: &[Patch]) -> Result<Option<ChunkId>> {
        let before = match old {
            Some(id) => with_leaf(self.nodes, id, <[Extent]>::to_vec)?,
            None => Vec::new(),
        };
        let after = patch_leaf(&before, base, patches);
        if after.is_empty() {
            return Ok(None);
        }
        if after == before {
            return Ok(old);
        }
        if after.len() > MOST_EXTENTS {
            return Err(Error::refused(format!(
                "{} pieces within 4 MiB of a map, at {base}; {MOST_EXTENTS} find room",
                after.len()
            )));
        }
        self.put(&Node::Leaf(after)).map(Some)
    }

    fn put(&mut self, node: &Node) -> Result<ChunkId> {
        let bytes = node.encode();
        let id = ChunkId::of(&bytes);
        self.sink.put(id, bytes)?;
        Ok(id)
    }
}

/// The patches, sorted, that say something of the addresses between `from` and `to`.
fn overlapping(patches: &[Patch], from: u64, to: u64) -> &[Patch] {
    let first = patches.partition_point(|patch| patch.end <= from);
    let last = patches.partition_point(|patch| patch.start < to);
    // A resize may leave patches that end where the next begins; none overlap, so `first` is never behind `last`.
    &patches[first..last.max(first)]
}

/// The extents of a leaf after the patches.
fn patch_leaf(before: &[Extent], base: u64, patches: &[Patch]) -> Vec<Extent> {
    let mut after = Vec::with_capacity(before.len() + patches.len());
    let mut rest = before;
    let mut at = 0;
    for patch in patches {
        let patch = patch.clipped(base, base + LEAF_BYTES);
        let (start, end) = (patch.start - base, patch.end - base);
        keep(&mut rest, at, start, &mut after);
        if let Some((chunk, chunk_offset)) = patch.source {
            push(&mut after, Extent::at(start, end, chunk, chunk_offset));
        }
        at = end;
    }
    keep(&mut rest, at, LEAF_BYTES, &mut after);
    after
}

/// Copies what the old extents say of the addresses between `from` and `to`, and forgets those that end before `to`.
fn keep(rest: &mut &[Extent], from: u64, to: u64, after: &mut Vec<Extent>) {
    while let Some(extent) = rest.first() {
        let start = u64::from(extent.offset).max(from);
        let end = extent.end().min(to);
        if start < end {
            push(after, extent.part(start, end));
        }
        if extent.end() > to {
            return;
        }
        *rest = &rest[1..];
    }
}

fn push(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.goes_on_in(&extent) => last.length += extent.length,
        _ => extents.push(extent),
    }
}
