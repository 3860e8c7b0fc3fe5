//! The task that owns one VM on this host, from launch or adoption to removal.
//!
//! ```text
//!            launch                       adoption after our own restart
//!               |                                    |
//!               v                                    v
//!           Starting ---failed---> Failed        Unknown --answers--> Running
//!               |                                    |
//!             ready                            process gone
//!               v                                    v
//! Paused <--> Running --guest or user ends it--> Stopped / Failed
//!                                                 |
//!                     Starting <---user says so---+ (Stopped only, with its disk)
//! ```
//! It is one thing, and one file: every state change goes through its loop.
//! Nothing else writes the VM's record or talks to its QEMU. Requests come by [`VmHandle`].

mod hold;
mod rollback;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use burgeon_api::{
    ByteSize, Error, ExecId, Result,
    exec::{Exit, Frame},
    host::{Launch, StopMode},
    image::Boot,
    substrate::Docked,
    vm::{HostVm, Observed},
};
use burgeon_guest::{client::AgentClient, protocol::StopHow};
use burgeon_qemu::{
    growth,
    memory::Base,
    process::{End, Process},
    qmp::Event,
};
use burgeon_store::steps::{Step as DiesAt, reached};
pub(crate) use hold::{Hold, is_paused};
use serde_json::Value;
use tokio::{
    net::UnixStream,
    sync::{Mutex, broadcast, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    activate::{self, Claim},
    display, fork, frozen,
    plug::Gate,
    prepare::Disk,
    provisions,
    record::Record,
    resize::{Change, Measure},
    session::{self, Attachment},
    snapshots,
    start::{self, Context, Step, Up, group_name},
};

/// How long before a VM that could not be reattached is tried again.
const REATTACH: Duration = Duration::from_secs(5);

/// After its agent's first word a guest goes on starting for so long, as far as the image's trace is concerned.
const START_TRACED: Duration = Duration::from_secs(30);

/// How often a killed process that was never up is looked for.
const DYING: Duration = Duration::from_millis(10);

pub(crate) enum Command {
    Stop {
        mode: StopMode,
        done: oneshot::Sender<Result<()>>,
    },
    /// Start a VM that has stopped once more, unless this number was begun.
    Start {
        starts: u32,
        done: oneshot::Sender<Result<()>>,
    },
    /// Has it go on from a snapshot of it, unless this number was begun.
    RollBack {
        starts: u32,
        snapshot: String,
        done: oneshot::Sender<Result<()>>,
    },
    Remove {
        done: oneshot::Sender<Result<()>>,
    },
    Exec {
        attachment: Box<Attachment>,
    },
    Console {
        client: UnixStream,
    },
    Display {
        client: UnixStream,
    },
    /// The agent, for requests that need nothing else.
    Agent {
        reply: oneshot::Sender<Result<AgentClient>>,
    },
    EndSessions {
        done: oneshot::Sender<Result<()>>,
    },
    /// The right to change the VM's disks, and to capture it, given to one at a time.
    Gate {
        reply: oneshot::Sender<Result<Gate>>,
    },
    /// The same, of a VM that may be parked: for who changes nothing that fits what is kept of it.
    GateOfKept {
        reply: oneshot::Sender<Result<Gate>>,
    },
    /// It is captured, as a substrate or to be parked: its process ends. From whom has the gate.
    Docked {
        docked: Box<Docked>,
        observed: Observed,
        done: oneshot::Sender<Result<()>>,
    },
    /// It is not what it should have become, and ends for this reason.
    GiveUp {
        reason: String,
        done: oneshot::Sender<Result<()>>,
    },
    /// How many QEMUs wait for VMs that go on from this one.
    KeepStandbys {
        count: Option<u32>,
        done: oneshot::Sender<Result<()>>,
    },
    Record {
        reply: oneshot::Sender<Record>,
    },
    /// What it shall have from now on, or has. From whom has the gate.
    Resize {
        change: Change,
        done: oneshot::Sender<Result<()>>,
    },
    /// Its user has stopped it, or lets it go on. From whom has the gate.
    Hold {
        hold: Hold,
        done: oneshot::Sender<Result<()>>,
    },
}

/// How the rest of the host process reaches a VM's task.
#[derive(Clone)]
pub(crate) struct VmHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) view: watch::Receiver<HostVm>,
    pub(crate) directory: PathBuf,
}

