//! Work on the whole store: statistics, collection, checks. One piece of long work at a time.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use burgeon_api::{
    Error, ErrorKind, Result,
    http::{Progress, ScrubStore},
    store::StoreView,
};
use burgeon_store::{
    chunk_store::{self, GRACE_US, Watch},
    pack::{ENTRY_BYTES, RECORD_HEADER_BYTES},
};
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    disks, images,
    state::{Shared, blocking},
};

/// How often a client is told of progress.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// How long work that is held to a rate sleeps before it looks whether it is cancelled.
const NAP: Duration = Duration::from_millis(200);

pub(crate) async fn view(state: &Shared) -> Result<StoreView> {
    let statistics = state.store.catalog().statistics().await?;
    let mut roots = BTreeMap::new();
    for root in state.store.catalog().roots(None).await? {
        *roots.entry(root.kind).or_insert(0) += 1;
    }
    let cache = state.layout.store().join("cache");
    let cache_bytes = blocking("look at the store's cache", move || taken(&cache)).await?;
    let used = statistics.stored_bytes + statistics.chunks * (RECORD_HEADER_BYTES + ENTRY_BYTES) as u64;
    Ok(StoreView {
        packs: statistics.packs,
        packs_dropping: statistics.packs_dropping,
        pack_bytes: statistics.pack_bytes,
        chunks: statistics.chunks,
        plain_bytes: statistics.plain_bytes,
        stored_bytes: statistics.stored_bytes,
        live_permille: permille(used, statistics.pack_bytes),
        roots,
        cache_bytes,
    })
}

/// An empty store has nothing to free.
fn permille(used: u64, all: u64) -> u64 {
    (used.saturating_mul(1000).checked_div(all)).map_or(1000, |share| share.min(1000))
}

/// Bytes that the files of a directory take on the disk.
fn taken(directory: &Path) -> Result<u64> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(format!("read {}", directory.display()), &error)),
    };
    // Files that go meanwhile take nothing.
    Ok(entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|about| about.blocks() * 512).sum())
}

pub(crate) fn collect(state: &Shared) -> Result<mpsc::Receiver<Progress>> {
    long_work(state, false, |state, watch| {
        let roots_let_go = Handle::current().block_on(disks::let_go(&state.store, &state.data_paths()))?;
        let mut collected = chunk_store::collect(&state.store, GRACE_US, watch)?;
        collected.roots_let_go = roots_let_go;
        let caches = state.layout.store().join("cache");
        chunk_store::read_cache::drop_caches(&state.store, &caches, GRACE_US, watch, &mut collected)?;
        tracing::info!(?collected, "garbage is collected");
        Ok(Progress::Collected(collected))
    })
}

pub(crate) fn scrub(state: &Shared, request: &ScrubStore) -> Result<mpsc::Receiver<Progress>> {
    let (rate, repair) = (request.rate.map(|rate| rate.0), request.repair);
    if rate == Some(0) {
        return Err(Error::invalid("a rate of no bytes would never end"));
    }
    long_work(state, true, move |state, watch| {
        let begun = Instant::now();
        let mut held = |phase: &'static str, done: u64, total: u64| {
            watch(phase, done, total)?;
            let mut rest = rate.map_or(Duration::ZERO, |rate| ahead(rate, done, begun.elapsed()));
            while !rest.is_zero() {
                let nap = rest.min(NAP);
                thread::sleep(nap);
                rest -= nap;
                watch(phase, done, total)?;
            }
            Ok(())
        };
        checked(chunk_store::scrub(&state.store, repair, &mut held)?)
    })
}

pub(crate) fn fsck(state: &Shared) -> Result<mpsc::Receiver<Progress>> {
    long_work(state, false, |state, watch| checked(chunk_store::fsck(&state.store, watch)?))
}

fn checked(checked: burgeon_api::store::Checked) -> Result<Progress> {
    for problem in &checked.problems {
        tracing::error!(place = problem.place, what = problem.what, "damaged");
    }
    Ok(Progress::Checked(checked))
}

/// How long work that has done so many bytes is ahead of its rate.
fn ahead(rate: u64, done: u64, elapsed: Duration) -> Duration {
    let micros = u128::from(done) * 1_000_000 / u128::from(rate.max(1));
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)).saturating_sub(elapsed)
}

/// `bytes`: whether the numbers of its progress are bytes.
fn long_work(
    state: &Shared,
    bytes: bool,
    work: impl FnOnce(&Shared, &mut Watch<'_>) -> Result<Progress> + Send + 'static,
) -> Result<mpsc::Receiver<Progress>> {
    let permit = state.store_work.clone().try_acquire_owned().map_err(|_| {
        Error::conflict("the store is being collected or checked already").with_hint("wait until that is done")
    })?;
    Ok(images::run(state, move |state, tell, cancelled| {
        let done = work(state, &mut watch(bytes, tell, cancelled));
        drop(permit);
        done
    }))
}

/// Tells a client of progress now and then, and ends the work once it is cancelled.
pub(crate) fn watch<'a>(
    bytes: bool,
    tell: &'a (dyn Fn(Progress) + Sync),
    cancelled: &'a (dyn Fn() -> bool + Sync),
) -> impl FnMut(&'static str, u64, u64) -> Result<()> + 'a {
    let mut last: Option<(&'static str, Instant)> = None;
    move |phase, done, total| {
        if cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
        }
        if last.is_none_or(|(told, when)| told != phase || when.elapsed() >= TELL_EVERY || done == total) {
            last = Some((phase, Instant::now()));
            tell(Progress::Step { phase: phase.into(), done, total, bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_held_to_its_rate() {
        assert_eq!(ahead(1000, 500, Duration::ZERO), Duration::from_millis(500));
        assert_eq!(ahead(1000, 500, Duration::from_millis(499)), Duration::from_millis(1));
        assert_eq!(ahead(1000, 500, Duration::from_secs(9)), Duration::ZERO);
        assert_eq!(ahead(1, u64::MAX, Duration::ZERO), Duration::from_micros(u64::MAX));
        assert_eq!((permille(1, 4), permille(0, 0), permille(9, 8)), (250, 1000, 1000));
    }
}
