//! The handle that the rest of the host uses.

use std::{sync::Arc, time::Duration};

use burgeon_api::{
    Error, ErrorKind, Result,
    exec::ExecSpec,
    vm::{Figures, GuestView},
};
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    sync::{broadcast, mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

use super::{
    AgentEvent, ExecHandle, Options,
    streams::{ExecOutput, StdinSender, StreamGuard},
    task::{self, Ask, FileEvent, Note, Sink, State},
};
use crate::protocol::{
    About, Answer, BEST_PAYLOAD, CREDIT_BATCH, Exec, Failure, FailureKind, FileEntry, Identity, Proof, Provision,
    Receipt, Request, StopHow, cost,
};

/// Entries that [`AgentClient::list`] takes from a guest.
const MOST_ENTRIES: usize = 100_000;

/// A channel to an agent. Clones share it; when the last one is dropped, the channel is closed.
#[derive(Clone, Debug)]
pub struct AgentClient {
    asks: mpsc::Sender<Ask>,
    data: mpsc::Sender<(u32, Bytes)>,
    notes: mpsc::UnboundedSender<Note>,
    state: watch::Receiver<State>,
    events: broadcast::Sender<AgentEvent>,
    deadline: Duration,
}

impl AgentClient {
    /// Starts the task that owns `stream`, and begins to attach.
    pub fn connect<S>(stream: S, options: Options) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (asks, asks_in) = mpsc::channel(64);
        let (data, data_in) = mpsc::channel(8);
        let (notes, notes_in) = mpsc::unbounded_channel();
        let (state_out, state) = watch::channel(State::Connecting);
        let (events, _) = broadcast::channel(64);
        let deadline = options.request_deadline;
        let inlets = task::Inlets { asks: asks_in, data: data_in, notes: notes_in };
        drop(tokio::spawn(task::run(stream, options, inlets, state_out, events.clone())));
        Self { asks, data, notes, state, events, deadline }
    }

    /// Waits until the agent has answered.
    ///
    /// # Errors
    /// `Deadline`; `Refused` when versions differ; `Unavailable` or `Damaged` when the channel ended.
    pub async fn wait_ready(&self, deadline: Instant) -> Result<Arc<About>> {
        let mut state = self.state.clone();
        let wait = state.wait_for(|state| !matches!(state, State::Connecting));
        let known = timeout_at(deadline, wait)
            .await
            .map_err(|_| Error::deadline("the guest's agent did not answer in time"))?;
        match known.as_deref() {
            Ok(State::Attached(about)) => Ok(about.clone()),
            Ok(State::Ended(error)) => Err(error.clone()),
            Ok(State::Connecting) | Err(_) => Err(Error::unavailable("the channel to the guest ended")),
        }
    }

    /// The agent's account of itself, once it is attached.
    pub fn hello(&self) -> Option<Arc<About>> {
        match &*self.state.borrow() {
            State::Attached(about) => Some(about.clone()),
            State::Connecting | State::Ended(_) => None,
        }
    }

    /// The same, in the words of the API.
    pub fn guest_view(&self) -> Option<GuestView> {
        self.hello().map(|about| GuestView {
            agent_version: about.agent_version.clone(),
            kernel: about.kernel.clone(),
            host_name: about.host_name.clone(),
            boot_id: about.boot_id.clone(),
            agent_is_init: about.is_init,
        })
    }

    /// Why the channel is over, once it is.
    pub fn ended(&self) -> Option<Error> {
        match &*self.state.borrow() {
            State::Ended(error) => Some(error.clone()),
            State::Connecting | State::Attached(_) => None,
        }
    }

    /// Waits until the task has ended, and says why.
    pub async fn wait_ended(&self) -> Error {
        let mut state = self.state.clone();
        match state.wait_for(|state| matches!(state, State::Ended(_))).await.as_deref() {
            Ok(State::Ended(error)) => error.clone(),
            _ => Error::unavailable("the channel to the guest ended"),
        }
    }

    /// What the channel tells from now on.
    pub fn events(&self) -> broadcast::Receiver<AgentEvent> {
        self.events.subscribe()
    }

    /// Closes the channel for all clones of this handle. Commands go on in the guest until another session begins.
    pub fn close(&self) {
        let _ended_already = self.notes.send(Note::Quit);
    }

    /// This handle, with another time for each request.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts a command.
    ///
    /// # Errors
    /// `NotFound` when there is no such program or directory, `Refused` when it may not be run, `Invalid` for an
    /// unknown user or a command beyond 64 KiB, `Deadline`, `Unavailable`.
    pub async fn exec(&self, spec: ExecSpec) -> Result<ExecHandle> {
        let bytes = String::into_bytes;
        self.exec_raw(Exec {
            stream: 0,
            argv: spec.argv.into_iter().map(bytes).collect(),
            env: spec.env.into_iter().map(|(key, value)| (key.into_bytes(), value.into_bytes())).collect(),
            cwd: spec.cwd.map(bytes),
            user: spec.user.map(bytes),
            terminal: spec
                .terminal
                .map(|size| crate::protocol::TerminalSize { rows: size.rows, columns: size.columns }),
            time_limit_ms: spec.time_limit_ms,
        })
        .await
    }

    /// Starts a command whose words may be any bytes. The stream number is chosen here.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub async fn exec_raw(&self, mut exec: Exec) -> Result<ExecHandle> {
        let (sender, events) = mpsc::unbounded_channel();
        exec.stream = 0;
        let (answer, opened) = self.ask(Request::Exec(exec), Some(Sink::Exec(sender)), None).await?;
        let Opened { stream, credit, guard } = opened;
        let Answer::Started { pid } = answer else { return Err(strange()) };
        Ok(ExecHandle {
            stdin: StdinSender { stream, credit, data: self.data.clone(), notes: self.notes.clone(), frames: 0 },
            output: ExecOutput { events, notes: self.notes.clone(), stream, gathered: [0; 2] },
            pid,
            client: self.clone(),
            guard,
        })
    }

    /// Writes a file of exactly `size` bytes. It gets its name when it is whole; a failed put leaves nothing.
    ///
    /// # Errors
    /// `Invalid` when `content` has another size; `NotFound`, `Refused` as the guest's file system says;
    /// `Deadline` when the guest takes nothing for the request deadline.
    pub async fn put(&self, path: &[u8], mode: u32, size: u64, mut content: impl AsyncRead + Unpin) -> Result<()> {
        let mut put = self.begin_put(path, mode, size).await?;
        let mut buffer = BytesMut::new();
        let mut left = size;
        loop {
            buffer.reserve(BEST_PAYLOAD);
            let count = content.read_buf(&mut buffer).await.map_err(|error| Error::io("read the content", &error))?;
            if count == 0 {
                break;
            }
            left = left
                .checked_sub(count as u64)
                .ok_or_else(|| Error::invalid(format!("the content is larger than the {size} bytes announced")))?;
            put.send(buffer.split().freeze()).await?;
        }
        if left > 0 {
            return Err(Error::invalid(format!("the content is {left} bytes shorter than the {size} announced")));
        }
        put.finish().await
    }

    /// Begins to write a file piece by piece.
    ///
    /// # Errors
    /// `Unavailable`; what the guest refuses is told by the following calls.
    pub async fn begin_put(&self, path: &[u8], mode: u32, size: u64) -> Result<Put> {
        let request = Request::Put { stream: 0, path: path.to_vec(), mode, size };
        let (opened, answer) = self.open(request, Some(Sink::Put)).await?;
        let Opened { stream, credit, guard } = opened;
        let sender = StdinSender { stream, credit, data: self.data.clone(), notes: self.notes.clone(), frames: 0 };
        Ok(Put { sender: Some(sender), answer, guard, deadline: self.deadline })
    }

    /// Reads a file: its mode, its size when it was opened, and its content.
    ///
    /// # Errors
    /// `NotFound`, `Refused`, `Invalid` when it is no regular file; `Deadline`, `Unavailable`.
    pub async fn get(&self, path: &[u8]) -> Result<(u32, u64, FileContent)> {
        let (sender, pieces) = mpsc::unbounded_channel();
        let request = Request::Get { stream: 0, path: path.to_vec() };
        let (answer, opened) = self.ask(request, Some(Sink::Get(sender)), None).await?;
        let Answer::File { mode, size } = answer else { return Err(strange()) };
        let content = FileContent { pieces, guard: opened.guard, gathered: 0, deadline: self.deadline, over: false };
        Ok((mode, size, content))
    }

    /// All entries of a directory, in byte order of their names.
    ///
    /// # Errors
    /// `NotFound`, `Refused`; `Damaged` when the guest gives entries out of order, or more than 100,000.
    pub async fn list(&self, path: &[u8]) -> Result<Vec<FileEntry>> {
        let mut all: Vec<FileEntry> = Vec::new();
        loop {
            let after = all.last().map(|entry| entry.name.clone()).unwrap_or_default();
            let request = Request::List { path: path.to_vec(), after };
            let (Answer::Entries { entries, more }, _) = self.ask(request, None, None).await? else {
                return Err(strange());
            };
            let ordered = all.last().into_iter().chain(&entries).is_sorted_by(|a, b| a.name < b.name);
            if !ordered || all.len() + entries.len() > MOST_ENTRIES || (more && entries.is_empty()) {
                return Err(Error::damaged("the guest's answer is no list of a directory, or beyond 100,000 entries"));
            }
            all.extend(entries);
            if !more {
                return Ok(all);
            }
        }
    }

    /// Makes a directory and those above it.
    ///
    /// # Errors
    /// As the guest's file system says; `Deadline`, `Unavailable`.
    pub async fn make_directory(&self, path: &[u8], mode: u32) -> Result<()> {
        self.ask_done(Request::MakeDirectory { path: path.to_vec(), mode }).await
    }

    /// Sets the guest's clock, in nanoseconds since 1970.
    ///
    /// # Errors
    /// `Refused`, `Deadline`, `Unavailable`.
    pub async fn clock(&self, time_ns: u64) -> Result<()> {
        self.ask_done(Request::Clock { time_ns }).await
    }

    /// Sets the guest's host name.
    ///
    /// # Errors
    /// `Invalid`, `Refused`, `Deadline`, `Unavailable`.
    pub async fn identity(&self, host_name: &str) -> Result<()> {
        self.ask_done(Request::Identity { host_name: host_name.to_string() }).await
    }

    /// Has the guest make its mounted file systems as large as their disks.
    ///
    /// # Errors
    /// What the guest's kernel says; `Refused`, `Deadline`, `Unavailable`.
    pub async fn grow(&self) -> Result<()> {
        self.ask_done(Request::Grow).await
    }

    /// Has the guest use so many of its CPUs; how many it uses then. Without a number nothing changes. For agents of
    /// revision 4 and later.
    ///
    /// # Errors
    /// What the guest's kernel says; `Invalid` for more than there are; `Refused`, `Deadline`, `Unavailable`.
    pub async fn cpus(&self, online: Option<u32>) -> Result<u32> {
        match self.ask(Request::Cpus { online }, None, None).await?.0 {
            Answer::Cpus(count) => Ok(count),
            _ => Err(strange()),
        }
    }

    /// The guest's figures.
    ///
    /// # Errors
    /// `Deadline`, `Unavailable`.
    pub async fn figures(&self) -> Result<Figures> {
        let (Answer::Figures(figures), _) = self.ask(Request::Figures, None, None).await? else {
            return Err(strange());
        };
        Ok(Figures {
            uptime_ms: figures.uptime_ms,
            load_hundredths: figures.load_hundredths,
            memory_total: figures.memory_total,
            memory_available: figures.memory_available,
            processes: figures.processes,
        })
    }

    /// Stops every process of the guest but the agent.
    ///
    /// # Errors
    /// `Refused` when the guest has no cgroups, or something does not come to rest; `Deadline`, `Unavailable`.
    pub async fn freeze(&self) -> Result<()> {
        self.ask_done(Request::Freeze).await
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// `Refused`, `Deadline`, `Unavailable`.
    pub async fn thaw(&self) -> Result<()> {
        self.ask_done(Request::Thaw).await
    }

    /// Has a frozen guest bring its files to its disks and give memory back, before it is captured.
    ///
    /// # Errors
    /// `Refused`, `Deadline`, `Unavailable`; what the guest's file systems say.
    pub async fn settle(&self, generalise: bool) -> Result<()> {
        self.ask_done(Request::Settle { generalise }).await
    }

    /// Makes of a guest that goes on from a captured state another machine; what it shows of that.
    ///
    /// # Errors
    /// Whatever kept it from that: it may be neither the one nor the other now, and must not go on.
    pub async fn renew(&self, identity: Identity) -> Result<Receipt> {
        match self.ask(Request::Renew(identity), None, None).await?.0 {
            Answer::Receipt(receipt) => Ok(receipt),
            _ => Err(strange()),
        }
    }

    /// The same, with more than an identity. For agents of revision 2 and later.
    ///
    /// # Errors
    /// As [`Self::renew`].
    pub async fn renew_with(&self, identity: Identity, more: Vec<Provision>) -> Result<(Receipt, Vec<Proof>)> {
        match self.ask(Request::RenewWith { identity, more }, None, None).await?.0 {
            Answer::Renewed { receipt, more } => Ok((receipt, more)),
            _ => Err(strange()),
        }
    }

    /// Gives a guest its environment and its secrets: at once, or, while its workload is frozen, with the identity that
    /// follows. For agents of revision 3 and later.
    ///
    /// # Errors
    /// `Refused`, `Deadline`, `Unavailable`.
    pub async fn provide(&self, more: Vec<Provision>) -> Result<()> {
        self.ask_done(Request::Provide { more }).await
    }

    /// Asks the guest to stop. The answer means that it has begun to.
    ///
    /// # Errors
    /// `Refused`, `Deadline`, `Unavailable`.
    pub async fn stop(&self, how: StopHow) -> Result<()> {
        self.ask_done(Request::Stop { how }).await
    }

    pub(super) async fn ask_done(&self, request: Request) -> Result<()> {
        match self.ask(request, None, None).await?.0 {
            Answer::Done => Ok(()),
            _ => Err(strange()),
        }
    }

    /// Gives a request to the task.
    async fn open(&self, request: Request, sink: Option<Sink>) -> Result<(Opened, oneshot::Receiver<Result<Answer>>)> {
        let (reply, answer) = oneshot::channel();
        let (opened, stream) = oneshot::channel();
        let credit = Arc::new(tokio::sync::Semaphore::new(crate::protocol::WINDOW as usize));
        let ask = Ask { request, sink, credit: credit.clone(), reply, opened };
        let gone = || self.ended().unwrap_or_else(|| Error::unavailable("the channel to the guest ended"));
        self.asks.send(ask).await.map_err(|_| gone())?;
        match stream.await {
            Ok(stream) => {
                let guard = StreamGuard { stream, notes: self.notes.clone() };
                Ok((Opened { stream, credit, guard }, answer))
            }
            // Refused before it was sent: the reason is in the answer.
            Err(_) => match answer.await {
                Ok(Err(error)) => Err(error),
                _ => Err(gone()),
            },
        }
    }

    async fn ask(&self, request: Request, sink: Option<Sink>, limit: Option<Duration>) -> Result<(Answer, Opened)> {
        let deadline = Instant::now() + limit.unwrap_or(self.deadline);
        let late = || Error::deadline("the guest's agent did not answer in time");
        let asked = async {
            let (opened, answer) = self.open(request, sink).await?;
            let answer = answer.await.map_err(|_| Error::unavailable("the channel to the guest ended"))??;
            Ok((answer, opened))
        };
        // When time is up, dropping `opened` closes the stream, so that nothing is left running unseen.
        timeout_at(deadline, asked).await.unwrap_or_else(|_| Err(late()))
    }
}

