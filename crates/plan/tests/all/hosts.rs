//! VMs of the host: a table of cases, and that decisions converge.

use std::collections::BTreeMap;

use burgeon_api::{
    VmId,
    image::Boot,
    vm::{Accelerator, HostVm, Intent, Observed},
};
use burgeon_plan::vm::{Action, HostSeen, LOST, Others, Start, Turn, Wanted, decide, observed, start, turn};
use proptest::prelude::*;

fn id(number: u8) -> VmId {
    format!("00000000-0000-7000-8000-0000000000{number:02x}").parse().unwrap()
}

fn host_vm(number: u8, observed: Observed) -> HostVm {
    HostVm {
        id: id(number),
        name: format!("vm-{number}"),
        observed,
        pid: None,
        accelerator: Accelerator::Tcg,
        boot: Boot::Agent,
        limits: Vec::new(),
        guest: None,
        start_times: Vec::new(),
        resident: None,
        cpu_milliseconds: None,
        adoptions: 0,
        starts: 0,
        receipt: None,
        docked: None,
        snapshots: 0,
        size: None,
    }
}

fn state(number: u8) -> Observed {
    match number % 6 {
        0 => Observed::Pending,
        1 => Observed::Starting { phase: "boot".into() },
        2 => Observed::Running,
        3 => Observed::Stopped { reason: "shut down".into() },
        4 => Observed::Failed { reason: "panic".into() },
        _ => Observed::Unknown { reason: "no answer".into() },
    }
}

fn kind(action: &Action) -> &'static str {
    match action {
        Action::Stop { .. } => "stop",
        Action::Remove { .. } => "remove",
        Action::RemoveOrphan { .. } => "remove orphan",
        Action::Launch { .. } => "launch",
        Action::Start { .. } => "start",
        Action::RollBack { .. } => "roll back",
        Action::ReportLost { .. } => "report lost",
        Action::Forget { .. } => "forget",
    }
}

#[test]
fn each_case_has_its_action() {
    use Intent::{Removed, Running, Stopped};
    let (pending, starting, running) = (Some(state(0)), Some(state(1)), Some(state(2)));
    let (stopped, failed, unknown) = (Some(state(3)), Some(state(4)), Some(state(5)));
    for (intent, launched_before, ended, on_host, expected) in [
        (Running, false, false, None, "launch"),
        (Running, true, false, None, "report lost"),
        (Running, true, true, None, ""),
        (Running, false, true, None, ""),
        (Running, false, false, pending.clone(), ""),
        (Running, false, false, running.clone(), ""),
        (Running, true, false, running.clone(), ""),
        (Running, true, false, unknown.clone(), ""),
        (Running, true, false, stopped.clone(), ""),
        (Running, true, true, failed.clone(), ""),
        (Stopped, false, false, None, ""),
        (Stopped, true, false, None, "report lost"),
        (Stopped, true, true, None, ""),
        (Stopped, true, false, pending, "stop"),
        (Stopped, true, false, starting, "stop"),
        (Stopped, true, false, running.clone(), "stop"),
        (Stopped, true, false, unknown.clone(), "stop"),
        (Stopped, true, false, stopped.clone(), ""),
        (Stopped, true, true, failed.clone(), ""),
        (Removed, false, false, None, "forget"),
        (Removed, true, false, None, "forget"),
        (Removed, true, true, None, "forget"),
        (Removed, true, false, running, "remove"),
        (Removed, true, true, stopped, "remove"),
        (Removed, true, false, unknown, "remove"),
        (Removed, false, false, failed, "remove"),
    ] {
        let row = Wanted { id: id(1), intent, launched_before, ended, starts: 0, rollback: None };
        let seen = HostSeen::Reachable(on_host.into_iter().map(|observed| host_vm(1, observed)).collect());
        let actions = decide(std::slice::from_ref(&row), &Others::default(), &seen);
        let told: Vec<&str> = actions.iter().map(kind).collect();
        assert_eq!(told.join(" "), expected, "{row:?} {seen:?}");
        let silent = HostSeen::Unreachable { reason: "refused".into() };
        assert_eq!(decide(&[row], &Others::default(), &silent), []);
    }
}

