//! The VMs of this host. One task owns the table.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::Path,
    sync::Arc,
};

use burgeon_api::{
    Error, Result, VmId,
    host::Launch,
    vm::{HostVm, Observed},
};
use burgeon_plan::adopt::{self, Answer, Recorded, Seen, Verdict};
use burgeon_qemu::process::{Process, host_boot_id, identity_of};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::{
    activate::Claim,
    provisions,
    record::{Record, find_unrecorded},
    snapshots, standby,
    start::Context,
    vm::{self, VmHandle, with_figures},
};

enum Ask {
    Launch { launch: Box<Launch>, claim: Option<Claim>, reply: oneshot::Sender<Result<()>> },
    Resume { record: Box<Record>, ended: Observed, reply: oneshot::Sender<Result<()>> },
    Get { id: VmId, reply: oneshot::Sender<Option<VmHandle>> },
    List { reply: oneshot::Sender<Vec<HostVm>> },
}

#[derive(Clone)]
pub(crate) struct Registry {
    asks: mpsc::Sender<Ask>,
    changes: broadcast::Sender<HostVm>,
}

impl Registry {
    /// Finds what an earlier host process has left, and serves the table.
    pub(crate) fn start(context: Arc<Context>) -> Registry {
        let (changes, _) = broadcast::channel(256);
        let (asks, receiver) = mpsc::channel(64);
        let found = find_left_over(&context, &changes);
        tokio::spawn(own(context, found, changes.clone(), receiver));
        Registry { asks, changes }
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T> {
        let (reply, receiver) = oneshot::channel();
        let gone = || Error::unavailable("the host process is leaving");
        self.asks.send(make(reply)).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())
    }

    /// `claim`: what the VM goes on from, where that is not a substrate.
    pub(crate) async fn launch(&self, launch: Launch, claim: Option<Claim>) -> Result<()> {
        self.ask(|reply| Ask::Launch { launch: Box::new(launch), claim, reply }).await?
    }

    /// Takes up a VM whose directory was just made, and that has no process.
    pub(crate) async fn resume(&self, record: Record, ended: Observed) -> Result<()> {
        self.ask(|reply| Ask::Resume { record: Box::new(record), ended, reply }).await?
    }

    pub(crate) async fn get(&self, id: VmId) -> Result<VmHandle> {
        self.ask(|reply| Ask::Get { id, reply })
            .await?
            .ok_or_else(|| Error::not_found(format!("VM {id} is not on this host")))
    }

    pub(crate) async fn list(&self) -> Result<Vec<HostVm>> {
        self.ask(|reply| Ask::List { reply }).await
    }

    pub(crate) fn changes(&self) -> broadcast::Receiver<HostVm> {
        self.changes.subscribe()
    }
}

async fn own(
    context: Arc<Context>,
    mut vms: HashMap<VmId, VmHandle>,
    changes: broadcast::Sender<HostVm>,
    mut asks: mpsc::Receiver<Ask>,
) {
    while let Some(ask) = asks.recv().await {
        // A task that has ended was removed, with all that it left.
        vms.retain(|_, handle| !handle.commands.is_closed());
        match ask {
            Ask::Launch { launch, claim, reply } => {
                let outcome = match vms.entry(launch.id) {
                    // A fork is at an instant, and the VM that is there is of another.
                    Entry::Occupied(_) if claim.is_some() => {
                        Err(Error::conflict(format!("VM {} is on this host already", launch.name)))
                    }
                    // Asked twice is as good as once.
                    Entry::Occupied(_) => Ok(()),
                    Entry::Vacant(place) => {
                        vm::launch(context.clone(), *launch, claim, changes.clone()).map(|handle| {
                            place.insert(handle);
                        })
                    }
                };
                drop(reply.send(outcome));
            }
            Ask::Resume { record, ended, reply } => {
                let (id, directory) = (record.launch.id, context.layout.vm(record.launch.id));
                let resume = || vm::resume(context.clone(), directory, *record, Err(ended), changes.clone());
                vms.entry(id).or_insert_with(resume);
                drop(reply.send(Ok(())));
            }
            Ask::Get { id, reply } => drop(reply.send(vms.get(&id).cloned())),
            Ask::List { reply } => {
                let mut all: Vec<HostVm> =
                    vms.values().map(|handle| with_figures(handle.view.borrow().clone(), &handle.directory)).collect();
                all.sort_by_key(|view| view.id);
                drop(reply.send(all));
            }
        }
    }
}

