//! What is asked of a disk and needs nothing of QEMU.

use std::fs;

use burgeon_api::{
    ByteSize, Error, Result, VmId,
    disk::{DiskChanges, DiskView, ROOT, SnapshotView, Stretch},
};
use burgeon_store::{
    ChunkId,
    disk::{Disk, Record},
};

use super::{Attached, Disks, Key, REMOVED, attached, lock, store_source};

/// How a disk is to begin.
#[derive(Clone, Copy)]
pub(crate) enum Begin {
    /// It is there: it was detached before.
    There,
    Empty {
        size: u64,
    },
    /// With the contents of a map; a longer one ends in zeros.
    Of {
        map: ChunkId,
        size: Option<u64>,
    },
}

fn views(record: &Record) -> Vec<SnapshotView> {
    let view = |snapshot: &burgeon_store::disk::Snapshot| SnapshotView {
        name: snapshot.name.clone(),
        taken_s: snapshot.taken_s,
        size: ByteSize(snapshot.size),
        stored: snapshot.stack.layers.is_empty(),
        map: snapshot.stack.base.filter(|_| snapshot.stack.layers.is_empty()).map(|map| map.to_string()),
    };
    record.named().map(view).collect()
}

impl Disks {
    /// All disks of a VM.
    ///
    /// # Errors
    /// Where one cannot be read.
    pub(crate) fn list(&self, id: VmId) -> Result<Vec<DiskView>> {
        let attached = self.attached(id)?;
        let view = |name: String| {
            let key = (id, name);
            let disk = self.disk(&key)?;
            let record = disk.record();
            let base = record.below.base;
            let fetched = base.and_then(|map| lock(&self.bases).get(&map)?.upgrade()).map(|base| base.fetched_bytes());
            Ok(DiskView {
                attached: key.1 == ROOT || attached.iter().any(|attached| attached.disk == key.1),
                name: key.1,
                size: ByteSize(disk.size()),
                own: ByteSize(disk.layer_bytes()),
                unstored_layers: record.unstored_layers(),
                map: base.map(|map| map.to_string()),
                fetched: fetched.map(ByteSize),
                snapshots: views(&record),
            })
        };
        self.names(id).into_iter().map(view).collect()
    }

    /// Names what a disk holds now.
    ///
    /// # Errors
    /// As [`Disk::snapshot`].
    pub(crate) fn snapshot(&self, key: &Key, name: &str) -> Result<()> {
        burgeon_api::name::check("snapshot", name)?;
        self.disk(key)?.snapshot(name, (store_source().now_us)() / 1_000_000)?;
        self.store_soon(key);
        Ok(())
    }

    /// # Errors
    /// As [`Disk::remove_snapshot`].
    pub(crate) fn remove_snapshot(&self, key: &Key, name: &str) -> Result<()> {
        burgeon_api::name::check("snapshot", name)?;
        let disk = self.disk(key)?;
        disk.remove_snapshot(name)?;
        self.let_go(key, &disk)
    }

    /// For a disk that is not served.
    ///
    /// # Errors
    /// `Conflict` for one that is; as [`Disk::roll_back`].
    pub(crate) fn roll_back(&self, key: &Key, name: &str) -> Result<()> {
        if lock(&self.served).contains_key(key) {
            return Err(Error::conflict(format!("disk {} is in use", key.1)));
        }
        let disk = self.disk(key)?;
        disk.roll_back(name, &self.open_base())?;
        self.let_go(key, &disk)
    }

    /// # Errors
    /// As [`Disk::changes`].
    pub(crate) fn changes(&self, key: &Key, from: &str, to: Option<&str>) -> Result<DiskChanges> {
        let disk = self.disk(key)?;
        let record = disk.record();
        let to = to.map(|name| record.snapshot(name)).transpose()?;
        let ranges = disk.changes(self.store()?, record.snapshot(from)?, to)?;
        let stretches: Vec<Stretch> =
            ranges.into_iter().map(|range| Stretch { offset: range.start, length: range.end - range.start }).collect();
        Ok(DiskChanges { bytes: ByteSize(stretches.iter().map(|stretch| stretch.length).sum()), stretches })
    }

