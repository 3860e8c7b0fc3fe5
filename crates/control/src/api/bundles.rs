//! Substrates to and from files. The connection is upgraded; then frames of exec sessions go both ways: the file's bytes
//! as `Stdout` or `Stdin`, progress as JSON in `Stderr`, and last `Exit` or `Failed`.

use std::io::{self, Read, Write};

use axum::{
    extract::{Path, Query, Request, State},
    response::Response,
};
use burgeon_api::{
    Error, Result, VmId,
    exec::{Exit, Frame, MOST_PAYLOAD},
    http::Progress,
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{
    Answer, Routes, UPGRADE,
    streams::{check_upgrade, switching},
};
use crate::{
    bundles::{self, Client},
    exec_client::{FrameReader, FrameWriter},
    state::{Busy, Shared},
    substrates,
};

/// Frames on their way between the work and its connection.
const WAITING: usize = 16;
const QUERY: &[(&str, &str)] = &[
    ("id", "of the new substrate, chosen by the client: asking twice makes one"),
    ("name", "its name; that in the file when absent"),
];

pub(super) fn add(routes: &mut Routes) {
    routes
        .add(
            "post",
            "/v1/substrates/{substrate}/export",
            "A substrate as one file: frames with its bytes, and with progress, come after the upgrade",
            export,
        )
        .kind(UPGRADE);
    routes
        .add(
            "post",
            "/v1/substrates/import",
            "Make a substrate of a file: its bytes go in frames after the upgrade, progress and the substrate come back",
            import,
        )
        .query(QUERY)
        .kind(UPGRADE);
}

#[derive(Deserialize)]
struct Import {
    id: VmId,
    name: Option<String>,
}

async fn export(State(state): State<Shared>, Path(name): Path<String>, request: Request) -> Answer<Response> {
    check_upgrade(&request)?;
    let row = substrates::find(&state, &name).await?;
    substrates::docked(&state, &row).await?;
    serve(&state, request, move |state, _, frames, client| {
        let mut out = Out { frames, buffer: Vec::new() };
        bundles::export(state, &row, &mut out, client)?;
        Ok(Vec::new())
    });
    Ok(switching())
}

async fn import(State(state): State<Shared>, Query(query): Query<Import>, request: Request) -> Answer<Response> {
    check_upgrade(&request)?;
    let Import { id, name } = query;
    serve(&state, request, move |state, input, _, client| {
        let row = bundles::import(state, id, name, input, client)?;
        serde_json::to_vec(&substrates::view(state, &row, &[], &Vec::new()))
            .map_err(|error| Error::internal(error.to_string()))
    });
    Ok(switching())
}

/// Runs work on the bytes that come from the client, or go to it. What the work answers goes to the client last.
fn serve(
    state: &Shared,
    mut request: Request,
    work: impl FnOnce(&Shared, In, mpsc::Sender<Frame>, &Client<'_>) -> Result<Vec<u8>> + Send + 'static,
) {
    let upgrade = hyper::upgrade::on(&mut request);
    let (state, busy) = (state.clone(), Busy::new(&state.busy));
    state.tasks.clone().spawn(async move {
        let Ok(client) = upgrade.await else { return };
        let (read, write) = tokio::io::split(TokioIo::new(client));
        let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
        let (to_client, mut from_work) = mpsc::channel(WAITING);
        let (to_work, pieces) = mpsc::channel(WAITING);
        let of_work = state.clone();
        let work = tokio::task::spawn_blocking(move || {
            let told = to_client.clone();
            // A client that is slow loses steps of a bar, and nothing else.
            let tell = |progress: Progress| {
                drop(told.try_send(Frame::Stderr(serde_json::to_vec(&progress).unwrap_or_default())));
            };
            let cancelled = || to_client.is_closed() || of_work.shutdown.is_cancelled();
            let input = In { pieces, piece: Vec::new(), at: 0, ended: false };
            work(&of_work, input, to_client.clone(), &Client { tell: &tell, cancelled: &cancelled })
        });
        let up = async {
            while let Ok(Some(frame)) = reader.next().await {
                let piece = match frame {
                    Frame::Stdin(piece) => Some(piece),
                    Frame::StdinEnd => None,
                    _ => return,
                };
                if to_work.send(piece).await.is_err() {
                    // The work has ended, and its client is told why.
                    return std::future::pending().await;
                }
            }
        };
        let down = async {
            while let Some(frame) = from_work.recv().await {
                if writer.send(&frame).await.is_err() {
                    return None;
                }
            }
            Some(writer)
        };
        let writer = tokio::select! {
            () = up => None,
            writer = down => writer,
            () = state.shutdown.cancelled() => None,
        };
        // Whoever is left without its connection ends at its next step.
        drop((from_work, to_work));
        let done = work.await;
        let Some(mut writer) = writer else { return };
        let last = match done.unwrap_or_else(|error| Err(Error::internal(format!("work on a substrate: {error}")))) {
            Ok(answer) => vec![Frame::Stdout(answer), Frame::Exit(Exit::Code { code: 0 })],
            Err(error) => vec![Frame::Failed(error)],
        };
        for frame in last {
            // A client that has gone needs no answer.
            drop(writer.send(&frame).await);
        }
        writer.end().await;
        drop(busy);
    });
}

/// The bytes that the client sends.
struct In {
    /// None: that was all. A connection that ends without is one that broke off.
    pieces: mpsc::Receiver<Option<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for In {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => (self.piece, self.at) = (piece, 0),
                Some(None) => self.ended = true,
                None => return Err(io::Error::other("the client broke off")),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Bytes for the client.
struct Out {
    frames: mpsc::Sender<Frame>,
    buffer: Vec<u8>,
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(MOST_PAYLOAD - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == MOST_PAYLOAD {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        let frame = Frame::Stdout(std::mem::take(&mut self.buffer));
        self.frames.blocking_send(frame).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
