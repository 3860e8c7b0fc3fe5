//! The loop that makes the host's VMs those that meta wants. It takes no arguments, does the same
//! thing however often it runs, and may be killed anywhere: meta is the truth.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use burgeon_api::{
    Error, ErrorKind, Result, VmId,
    host::{Request, StopMode},
    vm::{Intent, Observed, VmView},
};
use burgeon_plan::vm::{Action, HostSeen, Others, Turn, Wanted, decide, is_over, is_start_awaited, turn};
use burgeon_store::meta::{Damaged, VmRow};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout},
};

use crate::{
    host_client::receive_message,
    life,
    receipts::Receipts,
    snapshots,
    state::{Seen, Shared, State},
};

/// A look without any hint.
const PERIOD: Duration = Duration::from_secs(5);
/// How long a guest may take to stop when it is asked.
const GRACE: Duration = Duration::from_secs(90);

pub(crate) async fn run(state: Shared) {
    let mut looker =
        Looker { state: state.clone(), tasks: Tasks::default(), told: BTreeSet::new(), receipts: Receipts::default() };
    while !state.shutdown.is_cancelled() {
        looker.look_and_act().await;
        tokio::select! {
            () = state.kick.notified() => {}
            () = sleep(PERIOD) => {}
            () = looker.tasks.room() => {}
            () = state.shutdown.cancelled() => {}
        }
    }
    looker.tasks.finish().await;
}

/// Wakes the loop whenever the host reports a change.
pub(crate) async fn watch_host(state: Shared) {
    loop {
        let watching = async {
            let mut stream = state.host.stream(Request::Watch).await?;
            state.kick.notify_one();
            loop {
                receive_message(&mut stream).await?;
                state.kick.notify_one();
            }
        };
        let outcome: Result<()> = tokio::select! {
            outcome = watching => outcome,
            () = state.shutdown.cancelled() => return,
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "the host process is not watched at the moment");
        }
        state.kick.notify_one();
        sleep(Duration::from_millis(200)).await;
    }
}

struct Looker {
    state: Shared,
    tasks: Tasks,
    /// Damaged rows that the log has told of.
    told: BTreeSet<String>,
    receipts: Receipts,
}

impl Looker {
    async fn look_and_act(&mut self) {
        let state = &self.state;
        // What is forked now, and was when the host was asked: nothing is done about either.
        let mut forking = state.forking.borrow().clone();
        // The host before meta (and before the ids of image builds): they are known before their launch is
        // sent, so what the host has and nobody knows is an orphan.
        let host = state.host.list().await;
        let (rows, damaged) = match state.meta.all_vms().await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::error!(%error, "the reconcile loop cannot read meta");
                return;
            }
        };
        let seen = match &host {
            Ok(vms) => HostSeen::Reachable(vms.clone()),
            Err(error) => HostSeen::Unreachable { reason: error.to_string() },
        };
        keep_observed(state, &rows, &seen).await;
        let was_reached = host.is_ok();
        publish(state, host);
        if let HostSeen::Reachable(vms) = &seen {
            self.receipts.keep(state, &rows, vms).await;
        }
        if was_reached {
            life::carry_out(state, &rows).await;
        }
        forking.extend(state.forking.borrow().iter());
        let wanted: Vec<Wanted> = rows
            .iter()
            .filter(|row| !forking.contains(&row.id))
            .map(|row| Wanted {
                id: row.id,
                intent: row.intent,
                launched_before: row.launched,
                ended: is_over(&row.observed),
                starts: row.starts,
                rollback: row.rollback.as_ref().map(|rollback| rollback.snapshot.clone()),
            })
            .collect();
        let mut others = Others { ids: state.temporary.borrow().clone(), nameless: false };
        others.ids.extend(forking);
        for row in damaged {
            if let Ok(id) = row.id.parse() {
                others.ids.insert(id);
            } else {
                others.nameless = true;
            }
            let Damaged { id, name, reason } = row;
            if self.told.insert(id.clone()) {
                tracing::error!(vm = %name, %id, %reason, "a VM's row does not read; nothing is done about it until burgeon vm rm removes it");
            }
        }
        for action in decide(&wanted, &others, &seen) {
            let row = rows.iter().find(|row| row.id == action.id()).cloned();
            self.tasks.begin(&self.state, action, row);
        }
    }
}

