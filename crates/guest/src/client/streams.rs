//! What a user holds of a running command, and the bookkeeping of credit between it and the task.

use std::sync::Arc;

use burgeon_api::{
    Error, Result,
    exec::{Exit, TerminalSize},
};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};

use super::{AgentClient, task::Note};
use crate::protocol::{BEST_PAYLOAD, CREDIT_BATCH, Request, cost};

/// What a command says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    Stdout(Bytes),
    Stderr(Bytes),
    /// The last event.
    Exited {
        exit: Exit,
        /// User and system time of the command and the children it waited for.
        cpu_us: u64,
    },
}

/// A running command. Dropped, it is killed.
#[derive(Debug)]
pub struct ExecHandle {
    /// Dropped or [closed](StdinSender::finish), the command's input ends.
    pub stdin: StdinSender,
    pub output: ExecOutput,
    pub pid: u32,
    pub(super) client: AgentClient,
    pub(super) guard: StreamGuard,
}

impl ExecHandle {
    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// `NotFound` when it has ended; `Deadline`, `Unavailable`.
    pub async fn signal(&self, signal: i32) -> Result<()> {
        self.client.ask_done(Request::Signal { stream: self.guard.stream, signal }).await
    }

    /// Sets the size of the command's terminal.
    ///
    /// # Errors
    /// `NotFound` when it has ended or has no terminal; `Deadline`, `Unavailable`.
    pub async fn resize(&self, size: TerminalSize) -> Result<()> {
        let size = crate::protocol::TerminalSize { rows: size.rows, columns: size.columns };
        self.client.ask_done(Request::Resize { stream: self.guard.stream, size }).await
    }

    /// Takes the handle apart, for input and output in different tasks. The command is killed when its control is dropped.
    pub fn split(self) -> (StdinSender, ExecOutput, ExecControl) {
        let control = ExecControl { client: self.client, guard: self.guard, pid: self.pid };
        (self.stdin, self.output, control)
    }
}

/// What remains of an [`ExecHandle`] without its streams.
#[derive(Debug)]
pub struct ExecControl {
    client: AgentClient,
    guard: StreamGuard,
    pub pid: u32,
}

impl ExecControl {
    /// See [`ExecHandle::signal`].
    ///
    /// # Errors
    /// As there.
    pub async fn signal(&self, signal: i32) -> Result<()> {
        self.client.ask_done(Request::Signal { stream: self.guard.stream, signal }).await
    }

    /// See [`ExecHandle::resize`].
    ///
    /// # Errors
    /// As there.
    pub async fn resize(&self, size: TerminalSize) -> Result<()> {
        let size = crate::protocol::TerminalSize { rows: size.rows, columns: size.columns };
        self.client.ask_done(Request::Resize { stream: self.guard.stream, size }).await
    }
}

/// Tells the task that nobody wants a stream any more.
#[derive(Debug)]
pub(super) struct StreamGuard {
    pub(super) stream: u32,
    pub(super) notes: mpsc::UnboundedSender<Note>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        // Without a task there is no stream either.
        let _ended = self.notes.send(Note::Close { stream: self.stream });
    }
}

/// Bytes for a command's input, or a file's content.
#[derive(Debug)]
pub struct StdinSender {
    pub(super) stream: u32,
    pub(super) credit: Arc<Semaphore>,
    pub(super) data: mpsc::Sender<(u32, Bytes)>,
    pub(super) notes: mpsc::UnboundedSender<Note>,
    /// Frames given to the task.
    pub(super) frames: u64,
}

impl StdinSender {
    /// Sends all of `data`, as fast as the command takes it. Cancelled, a part may have been sent.
    ///
    /// # Errors
    /// `Unavailable` when the command or the channel has ended.
    pub async fn send(&mut self, mut data: Bytes) -> Result<()> {
        let over = || Error::unavailable("the command has ended, or its channel");
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(BEST_PAYLOAD));
            let credit = self.credit.acquire_many(cost(piece.len())).await.map_err(|_| over())?;
            let place = self.data.reserve().await.map_err(|_| over())?;
            credit.forget();
            place.send((self.stream, piece));
            self.frames += 1;
        }
        Ok(())
    }

    /// Ends the input, as dropping does.
    pub fn finish(self) {}
}

impl Drop for StdinSender {
    fn drop(&mut self) {
        // The count keeps the end behind data that still waits for the task.
        let _ended = self.notes.send(Note::InputEnd { stream: self.stream, frames: self.frames });
    }
}

/// Events of a stream on their way to its user, and credit on its way back.
#[derive(Debug)]
pub struct ExecOutput {
    pub(super) events: mpsc::UnboundedReceiver<ExecEvent>,
    pub(super) notes: mpsc::UnboundedSender<Note>,
    pub(super) stream: u32,
    /// Consumed credit of output and errors that was not told yet.
    pub(super) gathered: [u32; 2],
}

impl ExecOutput {
    /// The next event; `None` after `Exited`. Taking an event gives its credit back. Cancel safe.
    pub async fn next(&mut self) -> Option<ExecEvent> {
        let event = self.events.recv().await?;
        match &event {
            ExecEvent::Stdout(data) => self.consumed(0, data.len()),
            ExecEvent::Stderr(data) => self.consumed(1, data.len()),
            ExecEvent::Exited { .. } => {}
        }
        Some(event)
    }

    fn consumed(&mut self, which: usize, length: usize) {
        self.gathered[which] += cost(length);
        if self.gathered[which] >= CREDIT_BATCH {
            let amount = std::mem::take(&mut self.gathered[which]);
            let stream = self.stream + if which == 0 { 1 } else { 2 };
            let _ended = self.notes.send(Note::Consumed { stream, amount });
        }
    }

    /// Takes all output until the end, keeping at most `limit` bytes of each kind; the rest is consumed and dropped.
    pub async fn collect(&mut self, limit: usize) -> (Vec<u8>, Vec<u8>, Exit) {
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let keep = |to: &mut Vec<u8>, data: &[u8]| to.extend(&data[..data.len().min(limit - to.len().min(limit))]);
        while let Some(event) = self.next().await {
            match event {
                ExecEvent::Stdout(data) => keep(&mut out, &data),
                ExecEvent::Stderr(data) => keep(&mut errors, &data),
                ExecEvent::Exited { exit, .. } => return (out, errors, exit),
            }
        }
        (out, errors, Exit::Lost { reason: "the channel to the guest ended".to_string() })
    }
}
