//! Substrates on their way: a VM is booted, warmed up and captured by its host; and VMs that go on from others.

use std::collections::BTreeSet;

use burgeon_api::{
    Error, ErrorKind, Result, VmId,
    host::{Begin, Source},
    image::Image,
    provisions::Provisions,
    substrate::{Child, Docked, ForkVm, Forked, Keep, Standbys, SubstrateView},
    vm::{Intent, Observed, Resize},
};
use burgeon_plan::{size::wanted, vm::is_over};
use burgeon_store::meta::{CloneSource, VmRow};
use tokio::time::{Duration, timeout};

use crate::{
    snapshots,
    state::{Shared, now_s},
};

/// How long a substrate's VM may take to come up, and one that goes on.
pub(crate) const UP: Duration = Duration::from_secs(300);
/// When a host process that is gone is asked again.
const AGAIN: Duration = Duration::from_millis(200);
/// VMs that one request makes.
pub(crate) const MOST_AT_ONCE: usize = 256;

/// Goes on with substrates that were being made when an earlier control process ended.
///
/// # Errors
/// Meta's.
pub(crate) async fn resume(state: &Shared) -> Result<()> {
    for row in state.meta.vms().await? {
        if row.substrate.is_some() && row.intent == Intent::Running && !is_over(&row.observed) {
            raise(state, row);
        }
    }
    Ok(())
}

/// Makes a substrate of a VM that is starting.
pub(crate) fn raise(state: &Shared, row: VmRow) {
    let of_task = state.clone();
    state.tasks.spawn(async move {
        let state = of_task;
        let outcome = tokio::select! {
            outcome = raised(&state, &row) => outcome,
            () = state.shutdown.cancelled() => return,
        };
        if let Err(error) = outcome {
            tracing::error!(substrate = %row.name, %error, "a substrate could not be made");
        }
        state.kick.notify_one();
    });
}

async fn raised(state: &Shared, row: &VmRow) -> Result<()> {
    let id = row.id;
    let up = state.when(|seen| match seen.vms.iter().find(|vm| vm.id == id).map(|vm| &vm.observed) {
        Some(Observed::Running | Observed::Docked) => Some(Ok(())),
        Some(Observed::Failed { reason } | Observed::Stopped { reason }) => {
            Some(Err(Error::unavailable(format!("it did not come up: {reason}"))))
        }
        _ => None,
    });
    let given_up = async {
        // One that cannot be launched is on no host.
        loop {
            let looks = state.seen.borrow().looks;
            let row = state.meta.vm(&id.to_string()).await?;
            if let Observed::Failed { reason } = row.observed {
                return Err(Error::unavailable(reason));
            }
            state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?;
        }
    };
    let up = async {
        tokio::select! {
            up = up => up,
            gone = given_up => gone,
        }
    };
    timeout(UP, up).await.map_err(|_| Error::deadline(format!("it did not come up within {} s", UP.as_secs())))??;
    loop {
        match state.host.dock(id, row.substrate.clone().unwrap_or_default()).await {
            // The host goes on with what an earlier control process has asked for.
            Err(error) if error.kind == ErrorKind::Conflict => {
                let looks = state.seen.borrow().looks;
                state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?;
                let over = state.seen.borrow().vms.iter().any(|vm| vm.id == id && is_over(&vm.observed));
                if over {
                    return Ok(());
                }
            }
            // How far the host process had come when it ended, nobody knows.
            Err(error) if matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Deadline) => {
                let given_up = async {
                    // That the host process is gone, this one may not have noticed yet.
                    while let Err(unreached) = state.host.give_up(id, error.to_string()).await {
                        if unreached.kind != ErrorKind::Unavailable {
                            return Err(unreached);
                        }
                        tokio::time::sleep(AGAIN).await;
                    }
                    Ok(())
                };
                timeout(UP, given_up).await.map_err(|_| error.clone())??;
                return Err(error);
            }
            outcome => return outcome,
        }
    }
}

