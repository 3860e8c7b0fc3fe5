//! What differs between two images.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// `POST /v1/images/{image}/diff`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiffImage {
    /// The image to compare with.
    pub other: String,
    /// Whether the stretches that differ are listed.
    #[serde(default)]
    pub extents: bool,
}

/// What differs between the images `a` and `b`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Differences {
    pub a: Side,
    pub b: Side,
    /// Whatever else of the two is not the same; empty where only disks differ.
    pub facts: Vec<Fact>,
    /// Bytes of the disks' blocks of 4 KiB in which not all bytes are the same. What only the longer disk has counts.
    pub different_bytes: u64,
    /// Chunks of the disks that both have.
    pub in_both: Chunks,
    /// How much of the chunks of `b` is in `a` too, in thousandths of its bytes.
    pub shared_permille: u64,
    /// The stretches that differ, in order; present where they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extents: Option<Vec<Extent>>,
}

/// One of the two images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Side {
    pub image: String,
    pub digest: String,
    /// Size of its disk, if it has one.
    pub disk: Option<ByteSize>,
    /// Chunks of its disk that the other one does not have.
    pub only_here: Chunks,
}

/// Different chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Chunks {
    pub chunks: u64,
    /// Their plain bytes.
    pub bytes: u64,
}

/// Something about the images that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Fact {
    pub what: String,
    pub a: String,
    pub b: String,
}

/// A stretch of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Extent {
    /// In bytes.
    pub offset: u64,
    pub length: u64,
}
