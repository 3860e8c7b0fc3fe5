//! One run of a pipeline, move by move. States and rules: see the [module above](super).
//!
//! An event costs a look at the VMs of the steps it touches (at most 64 each) and a search in a map
//! of the unfinished items; finished items leave nothing behind.

mod view;
mod vms;

use std::collections::BTreeMap;

use burgeon_api::{
    ByteSize,
    pipeline::{RunState, WorkedBy},
};

use super::{
    budget::Budget,
    event::{Action, Event, ItemResult, Refusal, StepVm},
    graph::{FAILED, Graph, Next},
    step::StepState,
};

/// An item that is not finished.
#[derive(Debug)]
struct Item {
    step: usize,
    /// Bytes of its file.
    size: u64,
    /// Bytes that are in memory for it.
    weight: u64,
    /// Attempt number of the last dispatch at this step; 0 before the first.
    attempt: u32,
    /// Tries charged at this step.
    charged: u32,
    /// The highest attempt number at any step.
    most_attempt: u32,
    /// The last reason that a step gave.
    reason: Option<String>,
    worked: Vec<(StepVm, u32)>,
    /// The VM that has it.
    at: Option<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    slot: usize,
    flight: u64,
    since_ms: u64,
}

/// The state machine of one run.
#[derive(Debug)]
pub struct Run {
    graph: Graph,
    short: String,
    life: u16,
    now_ms: u64,
    /// Unfinished items.
    items: BTreeMap<u64, Item>,
    /// Item numbers below are taken.
    next_item: u64,
    listed: bool,
    files: u64,
    outcomes: BTreeMap<String, u64>,
    refused_results: u64,
    budget: Budget,
    steps: Vec<StepState>,
    /// Sets of steps: with items; with fewer VMs than they may have; without a future; to be looked at for dispatch.
    occupied: u64,
    lacking: u64,
    closed: u64,
    dirty: u64,
    /// When the first rest of an empty slot is over.
    rest_over_ms: Option<u64>,
    first_start_ms: Option<u64>,
    last_ready_ms: Option<u64>,
    transfer_us: u64,
    work_us: u64,
    over: Option<RunState>,
}

impl Run {
    /// A run that has found nothing yet. `short` is the run's id in short, as for [`vm_name`](super::vm_name); `life`
    /// counts the control processes that have led this run, from 1.
    pub fn new(graph: Graph, short: impl Into<String>, life: u16) -> Self {
        let steps: Vec<StepState> =
            graph.steps.iter().map(|step| StepState::new(&step.name, step.vms, step.window)).collect();
        Self {
            budget: Budget::new(graph.payload_budget),
            lacking: (0..steps.len()).fold(0, |set, step| set | 1 << step),
            graph,
            short: short.into(),
            life,
            now_ms: 0,
            items: BTreeMap::new(),
            next_item: 0,
            listed: false,
            files: 0,
            outcomes: BTreeMap::new(),
            refused_results: 0,
            steps,
            occupied: 0,
            closed: 0,
            dirty: 0,
            rest_over_ms: None,
            first_start_ms: None,
            last_ready_ms: None,
            transfer_us: 0,
            work_us: 0,
            over: None,
        }
    }