/// # Errors
/// `Conflict` for a substrate that VMs go on from.
pub(crate) async fn check_removal(state: &Shared, row: &VmRow) -> Result<()> {
    if row.substrate.is_none() {
        return Ok(());
    }
    let names: Vec<String> = clones(&state.meta.vms().await?, row.id).into_iter().map(|clone| clone.name).collect();
    if names.is_empty() {
        return Ok(());
    }
    let (count, shown) = (names.len(), names.iter().take(5).cloned().collect::<Vec<_>>().join(" "));
    let more = if count > 5 { " ..." } else { "" };
    Err(Error::conflict(format!("{count} VMs go on from substrate {}: {shown}{more}", row.name))
        .with_hint(format!("remove them first: burgeon vm rm {shown}")))
}

/// VMs that go on from a substrate.
pub(crate) fn clones(rows: &[VmRow], substrate: VmId) -> Vec<VmRow> {
    let of_it = |row: &&VmRow| {
        let source = row.source.as_ref();
        source.is_some_and(|source| source.begin == Begin::Substrate && source.source.vm == substrate)
            && row.intent != Intent::Removed
    };
    rows.iter().filter(of_it).cloned().collect()
}

/// A substrate's row, by name or id.
///
/// # Errors
/// `NotFound`.
pub(crate) async fn find(state: &Shared, name: &str) -> Result<VmRow> {
    let missing = || {
        Error::not_found(format!("there is no substrate \"{}\"", burgeon_api::path_text::printable(name)))
            .with_hint("burgeon substrate ls lists the substrates there are")
    };
    let row = state.meta.vm(name).await.map_err(|error| match error.kind {
        ErrorKind::NotFound => missing(),
        _ => error,
    })?;
    if row.substrate.is_some() { Ok(row) } else { Err(missing()) }
}

/// What is kept of a substrate. A server that has just been started may be a moment ahead of its host process.
///
/// # Errors
/// `Conflict` for one that is not docked, with what it is.
pub(crate) async fn docked(state: &Shared, row: &VmRow) -> Result<Docked> {
    snapshots::host_is_there(state).await;
    let view = state.view(row.clone());
    let docked = view.on_host.and_then(|vm| vm.docked).filter(|_| view.observed == Observed::Docked);
    docked.ok_or_else(|| not_docked(&view.name, &view.observed))
}

pub(crate) fn not_docked(name: &str, observed: &Observed) -> Error {
    let (state, detail) = (observed.name(), observed.detail());
    Error::conflict(format!("substrate {name} is not docked: it is {state} {detail}").trim_end())
}

pub(crate) async fn views(state: &Shared) -> Result<Vec<SubstrateView>> {
    let rows = state.meta.vms().await?;
    let standbys = standbys(state).await;
    Ok(rows.iter().filter(|row| row.substrate.is_some()).map(|row| view(state, row, &rows, &standbys)).collect())
}

/// What waits on the host, by substrate.
pub(crate) type Waiting = Vec<(VmId, Standbys)>;

/// Of a host that cannot be asked just now, nothing is known, and nothing waits.
pub(crate) async fn standbys(state: &Shared) -> Waiting {
    state.host.standbys().await.unwrap_or_default()
}

pub(crate) fn view(state: &Shared, row: &VmRow, all: &[VmRow], standbys: &Waiting) -> SubstrateView {
    let vm = state.view(row.clone());
    let of_it = standbys.iter().find(|(substrate, _)| *substrate == row.id);
    SubstrateView {
        id: row.id,
        name: row.name.clone(),
        image: row.image.clone(),
        profile: row.profile.clone(),
        recipe: row.substrate.clone().unwrap_or_default(),
        observed: vm.observed,
        created_s: row.created_s,
        clones: u32::try_from(clones(all, row.id).len()).unwrap_or(u32::MAX),
        docked: vm.on_host.and_then(|vm| vm.docked),
        standbys: of_it.map(|(_, standbys)| standbys.clone()).unwrap_or_default(),
    }
}

