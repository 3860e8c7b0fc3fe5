//! Capturing a running VM: to make a substrate of it, or to fork it.
//!
//! ```text
//! workload frozen -> [settled] -> CPUs stand -> devices | memory | disks -> CPUs go on -> thawed
//! ```
//! Whatever fails, the CPUs go on and the workload is thawed. A host process that dies in between leaves that to the
//! next one ([`crate::start::adopt`]).

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use burgeon_api::{
    ByteSize, Error, Result, VmId,
    host::Launch,
    image::Boot,
    substrate::{Child, Docked, Forked},
    vm::Observed,
};
use burgeon_guest::client::AgentClient;
use burgeon_plan::fork::{Way, way};
use burgeon_qemu::{
    command::memory_length,
    memory::{Aside, Base, Guest, Scope, Written, bytes},
    qmp::Qmp,
    state::{self, Devices, Saving},
};
use burgeon_store::steps::{Step as DiesAt, reached};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout, timeout_at},
};

use crate::{
    activate::Claim,
    disks::Disks,
    frozen::{self, Frozen},
    plug::{Gate, blocking},
    registry::Registry,
    standby::Seed,
    start::Context,
};

/// How long children may take until they wait for the state.
const SPAWNED: Duration = Duration::from_secs(30);
/// How long the guest may take to bring its files to its disks.
const SETTLED: Duration = Duration::from_secs(120);

/// What a VM must have to be captured.
pub(crate) struct Running<'a> {
    monitor: &'a Qmp,
    /// Absent where the VM is paused.
    agent: Option<&'a AgentClient>,
    memory: Arc<Guest>,
    scope: Scope,
    directory: PathBuf,
}

/// Where what is captured goes.
pub(crate) enum Into {
    /// Above the base that the VM began with, and aside, where there is room for it.
    Above { base: Arc<Base>, aside: Aside },
    /// Into a base of its own, which holds the old one already.
    New { base: Arc<Base>, above: bool },
}

/// In the VM's directory while it is captured: whoever finds it lets the VM go on.
const CAPTURING: &str = "capturing";

/// Says so to the next host process.
pub(crate) fn begin_capture(directory: &Path) -> Result<()> {
    std::fs::write(directory.join(CAPTURING), "").map_err(|error| Error::io("begin to capture the VM", &error))
}

/// Whether a host process has died while it captured the VM.
pub(crate) fn was_being_captured(directory: &Path) -> bool {
    directory.join(CAPTURING).exists()
}

pub(crate) fn capture_is_over(directory: &Path) {
    match std::fs::remove_file(directory.join(CAPTURING)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "the next host process takes this VM for one that is being captured");
        }
        _ => {}
    }
}

/// What becomes of a VM that is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    GoesOn,
    /// It is a substrate from then on, and nobody in particular.
    Substrate,
    Parked,
}

pub(crate) struct Captured {
    pub(crate) frozen: Frozen,
    pub(crate) stood_us: u64,
    copied: u64,
}

