//! Pipelines: the file that users write, and what is known of a run.
//!
//! # What a step's command sees
//! In mode `stream` the command runs once in each VM of the step. Items come on its standard input and
//! results go to its standard output, each as one line of JSON followed by `size` bytes of payload:
//!
//! ```text
//! in:   {"item":7,"attempt":1,"name":"bash/copyright","attrs":{},"size":5}\nhello
//! out:  {"item":7,"attempt":1,"vm":"extract-1","attrs":{"k":1},"size":0}\n
//! ```
//!
//! `item`, `attempt` are given back as they came; `vm` is the guest's own host name. `route` chooses among the
//! step's routes; `reason` is kept for the report; `error` fails the item for good; `attrs` are merged into
//! the item's attributes. Results may come in any order. In mode `each` the command runs once per item: payload on
//! standard input and output, and `$BURGEON_RESULT` names a file for the JSON line.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{ByteSize, Error, PipelineId, TimeSpan};

/// How a step's command takes its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One long-running command per VM.
    Stream,
    /// One command per item.
    #[default]
    Each,
}

/// A pipeline file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineSpec {
    /// The version of this file format: 1.
    pub format: u32,
    pub name: String,
    #[serde(default)]
    pub description: String,
    /// The image of steps that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Bytes of files and payloads that a run keeps in memory at a time. While it holds more, no further
    /// file is read. A larger file goes through alone.
    #[serde(default = "default_payload_budget")]
    pub payload_budget: ByteSize,
    #[serde(rename = "step")]
    pub steps: Vec<StepSpec>,
    #[serde(default)]
    pub report: ReportSpec,
}

/// What the report adds to each entry, and counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReportSpec {
    /// Attributes that every entry has, with the value of those that no step gave.
    pub defaults: Map<String, Value>,
    /// Attributes whose values are counted over all entries.
    pub count: Vec<String>,
}

/// One step: an image, a command, how many VMs, and where results go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepSpec {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The program inside the VM and its arguments.
    pub command: Vec<String>,
    #[serde(default)]
    pub mode: Mode,
    /// VMs that work on this step.
    #[serde(default = "one")]
    pub vms: u32,
    /// Items given to one VM at a time.
    #[serde(default = "default_window")]
    pub window: u32,
    /// A built-in profile; `worker` when absent.
    #[serde(default = "default_profile")]
    pub profile: String,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Files put into each VM before the command starts.
    #[serde(default, rename = "file")]
    pub files: Vec<StepFile>,
    /// The step that gets every result. Exactly one of `to`, `routes` and `outcome` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The step for each value of a result's `route`.
    #[serde(default)]
    pub routes: BTreeMap<String, String>,
    /// The item is done here, with this word in the report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// How often an item may be tried at this step.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
    /// Time for one item; the VM is replaced when it passes.
    #[serde(default = "default_time_limit")]
    pub time_limit: TimeSpan,
    /// The largest payload taken from this step, or, for the first one, read from a file.
    #[serde(default = "default_payload_limit")]
    pub payload_limit: ByteSize,
}

/// A file given to the VMs of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepFile {
    /// Path on this machine, from the pipeline file's directory.
    pub from: String,
    /// Absolute path in the VM.
    pub to: String,
    /// Permission bits in octal; `0755` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

fn one() -> u32 {
    1
}
fn default_window() -> u32 {
    8
}
fn default_profile() -> String {
    "worker".to_string()
}
fn default_attempts() -> u32 {
    3
}
fn default_time_limit() -> TimeSpan {
    TimeSpan(std::time::Duration::from_secs(60))
}
fn default_payload_budget() -> ByteSize {
    ByteSize::mib(256)
}
fn default_payload_limit() -> ByteSize {
    ByteSize::mib(64)
}

impl PipelineSpec {
    /// The version of the format that this code reads.
    pub const FORMAT: u32 = 1;
}

/// The line that goes before an item's payload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ItemHeader {
    pub item: u64,
    pub attempt: u32,
    /// The item's path below the input directory.
    pub name: String,
    pub attrs: Map<String, Value>,
    /// Bytes of payload after the line.
    pub size: u64,
}

/// The line that goes before a result's payload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResultHeader {
    pub item: u64,
    pub attempt: u32,
    /// Host name of the VM that did the work, as the VM itself reads it.
    pub vm: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default)]
    pub attrs: Map<String, Value>,
    /// Time that the command spent on the item.
    #[serde(default)]
    pub work_us: u64,
    #[serde(default)]
    pub size: u64,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    Preparing,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl RunState {
    pub fn is_over(self) -> bool {
        matches!(self, RunState::Done | RunState::Failed | RunState::Cancelled)
    }

    pub fn name(self) -> &'static str {
        match self {
            RunState::Preparing => "preparing",
            RunState::Running => "running",
            RunState::Done => "done",
            RunState::Failed => "failed",
            RunState::Cancelled => "cancelled",
        }
    }
}

/// Counts of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StepView {
    pub name: String,
    /// Items that have reached the step so far.
    pub items_in: u64,
    pub waiting: u64,
    pub running: u64,
    pub done: u64,
    pub failed: u64,
    pub retried: u64,
    pub vms_wanted: u32,
    pub vms_ready: u32,
    pub vms_lost: u32,
}

/// Where the time of a run went, in milliseconds of wall time, or of all VMs together where it says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Times {
    /// Finding and checking images.
    pub image_ms: u64,
    /// From the first VM's start to the last one's readiness.
    pub start_ms: u64,
    /// Items on their way to, from and inside VMs, waiting for their turn there; sum over all items.
    pub transfer_ms: u64,
    /// The commands' own time; sum over all items, as told by the VMs.
    pub work_ms: u64,
    pub total_ms: u64,
}

/// A run of a pipeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PipelineView {
    pub id: PipelineId,
    pub name: String,
    pub state: RunState,
    /// Why it failed, or what it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
    pub input: String,
    pub output: String,
    pub steps: Vec<StepView>,
    /// Files found so far, and whether that is all.
    pub files: u64,
    pub listed: bool,
    /// Entries of the input that are no regular files, and are not read.
    pub skipped: u64,
    /// Finished items by outcome.
    pub outcomes: BTreeMap<String, u64>,
    pub times: Times,
    /// Seconds since 1970.
    pub created_s: u64,
}

/// Which VM did a step of an item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkedBy {
    pub step: String,
    /// As the VM told it.
    pub vm: String,
    pub attempt: u32,
}

/// One input file in `report.json`. Attributes given by the steps stand beside these keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileEntry {
    pub path: String,
    /// The path holds `%XX` for bytes that are not UTF-8 (and `%25` for `%`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub path_escaped: bool,
    pub outcome: String,
    pub reason: Option<String>,
    /// The highest attempt number that any step needed; 0 where no VM saw the file.
    pub attempt: u32,
    pub vms: Vec<WorkedBy>,
    #[serde(flatten)]
    pub attrs: Map<String, Value>,
}

/// `report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// The version of this file format: 1.
    pub format: u32,
    pub pipeline: String,
    pub run: PipelineId,
    pub input: String,
    pub outcomes: BTreeMap<String, u64>,
    /// For each attribute named by the pipeline's `report.count`: its values and how often they occur.
    pub counts: BTreeMap<String, BTreeMap<String, u64>>,
    pub skipped: u64,
    pub times: Times,
    pub steps: Vec<StepView>,
    pub files: Vec<FileEntry>,
}
