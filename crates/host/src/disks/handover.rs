//! A disk on its way to become an image's: what it holds is sealed under a name that no user can give, stored by the code
//! that stores all layers, and kept by a root of its own until whoever asked has set another.

use std::sync::Arc;

use burgeon_api::{Error, Result, host::StoredDisk};
use burgeon_store::{
    chunk_store::Watch,
    disk::{Disk, Record, lengthen},
    hold::{Hold, Purpose},
    map::Map,
    steps::{Step, reached},
};

use super::{Disks, Key, store_source};

/// Names of what is sealed for a handover begin so.
const SEALED: &str = ".handover-";

/// What a disk held at an instant, until this is dropped.
pub(crate) struct Sealed {
    disks: Arc<Disks>,
    key: Key,
    /// Held open, so that nobody takes it for the disk of an earlier process.
    disk: Arc<Disk>,
    snapshot: String,
    /// Made for this, and not by a user.
    is_own: bool,
}

impl Sealed {
    /// Takes what the disk holds now, or what a snapshot of it holds. `root` is a name that nobody else uses.
    ///
    /// # Errors
    /// `NotFound` without that disk or snapshot; as [`Disk::snapshot`].
    pub(crate) fn take(disks: &Arc<Disks>, key: &Key, snapshot: Option<String>, root: &str) -> Result<Sealed> {
        burgeon_api::name::check("root", root)?;
        let disk = disks.disk(key)?;
        let is_own = snapshot.is_none();
        let snapshot = match snapshot {
            Some(name) => disk.record().snapshot(&name).map(|_| name)?,
            None => {
                let name = format!("{SEALED}{root}");
                disk.snapshot(&name, (store_source().now_us)() / 1_000_000)?;
                reached(Step::DiskSealed);
                name
            }
        };
        Ok(Sealed { disks: disks.clone(), key: key.clone(), disk, snapshot, is_own })
    }

    /// Has it stored, and sets the root.
    ///
    /// # Errors
    /// Those of the store and of `watch`; `NotFound` where the disk or the snapshot has gone meanwhile. Then nothing is kept.
    pub(crate) fn hand_over(&self, root: &str, watch: &mut Watch<'_>) -> Result<StoredDisk> {
        let is_stored = |record: &Record| {
            // One that has gone is told below.
            record.snapshot(&self.snapshot).map_or(true, |snapshot| snapshot.stack.layers.is_empty())
        };
        self.disks.store_layers_until(&self.key, &is_stored, watch)?;
        let record = self.disk.record();
        let snapshot = record.snapshot(&self.snapshot)?;
        let empty = || Error::refused(format!("nothing was ever written to disk {}", self.key.1));
        let base = snapshot.stack.base.filter(|_| snapshot.stack.layers.is_empty()).ok_or_else(empty)?;
        let store = self.disks.store()?;
        let new_root = |map| Hold::root(store, Purpose::HandedOver, root.to_string(), map);
        // A disk that has grown, and was not written to since, is longer than its map.
        let map = if Map::open(&**store, base)?.length() < snapshot.size {
            lengthen(store, base, snapshot.size, new_root)?.root()
        } else {
            store.catalog().blocking_share_root(new_root(base), (store_source().now_us)())?;
            base
        };
        reached(Step::HandedOver);
        Ok(StoredDisk { map: map.to_string(), size: snapshot.size })
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        if self.is_own && self.disk.directory().is_dir() {
            let ended = self.disk.remove_snapshot(&self.snapshot);
            if let Err(error) = ended.and_then(|()| self.disks.let_go(&self.key, &self.disk)) {
                tracing::warn!(vm = %self.key.0, %error, "what was sealed for an image is kept for now");
            }
        }
        // Where this broke off, the rest can wait.
        self.disks.store_soon(&self.key);
    }
}

/// Nobody waits any more for what an earlier process had sealed. For a disk that was just opened, and is nobody else's yet.
/// Answers whether there was anything.
///
/// # Errors
/// As [`Disk::remove_snapshot`].
pub(super) fn end_all(disk: &Disk) -> Result<bool> {
    let record = disk.record();
    let mut left = record.snapshots.iter().filter(|snapshot| snapshot.name.starts_with(SEALED)).peekable();
    let any = left.peek().is_some();
    left.try_for_each(|snapshot| disk.remove_snapshot(&snapshot.name))?;
    Ok(any)
}