struct Opened {
    stream: u32,
    credit: Arc<tokio::sync::Semaphore>,
    guard: StreamGuard,
}

fn strange() -> Error {
    Error::damaged("the guest's agent answered something else than it was asked")
}

/// The error that a guest's refusal means to the host's user.
pub(super) fn refusal(failure: Failure) -> Error {
    let kind = match failure.kind {
        FailureKind::Invalid => ErrorKind::Invalid,
        FailureKind::NotFound => ErrorKind::NotFound,
        FailureKind::Exists => ErrorKind::Conflict,
        FailureKind::PermissionDenied | FailureKind::Unsupported => ErrorKind::Refused,
        FailureKind::Limit => ErrorKind::Unavailable,
        FailureKind::Io => ErrorKind::Internal,
    };
    Error::new(kind, failure.message)
}

/// A file on its way into the guest. Dropped before [`Self::finish`], it leaves nothing there.
#[derive(Debug)]
pub struct Put {
    /// Dropped first: it closes the stream before the sender would end the content in good order.
    #[expect(dead_code, reason = "acts when it is dropped")]
    guard: StreamGuard,
    sender: Option<StdinSender>,
    answer: oneshot::Receiver<Result<Answer>>,
    deadline: Duration,
}

impl Put {
    /// Sends a piece.
    ///
    /// # Errors
    /// The guest's refusal; `Deadline` when it takes nothing in time.
    pub async fn send(&mut self, data: Bytes) -> Result<()> {
        let Some(sender) = &mut self.sender else { return Err(strange()) };
        tokio::select! {
            biased;
            refused = &mut self.answer => match refused {
                Ok(Err(error)) => Err(error),
                Ok(Ok(_)) | Err(_) => Err(Error::unavailable("the put ended early")),
            },
            sent = sender.send(data) => sent,
            () = tokio::time::sleep(self.deadline) => Err(Error::deadline("the guest does not take the file")),
        }
    }

