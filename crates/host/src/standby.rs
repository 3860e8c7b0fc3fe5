//! QEMUs that wait for VMs: each has taken up a substrate's state already, and stands still.
//!
//! ```text
//! spawn -> load -> greet -> stand --claimed--> a VM's own (crate::activate)
//!   |  \-----------------------^  for forks: which state they take up, the fork tells
//!   +-------+--------+--------+--> ended, and nothing is left: the next one may be better
//! ```
//! Emulation translates code when it runs for the first time, so a guest that has just been loaded is slow. Therefore its
//! kernel and its agent run here, and rehearse what is going to be asked of them. The workload is frozen since before the
//! state was captured, and stays so: who the guest is, is told with the claim. A guest that wants to write to its disk
//! meanwhile, which no VM owns yet, is ended.
//!
//! One that waits has a directory like a VM's, with a file that says so in place of a record. At the claim QEMU's own
//! directory is moved to the VM's. The next host process ends those that it finds.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use burgeon_api::{
    Error, Result, VmId,
    host::{Begin, Launch, Source},
    image::Boot,
    substrate::Standbys as View,
    vm::Accelerator,
};
use burgeon_guest::client::AgentClient;
use burgeon_plan::standby::{BURST, Demand, MOST_ASKED, wanted};
use burgeon_qemu::{
    command::file,
    memory::{Base, Guest, Scope},
    process::{self, Identity, Process, RunAs, log_tail},
    qmp::Qmp,
    state,
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use crate::{
    cgroup::Groups,
    disks::{Disks, Shape},
    frozen::Frozen,
    identity,
    layout::Layout,
    plug::blocking,
    prepare,
    record::find_unrecorded,
    start::{Context, KillUnlessUp, MONITOR_DEADLINE, connect_agent, connect_qmp, group_name, start_qemu},
};

/// In the directory of one that waits.
const MARKER: &str = "standby";
/// How long one may take from its start until it waits, whatever its guest does.
const GREETED: Duration = Duration::from_secs(120);
/// What is put before the end of a VM's id for its cgroup.
pub(crate) const GROUP: &str = "burgeon-vm-";
/// A substrate of which none could be made is left alone for so long.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
/// None is made before nothing has gone on from a captured state for this long.
const QUIET: Duration = Duration::from_millis(50);
/// Demand fades without a word.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Whether a directory among those of VMs is of one that waits.
pub(crate) fn is_one(directory: &Path) -> bool {
    directory.join(MARKER).exists()
}

/// Ends one that an earlier host process has left.
pub(crate) fn clear(context: &Context, directory: &Path) {
    // It may have gone to another directory, or have been started and not written down yet.
    let written: Option<Identity> =
        fs::read(directory.join(MARKER)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    for identity in [written, find_unrecorded(directory)].into_iter().flatten() {
        if let Ok(process) = Process::hold(&identity) {
            process.kill();
        }
    }
    let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Both are named after the end of an id.
    if let Some(short) = name.len().checked_sub(8).and_then(|at| name.get(at..)) {
        context.groups.remove(&format!("{GROUP}{short}"));
    }
    remove(&context.layout, directory);
}

/// Removes the directory of one that waited. Aside first: half of it, without its mark, would be nobody's.
fn remove(layout: &Layout, directory: &Path) {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let aside = layout.temporary().join(format!("{MARKER}-{name}"));
    let removed = fs::rename(directory, &aside).and_then(|()| fs::remove_dir_all(&aside));
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(directory = %directory.display(), %error, "what waited for a VM takes room");
        }
        // A VM has it by now, or it was never there.
        _ => {}
    }
}

/// Removes what an earlier host process was about to make or to remove.
fn sweep(layout: &Layout) {
    for entry in fs::read_dir(layout.temporary()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(MARKER)
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::warn!(%error, "what waited for a VM takes room");
        }
    }
}

/// What one that waits has on this host. Dropped, it is removed, once its QEMU has ended.
struct Place {
    /// As a VM it would be this one.
    launch: Launch,
    directory: PathBuf,
    layout: Layout,
    disks: Arc<Disks>,
    groups: Groups,
    process: Option<Arc<Process>>,
    /// A VM has the disks and QEMU's directory.
    handed: bool,
}

