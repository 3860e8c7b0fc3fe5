//! The host's unix socket: one request per connection.

use std::{sync::Arc, time::Duration};

use burgeon_api::{
    Error, ErrorKind, RequestId, Result, VmId,
    disk::DiskChanged,
    host::{DiskRequest, Envelope, FileEntry, FileKind, FileRequest, Reply, Request, VERSION},
    http::Setting,
    provisions::Provisions,
    snapshot::VmSnapshot,
    substrate::Recipe,
    vm::Observed,
};
use burgeon_guest::protocol::FileKind as GuestFileKind;
use burgeon_plan::vm::is_over;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{broadcast, mpsc, oneshot},
    time::Instant,
};

use crate::{
    console,
    fork::End,
    handover,
    plug::{self, blocking},
    provisions,
    record::Record,
    registry::Registry,
    resize::Change,
    session::Attachment,
    shares, snapshots,
    start::Context,
    take_in,
    vm::{Command, Hold, VmHandle},
};

const MOST_REQUEST: u32 = 4 << 20;
/// A request's first line must come within this.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// How long a snapshot that an earlier request has begun is waited for, and between two looks.
const SNAPSHOT: Duration = Duration::from_secs(600);
const AGAIN: Duration = Duration::from_millis(50);

/// What this process says of itself.
pub(crate) struct About {
    pub(crate) build: String,
    pub(crate) settings: Vec<Setting>,
}