/// Rows of new VMs that go on from another one.
///
/// # Errors
/// `Invalid` for too many of them, or names that do not fit the ids.
pub(crate) fn rows(
    source: &VmRow,
    snapshot: Option<&str>,
    image: &Image,
    (begin, keep): (Begin, Keep),
    ids: &[VmId],
    names: &[String],
) -> Result<Vec<VmRow>> {
    if ids.is_empty() || ids.len() > MOST_AT_ONCE {
        return Err(Error::invalid(format!("{} VMs at once; 1 to {MOST_AT_ONCE} can be made", ids.len())));
    }
    if !names.is_empty() && names.len() != ids.len() {
        return Err(Error::invalid(format!("{} names for {} VMs", names.len(), ids.len())));
    }
    if ids.iter().collect::<BTreeSet<_>>().len() != ids.len() {
        return Err(Error::invalid("an id is given twice"));
    }
    let row = |(index, id): (usize, &VmId)| {
        let name = names.get(index).cloned().unwrap_or_else(|| format!("{}-{}", source.name, id.short()));
        let from = Source { vm: source.id, snapshot: snapshot.map(str::to_string) };
        VmRow {
            source: Some(CloneSource { source: from, image: image.clone(), begin, keep, resize: Resize::default() }),
            ..VmRow::new(*id, name, source.image.clone(), source.profile.clone(), now_s())
        }
    };
    Ok(ids.iter().enumerate().map(row).collect())
}

/// Has new VMs have another size than what they go on from.
///
/// # Errors
/// `Refused`, for what their profile does not allow.
pub(crate) fn resize(rows: &mut [VmRow], resize: Resize) -> Result<()> {
    for row in rows {
        wanted(&row.name, &row.profile, row.profile.size(), resize)?;
        if let Some(source) = &mut row.source {
            source.resize = resize;
        }
    }
    Ok(())
}

/// Records VMs that are given something: all of them, or none. As [`record`].
///
/// # Errors
/// `Invalid` for what cannot be given; those of [`record`].
pub(crate) async fn provided(state: &Shared, rows: Vec<VmRow>, provisions: &Provisions) -> Result<Vec<VmRow>> {
    provisions.check()?;
    if provisions.is_empty() || !there(state, &rows).await?.is_empty() {
        return record(state, rows).await;
    }
    // A server that has just been started may be a moment ahead of it.
    snapshots::host_is_there(state).await;
    let ids: Vec<VmId> = rows.iter().map(|row| row.id).collect();
    let recorded = async {
        // Before there is a row, which may be launched at once.
        for (index, id) in ids.iter().enumerate() {
            state.host.provide(*id, provisions.numbered(index + 1)).await?;
        }
        record(state, rows).await
    };
    let recorded = recorded.await;
    if recorded.is_err() {
        take_back(state, &ids).await;
    }
    recorded
}

/// Has the host forget what was provided for VMs that are not made. Of those that it has launched it has forgotten it.
async fn take_back(state: &Shared, ids: &[VmId]) {
    for id in ids {
        if let Err(error) = state.host.provide(*id, Provisions::default()).await {
            tracing::warn!(%error, "what was provided for a VM that is not made stays for now");
        }
    }
}

/// Records VMs: all of them, or none. Asking again with the same ids changes nothing.
///
/// # Errors
/// `Conflict` where some of the ids are there and others are not; that of the first that cannot be recorded.
pub(crate) async fn record(state: &Shared, rows: Vec<VmRow>) -> Result<Vec<VmRow>> {
    let there = there(state, &rows).await?;
    if !there.is_empty() {
        return Ok(there);
    }
    let mut made = Vec::new();
    for row in rows {
        match state.create_vm(row).await {
            Ok(row) => made.push(row),
            Err(error) => {
                let ids: Vec<VmId> = made.iter().map(|row| row.id).collect();
                remove(state, &ids).await?;
                return Err(error);
            }
        }
    }
    Ok(made)
}

