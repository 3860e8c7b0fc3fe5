//! Asking the host process: one connection per request, each within a deadline.

use std::{path::PathBuf, time::Duration};

use burgeon_api::{
    Error, ErrorKind, RequestId, Result, VmId,
    disk::{DiskChanged, DiskChanges, DiskView},
    host::{DiskRequest, Envelope, FileRequest, Handover, LaidOut, Launch, Reply, Request, StopMode, TakeIn, VERSION},
    image::Image,
    provisions::Provisions,
    snapshot::VmSnapshot,
    substrate::{Forked, Recipe, Shares, Standbys},
    vm::{HostVm, Resize, Resized},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// Requests that the host answers from memory.
const QUICK: Duration = Duration::from_secs(10);
/// Requests that wait for a guest or a file system.
const SLOW: Duration = Duration::from_secs(150);
/// Warming up and capturing a substrate.
const DOCK: Duration = Duration::from_secs(1800);
/// All children of a fork.
const FORK: Duration = Duration::from_secs(300);
/// All that a guest may take to take memory and CPUs, or to give them back.
const RESIZE: Duration = Duration::from_secs(240);
const MOST_REPLY: u32 = 64 << 20;

/// The way to the host process of this machine.
#[derive(Clone, Debug)]
pub(crate) struct HostClient {
    socket: PathBuf,
}

impl HostClient {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Sends a request and reads the reply; the connection goes on with whatever follows.
    pub(crate) async fn open(&self, request: Request, deadline: Duration) -> Result<(Reply, UnixStream)> {
        timeout(deadline, async {
            let mut stream = UnixStream::connect(&self.socket).await.map_err(|error| unreachable(&error))?;
            send_request(&mut stream, request).await?;
            let reply = receive_reply(&mut stream).await?;
            Ok((reply, stream))
        })
        .await
        .map_err(|_| Error::deadline(format!("the host process did not answer within {} s", deadline.as_secs())))?
    }

    async fn ask(&self, request: Request, deadline: Duration) -> Result<Reply> {
        self.open(request, deadline).await.map(|(reply, _)| reply)
    }

    async fn done(&self, request: Request, deadline: Duration) -> Result<()> {
        match self.ask(request, deadline).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Opens a stream: exec, console, display.
    pub(crate) async fn stream(&self, request: Request) -> Result<UnixStream> {
        match self.open(request, QUICK).await? {
            (Reply::Stream, stream) => Ok(stream),
            (other, _) => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn hello(&self) -> Result<Reply> {
        self.ask(Request::Hello, QUICK).await
    }

    pub(crate) async fn list(&self) -> Result<Vec<HostVm>> {
        match self.ask(Request::List, QUICK).await? {
            Reply::Vms(vms) => Ok(vms),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn launch(&self, launch: Launch) -> Result<()> {
        self.done(Request::Launch(Box::new(launch)), QUICK).await
    }

    /// What a VM is given that will be launched.
    pub(crate) async fn provide(&self, vm: VmId, provisions: Provisions) -> Result<()> {
        self.done(Request::Provide { vm, provisions }, QUICK).await
    }

    /// Changes how much memory and how many CPUs a VM has.
    pub(crate) async fn resize(&self, vm: VmId, resize: Resize) -> Result<Resized> {
        match self.ask(Request::Resize { vm, resize }, RESIZE).await? {
            Reply::Resized(resized) => Ok(resized),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a substrate of a running VM.
    pub(crate) async fn dock(&self, vm: VmId, recipe: Recipe) -> Result<()> {
        self.done(Request::Dock { vm, recipe }, DOCK).await
    }

    pub(crate) async fn keep_standbys(&self, vm: VmId, count: Option<u32>) -> Result<()> {
        self.done(Request::KeepStandbys { vm, count }, QUICK).await
    }

    /// The QEMUs that wait, by substrate.
    pub(crate) async fn standbys(&self) -> Result<Vec<(VmId, Standbys)>> {
        match self.ask(Request::Standbys, QUICK).await? {
            Reply::Standbys(standbys) => Ok(standbys),
            other => Err(unexpected(&other)),
        }
    }

    /// What a substrate and those that use it take of the machine's memory.
    pub(crate) async fn shares(&self, substrate: VmId, vms: Vec<VmId>) -> Result<Shares> {
        match self.ask(Request::Shares { substrate, vms }, SLOW).await? {
            Reply::Shares(shares) => Ok(shares),
            other => Err(unexpected(&other)),
        }
    }

    /// Puts what the store has not of a substrate into a directory.
    pub(crate) async fn lay_out(&self, vm: VmId, directory: String) -> Result<LaidOut> {
        match self.ask(Request::LayOut { vm, directory }, SLOW).await? {
            Reply::LaidOut(laid_out) => Ok(laid_out),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a substrate that was made elsewhere.
    pub(crate) async fn take_in(&self, request: TakeIn) -> Result<()> {
        self.done(Request::TakeIn(Box::new(request)), SLOW).await
    }

    /// Keeps a running VM's state and ends its process.
    pub(crate) async fn park(&self, vm: VmId) -> Result<()> {
        // Large memories on their way to a store far away take their time.
        self.done(Request::Park { vm }, DOCK).await
    }

    /// Keeps a VM's instant; it goes on.
    pub(crate) async fn snapshot(&self, vm: VmId, request: RequestId, name: Option<String>) -> Result<VmSnapshot> {
        match self.ask(Request::Snapshot { vm, request, name }, DOCK).await? {
            Reply::Snapshot(snapshot) => Ok(*snapshot),
            other => Err(unexpected(&other)),
        }
    }

    /// A VM's snapshots, the oldest first.
    pub(crate) async fn snapshots(&self, vm: VmId) -> Result<Vec<VmSnapshot>> {
        match self.ask(Request::Snapshots { vm }, QUICK).await? {
            Reply::Snapshots(snapshots) => Ok(snapshots),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn remove_snapshot(&self, vm: VmId, snapshot: String) -> Result<()> {
        self.done(Request::RemoveSnapshot { vm, snapshot }, SLOW).await
    }

    /// Has a VM go on from a snapshot of it.
    pub(crate) async fn roll_back(&self, vm: VmId, starts: u32, snapshot: String) -> Result<()> {
        self.done(Request::RollBack { vm, starts, snapshot }, SLOW).await
    }

    /// Ends a VM that could not be made what it should become.
    pub(crate) async fn give_up(&self, vm: VmId, reason: String) -> Result<()> {
        self.done(Request::GiveUp { vm, reason }, SLOW).await
    }

    pub(crate) async fn fork(&self, vm: VmId, children: Vec<Launch>, all_or_nothing: bool) -> Result<Forked> {
        match self.ask(Request::Fork { vm, children, all_or_nothing }, FORK).await? {
            Reply::Forked(forked) => Ok(forked),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn start(&self, vm: VmId, starts: u32) -> Result<()> {
        self.done(Request::Start { vm, starts }, QUICK).await
    }

    pub(crate) async fn stop(&self, vm: VmId, mode: StopMode) -> Result<()> {
        self.done(Request::Stop { vm, mode }, SLOW).await
    }

    pub(crate) async fn remove(&self, vm: VmId) -> Result<()> {
        self.done(Request::Remove { vm }, SLOW).await
    }

    pub(crate) async fn end_sessions(&self, vm: VmId) -> Result<()> {
        self.done(Request::EndSessions { vm }, QUICK).await
    }

    pub(crate) async fn freeze(&self, vm: VmId, frozen: bool) -> Result<()> {
        let request = if frozen { Request::Freeze { vm } } else { Request::Thaw { vm } };
        self.done(request, SLOW).await
    }

    pub(crate) async fn pause(&self, vm: VmId, paused: bool) -> Result<()> {
        let request = if paused { Request::Pause { vm } } else { Request::Resume { vm } };
        self.done(request, SLOW).await
    }

    pub(crate) async fn figures(&self, vm: VmId) -> Result<burgeon_api::vm::Figures> {
        match self.ask(Request::Figures { vm }, SLOW).await? {
            Reply::Figures(figures) => Ok(figures),
            other => Err(unexpected(&other)),
        }
    }

    /// A request that only changes something.
    pub(crate) async fn change_disk(&self, vm: VmId, request: DiskRequest) -> Result<DiskChanged> {
        match self.disk(vm, request).await? {
            Reply::Done => Ok(DiskChanged::default()),
            Reply::DiskChanged(changed) => Ok(changed),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn disks(&self, vm: VmId) -> Result<Vec<DiskView>> {
        match self.disk(vm, DiskRequest::List).await? {
            Reply::Disks(disks) => Ok(disks),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn disk_changes(
        &self,
        vm: VmId,
        disk: String,
        from: String,
        to: Option<String>,
    ) -> Result<DiskChanges> {
        match self.disk(vm, DiskRequest::Changes { disk, from, to }).await? {
            Reply::DiskChanges(changes) => Ok(changes),
            other => Err(unexpected(&other)),
        }
    }

    /// The image that a VM was started from.
    pub(crate) async fn image_of(&self, vm: VmId) -> Result<Image> {
        match self.disk(vm, DiskRequest::Image).await? {
            Reply::Image(image) => Ok(*image),
            other => Err(unexpected(&other)),
        }
    }

    /// Has a disk stored; see [`DiskRequest::HandOver`].
    pub(crate) async fn hand_over(&self, vm: VmId, request: DiskRequest) -> Result<Storing> {
        match self.open(Request::Disk { vm, request }, SLOW).await? {
            (Reply::Stream, stream) => Ok(Storing(stream)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn disk(&self, vm: VmId, request: DiskRequest) -> Result<Reply> {
        self.ask(Request::Disk { vm, request }, SLOW).await
    }

    pub(crate) async fn log(&self, vm: VmId) -> Result<Vec<u8>> {
        match self.ask(Request::Log { vm }, QUICK).await? {
            Reply::Log { text } => Ok(text),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn exit(&self) -> Result<()> {
        self.done(Request::Exit, QUICK).await
    }

    /// Puts a file of known content into a VM.
    pub(crate) async fn put(&self, vm: VmId, path: Vec<u8>, mode: u32, content: &[u8]) -> Result<()> {
        let request = FileRequest::Put { path, mode, size: content.len() as u64 };
        timeout(SLOW, async {
            let mut stream = self.connect_put(vm, request).await?;
            if let Err(error) = stream.write_all(content).await {
                // The host has refused; its reason is in the reply.
                tracing::debug!(%error, "a file was not taken whole");
            }
            finish_put(&mut stream).await
        })
        .await
        .map_err(|_| Error::deadline("the VM did not take the file in time"))?
    }

    /// Begins to put a file: its bytes are to be written to the stream, then [`finish_put`].
    pub(crate) async fn connect_put(&self, vm: VmId, request: FileRequest) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).await.map_err(|error| unreachable(&error))?;
        send_request(&mut stream, Request::File { vm, request }).await?;
        Ok(stream)
    }

    /// A file request other than `Put`.
    pub(crate) async fn file(&self, vm: VmId, request: FileRequest) -> Result<(Reply, UnixStream)> {
        self.open(Request::File { vm, request }, SLOW).await
    }
}

/// A disk that is being stored. The host goes on for as long as this is there.
pub(crate) struct Storing(UnixStream);

impl Storing {
    /// What the host says next.
    ///
    /// # Errors
    /// `Unavailable` where it is gone, `Deadline` where it says nothing.
    pub(crate) async fn next(&mut self) -> Result<Handover> {
        let message = timeout(QUICK, receive_message(&mut self.0))
            .await
            .map_err(|_| Error::deadline("the host process does not say how far it is with the disk"))?
            .map_err(|error| error.with_hint("ask again: what is stored already is not stored twice"))?;
        serde_json::from_slice(&message)
            .map_err(|error| Error::damaged(format!("the host process's message does not read: {error}")))
    }
}

/// Waits until a file that was put is in its place.
pub(crate) async fn finish_put(stream: &mut UnixStream) -> Result<()> {
    match timeout(SLOW, receive_reply(stream)).await {
        Ok(Ok(Reply::Done)) => Ok(()),
        Ok(Ok(other)) => Err(unexpected(&other)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::deadline("the VM did not take the file in time")),
    }
}

fn unreachable(error: &std::io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, format!("the host process cannot be reached: {error}"))
        .with_hint("it is started by burgeon serve; burgeon doctor tells more")
}

fn unexpected(reply: &Reply) -> Error {
    Error::internal(format!("the host process gave an answer of the wrong kind: {reply:?}"))
}

async fn send_request(stream: &mut UnixStream, request: Request) -> Result<()> {
    let mut message = vec![0; 4];
    serde_json::to_writer(&mut message, &Envelope { version: VERSION, request })
        .map_err(|error| Error::internal(error.to_string()))?;
    let length = u32::try_from(message.len() - 4).unwrap_or(u32::MAX);
    message[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&message).await.map_err(|error| unreachable(&error))
}

/// Reads one message: its length, then JSON.
pub(crate) async fn receive_message(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let length = stream.read_u32_le().await.map_err(|error| unreachable(&error))?;
    if length > MOST_REPLY {
        return Err(Error::damaged(format!("the host process sent a message of {length} bytes")));
    }
    let mut message = vec![0; length as usize];
    stream.read_exact(&mut message).await.map_err(|error| unreachable(&error))?;
    Ok(message)
}

async fn receive_reply(stream: &mut UnixStream) -> Result<Reply> {
    let message = receive_message(stream).await?;
    match serde_json::from_slice(&message) {
        Ok(Reply::Refused(error)) => Err(error),
        Ok(reply) => Ok(reply),
        Err(error) => Err(Error::damaged(format!("the host process's answer does not read: {error}"))),
    }
}
