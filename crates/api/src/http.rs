//! The bodies of HTTP v1 that are no resource of their own.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ByteSize, Error, PipelineId, VmId,
    life::SetLife,
    profile::Profile,
    provisions::Provisions,
    store::{Checked, Collected},
    vm::Accelerator,
};

/// A setting of a process, and what set it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Setting {
    pub name: String,
    pub value: String,
    /// The option or the variable that gave the value; absent: nobody did, it is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_by: Option<String>,
}

/// `GET /v1/server`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServerView {
    pub version: String,
    pub control_pid: u32,
    pub host_pid: Option<u32>,
    /// Absent while the host process cannot be reached.
    pub accelerator: Option<Accelerator>,
    /// Why this accelerator: one plain line.
    pub accelerator_reason: String,
    pub data_directory: String,
    /// Of the control process, then of the host process where it can be reached.
    #[serde(default)]
    pub settings: Vec<Setting>,
}

/// `POST /v1/vms`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Chosen by the client, so that a repeated request makes one VM.
    pub id: VmId,
    /// Made from the image's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub image: String,
    pub profile: Profile,
    /// Without end when absent.
    #[serde(default)]
    pub life: SetLife,
    /// For an image with an agent.
    #[serde(default)]
    pub provisions: Provisions,
}

/// `POST /v1/vms/{vm}/stop`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StopVm {
    /// Ends the VM at once instead of asking its guest.
    #[serde(default)]
    pub force: bool,
}

/// A TOML file sent to the server: its text, the name for messages, the directory for paths inside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    pub file: String,
    pub text: String,
    pub directory: String,
}

/// `POST /v1/images/build`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildImage {
    pub recipe: SourceFile,
    /// Fail rather than change the lock file.
    #[serde(default)]
    pub locked: bool,
    /// Build even where an image of the same recipe is there.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/images/import`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    /// An absolute path on the server's machine.
    pub file: String,
    pub name: String,
    /// The largest disk that may come of it.
    #[serde(default = "default_max_size")]
    pub max_size: ByteSize,
    /// For an OCI image layout: which of its images, such as `linux/amd64`, which it is without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
}

/// `POST /v1/images/commit`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitImage {
    /// A VM's name or id; its root disk becomes the image's.
    pub vm: String,
    /// Of the new image; none may have it.
    pub name: String,
    /// The new image's description.
    #[serde(default)]
    pub message: String,
    /// A snapshot's name; none: what the disk holds now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

fn default_max_size() -> ByteSize {
    ByteSize::gib(256)
}

/// `POST /v1/pipelines`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunPipeline {
    /// Chosen by the client, so that a repeated request makes one run.
    pub id: PipelineId,
    pub pipeline: SourceFile,
    /// An absolute path on the server's machine.
    pub input: String,
    /// An absolute path on the server's machine.
    pub output: String,
}

/// A line of the answer to long work (`application/x-ndjson`): progress, then exactly one result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// `done` of `total` units; 0 of 0 where the amount is not known.
    Step {
        phase: String,
        done: u64,
        total: u64,
        bytes: bool,
    },
    /// A line for the user.
    Note(String),
    Image(Box<crate::image::Image>),
    Exported(Exported),
    Pushed(crate::remote::Moved),
    Pulled(crate::remote::Moved),
    Differences(Box<crate::differences::Differences>),
    Collected(Collected),
    Checked(Checked),
    Failed(Error),
}

/// `POST /v1/images/{image}/export`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportImage {
    /// Absolute path of the file to make, on the server's machine.
    pub file: String,
    /// Replace a file that is there.
    #[serde(default)]
    pub force: bool,
}

/// An image's disk as it was written to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Exported {
    pub file: String,
    /// Bytes of the disk.
    pub length: u64,
    /// Bytes that were written; the others are zeros, and holes in the file.
    pub written: u64,
}

/// `POST /v1/store/scrub`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScrubStore {
    /// Bytes to read in a second, at most; no limit without it.
    #[serde(default)]
    pub rate: Option<ByteSize>,
    /// Let go of damaged copies, so that the next writer stores them again. Without it, nothing is changed.
    #[serde(default)]
    pub repair: bool,
}

/// A file of a VM, as `GET /v1/vms/{vm}/files?list=true` tells it. Names as in [`crate::path_text`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuestFile {
    pub name: String,
    #[serde(default)]
    pub name_escaped: bool,
    /// `file`, `directory`, `link` or `other`.
    pub kind: String,
    pub mode: u32,
    pub size: u64,
}