impl Place {
    /// Makes its directory, marked from the first moment on.
    fn make(context: &Context, launch: Launch) -> Result<Place> {
        let failed = |error: std::io::Error| Error::io("make a directory for a QEMU", &error);
        let directory = context.layout.vm(launch.id);
        let aside = context.layout.temporary().join(format!("{MARKER}-{}", launch.id.short()));
        fs::create_dir_all(&aside)
            .and_then(|()| fs::write(aside.join(MARKER), ""))
            .and_then(|()| fs::rename(&aside, &directory))
            .map_err(failed)?;
        let (layout, disks, groups) = (context.layout.clone(), context.disks.clone(), context.groups.clone());
        Ok(Place { launch, directory, layout, disks, groups, process: None, handed: false })
    }

    /// Whose it is, for the next host process.
    fn write_down(&self, process: &Identity) -> Result<()> {
        let text = serde_json::to_vec(process).map_err(|error| Error::internal(error.to_string()))?;
        fs::write(self.directory.join(MARKER), text).map_err(|error| Error::io("write a QEMU down", &error))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (disks, groups, layout) = (self.disks.clone(), self.groups.clone(), self.layout.clone());
        let (launch, directory, process) = (self.launch.clone(), self.directory.clone(), self.process.take());
        let handed = self.handed;
        let clean_up = move || {
            if !handed {
                disks.close_all(launch.id);
            }
            groups.remove(&group_name(&launch));
            remove(&layout, &directory);
        };
        tokio::spawn(async move {
            // QEMU goes first, so that nothing asks for its disks any more. One that was handed over stays.
            if let Some(process) = process.filter(|_| !handed) {
                process.ended().await;
                let _how = process.reap();
            }
            drop(tokio::task::spawn_blocking(clean_up).await);
        });
    }
}

/// One that waits.
pub(crate) struct Standby {
    // In this order: what is dropped first ends QEMU.
    pub(crate) guard: KillUnlessUp,
    place: Place,
    pub(crate) run_as: RunAs,
    pub(crate) qmp: Qmp,
    /// Present where its guest has answered.
    pub(crate) agent: Option<AgentClient>,
    from: From,
    disks: Shape,
}

/// What one that waits has taken up.
#[derive(Clone)]
pub(crate) enum From {
    /// A substrate's state.
    State(Arc<Frozen>),
    /// The base of a VM that is forked now and then. The state comes with the fork.
    Base(Arc<Base>),
}

