//! Random events against a run, beside a small model of what may happen; then an executor that
//! always answers must bring the run to its end.

use std::collections::{BTreeMap, BTreeSet};

use burgeon_api::{document::Document, pipeline::RunState};
use burgeon_plan::pipeline::{Action, Event, FAILED, Graph, ItemResult, Next, Run, StepVm, read};
use proptest::prelude::*;

/// A VM as the executor has it.
#[derive(Debug, Default)]
struct Vm {
    ready: bool,
    name: String,
    holds: BTreeMap<u64, u32>,
}

#[derive(Debug, Default)]
struct Item {
    step: usize,
    attempt: u32,
    /// Everything bad that happened to the item at this step: no more can have been charged.
    misfortunes: u32,
    /// The command itself failed it.
    condemned: bool,
    in_vm: Option<StepVm>,
    finished: bool,
    size: u64,
    /// Bytes in memory for it.
    weight: u64,
}

struct World {
    run: Run,
    now_ms: u64,
    vms: BTreeMap<StepVm, Vm>,
    names: BTreeSet<String>,
    items: BTreeMap<u64, Item>,
    next_item: u64,
    listed: bool,
    /// For each step, failed starts and losses since its last result.
    in_a_row: Vec<u32>,
    over: Option<RunState>,
    failure_is_due: bool,
    /// Of the result that was told last.
    told_size: u64,
}

impl World {
    fn new(graph: Graph) -> Self {
        Self {
            in_a_row: vec![0; graph.steps.len()],
            run: Run::new(graph, "0badcafe", 1),
            now_ms: 0,
            vms: BTreeMap::new(),
            names: BTreeSet::new(),
            items: BTreeMap::new(),
            next_item: 0,
            listed: false,
            over: None,
            failure_is_due: false,
            told_size: 0,
        }
    }

    fn with_budget(mut graph: Graph, bytes: u64) -> Self {
        graph.payload_budget = bytes;
        Self::new(graph)
    }

    fn weight(&self) -> u64 {
        self.items.values().map(|item| item.weight).sum()
    }

    fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.run.handle(self.now_ms, event, &mut actions);
        for action in actions {
            self.check(action);
        }
        let view = self.run.view();
        for (index, step) in self.run.graph().steps.iter().enumerate() {
            assert!(view[index].vms_ready <= view[index].vms_wanted && view[index].vms_wanted <= step.vms);
            let own = u64::from(step.window * step.vms);
            let before: u64 = (self.run.graph().steps.iter())
                .filter(|before| before.next.steps().any(|next| next == index))
                .map(|before| u64::from(before.window * before.vms))
                .sum();
            let most = if index == self.run.graph().first { u64::MAX } else { 4 * own + own + before };
            assert!(view[index].waiting <= most, "queue of {}: {}", step.name, view[index].waiting);
        }
        let unfinished = self.items.values().filter(|item| !item.finished).count();
        if self.over.is_none() {
            assert_eq!(self.weight(), self.run.held_bytes());
            assert_eq!(unfinished, self.run.unfinished());
            let held: usize = self.vms.values().map(|vm| vm.holds.len()).sum();
            assert_eq!(held as u64, view.iter().map(|step| step.running).sum::<u64>());
            assert_eq!(unfinished as u64, view.iter().map(|step| step.running + step.waiting).sum::<u64>());
        }
    }

    fn check(&mut self, action: Action) {
        assert!(self.over.is_none(), "{action:?} after the end");
        match action {
            Action::StartVm { vm, name } => {
                burgeon_api::name::check("vm", &name).unwrap();
                assert!(self.names.insert(name.clone()), "{name} twice");
                assert!((1..=self.run.graph().steps[vm.step].vms).contains(&vm.ordinal));
                let same_place = |other: &StepVm| (other.step, other.ordinal) == (vm.step, vm.ordinal);
                assert!(!self.vms.keys().any(same_place), "two VMs in one place");
                self.vms.insert(vm, Vm { name, ..Vm::default() });
            }
            Action::StopVm { vm } => {
                let gone = self.vms.remove(&vm).expect("a VM that was started and not stopped");
                for item in gone.holds.keys() {
                    let item = self.items.get_mut(item).unwrap();
                    item.in_vm = None;
                    item.misfortunes += 1;
                }
            }
            Action::Dispatch { vm, item, step, attempt } => {
                let window = self.run.graph().steps[step].window as usize;
                if step == self.run.graph().first {
                    let (held, size) = (self.weight(), self.items[&item].size);
                    assert!(held == 0 || held + size <= self.run.graph().payload_budget, "{held} and {size} bytes");
                    self.items.get_mut(&item).unwrap().weight = size;
                }
                let to = self.vms.get_mut(&vm).unwrap();
                assert!(to.ready && vm.step == step && to.holds.len() < window);
                let model = self.items.get_mut(&item).unwrap();
                assert!(!model.finished && model.in_vm.is_none());
                assert_eq!((model.step, model.attempt + 1), (step, attempt));
                model.attempt = attempt;
                model.in_vm = Some(vm);
                assert!(to.holds.insert(item, attempt).is_none());
            }
            Action::Retry { item, step, attempt, .. } => {
                let first = self.run.graph().first;
                let model = self.items.get_mut(&item).unwrap();
                if step == first {
                    model.weight = 0;
                }
                assert!(!model.finished && model.in_vm.is_none());
                assert_eq!((model.step, model.attempt), (step, attempt));
            }
            Action::Accept { item, step, next } => {
                let model = self.items.get_mut(&item).unwrap();
                assert_eq!(model.step, step);
                if let Some(next) = next {
                    *model = Item { step: next, size: model.size, weight: self.told_size, ..Item::default() };
                }
            }
            Action::Refuse { .. } => {}
            Action::Finish { item, outcome, reason, .. } => {
                let model = self.items.get_mut(&item).unwrap();
                model.weight = 0;
                assert!(!std::mem::replace(&mut model.finished, true), "finished twice");
                assert!(model.in_vm.is_none());
                if outcome == FAILED {
                    let attempts = self.run.graph().steps[model.step].attempts;
                    assert!(model.condemned || model.misfortunes >= attempts, "{item} failed early: {reason:?}");
                    assert!(reason.is_some());
                }
            }
            Action::Done => {
                assert!(self.listed && self.vms.is_empty() && self.items.values().all(|item| item.finished));
                self.over = Some(RunState::Done);
            }
            Action::RunFailed { reason } => {
                let steps = self.run.graph().steps.iter();
                let broken = steps.zip(&self.in_a_row).any(|(step, in_a_row)| *in_a_row > 3 * step.vms + 3);
                assert!(broken || self.failure_is_due, "{reason}");
                assert!(self.vms.is_empty());
                self.over = Some(RunState::Failed);
            }
            Action::Cancelled => {
                assert!(self.vms.is_empty());
                self.over = Some(RunState::Cancelled);
            }
        }
    }

    fn result(&mut self, vm: StepVm, item: u64, attempt: u32, fault: u16) {
        let expected = self.run.check(vm, item, attempt).is_ok();
        let held = self.vms.get(&vm).and_then(|vm| vm.holds.get(&item)) == Some(&attempt);
        assert_eq!(expected, held, "only what a VM holds counts");
        let told_vm = self.vms.get(&vm).map_or("nobody".into(), |vm| vm.name.clone());
        let mut result = ItemResult {
            vm,
            item,
            attempt,
            route: None,
            reason: None,
            error: None,
            size: u64::from(fault / 16 % 8),
            worked_us: u64::from(fault),
            told_vm,
        };
        if let Next::Routes(routes) = &self.run.graph().steps[vm.step].next {
            result.route = routes.keys().nth(usize::from(fault) % routes.len()).cloned();
        }
        match fault % 16 {
            0 => result.error = Some("unreadable".into()),
            1 => result.route = Some("nowhere".into()),
            2 => result.size = u64::MAX,
            3 | 4 => result.told_vm = "another".into(),
            _ => {}
        }
        let refused = self.run.refused_results();
        if held {
            self.vms.get_mut(&vm).unwrap().holds.remove(&item);
            let model = self.items.get_mut(&item).unwrap();
            model.in_vm = None;
            match fault % 16 {
                0..=2 => model.condemned = true,
                3 | 4 => model.misfortunes += 1,
                _ => {}
            }
            if !matches!(fault % 16, 3 | 4) {
                self.in_a_row[vm.step] = 0;
            }
        }
        self.told_size = result.size;
        self.tell(Event::Result(result));
        if self.over.is_none() {
            assert_eq!(self.run.refused_results() > refused, !held || matches!(fault % 16, 3 | 4));
        }
    }

    fn any_vm(&self, pick: u16) -> Option<StepVm> {
        self.vms.keys().nth(usize::from(pick) % self.vms.len().max(1)).copied()
    }

    fn any_held(&self, pick: u16) -> Option<(StepVm, u64, u32)> {
        let held =
            self.vms.iter().flat_map(|(vm, state)| state.holds.iter().map(|(item, attempt)| (*vm, *item, *attempt)));
        let count = held.clone().count();
        held.into_iter().nth(usize::from(pick) % count.max(1))
    }

    fn step(&mut self, what: u8, pick: u16) {
        if self.over.is_some() {
            return;
        }
        self.now_ms += u64::from(pick % 7);
        match what {
            0..=9 if !self.listed => {
                let item = self.next_item;
                self.next_item += 1 + u64::from(pick % 3);
                if pick.is_multiple_of(20) {
                    self.items.insert(item, Item { condemned: true, ..Item::default() });
                    self.tell(Event::ItemRefused { item, reason: "unreadable".into() });
                } else if pick % 20 == 1 {
                    self.tell(Event::Restored { item, outcome: "ok".into() });
                } else {
                    let size = u64::from(pick / 20 % 9);
                    self.items.insert(item, Item { step: self.run.graph().first, size, ..Item::default() });
                    self.tell(Event::ItemFound { item, size });
                }
            }
            0..=13 => self.answer_one_start(pick),
            14..=30 => {
                if let Some((vm, item, attempt)) = self.any_held(pick) {
                    self.result(vm, item, attempt, pick);
                }
            }
            31 => {
                // Something stale or made up.
                if let (Some(vm), Some((_, item, attempt))) = (self.any_vm(pick), self.any_held(pick / 3)) {
                    self.result(vm, item, attempt.saturating_sub(u32::from(pick % 2)), pick);
                    let old = StepVm { generation: vm.generation.saturating_sub(1), ..vm };
                    self.result(old, item, attempt, pick);
                }
            }
            32 => {
                if let Some(vm) = self.any_vm(pick) {
                    self.in_a_row[vm.step] += 1;
                    let reason = "kernel panic".to_string();
                    let started = self.vms[&vm].ready;
                    self.tell(if started {
                        Event::WorkerLost { vm, reason }
                    } else {
                        Event::WorkerFailedToStart { vm, reason }
                    });
                }
            }
            33 => {
                if let Some((vm, item, attempt)) = self.any_held(pick) {
                    self.vms.get_mut(&vm).unwrap().holds.remove(&item);
                    let model = self.items.get_mut(&item).unwrap();
                    model.in_vm = None;
                    model.misfortunes += 1;
                    self.tell(Event::TryFailed { vm, item, attempt, reason: "code 1".into() });
                }
            }
            34 => {
                self.now_ms += u64::from(pick % 1500);
                // Whatever is overdue is lost.
                self.in_a_row.iter_mut().for_each(|in_a_row| *in_a_row += 64);
                self.tell(Event::Tick);
                if self.over.is_none() {
                    self.in_a_row.iter_mut().for_each(|in_a_row| *in_a_row -= 63);
                }
            }
            35 => {
                self.now_ms = self.run.wake_at().unwrap_or(self.now_ms).max(self.now_ms);
                self.tell(Event::Tick);
            }
            36 if pick.is_multiple_of(50) => {
                self.failure_is_due = true;
                self.tell(if pick.is_multiple_of(100) {
                    Event::Cancel
                } else {
                    Event::Fail { reason: "disk full".into() }
                });
            }
            37 if pick.is_multiple_of(8) => {
                self.listed = true;
                self.tell(Event::Listed);
            }
            _ => {}
        }
    }

    fn answer_one_start(&mut self, pick: u16) {
        let starting: Vec<StepVm> = self.vms.iter().filter(|(_, vm)| !vm.ready).map(|(vm, _)| *vm).collect();
        if let Some(vm) = starting.get(usize::from(pick) % starting.len().max(1)).copied() {
            self.vms.get_mut(&vm).unwrap().ready = true;
            self.tell(Event::WorkerReady { vm });
        }
    }

    /// Answers everything until the run is over.
    fn drain(&mut self) {
        if self.over.is_none() && !self.listed {
            self.listed = true;
            self.tell(Event::Listed);
        }
        for round in 0.. {
            if self.over.is_some() {
                return;
            }
            assert!(round < 20_000, "stuck: {:?}", self.run.view());
            self.now_ms += 1;
            if self.vms.values().any(|vm| !vm.ready) {
                self.answer_one_start(0);
            } else if let Some((vm, item, attempt)) = self.any_held(0) {
                self.result(vm, item, attempt, u16::try_from(item % 11).unwrap() + 5);
            } else {
                self.now_ms = self.run.wake_at().expect("something to wait for").max(self.now_ms);
                self.tell(Event::Tick);
            }
        }
    }
}

