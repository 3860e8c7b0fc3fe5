//! What the store tells of itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/store`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StoreView {
    pub packs: u64,
    /// Those of `packs` whose removal is not finished.
    pub packs_dropping: u64,
    /// Bytes of all packs.
    pub pack_bytes: u64,
    pub chunks: u64,
    /// Bytes of all chunks as they are, and as they are stored in packs.
    pub plain_bytes: u64,
    pub stored_bytes: u64,
    /// Share of the packs' bytes that chunks take, in thousandths; the rest is for `burgeon store gc` to free.
    pub live_permille: u64,
    /// How many roots of each kind keep chunks.
    pub roots: std::collections::BTreeMap<String, u64>,
    /// Bytes on this machine's disk of what was read of images.
    pub cache_bytes: u64,
}

/// What a garbage collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Collected {
    pub roots: u64,
    /// Chunks that roots lead to.
    pub chunks_kept: u64,
    /// Chunks that were looked at, and those of them that were deleted.
    pub chunks_seen: u64,
    pub chunks_deleted: u64,
    pub packs_dropped: u64,
    pub packs_repacked: u64,
    /// Small packs that became part of larger ones.
    #[serde(default)]
    pub packs_joined: u64,
    /// Roots whose time was over, and those of disks that images do not have any more.
    #[serde(default)]
    pub roots_expired: u64,
    #[serde(default)]
    pub roots_let_go: u64,
    /// Caches of what VMs have read of images that nothing names any more, and their bytes on this machine's disk.
    #[serde(default)]
    pub caches_removed: u64,
    #[serde(default)]
    pub cache_bytes_freed: u64,
    /// Files that writers left when they died.
    pub files_removed: u64,
    /// Bytes that packs take less than before.
    pub bytes_freed: u64,
    /// What is damaged, and was left as it is.
    pub problems: Vec<Problem>,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Checked {
    /// Roots whose maps were read.
    pub roots: u64,
    pub packs: u64,
    pub chunks: u64,
    /// Bytes that were read and compared with their names.
    pub bytes: u64,
    /// Empty where all is well.
    pub problems: Vec<Problem>,
    /// Damaged copies of chunks that a repair lets go of, so that the next writer stores them again.
    #[serde(default)]
    pub repairable: u64,
    /// Those that were let go of.
    #[serde(default)]
    pub repaired: u64,
    /// What needs these chunks, such as `image web`, `disk ID`.
    #[serde(default)]
    pub needed_by: Vec<String>,
}

/// What a new catalog was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rebuilt {
    pub packs: u64,
    /// Those of `packs` whose index was lost, so that their records were read.
    pub packs_salvaged: u64,
    /// Packs of which nothing can be read.
    pub packs_lost: u64,
    pub chunks: u64,
    pub roots: u64,
    /// Roots whose map is in no pack.
    pub roots_lost: u64,
    pub problems: Vec<Problem>,
}

/// What was moved out of a data directory; nothing where it had been done before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Relocated {
    pub packs: u64,
    pub pack_bytes: u64,
    /// Rows of the catalog and of meta.
    pub rows: u64,
}

/// Something damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// The file and the byte, or the root.
    pub place: String,
    pub what: String,
}
