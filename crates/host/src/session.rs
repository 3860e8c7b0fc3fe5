//! Exec sessions: a command inside a VM, and the client that drives it, who may lose the connection
//! and come back.
//!
//! One task owns each session. Output that the client has not acknowledged is kept, at most a window
//! of each stream; the command is held back beyond that. Input is acknowledged once the agent has it.
//!
//! ```text
//! attached --connection lost--> detached --attach with the same id--> attached
//!     |  Hangup (the client has the exit, or gives up), or the VM ends
//!     |                             | nobody came for a while
//!     v                             v
//!   ended <-------------------------+
//! ```

use std::{collections::VecDeque, future, sync::Arc, time::Duration};

use burgeon_api::{
    Error, ErrorKind, Result,
    exec::{Attach, ExecSpec, Exit, Frame, MOST_PAYLOAD, WINDOW},
};
use burgeon_guest::client::{AgentClient, ExecControl, ExecEvent, ExecHandle, ExecOutput};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::{Instant, sleep_until},
};

/// A command whose client is gone is ended after this; an exit that nobody confirmed is kept as long.
const DETACHED: Duration = Duration::from_secs(60);

/// A client that joins: its connection, and what it has received already.
pub(crate) struct Attachment {
    pub(crate) stream: UnixStream,
    pub(crate) attach: Attach,
}

/// Output of one stream that the client has not acknowledged.
#[derive(Default)]
struct Output {
    /// Offset of the first byte kept.
    start: u64,
    /// Offset of the first byte not yet sent on this connection.
    sent: u64,
    bytes: VecDeque<u8>,
}

impl Output {
    fn has_room(&self) -> bool {
        (self.bytes.len() as u64) < WINDOW
    }

    fn acknowledge(&mut self, total: u64) -> Result<()> {
        if total < self.start || total > self.start + self.bytes.len() as u64 {
            return Err(Error::invalid("exec session: acknowledges output that is not there"));
        }
        let count = usize::try_from(total - self.start).unwrap_or(0);
        self.bytes.drain(..count);
        self.start = total;
        self.sent = self.sent.max(total);
        Ok(())
    }

    fn unsent(&mut self) -> Option<Vec<u8>> {
        let from = usize::try_from(self.sent - self.start).unwrap_or(0);
        let count = (self.bytes.len() - from).min(MOST_PAYLOAD);
        if count == 0 {
            return None;
        }
        self.sent += count as u64;
        Some(self.bytes.range(from..from + count).copied().collect())
    }
}

struct Connection {
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
    input: Vec<u8>,
    outgoing: VecDeque<u8>,
    exit_sent: bool,
}

/// The running command, taken apart so that input, output and signals do not wait for each other.
struct Running {
    stdin: Option<mpsc::Sender<Bytes>>,
    output: ExecOutput,
    /// Dropped, the command is killed.
    control: Arc<ExecControl>,
}

impl Running {
    fn new(exec: ExecHandle) -> Running {
        let (mut input, output, control) = exec.split();
        let (stdin, mut pieces) = mpsc::channel::<Bytes>(1);
        tokio::spawn(async move {
            while let Some(piece) = pieces.recv().await {
                if input.send(piece).await.is_err() {
                    // The command closed its input.
                    return;
                }
            }
        });
        Running { stdin: Some(stdin), output, control: Arc::new(control) }
    }
}

struct Session {
    exec: Option<Running>,
    exit: Option<Frame>,
    stdout: Output,
    stderr: Output,
    stdin: VecDeque<Vec<u8>>,
    stdin_queued: u64,
    stdin_ended: bool,
    stdin_taken: u64,
    connection: Option<Connection>,
    detached_since: Instant,
}

/// Runs a session to its end. `attachments` brings the client's connections, the first one included.
pub(crate) async fn run(agent: AgentClient, spec: ExecSpec, mut attachments: mpsc::Receiver<Attachment>) {
    let mut session = Session {
        exec: None,
        exit: None,
        stdout: Output::default(),
        stderr: Output::default(),
        stdin: VecDeque::new(),
        stdin_queued: 0,
        stdin_ended: false,
        stdin_taken: 0,
        connection: None,
        detached_since: Instant::now(),
    };
    match agent.exec(spec).await {
        Ok(exec) => session.exec = Some(Running::new(exec)),
        Err(error) => session.exit = Some(not_started(error)),
    }
    session.serve(&mut attachments).await;
}

/// A command that the guest cannot run is its user's matter; all else is ours.
fn not_started(error: Error) -> Frame {
    match error.kind {
        ErrorKind::NotFound => Frame::Exit(Exit::NotStarted { reason: error.message, not_found: true }),
        ErrorKind::Refused | ErrorKind::Invalid => {
            Frame::Exit(Exit::NotStarted { reason: error.message, not_found: false })
        }
        _ => Frame::Failed(error),
    }
}