/// What the host is being asked to do, one action for each VM: a slow one holds up no other VM.
#[derive(Default)]
struct Tasks {
    running: JoinSet<()>,
    doing: BTreeMap<VmId, Doing>,
}

struct Doing {
    action: Action,
    task: AbortHandle,
    /// Another action waits for its end.
    awaited: bool,
}

impl Tasks {
    fn begin(&mut self, state: &Shared, action: Action, row: Option<VmRow>) {
        let id = action.id();
        if let Some(doing) = self.doing.get_mut(&id) {
            match turn(&doing.action, &action) {
                Turn::Wait => {
                    doing.awaited |= doing.action != action;
                    return;
                }
                // The host goes on with it by itself.
                Turn::Replace => doing.task.abort(),
            }
        }
        let state = Arc::clone(state);
        let told = action.clone();
        let task = self.running.spawn(async move { act(&state, told, row).await });
        self.doing.insert(id, Doing { action, task, awaited: false });
    }

    /// Waits until a VM is free for an action that waits. Safe to cancel.
    ///
    /// What has ended stays in the table until here, between two looks: what a look saw of such a VM may be
    /// older than what was done.
    async fn room(&mut self) {
        loop {
            let ended = match self.running.join_next_with_id().await {
                Some(Ok((task, ()))) => task,
                Some(Err(error)) => error.id(),
                None => std::future::pending().await,
            };
            let vm = self.doing.iter().find(|(_, doing)| doing.task.id() == ended).map(|(vm, _)| *vm);
            if let Some(doing) = vm.and_then(|vm| self.doing.remove(&vm))
                && doing.awaited
            {
                return;
            }
        }
    }

    async fn finish(mut self) {
        while self.running.join_next().await.is_some() {}
    }
}

/// Writes down what the host says, so that it is known while the host cannot be asked.
async fn keep_observed(state: &State, rows: &[VmRow], seen: &HostSeen) {
    let HostSeen::Reachable(vms) = seen else { return };
    for row in rows {
        if let Some(vm) = vms.iter().find(|vm| vm.id == row.id)
            && (vm.observed != row.observed || !row.launched)
            && !is_start_awaited(row.starts, vm)
            && let Err(error) = state.meta.set_observed(row.id, vm.observed.clone(), true).await
        {
            tracing::error!(vm = %row.name, %error, "its state could not be kept");
        }
    }
}

fn publish(state: &State, host: Result<Vec<burgeon_api::vm::HostVm>>) {
    state.seen.send_modify(|seen| {
        let looks = seen.looks + 1;
        *seen = match host {
            Ok(vms) => Seen { looks, unreachable: None, vms },
            // What was last known stays, marked as unknown.
            Err(error) => Seen { looks, unreachable: Some(error.to_string()), vms: std::mem::take(&mut seen.vms) },
        };
    });
}

