//! Sealed layers on their way into the store: one thread of this host process takes one layer after the other, and
//! gives way to everything else. Whatever it does may be broken off anywhere and done again.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use burgeon_api::{Error, Result};
use burgeon_store::{
    ChunkId,
    chunk_store::{Watch, read_cache},
    disk::{Disk, Record, absorb},
    steps::{Step, reached},
};

use super::{Disks, Key, ROOT_KIND, new_root, root_name};

/// A layer that could not be stored is tried again after this.
const AGAIN: Duration = Duration::from_secs(60);

/// Starts the thread; it ends with the table of disks.
pub(super) fn start(disks: &Arc<Disks>, keys: mpsc::Receiver<Key>) -> Result<()> {
    let disks = Arc::downgrade(disks);
    let run = move || {
        let _it_only_takes_more_than_its_share = rustix::process::nice(10);
        let mut waiting: BTreeSet<Key> = BTreeSet::new();
        loop {
            match keys.recv_timeout(AGAIN) {
                Ok(key) => {
                    waiting.insert(key);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
            waiting.extend(keys.try_iter());
            for key in std::mem::take(&mut waiting) {
                let Some(disks) = disks.upgrade() else { return };
                if let Err(error) = disks.store_layers(&key)
                    && disks.directory(&key).is_dir()
                {
                    tracing::warn!(vm = %key.0, disk = key.1, %error, "a layer is not stored yet");
                    waiting.insert(key);
                }
            }
        }
    };
    let thread = thread::Builder::new().name("store layers".into()).spawn(run);
    thread.map(drop).map_err(|error| Error::io("start a thread", &error))
}

impl Disks {
    /// Has the disk's sealed layers stored, some time.
    pub(super) fn store_soon(&self, key: &Key) {
        // Without the thread the process is ending; the next one finds the layers.
        let _ending = self.to_store.send(key.clone());
    }

    /// Stores all sealed layers of a disk, now.
    ///
    /// # Errors
    /// Those of the store; `NotFound` where the disk is gone.
    fn store_layers(&self, key: &Key) -> Result<()> {
        self.store_layers_until(key, &|_| false, &mut |_, _, _| Ok(()))
    }

    /// Stores sealed layers of a disk until there is none, or `enough` says so of its record.
    ///
    /// # Errors
    /// As [`Self::store_layers`]; those of `watch`.
    pub(super) fn store_layers_until(
        &self,
        key: &Key,
        enough: &dyn Fn(&Record) -> bool,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let _one_at_a_time = super::lock(&self.storing);
        let disk = self.disk(key)?;
        loop {
            let record = disk.record();
            let Some((base, layer)) = record.unstored().filter(|_| !enough(&record)) else { return Ok(()) };
            let stored = self.store_layer(key, &disk, base, layer, watch);
            // What it names stands in the record by now, or never will.
            super::lock(&self.arriving).clear();
            stored?;
            self.let_go(key, &disk)?;
        }
    }

    fn store_layer(
        &self,
        key: &Key,
        disk: &Disk,
        base: Option<ChunkId>,
        layer: &str,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let gone = || Error::not_found("the disk is gone");
        let mut watch = |phase: &'static str, done, total| {
            if disk.directory().is_dir() { watch(phase, done, total) } else { Err(gone()) }
        };
        let root = |map| {
            super::lock(&self.arriving).insert(map);
            new_root(key, map)
        };
        // The disk's own root keeps the base all the while; where it goes, no stack begins with the base any more, and the
        // new map is for nobody.
        let (map, written) = absorb(self.store()?, base, &disk.directory().join(layer), root, &mut watch)?;
        let map = map.root();
        if !disk.directory().is_dir() {
            // Removed meanwhile; whoever did that may not have seen this root.
            self.store()?.catalog().blocking_remove_root(ROOT_KIND, &root_name(key, map), None)?;
            return Err(gone());
        }
        let (bytes, new_bytes) = (written.bytes, written.new_bytes);
        tracing::info!(vm = %key.0, disk = key.1, layer, bytes, new_bytes, "a layer is stored");
        let cache = self.cache(map);
        disk.stored(base, layer, map, &mut |layer| become_cache(layer, &cache), &self.open_base())?;
        reached(Step::LayerStored);
        Ok(())
    }
}

/// A layer has the form of a cache, and holds what the cache of the new map would first be asked for. One that is shared
/// with another disk stays as it is.
fn become_cache(layer: &Path, cache: &Path) {
    use std::os::unix::fs::MetadataExt;
    let is_shared =
        |extension: &str| fs::metadata(layer.with_extension(extension)).map_or(true, |file| file.nlink() > 1);
    if is_shared("data") || is_shared("map") || cache.with_extension("map").exists() {
        return;
    }
    let Some(directory) = cache.parent() else { return };
    let Ok(_held) = read_cache::hold(directory) else { return };
    // The data first: a map without its data would claim what is not there.
    let moved = fs::rename(layer.with_extension("data"), cache.with_extension("data"))
        .and_then(|()| fs::rename(layer.with_extension("map"), cache.with_extension("map")));
    if let Err(error) = moved {
        tracing::warn!(%error, "a stored layer is read from the store again");
    }
}
