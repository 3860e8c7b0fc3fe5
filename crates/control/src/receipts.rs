//! Receipts are kept in meta, so that what one VM has shown is known when another shows it, whichever host process sees that.

use std::collections::BTreeMap;

use burgeon_api::{
    VmId,
    receipt::KeptReceipt,
    vm::{HostVm, Observed},
};
use burgeon_plan::vm::is_over;
use burgeon_store::meta::VmRow;

use crate::state::Shared;

/// Which generation of each VM is kept already.
#[derive(Default)]
pub(crate) struct Receipts(BTreeMap<VmId, String>);

impl Receipts {
    /// Keeps what is new of what the host's VMs have shown, and ends a VM that has shown what another has.
    pub(crate) async fn keep(&mut self, state: &Shared, rows: &[VmRow], vms: &[HostVm]) {
        self.0.retain(|id, _| vms.iter().any(|vm| vm.id == *id));
        let is_new = |vm: &&HostVm, generation: &String| {
            !matches!(vm.observed, Observed::Failed { .. }) && self.0.get(&vm.id) != Some(generation)
        };
        let new: Vec<KeptReceipt> = vms
            .iter()
            .filter(|vm| rows.iter().any(|row| row.id == vm.id))
            .filter_map(|vm| {
                let receipt = vm.receipt.clone().filter(|receipt| is_new(&vm, &receipt.generation))?;
                Some(KeptReceipt { vm: vm.id, name: vm.name.clone(), receipt })
            })
            .collect();
        if new.is_empty() {
            return;
        }
        let repeats = match state.meta.keep_receipts(new.clone()).await {
            Ok(repeats) => repeats,
            Err(error) => {
                tracing::error!(%error, "receipts could not be kept");
                return;
            }
        };
        self.0.extend(new.into_iter().map(|one| (one.vm, one.receipt.generation)));
        for (id, error) in repeats {
            let Some(vm) = vms.iter().find(|vm| vm.id == id && !is_over(&vm.observed)) else { continue };
            // Asked again at the next look, until it has ended.
            self.0.remove(&id);
            tracing::error!(vm = %vm.name, %id, %error, "ended");
            let of_task = state.clone();
            state.tasks.spawn(async move {
                if let Err(error) = of_task.host.give_up(id, error.to_string()).await {
                    tracing::error!(%id, %error, "a VM that shows what another has shown goes on for now");
                }
            });
        }
    }
}
