//! The store.

use axum::{Json, extract::State, response::Response};
use burgeon_api::{
    http::{Progress, ScrubStore},
    store::StoreView,
};

use super::{Answer, Routes, lines};
use crate::state::{Busy, Shared};

const LINES: &str = "application/x-ndjson";

pub(super) fn add(routes: &mut Routes) {
    let (view, progress) = (routes.schema::<StoreView>(), routes.schema::<Progress>());
    let scrub_body = routes.schema::<ScrubStore>();
    routes.add("get", "/v1/store", "What is stored, and how much room it takes", show).gives(view);
    routes
        .add("post", "/v1/store/gc", "Delete what nothing keeps any more; closing the connection cancels", gc)
        .gives(progress.clone())
        .kind(LINES);
    routes
        .add("post", "/v1/store/scrub", "Read everything and compare it with its names", scrub)
        .takes(scrub_body)
        .gives(progress.clone())
        .kind(LINES);
    routes.add("post", "/v1/store/fsck", "Check that all that is kept can be found", fsck).gives(progress).kind(LINES);
}

async fn show(State(state): State<Shared>) -> Answer<Json<StoreView>> {
    Ok(Json(crate::store::view(&state).await?))
}

async fn gc(State(state): State<Shared>) -> Answer<Response> {
    Ok(lines(crate::store::collect(&state)?, Busy::new(&state.busy)))
}

async fn scrub(State(state): State<Shared>, Json(request): Json<ScrubStore>) -> Answer<Response> {
    Ok(lines(crate::store::scrub(&state, &request)?, Busy::new(&state.busy)))
}

async fn fsck(State(state): State<Shared>) -> Answer<Response> {
    Ok(lines(crate::store::fsck(&state)?, Busy::new(&state.busy)))
}
