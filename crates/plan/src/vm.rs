//! What to ask of the host so that its VMs become those that are wanted.
//!
//! Called by the control process' reconcile loop with what meta wants ([`Wanted`]) and what the host
//! said ([`HostSeen`]). The answer depends on nothing else; asking again before the host has acted gives the same
//! actions, and the host takes each of them twice as once.
//!
//! ```text
//! intent    on the host             not on the host
//! running   Start, if it stopped    never launched: Launch   launched: ReportLost   ended: nothing
//!           and a start is awaited;
//!           RollBack, if that is
//! stopped   Stop, unless it ended   never launched: nothing  launched: ReportLost   ended: nothing
//! removed   Remove                  Forget
//! (no row)  RemoveOrphan, unless its row is just being created
//! host unreachable: nothing at all, whatever is wanted
//! ```
//!
//! # Decisions
//! - **Unknown is not dead.** An unreachable host, or a VM that the host cannot reach, is never reported
//!   lost and never replaced. Stop and Remove are still asked for: the host carries them out when it can.
//! - **Nothing starts twice.** A VM that the host had and has no more is reported lost. Launching it
//!   again would give a blank disk under an old name.
//! - **A VM that has stopped starts only when its user says so.** Each such start has a number, in its row and on the
//!   host: the host is asked while it has not begun the row's. A VM that stops later has none that is awaited.
//! - **A rollback is a start with a number too**, which need not wait until the VM has stopped.
//! - **`launched_before`** is written when the host has confirmed the launch, or the VM was seen there.
//!   Before that, launching again is safe: the host knows the id.
//! - **Orphans** come from a launch that was under way when its VM was removed. Meta is the truth, so
//!   they go. The caller must read the host *before* meta: a row is committed before its launch is sent,
//!   so a VM seen on the host then has its row. [`Others`] are known by something else than a row that reads.
//! - **One action for a VM at a time** ([`turn`]): slow ones are under way while the next decision is made.

use std::collections::{BTreeMap, BTreeSet};

use burgeon_api::{
    Error, Result, VmId,
    vm::{HostVm, Intent, Observed},
};

use crate::snapshot::can_return;

/// A row of meta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub id: VmId,
    pub intent: Intent,
    /// The host has confirmed that it has the VM, at least once.
    pub launched_before: bool,
    /// Its end (stopped, failed or lost) is recorded; what the host has of it no longer matters.
    pub ended: bool,
    /// How often its user has asked to start it again.
    pub starts: u32,
    /// The last of these starts returns it to this snapshot, whatever it does before.
    pub rollback: Option<String>,
}

/// What is known of the host.
#[derive(Clone, Debug, PartialEq)]
pub enum HostSeen {
    /// All VMs that the host has, those that ended among them.
    Reachable(Vec<HostVm>),
    Unreachable {
        reason: String,
    },
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Stop {
        id: VmId,
    },
    /// End it if it runs, and remove what it left.
    Remove {
        id: VmId,
    },
    /// The same for a VM that meta does not know; worth a line in the log.
    RemoveOrphan {
        id: VmId,
    },
    Launch {
        id: VmId,
    },
    /// Start it again, with the disk that it has.
    Start {
        id: VmId,
        starts: u32,
    },
    /// End it if it runs, and have it go on from a snapshot of it.
    RollBack {
        id: VmId,
        starts: u32,
        snapshot: String,
    },
    /// Record it as failed, with this reason, and as ended.
    ReportLost {
        id: VmId,
        reason: String,
    },
    /// Delete its row.
    Forget {
        id: VmId,
    },
}

impl Action {
    pub fn id(&self) -> VmId {
        match self {
            Action::Stop { id }
            | Action::Remove { id }
            | Action::RemoveOrphan { id }
            | Action::Launch { id }
            | Action::Start { id, .. }
            | Action::RollBack { id, .. }
            | Action::ReportLost { id, .. }
            | Action::Forget { id } => *id,
        }
    }

    /// What frees memory comes before what needs it.
    fn rank(&self) -> u8 {
        match self {
            Action::Stop { .. } | Action::Remove { .. } | Action::RemoveOrphan { .. } => 0,
            Action::ReportLost { .. } | Action::Forget { .. } => 1,
            Action::Launch { .. } | Action::Start { .. } | Action::RollBack { .. } => 2,
        }
    }
}

/// The reason given for a VM that the host no longer has.
pub const LOST: &str = "the host process no longer knows this VM; it is gone with what was on its disk";

/// VMs that the host may have beside those of rows that read: nobody's orphans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Of image builds, and of rows that do not read.
    pub ids: BTreeSet<VmId>,
    /// There is a row of which not even the id reads. Whichever VM it means, none is removed for want of a row.
    pub nameless: bool,
}

/// At most one action for each VM; `seen` was read before `wanted`.
pub fn decide(wanted: &[Wanted], others: &Others, seen: &HostSeen) -> Vec<Action> {
    let HostSeen::Reachable(on_host) = seen else {
        return Vec::new();
    };
    let on_host: BTreeMap<VmId, &HostVm> = on_host.iter().map(|vm| (vm.id, vm)).collect();
    let known: BTreeSet<VmId> = wanted.iter().map(|row| row.id).chain(others.ids.iter().copied()).collect();
    let orphans =
        on_host.keys().filter(|id| !others.nameless && !known.contains(id)).map(|id| Action::RemoveOrphan { id: *id });
    let mut actions: Vec<Action> =
        wanted.iter().filter_map(|row| decide_one(row, on_host.get(&row.id).copied())).chain(orphans).collect();
    actions.sort_by_key(Action::rank);
    actions
}