fn graph(shape: u8, vms: [u32; 4], windows: [u32; 4], attempts: u32) -> Graph {
    let wiring: &[(&str, &str)] = match shape {
        0 => &[("a", "outcome = 'ok'")],
        1 => &[("a", "to = 'b'"), ("b", "to = 'c'"), ("c", "outcome = 'ok'")],
        2 => &[
            ("d", "outcome = 'ok'"),
            ("a", "routes = { x = 'b', y = 'c', z = 'd' }"),
            ("b", "to = 'd'"),
            ("c", "outcome = 'other'"),
        ],
        _ => &[
            ("a", "routes = { x = 'b', y = 'c' }"),
            ("b", "routes = { x = 'c', y = 'd' }"),
            ("c", "to = 'd'"),
            ("d", "outcome = 'ok'"),
        ],
    };
    let mut text = "format = 1\nname = 'p'\nimage = 'i'\n".to_string();
    for (index, (name, next)) in wiring.iter().enumerate() {
        let (vms, window) = (vms[index], windows[index]);
        text.push_str(&format!(
            "[[step]]\nname = '{name}'\ncommand = ['c']\ntime_limit = '1s'\n\
             vms = {vms}\nwindow = {window}\nattempts = {attempts}\n{next}\n"
        ));
    }
    read(&Document::new("p.toml", text)).unwrap().1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_item_is_finished_once_and_every_vm_stopped(
        shape in 0u8..4,
        vms in prop::array::uniform4(1u32..4),
        windows in prop::array::uniform4(1u32..5),
        attempts in 1u32..5,
        budget in 0u64..30,
        events in prop::collection::vec((0u8..38, any::<u16>()), 0..400),
    ) {
        let mut world = World::with_budget(graph(shape, vms, windows, attempts), budget);
        for (what, pick) in events {
            world.step(what, pick);
        }
        world.drain();
        prop_assert_eq!(Some(world.run.state()), world.over);
        prop_assert!(world.vms.is_empty());
    }

    /// Without losses no run fails, and every item comes through.
    #[test]
    fn an_executor_that_answers_reaches_the_end(
        shape in 0u8..4,
        vms in prop::array::uniform4(1u32..4),
        windows in prop::array::uniform4(1u32..5),
        files in 0u64..200,
        budget in 0u64..30,
    ) {
        let mut world = World::with_budget(graph(shape, vms, windows, 1), budget);
        for item in 0..files {
            let size = item % 11;
            world.items.insert(item, Item { step: world.run.graph().first, size, ..Item::default() });
            world.tell(Event::ItemFound { item, size });
        }
        world.drain();
        prop_assert_eq!(world.over, Some(RunState::Done));
        prop_assert_eq!(world.run.outcomes().get(FAILED), None);
        prop_assert_eq!(world.run.outcomes().values().sum::<u64>(), files);
    }
}

