//! Images as the store keeps them and as clients see them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ByteSize,
    history::{Origin, Step},
};

/// How an image starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// Our kernel and initramfs start the agent, then the image's root disk, where it has one.
    Agent,
    /// The firmware starts whatever the disk holds; no agent.
    Firmware,
}

/// `image.json` in an image's directory, beside the files it names. Version 3; version 2 had no
/// `history`, and version 1 no `map` either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The version of this file format.
    pub format: u32,
    pub name: String,
    #[serde(default)]
    pub description: String,
    pub boot: Boot,
    /// SHA-256 over the contents: the same bytes, the same digest.
    pub digest: String,
    /// SHA-256 of what the image was made from (recipe, lock, files added); empty for imports.
    pub recipe: String,
    /// The kernel's release, such as `6.1.0-56-cloud-amd64`; empty where the firmware boots.
    pub kernel_release: String,
    /// Whether there is a disk; its size in bytes.
    pub disk: Option<ByteSize>,
    /// The name of the disk's block map in the store. Absent for a disk that lies beside this file as `disk.raw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// Kernel modules that the agent loads, in order.
    pub modules: Vec<String>,
    pub kernel_parameters: Vec<String>,
    /// The program that becomes process 1; empty: the agent stays.
    pub init: String,
    /// Seconds since 1970, when it was made. Not part of the digest.
    pub created_s: u64,
    /// What made it, oldest first; empty for images of before version 3. Not part of the digest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Step>,
}

impl Image {
    pub const FORMAT: u32 = 3;
    /// The oldest that is still read.
    pub const OLDEST_FORMAT: u32 = 1;
    /// Names of the files beside `image.json`.
    pub const FILE: &str = "image.json";
    pub const KERNEL: &str = "vmlinuz";
    /// Modules, and for initramfs images busybox and the recipe's files; the agent is put in front of it.
    pub const INITRAMFS: &str = "initramfs.cpio";
    pub const DISK: &str = "disk.raw";

    /// Whether its disk was that of a VM: then a machine's own identity is on it, and every VM needs another one.
    #[must_use]
    pub fn was_a_machine(&self) -> bool {
        self.history.iter().any(|step| matches!(step.origin, Origin::Committed { .. }))
    }
}

/// A line of `burgeon image ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageView {
    pub name: String,
    /// Absent for a broken one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// Bytes that the image takes on disk.
    pub stored: ByteSize,
    /// What is wrong with it, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Names of the VMs made from it.
    pub used_by: Vec<String>,
}
