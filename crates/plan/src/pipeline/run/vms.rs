//! The VMs of a run: started as items come, given up, replaced, stopped.

use burgeon_api::TimeSpan;

use super::{
    super::{
        event::{Action, StepVm},
        step::SlotState,
    },
    Run, bits,
};

/// The longest rest before a VM is replaced.
const MOST_REST_MS: u64 = 5_000;

/// Why a VM leaves while it is still needed.
#[derive(Clone, Copy)]
enum Loss<'a> {
    Gone(&'a str),
    TimeLimit,
}

impl Run {
    pub(super) fn vm_at(&self, step: usize, slot: usize) -> StepVm {
        let generation = self.steps[step].slots[slot].generation;
        StepVm { step, ordinal: u32::try_from(slot).unwrap_or(u32::MAX - 1) + 1, generation }
    }

    /// The slot of a VM that was started and not stopped.
    fn slot_of(&self, vm: StepVm) -> Option<usize> {
        let slot = (vm.ordinal as usize).checked_sub(1)?;
        let found = self.steps.get(vm.step)?.slots.get(slot)?;
        (found.generation == vm.generation && found.state != SlotState::Empty).then_some(slot)
    }

    /// Items that are at the step or before it.
    fn reach(&self, step: usize) -> usize {
        bits(self.graph.above[step]).map(|above| self.steps[above].waiting() + self.steps[above].running()).sum()
    }

    /// Starts VMs until the step has as many as it may, or as there are items for it. VMs that rest count.
    pub(super) fn start_vms(&mut self, step: usize, actions: &mut Vec<Action>) {
        if self.closed & 1 << step != 0 {
            return;
        }
        let want = self.reach(step).min(self.steps[step].slots.len());
        let mut have = self.steps[step].slots.iter().filter(|slot| slot.state != SlotState::Empty).count();
        for index in 0..self.steps[step].slots.len() {
            if have >= want {
                break;
            }
            let slot = &mut self.steps[step].slots[index];
            if slot.state != SlotState::Empty {
                continue;
            }
            have += 1;
            if slot.rest_until_ms > self.now_ms {
                continue;
            }
            slot.state = SlotState::Starting;
            slot.generation += 1;
            let vm = self.vm_at(step, index);
            let name = self.vm_name(vm);
            self.steps[step].slots[index].name.clone_from(&name);
            self.first_start_ms.get_or_insert(self.now_ms);
            actions.push(Action::StartVm { vm, name });
        }
        let state = &mut self.steps[step];
        state.counts.vms_wanted = state.counts.vms_wanted.max(u32::try_from(want).unwrap_or(u32::MAX));
        if state.slots.iter().all(|slot| slot.state != SlotState::Empty) {
            self.lacking &= !(1 << step);
        } else {
            self.lacking |= 1 << step;
        }
    }

    pub(super) fn worker_ready(&mut self, vm: StepVm) {
        let Some(slot) = self.slot_of(vm) else { return };
        let slot = &mut self.steps[vm.step].slots[slot];
        if slot.state == SlotState::Starting {
            slot.state = SlotState::Ready;
            self.dirty |= 1 << vm.step;
            if vm.generation == 1 {
                self.last_ready_ms = Some(self.now_ms);
            }
        }
    }

    pub(super) fn worker_gone(&mut self, vm: StepVm, reason: &str, actions: &mut Vec<Action>) {
        let Some(slot) = self.slot_of(vm) else { return };
        self.lose(vm, slot, Loss::Gone(reason), actions);
    }

