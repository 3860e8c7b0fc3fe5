//! Virtual machines as clients see them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, VmId, image::Boot, life::Life, profile::Profile, receipt::Receipt, substrate::Docked};

/// What hardware runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn name(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

/// What the user wants of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    Running,
    Stopped,
    Removed,
}

/// What is known of a VM. `Unknown` is an answer too: nobody may take it for dead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Observed {
    /// Wanted, and not yet with the host.
    Pending,
    /// The host is bringing it up; `phase` says how far it is.
    Starting { phase: String },
    /// The agent answers; for an image without agent: QEMU runs.
    Running,
    /// Its user has paused it: its CPUs stand and its memory is kept, until it is resumed.
    Paused,
    /// It ended, on request or by itself.
    Stopped { reason: String },
    /// A substrate: its state is kept, and it has no process.
    Docked,
    /// Its state is kept, and it has no process; started, it goes on where it was.
    Parked { reason: String },
    /// It could not be started, or was lost.
    Failed { reason: String },
    /// The host process cannot be asked, or cannot reach the VM; it may well be running.
    Unknown { reason: String },
    /// What is kept of it does not read, so nothing is done about it; it may well be running.
    Damaged { reason: String },
}

impl Observed {
    pub fn name(&self) -> &'static str {
        match self {
            Observed::Pending => "pending",
            Observed::Starting { .. } => "starting",
            Observed::Running => "running",
            Observed::Paused => "paused",
            Observed::Stopped { .. } => "stopped",
            Observed::Docked => "docked",
            Observed::Parked { .. } => "parked",
            Observed::Failed { .. } => "failed",
            Observed::Unknown { .. } => "unknown",
            Observed::Damaged { .. } => "damaged",
        }
    }

    /// The detail behind the name: a phase or a reason.
    pub fn detail(&self) -> &str {
        match self {
            Observed::Pending | Observed::Running | Observed::Paused | Observed::Docked => "",
            Observed::Starting { phase } => phase,
            Observed::Parked { reason }
            | Observed::Stopped { reason }
            | Observed::Failed { reason }
            | Observed::Unknown { reason }
            | Observed::Damaged { reason } => reason,
        }
    }
}

/// One limit of a VM, and whether the machine enforces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limit {
    /// `memory`, `cpu`, `processes`, `sandbox`, `user`.
    pub name: String,
    pub value: String,
    /// `enforced`, or `not enforced: ` and the reason.
    pub enforcement: String,
}

/// What the guest says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuestView {
    pub agent_version: String,
    pub kernel: String,
    pub host_name: String,
    pub boot_id: String,
    /// Whether the agent is process 1.
    pub agent_is_init: bool,
}

/// How much memory and how many CPUs a guest has, or shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Size {
    pub memory: ByteSize,
    pub cpus: u32,
}

/// A request to change the size of a VM. What is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resize {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
}

/// What a change of a VM's size has come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Resized {
    /// What the guest has now.
    #[serde(flatten)]
    pub size: Size,
    /// For the user: what was rounded, and what the guest has not done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Where the time of a start went, in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PhaseTime {
    pub phase: String,
    pub microseconds: u64,
}

/// A VM on its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostVm {
    pub id: VmId,
    pub name: String,
    pub observed: Observed,
    pub pid: Option<u32>,
    pub accelerator: Accelerator,
    pub boot: Boot,
    pub limits: Vec<Limit>,
    pub guest: Option<GuestView>,
    pub start_times: Vec<PhaseTime>,
    /// Host memory held by the VM's process.
    pub resident: Option<ByteSize>,
    pub cpu_milliseconds: Option<u64>,
    /// How often the host process found this VM running after its own restart.
    pub adoptions: u32,
    /// Which of the starts that were asked for after the first the host has begun; see [`VmView::starts`].
    #[serde(default)]
    pub starts: u32,
    /// Of a VM that goes on from a captured state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Of a substrate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docked: Option<Docked>,
    /// How many snapshots of it there are.
    #[serde(default)]
    pub snapshots: u32,
    /// What its guest has now; of one that does not run, what its next start gives it, where that is not its profile's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
}

/// A VM: what is wanted and what is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmView {
    pub id: VmId,
    pub name: String,
    pub image: String,
    pub profile: Profile,
    pub intent: Intent,
    #[serde(flatten)]
    pub observed: Observed,
    /// The pipeline that made it, and removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<String>,
    /// The row's version; give it back as If-Match.
    pub version: u64,
    /// How often its user has asked to start it again after it had stopped.
    #[serde(default)]
    pub starts: u32,
    /// Seconds since 1970.
    pub created_s: u64,
    /// When it is removed or parked by itself.
    #[serde(default, skip_serializing_if = "Life::is_endless")]
    pub life: Life,
    /// Whether it is a substrate, or to become one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_substrate: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_host: Option<HostVm>,
}

/// Figures of a running guest, as its agent reads them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Figures {
    pub uptime_ms: u64,
    /// Load average of one minute, times 100.
    pub load_hundredths: u32,
    pub memory_total: u64,
    pub memory_available: u64,
    pub processes: u32,
}
