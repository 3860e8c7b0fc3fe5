//! A cache of decoded nodes for those who look up much: the disks and files of running VMs. Many tasks share one.
//!
//! A node's name tells its contents, so nothing in the cache is ever out of date, whichever maps it serves.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use burgeon_api::Result;

use super::{Load, Node, Nodes};
use crate::ids::ChunkId;

/// Small caches are one shard, so that their bound is exact.
const SHARDS: usize = 16;
const LEAST_SHARDED: usize = 512;

/// Decoded nodes of any maps from one source. Give it to [`super::Map::lookup`] and the others in place of the source.
pub struct MapReader<N> {
    nodes: N,
    shards: Vec<Mutex<Shard>>,
    most_of_shard: usize,
}

/// Held for a look-up in memory only, never while a node is read.
#[derive(Default)]
struct Shard {
    nodes: HashMap<ChunkId, Kept, BuildHasherDefault<NameHasher>>,
    /// Counts uses, to tell which node was used the longest time ago.
    uses: u64,
}

struct Kept {
    node: Arc<Node>,
    used: u64,
}

impl<N> MapReader<N> {
    /// A cache of about `most` nodes. A leaf takes 48 bytes for each extent: 3 KiB where a disk is written in blocks
    /// of 64 KiB, 1.1 MiB at the very most.
    pub fn new(nodes: N, most: usize) -> MapReader<N> {
        let count = if most < LEAST_SHARDED { 1 } else { SHARDS };
        let shards = (0..count).map(|_| Mutex::default()).collect();
        MapReader { nodes, shards, most_of_shard: most.div_ceil(count).max(1) }
    }

    /// Where nodes come from that are not in the cache.
    pub fn nodes(&self) -> &N {
        &self.nodes
    }

    /// Nodes in the cache.
    pub fn held(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).nodes.len()).sum()
    }

    fn shard(&self, id: ChunkId) -> &Mutex<Shard> {
        // Not the byte that the table's own hash begins with.
        &self.shards[usize::from(id.0[31]) % self.shards.len()]
    }
}

impl<N: Nodes> Load for MapReader<N> {
    fn load(&self, id: ChunkId) -> Result<Arc<Node>> {
        let shard = self.shard(id);
        if let Some(node) = lock(shard).get(id) {
            return Ok(node);
        }
        // Two tasks that miss the same node both read it; that costs less than to make one wait.
        let node = Arc::new(Node::decode(id, &self.nodes.get(id)?)?);
        lock(shard).put(id, Arc::clone(&node), self.most_of_shard);
        Ok(node)
    }
}

impl Shard {
    fn get(&mut self, id: ChunkId) -> Option<Arc<Node>> {
        self.uses += 1;
        let kept = self.nodes.get_mut(&id)?;
        kept.used = self.uses;
        Some(Arc::clone(&kept.node))
    }

    fn put(&mut self, id: ChunkId, node: Arc<Node>, most: usize) {
        if self.nodes.len() >= most && !self.nodes.contains_key(&id) {
            // A shard is small, and this happens once for each node that is read and decoded.
            let oldest = self.nodes.iter().min_by_key(|(_, kept)| kept.used).map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                self.nodes.remove(&oldest);
            }
        }
        self.nodes.insert(id, Kept { node, used: self.uses });
    }
}

fn lock(shard: &Mutex<Shard>) -> std::sync::MutexGuard<'_, Shard> {
    // A shard is whole after each of its statements, so a panic elsewhere does not spoil it.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names are hashes already: eight of their bytes do.
#[derive(Default)]
struct NameHasher(u64);

impl Hasher for NameHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(word) = bytes.first_chunk::<8>() {
            self.0 ^= u64::from_le_bytes(*word);
        }
    }

    // An array tells its length first, which is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}
