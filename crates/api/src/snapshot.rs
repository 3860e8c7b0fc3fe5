//! Snapshots of VMs: memory, devices and disks at one instant, for the same VM to return to, or for others to go on from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{RequestId, substrate::Docked};

/// A snapshot of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSnapshot {
    pub name: String,
    /// The request that it was taken by.
    pub request: RequestId,
    /// Seconds since 1970.
    pub taken_s: u64,
    /// Names of the disks that it holds: those that were plugged in.
    pub disks: Vec<String>,
    #[serde(flatten)]
    pub docked: Docked,
}

/// A request for a snapshot. Its id is chosen by the client: asking twice takes one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotVm {
    pub id: RequestId,
    /// `s1`, `s2` and so on when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A request to return a VM to a snapshot of it. Its id is chosen by the client: asking twice returns it once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RollBackVm {
    pub id: RequestId,
    /// The latest when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}