/// Serves until `leave` is asked for.
pub(crate) async fn serve(
    listener: UnixListener,
    context: Arc<Context>,
    registry: Registry,
    about: About,
) -> Result<()> {
    let (leave, mut leaving) = mpsc::channel::<()>(1);
    let about = Arc::new(about);
    loop {
        tokio::select! {
            connection = listener.accept() => match connection {
                Ok((stream, _)) => {
                    let connection = Connection { context: context.clone(), registry: registry.clone(), about: about.clone(), leave: leave.clone() };
                    tokio::spawn(connection.serve(stream));
                }
                Err(error) => {
                    tracing::error!(%error, "the host's socket does not accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(()) = leaving.recv() => return Ok(()),
        }
    }
}

struct Connection {
    context: Arc<Context>,
    registry: Registry,
    about: Arc<About>,
    leave: mpsc::Sender<()>,
}

impl Connection {
    async fn serve(self, mut stream: UnixStream) {
        if let Err(error) = self.answer(&mut stream).await {
            // A client that is gone needs no answer.
            drop(reply(&mut stream, &Reply::Refused(error)).await);
        }
    }

    async fn answer(self, stream: &mut UnixStream) -> Result<()> {
        let request = tokio::time::timeout(REQUEST_DEADLINE, read_request(stream))
            .await
            .map_err(|_| Error::deadline("no request came"))??;
        match request {
            Request::Hello => {
                let (accelerator, reason) = match self.context.verdict.get() {
                    Some(verdict) => (verdict.accelerator(), verdict.reason.clone()),
                    None => (
                        burgeon_api::vm::Accelerator::Tcg,
                        "not decided yet: the first VM's kernel will be the probe".into(),
                    ),
                };
                reply(
                    stream,
                    &Reply::Hello {
                        version: VERSION,
                        pid: std::process::id(),
                        build: self.about.build.clone(),
                        accelerator,
                        accelerator_reason: reason,
                        settings: self.about.settings.clone(),
                    },
                )
                .await
            }
            Request::List => {
                let vms = self.registry.list().await?;
                reply(stream, &Reply::Vms(vms)).await
            }
            Request::Launch(launch) => {
                self.registry.launch(*launch, None).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Provide { vm, provisions } => {
                self.provide(vm, provisions).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Start { vm, starts } => {
                self.ask_vm(vm, |done| Command::Start { starts, done }).await??;
                reply(stream, &Reply::Done).await
            }
            Request::Stop { vm, mode } => {
                self.ask_vm(vm, |done| Command::Stop { mode, done }).await??;
                reply(stream, &Reply::Done).await
            }
            Request::Remove { vm } => {
                match self.ask_vm(vm, |done| Command::Remove { done }).await {
                    Ok(outcome) => outcome?,
                    // Not there, or gone while it was asked: that is what was wanted.
                    Err(error) if error.kind == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
                reply(stream, &Reply::Done).await
            }
            Request::EndSessions { vm } => {
                self.ask_vm(vm, |done| Command::EndSessions { done }).await??;
                reply(stream, &Reply::Done).await
            }
            Request::Exec { vm, attach } => {
                let handle = self.registry.get(vm).await?;
                reply(stream, &Reply::Stream).await?;
                self.hand_over(stream, &handle, |stream| Command::Exec {
                    attachment: Box::new(Attachment { stream, attach: *attach }),
                })
                .await
            }
            Request::Console { vm } => {
                let handle = self.running(vm).await?;
                reply(stream, &Reply::Stream).await?;
                self.hand_over(stream, &handle, |client| Command::Console { client }).await
            }
            Request::Display { vm } => {
                let handle = self.running(vm).await?;
                reply(stream, &Reply::Stream).await?;
                self.hand_over(stream, &handle, |client| Command::Display { client }).await
            }
            Request::File { vm, request } => self.file(stream, vm, request).await,
            Request::Disk { vm, request: DiskRequest::HandOver { disk, snapshot, root } } => {
                self.stored_record(vm).await?;
                let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
                handover::serve(stream, gate, &self.context.disks, (vm, disk), snapshot, root).await
            }
            Request::Disk { vm, request } => {
                let answer = self.disk(vm, request).await?;
                reply(stream, &answer).await
            }
            Request::Figures { vm } => {
                let figures = self.agent(vm).await?.figures().await?;
                reply(stream, &Reply::Figures(figures)).await
            }
            Request::Freeze { vm } => {
                self.freeze(vm, true).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Thaw { vm } => {
                self.freeze(vm, false).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Pause { vm } => {
                let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
                gate.pause(&self.context, |hold| self.hold(vm, hold)).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Resume { vm } => {
                let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
                gate.resume(&self.context, |hold| self.hold(vm, hold)).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Resize { vm, resize } => {
                let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
                let resized = gate.resize(&self.context, resize, |change| self.resize(vm, change)).await?;
                reply(stream, &Reply::Resized(resized)).await
            }
            Request::Dock { vm, recipe } => {
                self.dock(vm, &recipe).await?;
                reply(stream, &Reply::Done).await
            }
            Request::KeepStandbys { vm, count } => {
                self.ask_vm(vm, |done| Command::KeepStandbys { count, done }).await??;
                reply(stream, &Reply::Done).await
            }
            Request::Standbys => reply(stream, &Reply::Standbys(self.context.standbys.all())).await,
            Request::Shares { substrate, vms } => {
                let shares = shares::of(&self.context, &self.registry, substrate, &vms).await?;
                reply(stream, &Reply::Shares(shares)).await
            }
            Request::LayOut { vm, directory } => {
                let laid_out = take_in::lay_out(&self.context, &self.registry, vm, directory).await?;
                reply(stream, &Reply::LaidOut(laid_out)).await
            }
            Request::TakeIn(request) => {
                take_in::take_in(&self.context, &self.registry, *request).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Park { vm } => {
                self.park(vm).await?;
                reply(stream, &Reply::Done).await
            }
            Request::Snapshot { vm, request, name } => {
                let snapshot = self.snapshot(vm, request, name).await?;
                reply(stream, &Reply::Snapshot(Box::new(snapshot))).await
            }
            Request::Snapshots { vm } => {
                let directory = self.registry.get(vm).await?.directory;
                let all = blocking(move || snapshots::list(&directory)).await?;
                reply(stream, &Reply::Snapshots(all.into_iter().map(|snapshot| snapshot.about).collect())).await
            }
            Request::RemoveSnapshot { vm, snapshot } => {
                let _gate = self.ask_vm(vm, |reply| Command::GateOfKept { reply }).await??;
                let (directory, disks) = (self.registry.get(vm).await?.directory, self.context.disks.clone());
                blocking(move || {
                    snapshots::remove(&directory, &snapshot)?;
                    disks.let_snapshot_go(vm, &snapshot)
                })
                .await?;
                reply(stream, &Reply::Done).await
            }
            Request::RollBack { vm, starts, snapshot } => {
                self.ask_vm(vm, |done| Command::RollBack { starts, snapshot, done }).await??;
                reply(stream, &Reply::Done).await
            }
            Request::GiveUp { vm, reason } => {
                self.ask_vm(vm, |done| Command::GiveUp { reason, done }).await??;
                reply(stream, &Reply::Done).await
            }
            Request::Fork { vm, children, all_or_nothing } => {
                let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
                let forked = gate.fork(&self.context, &self.registry, children, all_or_nothing).await?;
                reply(stream, &Reply::Forked(forked)).await
            }
            Request::Log { vm } => {
                let handle = self.registry.get(vm).await?;
                let text = tokio::task::spawn_blocking(move || console::log_text(&handle.directory))
                    .await
                    .map_err(|error| Error::internal(format!("read the console's log: {error}")))?;
                reply(stream, &Reply::Log { text }).await
            }
            Request::Watch => self.watch(stream).await,
            Request::Exit => {
                let vms = self.registry.list().await?;
                if let Some(vm) = vms.iter().find(|vm| !is_over(&vm.observed)) {
                    return Err(Error::conflict(format!("VM {} is {}", vm.name, vm.observed.name())));
                }
                // What demand has made goes with this process; what a user has asked for stays.
                if self.context.standbys.all().iter().any(|(_, of)| of.asked.is_some_and(|asked| asked > 0)) {
                    return Err(Error::conflict("QEMUs wait for VMs, as a user wants it"));
                }
                reply(stream, &Reply::Done).await?;
                if self.leave.try_send(()).is_err() {
                    tracing::debug!("asked to leave already");
                }
                Ok(())
            }
        }
    }

    async fn provide(&self, vm: VmId, provisions: Provisions) -> Result<()> {
        if self.registry.get(vm).await.is_ok() {
            return Ok(());
        }
        let context = self.context.clone();
        blocking(move || provisions::keep(&context.layout, &context.secrets, vm, provisions)).await
    }

    /// Makes a substrate of a VM. One that is docked already stays as it is.
    async fn dock(&self, vm: VmId, recipe: &Recipe) -> Result<()> {
        let handle = self.registry.get(vm).await?;
        if handle.view.borrow().observed == Observed::Docked {
            return Ok(());
        }
        // One who makes it at a time: another is told that somebody does.
        let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
        let made = async {
            gate.warm_up(recipe).await?;
            let (docked, frozen) = gate.dock(&self.context, End::Substrate).await?;
            let (docked, observed) = (Box::new(docked), Observed::Docked);
            self.ask_vm(vm, |done| Command::Docked { docked, observed, done }).await??;
            Ok::<_, Error>(frozen)
        };
        match made.await {
            Ok(frozen) => {
                self.context.substrates.put(vm, frozen);
                self.context.standbys.touch(vm);
                Ok(())
            }
            Err(error) => {
                let reason = error.to_string();
                self.ask_vm(vm, |done| Command::GiveUp { reason, done }).await??;
                Err(error)
            }
        }
    }

    /// Freezes or thaws the workload, while nobody captures it.
    async fn freeze(&self, vm: VmId, frozen: bool) -> Result<()> {
        let agent = self.agent(vm).await?;
        let _gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
        if frozen {
            agent.freeze().await?
        } else {
            agent.thaw().await?
        }
        self.hold(vm, Hold::Frozen(frozen)).await
    }

    async fn hold(&self, vm: VmId, hold: Hold) -> Result<()> {
        self.ask_vm(vm, |done| Command::Hold { hold, done }).await?
    }

    async fn resize(&self, vm: VmId, change: Change) -> Result<()> {
        self.ask_vm(vm, |done| Command::Resize { change, done }).await?
    }

    /// Keeps a VM's state and ends its process. One that is parked already stays as it is.
    async fn park(&self, vm: VmId) -> Result<()> {
        let handle = self.registry.get(vm).await?;
        if matches!(handle.view.borrow().observed, Observed::Parked { .. }) {
            return Ok(());
        }
        let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
        let (docked, _) = gate.dock(&self.context, End::Parked).await.map_err(|error| error.context("park the VM"))?;
        let (docked, observed) = (Box::new(docked), Observed::Parked { reason: "parked on request".into() });
        let parked = self.ask_vm(vm, |done| Command::Docked { docked, observed, done }).await;
        let parked = parked.and_then(|parked| parked);
        if parked.is_err() {
            gate.go_on(&self.context).await?;
        }
        parked
    }

    /// Takes a snapshot. Where an earlier asker has gone away, the same request waits for what it has begun.
    async fn snapshot(&self, vm: VmId, request: RequestId, name: Option<String>) -> Result<VmSnapshot> {
        let directory = self.registry.get(vm).await?.directory;
        let until = Instant::now() + SNAPSHOT;
        let gate = loop {
            match self.ask_vm(vm, |reply| Command::GateOfKept { reply }).await? {
                Err(error) if error.kind == ErrorKind::Conflict && snapshots::is_begun(&directory, request) => {
                    if Instant::now() > until {
                        return Err(error);
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                gate => break gate?,
            }
        };
        gate.snapshot(&self.context, request, name).await
    }

    /// What changes which disks there are goes through the VM's gate; the rest needs only the disks.
    async fn disk(&self, vm: VmId, request: DiskRequest) -> Result<Reply> {
        let disks = self.context.disks.clone();
        let record = self.stored_record(vm).await?;
        Ok(match request {
            DiskRequest::List => Reply::Disks(blocking(move || disks.list(vm)).await?),
            DiskRequest::Snapshot { disk, snapshot } => {
                let note = self.sync_guest(vm).await;
                blocking(move || disks.snapshot(&(vm, disk), &snapshot)).await?;
                Reply::DiskChanged(DiskChanged { device: None, notes: note.into_iter().collect() })
            }
            DiskRequest::RemoveSnapshot { disk, snapshot } => {
                blocking(move || disks.remove_snapshot(&(vm, disk), &snapshot)).await?;
                Reply::Done
            }
            DiskRequest::Changes { disk, from, to } => {
                Reply::DiskChanges(blocking(move || disks.changes(&(vm, disk), &from, to.as_deref())).await?)
            }
            DiskRequest::Sync => {
                let notes = self.sync_guest(vm).await.into_iter().collect();
                Reply::DiskChanged(DiskChanged { device: None, notes })
            }
            DiskRequest::Image => Reply::Image(Box::new(record.launch.image)),
            change => {
                let gate = self.ask_vm(vm, |reply| Command::Gate { reply }).await??;
                Reply::DiskChanged(gate.change(&disks, vm, change).await?)
            }
        })
    }

    /// The record of a VM whose disks are in the store.
    async fn stored_record(&self, vm: VmId) -> Result<Record> {
        let record = self.ask_vm(vm, |reply| Command::Record { reply }).await?;
        if record.launch.image.map.is_none() && record.launch.image.disk.is_some() {
            let name = &record.launch.name;
            return Err(Error::refused(format!("VM {name} was made of an image whose disk is not in the store"))
                .with_hint("build or import the image again, and make the VM anew"));
        }
        Ok(record)
    }

    /// Has a running guest bring its files to its disks; says what speaks against relying on that.
    async fn sync_guest(&self, vm: VmId) -> Option<String> {
        match self.agent(vm).await {
            Ok(agent) => plug::sync_guest(&agent).await,
            Err(error) if error.kind == ErrorKind::Conflict => Some(plug::UNSYNCED.into()),
            // It has stopped, or has no agent.
            Err(_) => None,
        }
    }

    async fn ask_vm<T>(&self, vm: VmId, make: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T> {
        let handle = self.registry.get(vm).await?;
        let (sender, receiver) = oneshot::channel();
        let gone = || Error::not_found(format!("VM {vm} has just been removed"));
        handle.commands.send(make(sender)).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())
    }

    async fn running(&self, vm: VmId) -> Result<VmHandle> {
        let handle = self.registry.get(vm).await?;
        let observed = handle.view.borrow().observed.clone();
        if observed == Observed::Running {
            return Ok(handle);
        }
        let name = handle.view.borrow().name.clone();
        Err(Error::unavailable(
            format!("VM {name} is {} {}", observed.name(), observed.detail()).trim_end().to_string(),
        ))
    }

    async fn agent(&self, vm: VmId) -> Result<burgeon_guest::client::AgentClient> {
        self.ask_vm(vm, |reply| Command::Agent { reply }).await?
    }

    async fn hand_over(
        &self,
        stream: &mut UnixStream,
        handle: &VmHandle,
        make: impl FnOnce(UnixStream) -> Command,
    ) -> Result<()> {
        // The connection changes hands; what stays behind is one end of a pair that nobody uses.
        let (spare, _) = UnixStream::pair().map_err(|error| Error::io("hand over a connection", &error))?;
        let stream = std::mem::replace(stream, spare);
        handle.commands.send(make(stream)).await.map_err(|_| Error::not_found("the VM has just been removed"))
    }

    async fn file(&self, stream: &mut UnixStream, vm: VmId, request: FileRequest) -> Result<()> {
        let agent = self.agent(vm).await?;
        match request {
            FileRequest::Put { path, mode, size } => {
                let content = (&mut *stream).take(size);
                agent.put(&path, mode, size, content).await?;
                reply(stream, &Reply::Done).await
            }
            FileRequest::Get { path } => {
                let (mode, size, mut content) = agent.get(&path).await?;
                reply(stream, &Reply::Content { mode, size }).await?;
                // After the reply a failure can only be told by the missing bytes.
                while let Ok(Some(data)) = content.next().await {
                    stream.write_all(&data).await.map_err(|error| Error::io("send a file", &error))?;
                }
                Ok(())
            }
            FileRequest::List { path } => {
                let entries = agent.list(&path).await?;
                let entries = entries
                    .into_iter()
                    .map(|entry| FileEntry {
                        name: entry.name,
                        kind: match entry.kind {
                            GuestFileKind::File => FileKind::File,
                            GuestFileKind::Directory => FileKind::Directory,
                            GuestFileKind::Link => FileKind::Link,
                            GuestFileKind::Other => FileKind::Other,
                        },
                        mode: entry.mode,
                        size: entry.size,
                    })
                    .collect();
                reply(stream, &Reply::Entries(entries)).await
            }
            FileRequest::MakeDirectory { path, mode } => {
                agent.make_directory(&path, mode).await?;
                reply(stream, &Reply::Done).await
            }
        }
    }

    async fn watch(&self, stream: &mut UnixStream) -> Result<()> {
        let mut changes = self.registry.changes();
        reply(stream, &Reply::Stream).await?;
        let mut gone = [0];
        loop {
            tokio::select! {
                change = changes.recv() => {
                    let vm = match change {
                        Ok(vm) => vm,
                        // The watcher asks for the whole list at every change, and more changes follow this gap.
                        Err(broadcast::error::RecvError::Lagged(_)) => continue,
                        Err(broadcast::error::RecvError::Closed) => return Ok(()),
                    };
                    if send(stream, &vm).await.is_err() {
                        return Ok(());
                    }
                }
                _ = stream.read(&mut gone) => return Ok(()),
            }
        }
    }
}

async fn read_request(stream: &mut UnixStream) -> Result<Request> {
    let line = read_message(stream).await?;
    let about: Envelope = serde_json::from_slice(&line).map_err(|error| {
        match serde_json::from_slice::<serde_json::Value>(&line).ok().and_then(|value| value["version"].as_u64()) {
            Some(version) if version != u64::from(VERSION) => wrong_version(version),
            _ => Error::invalid(format!("the request does not read: {error}")),
        }
    })?;
    if about.version != VERSION {
        return Err(wrong_version(about.version.into()));
    }
    Ok(about.request)
}

fn wrong_version(version: u64) -> Error {
    Error::refused(format!("host protocol version {version} is not known; this host process speaks version {VERSION}"))
        .with_hint("restart both processes of this machine from the same Burgeon")
}

/// A message: its length as four bytes, little-endian, then JSON.
async fn read_message(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let failed = |error: std::io::Error| Error::io("read a request", &error);
    let length = stream.read_u32_le().await.map_err(failed)?;
    if length > MOST_REQUEST {
        return Err(Error::invalid(format!("a request of {length} bytes")));
    }
    let mut message = vec![0; length as usize];
    stream.read_exact(&mut message).await.map_err(failed)?;
    Ok(message)
}

pub(crate) async fn reply(stream: &mut UnixStream, reply: &Reply) -> Result<()> {
    send(stream, reply).await.map_err(|error| Error::io("answer a request", &error))
}

pub(crate) async fn send(stream: &mut UnixStream, value: &impl serde::Serialize) -> std::io::Result<()> {
    let mut message = vec![0; 4];
    serde_json::to_writer(&mut message, value)?;
    let length = u32::try_from(message.len() - 4).unwrap_or(u32::MAX);
    message[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&message).await
}
