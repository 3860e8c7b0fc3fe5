//! Bringing a VM up, phase by phase, under a watchdog; and finding one again after our own restart.
//!
//! ```text
//! queued -> prepare -> start -> boot -> ready
//!             |          |        |
//!             +----------+--------+--> failed (the process is killed, the reason told)
//! ```
//! Under emulation on a busy host a guest kernel now and then hangs or panics at boot; such a VM is started once more.

use std::{
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use burgeon_api::{
    Error, ErrorKind, Result,
    host::Launch,
    image::Boot,
    receipt::Receipt,
    vm::{Accelerator, GuestView, Limit, PhaseTime},
};
use burgeon_guest::client::{AgentClient, AgentEvent, Options as ChannelOptions};
use burgeon_qemu::{
    command::{Machine, arguments, file},
    facts::Qemu,
    memory::Base,
    probe::{self, Verdict, Wish},
    process::{self, Process, RunAs, log_tail},
    qmp::Qmp,
};
use tokio::{
    net::UnixStream,
    sync::{OnceCell, Semaphore},
    time::Instant,
};

use crate::{
    cgroup::Groups,
    console::Console,
    disks::{Attached, Disks},
    fork,
    frozen::Substrates,
    identity::Siblings,
    layout::Layout,
    plug::blocking,
    prepare,
    prepare::Disk,
    provisions::{self, Secrets},
    record::Record,
    resize::{self, Measure},
    room::Room,
    standby::{self, Standbys},
};

/// How long a guest may take to its agent's first word before it is started again.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
const BOOT_TRIES: u32 = 2;
/// When a guest that goes on from a captured state is greeted once more.
const AT_REST_AGAIN: Duration = Duration::from_millis(700);
/// How long QEMU may take to open its sockets.
pub(crate) const MONITOR_DEADLINE: Duration = Duration::from_secs(20);

/// What all VMs of this host process share.
pub(crate) struct Context {
    pub(crate) layout: Layout,
    pub(crate) agent: &'static [u8],
    pub(crate) qemu: Qemu,
    pub(crate) wish: Wish,
    pub(crate) verdict: OnceCell<Verdict>,
    pub(crate) groups: Groups,
    /// Booting takes a whole CPU: more at once than there are CPUs only makes all of them late.
    pub(crate) boot_slots: Semaphore,
    /// An activation waits for the guest more than it works, so there may be some more of them.
    pub(crate) activation_slots: Semaphore,
    pub(crate) disks: Arc<Disks>,
    pub(crate) substrates: Substrates,
    pub(crate) siblings: Siblings,
    pub(crate) secrets: Secrets,
    pub(crate) standbys: Standbys,
    pub(crate) room: Room,
}

/// A VM that is up.
pub(crate) struct Up {
    pub(crate) process: Arc<Process>,
    pub(crate) qmp: Qmp,
    pub(crate) console: Option<Console>,
    pub(crate) agent: Option<AgentClient>,
    pub(crate) guest: Option<GuestView>,
    /// What its memory began with, where that is known.
    pub(crate) base: Option<Arc<Base>>,
    pub(crate) receipt: Option<Receipt>,
    pub(crate) measure: Measure,
}

/// Told to the VM's task while the start goes on.
pub(crate) enum Step {
    Phase(&'static str, Vec<PhaseTime>),
    Started { record: Box<Record> },
}

impl Context {
    /// What runs guests here, and why. Decided at the first start, with the kernel about to be used.
    pub(crate) async fn accelerator(&self, launch: &Launch) -> Result<&Verdict> {
        self.verdict
            .get_or_try_init(|| async {
                let verdict = |kvm_works, reason: &str| Verdict {
                    host_boot_id: process::host_boot_id(),
                    qemu_version: self.qemu.version.clone(),
                    kvm_works,
                    reason: reason.to_string(),
                };
                if self.wish == Wish::Tcg {
                    return Ok(verdict(false, "BURGEON_ACCEL=tcg asks for emulation"));
                }
                let known = Verdict::load(&self.layout.kvm_verdict(), &self.qemu);
                let found = match known {
                    Some(known) => known,
                    None if probe::device().is_err() || launch.image.boot == Boot::Agent => {
                        let found = self.probe(launch).await?;
                        if probe::device().is_ok() {
                            // What a guest has shown; a missing right may be given at any time.
                            found.store(&self.layout.kvm_verdict());
                        }
                        found
                    }
                    None => {
                        verdict(false, "KVM is not proven yet: no image with a Burgeon kernel has run; emulated (TCG)")
                    }
                };
                if self.wish == Wish::Kvm && !found.kvm_works {
                    return Err(Error::refused(format!(
                        "BURGEON_ACCEL=kvm, and KVM does not work here: {}",
                        found.reason
                    ))
                    .with_hint("set BURGEON_ACCEL=auto to run emulated"));
                }
                Ok(found)
            })
            .await
    }

    async fn probe(&self, launch: &Launch) -> Result<Verdict> {
        let directory = self.layout.temporary().join(format!("kvm-probe-{}", std::process::id()));
        let inside = directory.join(file::QEMU_DIRECTORY);
        std::fs::create_dir_all(&inside).map_err(|error| Error::io("prepare the KVM probe", &error))?;
        let image = PathBuf::from(&launch.image_directory);
        let copied = (|| {
            let initramfs = prepare::initramfs(&self.layout, &image, &launch.image, self.agent)?;
            for (from, to) in [(initramfs, file::INITRAMFS), (image.join("vmlinuz"), file::KERNEL)] {
                std::fs::copy(&from, inside.join(to)).map_err(|error| Error::io("prepare the KVM probe", &error))?;
            }
            Ok(())
        })();
        let verdict = match (probe::device(), copied) {
            (Ok(()), Err(error)) => Err(error),
            _ => Ok(probe::probe(&self.qemu, &directory).await),
        };
        if let Err(error) = std::fs::remove_dir_all(&directory) {
            tracing::debug!(%error, "the KVM probe's directory stays");
        }
        verdict
    }
}

/// Times the phases of a start.
pub(crate) struct Phases<'a> {
    tell: &'a (dyn Fn(Step) + Send + Sync),
    times: Vec<PhaseTime>,
    since: Instant,
    current: &'static str,
}

impl<'a> Phases<'a> {
    pub(crate) fn new(tell: &'a (dyn Fn(Step) + Send + Sync)) -> Phases<'a> {
        Phases { tell, times: Vec::new(), since: Instant::now(), current: "" }
    }

    pub(crate) fn tell(&self, step: Step) {
        (self.tell)(step);
    }

    pub(crate) fn current(&self) -> &'static str {
        self.current
    }

    pub(crate) fn enter(&mut self, phase: &'static str) {
        let now = Instant::now();
        if !self.current.is_empty() {
            let microseconds = u64::try_from((now - self.since).as_micros()).unwrap_or(u64::MAX);
            self.times.push(PhaseTime { phase: self.current.to_string(), microseconds });
        }
        self.since = now;
        self.current = phase;
        (self.tell)(Step::Phase(phase, self.times.clone()));
    }
}

/// Starts a VM from nothing. The caller may drop the future's cancellation by killing the recorded process.
pub(crate) async fn bring_up(
    context: &Context,
    directory: &Path,
    record: &Record,
    disk: Disk,
    tell: &(dyn Fn(Step) + Send + Sync),
) -> Result<Up> {
    let launch = &record.launch;
    let mut phases = Phases::new(tell);
    phases.enter("queued");
    let verdict = context.accelerator(launch).await?.clone();
    let slot = context.boot_slots.acquire().await;
    let mut last = None;
    for attempt in 1..=BOOT_TRIES {
        match try_once(context, directory, record, disk, verdict.accelerator(), &mut phases).await {
            Ok(up) => {
                drop(slot);
                phases.enter("ready");
                return Ok(up);
            }
            Err(error)
                if matches!(error.kind, ErrorKind::Deadline | ErrorKind::Unavailable) && attempt < BOOT_TRIES =>
            {
                tracing::warn!(vm = %launch.name, %error, "the guest did not come up; it is started once more");
                last = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::internal("the VM was not started")))
}

async fn try_once(
    context: &Context,
    directory: &Path,
    record: &Record,
    disk: Disk,
    accelerator: Accelerator,
    phases: &mut Phases<'_>,
) -> Result<Up> {
    phases.enter("prepare");
    let launch = &record.launch;
    let run_as = process::run_as(launch.id.uuid().as_u128(), accelerator);
    prepare::prepare(&context.layout, directory, launch, disk, context.agent, run_as).await?;
    let attached = serve_disks(&context.disks, launch, run_as, disk == Disk::New).await?;
    phases.enter("start");
    let machine = Machine { size: record.size(), ..prepare::machine(launch, accelerator, attached) };
    let awaits_provisions = provisions::are_there(directory);
    let record = Record { accelerator, awaits_provisions, ..record.clone() };
    let (mut guard, record) = spawn(context, directory, record, &machine, run_as, None)?;
    phases.tell(Step::Started { record: Box::new(record.clone()) });
    let up = connect(directory, launch, guard.process.clone(), phases).await?;
    if let (true, Some(agent)) = (awaits_provisions, &up.agent) {
        phases.enter("provide");
        provisions::give(agent, &provisions::of(&context.secrets, directory, &record)?).await?;
    }
    guard.armed = false;
    Ok(up)
}

/// Starts QEMU, under its limits.
pub(crate) fn start_qemu(
    context: &Context,
    directory: &Path,
    launch: &Launch,
    machine: &Machine,
    run_as: RunAs,
    memory: Option<BorrowedFd<'_>>,
) -> Result<(KillUnlessUp, Vec<Limit>)> {
    let log = directory.join(file::QEMU_LOG);
    let inside = directory.join(file::QEMU_DIRECTORY);
    let identity = process::start(&context.qemu.program, &arguments(machine), &inside, &log, run_as, memory)?;
    let process = Process::hold(&identity).map_err(|_| {
        // It may run though it cannot be watched.
        process::kill_child(&identity);
        Error::internal(format!("QEMU ended at once: {}", log_tail(&log, 600)))
    })?;
    let limits = limits(context, launch, identity.pid, run_as);
    Ok((KillUnlessUp { process: Arc::new(process), armed: true }, limits))
}

/// Puts a VM's QEMU under its limits.
pub(crate) fn limits(context: &Context, launch: &Launch, pid: u32, run_as: RunAs) -> Vec<Limit> {
    let mut limits = context.groups.limit(&group_name(launch), pid, &launch.profile);
    limits.extend(standing_limits(run_as));
    limits
}

/// Starts QEMU and writes that down: a process that dies behind this line finds it again.
pub(crate) fn spawn(
    context: &Context,
    directory: &Path,
    record: Record,
    machine: &Machine,
    run_as: RunAs,
    memory: Option<BorrowedFd<'_>>,
) -> Result<(KillUnlessUp, Record)> {
    let (guard, limits) = start_qemu(context, directory, &record.launch, machine, run_as, memory)?;
    let record = record.of_process(guard.process.identity.clone(), run_as, limits);
    record.store(directory)?;
    Ok((guard, record))
}

/// Has the VM's disks served, in a thread that may wait; and tells which are plugged in beside the root.
pub(crate) async fn serve_disks(
    disks: &Arc<Disks>,
    launch: &Launch,
    run_as: RunAs,
    new: bool,
) -> Result<Vec<Attached>> {
    let (disks, launch) = (disks.clone(), launch.clone());
    blocking(move || {
        if new {
            disks.create(&launch)?;
        }
        disks.serve_all(&launch, run_as.user())?;
        disks.attached(launch.id)
    })
    .await
}

/// Ends QEMU when a start fails or is given up half-way.
pub(crate) struct KillUnlessUp {
    pub(crate) process: Arc<Process>,
    pub(crate) armed: bool,
}

impl Drop for KillUnlessUp {
    fn drop(&mut self) {
        if self.armed {
            self.process.kill();
            let process = self.process.clone();
            // Taken off the process table once it has died.
            tokio::spawn(async move {
                process.ended().await;
                let _how = process.reap();
            });
        }
    }
}

pub(crate) fn group_name(launch: &Launch) -> String {
    format!("{}{}", standby::GROUP, launch.id.short())
}

fn standing_limits(run_as: RunAs) -> [Limit; 2] {
    let user = match run_as {
        RunAs::User { number, .. } => ("enforced".to_string(), format!("QEMU runs as user {number}")),
        RunAs::Same if rustix::process::geteuid().is_root() => {
            ("not enforced: only root may open /dev/kvm here".to_string(), "QEMU runs as root".to_string())
        }
        RunAs::Same => ("enforced".to_string(), "QEMU runs as the user of the host process".to_string()),
    };
    let sandbox = "QEMU's seccomp filter: no new processes, no privileges, no resource control";
    [
        Limit { name: "user".into(), value: user.1, enforcement: user.0 },
        Limit { name: "sandbox".into(), value: sandbox.into(), enforcement: "enforced".into() },
    ]
}

async fn connect(directory: &Path, launch: &Launch, process: Arc<Process>, phases: &mut Phases<'_>) -> Result<Up> {
    let opened = connect_monitor(directory, Instant::now() + MONITOR_DEADLINE);
    let ended = || Error::internal(format!("QEMU ended: {}", log_tail(&directory.join(file::QEMU_LOG), 600)));
    let (console, qmp) = tokio::select! {
        opened = opened => opened?,
        () = process.ended() => return Err(ended()),
    };
    let mut up = Up::without_guest(process.clone(), qmp, Some(console), launch);
    if launch.image.boot == Boot::Firmware {
        up.measure = Measure::take(&up.qmp, None, launch).await?;
        return Ok(up);
    }
    phases.enter("boot");
    let mut events = up.qmp.subscribe();
    let reset = async {
        loop {
            match events.recv().await {
                Ok(event) if event.name == "RESET" && event.data["guest"] == true => return,
                Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    };
    let said = || log_tail(&directory.join(file::CONSOLE_LOG), 2000);
    let deadline = Instant::now() + BOOT_DEADLINE;
    let agent = tokio::select! {
        agent = attach_agent(directory, &launch.name, deadline) => agent.map_err(|error| match error.kind {
            ErrorKind::Deadline => Error::deadline(format!(
                "the guest's agent said nothing within {} s; last words on the console: {}",
                BOOT_DEADLINE.as_secs(), said()
            )),
            _ => error,
        })?,
        () = process.ended() => return Err(ended()),
        () = reset => return Err(Error::unavailable(format!("the guest reset itself while booting: {}", said()))),
    };
    up.measure = Measure::take(&up.qmp, Some(&agent.0), launch).await?;
    up.guest = Some(agent.1);
    up.agent = Some(agent.0);
    Ok(up)
}

/// Connects to QEMU's console and monitor as soon as it listens.
pub(crate) async fn connect_monitor(directory: &Path, deadline: Instant) -> Result<(Console, Qmp)> {
    let console = connect_console(directory, deadline).await?;
    Ok((console, connect_qmp(directory, deadline).await?))
}

pub(crate) async fn connect_console(directory: &Path, deadline: Instant) -> Result<Console> {
    let stream = connect_socket(&directory.join(file::QEMU_DIRECTORY).join(file::CONSOLE), deadline).await?;
    Ok(Console::attach(stream, directory))
}

/// Connects to QEMU's monitor as soon as it listens.
pub(crate) async fn connect_qmp(directory: &Path, deadline: Instant) -> Result<Qmp> {
    loop {
        match Qmp::connect(&directory.join(file::QEMU_DIRECTORY).join(file::MONITOR), deadline).await {
            Ok(qmp) => return Ok(qmp),
            Err(error) if error.kind == ErrorKind::Unavailable && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn connect_socket(path: &Path, deadline: Instant) -> Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(2)).await,
            Err(error) => return Err(Error::io(format!("connect to {}", path.display()), &error)),
        }
    }
}

/// Opens the channel to the agent and begins a session on it. `at_rest`: the guest goes on from a captured state.
pub(crate) async fn connect_agent(
    directory: &Path,
    name: &str,
    at_rest: bool,
    deadline: Instant,
) -> Result<AgentClient> {
    let stream = connect_socket(&directory.join(file::QEMU_DIRECTORY).join(file::AGENT), deadline).await?;
    let mut session = [0; 16];
    rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::io("take random bytes", &error.into()))?;
    let mut options = ChannelOptions::new(session, name, clock_ns);
    if at_rest {
        options.at_rest = true;
        options.hello_interval = AT_REST_AGAIN;
    }
    Ok(AgentClient::connect(stream, options))
}

pub(crate) async fn attach_agent(directory: &Path, name: &str, deadline: Instant) -> Result<(AgentClient, GuestView)> {
    let client = connect_agent(directory, name, false, deadline).await?;
    let mut events = client.events();
    let about = client.wait_ready(deadline).await?;
    // A failed start is told right behind the welcome: an answer that comes after it makes sure of that.
    client.figures().await?;
    while let Ok(event) = events.try_recv() {
        if let AgentEvent::BootFailed { stage, reason } = event {
            return Err(Error::damaged(format!("the guest cannot start its system ({stage}): {reason}")));
        }
    }
    for warning in &about.warnings {
        tracing::warn!(vm = name, %warning, "the guest says");
    }
    let view = client.guest_view().ok_or_else(|| Error::unavailable("the channel to the guest ended"))?;
    Ok((client, view))
}

/// Nanoseconds since 1970, for the guest's clock.
#[expect(clippy::disallowed_methods, reason = "the shell that reads the clock")]
pub(crate) fn clock_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Takes hold of a VM that runs already. QEMU's monitor and the agent are tried each for a moment;
/// what does not answer is reported and tried again later, never taken for dead.
pub(crate) async fn adopt(context: &Context, directory: &Path, record: &Record, process: Arc<Process>) -> Result<Up> {
    let launch = &record.launch;
    // First of all: until its disk is served again, the guest waits.
    serve_disks(&context.disks, launch, record.run_as(), false).await?;
    let deadline = Instant::now() + MONITOR_DEADLINE;
    let qmp = Qmp::connect(&directory.join(file::QEMU_DIRECTORY).join(file::MONITOR), deadline).await?;
    let console = match UnixStream::connect(directory.join(file::QEMU_DIRECTORY).join(file::CONSOLE)).await {
        Ok(stream) => Some(Console::attach(stream, directory)),
        Err(_) => None,
    };
    let mut up = Up::without_guest(process, qmp, console, launch);
    if record.paused {
        // Its agent is met when it is resumed. Nobody changes its size meanwhile.
        up.measure = Measure::of_paused(&up.qmp, record).await?;
        burgeon_qemu::state::pause(&up.qmp).await?;
        fork::capture_is_over(directory);
        return Ok(up);
    }
    let was_captured = fork::was_being_captured(directory);
    if was_captured {
        burgeon_qemu::state::go_on(&up.qmp).await?;
    }
    if launch.image.boot == Boot::Agent {
        let (agent, guest) = attach_agent(directory, &launch.name, deadline).await?;
        if was_captured {
            agent.clock(clock_ns()).await?;
            if !record.frozen {
                agent.thaw().await?;
            }
            fork::capture_is_over(directory);
        }
        if record.awaits_provisions {
            provisions::give(&agent, &provisions::of(&context.secrets, directory, record)?).await?;
        }
        up.agent = Some(agent);
        up.guest = Some(guest);
    }
    resize::ask_again(&up.qmp, up.agent.as_ref(), record).await;
    up.measure = Measure::take(&up.qmp, up.agent.as_ref(), launch).await?;
    Ok(up)
}

impl Up {
    fn without_guest(process: Arc<Process>, qmp: Qmp, console: Option<Console>, launch: &Launch) -> Up {
        let measure = Measure::of(launch.profile.size());
        Up { process, qmp, console, agent: None, guest: None, base: None, receipt: None, measure }
    }
}
