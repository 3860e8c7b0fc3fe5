//! VMs that nobody uses are parked, and those whose time is over are removed. Which VMs are used is known to this process
//! alone: after its start, all of them have just been.

use std::collections::BTreeMap;

use burgeon_api::{
    Error, ErrorKind, VmId,
    vm::{Intent, Observed},
};
use burgeon_plan::life::{Due, Known, due};
use burgeon_store::meta::VmRow;
use tokio::{
    sync::watch,
    time::{Duration, timeout},
};

use crate::state::{Shared, now_s};

/// How long it may take until a VM that was parked is seen so.
const SEEN: Duration = Duration::from_secs(10);

/// Use of one VM.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Use {
    /// What is under way.
    open: u32,
    /// It is just being parked, because nobody used it.
    parking: bool,
    last_s: u64,
}

/// Use of VMs since this process has started.
#[derive(Clone, Debug)]
pub(crate) struct Uses {
    vms: watch::Sender<BTreeMap<VmId, Use>>,
    begun_s: u64,
}

/// A VM is in use for as long as this is there.
pub(crate) struct InUse {
    uses: Uses,
    id: VmId,
}

impl Uses {
    pub(crate) fn new() -> Uses {
        Uses { vms: watch::Sender::default(), begun_s: now_s() }
    }

    pub(crate) fn begin(&self, id: VmId) -> InUse {
        self.change(id, |vm| vm.open += 1);
        InUse { uses: self.clone(), id }
    }

    /// Waits until the VM is not being parked any more. With [`Uses::begin`] before it, nobody parks it then.
    pub(crate) async fn settled(&self, id: VmId) {
        let idle = |vms: &BTreeMap<VmId, Use>| vms.get(&id).is_none_or(|vm| !vm.parking);
        // The sender lives as long as `self`.
        drop(self.vms.subscribe().wait_for(idle).await);
    }

    /// Whether it may be parked: from then on, who begins to use it waits.
    fn begin_parking(&self, id: VmId) -> bool {
        self.vms.send_if_modified(|vms| {
            let vm = vms.entry(id).or_default();
            let begun = vm.open == 0 && !vm.parking;
            vm.parking |= begun;
            begun
        })
    }

    fn change(&self, id: VmId, change: impl FnOnce(&mut Use)) {
        self.vms.send_modify(|vms| {
            let vm = vms.entry(id).or_default();
            change(vm);
            vm.last_s = now_s();
        });
    }

    fn of(&self, id: VmId) -> Use {
        let known = self.vms.borrow().get(&id).copied().unwrap_or_default();
        Use { last_s: known.last_s.max(self.begun_s), ..known }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.uses.change(self.id, |vm| vm.open = vm.open.saturating_sub(1));
    }
}

/// Does what is due. The rows are those of this look; the host has just been asked.
pub(crate) async fn carry_out(state: &Shared, rows: &[VmRow]) {
    let now = now_s();
    for row in rows.iter().filter(|row| !row.life.is_endless()) {
        let (vm, seen) = (state.uses.of(row.id), state.view(row.clone()).observed);
        if seen != Observed::Running && row.life.idle_park_s.is_some() {
            // The time counts from when it runs.
            state.uses.change(row.id, |_| {});
        }
        let known = Known {
            life: &row.life,
            intent: row.intent,
            observed: &seen,
            in_use: vm.open > 0 || vm.parking || row.pipeline.is_some(),
            used_s: vm.last_s.max(row.created_s),
        };
        match due(&known, now) {
            Due::Nothing => {}
            Due::Remove => {
                match state.meta.set_intent(row.id, Intent::Removed, Some(row.version)).await {
                    Ok(_) => {
                        tracing::warn!(vm = %row.name, id = %row.id, reason = "its time to live is over", "removed");
                        state.kick.notify_one();
                    }
                    // It may have been given more time since this look began: the next one tells.
                    Err(error) if error.kind == ErrorKind::Conflict => {}
                    Err(error) => tracing::error!(vm = %row.name, %error, "it is removed at the next look"),
                }
            }
            Due::Park => {
                if state.uses.begin_parking(row.id) {
                    let (of_task, id, name) = (state.clone(), row.id, row.name.clone());
                    state.tasks.spawn(async move { park(&of_task, id, &name).await });
                }
            }
        }
    }
    state.uses.vms.send_if_modified(|vms| {
        vms.retain(|id, vm| vm.open > 0 || vm.parking || rows.iter().any(|row| row.id == *id));
        false
    });
}

/// Parks a VM. Until everybody sees that it is parked, who wants to use it waits: the first command would not find it so.
async fn park(state: &Shared, id: VmId, name: &str) {
    let parked = async {
        state.host.park(id).await?;
        state.kick.notify_one();
        let seen = state.when(|seen| {
            let runs = seen.vms.iter().any(|vm| vm.id == id && vm.observed == Observed::Running);
            (!runs).then_some(Ok(()))
        });
        // A host that cannot be asked now is looked at by whoever comes next.
        drop(timeout(SEEN, seen).await);
        Ok::<(), Error>(())
    };
    match parked.await {
        Ok(()) => tracing::info!(vm = %name, reason = "nobody has used it", "parked"),
        // It is idle again after the same time.
        Err(error) => tracing::warn!(vm = %name, %error, "an idle VM is not parked"),
    }
    state.uses.change(id, |vm| vm.parking = false);
}
