//! VMs.

use std::time::Duration;

use axum::{
    Json,
    extract::{Path, Query, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use burgeon_api::{
    Error, ErrorKind, Result,
    http::{CreateVm, StopVm},
    image::Boot,
    life::{Life, SetLife},
    vm::{Figures, Intent, Observed, Resize, Resized, VmView},
};
use burgeon_host::stop_mode;
use burgeon_plan::vm::{Start, is_over};
use burgeon_store::meta::VmRow;
use serde::Deserialize;
use tokio::time::timeout;

use super::{Answer, Routes};
use crate::{
    state::{Shared, now_s},
    substrates,
};

/// How long a request waits for a VM to come up or to vanish.
const LONGEST_WAIT: Duration = Duration::from_secs(180);

pub(super) fn add(routes: &mut Routes) {
    let (one, many) = (routes.schema::<VmView>(), routes.schema::<Vec<VmView>>());
    let (create, stop_body, figure) =
        (routes.schema::<CreateVm>(), routes.schema::<StopVm>(), routes.schema::<Figures>());
    routes.add("get", "/v1/vms", "All VMs", list).gives(many);
    routes.add("post", "/v1/vms", "Create a VM and start it", make).takes(create).gives(one.clone());
    routes.add("get", "/v1/vms/{vm}", "One VM, by name or id; its version is the ETag", show).gives(one.clone());
    routes
        .add("get", "/v1/vms/{vm}/wait", "Wait until the VM runs, or has ended", wait)
        .query(&[("for", "`running` (or ended; the default) or `ended`")])
        .gives(one.clone());
    routes.add("delete", "/v1/vms/{vm}", "End the VM and remove all of it; honours If-Match", remove);
    routes
        .add("post", "/v1/vms/{vm}/stop", "Ask the guest to power off, or end it", stop)
        .takes(stop_body)
        .gives(one.clone());
    routes
        .add(
            "post",
            "/v1/vms/{vm}/start",
            "Start a VM that has stopped, with its disk; one that runs stays as it is",
            start,
        )
        .gives(one.clone());
    routes
        .add("post", "/v1/vms/{vm}/pause", "Have a running VM stand still, with all that it has in memory", pause)
        .gives(one.clone());
    routes.add("post", "/v1/vms/{vm}/resume", "Let a paused VM go on, with the right time", resume).gives(one.clone());
    let (size_body, resized) = (routes.schema::<Resize>(), routes.schema::<Resized>());
    routes
        .add(
            "post",
            "/v1/vms/{vm}/size",
            "Change how much memory and how many CPUs a VM has; of one that has stopped, from its next start on",
            resize,
        )
        .takes(size_body)
        .gives(resized);
    let life_body = routes.schema::<SetLife>();
    routes
        .add("post", "/v1/vms/{vm}/life", "Set when the VM is removed or parked by itself", set_life)
        .takes(life_body)
        .gives(one);
    routes.add("post", "/v1/vms/{vm}/freeze", "Freeze the guest's workload", freeze);
    routes.add("post", "/v1/vms/{vm}/thaw", "Thaw the guest's workload", thaw);
    routes.add("get", "/v1/vms/{vm}/figures", "Load and memory, as the guest reads them", figures).gives(figure);
    routes.add("get", "/v1/vms/{vm}/log", "What the guest wrote to its console", log).kind("application/octet-stream");
}

async fn list(State(state): State<Shared>) -> Answer<Json<Vec<VmView>>> {
    let vms = state.views().await?;
    Ok(Json(vms.into_iter().filter(|vm| !vm.is_substrate).collect()))
}

async fn make(State(state): State<Shared>, Json(request): Json<CreateVm>) -> Answer<Json<VmView>> {
    let name = match request.name {
        Some(name) => name,
        None => format!("{}-{}", request.image, request.id.short()),
    };
    let now = now_s();
    let life = Life::default().set(&request.life, now);
    let row = VmRow { life, ..VmRow::new(request.id, name, request.image, request.profile, now) };
    if !request.provisions.is_empty() && state.image(row.image.clone()).await?.boot != Boot::Agent {
        let what = format!("image {} has no agent, and its VMs take no environment, files or secrets", row.image);
        return Err(Error::refused(what).into());
    }
    if row.profile.max_cpus.is_some() && state.image(row.image.clone()).await?.boot != Boot::Agent {
        let what = format!("image {} has no agent, and its VMs take no max_cpus", row.image);
        return Err(Error::refused(what).with_hint("give it all its CPUs at once: cpus").into());
    }
    let mut rows = substrates::provided(&state, vec![row], &request.provisions).await?;
    let row = rows.pop().ok_or_else(|| Error::internal("no VM was recorded"))?;
    Ok(Json(state.view(row)))
}

async fn show(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Response> {
    let view = state.view(state.meta.vm(&vm).await?);
    let tag = format!("\"{}\"", view.version);
    Ok(([(header::ETAG, tag)], Json(view)).into_response())
}

#[derive(Deserialize)]
struct WaitQuery {
    #[serde(rename = "for")]
    what: Option<String>,
}

async fn wait(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Answer<Json<VmView>> {
    let row = state.meta.vm(&vm).await?;
    let (id, name) = (row.id, row.name);
    let for_end = query.what.as_deref() == Some("ended");
    let reached = async {
        loop {
            let looks = state.seen.borrow().looks;
            let view = state.view(state.meta.vm(&id.to_string()).await?);
            if is_over(&view.observed) || (is_up(&view.observed) && !for_end) {
                return Ok::<VmView, Error>(view);
            }
            state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?;
        }
    };
    let view = timeout(LONGEST_WAIT, reached)
        .await
        .map_err(|_| Error::deadline(format!("VM {name} is not there after {} s", LONGEST_WAIT.as_secs())))??;
    Ok(Json(view))
}

fn is_up(observed: &Observed) -> bool {
    matches!(observed, Observed::Running | Observed::Paused)
}

/// The version in an If-Match header.
fn expected(headers: &HeaderMap) -> Result<Option<u64>> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim_matches('"');
    text.parse().map(Some).map_err(|_| Error::invalid("If-Match holds no version of a VM"))
}

pub(super) async fn remove(State(state): State<Shared>, Path(vm): Path<String>, headers: HeaderMap) -> Answer<()> {
    let row = match state.meta.vm(&vm).await {
        Err(error) if error.kind == ErrorKind::Damaged => return Ok(remove_damaged(&state, &vm).await?),
        row => row?,
    };
    substrates::check_removal(&state, &row).await?;
    state.intend(row.id, Intent::Removed, expected(&headers)?).await?;
    let vanished = async {
        loop {
            let looks = state.seen.borrow().looks;
            match state.meta.vm(&row.id.to_string()).await {
                Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?;
        }
    };
    timeout(LONGEST_WAIT, vanished)
        .await
        .map_err(|_| Error::deadline(format!("VM {} is still being removed", row.name)))??;
    Ok(())
}

/// The reconcile loop leaves a VM alone whose row does not read; its user need not.
async fn remove_damaged(state: &Shared, vm: &str) -> Result<()> {
    let (_, damaged) = state.meta.all_vms().await?;
    for row in damaged.into_iter().filter(|row| row.id == vm || row.name == vm) {
        if let Ok(id) = row.id.parse() {
            state.host.remove(id).await?;
        }
        tracing::warn!(id = %row.id, name = %row.name, "removed on request, with its damaged row");
        state.meta.forget_damaged_vm(row.id).await?;
    }
    state.kick.notify_one();
    Ok(())
}

async fn stop(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<StopVm>,
) -> Answer<Json<VmView>> {
    let row = state.meta.vm(&vm).await?;
    if !request.force && state.view(row.clone()).observed == Observed::Paused {
        // Wanted stopped, it would stop some time later, when somebody resumes it.
        return Err(Error::conflict(format!("VM {} is paused, and its guest cannot be asked to stop", row.name))
            .with_hint(format!("burgeon vm resume {0}, or end it by force: burgeon vm stop --force {0}", row.name))
            .into());
    }
    let row = state.meta.set_intent(row.id, Intent::Stopped, None).await?;
    let outcome = state.host.stop(row.id, stop_mode(request.force)).await;
    state.kick.notify_one();
    outcome?;
    let id = row.id;
    let ended = state.when(|seen| {
        let over = seen.vms.iter().find(|vm| vm.id == id).is_none_or(|vm| is_over(&vm.observed));
        over.then_some(Ok(()))
    });
    timeout(Duration::from_secs(10), ended).await.map_err(|_| Error::deadline("the VM has not ended"))??;
    Ok(Json(state.view(state.meta.vm(&id.to_string()).await?)))
}

async fn start(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<VmView>> {
    loop {
        let row = state.meta.vm(&vm).await?;
        let view = state.view(row.clone());
        let row = match burgeon_plan::vm::start(&view.name, view.intent, &view.observed, row.launched)? {
            Start::Nothing => return Ok(Json(view)),
            Start::First => state.intend(row.id, Intent::Running, None).await?,
            Start::Again => match state.meta.start_again(row, None).await {
                // Somebody else was quicker: what they did decides.
                Err(error) if error.kind == ErrorKind::Conflict => continue,
                outcome => outcome?,
            },
        };
        state.kick.notify_one();
        return Ok(Json(state.view(row)));
    }
}

async fn set_life(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<SetLife>,
) -> Answer<Json<VmView>> {
    let row = state.meta.vm(&vm).await?;
    if row.substrate.is_some() {
        return Err(Error::refused(format!("{} is a substrate, and stays until it is removed", row.name)).into());
    }
    let now = now_s();
    let row = state.meta.set_life(row.id, move |life| life.set(&request, now)).await?;
    state.kick.notify_one();
    Ok(Json(state.view(row)))
}

async fn resize(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Json(request): Json<Resize>,
) -> Answer<Json<Resized>> {
    let row = state.meta.vm(&vm).await?;
    if row.substrate.is_some() {
        return Err(Error::refused(format!("{} is a substrate, and others go on from it as it is", row.name))
            .with_hint(format!("give each its own size: burgeon vm create -s {} --memory SIZE --cpus N", row.name))
            .into());
    }
    let (id, of_task) = (row.id, state.clone());
    // Goes on to its end, whether or not the client waits for it.
    let task = state.tasks.spawn(async move { of_task.host.resize(id, request).await });
    let resized = task.await.map_err(|error| Error::internal(format!("it was broken off: {error}")))??;
    state.kick.notify_one();
    // Who looks next sees it, unless the guest changes meanwhile.
    let seen = state.when(|seen| {
        let size = seen.vms.iter().find(|vm| vm.id == id).and_then(|vm| vm.size);
        (size == Some(resized.size)).then_some(Ok(()))
    });
    drop(timeout(Duration::from_secs(2), seen).await);
    Ok(Json(resized))
}

async fn pause(state: State<Shared>, vm: Path<String>) -> Answer<Json<VmView>> {
    set_paused(state, vm, true).await
}

async fn resume(state: State<Shared>, vm: Path<String>) -> Answer<Json<VmView>> {
    set_paused(state, vm, false).await
}

async fn set_paused(State(state): State<Shared>, Path(vm): Path<String>, paused: bool) -> Answer<Json<VmView>> {
    let row = state.meta.vm(&vm).await?;
    let (id, name) = (row.id, row.name);
    if row.substrate.is_some() {
        return Err(Error::refused(format!("{name} is a substrate, or is to become one")).into());
    }
    let of_task = state.clone();
    // Goes on to its end, whether or not the client waits for it.
    let task = state.tasks.spawn(async move { of_task.host.pause(id, paused).await });
    task.await.map_err(|error| Error::internal(format!("it was broken off: {error}")))??;
    state.kick.notify_one();
    let done = state.when(|seen| {
        let observed = seen.vms.iter().find(|vm| vm.id == id).map(|vm| &vm.observed);
        let reached = observed.is_none_or(|seen| is_over(seen) || (*seen == Observed::Paused) == paused);
        reached.then_some(Ok(()))
    });
    timeout(Duration::from_secs(10), done)
        .await
        .map_err(|_| Error::deadline(format!("VM {name} is not seen so")))??;
    Ok(Json(state.view(state.meta.vm(&id.to_string()).await?)))
}

async fn freeze(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<()> {
    let row = state.meta.vm(&vm).await?;
    Ok(state.host.freeze(row.id, true).await?)
}

async fn thaw(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<()> {
    let row = state.meta.vm(&vm).await?;
    Ok(state.host.freeze(row.id, false).await?)
}

async fn figures(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Json<Figures>> {
    let row = state.meta.vm(&vm).await?;
    Ok(Json(state.host.figures(row.id).await?))
}

async fn log(State(state): State<Shared>, Path(vm): Path<String>) -> Answer<Response> {
    let row = state.meta.vm(&vm).await?;
    let text = state.host.log(row.id).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], text).into_response())
}