struct Owner {
    context: Arc<Context>,
    directory: PathBuf,
    record: Record,
    view: watch::Sender<HostVm>,
    changes: broadcast::Sender<HostVm>,
    up: Option<Up>,
    /// The start or the adoption that is going on.
    starting: Option<JoinHandle<Result<Up>>>,
    steps: mpsc::UnboundedReceiver<Step>,
    sessions: HashMap<ExecId, mpsc::Sender<Attachment>>,
    /// A stop was asked for: by whom, until when it may take.
    stopping: Option<(Instant, Vec<oneshot::Sender<Result<()>>>)>,
    removing: Option<oneshot::Sender<Result<()>>>,
    guest_reason: Option<String>,
    monitor: Option<broadcast::Receiver<Event>>,
    retry_at: Option<Instant>,
    /// Left by an earlier host process, and not yet taken hold of.
    adopting: bool,
    /// What its memory began with, where that is known.
    base: Option<Arc<Base>>,
    /// Held by who changes the VM's disks: then it is not started.
    gate: Arc<Mutex<()>>,
    /// The guest is paused because its disk could not be written; when to let it try again.
    disk_retry_at: Option<Instant>,
}

/// Begins a launch: the directory is made and the record written before this returns.
pub(crate) fn launch(
    context: Arc<Context>,
    launch: Launch,
    claim: Option<Claim>,
    changes: broadcast::Sender<HostVm>,
) -> Result<VmHandle> {
    let directory = context.layout.vm(launch.id);
    std::fs::create_dir_all(&directory).map_err(|error| Error::io("create the VM's directory", &error))?;
    let record = Record::new(launch);
    provisions::move_in(&context.layout, &record.launch, &directory)?;
    record.store(&directory)?;
    let observed = Observed::Starting { phase: "queued".into() };
    Ok(spawn(context, directory, record, observed, changes, Begin::Launch(claim)))
}

/// Takes up a VM that an earlier host process has left.
pub(crate) fn resume(
    context: Arc<Context>,
    directory: PathBuf,
    record: Record,
    found: Result<Arc<Process>, Observed>,
    changes: broadcast::Sender<HostVm>,
) -> VmHandle {
    match found {
        Ok(process) => {
            let observed = Observed::Unknown { reason: "being found again after a restart of the host process".into() };
            spawn(context, directory, record, observed, changes, Begin::Adopt(process))
        }
        // It was to go on from a snapshot. How far it had come does not matter: it begins once more.
        Err(starting @ Observed::Starting { .. }) => {
            spawn(context, directory, record, starting, changes, Begin::RollBack)
        }
        Err(ended) => spawn(context, directory, record, ended, changes, Begin::Ended),
    }
}

enum Begin {
    Launch(Option<Claim>),
    Adopt(Arc<Process>),
    RollBack,
    Ended,
}

fn spawn(
    context: Arc<Context>,
    directory: PathBuf,
    record: Record,
    observed: Observed,
    changes: broadcast::Sender<HostVm>,
    begin: Begin,
) -> VmHandle {
    let first = HostVm {
        id: record.launch.id,
        name: record.launch.name.clone(),
        observed,
        pid: record.process.as_ref().filter(|_| record.ended.is_none()).map(|process| process.pid),
        accelerator: record.accelerator,
        boot: record.launch.image.boot,
        limits: record.limits.clone(),
        guest: None,
        start_times: Vec::new(),
        resident: None,
        cpu_milliseconds: None,
        adoptions: record.adoptions,
        starts: record.starts,
        receipt: record.receipt.clone(),
        docked: record.docked.clone(),
        snapshots: 0,
        size: record.size,
    };
    let (commands, receiver) = mpsc::channel(64);
    let (view, view_receiver) = watch::channel(first.clone());
    let (step_sender, steps) = mpsc::unbounded_channel();
    let adopting = matches!(begin, Begin::Adopt(_));
    let handle = VmHandle { commands, view: view_receiver, directory: directory.clone() };
    let starting = match begin {
        Begin::Launch(claim) => Some(bring_up(&context, &directory, &record, Disk::New, claim, step_sender)),
        Begin::Adopt(process) => Some(adopt(&context, directory.clone(), record.clone(), process)),
        Begin::RollBack => Some(bring_up(&context, &directory, &record, Disk::Kept, None, step_sender)),
        Begin::Ended => None,
    };
    if record.standbys.is_some() {
        context.standbys.ask(record.launch.id, record.standbys);
    }
    let owner = Owner {
        context,
        directory,
        record,
        view,
        changes,
        up: None,
        starting,
        steps,
        sessions: HashMap::new(),
        stopping: None,
        removing: None,
        guest_reason: None,
        monitor: None,
        retry_at: None,
        adopting,
        base: None,
        gate: Arc::default(),
        disk_retry_at: None,
    };
    drop(owner.changes.send(first));
    tokio::spawn(owner.run(receiver));
    handle
}