/// The rows that an earlier request has made: all of them, or none.
async fn there(state: &Shared, rows: &[VmRow]) -> Result<Vec<VmRow>> {
    let known = state.meta.vms().await?;
    let made = |row: &VmRow| known.iter().find(|known| known.id == row.id).cloned();
    let there: Vec<VmRow> = rows.iter().filter_map(made).collect();
    let same = there.iter().zip(rows).all(|(known, row)| known.name == row.name && known.source == row.source);
    if there.is_empty() || (there.len() == rows.len() && same) {
        return Ok(there);
    }
    let names: Vec<&str> = there.iter().map(|row| row.name.as_str()).collect();
    Err(Error::conflict(format!("ids of this request belong to VMs that are there: {}", names.join(" "))))
}

async fn remove(state: &Shared, ids: &[VmId]) -> Result<()> {
    for id in ids {
        state.intend(*id, Intent::Removed, None).await?;
    }
    Ok(())
}

/// Forks a running VM. Asking again with the same ids makes no others.
///
/// # Errors
/// Those of the rows, and the host's; with `all_or_nothing` that of any child. Then there are no children.
pub(crate) async fn fork(state: &Shared, source: VmRow, request: ForkVm) -> Result<Forked> {
    let ForkVm { ids, names, all_or_nothing, keep, provisions } = request;
    provisions.check()?;
    let image = state.host.image_of(source.id).await?;
    let rows = rows(&source, None, &image, (Begin::Fork, keep), &ids, &names)?;
    let there = there(state, &rows).await?;
    if !there.is_empty() {
        let children = there.into_iter().map(|row| Child { id: row.id, name: row.name, error: None }).collect();
        return Ok(Forked { children, ..Forked::default() });
    }
    state.forking.send_modify(|forking| forking.extend(&ids));
    let forked = async {
        let rows = provided(state, rows, &provisions).await?;
        let made = at_one_instant(state, source.id, &rows, all_or_nothing).await;
        let (gone, stay): (Vec<VmId>, Vec<VmId>) = ids.iter().partition(|id| match &made {
            Ok(forked) => forked.children.iter().any(|child| child.id == **id && child.error.is_some()),
            Err(_) => true,
        });
        remove(state, &gone).await?;
        if !provisions.is_empty() {
            take_back(state, &gone).await;
        }
        for id in stay {
            state.meta.set_observed(id, Observed::Running, true).await?;
        }
        made
    }
    .await;
    state.forking.send_modify(|forking| forking.retain(|id| !ids.contains(id)));
    state.kick.notify_one();
    forked
}

async fn at_one_instant(state: &Shared, source: VmId, rows: &[VmRow], all_or_nothing: bool) -> Result<Forked> {
    let mut launches = Vec::new();
    for row in rows {
        launches.push(state.launch_at(row, Begin::Fork).await?);
    }
    let forked = state.host.fork(source, launches, all_or_nothing).await?;
    let failed = forked.children.iter().find_map(|child| Some((child, child.error.clone()?)));
    match failed {
        Some((child, error)) if all_or_nothing => Err(error.context(format!("fork {}", child.name))),
        _ => Ok(forked),
    }
}

/// Lets a parked VM go on. Any other stays as it is.
///
/// # Errors
/// Why it does not.
pub(crate) async fn wake(state: &Shared, row: VmRow) -> Result<()> {
    let id = row.id;
    if !matches!(state.view(row.clone()).observed, Observed::Parked { .. }) {
        return Ok(());
    }
    match state.meta.start_again(row, None).await {
        // Somebody else has begun to.
        Err(error) if error.kind == ErrorKind::Conflict => {}
        outcome => drop(outcome?),
    }
    state.kick.notify_one();
    let awake = async {
        loop {
            let looks = state.seen.borrow().looks;
            let view = state.view(state.meta.vm(&id.to_string()).await?);
            match view.observed {
                Observed::Running => return Ok(()),
                observed if is_over(&observed) => {
                    return Err(Error::unavailable(format!("VM {} does not go on: {}", view.name, observed.detail())));
                }
                _ => state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?,
            }
        }
    };
    timeout(UP, awake).await.map_err(|_| Error::deadline("the parked VM does not go on"))?
}