impl From {
    fn is(&self, other: &From) -> bool {
        match (self, other) {
            (From::State(one), From::State(other)) => Arc::ptr_eq(one, other),
            (From::Base(one), From::Base(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Standby {
    /// Whether a VM may claim it.
    fn fits(&self, launch: &Launch, from: &From, disks: &Shape) -> bool {
        let identity = &self.guard.process.identity;
        process::identity_of(identity.pid).as_ref() == Some(identity)
            && self.agent.as_ref().is_none_or(|agent| agent.ended().is_none())
            && self.from.is(from)
            && self.disks == *disks
            && self.place.launch.profile == launch.profile
            && self.place.launch.image == launch.image
    }

    /// Gives the VM what QEMU has open. The VM's record names the process already.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn hand_to(&mut self, directory: &Path, id: VmId) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("move what waited to its VM", &error);
        for name in [file::QEMU_LOG, file::QEMU_DIRECTORY] {
            fs::rename(self.place.directory.join(name), directory.join(name)).map_err(failed)?;
        }
        self.place.disks.hand_to(self.place.launch.id, id);
        self.place.handed = true;
        Ok(())
    }
}

/// A VM of which forks are going to be made.
#[derive(Clone)]
pub(crate) struct Seed {
    pub(crate) launch: Launch,
    pub(crate) accelerator: Accelerator,
    pub(crate) base: Arc<Base>,
    /// Its own. What it has written by now, its forks are going to be given.
    pub(crate) memory: Option<Arc<Guest>>,
}

#[derive(Default)]
struct Use {
    waiting: Vec<Standby>,
    /// Absent for a substrate.
    seed: Option<Arc<Seed>>,
    asked: Option<u32>,
    /// When VMs went on from it, the latest last.
    claims: VecDeque<Instant>,
    touched: Option<Instant>,
    /// When the last one could not be made, and why.
    failed: Option<(Instant, Error)>,
}

impl Use {
    fn demand(&self, now: Instant) -> Demand {
        let burst = self.claims.iter().filter(|claim| now - **claim < BURST).count();
        Demand {
            asked: self.asked,
            idle: self.touched.map_or(Duration::MAX, |touched| now - touched),
            burst: u32::try_from(burst).unwrap_or(u32::MAX),
        }
    }
}

/// Those that wait, by substrate or by the VM that is forked.
#[derive(Default)]
pub(crate) struct Standbys {
    of: Mutex<HashMap<VmId, Use>>,
    /// VMs that are just now going on from captured states. They come first.
    busy: AtomicUsize,
    changed: Notify,
    closed: std::sync::atomic::AtomicBool,
}

/// Held while a VM goes on from a captured state.
pub(crate) struct Busy<'a>(&'a Standbys);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}

enum Move {
    Make(VmId, Option<Arc<Seed>>),
    End(Box<Standby>),
}

impl Standbys {
    fn of(&self) -> MutexGuard<'_, HashMap<VmId, Use>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn busy(&self) -> Busy<'_> {
        self.busy.fetch_add(1, Ordering::AcqRel);
        Busy(self)
    }

    /// A substrate was made, or brought into memory again.
    pub(crate) fn touch(&self, substrate: VmId) {
        self.of().entry(substrate).or_default().touched = Some(Instant::now());
        self.changed.notify_one();
    }

    /// A VM was forked above its base, and may be again.
    pub(crate) fn forked(&self, source: VmId, seed: Seed) {
        let mut of = self.of();
        let known = of.entry(source).or_default();
        known.touched = Some(Instant::now());
        known.seed = Some(Arc::new(seed));
        drop(of);
        self.changed.notify_one();
    }

    /// How many a user wants to wait for a substrate; absent: as demand has it.
    pub(crate) fn ask(&self, substrate: VmId, count: Option<u32>) {
        let mut of = self.of();
        let known = of.entry(substrate).or_default();
        known.asked = count;
        known.failed = None;
        drop(of);
        self.changed.notify_one();
    }

    /// How many wait for VMs of substrates.
    pub(crate) fn all(&self) -> Vec<(VmId, View)> {
        let view = |(substrate, known): (&VmId, &Use)| {
            let waiting = u32::try_from(known.waiting.len()).unwrap_or(u32::MAX);
            let error = known.failed.as_ref().map(|(_, error)| error.clone());
            (*substrate, View { waiting, asked: known.asked, error })
        };
        self.of().iter().filter(|(_, known)| known.seed.is_none()).map(view).collect()
    }

    /// The processes of those that wait for VMs of a substrate.
    pub(crate) fn processes(&self, substrate: VmId) -> Vec<Identity> {
        let of = self.of();
        let waiting = of.get(&substrate).map(|known| known.waiting.as_slice()).unwrap_or_default();
        waiting.iter().map(|standby| standby.guard.process.identity.clone()).collect()
    }

    /// One for a VM, if there is one. `disks`: those that its source has now.
    pub(crate) fn claim(&self, source: VmId, launch: &Launch, from: &From, disks: &Shape) -> Option<Standby> {
        let mut unfit = Vec::new();
        let claimed = {
            let mut of = self.of();
            let known = match (from, of.entry(source)) {
                (From::State(_), entry) => entry.or_default(),
                (From::Base(_), Entry::Occupied(entry)) => entry.into_mut(),
                // It is forked for the first time.
                (From::Base(_), Entry::Vacant(_)) => return None,
            };
            let now = Instant::now();
            known.claims.push_back(now);
            known.claims.drain(..known.claims.len().saturating_sub(MOST_ASKED as usize));
            known.touched = Some(now);
            loop {
                match known.waiting.pop() {
                    Some(standby) if standby.fits(launch, from, disks) => break Some(standby),
                    Some(standby) => unfit.push(standby),
                    None => break None,
                }
            }
        };
        // Ended outside the lock.
        drop(unfit);
        claimed
    }

    /// The substrate is gone.
    pub(crate) fn forget(&self, substrate: VmId) {
        let known = self.of().remove(&substrate);
        drop(known);
    }

    /// A VM runs no more: if it was forked, what it began with is nobody's base from now on.
    pub(crate) fn ended(&self, source: VmId) {
        let known = {
            let mut of = self.of();
            let was_forked = of.get(&source).is_some_and(|known| known.seed.is_some());
            if was_forked { of.remove(&source) } else { None }
        };
        drop(known);
    }

    /// This process is leaving: nobody could claim them any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        for standby in self.of().drain().flat_map(|(_, known)| known.waiting) {
            // Now, and not in a task that this process does not wait for.
            standby.guard.process.kill();
            standby.place.groups.remove(&group_name(&standby.place.launch));
            remove(&standby.place.layout, &standby.place.directory);
        }
    }