fn bring_up(
    context: &Arc<Context>,
    directory: &Path,
    record: &Record,
    disk: Disk,
    claim: Option<Claim>,
    steps: mpsc::UnboundedSender<Step>,
) -> JoinHandle<Result<Up>> {
    let (context, directory, record) = (context.clone(), directory.to_path_buf(), record.clone());
    tokio::spawn(async move {
        let tell = move |step| {
            // The owner is gone only when the VM is being removed.
            drop(steps.send(step));
        };
        let claim = match (claim, record.launch.begin) {
            (Some(claim), _) => Some(claim),
            _ if record.rolling_back.is_some() => Some(rollback::claim(&context, &record).await?),
            _ if record.docked.is_some() => Some(Claim::of_parked(&context, &record).await?),
            // A VM that has stopped boots from its disk, however it began.
            _ if disk == Disk::Kept => None,
            (None, burgeon_api::host::Begin::Substrate) => Some(Claim::of_substrate(&context, &record.launch).await?),
            (None, burgeon_api::host::Begin::Snapshot) => {
                Some(Claim::of_snapshot_of_other(&context, &record.launch).await?)
            }
            (None, burgeon_api::host::Begin::Fork) => {
                return Err(Error::unavailable("the instant that it was to go on from is gone"));
            }
            (None, _) => None,
        };
        match claim {
            Some(claim) => activate::bring_up(&context, &directory, &record, claim, &tell).await,
            None => start::bring_up(&context, &directory, &record, disk, &tell).await,
        }
    })
}

fn adopt(context: &Arc<Context>, directory: PathBuf, record: Record, process: Arc<Process>) -> JoinHandle<Result<Up>> {
    let context = context.clone();
    tokio::spawn(async move { start::adopt(&context, &directory, &record, process).await })
}

enum Met {
    Command(Option<Command>),
    Step(Step),
    Up(Box<Result<Up>>),
    Ended,
    Monitor(Option<Event>),
    StopOverdue,
    Retry,
    DiskRetry,
    /// A process that is being removed and was never up is looked after.
    LookAgain,
    /// The agent's channel is over, though QEMU runs.
    ChannelEnded(Error),
}

