//! Substrates, what goes on from them, and forks of running VMs.

use axum::{
    Json,
    extract::{Path, State},
    http::HeaderMap,
};
use burgeon_api::{
    Error, ErrorKind,
    host::Begin,
    life::Life,
    receipt::{KeptReceipt, Receipt},
    substrate::{
        ActivateVms, CreateSubstrate, ForkVm, Forked, KeepStandbys, MOST_STANDBYS, SubstrateStat, SubstrateView,
    },
    vm::{Observed, VmView},
};
use burgeon_store::meta::VmRow;
use tokio::time::{Duration, timeout};

use super::{Answer, Routes, vms};
use crate::{
    state::{Shared, now_s},
    substrate_stat, substrates,
};

/// How long it may take until the receipt of a new VM is seen.
const SHOWN: Duration = Duration::from_secs(10);

pub(super) fn add(routes: &mut Routes) {
    let (one, many) = (routes.schema::<SubstrateView>(), routes.schema::<Vec<SubstrateView>>());
    let (create, activate_body, new_vms) =
        (routes.schema::<CreateSubstrate>(), routes.schema::<ActivateVms>(), routes.schema::<Vec<VmView>>());
    let vm = routes.schema::<VmView>();
    let (fork_body, forked, receipt_schema) =
        (routes.schema::<ForkVm>(), routes.schema::<Forked>(), routes.schema::<Receipt>());
    routes.add("get", "/v1/substrates", "All substrates", list).gives(many);
    routes
        .add("post", "/v1/substrates", "Boot a VM, warm it up, and make a substrate of it", make)
        .takes(create)
        .gives(one.clone());
    routes.add("get", "/v1/substrates/{substrate}", "One substrate, by name or id", show).gives(one.clone());
    routes
        .add("get", "/v1/substrates/{substrate}/wait", "Wait until the substrate is docked, or has failed", wait)
        .gives(one.clone());
    let stat_schema = routes.schema::<SubstrateStat>();
    routes
        .add("get", "/v1/substrates/{substrate}/stat", "What a substrate holds in the store and in memory", stat)
        .gives(stat_schema);
    let keep = routes.schema::<KeepStandbys>();
    routes
        .add("post", "/v1/substrates/{substrate}/standbys", "How many QEMUs wait for VMs of it", keep_standbys)
        .takes(keep)
        .gives(one);
    routes.add("delete", "/v1/substrates/{substrate}", "Remove a substrate that no VM goes on from", remove);
    routes
        .add("post", "/v1/substrates/{substrate}/vms", "Make VMs that go on from a substrate", activate)
        .takes(activate_body)
        .gives(new_vms);
    routes
        .add("post", "/v1/vms/{vm}/fork", "Make other VMs of a running one, as it is at this instant", fork)
        .takes(fork_body)
        .gives(forked);
    routes
        .add("post", "/v1/vms/{vm}/park", "Keep a running VM's state and free its memory; a start lets it go on", park)
        .gives(vm);
    routes
        .add("get", "/v1/vms/{vm}/receipt", "What an activated VM has shown of its identity, at last", receipt)
        .gives(receipt_schema);
    let all = routes.schema::<Vec<KeptReceipt>>();
    routes
        .add(
            "get",
            "/v1/vms/{vm}/receipts",
            "All that a VM has shown, oldest first; also of one that was removed",
            receipts,
        )
        .gives(all);
}

async fn list(State(state): State<Shared>) -> Answer<Json<Vec<SubstrateView>>> {
    Ok(Json(substrates::views(&state).await?))
}

async fn make(State(state): State<Shared>, Json(request): Json<CreateSubstrate>) -> Answer<Json<SubstrateView>> {
    let image = state.image(request.image.clone()).await?;
    if image.boot != burgeon_api::image::Boot::Agent {
        return Err(Error::refused(format!("image {} has no agent, and so nobody could renew its clones", image.name))
            .with_hint("substrates are made of images that burgeon image build makes, or OCI and tar imports")
            .into());
    }
    if request.profile.display {
        return Err(Error::refused(
            "a profile with a display cannot be captured yet: its graphics card has memory of its own",
        )
        .into());
    }
    let CreateSubstrate { id, name, image, profile, recipe } = request;
    let row = VmRow { substrate: Some(recipe), ..VmRow::new(id, name, image, profile, now_s()) };
    let is_known = state.meta.vm(&row.id.to_string()).await.is_ok();
    let row = state.create_vm(row).await?;
    if !is_known {
        substrates::raise(&state, row.clone());
    }
    Ok(Json(substrates::view(&state, &row, &[], &Vec::new())))
}

async fn show(State(state): State<Shared>, Path(name): Path<String>) -> Answer<Json<SubstrateView>> {
    let row = substrates::find(&state, &name).await?;
    Ok(Json(substrates::view(&state, &row, &state.meta.vms().await?, &substrates::standbys(&state).await)))
}

async fn stat(State(state): State<Shared>, Path(name): Path<String>) -> Answer<Json<SubstrateStat>> {
    let row = substrates::find(&state, &name).await?;
    Ok(Json(substrate_stat::stat(&state, row).await?))
}

