//! Letting a VM go on from a captured state, instead of booting it.
//!
//! ```text
//! spawn -> [wait] -> memory -> load -+-> resume -> identify -> thaw -> ready
//! claim -----------------------------+     |          |
//!   |                                      |          |
//!   +--------------------------------------+----------+--> failed: the process is killed, the reason told
//! ```
//! A VM of a substrate claims a QEMU that waits for one ([`crate::standby`]), and spawns its own where none does. So does a
//! fork, of which the QEMU has the memory and waits for the state.
//! Until `thaw` no instruction of the guest's workload has run. A guest whose receipt is not good is killed: two machines
//! of one identity are worse than one fewer.

use std::{os::fd::AsFd, path::Path, sync::Arc, time::Duration};

use burgeon_api::{
    Error, Result, VmId,
    host::{Begin, Launch},
    provisions::Provisions,
    receipt::Receipt,
    vm::{Accelerator, GuestView, Resize},
};
use burgeon_guest::client::AgentClient;
use burgeon_qemu::{
    command::file,
    memory::Base,
    process::{self, Process, log_tail},
    qmp::Qmp,
    state,
};
use burgeon_store::steps::{self, reached};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use crate::{
    console::Console,
    frozen::Frozen,
    identity::{self, Giving, IDENTITY_DEADLINE},
    plug::blocking,
    prepare, provisions,
    record::Record,
    resize::{self, Measure},
    snapshots::{self, Snapshot},
    standby::{From, Standby},
    start::{self, Context, MONITOR_DEADLINE, Phases, Step, Up, connect_agent, connect_monitor},
};

/// From this phase on the workload runs.
const THAW: &str = "thaw";
/// How long the end of a process may follow that of its sockets.
const DYING: Duration = Duration::from_secs(2);
/// How long a child waits for the instant that it goes on from.
const INSTANT_DEADLINE: Duration = Duration::from_secs(120);

/// A captured state that is there, or will be in a moment; and why it will not.
pub(crate) type Awaited = Option<Result<Arc<Frozen>>>;

/// What a VM goes on from.
#[derive(Clone)]
pub(crate) struct Claim {
    pub(crate) origin: String,
    /// The VM that was captured; itself, for one that was parked.
    pub(crate) source: VmId,
    pub(crate) accelerator: Accelerator,
    pub(crate) base: Arc<Base>,
    pub(crate) frozen: watch::Receiver<Awaited>,
    /// Told when the VM waits for nothing but the state.
    pub(crate) waiting: Option<mpsc::UnboundedSender<VmId>>,
}

impl Claim {
    /// Of a substrate.
    pub(crate) async fn of_substrate(context: &Context, launch: &Launch) -> Result<Claim> {
        let source = launch.source.as_ref().ok_or_else(|| Error::invalid("the VM names no substrate"))?.vm;
        let (record, frozen) = context.substrates.get(&context.layout, &context.qemu, &context.disks, source).await?;
        let (_, awaited) = watch::channel(Some(Ok(frozen.clone())));
        Ok(Claim {
            origin: format!("substrate {}", record.launch.name),
            source,
            accelerator: record.accelerator,
            base: frozen.base.clone(),
            frozen: awaited,
            waiting: None,
        })
    }

    /// Of a VM that was parked.
    pub(crate) async fn of_parked(context: &Context, record: &Record) -> Result<Claim> {
        let frozen = Arc::new(context.substrates.load(&context.qemu, &context.disks, &context.layout, record).await?);
        let (_, awaited) = watch::channel(Some(Ok(frozen.clone())));
        Ok(Claim {
            origin: "its own parked state".into(),
            source: record.launch.id,
            accelerator: record.accelerator,
            base: frozen.base.clone(),
            frozen: awaited,
            waiting: None,
        })
    }

    /// Of a snapshot of this VM.
    pub(crate) async fn of_snapshot(context: &Context, record: &Record, snapshot: &Snapshot) -> Result<Claim> {
        let frozen = Arc::new(snapshot.bring(context, record).await?);
        let (_, awaited) = watch::channel(Some(Ok(frozen.clone())));
        Ok(Claim {
            origin: format!("snapshot {} of VM {}", snapshot.about.name, record.launch.name),
            source: record.launch.id,
            accelerator: snapshot.about.docked.compatibility.accelerator,
            base: frozen.base.clone(),
            frozen: awaited,
            waiting: None,
        })
    }

