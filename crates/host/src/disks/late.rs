//! Disks of VMs that are captured and of those that go on from them, which QEMU has before they are made.
//!
//! A QEMU that waits for a captured state has its disks open; which disk it is, is known when the state is. Until then
//! it only looks at what the disk is going to be made of, and writes nothing.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use burgeon_api::{Result, VmId, disk::ROOT, host::Launch};
use burgeon_qemu::nbd::Export;
use burgeon_store::{ChunkId, catalog::NewRoot, disk::Disk};

use super::{Attached, Disks, Key, MEMORY, Served, attached, lock, new_root, root};

pub(crate) struct Late {
    before: Arc<Disk>,
    disk: OnceLock<Arc<Disk>>,
    /// It was to be written before it was made.
    spoiled: AtomicBool,
}

impl Late {
    /// `before`: the disk that it is going to be a clone of.
    pub(crate) fn new(before: Arc<Disk>) -> Late {
        Late { before, disk: OnceLock::new(), spoiled: AtomicBool::new(false) }
    }

    /// From now on it is this one. The first that is told counts.
    pub(crate) fn bind(&self, disk: Arc<Disk>) {
        let _the_first_stays = self.disk.set(disk);
    }

    fn now(&self) -> &Disk {
        self.disk.get().unwrap_or(&self.before)
    }

    fn bound(&self) -> io::Result<&Disk> {
        let unbound = || {
            self.spoiled.store(true, Ordering::Release);
            io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is not made yet")
        };
        self.disk.get().map(|disk| &**disk).ok_or_else(unbound)
    }
}

impl Export for Late {
    fn size(&self) -> u64 {
        self.now().size()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn is_near(&self, offset: u64, length: u64) -> bool {
        self.now().is_near(offset, length)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.now().read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.bound()?.write(offset, bytes)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.bound()?.zero(offset, length)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.bound()?.trim(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        // A QEMU that waits flushes too; there is nothing of its own yet.
        self.disk.get().map_or(Ok(()), |disk| disk.flush())
    }

    fn hole(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        Export::hole(self.now(), offset, end)
    }
}

/// What a QEMU that waits for a state must know of the disks that it has open: where they are plugged in, and how large
/// they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) attached: Vec<Attached>,
    sizes: Vec<u64>,
}

impl Disks {
    /// Of the disks that VMs get which go on from `source`.
    pub(crate) fn shape(&self, launch: &Launch, source: VmId) -> Result<Shape> {
        let names = self.in_use(launch, source)?;
        let sizes = names.into_iter().map(|name| Ok(self.disk(&(source, name))?.size())).collect::<Result<_>>()?;
        Ok(Shape { attached: self.attached(source)?, sizes })
    }

    /// Seals the disks that a VM has plugged in, so that all of what they hold now lies below what is written later.
    pub(crate) fn seal_all(&self, id: VmId) -> Result<()> {
        let names = self.names(id);
        names.into_iter().try_for_each(|name| self.disk(&(id, name))?.seal().map(drop))
    }

    /// The root that keeps a captured VM's memory. No disk can have its name.
    pub(crate) fn memory_root(id: VmId, map: ChunkId) -> NewRoot {
        new_root(&(id, MEMORY.to_string()), map)
    }

    /// Lets go of a VM's kept memory.
    pub(crate) fn forget_memory(&self, id: VmId) -> Result<()> {
        self.remove_roots(&format!("{id}/{MEMORY}/"))
    }

    /// Serves the disks of a VM that goes on from a captured state of `source`, before they are made.
    pub(crate) fn serve_late(&self, launch: &Launch, source: VmId, owner: Option<u32>) -> Result<()> {
        for name in self.in_use(launch, source)? {
            let late = Arc::new(Late::new(self.disk(&(source, name.clone()))?));
            let key = (launch.id, name);
            let server = self.server(&key, late.clone(), owner)?;
            lock(&self.served).insert(key, Served { _disk: None, late: Some(late), server });
        }
        Ok(())
    }

    /// Names of the disks that a VM of this image has plugged in.
    pub(super) fn in_use(&self, launch: &Launch, source: VmId) -> Result<Vec<String>> {
        let beside = self.attached(source)?.into_iter().map(|attached| attached.disk);
        Ok(root(launch)?.map(|_| ROOT.to_string()).into_iter().chain(beside).collect())
    }

    /// Makes the disks of a VM clones of those that `source` has plugged in.
    pub(crate) fn clone_all(&self, launch: &Launch, source: VmId) -> Result<()> {
        let attached = self.attached(source)?;
        for name in self.in_use(launch, source)? {
            let key = (launch.id, name);
            let from = self.disk(&(source, key.1.clone()))?;
            let directory = self.make_directory(&key)?;
            let mut keep = |map| self.keep(&key, map);
            let disk = from.clone_to(&directory, None, &mut keep, &self.open_base())?;
            if disk.record().unstored().is_some() {
                self.store_soon(&key);
            }
        }
        if attached.is_empty() { Ok(()) } else { attached::store(&self.of_vm(launch.id), attached) }
    }

    /// Hands what is served for one that waited to the VM that has claimed it. Its sockets are in the VM's directory by
    /// now, and its disks are made next.
    pub(crate) fn hand_to(&self, standby: VmId, id: VmId) {
        let mut served = lock(&self.served);
        let of_standby: Vec<(Key, Served)> = served.extract_if(|key, _| key.0 == standby).collect();
        served.extend(of_standby.into_iter().map(|((_, name), entry)| ((id, name), entry)));
    }

    /// Whether a guest has tried to write a disk that was not made yet. What it believes of that disk is wrong then.
    pub(crate) fn is_spoiled(&self, id: VmId) -> bool {
        let spoiled = |late: &Arc<Late>| late.spoiled.load(Ordering::Acquire);
        lock(&self.served).iter().any(|(key, served)| key.0 == id && served.late.as_ref().is_some_and(spoiled))
    }

    /// Puts a VM's disks, which are made now, in the place of what is served for them.
    pub(crate) fn bind_all(&self, id: VmId) -> Result<()> {
        let late: Vec<(Key, Arc<Late>)> = lock(&self.served)
            .iter()
            .filter(|(key, _)| key.0 == id)
            .filter_map(|(key, served)| Some((key.clone(), served.late.clone()?)))
            .collect();
        for (key, late) in late {
            late.bind(self.disk(&key)?);
        }
        Ok(())
    }
}