/// One poison file among many, with large windows: it alone fails, and no neighbour is charged more than once.
#[test]
fn a_poison_file_fails_alone() {
    let mut world = World::new(graph(0, [2; 4], [16; 4], 3));
    for item in 0..100 {
        world.items.insert(item, Item { step: 0, size: 1, ..Item::default() });
        world.tell(Event::ItemFound { item, size: 1 });
    }
    world.listed = true;
    world.tell(Event::Listed);
    while world.over.is_none() {
        world.now_ms += 1;
        if world.vms.values().any(|vm| !vm.ready) {
            world.answer_one_start(0);
        } else if let Some((vm, ..)) = world.any_held(u16::MAX).filter(|(_, item, _)| *item == 37).or_else(|| {
            let held = world.vms.iter().find(|(_, vm)| vm.holds.contains_key(&37));
            held.map(|(vm, _)| (*vm, 37, 0))
        }) {
            world.tell(Event::WorkerLost { vm, reason: "kernel panic".into() });
        } else if let Some((vm, item, attempt)) = world.any_held(0) {
            world.result(vm, item, attempt, 5);
        } else {
            world.now_ms = world.run.wake_at().unwrap();
            world.tell(Event::Tick);
        }
    }
    assert_eq!(world.over, Some(RunState::Done));
    assert_eq!(world.run.outcomes().get(FAILED), Some(&1));
    assert_eq!(world.run.outcomes().get("ok"), Some(&99));
}

/// The cost of an event does not grow with the run: 200,000 items take about as long each as 1,000 do.
#[test]
fn a_large_run_is_no_harder_than_a_small_one() {
    let mut run = Run::new(graph(1, [4; 4], [8; 4], 3), "0badcafe", 1);
    let mut actions = Vec::new();
    for item in 0..200_000 {
        run.handle(0, Event::ItemFound { item, size: 1 }, &mut actions);
    }
    run.handle(0, Event::Listed, &mut actions);
    let mut finished = 0u64;
    let mut at = 0;
    while at < actions.len() {
        let action = actions[at].clone();
        at += 1;
        match action {
            Action::StartVm { vm, .. } => run.handle(1, Event::WorkerReady { vm }, &mut actions),
            Action::Dispatch { vm, item, attempt, .. } => {
                let told_vm = run.vm_name(vm);
                let (route, reason, error) = (None, None, None);
                let result = ItemResult { vm, item, attempt, route, reason, error, size: 0, worked_us: 0, told_vm };
                run.handle(2, Event::Result(result), &mut actions);
            }
            Action::Finish { .. } => finished += 1,
            _ => {}
        }
    }
    assert_eq!((finished, run.state()), (200_000, RunState::Done));
}