    /// Makes a disk ready to be plugged in, and says whether it is new.
    ///
    /// # Errors
    /// `Conflict` where a new one's name is taken, or the disk is plugged in already.
    pub(crate) fn begin_attach(&self, key: &Key, begin: Begin) -> Result<(Attached, bool)> {
        burgeon_api::disk::check_name(&key.1)?;
        let attached = self.attached(key.0)?;
        if key.1 == ROOT || attached.iter().any(|attached| attached.disk == key.1) {
            return Err(Error::conflict(format!("the VM has a disk {} already, and it is plugged in", key.1)));
        }
        let port = attached::free_port(&attached)?;
        let is_there = self.directory(key).is_dir();
        let is_new = match begin {
            Begin::There if is_there => {
                self.disk(key)?;
                false
            }
            Begin::There => {
                return Err(self
                    .no_disk(key)
                    .with_hint("make one with --size SIZE, or of an image's disk with --image IMAGE"));
            }
            _ if is_there => {
                return Err(Error::conflict(format!("the VM has a detached disk {}", key.1)).with_hint(format!(
                    "plug it in without --size and --image, or remove it: burgeon vm disk rm VM {}",
                    key.1
                )));
            }
            Begin::Empty { size } => {
                self.create_above(key, size, None)?;
                true
            }
            Begin::Of { map, size } => {
                let length = burgeon_store::map::Map::open(&**self.store()?, map)?.length();
                if let Some(size) = size.filter(|size| *size < length) {
                    return Err(Error::invalid(format!("{size} bytes are less than the {length} of the image's disk")));
                }
                self.create_above(key, size.unwrap_or(length), Some(map))?;
                true
            }
        };
        Ok((Attached { disk: key.1.clone(), port }, is_new))
    }

    /// Writes down that a disk is plugged in, or is not any more.
    ///
    /// # Errors
    /// Where that cannot be written.
    pub(crate) fn set_attached(&self, id: VmId, disk: &str, attached: Option<Attached>) -> Result<()> {
        let mut all = self.attached(id)?;
        all.retain(|one| one.disk != disk);
        all.extend(attached);
        attached::store(&self.of_vm(id), all)
    }

    /// Removes a detached disk, with all that it holds.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` for one that is plugged in.
    pub(crate) fn remove(&self, key: &Key) -> Result<()> {
        if key.1 == ROOT {
            return Err(Error::invalid("the root disk goes with its VM").with_hint("burgeon vm rm VM removes both"));
        }
        if !self.names(key.0).contains(&key.1) {
            return Err(self.no_disk(key));
        }
        if self.attached(key.0)?.iter().any(|attached| attached.disk == key.1) {
            return Err(Error::conflict(format!("disk {} is plugged in", key.1))
                .with_hint(format!("detach it first: burgeon vm disk detach VM {}", key.1)));
        }
        // One that does not open may go.
        if let Ok(disk) = self.disk(key)
            && let Some(snapshot) = super::snapshots::of_vm(&disk.record()).next()
        {
            return Err(Error::conflict(format!("disk {} is in snapshot {snapshot} of its VM", key.1))
                .with_hint(format!("remove that first: burgeon vm snapshots VM --rm {snapshot}")));
        }
        let directory = self.directory(key);
        // In one step, so that no half of it is ever found.
        let gone = self.of_vm(key.0).join(format!("{REMOVED}{}", key.1));
        let failed = |error: std::io::Error| Error::io("remove a disk", &error);
        fs::rename(&directory, &gone).map_err(failed)?;
        fs::remove_dir_all(&gone).map_err(failed)?;
        lock(&self.open).remove(key);
        self.remove_roots(&format!("{}/{}/", key.0, key.1))
    }

    /// Makes a disk longer; who reads it must connect anew to know.
    ///
    /// # Errors
    /// As [`Disk::grow`].
    pub(crate) fn grow(&self, key: &Key, size: u64) -> Result<()> {
        Disk::grow(&*self.disk(key)?, size)?;
        self.store_soon(key);
        Ok(())
    }
}