impl Gate {
    /// # Errors
    /// `Refused`, with what this VM lacks.
    pub(crate) async fn running(&self, context: &Context) -> Result<Running<'_>> {
        let launch = &self.record.launch;
        let name = &launch.name;
        let refused = |what: &str| Err(Error::refused(format!("VM {name} cannot be captured: {what}")));
        let Some(monitor) = &self.monitor else {
            return Err(
                Error::conflict(format!("VM {name} does not run")).with_hint(format!("burgeon vm start {name}"))
            );
        };
        if launch.image.boot != Boot::Agent {
            return refused("its image has no agent, and so nobody could renew its identity");
        }
        if launch.image.disk.is_some() && launch.image.map.is_none() {
            return refused("its disk is not in the store; build or import its image again");
        }
        if launch.profile.display {
            return refused("its graphics card has memory of its own, which is not captured yet");
        }
        let agent = self.agent.as_ref();
        if agent.is_none() && !self.record.paused {
            return refused("its agent does not answer");
        }
        let Some(process) = &self.record.process else { return refused("its process is not known") };
        let memory = state::open_memory(monitor, process, &launch.profile).await?;
        // Who has a receipt stands above a base. Without that at hand, whatever is not zero must be taken for its own.
        let above = self.record.receipt.is_some();
        let scope = if above && self.base.is_none() { Scope::All } else { Scope::Written };
        let directory = context.layout.vm(launch.id);
        Ok(Running { monitor, agent, memory: Arc::new(memory), scope, directory })
    }

    /// Captures the VM, with what `during` does while it stands still. What becomes of it then, `end` says.
    pub(crate) async fn capture(
        &self,
        running: &Running<'_>,
        into: Into,
        end: End,
        during: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Captured> {
        let directory = &running.directory;
        begin_capture(directory)?;
        let saving = Devices::prepare(running.monitor).await?;
        let begun = Instant::now();
        let captured = async {
            // One that is paused stands already, its workload frozen, and stays so.
            let Some(agent) = running.agent else { return still(running, into, &saving, during).await };
            agent.freeze().await?;
            if end != End::GoesOn {
                let generalise = end == End::Substrate;
                agent.clone().with_deadline(SETTLED).settle(generalise).await?;
            }
            state::pause(running.monitor).await?;
            let captured = still(running, into, &saving, during).await;
            reached(DiesAt::Captured);
            if end == End::GoesOn || captured.is_err() {
                state::go_on(running.monitor).await?;
            }
            captured
        }
        .await;
        if let Some(agent) = running.agent.filter(|_| !self.record.frozen)
            && (end == End::GoesOn || captured.is_err())
        {
            // The reason why it failed is worth more than that this does too.
            let thawed = agent.thaw().await;
            if captured.is_ok() {
                thawed?;
            }
        }
        let stood_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        if end == End::GoesOn || captured.is_err() {
            capture_is_over(directory);
        }
        let devices = saving.end(running.monitor).await;
        let (base, written, copied) = captured?;
        Ok(Captured { frozen: Frozen { base, written, devices: devices? }, stood_us, copied })
    }

    /// Captures the VM and keeps that: what it is, for its owner to write down before its process ends. It stands still
    /// from here on, until [`Gate::go_on`].
    ///
    /// # Errors
    /// `Refused` for a VM that cannot be captured; those of guest, QEMU and store.
    pub(crate) async fn dock(&self, context: &Context, end: End) -> Result<(Docked, Arc<Frozen>)> {
        let running = self.running(context).await?;
        let (record, disks, id) = (&self.record, context.disks.clone(), self.record.launch.id);
        let compatibility =
            context.substrates.compatibility(&context.qemu, &record.launch, record.accelerator, disks.attached(id)?)?;
        let into = self.new_base()?;
        let seal = {
            let disks = disks.clone();
            move || disks.seal_all(id)
        };
        let Captured { frozen, stood_us, .. } = self.capture(&running, into, end, seal).await?;
        frozen.base.seal()?;
        let directory = context.layout.vm(id);
        let kept = blocking(move || {
            let docked =
                frozen::keep(&disks, &directory, |map| Disks::memory_root(id, map), &frozen, compatibility, stood_us)?;
            reached(DiesAt::StateKept);
            Ok((docked, Arc::new(frozen)))
        })
        .await;
        if kept.is_err() && end == End::Parked {
            self.go_on(context).await?;
        }
        kept
    }

    /// Lets a VM go on that was captured to be kept.
    ///
    /// # Errors
    /// Those of QEMU and the guest.
    pub(crate) async fn go_on(&self, context: &Context) -> Result<()> {
        if let (Some(monitor), Some(agent)) = (&self.monitor, &self.agent) {
            state::go_on(monitor).await?;
            if !self.record.frozen {
                agent.thaw().await?;
            }
        }
        capture_is_over(&context.layout.vm(self.record.launch.id));
        Ok(())
    }

    pub(crate) fn new_base(&self) -> Result<Into> {
        let profile = &self.record.launch.profile;
        let base = Base::empty(memory_length(profile))?;
        let above = match &self.base {
            // What it was given beyond that is its own, and copied from it.
            Some(old) => base.copy_from(old, profile.memory.bytes()).map(|()| true)?,
            None => false,
        };
        Ok(Into::New { base: Arc::new(base), above })
    }

    /// Forks the VM.
    ///
    /// # Errors
    /// `Refused` for a VM that cannot be captured; those of guest and QEMU, and with `all_or_nothing` those of any child.
    /// Then the VM runs as before, and no child is left.
    pub(crate) async fn fork(
        self,
        context: &Arc<Context>,
        registry: &Registry,
        children: Vec<Launch>,
        all_or_nothing: bool,
    ) -> Result<Forked> {
        let running = self.running(context).await?;
        let count = u32::try_from(children.len()).unwrap_or(u32::MAX);
        // How much it will be, before it stands still.
        let estimate = {
            let (memory, scope) = (running.memory.clone(), running.scope);
            blocking(move || memory.pages(scope)).await?
        };
        let into = match (way(self.base.as_ref().map(|base| base.held()), bytes(&estimate), count), &self.base) {
            (Way::Above, Some(base)) => {
                let aside = blocking(move || Ok(Aside::room_for(&estimate))).await?;
                Into::Above { base: base.clone(), aside }
            }
            _ => self.new_base()?,
        };
        let base = match &into {
            Into::Above { base, .. } | Into::New { base, .. } => base.clone(),
        };
        let source = self.record.launch.id;
        let (state_of_all, awaited) = watch::channel(None);
        let (waiting, mut told) = mpsc::unbounded_channel();
        let mut refused: HashMap<VmId, Error> = HashMap::new();
        for launch in &children {
            let claim = Claim {
                origin: format!("fork of VM {}", self.record.launch.name),
                source,
                accelerator: self.record.accelerator,
                base: base.clone(),
                frozen: awaited.clone(),
                waiting: Some(waiting.clone()),
            };
            if let Err(error) = registry.launch(launch.clone(), Some(claim)).await {
                refused.insert(launch.id, error);
            }
        }
        drop((waiting, awaited));
        let mut ready: Vec<VmId> = Vec::new();
        let all_wait = async {
            // Ends as well when all of them wait or have failed: then nobody has a sender any more.
            while let Some(id) = told.recv().await {
                ready.push(id);
            }
        };
        // Late ones are left out.
        let in_time = timeout(SPAWNED, all_wait).await.is_ok();
        let missing = children.len() - ready.len();
        let broken_off = |reason: &str| Err(Error::unavailable(reason.to_string()));
        if ready.is_empty() || (all_or_nothing && missing > 0) {
            let reason = format!("{missing} of {} children did not come up", children.len());
            state_of_all.send_replace(Some(broken_off(&reason)));
            let first = self.reasons(registry, &children).await.into_iter().flatten().next();
            return Err(first.unwrap_or_else(|| Error::deadline(reason)));
        }
        if !in_time {
            tracing::warn!(vm = %self.record.launch.name, missing, "some children are late, and are left out");
        }
        let make_disks = {
            let (disks, ready) = (context.disks.clone(), ready.clone());
            let launches: Vec<Launch> = children.iter().filter(|child| ready.contains(&child.id)).cloned().collect();
            move || launches.iter().try_for_each(|launch| disks.clone_all(launch, source))
        };
        let captured = self.capture(&running, into, End::GoesOn, make_disks).await;
        let Captured { frozen, stood_us, copied } = match captured {
            Ok(captured) => captured,
            Err(error) => {
                state_of_all.send_replace(Some(Err(error.clone())));
                return Err(error);
            }
        };
        if frozen.written.is_none() {
            frozen.base.seal()?;
        } else {
            let (launch, accelerator) = (self.record.launch.clone(), self.record.accelerator);
            let memory = Some(running.memory.clone());
            context.standbys.forked(source, Seed { launch, accelerator, base, memory });
        }
        state_of_all.send_replace(Some(Ok(Arc::new(frozen))));
        let reasons = self.reasons(registry, &children).await;
        let children: Vec<Child> = children
            .iter()
            .zip(reasons)
            .map(|(launch, error)| {
                let error = refused.remove(&launch.id).or(error);
                Child { id: launch.id, name: launch.name.clone(), error }
            })
            .collect();
        Ok(Forked { children, paused_us: stood_us, copied: ByteSize(copied) })
    }

    /// Waits until each child runs or has failed; why it has.
    async fn reasons(&self, registry: &Registry, children: &[Launch]) -> Vec<Option<Error>> {
        let (mut reasons, until) = (Vec::new(), Instant::now() + SETTLED);
        for launch in children {
            let come_up = async {
                let mut handle = registry.get(launch.id).await?;
                let view = handle.view.wait_for(|view| {
                    !matches!(view.observed, Observed::Pending | Observed::Starting { .. } | Observed::Unknown { .. })
                });
                match &view.await.map_err(|_| Error::unavailable("it was removed"))?.observed {
                    Observed::Failed { reason } | Observed::Stopped { reason } => {
                        Err(Error::unavailable(reason.clone()))
                    }
                    _ => Ok(()),
                }
            };
            let outcome = timeout_at(until, come_up).await;
            reasons.push(outcome.unwrap_or_else(|_| Err(Error::deadline("it has not come up"))).err());
        }
        reasons
    }
}

/// While its CPUs stand: all of it, side by side.
async fn still(
    running: &Running<'_>,
    into: Into,
    saving: &Saving,
    during: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<(Arc<Base>, Option<Written>, u64)> {
    let (memory, scope) = (running.memory.clone(), running.scope);
    let memory = blocking(move || {
        let pages = memory.pages(scope)?;
        let copied = bytes(&pages);
        Ok(match into {
            Into::Above { base, aside } => (base, Some(memory.capture(pages, aside)?), copied),
            Into::New { base, above: true } => {
                memory.overwrite(&pages, &base)?;
                (base, None, copied)
            }
            Into::New { base, above: false } => {
                memory.fill(&pages, &base)?;
                (base, None, copied)
            }
        })
    });
    let (saved, memory, during) = tokio::join!(saving.save(running.monitor), memory, blocking(during));
    let memory = memory?;
    during?;
    saved?;
    Ok(memory)
}