impl Owner {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let process = self.up.as_ref().map(|up| up.process.clone());
            let agent = self.up.as_ref().and_then(|up| up.agent.clone());
            let stop_at = self.stopping.as_ref().map(|(deadline, _)| *deadline);
            let far = Instant::now() + Duration::from_secs(3600);
            let met = tokio::select! {
                command = commands.recv() => Met::Command(command),
                Some(step) = self.steps.recv() => Met::Step(step),
                up = async { match &mut self.starting { Some(task) => task.await, None => std::future::pending().await } } =>
                    Met::Up(Box::new(up.unwrap_or_else(|error| Err(Error::internal(format!("the start was broken off: {error}")))))),
                () = async { match &process { Some(process) => process.ended().await, None => std::future::pending().await } } => Met::Ended,
                event = async { match &mut self.monitor { Some(events) => events.recv().await, None => std::future::pending().await } } =>
                    Met::Monitor(match event { Ok(event) => Some(event), Err(broadcast::error::RecvError::Lagged(_)) => continue, Err(broadcast::error::RecvError::Closed) => None }),
                () = sleep_until(stop_at.unwrap_or(far)), if stop_at.is_some() => Met::StopOverdue,
                () = sleep_until(self.retry_at.unwrap_or(far)), if self.retry_at.is_some() => Met::Retry,
                () = sleep_until(self.disk_retry_at.unwrap_or(far)), if self.disk_retry_at.is_some() => Met::DiskRetry,
                error = async { match &agent { Some(agent) => channel_ended(agent).await, None => std::future::pending().await } } =>
                    Met::ChannelEnded(error),
                () = sleep(DYING), if self.removing.is_some() && process.is_none() => Met::LookAgain,
            };
            match met {
                Met::Command(Some(command)) => self.obey(command).await,
                // The host process is leaving: the VM goes on, and the next one adopts it.
                Met::Command(None) => return,
                Met::Step(step) => self.note(step),
                Met::Up(outcome) => {
                    self.starting = None;
                    self.came_up(*outcome);
                    self.monitor = self.up.as_ref().map(|up| up.qmp.subscribe());
                }
                Met::Monitor(Some(event)) => self.hear(&event),
                Met::Monitor(None) => self.monitor = None,
                Met::Ended => self.ended().await,
                Met::StopOverdue => {
                    tracing::info!(vm = %self.record.launch.name, "the guest did not stop in time; it is ended");
                    self.kill();
                    self.stopping = self.stopping.take().map(|(_, waiting)| (far, waiting));
                }
                Met::Retry => self.try_again(),
                Met::DiskRetry => self.try_disk_again(),
                Met::LookAgain => {}
                Met::ChannelEnded(error) => self.channel_lost(&error),
            }
            let is_over = self.up.is_none() && self.starting.is_none() && self.held().is_none();
            // Whoever changes its disks would leave a part of them behind.
            if self.removing.is_some() && is_over && self.gate.try_lock().is_ok() {
                self.remove();
                return;
            }
        }
    }

    fn publish(&self, change: impl FnOnce(&mut HostVm)) {
        self.view.send_modify(|view| {
            change(view);
            view.pid = self.record.process.as_ref().filter(|_| self.record.ended.is_none()).map(|process| process.pid);
            view.accelerator = self.record.accelerator;
            view.limits.clone_from(&self.record.limits);
            view.adoptions = self.record.adoptions;
            view.starts = self.record.starts;
            view.receipt.clone_from(&self.record.receipt);
            view.docked.clone_from(&self.record.docked);
        });
        // Nobody watching is no fault.
        drop(self.changes.send(self.view.borrow().clone()));
    }

    fn note(&mut self, step: Step) {
        match step {
            Step::Phase(phase, times) => self.publish(|view| {
                view.start_times = times;
                if matches!(view.observed, Observed::Starting { .. }) && phase != "ready" {
                    view.observed = Observed::Starting { phase: phase.to_string() };
                }
            }),
            Step::Started { record } => {
                self.record = *record;
                self.publish(|_| {});
            }
        }
    }

    fn came_up(&mut self, outcome: Result<Up>) {
        // Steps told before the end come first.
        while let Ok(step) = self.steps.try_recv() {
            self.note(step);
        }
        self.context.secrets.forget(self.record.launch.id);
        match outcome {
            Ok(up) => {
                if std::mem::take(&mut self.record.awaits_provisions) {
                    // Before anybody is told that it runs: the next host process gives them once more.
                    self.store();
                }
                if std::mem::take(&mut self.adopting) {
                    self.record.adoptions += 1;
                    self.store();
                }
                let guest = up.guest.clone();
                if let Some(receipt) = up.receipt.clone() {
                    self.record.receipt = Some(receipt);
                    self.record.awaits_receipt = false;
                    self.record.rolling_back = None;
                    // Before anybody is told that it runs: the next host process ends one without.
                    self.store();
                    self.forget_kept();
                }
                if up.base.is_some() {
                    self.base.clone_from(&up.base);
                }
                let Measure { has, shall } = up.measure;
                if shall != self.record.size() {
                    // It has what the state says that it goes on from.
                    self.record.size = Some(shall);
                    self.store();
                }
                self.up = Some(up);
                let (disks, launch) = (self.context.disks.clone(), self.record.launch.clone());
                tokio::spawn(async move {
                    sleep(START_TRACED).await;
                    drop(tokio::task::spawn_blocking(move || disks.keep_trace(&launch)).await);
                });
                let observed = if self.record.paused { Observed::Paused } else { Observed::Running };
                self.publish(|view| {
                    view.observed = observed;
                    view.guest = guest;
                    view.size = Some(has);
                });
            }
            Err(error) if matches!(self.view.borrow().observed, Observed::Unknown { .. }) => {
                if self.held().is_some() {
                    let reason = format!("its process runs and does not answer: {error}");
                    tracing::warn!(vm = %self.record.launch.name, %reason, "not reattached");
                    self.publish(|view| view.observed = Observed::Unknown { reason });
                    self.retry_at = Some(Instant::now() + REATTACH);
                } else {
                    self.finish(Observed::Failed {
                        reason: "its process ended while the host process was away".into(),
                    });
                }
            }
            // What is kept of it is as it was.
            Err(error) if self.record.goes_on() => {
                self.finish(Observed::Parked { reason: format!("it could not go on: {error}") });
            }
            // Its disk is its own, and it may boot from that.
            Err(error) if self.record.starts > 0 && self.record.awaits_receipt => {
                self.finish(Observed::Stopped { reason: format!("it could not go on: {error}") });
            }
            Err(error) => self.finish(Observed::Failed { reason: error.to_string() }),
        }
    }

    /// Lets go of what was kept of it while it was parked.
    fn forget_kept(&self) {
        let (disks, directory, id) = (self.context.disks.clone(), self.directory.clone(), self.record.launch.id);
        if self.record.starts > 0 {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = frozen::forget(&disks, &directory, id) {
                    tracing::warn!(vm = %id, %error, "what was kept of it while it was parked takes room until it is removed");
                }
            });
        }
    }

    /// Lets the guest write again. If that fails too, QEMU says so and pauses it once more.
    fn try_disk_again(&mut self) {
        self.disk_retry_at = None;
        if self.gate.try_lock().is_err() {
            // It is being captured, and stands for that.
            self.disk_retry_at = Some(Instant::now() + REATTACH);
            return;
        }
        let Some(up) = &self.up else { return };
        let qmp = up.qmp.clone();
        let name = self.record.launch.name.clone();
        tokio::spawn(async move {
            if let Err(error) = qmp.execute("cont", Value::Null).await {
                tracing::warn!(vm = %name, %error, "the paused guest does not go on");
            }
        });
        self.publish(|view| view.observed = Observed::Running);
    }

    /// The guest runs and its agent cannot be reached: taken up again as after a restart of ours.
    fn channel_lost(&mut self, error: &Error) {
        let reason = format!("the channel to its agent is over: {error}");
        tracing::warn!(vm = %self.record.launch.name, %reason, "attached again");
        self.up = None;
        self.monitor = None;
        self.sessions.clear();
        self.publish(|view| view.observed = Observed::Unknown { reason });
        self.retry_at = Some(Instant::now() + REATTACH);
    }

    fn try_again(&mut self) {
        self.retry_at = None;
        match self.held() {
            Some(process) => {
                let task = adopt(&self.context, self.directory.clone(), self.record.clone(), Arc::new(process));
                self.starting = Some(task);
            }
            None => self.finish(Observed::Failed { reason: "its process ended, and left no reason".into() }),
        }
    }

    /// The recorded process, if it runs.
    fn held(&self) -> Option<Process> {
        self.record.process.as_ref().and_then(|identity| Process::hold(identity).ok())
    }

    fn hear(&mut self, event: &Event) {
        let by_guest = event.data["guest"] == Value::Bool(true);
        match event.name.as_str() {
            "SHUTDOWN" => {
                let reason = event.data["reason"].as_str().unwrap_or("unknown");
                self.guest_reason = Some(match (by_guest, reason) {
                    (true, "guest-shutdown") => "the guest powered off".to_string(),
                    (true, "guest-panic") => "the guest's kernel panicked".to_string(),
                    (_, "host-signal") => "QEMU was asked to end by a signal".to_string(),
                    (_, other) => format!("QEMU says: {other}"),
                });
            }
            "BLOCK_IO_ERROR" => {
                let reason = event.data["reason"].as_str().unwrap_or("unknown").to_string();
                tracing::error!(vm = %self.record.launch.name, reason, "the VM's disk fails");
                // A paused one tries again when it is resumed.
                if event.data["action"] == "stop" && !self.record.paused {
                    let reason = format!(
                        "the guest is paused, because its disk cannot be written ({reason}); it is let go on every 5 s"
                    );
                    self.publish(|view| view.observed = Observed::Unknown { reason });
                    self.disk_retry_at = Some(Instant::now() + REATTACH);
                }
            }
            growth::CHANGED => {
                let began_with = self.record.launch.profile.memory;
                let Some(grown) = growth::size_in_event(&event.data) else { return };
                self.publish(|view| {
                    if let Some(size) = &mut view.size {
                        size.memory = ByteSize(began_with.0 + grown.0);
                    }
                });
            }
            _ => {}
        }
    }

    async fn ended(&mut self) {
        let process = self.up.take().map(|up| up.process);
        // QEMU's last words may still be on their way; its end closes the monitor.
        let last_words = Instant::now() + Duration::from_millis(500);
        while let Some(events) = &mut self.monitor {
            match tokio::time::timeout_at(last_words, events.recv()).await {
                Ok(Ok(event)) => self.hear(&event),
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => {}
                Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => self.monitor = None,
            }
        }
        let status = process.and_then(|process| process.reap());
        let asked = self.stopping.is_some() || self.removing.is_some();
        let observed = match (asked, self.guest_reason.take(), status) {
            (true, Some(reason), _) => Observed::Stopped { reason: format!("stopped on request ({reason})") },
            (true, None, _) => Observed::Stopped { reason: "stopped on request, by force".into() },
            (false, Some(reason), _) => Observed::Stopped { reason },
            (false, None, status) => {
                let log =
                    burgeon_qemu::process::log_tail(&self.directory.join(burgeon_qemu::command::file::QEMU_LOG), 400);
                let how = status.as_ref().map_or_else(|| "no exit status to be had".into(), ToString::to_string);
                let log = if log.is_empty() { log } else { format!("; QEMU said: {log}") };
                let launch = &self.record.launch;
                let what = if launch.begin.is_activation() && status.as_ref().is_some_and(End::is_of_lost_memory) {
                    // Others come from the store again, where each read is verified.
                    launch.source.iter().for_each(|source| self.context.substrates.forget(source.vm));
                    "substrate damaged: the memory that this VM began with cannot be read any more; QEMU ended"
                } else {
                    "QEMU ended unasked"
                };
                Observed::Failed { reason: format!("{what} ({how}){log}") }
            }
        };
        self.finish(observed);
    }

    /// The VM is over, one way or the other.
    fn finish(&mut self, observed: Observed) {
        if let Some(process) = self.held() {
            // A failed start: nothing of it may stay behind.
            process.kill();
        }
        self.let_go();
        self.record.ended = Some(observed.clone());
        // Nobody could resume it.
        self.record.paused = false;
        self.store();
        self.publish(|view| {
            view.observed = observed;
            view.resident = None;
            view.size = self.record.size;
        });
        if let Some((_, waiting)) = self.stopping.take() {
            for done in waiting {
                drop(done.send(Ok(())));
            }
        }
    }

    /// Lets go of all that belongs to a process that is gone.
    fn let_go(&mut self) {
        self.up = None;
        self.base = None;
        self.context.standbys.ended(self.record.launch.id);
        self.retry_at = None;
        self.disk_retry_at = None;
        self.sessions.clear();
        // Their only client is gone, so this takes no time.
        self.context.disks.close_all(self.record.launch.id);
        self.context.groups.remove(&group_name(&self.record.launch));
    }

    fn store(&self) {
        if let Err(error) = self.record.store(&self.directory) {
            tracing::error!(vm = %self.record.launch.name, %error, "the VM's record could not be written");
        }
    }

    fn kill(&mut self) {
        if let Some(task) = self.starting.take() {
            // Its guard kills the process on the way out.
            task.abort();
        }
        if let Some(up) = &self.up {
            up.process.kill();
        } else if let Some(process) = self.held() {
            process.kill();
        }
    }

    fn agent(&self) -> Result<AgentClient> {
        let name = &self.record.launch.name;
        let Some(up) = &self.up else {
            let view = self.view.borrow();
            let detail = view.observed.detail();
            let detail = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
            return Err(Error::unavailable(format!("VM {name} is {}{detail}", view.observed.name())));
        };
        if self.record.paused {
            return Err(is_paused(name));
        }
        up.agent.clone().ok_or_else(|| {
            Error::refused(format!("VM {name} has no agent: its image is not one of Burgeon's"))
                .with_hint(format!("use its console: burgeon vm console {name}"))
        })
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Stop { mode, done } => self.stop(mode, done).await,
            Command::Start { starts, done } => drop(done.send(self.start_again(starts))),
            Command::RollBack { starts, snapshot, done } => {
                let outcome = self.roll_back(starts, &snapshot).await;
                drop(done.send(outcome));
            }
            Command::Remove { done } => {
                self.removing = Some(done);
                self.kill();
                self.retry_at = None;
            }
            Command::Exec { attachment } => self.exec(*attachment).await,
            Command::Console { client } => {
                if let Some(console) = self.up.as_ref().and_then(|up| up.console.clone()) {
                    tokio::spawn(console.serve(client));
                }
            }
            Command::Display { client } => {
                if let Some(up) = &self.up {
                    tokio::spawn(display::serve(up.qmp.clone(), client));
                }
            }
            Command::Agent { reply } => drop(reply.send(self.agent())),
            Command::EndSessions { done } => {
                self.sessions.clear();
                drop(done.send(Ok(())));
            }
            Command::Gate { reply } => drop(reply.send(self.gate(false))),
            Command::GateOfKept { reply } => drop(reply.send(self.gate(true))),
            Command::Docked { docked, observed, done } => {
                let outcome = self.dock(*docked, observed).await;
                drop(done.send(outcome));
            }
            Command::GiveUp { reason, done } => {
                if !burgeon_plan::vm::is_over(&self.view.borrow().observed) {
                    self.end_process().await;
                    self.finish(Observed::Failed { reason });
                }
                drop(done.send(Ok(())));
            }
            Command::KeepStandbys { count, done } => drop(done.send(self.keep_standbys(count))),
            Command::Record { reply } => drop(reply.send(self.record.clone())),
            Command::Resize { change, done } => drop(done.send(self.resize(change))),
            Command::Hold { hold, done } => drop(done.send(self.hold(hold))),
        }
    }

    /// Written down before it is done, so that the next host process does it too.
    fn resize(&mut self, change: Change) -> Result<()> {
        match change {
            Change::Shall(size) => {
                let record = Record { size: Some(size), ..self.record.clone() };
                record.store(&self.directory)?;
                self.record = record;
                if self.up.is_none() {
                    self.publish(|view| view.size = Some(size));
                }
            }
            Change::Has(size) => self.publish(|view| view.size = Some(size)),
        }
        Ok(())
    }

    /// Written down before it is done, so that the next host process does it too.
    fn keep_standbys(&mut self, count: Option<u32>) -> Result<()> {
        if self.view.borrow().observed != Observed::Docked {
            let name = &self.record.launch.name;
            return Err(Error::conflict(format!("{name} is no substrate, or not docked yet"))
                .with_hint(format!("burgeon substrate show {name}")));
        }
        let record = Record { standbys: count, ..self.record.clone() };
        record.store(&self.directory)?;
        self.record = record;
        self.context.standbys.ask(self.record.launch.id, count);
        Ok(())
    }

    /// Its state is kept: the process is not needed any more.
    async fn dock(&mut self, docked: Docked, observed: Observed) -> Result<()> {
        if self.up.is_none() {
            return Err(Error::conflict("the VM ended while it was captured"));
        }
        let record = Record { docked: Some(docked), ended: Some(observed.clone()), ..self.record.clone() };
        record.store(&self.directory)?;
        reached(DiesAt::StateRecorded);
        self.record = record;
        self.end_process().await;
        fork::capture_is_over(&self.directory);
        self.finish(observed);
        Ok(())
    }

    async fn end_process(&mut self) {
        self.kill();
        if let Some(up) = self.up.take() {
            up.process.ended().await;
            let _how = up.process.reap();
        }
        self.monitor = None;
    }

    fn gate(&self, of_kept: bool) -> Result<Gate> {
        let (name, observed) = (&self.record.launch.name, self.view.borrow().observed.clone());
        if observed == Observed::Docked {
            return Err(Error::conflict(format!("{name} is a substrate: others go on from it as it is"))
                .with_hint(format!("make a VM of it: burgeon vm create --substrate {name}")));
        }
        if let Some(snapshot) = self.record.rolling_back.as_ref().filter(|_| self.up.is_none()) {
            return Err(Error::conflict(format!("VM {name} is to go on from snapshot {snapshot}, and has not yet"))
                .with_hint(format!("let it go on first: burgeon vm start {name}")));
        }
        let is_parked = matches!(observed, Observed::Parked { .. });
        let is_over = is_parked || matches!(observed, Observed::Stopped { .. } | Observed::Failed { .. });
        if is_parked && !of_kept {
            return Err(Error::conflict(format!("VM {name} is parked, and its memory fits its disks as they are"))
                .with_hint(format!("let it go on first: burgeon vm start {name}")));
        }
        if self.up.is_none() && !is_over || self.removing.is_some() || self.stopping.is_some() {
            let state = if self.stopping.is_some() { "stopping" } else { observed.name() };
            return Err(Error::conflict(format!("VM {name} is {state}: nothing of it can be changed now"))
                .with_hint("try again once it runs or has stopped"));
        }
        let guard = self.gate.clone().try_lock_owned().map_err(|_| {
            Error::conflict(format!("VM {name} is being captured, or its disks changed, by somebody else"))
                .with_hint("try again")
        })?;
        let agent = self.up.as_ref().and_then(|up| up.agent.clone());
        let (agent, resting_agent) = if self.record.paused { (None, agent) } else { (agent, None) };
        Ok(Gate {
            _guard: guard,
            record: self.record.clone(),
            monitor: self.up.as_ref().map(|up| up.qmp.clone()),
            agent,
            resting_agent,
            base: self.base.clone(),
        })
    }

    /// The answer tells that the start is recorded; how it goes, the view tells.
    fn start_again(&mut self, starts: u32) -> Result<()> {
        if starts <= self.record.starts {
            return Ok(());
        }
        let observed = self.view.borrow().observed.clone();
        let busy = self.up.is_some() || self.starting.is_some() || self.held().is_some();
        let startable = matches!(observed, Observed::Stopped { .. } | Observed::Parked { .. });
        if busy || self.removing.is_some() || !startable {
            let (name, observed) = (&self.record.launch.name, observed.name());
            return Err(Error::conflict(format!("VM {name} is {observed}: only one that has stopped can be started")));
        }
        let Ok(_gate) = self.gate.clone().try_lock_owned() else {
            let name = &self.record.launch.name;
            return Err(Error::conflict(format!("the disks of VM {name} are being changed")));
        };
        // One that boots is nobody's copy any more; one that goes on gets a new receipt.
        let receipt = self.record.receipt.clone().filter(|_| self.record.goes_on());
        let record = Record {
            starts,
            receipt,
            process: None,
            user: None,
            limits: Vec::new(),
            awaits_receipt: false,
            awaits_provisions: false,
            frozen: self.record.frozen && self.record.goes_on(),
            paused: false,
            ended: None,
            ..self.record.clone()
        };
        record.store(&self.directory)?;
        self.record = record;
        self.begin_again();
        Ok(())
    }

    /// Brings it up as its record says, which is written down.
    fn begin_again(&mut self) {
        self.guest_reason = None;
        let (sender, steps) = mpsc::unbounded_channel();
        self.steps = steps;
        self.starting = Some(bring_up(&self.context, &self.directory, &self.record, Disk::Kept, None, sender));
        self.publish(|view| {
            view.observed = Observed::Starting { phase: "queued".into() };
            view.guest = None;
            view.start_times = Vec::new();
        });
    }

    async fn stop(&mut self, mode: StopMode, done: oneshot::Sender<Result<()>>) {
        if self.up.is_none() && self.starting.is_none() && self.held().is_none() {
            drop(done.send(Ok(())));
            return;
        }
        let now = Instant::now();
        if matches!(mode, StopMode::Graceful { .. }) && matches!(self.view.borrow().observed, Observed::Unknown { .. })
        {
            let name = &self.record.launch.name;
            let error = Error::unavailable(format!("VM {name} does not answer, so its guest cannot be asked to stop"))
                .with_hint(format!("end it by force: burgeon vm stop --force {name}"));
            drop(done.send(Err(error)));
            return;
        }
        if matches!(mode, StopMode::Graceful { .. }) && self.record.paused {
            drop(done.send(Err(is_paused(&self.record.launch.name))));
            return;
        }
        if matches!(mode, StopMode::Graceful { .. }) && self.gate.try_lock().is_err() {
            // Its CPUs may stand, and then it could not answer, and would be ended instead.
            let name = &self.record.launch.name;
            let error =
                Error::conflict(format!("VM {name} is being captured or paused, or its disks are being changed"))
                    .with_hint("try again in a moment, or end it by force: burgeon vm stop --force");
            drop(done.send(Err(error)));
            return;
        }
        if let (StopMode::Graceful { .. }, Some((_, waiting))) = (mode, &mut self.stopping) {
            // Asked already; the guest need not hear it twice.
            waiting.push(done);
            return;
        }
        let (deadline, mut waiting) = self.stopping.take().unwrap_or((now, Vec::new()));
        waiting.push(done);
        let deadline = match (mode, &self.up) {
            (StopMode::Graceful { deadline_ms }, Some(up)) => {
                let asked = match (&up.agent, self.record.launch.image.boot) {
                    (Some(agent), Boot::Agent) => agent.stop(StopHow::PowerOff).await,
                    _ => up.qmp.execute("system_powerdown", Value::Null).await.map(drop),
                };
                match asked {
                    Ok(()) => deadline.max(now + Duration::from_millis(deadline_ms)),
                    Err(error) => {
                        tracing::info!(vm = %self.record.launch.name, %error, "the guest cannot be asked to stop");
                        now
                    }
                }
            }
            _ => now,
        };
        self.stopping = Some((deadline, waiting));
        if deadline <= now {
            let starting = self.starting.is_some();
            self.kill();
            if starting && self.up.is_none() {
                self.finish(Observed::Stopped { reason: "stopped on request while it was starting".into() });
            }
        }
    }

    async fn exec(&mut self, attachment: Attachment) {
        let id = attachment.attach.exec;
        self.sessions.retain(|_, session| !session.is_closed());
        let attachment = match self.sessions.get(&id) {
            Some(session) => match session.send(attachment).await {
                Ok(()) => return,
                // It ended a moment ago; the client gets a session that says so below.
                Err(mpsc::error::SendError(attachment)) => attachment,
            },
            None => attachment,
        };
        let spec = attachment.attach.spec.clone();
        if attachment.attach.resume {
            // Running it again might do its work twice.
            let reason = "the command's session is gone: it ended with the host process that led it".to_string();
            session::refuse(attachment, Frame::Exit(Exit::Lost { reason })).await;
            return;
        }
        let (sender, receiver) = mpsc::channel(4);
        match self.agent() {
            Ok(agent) => {
                // The channel is new and has room.
                drop(sender.try_send(attachment));
                tokio::spawn(session::run(agent, spec, receiver));
                self.sessions.insert(id, sender);
            }
            Err(error) => session::refuse(attachment, Frame::Failed(error)).await,
        }
    }

    fn remove(&mut self) {
        self.context.groups.remove(&group_name(&self.record.launch));
        let (disks, id) = (self.context.disks.clone(), self.record.launch.id);
        self.context.secrets.forget(id);
        self.context.substrates.forget(id);
        self.context.standbys.forget(id);
        disks.close_all(id);
        let removed = match std::fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove the VM's directory", &error))
            }
            _ => Ok(()),
        };
        // What keeps maps for disks goes after the disks, so that nobody sets it again in between.
        tokio::task::spawn_blocking(move || disks.forget(id));
        self.publish(|view| view.observed = Observed::Stopped { reason: "removed".into() });
        if let Some(done) = self.removing.take() {
            drop(done.send(removed));
        }
        if let Some((_, waiting)) = self.stopping.take() {
            for done in waiting {
                drop(done.send(Ok(())));
            }
        }
    }
}

/// Waits for the channel's end, and a while longer: when QEMU dies, its process says more.
async fn channel_ended(agent: &AgentClient) -> Error {
    let error = agent.wait_ended().await;
    sleep(Duration::from_secs(2)).await;
    error
}

/// Adds the figures that the host's kernel keeps of a VM's process, and how many snapshots its directory has.
pub(crate) fn with_figures(mut view: HostVm, directory: &Path) -> HostVm {
    let snapshots = snapshots::names(directory).map_or(0, |names| names.len());
    view.snapshots = u32::try_from(snapshots).unwrap_or(u32::MAX);
    if let Some(pid) = view.pid {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        view.resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .map(ByteSize::kib);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let ticks = stat.rfind(')').map(|end| {
            let fields: Vec<&str> = stat[end + 2..].split(' ').collect();
            let tick = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
            tick(11) + tick(12)
        });
        // USER_HZ is 100 on every architecture of Linux that QEMU's x86 targets run on.
        view.cpu_milliseconds = ticks.map(|ticks| ticks * 10);
    }
    view
}
