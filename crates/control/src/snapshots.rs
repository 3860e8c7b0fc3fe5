//! VMs that return to snapshots of theirs. The snapshots are the host's: meta knows only which return is wanted.

use burgeon_api::{
    Error, ErrorKind, Result, VmId,
    snapshot::{RollBackVm, VmSnapshot},
    vm::{Observed, VmView},
};
use burgeon_plan::{snapshot::check_rollback, vm::is_over};
use burgeon_store::{
    meta::VmRow,
    rollback::RollBack,
    steps::{Step, reached},
};
use tokio::time::{Duration, timeout};

use crate::{
    state::{Shared, State},
    substrates::UP,
};

/// How long a host process that is just starting is waited for.
const THERE: Duration = Duration::from_secs(10);

/// Waits until the host process has answered: both may have been started by this very command.
pub(crate) async fn host_is_there(state: &State) {
    let answers = state.when(|seen| (seen.looks > 0 && seen.unreachable.is_none()).then_some(Ok(())));
    // Without it, whoever asks next is told why.
    drop(timeout(THERE, answers).await);
}

/// A snapshot by name, or the latest.
///
/// # Errors
/// `NotFound`, with those there are.
pub(crate) async fn find(state: &State, row: &VmRow, name: Option<&str>) -> Result<VmSnapshot> {
    let mut all = state.host.snapshots(row.id).await?;
    let (vm, names): (_, Vec<String>) = (&row.name, all.iter().map(|snapshot| snapshot.name.clone()).collect());
    let found = match name {
        None => all.pop(),
        Some(name) => all.into_iter().find(|snapshot| snapshot.name == name),
    };
    found.ok_or_else(|| match name {
        Some(name) if !names.is_empty() => {
            let shown = burgeon_api::path_text::printable(name);
            Error::not_found(format!("VM {vm} has no snapshot {shown}: it has {}", names.join(", ")))
                .with_hint(format!("burgeon vm snapshots {vm} lists them"))
        }
        _ => Error::not_found(format!("VM {vm} has no snapshot"))
            .with_hint(format!("burgeon vm snapshot {vm} takes one")),
    })
}

/// Rolls a VM back, and waits until it runs. What is wanted stands in its row first: it is carried out whatever dies
/// meanwhile. Asking again with the same id asks for nothing else.
///
/// # Errors
/// `NotFound`; those of the host, which has the VM as it was then; why it does not go on.
pub(crate) async fn roll_back(state: &Shared, vm: String, request: RollBackVm) -> Result<VmView> {
    host_is_there(state).await;
    let row = state.meta.vm(&vm).await?;
    let (id, name) = (row.id, row.name.clone());
    // Meanwhile it is not parked.
    let _in_use = state.uses.begin(id);
    state.uses.settled(id).await;
    let is_known = row.rollback.as_ref().is_some_and(|rollback| rollback.request == request.id);
    let wanted = if is_known {
        row.starts
    } else {
        check_rollback(&name, row.intent, &state.view(row.clone()).observed)?;
        let snapshot = find(state, &row, request.snapshot.as_deref()).await?.name;
        want(state, row, RollBack { request: request.id, snapshot }).await?
    };
    let back = async {
        loop {
            let looks = state.seen.borrow().looks;
            let row = state.meta.vm(&id.to_string()).await?;
            if row.starts < wanted {
                return Err(Error::conflict(format!("VM {name} was not rolled back: its host has refused that"))
                    .with_hint(format!("burgeon vm snapshots {name} lists what it can return to")));
            }
            let view = state.view(row);
            let has_begun = view.on_host.as_ref().is_some_and(|vm| vm.starts >= wanted);
            match &view.observed {
                Observed::Running if has_begun => return Ok(view),
                observed if has_begun && is_over(observed) => {
                    let detail = observed.detail();
                    return Err(Error::unavailable(format!("VM {name} does not go on from its snapshot: {detail}"))
                        .with_hint(format!("try again: burgeon vm start {name}")));
                }
                _ => state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?,
            }
        }
    };
    timeout(UP, back).await.map_err(|_| {
        Error::deadline(format!("VM {name} has not gone on from its snapshot within {} s", UP.as_secs()))
    })?
}

/// Writes a rollback down and asks the host for it, while nobody else does. Which start of the VM it is.
async fn want(state: &Shared, row: VmRow, rollback: RollBack) -> Result<u32> {
    let id = row.id;
    state.forking.send_modify(|busy| busy.extend([id]));
    let snapshot = rollback.snapshot.clone();
    let asked = async {
        let row = state.meta.start_again(row, Some(rollback)).await?;
        let starts = row.starts;
        reached(Step::RollbackWanted);
        match ask(state, row, starts, snapshot).await {
            // It is asked again, until it answers.
            Err(error) if is_away(&error) => Ok(starts),
            asked => asked.map(|()| starts),
        }
    }
    .await;
    state.forking.send_modify(|busy| busy.retain(|other| *other != id));
    state.kick.notify_one();
    asked
}

/// Asks the host to roll a VM back. What it refuses is not wanted any more.
///
/// # Errors
/// The host's.
pub(crate) async fn ask(state: &State, row: VmRow, starts: u32, snapshot: String) -> Result<()> {
    let (id, name): (VmId, String) = (row.id, row.name.clone());
    match state.host.roll_back(id, starts, snapshot).await {
        Err(error) if !is_away(&error) => {
            tracing::warn!(vm = %name, %error, "not rolled back");
            state.meta.take_back_rollback(row).await?;
            Err(error.context(format!("roll VM {name} back")))
        }
        asked => asked,
    }
}

/// Whether what became of a request is not known.
fn is_away(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Deadline)
}
