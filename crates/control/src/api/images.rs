//! Images.

use axum::{
    Json,
    extract::{Path, State},
    response::Response,
};
use burgeon_api::{
    ByteSize, Error,
    differences::DiffImage,
    http::{BuildImage, CommitImage, ExportImage, ImportImage, Progress},
    image::ImageView,
    remote::{ListRemote, PullImage, PushImage, RemoteImage},
};

use burgeon_image::Stored;

use super::{Answer, Routes, lines};
use crate::state::{Busy, Shared, blocking};

pub(super) fn add(routes: &mut Routes) {
    let (one, many, progress) =
        (routes.schema::<ImageView>(), routes.schema::<Vec<ImageView>>(), routes.schema::<Progress>());
    let (export_body, diff_body) = (routes.schema::<ExportImage>(), routes.schema::<DiffImage>());
    let (build_body, import_body) = (routes.schema::<BuildImage>(), routes.schema::<ImportImage>());
    routes.add("get", "/v1/images", "All images", list).gives(many);
    routes.add("get", "/v1/images/{image}", "One image", show).gives(one);
    routes.add("delete", "/v1/images/{image}", "Remove an image; VMs made from it go on", remove);
    routes
        .add("post", "/v1/images/build", "Build an image from a recipe; closing the connection cancels", build)
        .takes(build_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    routes
        .add(
            "post",
            "/v1/images/import",
            "Make an image of a raw, qcow2 or tar file, or of an OCI image layout",
            import,
        )
        .takes(import_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    let commit_body = routes.schema::<CommitImage>();
    routes
        .add("post", "/v1/images/commit", "Make an image of a VM's root disk; the VM goes on", commit)
        .takes(commit_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    routes
        .add("post", "/v1/images/{image}/export", "Write an image's disk to a raw file", export)
        .takes(export_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    let (push_body, pull_body) = (routes.schema::<PushImage>(), routes.schema::<PullImage>());
    let (remote_body, remote_images) = (routes.schema::<ListRemote>(), routes.schema::<Vec<RemoteImage>>());
    routes
        .add("post", "/v1/images/{image}/push", "Copy an image to a remote; only what is not there is sent", push)
        .takes(push_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    routes
        .add("post", "/v1/images/pull", "Copy an image from a remote; only what is not here is read", pull)
        .takes(pull_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    routes.add("post", "/v1/images/remote", "The images of a remote", remote).takes(remote_body).gives(remote_images);
    routes
        .add("post", "/v1/images/{image}/diff", "Compare an image with another one", diff)
        .takes(diff_body)
        .gives(progress.clone())
        .kind("application/x-ndjson");
    routes
        .add("post", "/v1/images/{image}/verify", "Read all of an image and compare it with its names", verify)
        .gives(progress)
        .kind("application/x-ndjson");
}

async fn views(state: &Shared) -> Result<Vec<ImageView>, Error> {
    let data = state.data_paths();
    let stored = blocking("list images", move || burgeon_image::list(&data)).await?;
    let rows = state.meta.vms().await?;
    let view = |stored| {
        let (name, image, stored, problem) = match stored {
            Stored::Good { image, stored } => (image.name.clone(), Some(image), stored, None),
            Stored::Broken { name, error } => (name, None, ByteSize::default(), Some(error.to_string())),
        };
        let used_by = rows.iter().filter(|row| row.image == name).map(|row| row.name.clone()).collect();
        ImageView { name, image, stored, problem, used_by }
    };
    Ok(stored.into_iter().map(view).collect())
}

async fn list(State(state): State<Shared>) -> Answer<Json<Vec<ImageView>>> {
    Ok(Json(views(&state).await?))
}

async fn show(State(state): State<Shared>, Path(image): Path<String>) -> Answer<Json<ImageView>> {
    // Says what is wrong with a broken one.
    state.image(image.clone()).await?;
    let found = views(&state).await?.into_iter().find(|view| view.name == image);
    Ok(Json(found.ok_or_else(|| Error::not_found(format!("image {image} has just been removed")))?))
}

async fn remove(State(state): State<Shared>, Path(image): Path<String>) -> Answer<()> {
    let data = state.data_paths();
    blocking("remove the image", move || burgeon_image::remove(&data, &image)).await?;
    if let Err(error) = crate::disks::let_go(&state.store, &state.data_paths()).await {
        tracing::warn!(%error, "the disk of a removed image is kept for now");
    }
    Ok(())
}

async fn export(
    State(state): State<Shared>,
    Path(image): Path<String>,
    Json(request): Json<ExportImage>,
) -> Answer<Response> {
    let image = state.image(image).await?;
    Ok(lines(crate::export::export(&state, image, request)?, Busy::new(&state.busy)))
}

async fn diff(
    State(state): State<Shared>,
    Path(image): Path<String>,
    Json(request): Json<DiffImage>,
) -> Answer<Response> {
    let (a, b) = (state.image(image).await?, state.image(request.other.clone()).await?);
    Ok(lines(crate::differences::differences(&state, a, b, &request)?, Busy::new(&state.busy)))
}

async fn push(
    State(state): State<Shared>,
    Path(image): Path<String>,
    Json(request): Json<PushImage>,
) -> Answer<Response> {
    let image = state.image(image).await?;
    Ok(lines(crate::remotes::push(&state, image, request)?, Busy::new(&state.busy)))
}

async fn pull(State(state): State<Shared>, Json(request): Json<PullImage>) -> Answer<Response> {
    burgeon_api::name::check("image", &request.name)?;
    Ok(lines(crate::remotes::pull(&state, request), Busy::new(&state.busy)))
}

async fn remote(Json(request): Json<ListRemote>) -> Answer<Json<Vec<RemoteImage>>> {
    Ok(Json(crate::remotes::list(request.remote).await?))
}

async fn verify(State(state): State<Shared>, Path(image): Path<String>) -> Answer<Response> {
    let image = state.image(image).await?;
    Ok(lines(crate::export::verify(&state, image), Busy::new(&state.busy)))
}

async fn build(State(state): State<Shared>, Json(request): Json<BuildImage>) -> Answer<Response> {
    let receiver = crate::images::build(&state, &request)?;
    Ok(lines(receiver, Busy::new(&state.busy)))
}

async fn commit(State(state): State<Shared>, Json(request): Json<CommitImage>) -> Answer<Response> {
    burgeon_api::name::check("image", &request.name)?;
    Ok(lines(crate::commit::commit(&state, request).await?, Busy::new(&state.busy)))
}

async fn import(State(state): State<Shared>, Json(request): Json<ImportImage>) -> Answer<Response> {
    burgeon_api::name::check("image", &request.name)?;
    Ok(lines(crate::images::import(&state, request), Busy::new(&state.busy)))
}