/// Answers a client for whom there is no session.
pub(crate) async fn refuse(attachment: Attachment, last: Frame) {
    let mut bytes = Vec::new();
    last.encode(&mut bytes);
    let mut stream = attachment.stream;
    if !matches!(tokio::time::timeout(Duration::from_secs(1), stream.write_all(&bytes)).await, Ok(Ok(()))) {
        tracing::debug!("a client did not wait for its refusal");
    }
}

/// What a turn of the session's loop met.
enum Met {
    Output(Option<ExecEvent>),
    InputRoom(bool),
    Received(usize),
    Sent(usize),
    Joined(Attachment),
    TimeUp,
    /// The VM's task has ended: nobody can join any more.
    Closed,
}

impl Session {
    async fn serve(&mut self, attachments: &mut mpsc::Receiver<Attachment>) {
        loop {
            self.fill_outgoing();
            let may_take = self.stdout.has_room() && self.stderr.has_room();
            let wants_input = !self.stdin.is_empty();
            let (stdin, events) = match &mut self.exec {
                Some(exec) => (exec.stdin.clone(), Some(&mut exec.output)),
                None => (None, None),
            };
            let (read, write) = match &mut self.connection {
                Some(connection) => {
                    let outgoing = &mut connection.outgoing;
                    (Some((&mut connection.read, &mut connection.input)), Some((&mut connection.write, outgoing)))
                }
                None => (None, None),
            };
            let attached = read.is_some();
            let met = tokio::select! {
                event = async { match events { Some(events) if may_take => events.next().await, _ => future::pending().await } }
                    => Met::Output(event),
                permitted = async { match &stdin { Some(stdin) if wants_input => stdin.reserve().await.is_ok(), _ => future::pending().await } }
                    => Met::InputRoom(permitted),
                count = async { match read { Some((read, input)) => read.read_buf(input).await.unwrap_or(0), None => future::pending().await } }
                    => Met::Received(count),
                count = async { match write { Some((write, out)) if !out.is_empty() => write.write(out.as_slices().0).await.unwrap_or(0), _ => future::pending().await } }
                    => Met::Sent(count),
                joined = attachments.recv() => joined.map_or(Met::Closed, Met::Joined),
                () = sleep_until(self.detached_since + DETACHED), if !attached => Met::TimeUp,
            };
            let going_on = match met {
                Met::Output(event) => self.take_output(event),
                Met::InputRoom(permitted) => self.give_input(permitted),
                Met::Received(0) | Met::Sent(0) => {
                    self.connection = None;
                    self.detached_since = Instant::now();
                    true
                }
                Met::Received(_) => self.take_frames(),
                Met::Sent(count) => {
                    if let Some(connection) = &mut self.connection {
                        connection.outgoing.drain(..count);
                    }
                    true
                }
                Met::Joined(attachment) => {
                    self.join(attachment);
                    true
                }
                Met::TimeUp => false,
                Met::Closed => {
                    if self.exit.is_none() {
                        self.finish(Frame::Exit(Exit::Lost { reason: "the VM has ended".into() }));
                    }
                    self.flush_last().await;
                    false
                }
            };
            if !going_on {
                return;
            }
        }
    }

    fn join(&mut self, attachment: Attachment) {
        let Attachment { stream, attach } = attachment;
        let (read, write) = stream.into_split();
        let mut connection = Connection { read, write, input: Vec::new(), outgoing: VecDeque::new(), exit_sent: false };
        let rewound = self
            .stdout
            .acknowledge(attach.stdout_received)
            .and_then(|()| self.stderr.acknowledge(attach.stderr_received));
        self.stdout.sent = self.stdout.start;
        self.stderr.sent = self.stderr.start;
        let mut first = Vec::new();
        match rewound {
            Ok(()) => Frame::StdinReceived(self.stdin_queued).encode(&mut first),
            Err(error) => Frame::Failed(error).encode(&mut first),
        }
        connection.outgoing.extend(first);
        self.connection = Some(connection);
    }

    fn fill_outgoing(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        if !connection.outgoing.is_empty() {
            return;
        }
        let mut bytes = Vec::new();
        if let Some(data) = self.stdout.unsent() {
            Frame::Stdout(data).encode(&mut bytes);
        }
        if let Some(data) = self.stderr.unsent() {
            Frame::Stderr(data).encode(&mut bytes);
        }
        if bytes.is_empty()
            && let Some(exit) = &self.exit
            && !connection.exit_sent
        {
            exit.encode(&mut bytes);
            connection.exit_sent = true;
        }
        connection.outgoing.extend(bytes);
    }