#[test]
fn orphans_go_and_vms_being_created_stay() {
    let seen = HostSeen::Reachable(vec![host_vm(1, Observed::Running), host_vm(2, Observed::Running)]);
    let others = Others { ids: [id(2)].into(), nameless: false };
    assert_eq!(decide(&[], &others, &seen), [Action::RemoveOrphan { id: id(1) }]);
    // Any of them may be the VM of a row whose id does not read.
    assert_eq!(decide(&[], &Others { nameless: true, ..others }, &seen), []);
}

#[test]
fn a_removal_does_not_wait_for_a_guest_that_stops() {
    let (stop, remove) = (Action::Stop { id: id(1) }, Action::Remove { id: id(1) });
    assert_eq!(turn(&stop, &remove), Turn::Replace);
    assert_eq!(turn(&remove, &stop), Turn::Wait);
    assert_eq!(turn(&remove, &remove), Turn::Wait);
    assert_eq!(turn(&Action::Launch { id: id(1) }, &remove), Turn::Wait);
}

#[test]
fn clients_are_told_what_is_known() {
    let row = |launched_before| Wanted {
        id: id(1),
        intent: Intent::Running,
        launched_before,
        ended: false,
        starts: 0,
        rollback: None,
    };
    let away = HostSeen::Unreachable { reason: "refused".into() };
    let empty = HostSeen::Reachable(Vec::new());
    let end = Observed::Stopped { reason: "done".into() };
    let unknown = Observed::Unknown { reason: "refused".into() };
    assert_eq!(observed(&row(true), None, &away), unknown);
    assert_eq!(observed(&row(false), None, &away), Observed::Pending);
    assert_eq!(observed(&row(true), Some(&end), &away), end);
    assert_eq!(observed(&row(false), None, &empty), Observed::Pending);
    assert_eq!(observed(&row(true), None, &empty), Observed::Failed { reason: LOST.into() });
    assert_eq!(observed(&row(true), Some(&end), &empty), end);
    let here = HostSeen::Reachable(vec![host_vm(1, Observed::Running)]);
    assert_eq!(observed(&row(true), None, &here), Observed::Running);
    let again = Wanted { starts: 1, ..row(true) };
    let stopped = HostSeen::Reachable(vec![host_vm(1, end)]);
    assert_eq!(observed(&again, None, &stopped), Observed::Pending, "what the host says is about the time before");
}

#[test]
fn a_stopped_vm_starts_once_for_each_time_it_was_asked() {
    let row =
        |intent, starts| Wanted { id: id(1), intent, launched_before: true, ended: false, starts, rollback: None };
    let on_host = |observed, starts| HostSeen::Reachable(vec![HostVm { starts, ..host_vm(1, observed) }]);
    let (running, stopped, failed) = (state(2), state(3), state(4));
    let start = |starts| Some(Action::Start { id: id(1), starts });
    use Intent::{Removed, Running, Stopped};
    for (intent, wanted, observed, begun, expected) in [
        (Running, 1, stopped.clone(), 0, start(1)),
        (Running, 3, stopped.clone(), 1, start(3)),
        // Begun, and ended since: by itself it stays as it is.
        (Running, 1, stopped.clone(), 1, None),
        (Running, 1, failed.clone(), 1, None),
        (Running, 1, running.clone(), 1, None),
        // What failed is not started, and what runs need not be.
        (Running, 1, failed, 0, None),
        (Running, 1, running, 0, None),
        // Whoever changed their mind since is obeyed.
        (Stopped, 1, stopped.clone(), 0, None),
        (Removed, 1, stopped.clone(), 0, Some(Action::Remove { id: id(1) })),
    ] {
        let actions = decide(&[row(intent, wanted)], &Others::default(), &on_host(observed.clone(), begun));
        assert_eq!(actions.first(), expected.as_ref(), "{intent:?} {wanted} {observed:?} {begun}");
    }
    // Its directory is gone, and its disk with it: nothing is started from a blank one.
    let lost = decide(&[row(Running, 1)], &Others::default(), &HostSeen::Reachable(Vec::new()));
    assert_eq!(lost, [Action::ReportLost { id: id(1), reason: LOST.into() }]);
}

