//! What a substrate and those that use it take of the machine's memory.

use burgeon_api::{
    ByteSize, Result, VmId,
    substrate::{Share, Shares},
};
use burgeon_qemu::process::{Identity, identity_of};

use crate::{plug::blocking, registry::Registry, start::Context};

/// Of a substrate, of the VMs that are told, and of QEMUs that wait for VMs of it. Who ends meanwhile takes nothing.
pub(crate) async fn of(context: &Context, registry: &Registry, substrate: VmId, vms: &[VmId]) -> Result<Shares> {
    let base = context.substrates.at_hand(substrate).map(|frozen| frozen.base.clone());
    let mut processes: Vec<(Option<VmId>, Identity)> = Vec::new();
    for vm in registry.list().await?.into_iter().filter(|vm| vms.contains(&vm.id)) {
        processes.extend(vm.pid.and_then(identity_of).map(|process| (Some(vm.id), process)));
    }
    processes.extend(context.standbys.processes(substrate).into_iter().map(|process| (None, process)));
    blocking(move || {
        let number = base.as_ref().and_then(|base| base.number());
        let share = |(vm, process): (Option<VmId>, Identity)| {
            let share = burgeon_qemu::share::Share::of(&process).ok()?;
            Some(Share {
                vm,
                proportional: ByteSize(share.proportional),
                own: ByteSize(share.own),
                of_held: number.is_some() && share.base == number,
            })
        };
        let users = processes.into_iter().filter_map(share).collect();
        Ok(Shares { held: base.map(|base| ByteSize(base.held())), users })
    })
    .await
}
