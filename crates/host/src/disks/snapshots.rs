//! What a VM's snapshots need of its disks: each disk has what it held under a name that no user can give. A snapshot that
//! is not in its place needs nothing.

use std::{collections::HashSet, path::Path, sync::Arc};

use burgeon_api::{Result, VmId, host::Launch};
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    disk::{Disk, Record},
};

use super::{Attached, Disks, Key, attached, new_root, root_name, store_source};
use crate::snapshots::{self, Snapshot};

/// Names of what disks hold for snapshots of their VM begin so.
const OF_VM: &str = ".vm-";
/// In names of roots, where disks have theirs; behind it the snapshot's name.
const MEMORY: &str = ".snapshot-";

fn sealed_name(snapshot: &str) -> String {
    format!("{OF_VM}{snapshot}")
}

fn memory_key(id: VmId, snapshot: &str) -> Key {
    (id, format!("{MEMORY}{snapshot}"))
}

/// Of a disk's record: the VM's snapshots that it belongs to.
pub(super) fn of_vm(record: &Record) -> impl Iterator<Item = &str> {
    record.snapshots.iter().filter_map(|snapshot| snapshot.name.strip_prefix(OF_VM))
}

/// Lets go of what no snapshot of the VM needs: one was not made, or has been removed. For a disk that was just opened, and
/// is nobody else's yet. Answers whether there was anything.
///
/// # Errors
/// Those of the record.
pub(super) fn end_unneeded(vm: &Path, disk: &Disk) -> Result<bool> {
    let record = disk.record();
    if of_vm(&record).next().is_none() {
        return Ok(false);
    }
    let needed: HashSet<String> = snapshots::names(vm)?.into_iter().collect();
    let mut unneeded = of_vm(&record).filter(|name| !needed.contains(*name)).peekable();
    let any = unneeded.peek().is_some();
    unneeded.try_for_each(|name| disk.remove_snapshot(&sealed_name(name)))?;
    Ok(any)
}

/// The roots that keep the memories of a VM's snapshots, by name.
///
/// # Errors
/// Where one of them does not read.
pub(super) fn memory_roots(vm: &Path, id: VmId) -> Result<Vec<(String, ChunkId)>> {
    let root = |snapshot: Snapshot| {
        let map = snapshot.about.docked.map.parse()?;
        Ok((root_name(&memory_key(id, &snapshot.about.name), map), map))
    };
    snapshots::list(vm)?.into_iter().map(root).collect()
}

impl Disks {
    /// The disks that a VM has plugged in, held open so that nobody takes what is sealed now for what an earlier process has
    /// left.
    pub(crate) fn hold_all(&self, launch: &Launch) -> Result<Vec<(Key, Arc<Disk>)>> {
        let open = |name| {
            let key = (launch.id, name);
            self.disk(&key).map(|disk| (key, disk))
        };
        self.in_use(launch, launch.id)?.into_iter().map(open).collect()
    }

    /// Has the disks keep what they hold now for a snapshot of their VM.
    pub(crate) fn seal_for(&self, held: &[(Key, Arc<Disk>)], snapshot: &str) -> Result<()> {
        let now_s = (store_source().now_us)() / 1_000_000;
        held.iter().try_for_each(|(key, disk)| {
            disk.snapshot(&sealed_name(snapshot), now_s)?;
            self.store_soon(key);
            Ok(())
        })
    }

    /// The root that keeps the memory of a snapshot.
    pub(crate) fn snapshot_root(id: VmId, snapshot: &str, map: ChunkId) -> NewRoot {
        new_root(&memory_key(id, snapshot), map)
    }

    /// Keeps a memory for a snapshot too. Another root must keep it now.
    pub(crate) fn share_memory(&self, id: VmId, snapshot: &str, map: ChunkId) -> Result<()> {
        self.keep(&memory_key(id, snapshot), map)
    }

    /// Lets go of what disks and store have of a snapshot that is not in its place any more.
    pub(crate) fn let_snapshot_go(&self, id: VmId, snapshot: &str) -> Result<()> {
        for name in self.names(id) {
            let key = (id, name);
            let disk = self.disk(&key)?;
            let sealed = sealed_name(snapshot);
            if disk.record().snapshot(&sealed).is_ok() {
                disk.remove_snapshot(&sealed)?;
            }
            self.let_go(&key, &disk)?;
        }
        self.remove_roots(&format!("{id}/{MEMORY}{snapshot}/"))
    }

    /// Makes a VM's disks what they were at a snapshot of it: those that were plugged in then hold what they held, and are
    /// plugged in. For disks that nobody reads. Doing it again changes nothing.
    pub(crate) fn return_to(&self, id: VmId, snapshot: &Snapshot) -> Result<()> {
        for disk in &snapshot.about.disks {
            self.roll_back(&(id, disk.clone()), &sealed_name(&snapshot.about.name))?;
        }
        self.plug_in_as(id, snapshot.attached.clone())
    }

    /// Makes the disks of a VM clones of what another one's held at a snapshot.
    pub(crate) fn clone_snapshot(&self, launch: &Launch, source: VmId, snapshot: &Snapshot) -> Result<()> {
        for name in &snapshot.about.disks {
            let key = (launch.id, name.clone());
            let from = self.disk(&(source, name.clone()))?;
            let directory = self.make_directory(&key)?;
            let mut keep = |map| self.keep(&key, map);
            let sealed = sealed_name(&snapshot.about.name);
            let disk = from.clone_to(&directory, Some(&sealed), &mut keep, &self.open_base())?;
            if disk.record().unstored().is_some() {
                self.store_soon(&key);
            }
        }
        self.plug_in_as(launch.id, snapshot.attached.clone())
    }

    fn plug_in_as(&self, id: VmId, attached: Vec<Attached>) -> Result<()> {
        if attached == self.attached(id)? { Ok(()) } else { attached::store(&self.of_vm(id), attached) }
    }
}
