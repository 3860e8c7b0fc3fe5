//! All chunks that a map refers to.

use std::collections::HashSet;

use burgeon_api::Result;

use super::{Load, Map, Node, Subtree, node};
use crate::{chunk::Kind, ids::ChunkId};

/// Tells `visit` every chunk of a map: the root, then nodes before what is under them, and the data chunks. For a
/// node, `visit` says whether to go on below it; a caller that remembers nodes which it has seen, in this map or in
/// another, answers false, and shared subtrees cost nothing. Its answer for a data chunk does not matter; a chunk that
/// stands at several addresses is told for each extent.
///
/// # Errors
/// `Damaged` for nodes that break the rules; those of the source and of `visit`.
pub fn chunks(
    nodes: &(impl Load + ?Sized),
    root: ChunkId,
    visit: &mut impl FnMut(Kind, ChunkId) -> Result<bool>,
) -> Result<()> {
    if visit(Kind::MapNode, root)? {
        walk(nodes, Map::open(nodes, root)?.top(), visit)?;
    }
    Ok(())
}

/// Every chunk below the roots once, in the order of the address spaces: what is read together lies together.
///
/// # Errors
/// As [`chunks`].
pub fn all_chunks(nodes: &(impl Load + ?Sized), roots: &[ChunkId]) -> Result<Vec<(Kind, ChunkId)>> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for root in roots {
        chunks(nodes, *root, &mut |kind, id| {
            // Data may have the bytes of a node, whose children would be missed.
            let new = seen.insert(id);
            if new {
                all.push((kind, id));
            }
            Ok(true)
        })?;
    }
    Ok(all)
}

fn walk(
    nodes: &(impl Load + ?Sized),
    subtree: Subtree,
    visit: &mut impl FnMut(Kind, ChunkId) -> Result<bool>,
) -> Result<()> {
    let Some(id) = subtree.node else { return Ok(()) };
    if !visit(Kind::MapNode, id)? {
        return Ok(());
    }
    match &*nodes.load(id)? {
        Node::Leaf(extents) if subtree.height == 0 => {
            for extent in extents {
                visit(Kind::Data, extent.chunk)?;
            }
            Ok(())
        }
        Node::Inner { height, children } if *height == subtree.height => {
            for (_, child) in children {
                walk(nodes, Subtree { node: Some(*child), height: height - 1 }, visit)?;
            }
            Ok(())
        }
        _ => Err(node::damaged(id, format_args!("it does not belong at height {}", subtree.height))),
    }
}