    /// Of a snapshot of another VM, which its source names; its disks are made.
    pub(crate) async fn of_snapshot_of_other(context: &Context, launch: &Launch) -> Result<Claim> {
        let unnamed = || Error::invalid("the VM names no snapshot");
        let (source, name) =
            launch.source.as_ref().and_then(|of| Some((of.vm, of.snapshot.as_ref()?))).ok_or_else(unnamed)?;
        let directory = context.layout.vm(source);
        let record = Record::load(&directory).map_err(|error| error.context("find the snapshot's VM"))?;
        let snapshot = snapshots::find(&directory, name)?;
        snapshot.check(context, &record.launch)?;
        let (disks, of_launch, of_snapshot) = (context.disks.clone(), launch.clone(), snapshot.clone());
        blocking(move || disks.clone_snapshot(&of_launch, source, &of_snapshot)).await?;
        Claim::of_snapshot(context, &record, &snapshot).await
    }

    async fn frozen(&mut self) -> Result<Arc<Frozen>> {
        let gone = || Error::unavailable("the fork was broken off");
        let state = timeout(INSTANT_DEADLINE, self.frozen.wait_for(Option::is_some))
            .await
            .map_err(|_| Error::deadline("the state to go on from did not come"))?
            .map_err(|_| gone())?
            .clone();
        state.unwrap_or_else(|| Err(gone()))
    }
}

/// Brings a VM up from what it claims.
pub(crate) async fn bring_up(
    context: &Context,
    directory: &Path,
    record: &Record,
    mut claim: Claim,
    tell: &(dyn Fn(Step) + Send + Sync),
) -> Result<Up> {
    let mut phases = Phases::new(tell);
    phases.enter("queued");
    let launch = &record.launch;
    // Children of one fork come up together, or its source would stand and wait for the last of them.
    let slot = if claim.waiting.is_some() { None } else { context.activation_slots.acquire().await.ok() };
    let room = context.room.take(launch.resize.memory.unwrap_or(launch.profile.memory))?;
    let busy = context.standbys.busy();
    let own = claim.source == launch.id;
    let from = match (&*claim.frozen.borrow(), &claim.waiting) {
        (_, Some(_)) => Some(From::Base(claim.base.clone())),
        (Some(Ok(frozen)), None) if !own => Some(From::State(frozen.clone())),
        _ => None,
    };
    let standby = match from {
        Some(from) => context.standbys.claim(claim.source, launch, &from, &context.disks.shape(launch, claim.source)?),
        None => None,
    };
    let awaiting = Record { accelerator: claim.accelerator, receipt: None, awaits_receipt: true, ..record.clone() };
    let up = match standby {
        Some(standby) if standby.agent.is_none() => {
            start_waiting(context, directory, awaiting, &mut claim, standby, &mut phases).await?
        }
        Some(mut standby) => {
            match take_over(context, directory, awaiting.clone(), &claim, &mut standby, &mut phases).await {
                // It died by itself in the very moment, before its workload went on: another can take its place.
                Err(error) if phases.current() != THAW && ended_soon(&standby.guard.process).await => {
                    tracing::warn!(vm = %launch.name, %error, "the QEMU that waited for it is gone; it starts one of its own");
                    drop(standby);
                    context.disks.close_all(launch.id);
                    start_own(context, directory, awaiting, &mut claim, &mut phases).await?
                }
                done => done?,
            }
        }
        None => start_own(context, directory, awaiting, &mut claim, &mut phases).await?,
    };
    drop((slot, room, busy));
    phases.enter("ready");
    Ok(up)
}

/// By a QEMU that has taken the state up already.
async fn take_over(
    context: &Context,
    directory: &Path,
    awaiting: Record,
    claim: &Claim,
    standby: &mut Standby,
    phases: &mut Phases<'_>,
) -> Result<Up> {
    let record = hand_over(context, directory, awaiting, standby, phases)?;
    let agent = standby.agent.clone().ok_or_else(|| Error::internal("its guest has not answered"))?;
    let process = standby.guard.process.clone();
    let (disks, of_launch, source) = (context.disks.clone(), record.launch.clone(), claim.source);
    blocking(move || disks.clone_all(&of_launch, source)).await?;
    context.disks.bind_all(record.launch.id)?;
    let until_it_ends = async {
        let console = start::connect_console(directory, Instant::now() + MONITOR_DEADLINE).await?;
        phases.enter("resume");
        let renewed = renew(context, &record, claim, &standby.qmp, &agent, phases).await?;
        Ok((console, renewed))
    };
    let (console, Renewed { receipt, guest, measure }) = until_ended(&process, directory, until_it_ends).await?;
    standby.guard.armed = false;
    Ok(Up {
        process,
        qmp: standby.qmp.clone(),
        console: Some(console),
        agent: Some(agent),
        guest: Some(guest),
        base: Some(claim.base.clone()),
        receipt: Some(receipt),
        measure,
    })
}