fn decide_one(row: &Wanted, on_host: Option<&HostVm>) -> Option<Action> {
    let id = row.id;
    match (row.intent, on_host) {
        (Intent::Removed, Some(_)) => Some(Action::Remove { id }),
        (Intent::Removed, None) => Some(Action::Forget { id }),
        (Intent::Stopped, Some(vm)) => (!is_over(&vm.observed)).then_some(Action::Stop { id }),
        (Intent::Running, Some(vm)) => match &row.rollback {
            Some(snapshot) if vm.starts < row.starts => {
                let (starts, snapshot) = (row.starts, snapshot.clone());
                can_return(&vm.observed).then_some(Action::RollBack { id, starts, snapshot })
            }
            _ => is_start_awaited(row.starts, vm).then_some(Action::Start { id, starts: row.starts }),
        },
        (_, None) if row.ended => None,
        (_, None) if row.launched_before => Some(Action::ReportLost { id, reason: LOST.to_string() }),
        (Intent::Running, None) => Some(Action::Launch { id }),
        (Intent::Stopped, None) => None,
    }
}

/// What becomes of an action while another one for the same VM is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It waits; when the other has ended it is decided anew.
    Wait,
    /// It begins, and the other is waited for no more.
    Replace,
}

/// A guest that is given time to stop does not keep its user from removing it. All else goes one after the other.
pub fn turn(under_way: &Action, next: &Action) -> Turn {
    match (under_way, next) {
        (Action::Stop { .. }, Action::Remove { .. }) => Turn::Replace,
        _ => Turn::Wait,
    }
}

/// Whether the host has yet to start a VM again: that it stopped is then about the time before.
pub fn is_start_awaited(starts: u32, on_host: &HostVm) -> bool {
    matches!(on_host.observed, Observed::Stopped { .. } | Observed::Parked { .. }) && on_host.starts < starts
}

/// Whether a VM has certainly ended.
pub fn is_over(observed: &Observed) -> bool {
    match observed {
        Observed::Stopped { .. } | Observed::Parked { .. } | Observed::Docked | Observed::Failed { .. } => true,
        Observed::Pending
        | Observed::Starting { .. }
        | Observed::Running
        | Observed::Paused
        | Observed::Unknown { .. }
        | Observed::Damaged { .. } => false,
    }
}

/// What a user's wish to start a VM comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It runs, or is on its way.
    Nothing,
    /// It never was with the host: wanting it is enough.
    First,
    /// It has stopped or was parked, and gets another start with its disk.
    Again,
}

/// Whether a VM can be started. A start that is granted while the VM has not stopped would be one in store
/// for later: those are refused.
///
/// # Errors
/// `Conflict` for a VM that failed, is being removed, or has not stopped yet; `Unavailable` where nothing is known.
pub fn start(name: &str, intent: Intent, observed: &Observed, launched_before: bool) -> Result<Start> {
    let refused = |what: String, hint: String| Err(Error::conflict(format!("VM {name} {what}")).with_hint(hint));
    match (intent, observed) {
        (Intent::Removed, _) => {
            refused("is being removed".into(), "create another: burgeon vm create IMAGE --name NAME".into())
        }
        (_, Observed::Failed { reason }) => refused(
            format!("has failed, and only a VM that has stopped can be started: {reason}"),
            format!("remove it and create another: burgeon vm rm {name}"),
        ),
        (_, Observed::Unknown { reason } | Observed::Damaged { reason }) => {
            Err(Error::unavailable(format!("VM {name} cannot be started: whether it runs is not known ({reason})"))
                .with_hint(format!("burgeon vm show {name} tells when it is known again")))
        }
        (_, Observed::Docked) => refused(
            "is a substrate, and never runs itself".into(),
            format!("make a VM of it: burgeon vm create --substrate {name}"),
        ),
        (_, Observed::Paused) => refused("is paused".into(), format!("let it go on: burgeon vm resume {name}")),
        (_, Observed::Stopped { .. } | Observed::Parked { .. }) => {
            Ok(if launched_before { Start::Again } else { Start::First })
        }
        (Intent::Running, Observed::Pending | Observed::Starting { .. } | Observed::Running) => Ok(Start::Nothing),
        (Intent::Stopped, Observed::Pending) if !launched_before => Ok(Start::First),
        (Intent::Stopped, Observed::Pending | Observed::Starting { .. } | Observed::Running) => {
            refused("is still being stopped".into(), format!("repeat when burgeon vm show {name} calls it stopped"))
        }
    }
}

/// What clients are told of a VM. `recorded` is its end as meta has it, where it has one.
pub fn observed(row: &Wanted, recorded: Option<&Observed>, seen: &HostSeen) -> Observed {
    match seen {
        HostSeen::Reachable(vms) => match (vms.iter().find(|vm| vm.id == row.id), recorded) {
            (Some(vm), _) if is_start_awaited(row.starts, vm) => Observed::Pending,
            (Some(vm), _) => vm.observed.clone(),
            (None, Some(end)) => end.clone(),
            (None, None) if row.launched_before => Observed::Failed { reason: LOST.to_string() },
            (None, None) if row.intent == Intent::Running => Observed::Pending,
            (None, None) => Observed::Stopped { reason: "it was never started".to_string() },
        },
        HostSeen::Unreachable { reason } => match recorded {
            Some(end) => end.clone(),
            None if row.launched_before => Observed::Unknown { reason: reason.clone() },
            None => Observed::Pending,
        },
    }
}
