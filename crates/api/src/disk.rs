//! Disks of VMs as clients see them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, Error, Result};

/// The name of the disk that a VM has from its image.
pub const ROOT: &str = "root";
/// The longest name: a guest finds a disk by its serial number, which has no more bytes.
pub const LONGEST_NAME: usize = 20;
/// Disks beside its root that a VM may have plugged in at a time.
pub const MOST_ATTACHED: u8 = 4;

/// What a disk held at an instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotView {
    pub name: String,
    /// Seconds since 1970.
    pub taken_s: u64,
    pub size: ByteSize,
    /// Whether it is in the store; until then it lies in the VM's own layers.
    pub stored: bool,
    /// The block map that holds it, once it is stored; none: zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskView {
    pub name: String,
    pub size: ByteSize,
    /// Whether it is plugged in, or will be at the VM's next start.
    pub attached: bool,
    /// Bytes in the VM's own layers: written, and not yet in the store.
    pub own: ByteSize,
    /// Sealed layers on their way into the store.
    pub unstored_layers: usize,
    /// The block map below the layers; none: zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// Plain bytes of the map fetched from the store since it was opened, for all VMs that read it; while it is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetched: Option<ByteSize>,
    /// Oldest first.
    pub snapshots: Vec<SnapshotView>,
}

/// Plugs a disk into a VM: a new one of `size` bytes, a new one with the contents of an image's disk, or, with neither,
/// one that was detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachDisk {
    pub name: String,
    #[serde(default)]
    pub size: Option<ByteSize>,
    #[serde(default)]
    pub image: Option<String>,
}

/// Makes a disk longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    pub size: ByteSize,
}

/// Unplugs a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DetachDisk {
    /// Also where the guest has a file system of it mounted.
    #[serde(default)]
    pub force: bool,
}

/// Names a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NameSnapshot {
    pub name: String,
}

/// A stretch of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stretch {
    pub offset: u64,
    pub length: u64,
}

/// Where two states of a disk may differ: whatever was written in between counts, be it with the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskChanges {
    /// In all.
    pub bytes: ByteSize,
    /// In order.
    pub stretches: Vec<Stretch>,
}

/// How a change of a disk went beyond what was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskChanged {
    /// The guest's name for the disk, where its agent could tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// What the user should know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// Makes another VM with a disk that holds what this one's holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneVm {
    /// Chosen by the client: asking twice makes one VM.
    pub id: crate::VmId,
    #[serde(default)]
    pub name: Option<String>,
    /// A snapshot's name; none: what the disk holds now.
    #[serde(default)]
    pub snapshot: Option<String>,
}

/// Checks a disk's name.
///
/// # Errors
/// `Invalid`.
pub fn check_name(name: &str) -> Result<()> {
    crate::name::check("disk", name)?;
    if name.len() > LONGEST_NAME {
        return Err(Error::invalid(format!("disk name \"{name}\" has {} characters", name.len()))
            .with_hint(format!("the guest sees no more than {LONGEST_NAME} of them")));
    }
    Ok(())
}