/// Makes a QEMU that waits the VM's.
fn hand_over(
    context: &Context,
    directory: &Path,
    awaiting: Record,
    standby: &mut Standby,
    phases: &mut Phases<'_>,
) -> Result<Record> {
    phases.enter("claim");
    let process = standby.guard.process.identity.clone();
    let limits = start::limits(context, &awaiting.launch, process.pid, standby.run_as);
    let record = awaiting.of_process(process, standby.run_as, limits);
    // Written down first: a process that dies behind this line ends that QEMU, wherever its directory is.
    record.store(directory)?;
    reached(steps::Step::Claimed);
    phases.tell(Step::Started { record: Box::new(record.clone()) });
    standby.hand_to(directory, record.launch.id)?;
    reached(steps::Step::Handed);
    Ok(record)
}

/// By a QEMU that has the memory, and waits for the state of a fork.
async fn start_waiting(
    context: &Context,
    directory: &Path,
    awaiting: Record,
    claim: &mut Claim,
    mut standby: Standby,
    phases: &mut Phases<'_>,
) -> Result<Up> {
    let record = hand_over(context, directory, awaiting, &mut standby, phases)?;
    let (process, qmp) = (standby.guard.process.clone(), standby.qmp.clone());
    let going_on = async {
        let console = start::connect_console(directory, Instant::now() + MONITOR_DEADLINE).await?;
        go_on(context, directory, &record, claim, process.clone(), (console, qmp), phases).await
    };
    let up = until_ended(&process, directory, going_on).await?;
    standby.guard.armed = false;
    Ok(up)
}

/// Whether a process is gone, or on its way.
async fn ended_soon(process: &Process) -> bool {
    timeout(DYING, process.ended()).await.is_ok()
}

async fn until_ended<T>(process: &Process, directory: &Path, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = work => done,
        () = process.ended() => {
            let said = log_tail(&directory.join(file::QEMU_LOG), 600);
            Err(Error::refused(format!("QEMU ended while it took up the captured state: {said}")))
        }
    }
}

/// By a QEMU of its own, from its start.
async fn start_own(
    context: &Context,
    directory: &Path,
    awaiting: Record,
    claim: &mut Claim,
    phases: &mut Phases<'_>,
) -> Result<Up> {
    phases.enter("spawn");
    let launch = &awaiting.launch;
    let run_as = process::run_as(launch.id.uuid().as_u128(), claim.accelerator);
    let attached = if claim.source == launch.id {
        prepare::prepare(&context.layout, directory, launch, prepare::Disk::Kept, context.agent, run_as).await?;
        start::serve_disks(&context.disks, launch, run_as, false).await?
    } else {
        let (layout, disks, of_launch) = (context.layout.clone(), context.disks.clone(), launch.clone());
        let (directory, source) = (directory.to_path_buf(), claim.source);
        blocking(move || {
            prepare::prepare_activation(&layout, &directory, &of_launch, source, run_as)?;
            if of_launch.begin == Begin::Snapshot {
                // What it goes on from is known, and its disks are made.
                disks.serve_all(&of_launch, run_as.user())?;
                return disks.attached(of_launch.id);
            }
            disks.serve_late(&of_launch, source, run_as.user())?;
            disks.attached(source)
        })
        .await?
    };
    let machine = prepare::activation(launch, claim.accelerator, attached, &claim.base);
    let memory = claim.base.clone();
    let (mut guard, started) =
        start::spawn(context, directory, awaiting, &machine, run_as, Some(memory.file().as_fd()))?;
    let process = guard.process.clone();
    reached(steps::Step::Spawned);
    phases.tell(Step::Started { record: Box::new(started.clone()) });
    let going_on = async {
        let (console, qmp) = connect_monitor(directory, Instant::now() + MONITOR_DEADLINE).await?;
        state::tell_when_loaded(&qmp).await?;
        go_on(context, directory, &started, claim, process.clone(), (console, qmp), phases).await
    };
    let up = until_ended(&process, directory, going_on).await?;
    guard.armed = false;
    Ok(up)
}