async fn keep_standbys(
    State(state): State<Shared>,
    Path(name): Path<String>,
    Json(request): Json<KeepStandbys>,
) -> Answer<Json<SubstrateView>> {
    let row = substrates::find(&state, &name).await?;
    if request.count.is_some_and(|count| count > MOST_STANDBYS) {
        return Err(Error::invalid(format!("at most {MOST_STANDBYS} QEMUs wait for one substrate")).into());
    }
    state.host.keep_standbys(row.id, request.count).await?;
    Ok(Json(substrates::view(&state, &row, &state.meta.vms().await?, &substrates::standbys(&state).await)))
}

async fn wait(State(state): State<Shared>, Path(name): Path<String>) -> Answer<Json<SubstrateView>> {
    let id = substrates::find(&state, &name).await?.id.to_string();
    loop {
        let looks = state.seen.borrow().looks;
        let row = substrates::find(&state, &id).await?;
        let view = substrates::view(&state, &row, &state.meta.vms().await?, &substrates::standbys(&state).await);
        if burgeon_plan::vm::is_over(&view.observed) {
            return Ok(Json(view));
        }
        state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?;
    }
}

async fn remove(state: State<Shared>, Path(name): Path<String>, headers: HeaderMap) -> Answer<()> {
    let id = substrates::find(&state, &name).await?.id.to_string();
    vms::remove(state, Path(id), headers).await
}

async fn activate(
    State(state): State<Shared>,
    Path(name): Path<String>,
    Json(request): Json<ActivateVms>,
) -> Answer<Json<Vec<VmView>>> {
    let source = substrates::find(&state, &name).await?;
    let observed = state.view(source.clone()).observed;
    if observed != Observed::Docked {
        return Err(substrates::not_docked(&source.name, &observed).into());
    }
    let image = state.host.image_of(source.id).await?;
    let life = Life::default().set(&request.life, now_s());
    let begin = (Begin::Substrate, request.keep);
    let mut rows = substrates::rows(&source, None, &image, begin, &request.ids, &request.names)?;
    substrates::resize(&mut rows, request.resize)?;
    rows.iter_mut().for_each(|row| row.life = life.clone());
    let rows = substrates::provided(&state, rows, &request.provisions).await?;
    Ok(Json(rows.into_iter().map(|row| state.view(row)).collect()))
}

async fn fork(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<ForkVm>,
) -> Answer<Json<Forked>> {
    let source = state.meta.vm(&vm).await?;
    let of_task = state.clone();
    // Goes on to its end, whether or not the client waits for it.
    let task = state.tasks.spawn(async move { substrates::fork(&of_task, source, request).await });
    let forked = task.await.map_err(|error| Error::internal(format!("the fork was broken off: {error}")))?;
    Ok(Json(forked?))
}

async fn park(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<VmView>> {
    let row = state.meta.vm(&vm).await?;
    let (of_task, id) = (state.clone(), row.id);
    let task = state.tasks.spawn(async move { of_task.host.park(id).await });
    task.await.map_err(|error| Error::internal(format!("parking was broken off: {error}")))??;
    state.kick.notify_one();
    let parked = state.when(|seen| {
        let over = seen.vms.iter().find(|vm| vm.id == id).is_none_or(|vm| burgeon_plan::vm::is_over(&vm.observed));
        over.then_some(Ok(()))
    });
    parked.await?;
    Ok(Json(state.view(row)))
}

async fn receipt(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<Receipt>> {
    let row = state.meta.vm(&vm).await?;
    let is_activation = row.source.as_ref().is_some_and(|source| source.begin.is_activation());
    let found = async {
        loop {
            let looks = state.seen.borrow().looks;
            let view = state.view(row.clone());
            let is_over = burgeon_plan::vm::is_over(&view.observed);
            // What the host tells may not be kept yet.
            if let Some(receipt) = view.on_host.and_then(|vm| vm.receipt) {
                return Ok(receipt);
            }
            match state.meta.receipts(&row.id.to_string()).await?.pop() {
                Some(kept) => return Ok(kept.receipt),
                None if is_over || !is_activation => return Err(has_none(&row.name)),
                // It has just been made, and what it has shown is seen at the next look.
                None => state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?,
            }
        }
    };
    state.kick.notify_one();
    let receipt = timeout(SHOWN, found).await.map_err(|_| has_none(&row.name))??;
    Ok(Json(receipt))
}

async fn receipts(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<Vec<KeptReceipt>>> {
    // Of the VM that there is; a name may have been another's before.
    let key = match state.meta.vm(&vm).await {
        Ok(row) => row.id.to_string(),
        Err(error) if error.kind == ErrorKind::NotFound => vm,
        Err(error) => return Err(error.into()),
    };
    let kept = state.meta.receipts(&key).await?;
    if kept.is_empty() {
        return Err(has_none(&burgeon_api::path_text::printable(&key)).into());
    }
    Ok(Json(kept))
}

fn has_none(name: &str) -> Error {
    Error::not_found(format!("VM {name} has no receipt"))
        .with_hint("VMs that were forked, or go on from a substrate, have one")
}
