//! What to ask of the host so that its VMs become those that are wanted.
//!
//! Called by the control process' reconcile loop with what meta wants ([`Wanted`]) and what the host
//! said ([`HostSeen`]). The answer depends on nothing else; asking again before the host has acted gives the same
//! actions, and the host takes each of them twice as once.
//!
//! ```text
//! intent    on the host             not on the host
//! running   nothing                 never launched: Launch   launched: ReportLost   ended: nothing
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
//! - **`launched_before`** is written when the host has confirmed the launch, or the VM was seen there.
//!   Before that, launching again is safe: the host knows the id.
//! - **Orphans** come from a launch that was under way when its VM was removed. Meta is the truth, so
//!   they go. The caller must read the host *before* meta: a row is committed before its launch is sent,
//!   so a VM seen on the host then has its row. `creating` names ids whose commit is still under way.

use std::collections::{BTreeMap, BTreeSet};

use burgeon_api::{
    VmId,
    vm::{HostVm, Intent, Observed},
};

/// A row of meta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub id: VmId,
    pub intent: Intent,
    /// The host has confirmed that it has the VM, at least once.
    pub launched_before: bool,
    /// Its end (stopped, failed or lost) is recorded; what the host has of it no longer matters.
    pub ended: bool,
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
            | Action::ReportLost { id, .. }
            | Action::Forget { id } => *id,
        }
    }

    /// What frees memory comes before what needs it.
    fn rank(&self) -> u8 {
        match self {
            Action::Stop { .. } | Action::Remove { .. } | Action::RemoveOrphan { .. } => 0,
            Action::ReportLost { .. } | Action::Forget { .. } => 1,
            Action::Launch { .. } => 2,
        }
    }
}

/// The reason given for a VM that the host no longer has.
pub const LOST: &str = "the host process no longer knows this VM; it is gone with what was on its disk";

/// At most one action for each VM; `seen` was read before `wanted`.
pub fn decide(wanted: &[Wanted], creating: &BTreeSet<VmId>, seen: &HostSeen) -> Vec<Action> {
    let HostSeen::Reachable(on_host) = seen else {
        return Vec::new();
    };
    let on_host: BTreeMap<VmId, &HostVm> = on_host.iter().map(|vm| (vm.id, vm)).collect();
    let known: BTreeSet<VmId> = wanted.iter().map(|row| row.id).chain(creating.iter().copied()).collect();
    let orphans = on_host.keys().filter(|id| !known.contains(id)).map(|id| Action::RemoveOrphan { id: *id });
    let mut actions: Vec<Action> = wanted
        .iter()
        .filter_map(|row| decide_one(row, on_host.get(&row.id).map(|vm| &vm.observed)))
        .chain(orphans)
        .collect();
    actions.sort_by_key(Action::rank);
    actions
}

fn decide_one(row: &Wanted, observed: Option<&Observed>) -> Option<Action> {
    let id = row.id;
    match (row.intent, observed) {
        (Intent::Removed, Some(_)) => Some(Action::Remove { id }),
        (Intent::Removed, None) => Some(Action::Forget { id }),
        (Intent::Stopped, Some(observed)) => (!is_over(observed)).then_some(Action::Stop { id }),
        (Intent::Running, Some(_)) => None,
        (_, None) if row.ended => None,
        (_, None) if row.launched_before => Some(Action::ReportLost { id, reason: LOST.to_string() }),
        (Intent::Running, None) => Some(Action::Launch { id }),
        (Intent::Stopped, None) => None,
    }
}

/// Whether a VM has certainly ended.
pub fn is_over(observed: &Observed) -> bool {
    match observed {
        Observed::Stopped { .. } | Observed::Failed { .. } => true,
        Observed::Pending | Observed::Starting { .. } | Observed::Running | Observed::Unknown { .. } => false,
    }
}

/// What clients are told of a VM. `recorded` is its end as meta has it, where it has one.
pub fn observed(row: &Wanted, recorded: Option<&Observed>, seen: &HostSeen) -> Observed {
    match seen {
        HostSeen::Reachable(vms) => match (vms.iter().find(|vm| vm.id == row.id), recorded) {
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
