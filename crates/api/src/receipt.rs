//! What a VM that goes on from a captured state has shown of its identity, before its workload went on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{VmId, vm::PhaseTime};

/// A receipt, and whose it is. It is kept when the VM goes on as another one, stops, or is removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeptReceipt {
    pub vm: VmId,
    /// The VM's name when it showed this.
    pub name: String,
    pub receipt: Receipt,
}

/// The receipt of an activation. Without a good one the VM was ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Receipt {
    /// 32 hexadecimal digits, new for every activation.
    pub generation: String,
    /// What it goes on from: `substrate NAME`, `fork of VM NAME`.
    pub origin: String,
    pub host_name: String,
    /// Empty where the image has none.
    pub machine_id: String,
    pub boot_id: String,
    /// 16 bytes that its random generator gave for this and nothing else, in hexadecimal digits.
    pub sample: String,
    /// How far its clock was before (negative: behind) the host's, in microseconds.
    pub clock_offset_us: i64,
    /// Of its network cards.
    pub hardware_addresses: Vec<String>,
    /// TCP connections of the captured state that were ended.
    pub ended_connections: u32,
    /// TCP connections to other machines that live on, because that was asked for.
    #[serde(default)]
    pub kept_connections: u32,
    /// The fingerprint of its SSH server's host key, where it has a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_host_key: Option<String>,
    /// The image's programs for clones, and how long each took.
    pub hooks: Vec<PhaseTime>,
    /// Seconds since 1970.
    pub given_s: u64,
    /// The same in microseconds: a VM may show several in one second.
    #[serde(default)]
    pub given_us: u64,
}