    /// Takes in what happened `now_ms` milliseconds after the run began, and adds what is to be done.
    /// After the last action ([`Action::Done`], [`Action::RunFailed`], [`Action::Cancelled`]) nothing comes any more.
    pub fn handle(&mut self, now_ms: u64, event: Event, actions: &mut Vec<Action>) {
        if self.over.is_some() {
            return;
        }
        self.now_ms = self.now_ms.max(now_ms);
        match event {
            Event::ItemFound { item, size } => self.item_found(item, size, actions),
            Event::ItemRefused { item, reason } => {
                if self.take_number(item) {
                    self.report(item, FAILED.to_string(), Some(reason), 0, Vec::new(), actions);
                }
            }
            Event::Restored { item, outcome } => {
                if self.take_number(item) {
                    *self.outcomes.entry(outcome).or_default() += 1;
                }
            }
            Event::Listed => self.listed = true,
            Event::WorkerReady { vm } => self.worker_ready(vm),
            Event::WorkerFailedToStart { vm, reason } | Event::WorkerLost { vm, reason } => {
                self.worker_gone(vm, &reason, actions);
            }
            Event::Result(result) => self.result(result, actions),
            Event::TryFailed { vm, item, attempt, reason } => match self.fence(vm, item, attempt) {
                Err(refusal) => self.refuse(vm, item, attempt, refusal, actions),
                Ok(place) => {
                    self.land(vm.step, item, place);
                    let reason = format!("{reason} (VM \"{}\")", self.vm_name(vm));
                    self.try_again(item, true, false, &reason, actions);
                }
            },
            Event::Tick => self.tick(actions),
            Event::Cancel => {
                self.end(RunState::Cancelled, actions);
                actions.push(Action::Cancelled);
            }
            Event::Fail { reason } => self.fail(reason, actions),
        }
        self.settle(actions);
    }

    // ---- items -------------------------------------------------------------------------------

    fn take_number(&mut self, item: u64) -> bool {
        if self.listed || item < self.next_item {
            return false;
        }
        self.next_item = item + 1;
        self.files += 1;
        true
    }

    fn item_found(&mut self, item: u64, size: u64, actions: &mut Vec<Action>) {
        if !self.take_number(item) {
            return;
        }
        let limit = self.graph.first_step().payload_limit;
        if size > limit {
            let reason = format!("{} is more than the {} taken from a file", ByteSize(size), ByteSize(limit));
            self.report(item, FAILED.to_string(), Some(reason), 0, Vec::new(), actions);
            return;
        }
        let new = Item {
            step: self.graph.first,
            size,
            weight: 0,
            attempt: 0,
            charged: 0,
            most_attempt: 0,
            reason: None,
            worked: Vec::new(),
            at: None,
        };
        self.items.insert(item, new);
        self.enter(item, self.graph.first);
        for step in bits(self.lacking) {
            self.start_vms(step, actions);
        }
    }

    fn enter(&mut self, id: u64, step: usize) {
        self.steps[step].counts.items_in += 1;
        self.steps[step].queue(id);
        self.occupied |= 1 << step;
        self.dirty |= 1 << step;
    }

    /// Takes down what is in memory for an item. Less of it may make room for files.
    fn weigh(&mut self, id: u64, weight: u64) {
        let Some(item) = self.items.get_mut(&id) else { return };
        let before = std::mem::replace(&mut item.weight, weight);
        if self.budget.change(before, weight) {
            self.dirty |= 1 << self.graph.first;
        }
    }

    fn left(&mut self, step: usize) {
        let state = &self.steps[step];
        if state.waiting() == 0 && state.running() == 0 {
            self.occupied &= !(1 << step);
        }
    }

    /// Takes the item out of its VM, which stays.
    fn land(&mut self, step: usize, id: u64, place: Place) {
        self.steps[step].land(place.slot, place.flight, self.now_ms);
        self.dirty |= 1 << step;
        if let Some(item) = self.items.get_mut(&id) {
            item.at = None;
        }
    }

    /// Queues an item that left its VM without a result, or gives it up.
    fn try_again(&mut self, id: u64, charged: bool, suspect: bool, reason: &str, actions: &mut Vec<Action>) {
        let Some(item) = self.items.get_mut(&id) else { return };
        let (step, attempt) = (item.step, item.attempt);
        let most = self.graph.steps[step].attempts;
        item.at = None;
        // A file is read anew for the next try; a payload is kept.
        let weight = if step == self.graph.first { 0 } else { item.weight };
        item.charged += u32::from(charged);
        if item.charged >= most {
            let reason = format!("{reason}; tried {most} {}", if most == 1 { "time" } else { "times" });
            self.finish(id, None, Some(reason), actions);
            return;
        }
        self.weigh(id, weight);
        self.steps[step].queue_again(id, suspect);
        self.occupied |= 1 << step;
        self.dirty |= 1 << step;
        actions.push(Action::Retry { item: id, step, attempt, charged, reason: reason.to_string() });
    }