    fn next_move(&self, context: &Context) -> Option<Move> {
        let now = Instant::now();
        let mut of = self.of();
        for (substrate, known) in of.iter_mut() {
            let waiting = u32::try_from(known.waiting.len()).unwrap_or(u32::MAX);
            let room = |known: &Use| match known.waiting.first() {
                Some(one) => context.room.has(one.place.launch.profile.memory),
                // How much one takes is known when its substrate is looked at.
                None => true,
            };
            let wanted = wanted(known.demand(now), waiting, u32::from(room(known)));
            if wanted < waiting {
                return known.waiting.pop().map(|standby| Move::End(Box::new(standby)));
            }
            let rests = known.failed.as_ref().is_some_and(|(failed, _)| now - *failed < AFTER_FAILURE);
            if wanted > waiting && !rests {
                return Some(Move::Make(*substrate, known.seed.clone()));
            }
        }
        None
    }

    fn add(&self, substrate: VmId, made: Result<Standby>) {
        let mut of = self.of();
        match (of.get_mut(&substrate), made) {
            (Some(known), Ok(standby)) if !self.closed.load(Ordering::Acquire) => {
                known.failed = None;
                known.waiting.push(standby);
            }
            // The substrate went meanwhile, or this process goes.
            (_, Ok(standby)) => drop(standby),
            (Some(known), Err(error)) => {
                tracing::warn!(%substrate, %error, "no QEMU waits for VMs of this substrate; they take longer");
                known.failed = Some((Instant::now(), error));
            }
            (None, Err(_)) => {}
        }
    }
}

/// Keeps as many waiting as are wanted, one change at a time, and only while nobody waits for a VM.
pub(crate) async fn keep(context: Arc<Context>) {
    let standbys = &context.standbys;
    sweep(&context.layout);
    loop {
        // A notice that comes before this is not lost: one is kept.
        let _time_is_a_reason_too = timeout(LOOK_AGAIN, standbys.changed.notified()).await;
        loop {
            let mut quiet_since = Instant::now();
            while quiet_since.elapsed() < QUIET {
                tokio::time::sleep(QUIET / 5).await;
                if standbys.busy.load(Ordering::Acquire) > 0 {
                    quiet_since = Instant::now();
                }
            }
            match standbys.next_move(&context) {
                Some(Move::End(standby)) => drop(standby),
                Some(Move::Make(source, seed)) => {
                    let made = match &seed {
                        None => make_of_substrate(&context, source).await,
                        Some(seed) => make(&context, source, seed, From::Base(seed.base.clone())).await,
                    };
                    standbys.add(source, made);
                }
                None => break,
            }
        }
    }
}

