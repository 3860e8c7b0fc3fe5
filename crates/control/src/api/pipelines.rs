//! Runs of pipelines.

use axum::{
    Json,
    extract::{Path, State},
    response::Response,
};
use burgeon_api::{Error, PipelineId, http::RunPipeline, pipeline::PipelineView};
use tokio::sync::mpsc;

use super::{Answer, Routes, lines};
use crate::{
    pipelines,
    state::{Busy, Shared},
};

pub(super) fn add(routes: &mut Routes) {
    let (one, many, run) =
        (routes.schema::<PipelineView>(), routes.schema::<Vec<PipelineView>>(), routes.schema::<RunPipeline>());
    routes.add("get", "/v1/pipelines", "All runs, oldest first", list).gives(many);
    routes.add("post", "/v1/pipelines", "Begin a run", start).takes(run).gives(one.clone());
    routes.add("get", "/v1/pipelines/{run}", "One run", show).gives(one.clone());
    routes
        .add("get", "/v1/pipelines/{run}/watch", "The run at every change, until it is over", watch)
        .gives(one)
        .kind("application/x-ndjson");
    routes.add("post", "/v1/pipelines/{run}/cancel", "End the run and remove its VMs", cancel);
}

async fn list(State(state): State<Shared>) -> Answer<Json<Vec<PipelineView>>> {
    Ok(Json(pipelines::all(&state).await?))
}

async fn start(State(state): State<Shared>, Json(request): Json<RunPipeline>) -> Answer<Json<PipelineView>> {
    Ok(Json(pipelines::start(&state, request).await?))
}

async fn find(state: &Shared, run: &str) -> Result<PipelineView, Error> {
    let missing = || {
        Error::not_found(format!("there is no run \"{}\"", burgeon_api::path_text::printable(run)))
            .with_hint("burgeon pipeline ls lists the runs there are")
    };
    if let Ok(id) = run.parse::<PipelineId>() {
        return pipelines::find(state, id).await?.ok_or_else(missing);
    }
    // The short form of the tables.
    let all = pipelines::all(state).await?;
    all.into_iter().find(|view| view.id.short() == run).ok_or_else(missing)
}

async fn show(State(state): State<Shared>, Path(run): Path<String>) -> Answer<Json<PipelineView>> {
    Ok(Json(find(&state, &run).await?))
}

async fn watch(State(state): State<Shared>, Path(run): Path<String>) -> Answer<Response> {
    let view = find(&state, &run).await?;
    let (sender, receiver) = mpsc::channel(4);
    let watched = state.pipelines.watch(view.id);
    tokio::spawn(async move {
        let Some(mut watched) = watched else {
            // Over: one line tells it all.
            drop(sender.send(view).await);
            return;
        };
        loop {
            let now = watched.borrow_and_update().clone();
            let over = now.state.is_over();
            if sender.send(now).await.is_err() || over || watched.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(lines(receiver, Busy::new(&state.busy)))
}

async fn cancel(State(state): State<Shared>, Path(run): Path<String>) -> Answer<()> {
    let view = find(&state, &run).await?;
    if view.state.is_over() || !state.pipelines.cancel(view.id) {
        return Err(Error::conflict(format!("run {} is over ({})", view.id.short(), view.state.name())).into());
    }
    Ok(())
}
