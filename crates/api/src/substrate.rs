//! Substrates: VMs that were booted and warmed up once, and wait in memory to be gone on from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, VmId, profile::Profile, provisions::Provisions, vm::Observed};

/// How a substrate is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// A command that warms the guest up: starts the application, fills its caches. Run by `sh -c`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// A command that succeeds when the guest is ready. Run by `sh -c`, again and again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
}

/// A request for a substrate. Its id is chosen by the client: asking twice makes one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSubstrate {
    pub id: VmId,
    pub name: String,
    pub image: String,
    pub profile: Profile,
    #[serde(default)]
    pub recipe: Recipe,
}

/// What a captured VM needs to go on, and what it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Docked {
    /// The map of its memory in the store.
    pub map: String,
    /// Bytes of its memory that are not zeros.
    pub memory: ByteSize,
    /// What it added to the store.
    pub stored: ByteSize,
    /// The state of its devices and CPUs.
    pub devices: ByteSize,
    pub compatibility: Compatibility,
    /// How long the guest stood still while it was captured, in microseconds.
    pub captured_us: u64,
}

/// What must be the same for a captured state to go on. All of it is compared at every use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Compatibility {
    pub format: u32,
    /// QEMU's version, and the SHA-256 of its program and of its firmware.
    pub qemu: String,
    pub program: String,
    pub firmware: String,
    pub accelerator: crate::vm::Accelerator,
    /// The SHA-256 of the machine's description: board, CPU, memory, devices.
    pub machine: String,
}

/// A substrate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubstrateView {
    pub id: VmId,
    pub name: String,
    pub image: String,
    pub profile: Profile,
    pub recipe: Recipe,
    #[serde(flatten)]
    pub observed: Observed,
    /// Seconds since 1970.
    pub created_s: u64,
    /// VMs that go on from it.
    pub clones: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docked: Option<Docked>,
    #[serde(default)]
    pub standbys: Standbys,
}

/// QEMUs that wait, with a substrate's state taken up, for VMs that go on from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Standbys {
    pub waiting: u32,
    /// How many a user wants; absent: as many as VMs were made in the last minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<u32>,
    /// Why the last one could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<crate::Error>,
}

/// What a substrate and those that use it take of the machine's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Shares {
    /// What the substrate holds, while it is in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<ByteSize>,
    /// Those that run; the VMs first.
    pub users: Vec<Share>,
}

/// What one QEMU takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Share {
    /// None: it waits for a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Its proportional set size: what several share counts for each of them in part.
    pub proportional: ByteSize,
    /// Pages that its guest has written since it began, and has for itself.
    pub own: ByteSize,
    /// Whether the rest is the memory that the substrate holds now. After a restart of the host process, VMs that went on
    /// before it share another copy.
    pub of_held: bool,
}

/// What a substrate holds, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubstrateStat {
    pub id: VmId,
    pub name: String,
    pub image: String,
    /// What its image takes in the store and beside it.
    pub image_stored: ByteSize,
    pub memory: Part,
    /// By name; the root first.
    pub disks: Vec<(String, Part)>,
    /// The state of its devices, a file beside the store.
    pub devices: ByteSize,
    /// What memory, disks and devices take that its image does not have already. What two of them share counts once.
    pub beside_image: ByteSize,
    /// What it holds in the machine's memory, while it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<ByteSize>,
    /// VMs that go on from it, and QEMUs that wait.
    pub users: Vec<SubstrateUser>,
}

/// A part of a substrate that is in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Part {
    /// Its length, zeros and all.
    pub size: ByteSize,
    /// Plain bytes of its chunks.
    pub plain: ByteSize,
    /// What its chunks take in the store; and those of them that its image does not have.
    pub stored: ByteSize,
    pub new: ByteSize,
    /// What is written, and not in the store yet.
    pub unstored: ByteSize,
}

/// A VM that goes on from a substrate, or a QEMU that waits for one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubstrateUser {
    /// None: it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// As a VM's; `waiting` for one that waits.
    pub state: String,
    /// Absent for a VM that has no process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
}

/// A request for QEMUs that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeepStandbys {
    /// At most 64; absent: as demand has it.
    #[serde(default)]
    pub count: Option<u32>,
}

/// What a request may ask for.
pub const MOST_STANDBYS: u32 = 64;

/// A request to fork a running VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkVm {
    /// The ids of the children, chosen by the client; one child for each.
    pub ids: Vec<VmId>,
    /// Their names, as many as ids; absent: made of the VM's name.
    #[serde(default)]
    pub names: Vec<String>,
    /// One that fails makes all fail.
    #[serde(default)]
    pub all_or_nothing: bool,
    #[serde(default)]
    pub keep: Keep,
    /// What each of them is given.
    #[serde(default)]
    pub provisions: Provisions,
}

/// What a VM keeps of the one whose memory it goes on from. Without these it is ended or removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// TCP connections to other machines.
    pub connections: bool,
    /// What is in `/run/burgeon/secrets`.
    pub secrets: bool,
}

/// What became of a fork.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Forked {
    /// One for each child, in the order of the request.
    pub children: Vec<Child>,
    /// How long the VM stood still, in microseconds: from asking its workload to freeze until it went on.
    pub paused_us: u64,
    /// Bytes that it had written since it began, and that were copied.
    pub copied: ByteSize,
}

/// A request for VMs that go on from a substrate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ActivateVms {
    /// The ids of the VMs, chosen by the client; one VM for each.
    pub ids: Vec<VmId>,
    /// Their names, as many as ids; absent: made of the substrate's name.
    #[serde(default)]
    pub names: Vec<String>,
    /// Without end when absent.
    #[serde(default)]
    pub life: crate::life::SetLife,
    #[serde(default)]
    pub keep: Keep,
    /// What they shall have in place of what the substrate has.
    #[serde(default)]
    pub resize: crate::vm::Resize,
    /// What each of them is given.
    #[serde(default)]
    pub provisions: Provisions,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Child {
    pub id: VmId,
    pub name: String,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<crate::Error>,
}
