//! Snapshots of VMs, with memory.

use axum::{
    Json,
    extract::{Path, State},
};
use burgeon_api::{
    Error, Result,
    host::Begin,
    life::Life,
    snapshot::{RollBackVm, SnapshotVm, VmSnapshot},
    substrate::ActivateVms,
    vm::VmView,
};

use super::{Answer, Routes};
use crate::{
    snapshots,
    state::{Shared, now_s},
    substrates,
};

pub(super) fn add(routes: &mut Routes) {
    let (one, many) = (routes.schema::<VmSnapshot>(), routes.schema::<Vec<VmSnapshot>>());
    let (take_body, back_body) = (routes.schema::<SnapshotVm>(), routes.schema::<RollBackVm>());
    let (vm, activate_body, vms) =
        (routes.schema::<VmView>(), routes.schema::<ActivateVms>(), routes.schema::<Vec<VmView>>());
    routes.add("get", "/v1/vms/{vm}/snapshots", "The VM's snapshots, the oldest first", list).gives(many);
    routes
        .add("post", "/v1/vms/{vm}/snapshots", "Keep the VM's instant, memory and disks, while it goes on", take)
        .takes(take_body)
        .gives(one);
    routes.add("delete", "/v1/vms/{vm}/snapshots/{snapshot}", "Let a snapshot go", remove);
    routes
        .add("post", "/v1/vms/{vm}/rollback", "Return the VM to a snapshot of it, memory and disks", roll_back)
        .takes(back_body)
        .gives(vm);
    routes
        .add("post", "/v1/vms/{vm}/snapshots/{snapshot}/vms", "Make VMs that go on from a snapshot", activate)
        .takes(activate_body)
        .gives(vms);
}

async fn list(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<Vec<VmSnapshot>>> {
    snapshots::host_is_there(&state).await;
    let row = state.meta.vm(&vm).await?;
    Ok(Json(state.host.snapshots(row.id).await?))
}

async fn take(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<SnapshotVm>,
) -> Answer<Json<VmSnapshot>> {
    snapshots::host_is_there(&state).await;
    let row = state.meta.vm(&vm).await?;
    if let Some(name) = &request.name {
        burgeon_api::name::check("snapshot", name)?;
    }
    let of_task = state.clone();
    // Goes on to its end, whether or not the client waits for it; meanwhile it is not parked.
    let task = state.tasks.spawn(async move {
        let _in_use = of_task.uses.begin(row.id);
        of_task.uses.settled(row.id).await;
        of_task.host.snapshot(row.id, request.id, request.name).await
    });
    let snapshot = task.await.map_err(|error| Error::internal(format!("the snapshot was broken off: {error}")))?;
    state.kick.notify_one();
    Ok(Json(snapshot?))
}

async fn remove(State(state): State<Shared>, Path((vm, snapshot)): Path<(String, String)>) -> Answer<()> {
    snapshots::host_is_there(&state).await;
    let row = state.meta.vm(&vm).await?;
    state.host.remove_snapshot(row.id, snapshot).await?;
    state.kick.notify_one();
    Ok(())
}

async fn roll_back(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<RollBackVm>,
) -> Answer<Json<VmView>> {
    let of_task = state.clone();
    let task = state.tasks.spawn(async move { snapshots::roll_back(&of_task, vm, request).await });
    let back: Result<VmView> =
        task.await.map_err(|error| Error::internal(format!("the rollback was broken off: {error}")))?;
    Ok(Json(back?))
}

async fn activate(
    State(state): State<Shared>,
    Path((vm, snapshot)): Path<(String, String)>,
    Json(request): Json<ActivateVms>,
) -> Answer<Json<Vec<VmView>>> {
    snapshots::host_is_there(&state).await;
    let source = state.meta.vm(&vm).await?;
    let snapshot = snapshots::find(&state, &source, Some(&snapshot)).await?.name;
    let image = state.host.image_of(source.id).await?;
    let life = Life::default().set(&request.life, now_s());
    let begin = (Begin::Snapshot, request.keep);
    let mut rows = substrates::rows(&source, Some(&snapshot), &image, begin, &request.ids, &request.names)?;
    substrates::resize(&mut rows, request.resize)?;
    rows.iter_mut().for_each(|row| row.life = life.clone());
    let rows = substrates::provided(&state, rows, &request.provisions).await?;
    Ok(Json(rows.into_iter().map(|row| state.view(row)).collect()))
}
