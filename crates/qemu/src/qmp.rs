//! The QEMU Machine Protocol: JSON lines over a unix socket.
//!
//! One task owns the socket. [`Qmp`] is a handle to it: commands are answered in order, each within
//! its deadline; events go to whoever subscribed. The guest cannot write here, but QEMU itself is not
//! trusted to be prompt or brief: lines are bounded and every wait has a deadline.

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use burgeon_api::{Error, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest},
    net::{UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
    sync::{broadcast, mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

/// The longest line taken from QEMU. `query-qmp-schema` answers with about 200 KiB.
const MOST_LINE: u64 = 4 << 20;
/// How long an ordinary command may take.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

struct Command {
    body: Value,
    fd: Option<OwnedFd>,
    answer: oneshot::Sender<Result<Value>>,
}

/// An asynchronous message of QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    pub data: Value,
}

/// A handle to the task that talks QMP with one QEMU. Cheap to clone; the task ends with the last handle.
#[derive(Clone, Debug)]
pub struct Qmp {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<Event>,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// `Unavailable` where nothing listens, `Deadline` where QEMU does not answer in time, `Damaged`
    /// where the answer is not QMP.
    pub async fn connect(socket: &Path, deadline: Instant) -> Result<Qmp> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| Error::unavailable(format!("connect to QEMU's monitor: {error}")))?;
        let (read, write) = stream.into_split();
        let mut lines = Lines { reader: BufReader::new(read) };
        let handshake = async {
            let greeting = lines.next().await?;
            if greeting.get("QMP").is_none() {
                return Err(Error::damaged("QEMU's monitor did not greet with QMP"));
            }
            send(&write, &json!({"execute": "qmp_capabilities"}), None).await?;
            loop {
                let line = lines.next().await?;
                if line.get("return").is_some() {
                    return Ok(());
                }
                if let Some(error) = line.get("error") {
                    return Err(Error::internal(format!("QEMU refused qmp_capabilities: {}", description(error))));
                }
            }
        };
        timeout_at(deadline, handshake)
            .await
            .map_err(|_| Error::deadline("QEMU's monitor did not answer in time"))??;
        let (commands, receiver) = mpsc::channel(16);
        let (events, _) = broadcast::channel(64);
        tokio::spawn(own(lines, write, receiver, events.clone()));
        Ok(Qmp { commands, events })
    }

    /// Runs one command with the ordinary deadline.
    ///
    /// # Errors
    /// What QEMU answers as an error (`Refused`), `Deadline`, or `Unavailable` when the connection is gone.
    pub async fn execute(&self, name: &str, arguments: Value) -> Result<Value> {
        self.execute_with(name, arguments, None, COMMAND_DEADLINE).await
    }

    /// Runs one command, passing a file descriptor with it (`getfd`, `add-fd`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_with(
        &self,
        name: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<Value> {
        let body = if arguments.is_null() {
            json!({"execute": name})
        } else {
            json!({"execute": name, "arguments": arguments})
        };
        let (answer, received) = oneshot::channel();
        let gone = || Error::unavailable(format!("QEMU's monitor closed before it answered {name}"));
        let work = async {
            self.commands.send(Command { body, fd, answer }).await.map_err(|_| gone())?;
            received.await.map_err(|_| gone())?
        };
        timeout(deadline, work)
            .await
            .map_err(|_| Error::deadline(format!("QEMU did not answer {name} within {} s", deadline.as_secs())))?
            .map_err(|error| error.context(name))
    }

    /// Events from now on. A slow reader loses the oldest.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Whether the connection still stands.
    pub fn is_connected(&self) -> bool {
        !self.commands.is_closed()
    }
}

struct Lines {
    reader: BufReader<OwnedReadHalf>,
}

impl Lines {
    /// Not safe to cancel in the middle of a line; the owner therefore reads in a task of its own.
    async fn next(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        let count = (&mut self.reader)
            .take(MOST_LINE)
            .read_until(b'\n', &mut line)
            .await
            .map_err(|error| Error::unavailable(format!("read from QEMU's monitor: {error}")))?;
        if count == 0 {
            return Err(Error::unavailable("QEMU closed its monitor"));
        }
        serde_json::from_slice(&line).map_err(|_| Error::damaged("QEMU's monitor sent something that is no JSON"))
    }
}

async fn own(
    mut lines: Lines,
    write: OwnedWriteHalf,
    mut commands: mpsc::Receiver<Command>,
    events: broadcast::Sender<Event>,
) {
    let (read_lines, mut lines_read) = mpsc::channel(16);
    let reader = tokio::spawn(async move {
        while let Ok(line) = lines.next().await {
            if read_lines.send(line).await.is_err() {
                return;
            }
        }
    });
    let mut waiting: VecDeque<oneshot::Sender<Result<Value>>> = VecDeque::new();
    loop {
        tokio::select! {
            line = lines_read.recv() => {
                let Some(mut line) = line else { break };
                if let Some(name) = line.get("event").and_then(Value::as_str) {
                    let event = Event { name: name.to_string(), data: line.get("data").cloned().unwrap_or(Value::Null) };
                    // Nobody listening is no fault.
                    drop(events.send(event));
                } else if let Some(answer) = waiting.pop_front() {
                    let result = match line.get_mut("return") {
                        Some(value) => Ok(value.take()),
                        None => Err(Error::refused(format!("QEMU says: {}", description(&line["error"])))),
                    };
                    // The asker may have passed its deadline.
                    drop(answer.send(result));
                }
            }
            command = commands.recv() => {
                let Some(command) = command else { break };
                if send(&write, &command.body, command.fd).await.is_err() {
                    break;
                }
                waiting.push_back(command.answer);
            }
        }
    }
    reader.abort();
}

fn description(error: &Value) -> &str {
    error.get("desc").and_then(Value::as_str).unwrap_or("no reason given")
}

async fn send(write: &OwnedWriteHalf, body: &Value, fd: Option<OwnedFd>) -> Result<()> {
    let mut bytes = serde_json::to_vec(body).map_err(|error| Error::internal(error.to_string()))?;
    bytes.push(b'\n');
    let stream = write.as_ref();
    let mut fd = fd;
    let mut sent = 0;
    while sent < bytes.len() {
        let written = stream
            .async_io(Interest::WRITABLE, || {
                let data = [IoSlice::new(&bytes[sent..])];
                let borrowed = fd.as_ref().map(|fd| [fd.as_fd()]);
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if let Some(fds) = &borrowed {
                    ancillary.push(SendAncillaryMessage::ScmRights(fds));
                }
                rustix::net::sendmsg(stream, &data, &mut ancillary, SendFlags::NOSIGNAL).map_err(Into::into)
            })
            .await
            .map_err(|error| Error::unavailable(format!("write to QEMU's monitor: {error}")))?;
        fd = None;
        sent += written;
    }
    Ok(())
}

/// Receives one message that carries a descriptor; used by tests that stand in for QEMU.
#[doc(hidden)]
pub fn receive_with_fd(socket: impl AsFd, buffer: &mut [u8]) -> std::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut ancillary,
        rustix::net::RecvFlags::CMSG_CLOEXEC,
    )?;
    let fd = ancillary.drain().find_map(|message| match message {
        rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((got.bytes, fd))
}