    /// Finishes an item that is in no queue and no VM; without an outcome it failed.
    fn finish(&mut self, id: u64, outcome: Option<String>, reason: Option<String>, actions: &mut Vec<Action>) {
        self.weigh(id, 0);
        let Some(item) = self.items.remove(&id) else { return };
        let counts = &mut self.steps[item.step].counts;
        if outcome.is_some() {
            counts.done += 1;
        } else {
            counts.failed += 1;
        }
        let vms = item
            .worked
            .iter()
            .map(|&(vm, attempt)| WorkedBy {
                step: self.graph.steps[vm.step].name.clone(),
                vm: self.vm_name(vm),
                attempt,
            })
            .collect();
        self.left(item.step);
        let outcome = outcome.unwrap_or_else(|| FAILED.to_string());
        self.report(id, outcome, reason.or(item.reason), item.most_attempt, vms, actions);
    }

    fn report(
        &mut self,
        item: u64,
        outcome: String,
        reason: Option<String>,
        attempt: u32,
        vms: Vec<WorkedBy>,
        actions: &mut Vec<Action>,
    ) {
        *self.outcomes.entry(outcome.clone()).or_default() += 1;
        actions.push(Action::Finish { item, outcome, reason, attempt, vms });
    }

    // ---- results -----------------------------------------------------------------------------

    /// Whether a result with these marks would count now. The shell may ask before it reads a payload.
    ///
    /// # Errors
    /// Why it would not.
    pub fn check(&self, vm: StepVm, item: u64, attempt: u32) -> Result<(), Refusal> {
        self.fence(vm, item, attempt).map(drop)
    }

    fn fence(&self, vm: StepVm, id: u64, attempt: u32) -> Result<Place, Refusal> {
        let item = self.items.get(&id).ok_or(Refusal::NoSuchItem)?;
        let place = item.at.ok_or(Refusal::NotGiven)?;
        let given = self.vm_at(item.step, place.slot);
        if given != vm {
            return Err(Refusal::OtherVm { given_to: self.vm_name(given) });
        }
        if item.attempt != attempt {
            return Err(Refusal::OtherAttempt { current: item.attempt });
        }
        Ok(place)
    }

    fn refuse(&mut self, vm: StepVm, item: u64, attempt: u32, refusal: Refusal, actions: &mut Vec<Action>) {
        self.refused_results += 1;
        actions.push(Action::Refuse { vm, item, attempt, refusal });
    }

    fn result(&mut self, result: ItemResult, actions: &mut Vec<Action>) {
        let ItemResult { vm, item: id, attempt, .. } = result;
        let place = match self.fence(vm, id, attempt) {
            Ok(place) => place,
            Err(refusal) => return self.refuse(vm, id, attempt, refusal, actions),
        };
        self.land(vm.step, id, place);
        let expected = &self.steps[vm.step].slots[place.slot].name;
        if *expected != result.told_vm {
            let refusal = Refusal::NotItself { expected: expected.clone(), told: result.told_vm };
            let reason = refusal.to_string();
            self.refuse(vm, id, attempt, refusal, actions);
            return self.try_again(id, true, false, &reason, actions);
        }
        let state = &mut self.steps[vm.step];
        state.proven = true;
        state.misfortunes = 0;
        let elapsed_us = (self.now_ms - place.since_ms).saturating_mul(1000);
        let worked_us = result.worked_us.min(elapsed_us);
        self.work_us += worked_us;
        self.transfer_us += elapsed_us - worked_us;
        let Some(item) = self.items.get_mut(&id) else { return };
        item.worked.push((vm, attempt));
        item.reason = result.reason.or(item.reason.take());

        let step = &self.graph.steps[vm.step];
        let verdict = if let Some(error) = result.error {
            Err(error)
        } else if result.size > step.payload_limit {
            let limit = ByteSize(step.payload_limit);
            Err(format!("the result of step \"{}\" has {}, its limit is {limit}", step.name, ByteSize(result.size)))
        } else {
            follow(&step.name, &step.next, result.route.as_deref())
        };
        match verdict {
            Ok(Follow::Step(next)) => {
                actions.push(Action::Accept { item: id, step: vm.step, next: Some(next) });
                item.step = next;
                item.attempt = 0;
                item.charged = 0;
                self.steps[vm.step].counts.done += 1;
                self.weigh(id, result.size);
                self.enter(id, next);
                self.left(vm.step);
            }
            Ok(Follow::Outcome(outcome)) => {
                actions.push(Action::Accept { item: id, step: vm.step, next: None });
                self.finish(id, Some(outcome), None, actions);
            }
            Err(error) => {
                actions.push(Action::Accept { item: id, step: vm.step, next: None });
                self.finish(id, None, Some(error), actions);
            }
        }
    }

