//! The server itself.

use axum::{Json, extract::State};
use burgeon_api::{host::Reply, http::ServerView};

use super::{Answer, Routes};
use crate::state::Shared;

pub(super) fn add(routes: &mut Routes) {
    let schema = routes.schema::<ServerView>();
    routes.add("get", "/v1/server", "Who serves, and what runs the VMs", show).gives(schema);
    routes.add("get", "/v1/openapi.json", "This document", openapi);
}

async fn show(State(state): State<Shared>) -> Answer<Json<ServerView>> {
    let mut all = state.settings.clone();
    let (host_pid, accelerator, accelerator_reason) = match state.host.hello().await {
        Ok(Reply::Hello { pid, accelerator, accelerator_reason, settings, .. }) => {
            all.extend(settings);
            (Some(pid), Some(accelerator), accelerator_reason)
        }
        Ok(_) => (None, None, "the host process gave a strange answer".to_string()),
        Err(error) => (None, None, error.to_string()),
    };
    Ok(Json(ServerView {
        version: state.version.clone(),
        control_pid: std::process::id(),
        host_pid,
        accelerator,
        accelerator_reason,
        data_directory: state.layout.data.display().to_string(),
        settings: all,
    }))
}

async fn openapi() -> Json<serde_json::Value> {
    Json(super::routes().1)
}
