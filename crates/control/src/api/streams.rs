//! Streams to a VM: commands, console, screen. The connection is upgraded and its bytes go to the
//! host process and back, unread.

use axum::{
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use burgeon_api::{
    Error,
    exec::{Attach, Frame},
    host,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{Answer, Routes, UPGRADE};
use crate::{
    state::{Busy, Shared},
    substrates,
};

/// The largest description of a command.
const MOST_ATTACH: u32 = 2 << 20;

pub(super) fn add(routes: &mut Routes) {
    routes
        .add(
            "post",
            "/v1/vms/{vm}/exec",
            "Run a command: after the upgrade the client sends a length (u32, little-endian) and the Attach as JSON, then frames go both ways",
            exec,
        )
        .kind(UPGRADE);
    routes.add("post", "/v1/vms/{vm}/console", "The serial console, as raw bytes", console).kind(UPGRADE);
    routes.add("post", "/v1/vms/{vm}/display", "The screen, by the VNC protocol", display).kind(UPGRADE);
}

pub(super) fn check_upgrade(request: &Request) -> Result<(), Error> {
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if asked == Some(UPGRADE) {
        return Ok(());
    }
    Err(Error::invalid("this route needs the header Upgrade: burgeon-stream"))
}

pub(super) fn switching() -> Response {
    (StatusCode::SWITCHING_PROTOCOLS, [(header::CONNECTION, "upgrade"), (header::UPGRADE, UPGRADE)]).into_response()
}

type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

async fn exec(State(state): State<Shared>, Path(vm): Path<String>, mut request: Request) -> Answer<Response> {
    check_upgrade(&request)?;
    let id = state.meta.vm(&vm).await?.id;
    let upgrade = hyper::upgrade::on(&mut request);
    let busy = (Busy::new(&state.busy), state.uses.begin(id));
    state.tasks.clone().spawn(async move {
        let Ok(client) = upgrade.await else { return };
        let mut client = TokioIo::new(client);
        let opened = async {
            let attach = read_attach(&mut client).await?;
            state.uses.settled(id).await;
            substrates::wake(&state, state.meta.vm(&id.to_string()).await?).await?;
            state.host.stream(host::Request::Exec { vm: id, attach: Box::new(attach) }).await
        };
        match opened.await {
            Ok(host) => relay(client, host, true).await,
            Err(error) => {
                let mut bytes = Vec::new();
                Frame::Failed(error).encode(&mut bytes);
                // A client that has gone needs no answer.
                drop(client.write_all(&bytes).await);
                drop(client.shutdown().await);
            }
        }
        drop(busy);
    });
    Ok(switching())
}

async fn read_attach(client: &mut Upgraded) -> Result<Attach, Error> {
    let failed = |error: std::io::Error| Error::io("read the command", &error);
    let length = client.read_u32_le().await.map_err(failed)?;
    if length > MOST_ATTACH {
        return Err(Error::invalid(format!("a command of {length} bytes")));
    }
    let mut message = vec![0; length as usize];
    client.read_exact(&mut message).await.map_err(failed)?;
    serde_json::from_slice(&message).map_err(|error| Error::invalid(format!("the command does not read: {error}")))
}

/// Passes bytes until either side ends. A client of an exec session that goes away says so to the
/// host: its command ends with it. If this process dies instead, nobody says it, and the command goes on.
async fn relay(client: Upgraded, host: UnixStream, hangup: bool) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_host, mut to_host) = host.into_split();
    let up = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            if to_host.write_all(&buffer[..count]).await.is_err() {
                // The host has said all it has to say; that is still on its way down.
                return std::future::pending().await;
            }
        }
        if hangup {
            let mut bytes = Vec::new();
            Frame::Hangup.encode(&mut bytes);
            // The session may have ended by itself.
            drop(to_host.write_all(&bytes).await);
        }
    };
    let down = async {
        drop(tokio::io::copy(&mut from_host, &mut to_client).await);
        drop(to_client.shutdown().await);
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

async fn raw(
    state: Shared,
    vm: String,
    mut request: Request,
    make: fn(burgeon_api::VmId) -> host::Request,
) -> Answer<Response> {
    check_upgrade(&request)?;
    let id = state.meta.vm(&vm).await?.id;
    let busy = (Busy::new(&state.busy), state.uses.begin(id));
    state.uses.settled(id).await;
    let host = state.host.stream(make(id)).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    state.tasks.clone().spawn(async move {
        if let Ok(client) = upgrade.await {
            relay(TokioIo::new(client), host, false).await;
        }
        drop(busy);
    });
    Ok(switching())
}

async fn console(State(state): State<Shared>, Path(vm): Path<String>, request: Request) -> Answer<Response> {
    raw(state, vm, request, |vm| host::Request::Console { vm }).await
}

async fn display(State(state): State<Shared>, Path(vm): Path<String>, request: Request) -> Answer<Response> {
    let row = state.meta.vm(&vm).await?;
    if !row.profile.display {
        return Err(Error::refused(format!("VM {} has no graphics card", row.name))
            .with_hint("create it with a profile that has display = true, such as --profile desktop")
            .into());
    }
    raw(state, vm, request, |vm| host::Request::Display { vm }).await
}