    // ---- after each event --------------------------------------------------------------------

    fn settle(&mut self, actions: &mut Vec<Action>) {
        if self.over.is_some() {
            return;
        }
        self.end_rests(actions);
        while self.dirty != 0 {
            // Later steps first: they make room for the earlier ones.
            let step = 63 - self.dirty.leading_zeros() as usize;
            self.dirty &= !(1 << step);
            self.dispatch(step, actions);
        }
        if !self.listed {
            return;
        }
        for step in 0..self.steps.len() {
            if self.closed & 1 << step == 0 && self.graph.above[step] & self.occupied == 0 {
                self.closed |= 1 << step;
                self.lacking &= !(1 << step);
                self.stop_vms(step, actions);
            }
        }
        if self.items.is_empty() {
            self.end(RunState::Done, actions);
            actions.push(Action::Done);
        }
    }

    fn dispatch(&mut self, step: usize, actions: &mut Vec<Action>) {
        while !self.graph.steps[step].next.steps().any(|next| self.steps[next].is_full()) {
            let (items, budget, reads) = (&self.items, &self.budget, step == self.graph.first);
            let fits = |id: u64| !reads || items.get(&id).is_none_or(|item| budget.fits(item.size));
            let Some(given) = self.steps[step].give(self.now_ms, fits) else { break };
            if given.made_room {
                self.dirty |= self.graph.before[step];
            }
            let vm = self.vm_at(step, given.slot);
            let Some(item) = self.items.get_mut(&given.item) else { continue };
            item.attempt += 1;
            item.most_attempt = item.most_attempt.max(item.attempt);
            item.at = Some(Place { slot: given.slot, flight: given.flight, since_ms: self.now_ms });
            let (attempt, size) = (item.attempt, item.size);
            if reads {
                self.weigh(given.item, size);
            }
            actions.push(Action::Dispatch { vm, item: given.item, step, attempt });
        }
    }

    fn fail(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.end(RunState::Failed, actions);
        actions.push(Action::RunFailed { reason });
    }

    fn end(&mut self, state: RunState, actions: &mut Vec<Action>) {
        for step in 0..self.steps.len() {
            self.stop_vms(step, actions);
        }
        self.over = Some(state);
    }
}

enum Follow {
    Step(usize),
    Outcome(String),
}

/// Where a result goes; or why it can go nowhere, which is a fault of the step's command.
fn follow(step: &str, next: &Next, route: Option<&str>) -> Result<Follow, String> {
    let shown = || burgeon_api::path_text::printable(route.unwrap_or_default());
    match (next, route) {
        (Next::Step(next), None) => Ok(Follow::Step(*next)),
        (Next::Outcome(outcome), None) => Ok(Follow::Outcome(outcome.clone())),
        (Next::Routes(routes), Some(name)) => routes.get(name).map(|next| Follow::Step(*next)).ok_or_else(|| {
            let known = routes.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            format!("step \"{step}\" gave the route \"{}\"; its routes are {known}", shown())
        }),
        (Next::Routes(_), None) => Err(format!("step \"{step}\" gave a result without a route")),
        (_, Some(_)) => Err(format!("step \"{step}\" gave the route \"{}\" and has no routes", shown())),
    }
}

/// The members of a set of steps, in order.
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = set.trailing_zeros();
        set &= set.wrapping_sub(1);
        (lowest < 64).then_some(lowest as usize)
    })
}