async fn act(state: &State, action: Action, row: Option<VmRow>) {
    let name = row.as_ref().map_or_else(|| action.id().to_string(), |row| row.name.clone());
    let outcome = match (&action, row) {
        (Action::Launch { id }, Some(row)) => match state.launch_of(&row).await {
            Ok(launch) => match state.host.launch(launch).await {
                Ok(()) => {
                    state.kick.notify_one();
                    Ok(())
                }
                // The host is away or slow: the launch may be asked for again.
                Err(error) if matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Deadline) => Err(error),
                Err(error) => give_up(state, *id, &error).await,
            },
            // Without its image it can never start.
            Err(error) => give_up(state, *id, &error).await,
        },
        (Action::Start { id, starts }, _) => {
            let outcome = state.host.start(*id, *starts).await;
            state.kick.notify_one();
            outcome
        }
        (Action::RollBack { starts, snapshot, .. }, Some(row)) => {
            let outcome = snapshots::ask(state, row, *starts, snapshot.clone()).await;
            state.kick.notify_one();
            outcome
        }
        (Action::Stop { id }, _) => {
            let grace = u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX);
            let outcome = state.host.stop(*id, StopMode::Graceful { deadline_ms: grace }).await;
            state.kick.notify_one();
            outcome
        }
        (Action::Remove { id }, _) => {
            let outcome = state.host.remove(*id).await;
            if outcome.is_ok()
                && let Err(error) = state.meta.forget_vm(*id).await
            {
                tracing::error!(vm = %name, %error, "its row stays for now");
            }
            state.kick.notify_one();
            outcome
        }
        (Action::RemoveOrphan { id }, _) => {
            tracing::warn!(vm = %name, "removing a VM that meta does not know");
            state.host.remove(*id).await
        }
        (Action::ReportLost { id, reason }, _) => {
            tracing::error!(vm = %name, %reason, "lost");
            state.meta.set_observed(*id, Observed::Failed { reason: reason.clone() }, true).await
        }
        (Action::Forget { id }, _) => {
            let outcome = state.meta.forget_vm(*id).await;
            state.kick.notify_one();
            outcome
        }
        (Action::Launch { .. } | Action::RollBack { .. }, None) => Ok(()),
    };
    if let Err(error) = outcome {
        tracing::warn!(vm = %name, ?action, %error, "will be tried again");
    }
}

/// A VM that cannot be launched has failed, with the reason.
async fn give_up(state: &State, id: VmId, error: &Error) -> Result<()> {
    state.meta.set_observed(id, Observed::Failed { reason: error.to_string() }, false).await?;
    state.kick.notify_one();
    Ok(())
}

/// Whether a VM needs the server: it has not ended, or is to be removed. A damaged row alone does not.
fn keeps_server(vm: &VmView) -> bool {
    match (&vm.observed, &vm.on_host) {
        (Observed::Damaged { .. }, on_host) => on_host.as_ref().is_some_and(|vm| !is_over(&vm.observed)),
        (observed, _) => !is_over(observed) || vm.intent == Intent::Removed,
    }
}

/// Whether anything keeps an on-demand server from leaving.
pub(crate) async fn idle_exit(state: Shared, limit: Option<Duration>) {
    let begun = Instant::now();
    let mut idle = burgeon_plan::idle::Idle::default();
    loop {
        let vms = match state.views().await {
            Ok(views) => views.into_iter().filter(keeps_server).count(),
            Err(_) => 1,
        };
        let asked = crate::substrates::standbys(&state).await.into_iter().filter(|(_, of)| of.asked.unwrap_or(0) > 0);
        let activity = burgeon_plan::idle::Activity {
            vms,
            standbys: asked.count(),
            runs: state.pipelines.active(),
            connections: state.busy.load(std::sync::atomic::Ordering::Relaxed),
        };
        match idle.should_exit(begun.elapsed(), &activity, limit) {
            burgeon_plan::idle::Verdict::Exit => {
                match timeout(Duration::from_secs(10), state.host.exit()).await {
                    Ok(Ok(())) => tracing::info!("idle: both processes leave"),
                    Ok(Err(error)) => tracing::warn!(%error, "the host process does not leave"),
                    Err(_) => tracing::warn!("the host process does not answer"),
                }
                state.shutdown.cancel();
                return;
            }
            burgeon_plan::idle::Verdict::Stay | burgeon_plan::idle::Verdict::StayUntil(_) => {}
        }
        tokio::select! {
            () = sleep(Duration::from_secs(1)) => {}
            () = state.shutdown.cancelled() => return,
        }
    }
}