async fn make_of_substrate(context: &Context, substrate: VmId) -> Result<Standby> {
    let (record, frozen) = context.substrates.get(&context.layout, &context.qemu, &context.disks, substrate).await?;
    if record.launch.image.boot != Boot::Agent {
        return Err(Error::refused("its image has no agent"));
    }
    let seed = Seed { launch: record.launch, accelerator: record.accelerator, base: frozen.base.clone(), memory: None };
    make(context, substrate, &seed, From::State(frozen)).await
}

async fn make(context: &Context, source: VmId, seed: &Seed, from: From) -> Result<Standby> {
    let begin = match from {
        From::State(_) => Begin::Substrate,
        From::Base(_) => Begin::Fork,
    };
    let launch = Launch {
        id: VmId::generate(),
        name: MARKER.into(),
        source: Some(Source { vm: source, snapshot: None }),
        begin,
        ..seed.launch.clone()
    };
    let _room_until_it_waits = context.room.take(launch.profile.memory)?;
    let run_as = process::run_as(launch.id.uuid().as_u128(), seed.accelerator);
    let mut place = Place::make(context, launch.clone())?;
    let directory = place.directory.clone();
    let shape = {
        let (layout, disks, launch, directory) =
            (context.layout.clone(), context.disks.clone(), launch.clone(), directory.clone());
        blocking(move || {
            prepare::prepare_activation(&layout, &directory, &launch, source, run_as)?;
            disks.serve_late(&launch, source, run_as.user())?;
            disks.shape(&launch, source)
        })
        .await?
    };
    let machine = prepare::activation(&launch, seed.accelerator, shape.attached.clone(), &seed.base);
    let memory = Some(seed.base.file().as_fd());
    let (guard, _limits_are_told_with_the_vm) = start_qemu(context, &directory, &launch, &machine, run_as, memory)?;
    let process = guard.process.clone();
    place.process = Some(process.clone());
    place.write_down(&process.identity)?;
    let come_up = async {
        let qmp = connect_qmp(&directory, Instant::now() + MONITOR_DEADLINE).await?;
        state::tell_when_loaded(&qmp).await?;
        let agent = match &from {
            From::State(frozen) => Some(greet(context, &directory, &launch, frozen, &process, &qmp).await?),
            From::Base(base) => {
                let memory = state::open_memory(&qmp, &process.identity, &launch.profile).await?;
                let (base, of_source) = (base.clone(), seed.memory.clone());
                blocking(move || match of_source {
                    Some(of_source) => memory.own(&of_source.pages(Scope::Written)?, &base),
                    None => Ok(()),
                })
                .await?;
                None
            }
        };
        Ok((qmp, agent))
    };
    let (qmp, agent) = tokio::select! {
        up = timeout(GREETED, come_up) => up.map_err(|_| Error::deadline("its guest does not answer"))??,
        () = process.ended() => {
            let said = log_tail(&directory.join(file::QEMU_LOG), 600);
            return Err(Error::refused(format!("QEMU ended while it took up the captured state: {said}")));
        }
    };
    Ok(Standby { guard, place, run_as, qmp, agent, from, disks: shape })
}

/// Has the guest go on until its agent has answered, and stand still again.
async fn greet(
    context: &Context,
    directory: &Path,
    launch: &Launch,
    frozen: &Arc<Frozen>,
    process: &Process,
    qmp: &Qmp,
) -> Result<AgentClient> {
    let memory = state::open_memory(qmp, &process.identity, &launch.profile).await?;
    let of_frozen = frozen.clone();
    blocking(move || memory.complete(&of_frozen.base, of_frozen.written.as_ref())).await?;
    frozen.devices.load(qmp).await?;
    // Without a name: what it is called comes with the claim.
    let agent = connect_agent(directory, "", true, Instant::now() + MONITOR_DEADLINE).await?;
    state::go_on(qmp).await?;
    agent.wait_ready(Instant::now() + MONITOR_DEADLINE).await?;
    identity::rehearse(&agent, launch).await?;
    state::pause(qmp).await?;
    if context.disks.is_spoiled(launch.id) {
        return Err(Error::refused("its guest writes to its disk though its workload is frozen"));
    }
    Ok(agent)
}