    /// Gives up a VM, and replaces it if the step is not broken.
    fn lose(&mut self, vm: StepVm, slot: usize, loss: Loss<'_>, actions: &mut Vec<Action>) {
        let step = &self.graph.steps[vm.step];
        let state = &mut self.steps[vm.step];
        let was_ready = state.slots[slot].state == SlotState::Ready;
        let idle = state.slots[slot].flights.is_empty();
        state.counts.vms_lost += u32::from(was_ready);
        state.misfortunes += u32::from(idle);
        state.early_losses += u32::from(!idle && !state.proven);
        let in_a_row = state.misfortunes + if state.proven { 0 } else { state.early_losses };
        let rest_ms = if in_a_row < 2 { 0 } else { (100 << (in_a_row - 1).min(6)).min(MOST_REST_MS) };
        let name = state.slots[slot].name.clone();
        let rest_until_ms = self.now_ms + rest_ms;
        let mut items = state.lost(slot, rest_until_ms);
        if rest_ms > 0 {
            self.rest_over_ms = Some(self.rest_over_ms.map_or(rest_until_ms, |over| over.min(rest_until_ms)));
        }
        actions.push(Action::StopVm { vm });

        let (reason, neighbours) = match loss {
            Loss::Gone(reason) => (format!("VM \"{name}\" was lost: {reason}"), true),
            Loss::TimeLimit => (format!("VM \"{name}\" gave no result within {}", TimeSpan(step.time_limit)), false),
        };
        let replacements = 3 * step.vms + 3;
        let broken = if state.misfortunes > replacements {
            let what = if was_ready { "was lost" } else { "failed to start" };
            let last = if let Loss::Gone(reason) = loss { reason } else { &reason };
            Some(format!(
                "step \"{}\" gave up after {} VMs that did not start or were lost idle; the last, \"{name}\", {what}: {last}",
                step.name, state.misfortunes
            ))
        } else if !state.proven && state.early_losses > replacements + 4 * step.attempts {
            Some(format!(
                "step \"{}\" gave up: it lost {} VMs before its first result; the last: {reason}",
                step.name, state.early_losses
            ))
        } else {
            None
        };
        let oldest = items.first().copied();
        if !neighbours {
            // They go to the front of the queue, so the last comes first.
            items.reverse();
        }
        for item in items {
            let is_oldest = Some(item) == oldest;
            self.try_again(item, is_oldest, is_oldest || neighbours, &reason, actions);
        }
        match broken {
            Some(reason) => self.fail(reason, actions),
            None => self.start_vms(vm.step, actions),
        }
    }

    pub(super) fn tick(&mut self, actions: &mut Vec<Action>) {
        for step in 0..self.steps.len() {
            for slot in 0..self.steps[step].slots.len() {
                if self.deadline(step, slot).is_some_and(|deadline| deadline <= self.now_ms) {
                    self.lose(self.vm_at(step, slot), slot, Loss::TimeLimit, actions);
                    if self.over.is_some() {
                        return;
                    }
                }
            }
        }
    }

    /// Starts the VMs whose rest is over.
    pub(super) fn end_rests(&mut self, actions: &mut Vec<Action>) {
        if self.rest_over_ms.is_none_or(|over| over > self.now_ms) {
            return;
        }
        for step in bits(self.lacking) {
            self.start_vms(step, actions);
        }
        self.rest_over_ms = bits(self.lacking)
            .flat_map(|step| &self.steps[step].slots)
            .filter(|slot| slot.state == SlotState::Empty && slot.rest_until_ms > self.now_ms)
            .map(|slot| slot.rest_until_ms)
            .min();
    }

    pub(super) fn deadline(&self, step: usize, slot: usize) -> Option<u64> {
        let slot = &self.steps[step].slots[slot];
        let limit = u64::try_from(self.graph.steps[step].time_limit.as_millis()).unwrap_or(u64::MAX);
        (!slot.flights.is_empty()).then(|| slot.oldest_since_ms.saturating_add(limit))
    }

    pub(super) fn stop_vms(&mut self, step: usize, actions: &mut Vec<Action>) {
        for slot in 0..self.steps[step].slots.len() {
            if self.steps[step].slots[slot].state != SlotState::Empty {
                self.steps[step].lost(slot, 0);
                actions.push(Action::StopVm { vm: self.vm_at(step, slot) });
            }
        }
    }
}
