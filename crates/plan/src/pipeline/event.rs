//! What the shell tells a run, and what the run asks of it.

use std::fmt;

use burgeon_api::pipeline::WorkedBy;

/// One VM of a step. A VM that takes another's place has its ordinal and the next generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepVm {
    /// Index of the step in the graph.
    pub step: usize,
    /// From 1 to the step's `vms`.
    pub ordinal: u32,
    /// From 1.
    pub generation: u32,
}

/// The name, and host name, of a VM of a run: `extract-1-1a2b3c4d`; its replacement is
/// `extract-1-1a2b3c4d-g2`, and in the second life of the run's control process `extract-1-1a2b3c4d-l2g1`.
///
/// `short` is the run's id as [`burgeon_api::PipelineId::short`] gives it (eight hexadecimal digits) and
/// `step` a step's name out of a graph; then the name is valid and no two VMs of a run share it.
pub fn vm_name(short: &str, life: u16, step: &str, ordinal: u32, generation: u32) -> String {
    match (life, generation) {
        (0 | 1, 0 | 1) => format!("{step}-{ordinal}-{short}"),
        (0 | 1, _) => format!("{step}-{ordinal}-{short}-g{generation}"),
        _ => format!("{step}-{ordinal}-{short}-l{life}g{generation}"),
    }
}

/// What happened. Item numbers are the caller's, each larger than the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A file to be worked on.
    ItemFound {
        item: u64,
        size: u64,
    },
    /// An input that cannot be read: reported as failed, and seen by no VM.
    ItemRefused {
        item: u64,
        reason: String,
    },
    /// A file that an earlier life of the control process finished with this outcome.
    Restored {
        item: u64,
        outcome: String,
    },
    /// No more files will be found.
    Listed,
    /// The VM runs, and its command (mode `stream`) has been started.
    WorkerReady {
        vm: StepVm,
    },
    WorkerFailedToStart {
        vm: StepVm,
        reason: String,
    },
    /// The VM, its command (mode `stream`) or the way to it is no more, or its output is no protocol.
    WorkerLost {
        vm: StepVm,
        reason: String,
    },
    Result(ItemResult),
    /// One try failed and the VM is well: the command of mode `each` ended badly, a result could not be read.
    TryFailed {
        vm: StepVm,
        item: u64,
        attempt: u32,
        reason: String,
    },
    /// Time has passed. Needed at [`super::Run::wake_at`] at the latest.
    Tick,
    Cancel,
    /// Something outside the run makes it pointless: the input directory vanished, the disk is full.
    Fail {
        reason: String,
    },
}

/// A result as a VM gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemResult {
    /// The VM on whose channel the result came.
    pub vm: StepVm,
    pub item: u64,
    pub attempt: u32,
    pub route: Option<String>,
    pub reason: Option<String>,
    pub error: Option<String>,
    /// Bytes of payload. Beyond the step's limit the shell may skip them; the item fails.
    pub size: u64,
    /// Time that the command says it spent.
    pub worked_us: u64,
    /// The host name that the VM itself told.
    pub told_vm: String,
}

/// What to do. To be carried out in order; each is safe to repeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Create and start a VM for the step, and its command; answer with `WorkerReady` or `WorkerFailedToStart`.
    /// A start that takes too long is the shell's to call failed: no `Tick` ends it.
    StartVm {
        vm: StepVm,
        name: String,
    },
    /// Remove the VM and all that is left of it; no answer. Comes exactly once for each `StartVm`.
    StopVm {
        vm: StepVm,
    },
    /// Give the item to the VM. Keep its payload and attributes until `Accept` or `Finish`: it may be retried.
    Dispatch {
        vm: StepVm,
        item: u64,
        step: usize,
        attempt: u32,
    },
    /// The item left its VM without a result and waits again. Nothing to do but to tell.
    Retry {
        item: u64,
        step: usize,
        attempt: u32,
        charged: bool,
        reason: String,
    },
    /// The result just handled counts: merge its attributes. Its payload is the item's for step `next`;
    /// where there is none, `Finish` follows.
    Accept {
        item: u64,
        step: usize,
        next: Option<usize>,
    },
    /// The result just handled does not count: drop it, and tell.
    Refuse {
        vm: StepVm,
        item: u64,
        attempt: u32,
        refusal: Refusal,
    },
    /// The item is finished: its entry of the report. Comes exactly once for each item that is found or refused.
    Finish {
        item: u64,
        outcome: String,
        reason: Option<String>,
        attempt: u32,
        vms: Vec<WorkedBy>,
    },
    /// Every item is finished, every VM stopped. Last, as are the next two.
    Done,
    RunFailed {
        reason: String,
    },
    Cancelled,
}

/// Why a result does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The item is finished, or never was.
    NoSuchItem,
    /// The item waits; no VM has it.
    NotGiven,
    /// Another VM has it now.
    OtherVm { given_to: String },
    /// The VM has it, under another attempt.
    OtherAttempt { current: u32 },
    /// The VM says that it is another one. The item is tried again.
    NotItself { expected: String, told: String },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NoSuchItem => f.write_str("the item is finished, or was never given out"),
            Refusal::NotGiven => f.write_str("no VM has the item at the moment"),
            Refusal::OtherVm { given_to } => write!(f, "the item was given to VM \"{given_to}\""),
            Refusal::OtherAttempt { current } => write!(f, "attempt {current} is the current one"),
            Refusal::NotItself { expected, told } => {
                let told = burgeon_api::path_text::printable(told);
                write!(f, "VM \"{expected}\" said that it is \"{told}\"")
            }
        }
    }
}