    /// Ends the content, and waits until the file has its name.
    ///
    /// # Errors
    /// As [`Self::send`]; `Invalid` when the content was shorter than announced.
    pub async fn finish(mut self) -> Result<()> {
        drop(self.sender.take());
        match tokio::time::timeout(self.deadline, &mut self.answer).await {
            Err(_) => Err(Error::deadline("the guest's agent did not answer in time")),
            Ok(Err(_)) => Err(Error::unavailable("the channel to the guest ended")),
            Ok(Ok(answer)) => answer.map(|_| ()),
        }
    }
}

/// The content of a file that is read from a guest.
#[derive(Debug)]
pub struct FileContent {
    pieces: mpsc::UnboundedReceiver<FileEvent>,
    guard: StreamGuard,
    gathered: u32,
    deadline: Duration,
    over: bool,
}

impl FileContent {
    /// The next piece; `None` at the end of the file.
    ///
    /// # Errors
    /// `Damaged` when the guest could not read on; `Deadline`, `Unavailable`.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.over {
            return Ok(None);
        }
        let event = tokio::time::timeout(self.deadline, self.pieces.recv()).await;
        match event.map_err(|_| Error::deadline("the guest does not give the file"))? {
            Some(FileEvent::Data(data)) => {
                self.gathered += cost(data.len());
                if self.gathered >= CREDIT_BATCH {
                    let amount = std::mem::take(&mut self.gathered);
                    let _ended = self.guard.notes.send(Note::Consumed { stream: self.guard.stream, amount });
                }
                Ok(Some(data))
            }
            Some(FileEvent::End) => {
                self.over = true;
                Ok(None)
            }
            Some(FileEvent::Failed(error)) => Err(error),
            None => Err(Error::unavailable("the channel to the guest ended")),
        }
    }
}
