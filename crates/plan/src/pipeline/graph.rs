//! A pipeline that has been checked: steps by index, everything resolved that needs no machine.

use std::{collections::BTreeMap, time::Duration};

use burgeon_api::{
    pipeline::{Mode, PipelineSpec},
    profile::Profile,
};

/// The outcome of items that did not come through. No step may give it as its own.
pub const FAILED: &str = "failed";

/// A sound pipeline: one first step, no cycle, every step reachable.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    pub name: String,
    pub steps: Vec<Step>,
    /// The step that gets the input files.
    pub first: usize,
    /// Bytes of payloads in memory before no more files are read.
    pub payload_budget: u64,
    /// For each step, the steps right before it, as bits.
    pub(super) before: Vec<u64>,
    /// For each step, itself and every step that leads to it, as bits.
    pub(super) above: Vec<u64>,
}

/// One step, with the defaults of the file filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub name: String,
    pub image: String,
    pub command: Vec<String>,
    pub mode: Mode,
    pub vms: u32,
    pub window: u32,
    pub profile: Profile,
    pub env: BTreeMap<String, String>,
    pub files: Vec<GuestFile>,
    pub next: Next,
    pub attempts: u32,
    pub time_limit: Duration,
    /// Bytes.
    pub payload_limit: u64,
}

/// A file given to the VMs of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// Path on this machine, from the pipeline file's directory.
    pub from: String,
    /// Absolute path in the VM.
    pub to: String,
    pub mode: u32,
}

/// Where a step's results go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Step(usize),
    /// By the `route` of the result.
    Routes(BTreeMap<String, usize>),
    /// The item is finished with this word.
    Outcome(String),
}

impl Next {
    /// The steps that may come next; one may be named twice.
    pub fn steps(&self) -> impl Iterator<Item = usize> + '_ {
        let (one, routes) = match self {
            Next::Step(step) => (Some(*step), None),
            Next::Routes(routes) => (None, Some(routes)),
            Next::Outcome(_) => (None, None),
        };
        one.into_iter().chain(routes.into_iter().flat_map(|routes| routes.values().copied()))
    }
}

impl Graph {
    /// Puts checked steps together. `order` holds every step after all steps that lead to it.
    pub(super) fn new(spec: &PipelineSpec, steps: Vec<Step>, order: &[usize]) -> Self {
        let mut before = vec![0u64; steps.len()];
        for (index, step) in steps.iter().enumerate() {
            for next in step.next.steps() {
                before[next] |= 1 << index;
            }
        }
        let mut above = vec![0u64; steps.len()];
        for &index in order {
            above[index] |= 1 << index;
            for next in steps[index].next.steps() {
                above[next] |= above[index];
            }
        }
        Self {
            name: spec.name.clone(),
            steps,
            first: order.first().copied().unwrap_or(0),
            payload_budget: spec.payload_budget.bytes(),
            before,
            above,
        }
    }

    pub fn first_step(&self) -> &Step {
        &self.steps[self.first]
    }

    /// VMs of all steps together, when all run.
    pub fn vms(&self) -> u32 {
        self.steps.iter().map(|step| step.vms).sum()
    }
}