    fn take_output(&mut self, event: Option<ExecEvent>) -> bool {
        match event {
            Some(ExecEvent::Stdout(data)) => self.stdout.bytes.extend(&data[..]),
            Some(ExecEvent::Stderr(data)) => self.stderr.bytes.extend(&data[..]),
            Some(ExecEvent::Exited { exit, .. }) => self.finish(Frame::Exit(exit)),
            None => self.finish(Frame::Exit(Exit::Lost { reason: "the guest's agent is gone".into() })),
        }
        true
    }

    fn finish(&mut self, exit: Frame) {
        self.exec = None;
        self.stdin.clear();
        self.exit.get_or_insert(exit);
    }

    fn give_input(&mut self, permitted: bool) -> bool {
        let Some(stdin) = self.exec.as_ref().and_then(|exec| exec.stdin.clone()) else { return true };
        if !permitted {
            // The command closed its input: what is left, and what comes, has no reader.
            self.stdin.clear();
            self.stdin_ended = true;
            self.stdin_taken = self.stdin_queued;
            self.acknowledge_input();
            return true;
        }
        let Some(data) = self.stdin.pop_front() else { return true };
        let count = data.len() as u64;
        // Room was there a moment ago and this task is the only sender.
        if stdin.try_send(data.into()).is_ok() {
            self.stdin_taken += count;
            self.acknowledge_input();
        }
        self.end_input_if_done();
        true
    }

    fn end_input_if_done(&mut self) {
        if self.stdin_ended
            && self.stdin.is_empty()
            && let Some(exec) = &mut self.exec
        {
            exec.stdin = None;
        }
    }

    fn acknowledge_input(&mut self) {
        if let Some(connection) = &mut self.connection {
            let mut bytes = Vec::new();
            Frame::StdinReceived(self.stdin_taken).encode(&mut bytes);
            connection.outgoing.extend(bytes);
        }
    }

    fn take_frames(&mut self) -> bool {
        loop {
            let Some(connection) = &mut self.connection else { return true };
            let frame = match Frame::decode(&connection.input) {
                Ok(Some((frame, used))) => {
                    connection.input.drain(..used);
                    frame
                }
                Ok(None) => return true,
                Err(error) => return self.refuse(error),
            };
            match frame {
                Frame::Stdin(data) => {
                    self.stdin_queued += data.len() as u64;
                    if self.stdin_queued - self.stdin_taken > WINDOW && self.exec.is_some() {
                        return self.refuse(Error::invalid("exec session: more input than the window allows"));
                    }
                    if self.exec.is_some() && !self.stdin_ended {
                        self.stdin.push_back(data);
                    } else {
                        self.stdin_taken = self.stdin_queued;
                        self.acknowledge_input();
                    }
                }
                Frame::StdinEnd => {
                    self.stdin_ended = true;
                    self.end_input_if_done();
                }
                Frame::OutputReceived { stdout, stderr } => {
                    let acknowledged = self.stdout.acknowledge(stdout).and_then(|()| self.stderr.acknowledge(stderr));
                    if let Err(error) = acknowledged {
                        return self.refuse(error);
                    }
                }
                Frame::Signal(signal) => {
                    if let Some(exec) = &self.exec {
                        let control = exec.control.clone();
                        // A command that has just ended needs no signal.
                        tokio::spawn(async move { drop(control.signal(signal).await) });
                    }
                }
                Frame::Resize(size) => {
                    if let Some(exec) = &self.exec {
                        let control = exec.control.clone();
                        tokio::spawn(async move { drop(control.resize(size).await) });
                    }
                }
                // Dropping the handle ends the command.
                Frame::Hangup => return false,
                _ => return self.refuse(Error::invalid("exec session: a frame that only the host sends")),
            }
        }
    }

    fn refuse(&mut self, error: Error) -> bool {
        self.finish(Frame::Failed(error));
        true
    }

    /// Says the last word to an attached client, within a short time.
    async fn flush_last(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            self.fill_outgoing();
            let Some(connection) = &mut self.connection else { return };
            let bytes: Vec<u8> = connection.outgoing.drain(..).collect();
            let sent = tokio::time::timeout_at(deadline, connection.write.write_all(&bytes)).await;
            if !matches!(sent, Ok(Ok(()))) {
                tracing::debug!("a client did not take the end of its session");
                return;
            }
            if connection.exit_sent {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Output;

    #[test]
    fn output_goes_on_where_the_client_left_off() {
        let mut output = Output::default();
        output.bytes.extend(b"hello world");
        assert_eq!(output.unsent().unwrap(), b"hello world");
        assert!(output.unsent().is_none());
        output.acknowledge(6).unwrap();
        output.sent = output.start;
        assert_eq!(output.unsent().unwrap(), b"world");
        assert!(output.acknowledge(3).is_err());
        assert!(output.acknowledge(12).is_err());
    }
}
