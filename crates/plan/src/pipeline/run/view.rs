//! What is known of a run: states, counts, times.

use std::collections::BTreeMap;

use burgeon_api::pipeline::{RunState, StepView, Times};

use super::{
    super::{
        event::{StepVm, vm_name},
        graph::Graph,
        step::StepState,
    },
    Run,
};

impl Run {
    /// Bytes of files and payloads that the shell keeps in memory for this run.
    pub fn held_bytes(&self) -> u64 {
        self.budget.held()
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The name of a VM of this run, alive or not.
    pub fn vm_name(&self, vm: StepVm) -> String {
        let step = self.graph.steps.get(vm.step).map_or("", |step| step.name.as_str());
        vm_name(&self.short, self.life, step, vm.ordinal, vm.generation)
    }

    pub fn state(&self) -> RunState {
        self.over.unwrap_or(if self.last_ready_ms.is_some() { RunState::Running } else { RunState::Preparing })
    }

    /// Counts of each step, in the order of the file.
    pub fn view(&self) -> Vec<StepView> {
        self.steps.iter().map(StepState::view).collect()
    }

    /// Finished items by outcome, those of earlier lives among them.
    pub fn outcomes(&self) -> &BTreeMap<String, u64> {
        &self.outcomes
    }

    /// Items found, refused and restored so far.
    pub fn files(&self) -> u64 {
        self.files
    }

    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// Items that are not finished.
    pub fn unfinished(&self) -> usize {
        self.items.len()
    }

    /// Results that were refused.
    pub fn refused_results(&self) -> u64 {
        self.refused_results
    }

    /// `start_ms`, `transfer_ms` and `work_ms`; `image_ms` and `total_ms` are the shell's to add.
    pub fn times(&self) -> Times {
        let start = self.first_start_ms.zip(self.last_ready_ms);
        Times {
            start_ms: start.map_or(0, |(first, last)| last.saturating_sub(first)),
            transfer_ms: self.transfer_us / 1000,
            work_ms: self.work_us / 1000,
            ..Times::default()
        }
    }

    /// When the next [`Event::Tick`](super::super::Event::Tick) is due at the latest; `None` where nothing waits for time.
    pub fn wake_at(&self) -> Option<u64> {
        if self.over.is_some() {
            return None;
        }
        let deadlines = (0..self.steps.len())
            .flat_map(|step| (0..self.steps[step].slots.len()).filter_map(move |slot| self.deadline(step, slot)));
        deadlines.chain(self.rest_over_ms).min()
    }
}