async fn go_on(
    context: &Context,
    directory: &Path,
    record: &Record,
    claim: &mut Claim,
    process: Arc<Process>,
    (console, qmp): (Console, Qmp),
    phases: &mut Phases<'_>,
) -> Result<Up> {
    let launch = &record.launch;
    let deadline = Instant::now() + MONITOR_DEADLINE;
    let memory = state::open_memory(&qmp, &process.identity, &launch.profile).await?;
    if let Some(waiting) = claim.waiting.take() {
        phases.enter("wait");
        let _without_a_listener_no_state_comes = waiting.send(launch.id);
    }
    let frozen = claim.frozen().await?;
    phases.enter("memory");
    let (disks, of_launch, source, of_frozen) = (context.disks.clone(), launch.clone(), claim.source, frozen.clone());
    blocking(move || {
        memory.complete(&of_frozen.base, of_frozen.written.as_ref())?;
        if of_launch.begin == Begin::Substrate && source != of_launch.id {
            disks.clone_all(&of_launch, source)?;
        }
        disks.bind_all(of_launch.id)
    })
    .await?;
    phases.enter("load");
    frozen.devices.load(&qmp).await?;
    reached(steps::Step::Loaded);
    phases.enter("resume");
    let agent = connect_agent(directory, &launch.name, true, deadline).await?;
    if record.docked.is_some() {
        // From here on its disk may change, and the kept memory does not fit it any more.
        let going_on = Record { docked: None, ..record.clone() };
        going_on.store(directory)?;
        phases.tell(Step::Started { record: Box::new(going_on) });
    }
    let Renewed { receipt, guest, measure } = renew(context, record, claim, &qmp, &agent, phases).await?;
    if record.rolling_back.is_some() {
        reached(steps::Step::RolledBack);
    }
    Ok(Up {
        process,
        qmp,
        console: Some(console),
        agent: Some(agent),
        guest: Some(guest),
        base: Some(claim.base.clone()),
        receipt: Some(receipt),
        measure,
    })
}

/// What a guest has become.
struct Renewed {
    receipt: Receipt,
    guest: GuestView,
    measure: Measure,
}

/// Lets the guest go on, has it become somebody, and only then its workload.
async fn renew(
    context: &Context,
    record: &Record,
    claim: &Claim,
    qmp: &Qmp,
    agent: &AgentClient,
    phases: &mut Phases<'_>,
) -> Result<Renewed> {
    state::go_on(qmp).await?;
    let receipt = identify(context, record, claim, agent, phases).await?;
    reached(steps::Step::Identified);
    let (launch, own) = (&record.launch, claim.source == record.launch.id);
    if !own && launch.resize != Resize::default() {
        phases.enter("resize");
        resize::begin_with(qmp, agent, launch).await?;
    }
    let measure = Measure::take(qmp, Some(agent), launch).await?;
    phases.enter(THAW);
    // What its user had frozen before it was parked stays so.
    if !record.frozen {
        agent.thaw().await?;
    }
    reached(steps::Step::Thawed);
    let guest = agent.guest_view().ok_or_else(|| Error::unavailable("the channel to the guest ended"))?;
    let (host_name, boot_id) = (receipt.host_name.clone(), receipt.boot_id.clone());
    Ok(Renewed { receipt, guest: GuestView { host_name, boot_id, ..guest }, measure })
}

async fn identify(
    context: &Context,
    record: &Record,
    claim: &Claim,
    agent: &AgentClient,
    phases: &mut Phases<'_>,
) -> Result<Receipt> {
    agent.wait_ready(Instant::now() + IDENTITY_DEADLINE).await?;
    phases.enter("identify");
    let own = claim.source == record.launch.id;
    // One that goes on from its own state has what it was given.
    let provisions = if own {
        Provisions::default()
    } else {
        provisions::of(&context.secrets, &context.layout.vm(record.launch.id), record)?
    };
    let giving = Giving { launch: &record.launch, own, origin: &claim.origin, provisions: &provisions };
    identity::give(agent, giving, &context.siblings).await
}
