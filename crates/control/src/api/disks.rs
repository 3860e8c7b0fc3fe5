//! Disks of VMs. The host process has them; this asks it.

use axum::{
    Json,
    extract::{Path, Query, State},
};
use burgeon_api::{
    Error, VmId,
    disk::{AttachDisk, CloneVm, DetachDisk, DiskChanged, DiskChanges, DiskView, NameSnapshot, ResizeDisk, check_name},
    host::{Begin, DiskRequest, Source},
    vm::{Resize, VmView},
};
use burgeon_store::meta::{CloneSource, VmRow};
use serde::Deserialize;

use super::{Answer, Routes};
use crate::state::{Shared, now_s};

pub(super) fn add(routes: &mut Routes) {
    let (many, changed, changes) =
        (routes.schema::<Vec<DiskView>>(), routes.schema::<DiskChanged>(), routes.schema::<DiskChanges>());
    let (attach_body, detach_body, resize_body, snapshot_body) = (
        routes.schema::<AttachDisk>(),
        routes.schema::<DetachDisk>(),
        routes.schema::<ResizeDisk>(),
        routes.schema::<NameSnapshot>(),
    );
    let (clone_body, vm) = (routes.schema::<CloneVm>(), routes.schema::<VmView>());
    routes.add("get", "/v1/vms/{vm}/disks", "The VM's disks, and their snapshots", list).gives(many);
    routes
        .add("post", "/v1/vms/{vm}/disks", "Plug a disk in: a new one, or one that was detached", attach)
        .takes(attach_body)
        .gives(changed.clone());
    routes.add("delete", "/v1/vms/{vm}/disks/{disk}", "Remove a detached disk, with all that it holds", remove);
    routes
        .add("post", "/v1/vms/{vm}/disks/{disk}/detach", "Unplug a disk; what it holds stays", detach)
        .takes(detach_body)
        .gives(changed.clone());
    routes
        .add("post", "/v1/vms/{vm}/disks/{disk}/resize", "Make a disk longer, be the VM running or not", resize)
        .takes(resize_body)
        .gives(changed.clone());
    routes
        .add("post", "/v1/vms/{vm}/disks/{disk}/snapshots", "Keep what the disk holds now, under a name", snapshot)
        .takes(snapshot_body)
        .gives(changed.clone());
    routes.add("delete", "/v1/vms/{vm}/disks/{disk}/snapshots/{snapshot}", "Let a snapshot go", remove_snapshot);
    routes
        .add(
            "post",
            "/v1/vms/{vm}/disks/{disk}/snapshots/{snapshot}/rollback",
            "Make the disk of a stopped VM hold again what it held then",
            roll_back,
        )
        .gives(changed);
    routes
        .add("get", "/v1/vms/{vm}/disks/{disk}/changes", "Where the disk may differ from a snapshot", changes_since)
        .query(&[("from", "a snapshot's name"), ("to", "another snapshot's name; absent: what the disk holds now")])
        .gives(changes);
    routes
        .add("post", "/v1/vms/{vm}/clone", "Make another VM whose disk holds what this one's holds", clone)
        .takes(clone_body)
        .gives(vm);
}

async fn id_of(state: &Shared, vm: &str) -> Result<VmId, Error> {
    Ok(state.meta.vm(vm).await?.id)
}

async fn list(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<Vec<DiskView>>> {
    Ok(Json(state.host.disks(id_of(&state, &vm).await?).await?))
}

async fn attach(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<AttachDisk>,
) -> Answer<Json<DiskChanged>> {
    check_name(&request.name)?;
    let id = id_of(&state, &vm).await?;
    let map = match request.image {
        None => None,
        Some(name) => {
            let image = state.image(name.clone()).await?;
            let without = || Error::invalid(format!("image {name} has no disk in the store"));
            Some(image.map.ok_or_else(without)?)
        }
    };
    let request = DiskRequest::Attach { disk: request.name, size: request.size.map(|size| size.bytes()), map };
    Ok(Json(state.host.change_disk(id, request).await?))
}

async fn remove(State(state): State<Shared>, Path((vm, disk)): Path<(String, String)>) -> Answer<()> {
    let id = id_of(&state, &vm).await?;
    state.host.change_disk(id, DiskRequest::Remove { disk }).await?;
    Ok(())
}

async fn detach(
    State(state): State<Shared>,
    Path((vm, disk)): Path<(String, String)>,
    Json(request): Json<DetachDisk>,
) -> Answer<Json<DiskChanged>> {
    let id = id_of(&state, &vm).await?;
    Ok(Json(state.host.change_disk(id, DiskRequest::Detach { disk, force: request.force }).await?))
}

async fn resize(
    State(state): State<Shared>,
    Path((vm, disk)): Path<(String, String)>,
    Json(request): Json<ResizeDisk>,
) -> Answer<Json<DiskChanged>> {
    let id = id_of(&state, &vm).await?;
    Ok(Json(state.host.change_disk(id, DiskRequest::Grow { disk, size: request.size.bytes() }).await?))
}

async fn snapshot(
    State(state): State<Shared>,
    Path((vm, disk)): Path<(String, String)>,
    Json(request): Json<NameSnapshot>,
) -> Answer<Json<DiskChanged>> {
    let id = id_of(&state, &vm).await?;
    Ok(Json(state.host.change_disk(id, DiskRequest::Snapshot { disk, snapshot: request.name }).await?))
}

async fn remove_snapshot(
    State(state): State<Shared>,
    Path((vm, disk, snapshot)): Path<(String, String, String)>,
) -> Answer<()> {
    let id = id_of(&state, &vm).await?;
    state.host.change_disk(id, DiskRequest::RemoveSnapshot { disk, snapshot }).await?;
    Ok(())
}

async fn roll_back(
    State(state): State<Shared>,
    Path((vm, disk, snapshot)): Path<(String, String, String)>,
) -> Answer<Json<DiskChanged>> {
    let id = id_of(&state, &vm).await?;
    Ok(Json(state.host.change_disk(id, DiskRequest::RollBack { disk, snapshot }).await?))
}

#[derive(Deserialize)]
struct Between {
    from: String,
    to: Option<String>,
}

async fn changes_since(
    State(state): State<Shared>,
    Path((vm, disk)): Path<(String, String)>,
    Query(between): Query<Between>,
) -> Answer<Json<DiskChanges>> {
    let id = id_of(&state, &vm).await?;
    Ok(Json(state.host.disk_changes(id, disk, between.from, between.to).await?))
}

async fn clone(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<CloneVm>,
) -> Answer<Json<VmView>> {
    let source = state.meta.vm(&vm).await?;
    let image = state.host.image_of(source.id).await?;
    if image.disk.is_none() {
        return Err(Error::refused(format!("VM {} has no disk to clone", source.name))
            .with_hint(format!("create another one: burgeon vm create {}", source.image))
            .into());
    }
    if request.snapshot.is_none() {
        state.host.change_disk(source.id, DiskRequest::Sync).await?;
    }
    let name = request.name.unwrap_or_else(|| format!("{}-{}", source.name, request.id.short()));
    let from = Source { vm: source.id, snapshot: request.snapshot };
    let row = VmRow {
        source: Some(CloneSource {
            source: from,
            image,
            begin: Begin::Boot,
            keep: burgeon_api::substrate::Keep::default(),
            resize: Resize::default(),
        }),
        ..VmRow::new(request.id, name, source.image, source.profile, now_s())
    };
    let row = state.create_vm(row).await?;
    Ok(Json(state.view(row)))
}
