//! Hands a VM's disk to who makes an image of it, and tells message by message how far that is.

use std::{sync::Arc, time::Duration};

use burgeon_api::{Error, ErrorKind, Result, host::Handover, host::Reply};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::watch};

use crate::{
    disks::{Disks, Key, Sealed},
    plug::{self, Gate, blocking},
    server::{reply, send},
};

/// How often the asker is told of progress.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// Stores the disk, or a snapshot of it, as [`burgeon_api::host::DiskRequest::HandOver`] says. The work ends when the other
/// side is gone.
///
/// # Errors
/// Before the stream begins: those of [`Sealed::take`]. What fails later is told in the stream.
pub(crate) async fn serve(
    stream: &mut UnixStream,
    gate: Gate,
    disks: &Arc<Disks>,
    key: Key,
    snapshot: Option<String>,
    root: String,
) -> Result<()> {
    let note = match &gate {
        _ if snapshot.is_some() => None,
        _ if gate.record.paused => Some(plug::UNSYNCED.into()),
        Gate { agent: Some(agent), .. } => plug::sync_guest(agent).await,
        Gate { monitor: Some(_), .. } => {
            Some("the guest runs and has no agent that could sync it: its disk is as after a power cut".into())
        }
        _ => None,
    };
    let (of_disks, of_root) = (disks.clone(), root.clone());
    let sealed = blocking(move || Sealed::take(&of_disks, &key, snapshot, &of_root)).await?;
    // From here on the VM may do what it likes.
    drop(gate);
    let (progress, seen) = watch::channel((0, 0));
    let mut work = tokio::task::spawn_blocking(move || {
        sealed.hand_over(&root, &mut |_, done, total| {
            // The asker is gone, and nobody listens.
            progress.send((done, total)).map_err(|_| Error::new(ErrorKind::Cancelled, "cancelled"))
        })
    });
    reply(stream, &Reply::Stream).await?;
    let failed = |error: std::io::Error| Error::io("tell of a disk's storing", &error);
    if let Some(note) = note {
        send(stream, &Handover::Note(note)).await.map_err(failed)?;
    }
    let mut tick = tokio::time::interval(TELL_EVERY);
    let mut gone = [0];
    loop {
        tokio::select! {
            outcome = &mut work => {
                let last = match outcome {
                    Ok(Ok(stored)) => Handover::Stored(stored),
                    Ok(Err(error)) => Handover::Failed(error),
                    Err(error) => Handover::Failed(Error::internal(format!("store a disk: {error}"))),
                };
                return send(stream, &last).await.map_err(failed);
            }
            _ = tick.tick() => {
                let (done, total) = *seen.borrow();
                send(stream, &Handover::Step { done, total }).await.map_err(failed)?;
            }
            _ = stream.read(&mut gone) => return Ok(()),
        }
    }
}
