//! The HTTP API: one table of routes, from which both the router and the OpenAPI document are made.

mod bundles;
mod disks;
mod files;
mod images;
mod pipelines;
mod server;
mod snapshots;
mod store;
mod streams;
mod substrates;
mod vms;

use axum::{
    Json, Router,
    body::Body,
    handler::Handler,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter, on},
};
use burgeon_api::Error;
use bytes::Bytes;
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use crate::state::Shared;

/// What a handler answers when it refuses.
pub(crate) struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

pub(crate) type Answer<T> = Result<T, Refusal>;

/// One route, as the OpenAPI document tells it.
struct Told {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    request: Option<Schema>,
    response: Option<Schema>,
    kind: &'static str,
    query: &'static [(&'static str, &'static str)],
}

/// Routes under construction.
pub(crate) struct Routes {
    router: Router<Shared>,
    told: Vec<Told>,
    schemas: SchemaGenerator,
}

impl Routes {
    fn add<H, T>(&mut self, method: &'static str, path: &'static str, summary: &'static str, handler: H) -> &mut Told
    where
        H: Handler<T, Shared>,
        T: 'static,
    {
        let filter = match method {
            "post" => MethodFilter::POST,
            "put" => MethodFilter::PUT,
            "delete" => MethodFilter::DELETE,
            _ => MethodFilter::GET,
        };
        let route: MethodRouter<Shared> = on(filter, handler);
        self.router = std::mem::take(&mut self.router).route(path, route);
        self.told.push(Told {
            method,
            path,
            summary,
            request: None,
            response: None,
            kind: "application/json",
            query: &[],
        });
        let last = self.told.len() - 1;
        &mut self.told[last]
    }

    fn schema<T: JsonSchema>(&mut self) -> Schema {
        self.schemas.subschema_for::<T>()
    }
}

impl Told {
    fn takes(&mut self, schema: Schema) -> &mut Self {
        self.request = Some(schema);
        self
    }
    fn gives(&mut self, schema: Schema) -> &mut Self {
        self.response = Some(schema);
        self
    }
    /// The media type of the answer, where it is not JSON.
    fn kind(&mut self, kind: &'static str) -> &mut Self {
        self.kind = kind;
        self
    }
    fn query(&mut self, query: &'static [(&'static str, &'static str)]) -> &mut Self {
        self.query = query;
        self
    }
}

/// The way in which a stream of exec frames, console bytes or VNC is opened.
pub(crate) const UPGRADE: &str = "burgeon-stream";

/// The router, and the OpenAPI 3.1 document of what it serves.
pub(crate) fn routes() -> (Router<Shared>, Value) {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut routes = Routes { router: Router::new(), told: Vec::new(), schemas: settings.into_generator() };
    server::add(&mut routes);
    snapshots::add(&mut routes);
    bundles::add(&mut routes);
    substrates::add(&mut routes);
    vms::add(&mut routes);
    disks::add(&mut routes);
    streams::add(&mut routes);
    files::add(&mut routes);
    images::add(&mut routes);
    store::add(&mut routes);
    pipelines::add(&mut routes);
    let router = std::mem::take(&mut routes.router).fallback(no_such_route);
    (router, document(routes))
}

async fn no_such_route(request: axum::extract::Request) -> Refusal {
    let what = format!("{} {}", request.method(), request.uri().path());
    Refusal(
        Error::not_found(format!("there is no {}", burgeon_api::path_text::printable(&what)))
            .with_hint("GET /v1/openapi.json tells what there is"),
    )
}

fn document(mut routes: Routes) -> Value {
    let error = routes.schema::<Error>();
    let mut paths: Map<String, Value> = Map::new();
    for told in &routes.told {
        let parameters: Vec<Value> = told
            .path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
            .chain(told.query.iter().map(|(name, description)| {
                json!({"name": name, "in": "query", "description": description, "schema": {"type": "string"}})
            }))
            .collect();
        let good = match (told.kind, &told.response) {
            (UPGRADE, _) => json!({"101": {"description": "the connection goes on as a stream"}}),
            (kind, Some(schema)) => json!({"200": {"description": "done", "content": {kind: {"schema": schema}}}}),
            ("application/json", None) => json!({"200": {"description": "done"}}),
            (kind, None) => json!({"200": {"description": "done", "content": {kind: {}}}}),
        };
        let mut responses = good;
        responses["default"] = json!({"description": "refused", "content": {"application/json": {"schema": error}}});
        let mut operation = json!({"summary": told.summary, "parameters": parameters, "responses": responses});
        if let Some(schema) = &told.request {
            operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        }
        let entry = paths.entry(told.path.to_string()).or_insert_with(|| json!({}));
        entry[told.method] = operation;
    }
    let schemas = routes.schemas.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Burgeon",
            "version": "1",
            "description": "The API of burgeon control, on the unix socket control.sock of the data directory.",
            "license": {"name": "Apache-2.0 OR MIT"},
        },
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// A stream of JSON lines from a channel; it ends with the channel.
fn lines<T: serde::Serialize + Send + 'static>(receiver: mpsc::Receiver<T>, guard: impl Send + 'static) -> Response {
    let stream = futures_util::stream::unfold((receiver, guard), |(mut receiver, guard)| async {
        let item = receiver.recv().await?;
        let mut line = serde_json::to_vec(&item).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<Bytes, std::convert::Infallible>(line.into()), (receiver, guard)))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response()
}

/// The OpenAPI document as it is committed.
pub fn openapi() -> String {
    let mut text = serde_json::to_string_pretty(&routes().1).unwrap_or_default();
    text.push('\n');
    text
}