#[test]
fn a_rollback_is_asked_for_until_the_host_has_begun_it() {
    let wish = |intent, starts| Wanted {
        id: id(1),
        intent,
        launched_before: true,
        ended: false,
        starts,
        rollback: Some("s1".into()),
    };
    let on_host = |observed, starts| HostSeen::Reachable(vec![HostVm { starts, ..host_vm(1, observed) }]);
    let back = Some(Action::RollBack { id: id(1), starts: 2, snapshot: "s1".into() });
    use Intent::{Running, Stopped};
    for (intent, observed, begun, expected) in [
        (Running, state(2), 1, back.clone()),
        (Running, state(3), 0, back.clone()),
        (Running, state(4), 1, back),
        // Not while it starts, or is looked for; and once.
        (Running, state(1), 1, None),
        (Running, state(5), 1, None),
        (Running, state(2), 2, None),
        (Running, state(3), 2, None),
        // Whoever changed their mind since is obeyed.
        (Stopped, state(2), 1, Some(Action::Stop { id: id(1) })),
    ] {
        let actions = decide(&[wish(intent, 2)], &Others::default(), &on_host(observed.clone(), begun));
        assert_eq!(actions.first(), expected.as_ref(), "{intent:?} {observed:?} {begun}");
    }
}

#[test]
fn a_start_is_granted_or_refused_by_name() {
    use Intent::{Removed, Running, Stopped};
    let (pending, starting, running) = (state(0), state(1), state(2));
    let (stopped, failed, unknown) = (state(3), state(4), state(5));
    for (intent, observed, launched_before, expected) in [
        (Running, &pending, false, Ok(Start::Nothing)),
        (Running, &starting, true, Ok(Start::Nothing)),
        (Running, &running, true, Ok(Start::Nothing)),
        // The guest powered itself off.
        (Running, &stopped, true, Ok(Start::Again)),
        (Stopped, &stopped, true, Ok(Start::Again)),
        (Stopped, &stopped, false, Ok(Start::First)),
        (Stopped, &pending, false, Ok(Start::First)),
        (Stopped, &pending, true, Err("still being stopped")),
        (Stopped, &starting, true, Err("still being stopped")),
        (Stopped, &running, true, Err("still being stopped")),
        (Running, &failed, true, Err("has failed")),
        (Stopped, &failed, true, Err("has failed")),
        (Running, &unknown, true, Err("not known")),
        (Removed, &stopped, true, Err("being removed")),
        (Removed, &running, true, Err("being removed")),
    ] {
        let told = start("web", intent, observed, launched_before);
        match (told, expected) {
            (Ok(told), Ok(expected)) => assert_eq!(told, expected, "{intent:?} {observed:?}"),
            (Err(error), Err(word)) => {
                assert!(error.message.contains("VM web") && error.message.contains(word), "{error}");
                assert!(error.hint.is_some(), "{error}");
            }
            other => panic!("{intent:?} {observed:?}: {other:?}"),
        }
    }
}

#[derive(Debug)]
struct World {
    rows: BTreeMap<VmId, Wanted>,
    host: BTreeMap<VmId, HostVm>,
}

impl World {
    fn decide(&self) -> Vec<Action> {
        let rows: Vec<Wanted> = self.rows.values().cloned().collect();
        decide(&rows, &Others::default(), &HostSeen::Reachable(self.host.values().cloned().collect()))
    }

