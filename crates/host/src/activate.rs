//! Letting a VM go on from a captured state, instead of booting it.
//!
//! ```text
//! spawn -> [wait] -> memory -> load -> resume -> identify -> thaw -> ready
//!   |        |         |        |        |          |
//!   +--------+---------+--------+--------+----------+--> failed: the process is killed, the reason told
//! ```
//! Until `thaw` no instruction of the guest's workload has run. A guest whose receipt is not good is killed: two machines
//! of one identity are worse than one fewer.

use std::{os::fd::AsFd, path::Path, sync::Arc, time::Duration};

use burgeon_api::{
    Error, Result, VmId,
    host::{Begin, Launch},
    vm::Accelerator,
};
use burgeon_guest::client::AgentClient;
use burgeon_qemu::{
    command::file,
    memory::{Base, Guest},
    process::{self, Process, log_tail},
    state,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use crate::{
    frozen::Frozen,
    identity,
    plug::blocking,
    prepare,
    record::Record,
    start::{self, Context, MONITOR_DEADLINE, Phases, Step, Up, clock_ns, connect_agent, connect_monitor},
};

/// How long the guest may take to renew itself, its own programs for that included.
const IDENTITY_DEADLINE: Duration = Duration::from_secs(60);
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
    let room = context.room.take(launch.profile.memory)?;
    phases.enter("spawn");
    let run_as = process::run_as(launch.id.uuid().as_u128(), claim.accelerator);
    let own = claim.source == launch.id;
    let attached = if own {
        prepare::prepare(&context.layout, directory, launch, prepare::Disk::Kept, context.agent, run_as).await?;
        start::serve_disks(&context.disks, launch, run_as, false).await?
    } else {
        let (layout, disks, of_launch) = (context.layout.clone(), context.disks.clone(), launch.clone());
        let (directory, source) = (directory.to_path_buf(), claim.source);
        blocking(move || {
            prepare::prepare_activation(&layout, &directory, &of_launch, source, run_as)?;
            disks.serve_late(&of_launch, source, run_as.user())?;
            disks.attached(source)
        })
        .await?
    };
    let machine = prepare::activation(launch, claim.accelerator, attached, &claim.base);
    let awaiting = Record { accelerator: claim.accelerator, receipt: None, awaits_receipt: true, ..record.clone() };
    let memory = claim.base.clone();
    let (mut guard, started) =
        start::spawn(context, directory, awaiting, &machine, run_as, Some(memory.file().as_fd()))?;
    let process = guard.process.clone();
    tell(Step::Started { record: Box::new(started.clone()) });
    let going_on = go_on(context, directory, &started, &mut claim, process.clone(), &mut phases);
    let up = tokio::select! {
        up = going_on => up?,
        () = process.ended() => {
            let said = log_tail(&directory.join(file::QEMU_LOG), 600);
            return Err(Error::refused(format!("QEMU ended while it took up the captured state: {said}")));
        }
    };
    guard.armed = false;
    drop((slot, room));
    phases.enter("ready");
    Ok(up)
}

async fn go_on(
    context: &Context,
    directory: &Path,
    record: &Record,
    claim: &mut Claim,
    process: Arc<Process>,
    phases: &mut Phases<'_>,
) -> Result<Up> {
    let launch = &record.launch;
    let deadline = Instant::now() + MONITOR_DEADLINE;
    let (console, qmp) = connect_monitor(directory, deadline).await?;
    state::tell_when_loaded(&qmp).await?;
    let memory = Guest::open(&process.identity, state::memory_address(&qmp).await?, claim.base.length())?;
    if let Some(waiting) = claim.waiting.take() {
        phases.enter("wait");
        let _without_a_listener_no_state_comes = waiting.send(launch.id);
    }
    let frozen = claim.frozen().await?;
    phases.enter("memory");
    let (disks, of_launch, source, of_frozen) = (context.disks.clone(), launch.clone(), claim.source, frozen.clone());
    blocking(move || {
        if let Some(written) = &of_frozen.written {
            memory.apply(written)?;
        }
        if of_launch.begin == Begin::Substrate && source != of_launch.id {
            disks.clone_all(&of_launch, source)?;
        }
        disks.bind_all(of_launch.id)
    })
    .await?;
    phases.enter("load");
    frozen.devices.load(&qmp).await?;
    phases.enter("resume");
    let agent = connect_agent(directory, &launch.name, true, deadline).await?;
    if record.docked.is_some() {
        // From here on its disk may change, and the kept memory does not fit it any more.
        let going_on = Record { docked: None, ..record.clone() };
        going_on.store(directory)?;
        phases.tell(Step::Started { record: Box::new(going_on) });
    }
    state::go_on(&qmp).await?;
    let receipt = identify(context, launch, claim, &agent, phases).await?;
    phases.enter("thaw");
    // What its user had frozen before it was parked stays so.
    if !record.frozen {
        agent.thaw().await?;
    }
    let guest = agent.guest_view().ok_or_else(|| Error::unavailable("the channel to the guest ended"))?;
    Ok(Up {
        process,
        qmp,
        console: Some(console),
        agent: Some(agent),
        guest: Some(burgeon_api::vm::GuestView {
            host_name: receipt.host_name.clone(),
            boot_id: receipt.boot_id.clone(),
            ..guest
        }),
        base: Some(claim.base.clone()),
        receipt: Some(receipt),
    })
}

async fn identify(
    context: &Context,
    launch: &Launch,
    claim: &Claim,
    agent: &AgentClient,
    phases: &mut Phases<'_>,
) -> Result<burgeon_api::receipt::Receipt> {
    agent.wait_ready(Instant::now() + IDENTITY_DEADLINE).await?;
    phases.enter("identify");
    let own = claim.source == launch.id;
    let wanted = identity::new(launch, own, clock_ns())?;
    let asked = clock_ns();
    let shown = agent
        .clone()
        .with_deadline(IDENTITY_DEADLINE)
        .renew(wanted.clone())
        .await
        .map_err(|error| error.context("give the guest its identity"))?;
    // The guest told its time somewhere between the question and the answer.
    let told = clock_ns().min(asked.max(shown.time_ns)).max(asked);
    let receipt = identity::receipt(shown, claim.origin.clone(), told);
    identity::verify(&receipt, &wanted, own, &context.siblings)?;
    Ok(receipt)
}
