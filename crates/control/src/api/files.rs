//! Files inside VMs.

use axum::{
    Json,
    body::Body,
    extract::{Path, Query, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use burgeon_api::{
    Error, Result,
    host::{FileKind, FileRequest, Reply},
    http::GuestFile,
    path_text, recipe,
};
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::{Answer, Routes};
use crate::{host_client::finish_put, state::Shared};

const QUERY: &[(&str, &str)] = &[
    ("path", "absolute path inside the VM"),
    ("path_escaped", "`true`: the path holds %XX for bytes that are not UTF-8"),
    ("mode", "permission bits in octal, for what is made"),
];

pub(super) fn add(routes: &mut Routes) {
    let entries = routes.schema::<Vec<GuestFile>>();
    routes
        .add("get", "/v1/vms/{vm}/files", "The content of a file; its mode is in the header burgeon-mode", get)
        .query(QUERY)
        .kind("application/octet-stream");
    routes.add("put", "/v1/vms/{vm}/files", "Write a file as a whole; needs Content-Length", put).query(QUERY);
    routes.add("get", "/v1/vms/{vm}/directories", "The entries of a directory", list).query(QUERY).gives(entries);
    routes.add("put", "/v1/vms/{vm}/directories", "Make a directory and those above it", make).query(QUERY);
}

#[derive(Deserialize)]
struct PathQuery {
    path: String,
    #[serde(default)]
    path_escaped: bool,
    mode: Option<String>,
}

impl PathQuery {
    fn bytes(&self) -> Result<Vec<u8>> {
        let path = path_text::decode(&self.path, self.path_escaped);
        if path.first() != Some(&b'/') || path.contains(&0) {
            return Err(Error::invalid(format!("\"{}\" is no absolute path", path_text::printable(&self.path))));
        }
        Ok(path)
    }

    fn mode(&self, default: u32) -> Result<u32> {
        self.mode.as_deref().map_or(Ok(default), recipe::octal_mode)
    }
}

async fn get(State(state): State<Shared>, Path(vm): Path<String>, Query(query): Query<PathQuery>) -> Answer<Response> {
    let id = state.meta.vm(&vm).await?.id;
    let in_use = state.uses.begin(id);
    state.uses.settled(id).await;
    match state.host.file(id, FileRequest::Get { path: query.bytes()? }).await? {
        (Reply::Content { mode, size }, stream) => {
            let headers = [
                (header::CONTENT_TYPE, "application/octet-stream".to_string()),
                (header::CONTENT_LENGTH, size.to_string()),
                (header::HeaderName::from_static("burgeon-mode"), format!("{mode:o}")),
            ];
            let content = ReaderStream::with_capacity(stream, 64 << 10).inspect(move |_| {
                // Until its last byte.
                let _used = &in_use;
            });
            Ok((headers, Body::from_stream(content)).into_response())
        }
        (other, _) => Err(Error::internal(format!("the host process answered {other:?}")).into()),
    }
}

async fn put(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Query(query): Query<PathQuery>,
    headers: HeaderMap,
    body: Body,
) -> Answer<()> {
    let id = state.meta.vm(&vm).await?.id;
    let size: u64 = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .ok_or_else(|| Error::invalid("a file is put with its Content-Length"))?;
    let request = FileRequest::Put { path: query.bytes()?, mode: query.mode(0o644)?, size };
    let _in_use = state.uses.begin(id);
    state.uses.settled(id).await;
    let mut stream = state.host.connect_put(id, request).await?;
    let mut body = body.into_data_stream();
    while let Some(data) = body.next().await {
        let data = data.map_err(|error| Error::invalid(format!("the file broke off: {error}")))?;
        if stream.write_all(&data).await.is_err() {
            // The host has refused; its reason is in the reply.
            break;
        }
    }
    Ok(finish_put(&mut stream).await?)
}

async fn list(
    State(state): State<Shared>,
    Path(vm): Path<String>,
    Query(query): Query<PathQuery>,
) -> Answer<Json<Vec<GuestFile>>> {
    let id = state.meta.vm(&vm).await?.id;
    match state.host.file(id, FileRequest::List { path: query.bytes()? }).await?.0 {
        Reply::Entries(entries) => Ok(Json(
            entries
                .into_iter()
                .map(|entry| {
                    let (name, name_escaped) = path_text::encode(&entry.name);
                    let kind = match entry.kind {
                        FileKind::File => "file",
                        FileKind::Directory => "directory",
                        FileKind::Link => "link",
                        FileKind::Other => "other",
                    };
                    GuestFile { name, name_escaped, kind: kind.to_string(), mode: entry.mode, size: entry.size }
                })
                .collect(),
        )),
        other => Err(Error::internal(format!("the host process answered {other:?}")).into()),
    }
}

async fn make(State(state): State<Shared>, Path(vm): Path<String>, Query(query): Query<PathQuery>) -> Answer<()> {
    let id = state.meta.vm(&vm).await?.id;
    match state.host.file(id, FileRequest::MakeDirectory { path: query.bytes()?, mode: query.mode(0o755)? }).await?.0 {
        Reply::Done => Ok(()),
        other => Err(Error::internal(format!("the host process answered {other:?}")).into()),
    }
}