    fn act(&mut self, action: &Action) {
        let id = action.id();
        match action {
            Action::Stop { .. } => {
                let stopped = Observed::Stopped { reason: "asked to".into() };
                self.host.get_mut(&id).unwrap().observed = stopped;
            }
            Action::Remove { .. } => drop(self.host.remove(&id).unwrap()),
            Action::RemoveOrphan { .. } => {
                assert!(!self.rows.contains_key(&id));
                self.host.remove(&id).unwrap();
            }
            Action::Launch { .. } => {
                let row = self.rows.get_mut(&id).unwrap();
                assert!(!row.launched_before && !row.ended && row.intent == Intent::Running);
                row.launched_before = true;
                let vm = HostVm { id, ..host_vm(0, Observed::Running) };
                assert!(self.host.insert(id, vm).is_none(), "launched twice");
            }
            Action::Start { starts, .. } => {
                let vm = self.host.get_mut(&id).unwrap();
                assert!(matches!(vm.observed, Observed::Stopped { .. }) && vm.starts < *starts);
                (vm.observed, vm.starts) = (Observed::Running, *starts);
            }
            Action::RollBack { starts, .. } => {
                let vm = self.host.get_mut(&id).unwrap();
                assert!(vm.starts < *starts);
                (vm.observed, vm.starts) = (Observed::Running, *starts);
            }
            Action::ReportLost { .. } => {
                let row = self.rows.get_mut(&id).unwrap();
                assert!(row.launched_before && !row.ended && !self.host.contains_key(&id));
                row.ended = true;
            }
            Action::Forget { .. } => {
                assert!(!self.host.contains_key(&id));
                self.rows.remove(&id).unwrap();
            }
        }
    }
}

proptest! {
    #[test]
    fn decisions_converge(
        rows in prop::collection::vec((0u8..12, 0u8..3, any::<bool>(), any::<bool>(), 0u32..3, any::<bool>()), 0..12),
        host in prop::collection::vec((0u8..12, 0u8..6), 0..12),
        carried_out in prop::collection::vec(any::<bool>(), 0..40),
    ) {
        let intent = |number| [Intent::Running, Intent::Stopped, Intent::Removed][usize::from(number)];
        let mut world = World {
            rows: rows.iter().map(|&(number, wanted, launched_before, ended, starts, returns)| {
                let rollback = returns.then(|| "s1".to_string());
                (id(number), Wanted { id: id(number), intent: intent(wanted), launched_before, ended, starts, rollback })
            }).collect(),
            host: host.iter().map(|&(number, seen)| (id(number), host_vm(number, state(seen)))).collect(),
        };
        let dead = |world: &World, number: u8| {
            let row = &world.rows[&id(number)];
            row.intent != Intent::Running
        };
        let safe: Vec<u8> = (0..12)
            .filter(|&number| world.rows.contains_key(&id(number)) && world.host.contains_key(&id(number)))
            .filter(|&number| !dead(&world, number))
            .collect();
        // At first the loop is killed in the middle, as often as it likes.
        let mut carried_out = carried_out.into_iter();
        while carried_out.len() > 0 {
            let actions = world.decide();
            prop_assert_eq!(&actions, &world.decide());
            let mut ids: Vec<VmId> = actions.iter().map(Action::id).collect();
            ids.sort();
            ids.dedup();
            prop_assert_eq!(ids.len(), actions.len(), "one action for each VM");
            for action in actions {
                if carried_out.next().unwrap_or(true) {
                    world.act(&action);
                }
            }
            if world.decide().is_empty() { break }
        }
        for _ in 0..3 {
            for action in world.decide() {
                world.act(&action);
            }
        }
        prop_assert_eq!(world.decide(), []);
        for row in world.rows.values() {
            prop_assert!(row.intent != Intent::Removed);
        }
        for vm in world.host.keys() {
            prop_assert!(world.rows.contains_key(vm));
        }
        for number in safe {
            prop_assert!(world.host.contains_key(&id(number)), "a VM that is wanted and there stays");
        }
    }
}