fn find_left_over(context: &Arc<Context>, changes: &broadcast::Sender<HostVm>) -> HashMap<VmId, VmHandle> {
    let mut vms = HashMap::new();
    let mut all_read = true;
    let Ok(directories) = std::fs::read_dir(context.layout.vms()) else { return vms };
    for directory in directories.flatten().map(|entry| entry.path()) {
        if standby::is_one(&directory) {
            standby::clear(context, &directory);
            continue;
        }
        snapshots::sweep(&directory);
        match Record::load(&directory) {
            Ok(record) => {
                let (record, found) = look_for(&directory, record);
                if let Err(ended) = &found {
                    tracing::info!(vm = %record.launch.name, state = ended.name(), reason = ended.detail(), "found");
                }
                let id = record.launch.id;
                vms.insert(id, vm::resume(context.clone(), directory, record, found, changes.clone()));
            }
            Err(error) => {
                all_read = false;
                tracing::error!(directory = %directory.display(), %error, "a VM's record does not read; its directory is left as it is");
            }
        }
    }
    for receipt in vms.values().filter_map(|handle| handle.view.borrow().receipt.clone()) {
        if let Err(error) = context.siblings.admit(&receipt) {
            tracing::error!(vm = %receipt.host_name, %error, "found");
        }
    }
    if all_read {
        let (disks, ids) = (context.disks.clone(), vms.keys().copied().collect());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = disks.tidy(&ids) {
                tracing::warn!(%error, "images below disks of removed VMs are kept");
            }
        });
    }
    vms
}

/// Decides whether a recorded VM still runs: its process, or how it ended.
fn look_for(directory: &Path, mut record: Record) -> (Record, Result<Arc<Process>, Observed>) {
    if let Some(ended) = record.ended.clone() {
        if let Some(left_over) = record.process.as_ref().and_then(|process| Process::hold(process).ok()) {
            // The host process died between writing the end down and bringing it about.
            left_over.kill();
        }
        return (record, Err(ended));
    }
    if record.rolling_back.is_some() {
        // Of what it is to return from, and of tries to return.
        let known = [record.process.take(), find_unrecorded(directory)];
        for process in known.into_iter().flatten().filter_map(|process| Process::hold(&process).ok()) {
            process.kill();
        }
        return (record, Err(Observed::Starting { phase: "queued".into() }));
    }
    if record.docked.is_some() {
        // It had not gone on: what is kept of it is as it was.
        let left_over = record.process.take().or_else(|| find_unrecorded(directory));
        if let Some(process) = left_over.and_then(|identity| Process::hold(&identity).ok()) {
            process.kill();
        }
        let reason = "the host process ended before it went on".to_string();
        return (record, Err(Observed::Parked { reason }));
    }
    let has_lost_secrets = record.awaits_provisions && provisions::have_secrets(directory) && record.starts == 0;
    if record.awaits_receipt || has_lost_secrets {
        // It was being given its identity, and nobody knows how far that went.
        // One that it has claimed may have died, and its own not be written down yet.
        let known = [record.process.clone(), find_unrecorded(directory)];
        for process in known.into_iter().flatten().filter_map(|process| Process::hold(&process).ok()) {
            process.kill();
        }
        let reason = if has_lost_secrets {
            "its secrets were lost with the host process; make it again with them".to_string()
        } else {
            "the host process ended before the VM had shown its receipt".to_string()
        };
        // Its disk is its own, and it may boot from that; one that has never run is nothing.
        let has_run = record.starts > 0;
        return (record, Err(if has_run { Observed::Stopped { reason } } else { Observed::Failed { reason } }));
    }
    if record.process.is_none() {
        record.process = find_unrecorded(directory);
        record.host_boot_id = host_boot_id();
    }
    let lost = |reason: String| Observed::Failed { reason };
    let Some(identity) = record.process.clone() else {
        let reason = "the host process was gone before QEMU had been started";
        if record.starts > 0 {
            // Its disk is as it was: it may be asked to start once more.
            return (record, Err(Observed::Stopped { reason: reason.into() }));
        }
        return (record, Err(lost(reason.into())));
    };
    let recorded = Recorded {
        pid: identity.pid,
        start_time_ticks: identity.start_ticks,
        executable: identity.executable.display().to_string(),
        boot_id: record.host_boot_id.clone(),
    };
    let seen = match identity_of(identity.pid) {
        Some(now) => {
            Seen::Process { start_time_ticks: now.start_ticks, executable: Some(now.executable.display().to_string()) }
        }
        None => Seen::Nothing,
    };
    // Whether its sockets answer is tried next, by the VM's own task.
    let answer = Answer::None { reason: "not asked yet".into() };
    match adopt::decide(&recorded, &seen, &host_boot_id(), &answer) {
        Verdict::Gone { reason } => (record, Err(lost(format!("lost while the host process was away: {reason}")))),
        Verdict::Adopt | Verdict::Unreachable { .. } => match Process::hold(&identity) {
            Ok(process) => (record, Ok(Arc::new(process))),
            Err(error) => (record, Err(lost(format!("lost while the host process was away: {error}")))),
        },
    }
}
