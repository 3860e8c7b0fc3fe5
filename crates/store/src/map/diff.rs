//! What differs between two maps.

use std::ops::Range;

use burgeon_api::Result;

use super::{Extent, LEAF_BYTES, Load, Map, Subtree, span, with_leaf};
use crate::ids::ChunkId;

/// The ranges in which two maps have other chunks, or other parts of them, sorted and apart from each other. Where
/// chunks are cut at the same addresses these are the ranges with other bytes; else they contain them. A range that
/// only the longer map has differs. Subtrees that are the same are not read.
///
/// # Errors
/// `Damaged` for nodes that break the rules, and the source's.
pub fn diff(nodes: &(impl Load + ?Sized), a: &Map, b: &Map) -> Result<Vec<Range<u64>>> {
    let (a_top, b_top) = (a.top(), b.top());
    let mut changed = Changed { ranges: Vec::new(), end: a.length().min(b.length()) };
    compare(nodes, a_top, b_top, a_top.height.max(b_top.height), 0, &mut changed)?;
    let most = a.length().max(b.length());
    let least = std::mem::replace(&mut changed.end, most);
    changed.add(least, most);
    Ok(changed.ranges)
}

struct Changed {
    ranges: Vec<Range<u64>>,
    /// Nothing is told from here on.
    end: u64,
}

impl Changed {
    fn add(&mut self, from: u64, to: u64) {
        let to = to.min(self.end);
        match self.ranges.last_mut() {
            _ if from >= to => {}
            Some(last) if last.end == from => last.end = to,
            _ => self.ranges.push(from..to),
        }
    }
}

fn compare(
    nodes: &(impl Load + ?Sized),
    a: Subtree,
    b: Subtree,
    height: u8,
    base: u64,
    changed: &mut Changed,
) -> Result<()> {
    let nothing = a.node.is_none() && b.node.is_none();
    if base >= changed.end || nothing || (a.node == b.node && a.height == b.height) {
        return Ok(());
    }
    if height == 0 {
        let read = |subtree: Subtree| match subtree.node {
            Some(id) => with_leaf(nodes, id, <[Extent]>::to_vec),
            None => Ok(Vec::new()),
        };
        compare_leaves(&read(a)?, &read(b)?, base, changed);
        return Ok(());
    }
    let below = height - 1;
    let (left, right) = (a.children(nodes, height)?, b.children(nodes, height)?);
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let Some(index) = [left.peek(), right.peek()].into_iter().flatten().map(|(index, _)| *index).min() {
        let of = |node: Option<(u8, ChunkId)>, whole: Subtree| Subtree {
            node: node.map(|(_, id)| id),
            height: below.min(whole.height),
        };
        let left = of(left.next_if(|(at, _)| *at == index), a);
        let right = of(right.next_if(|(at, _)| *at == index), b);
        compare(nodes, left, right, below, base + u64::from(index) * span(below), changed)?;
    }
    Ok(())
}

/// What stands at an address of a leaf, and the address up to which that goes on.
fn standing(extents: &mut &[Extent], at: u64) -> (Option<(ChunkId, u32)>, u64) {
    while extents.first().is_some_and(|extent| extent.end() <= at) {
        *extents = &extents[1..];
    }
    match extents.first() {
        Some(extent) if u64::from(extent.offset) <= at => {
            let part = extent.part(at, extent.end());
            (Some((part.chunk, part.chunk_offset)), extent.end())
        }
        Some(extent) => (None, u64::from(extent.offset)),
        None => (None, LEAF_BYTES),
    }
}

fn compare_leaves(mut a: &[Extent], mut b: &[Extent], base: u64, changed: &mut Changed) {
    let mut at = 0;
    while at < LEAF_BYTES {
        let (in_a, a_end) = standing(&mut a, at);
        let (in_b, b_end) = standing(&mut b, at);
        let end = a_end.min(b_end);
        if in_a != in_b {
            changed.add(base + at, base + end);
        }
        at = end;
    }
}
