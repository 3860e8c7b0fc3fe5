//! The disks of this host's VMs: each a stack of layers above a map in the store, served to its QEMU.
//!
//! What a VM writes lies in `disks/NAME` in its directory; what is read of maps lies plain in the store's cache, shared
//! by all VMs of an image. Roots in the catalog keep the chunks of every map that a disk or a snapshot of it stands on,
//! whatever becomes of the image. Calls block.

mod attached;
mod handover;
mod late;
mod snapshots;
mod storing;
mod verbs;

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, mpsc},
    thread,
};

pub(crate) use attached::Attached;
use burgeon_api::{Error, ErrorKind, Result, VmId, bundle::BundledDisk, disk::ROOT, host::Launch, store::Problem};
use burgeon_qemu::{
    command::{file, socket_name},
    nbd::{Export, Owner, Server},
};
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    chunk_store::{ChunkStore, Source, read_cache},
    disk::{Base, Disk, ImageBase, Nothing, Stack},
    places::Elsewhere,
};
pub(crate) use handover::Sealed;
use late::Late;
pub(crate) use late::Shape;
pub(crate) use verbs::Begin;

use crate::{layout::Layout, prepare};

/// The directory of a VM's disks, beside QEMU's own.
const DISKS: &str = "disks";
/// A disk that is being removed has a name that begins so, which none can have.
const REMOVED: &str = ".removed-";
/// In names of roots, where disks have theirs.
const MEMORY: &str = ".memory";
/// Roots of VMs' disks.
const ROOT_KIND: &str = "disk";
/// Which parts of an image its first start read; beside the cache of the image.
const TRACE: &str = "trace";
const TRACE_FORMAT: u32 = 1;

/// A VM, and the name of one of its disks.
pub(crate) type Key = (VmId, String);

pub(crate) fn root_disk(id: VmId) -> Key {
    (id, ROOT.to_string())
}

/// A root of a disk is named after the VM, the disk and the map: a disk that moves from one map to the next has both for
/// a moment.
fn root_name(key: &Key, map: ChunkId) -> String {
    format!("{}/{}/{map}", key.0, key.1)
}

fn new_root(key: &Key, map: ChunkId) -> NewRoot {
    NewRoot::new(ROOT_KIND, root_name(key, map), map)
}

/// The roots that disks of this data directory's VMs need, by name, and what of them cannot be told. For a catalog that is
/// made anew.
///
/// # Errors
/// Where the directory of VMs cannot be read.
pub fn disk_roots(layout: &Layout, problems: &mut Vec<Problem>) -> Result<Vec<(String, ChunkId)>> {
    let failed = |error: std::io::Error| Error::io(format!("read {}", layout.vms().display()), &error);
    let mut roots = Vec::new();
    for entry in fs::read_dir(layout.vms()).map_err(failed)? {
        let vm = entry.map_err(failed)?.path();
        let record = crate::record::Record::load(&vm);
        let id = record.as_ref().map(|record| record.launch.id).map_err(Error::clone);
        for disk in fs::read_dir(vm.join(DISKS)).into_iter().flatten().flatten().map(|entry| entry.path()) {
            let name = disk.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') || !disk.is_dir() {
                continue;
            }
            match id.clone().and_then(|id| Ok((id, Disk::record_in(&disk)?))) {
                Ok((id, record)) => {
                    let key = (id, name);
                    roots.extend(record.maps().into_iter().map(|map| (root_name(&key, map), map)));
                }
                Err(error) => problems.push(Problem {
                    place: disk.display().to_string(),
                    what: format!("what it stands on cannot be told: {}", error.message),
                }),
            }
        }
        let Ok(record) = record else { continue };
        roots.extend(memory_root(&record));
        match snapshots::memory_roots(&vm, record.launch.id) {
            Ok(of_snapshots) => roots.extend(of_snapshots),
            Err(error) => problems.push(Problem {
                place: vm.display().to_string(),
                what: format!("which memories its snapshots hold cannot be told: {}", error.message),
            }),
        }
    }
    Ok(roots)
}

/// The root that keeps the memory of a substrate, by name.
fn memory_root(record: &crate::record::Record) -> Option<(String, ChunkId)> {
    let map = record.docked.as_ref()?.map.parse().ok()?;
    Some((root_name(&(record.launch.id, MEMORY.to_string()), map), map))
}

struct Served {
    /// It is served, and not open elsewhere: kept so that there is one of it.
    _disk: Option<Arc<Disk>>,
    late: Option<Arc<Late>>,
    server: Server,
}

/// See the module.
pub(crate) struct Disks {
    layout: Layout,
    /// What of the store is not in the data directory.
    elsewhere: Elsewhere,
    /// Opened with the first disk that needs it.
    store: OnceLock<Arc<ChunkStore>>,
    bases: Mutex<HashMap<ChunkId, Weak<ImageBase>>>,
    /// Those in use: one of each.
    open: Mutex<HashMap<Key, Weak<Disk>>>,
    served: Mutex<HashMap<Key, Served>>,
    to_store: mpsc::Sender<Key>,
    /// Held by who stores layers.
    storing: Mutex<()>,
    /// Maps that have a root, or are about to, and that no record names yet.
    arriving: Mutex<HashSet<ChunkId>>,
    begun_us: u64,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Trace {
    format: u32,
    /// Offset and length, in the order of the reads.
    reads: Vec<(u64, u64)>,
}

/// The clock and the random numbers of a store, for all processes that open one.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the shell that reads the clock")]
pub fn store_source() -> Source {
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    };
    Source { now_us: Arc::new(now), uuid: Arc::new(|| *VmId::generate().uuid().as_bytes()) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The tables are whole after each statement, so a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disks {
    pub(crate) fn start(layout: Layout, elsewhere: Elsewhere) -> Result<Arc<Disks>> {
        let (to_store, keys) = mpsc::channel();
        let disks = Arc::new(Disks {
            layout,
            elsewhere,
            store: OnceLock::new(),
            bases: Mutex::default(),
            open: Mutex::default(),
            served: Mutex::default(),
            to_store,
            storing: Mutex::default(),
            arriving: Mutex::default(),
            begun_us: (store_source().now_us)(),
        });
        storing::start(&disks, keys)?;
        Ok(disks)
    }

    pub(crate) fn store(&self) -> Result<&Arc<ChunkStore>> {
        if let Some(store) = self.store.get() {
            return Ok(store);
        }
        let store = ChunkStore::open(self.elsewhere.settled(&self.layout.files())?, store_source())?;
        Ok(self.store.get_or_init(|| store))
    }

    fn of_vm(&self, id: VmId) -> PathBuf {
        self.layout.vm(id).join(DISKS)
    }

    fn directory(&self, key: &Key) -> PathBuf {
        self.of_vm(key.0).join(&key.1)
    }

    /// The disk, opened once for all who use it.
    ///
    /// # Errors
    /// `NotFound` where the VM has none of that name; as [`Disk::open`].
    pub(crate) fn disk(&self, key: &Key) -> Result<Arc<Disk>> {
        // It becomes a path.
        burgeon_api::disk::check_name(&key.1)?;
        let mut open = lock(&self.open);
        if let Some(disk) = open.get(key).and_then(Weak::upgrade) {
            return Ok(disk);
        }
        open.retain(|_, disk| disk.strong_count() > 0);
        let directory = self.directory(key);
        if !directory.is_dir() {
            return Err(self.no_disk(key));
        }
        let disk = Arc::new(
            Disk::open(&directory, &self.open_base()).map_err(|error| error.context(format!("disk {}", key.1)))?,
        );
        // While nobody else has it.
        let had_sealed = handover::end_all(&disk)? | snapshots::end_unneeded(&self.layout.vm(key.0), &disk)?;
        open.insert(key.clone(), Arc::downgrade(&disk));
        drop(open);
        if had_sealed {
            self.let_go(key, &disk)?;
        }
        if disk.record().unstored().is_some() {
            self.store_soon(key);
        }
        Ok(disk)
    }

    fn no_disk(&self, key: &Key) -> Error {
        let names = self.names(key.0).join(", ");
        let there = if names.is_empty() { "it has none".into() } else { format!("it has {names}") };
        Error::not_found(format!("the VM has no disk {}: {there}", burgeon_api::path_text::printable(&key.1)))
    }

    /// A root that keeps a map for a disk. Another root must keep it now.
    fn keep(&self, key: &Key, map: ChunkId) -> Result<()> {
        self.store()?.catalog().blocking_share_root(new_root(key, map), (store_source().now_us)())
    }

    /// Lets go of the maps that a disk has left.
    fn let_go(&self, key: &Key, disk: &Disk) -> Result<()> {
        let prefix = format!("{}/{}/", key.0, key.1);
        let catalog = self.store()?.catalog();
        let roots = catalog.blocking_roots(Some(ROOT_KIND))?;
        // In this order: a map whose root was seen just now is about to be written into the record, or it stands there.
        let arriving = lock(&self.arriving).clone();
        let maps = disk.record().maps();
        for root in roots {
            if root.name.starts_with(&prefix) && !maps.contains(&root.map) && !arriving.contains(&root.map) {
                catalog.blocking_remove_root(ROOT_KIND, &root.name, Some(root.map))?;
            }
        }
        Ok(())
    }

    /// Removes the roots whose names begin so.
    fn remove_roots(&self, prefix: &str) -> Result<()> {
        let catalog = self.store()?.catalog();
        for root in catalog.blocking_roots(Some(ROOT_KIND))? {
            if root.name.starts_with(prefix) {
                catalog.blocking_remove_root(ROOT_KIND, &root.name, None)?;
            }
        }
        Ok(())
    }

    /// Makes a directory for a disk, in place of what an earlier try has left.
    fn make_directory(&self, key: &Key) -> Result<PathBuf> {
        let directory = self.directory(key);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("clear the VM's disk", &error));
            }
            _ => {}
        }
        // Not the VM's own directory: where that is gone, the VM has just been removed.
        for directory in [&self.of_vm(key.0), &directory] {
            match fs::create_dir(directory) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("create the VM's disk", &error));
                }
                _ => {}
            }
        }
        Ok(directory)
    }

    /// Makes a VM's root disk above its image's map, or a clone of another VM's, in place of what an earlier try has left.
    pub(crate) fn create(&self, launch: &Launch) -> Result<()> {
        let key = root_disk(launch.id);
        self.close(&key);
        let Some(root) = root(launch)? else { return Ok(()) };
        let size = prepare::disk_size(launch).bytes();
        match &launch.source {
            None => self.create_above(&key, size, Some(root)).map_err(|error| {
                let error = error.context(format!("use the disk of image {}", launch.image.name));
                match error.kind {
                    ErrorKind::Unavailable | ErrorKind::Deadline => error,
                    _ => error.with_hint("build or import the image again"),
                }
            }),
            Some(source) => {
                let from = self.disk(&root_disk(source.vm))?;
                let directory = self.make_directory(&key)?;
                let mut keep = |map| self.keep(&key, map);
                let disk = from.clone_to(&directory, source.snapshot.as_deref(), &mut keep, &self.open_base())?;
                if disk.size() < size {
                    disk.grow(size)?;
                }
                if disk.record().unstored().is_some() {
                    self.store_soon(&key);
                }
                Ok(())
            }
        }
    }

    /// Makes a disk above a map, or above nothing.
    fn create_above(&self, key: &Key, size: u64, map: Option<ChunkId>) -> Result<()> {
        let directory = self.make_directory(key)?;
        let made = (|| {
            // The image's own root keeps the map now; without it, chunks below the map may be gone though the map is here.
            map.map_or(Ok(()), |map| self.keep(key, map))?;
            let below = Stack { base: map, layers: Vec::new() };
            Disk::create(&directory, size, below, &self.open_base()).map(drop)
        })();
        if made.is_err() {
            let _it_was_empty = fs::remove_dir_all(&directory);
        }
        made
    }

    /// Makes the disks of a VM above maps that somebody keeps, and keeps its memory.
    pub(crate) fn take_in(&self, id: VmId, disks: &[BundledDisk], memory: ChunkId) -> Result<()> {
        let mut attached = Vec::new();
        for disk in disks {
            let map = disk.map.as_deref().map(str::parse).transpose()?;
            self.create_above(&(id, disk.name.clone()), disk.size, map)?;
            attached.extend(disk.port.map(|port| Attached { disk: disk.name.clone(), port }));
        }
        if !attached.is_empty() {
            attached::store(&self.of_vm(id), attached)?;
        }
        self.keep(&(id, MEMORY.to_string()), memory)
    }

    /// Serves a VM's disks that are there, as far as that is not done already.
    pub(crate) fn serve_all(&self, launch: &Launch, owner: Option<u32>) -> Result<()> {
        if root(launch)?.is_some() {
            self.serve(&root_disk(launch.id), owner)?;
        }
        for attached in self.attached(launch.id)? {
            self.serve(&(launch.id, attached.disk), owner)?;
        }
        Ok(())
    }

    /// Serves a disk, unless that is done already.
    pub(crate) fn serve(&self, key: &Key, owner: Option<u32>) -> Result<()> {
        if lock(&self.served).contains_key(key) {
            return Ok(());
        }
        let disk = self.disk(key)?;
        let server = self.server(key, disk.clone(), owner)?;
        lock(&self.served).insert(key.clone(), Served { _disk: Some(disk), late: None, server });
        Ok(())
    }

    fn server(&self, key: &Key, export: Arc<dyn Export>, owner: Option<u32>) -> Result<Server> {
        let vm = self.layout.vm(key.0);
        let name = socket_name(&key.1);
        let made_at = vm.join(&name);
        let owner = owner.map(|user| Owner { user, made_at: &made_at });
        Server::start(&vm.join(file::QEMU_DIRECTORY).join(&name), export, owner)
    }

    /// Stops serving a disk.
    pub(crate) fn close(&self, key: &Key) {
        let served = lock(&self.served).remove(key);
        // Its connections end before this returns, and the table is not held meanwhile.
        drop(served);
    }

    /// Stops serving all disks of a VM.
    pub(crate) fn close_all(&self, id: VmId) {
        let served: Vec<Served> =
            lock(&self.served).extract_if(|key, _| key.0 == id).map(|(_, served)| served).collect();
        drop(served);
    }

    /// Has whoever reads a served disk connect anew, and so learn its size.
    pub(crate) fn reconnect(&self, key: &Key) {
        if let Some(served) = lock(&self.served).get(key) {
            served.server.disconnect();
        }
    }

    /// Lets go of the maps below disks of a VM whose directory is gone.
    pub(crate) fn forget(&self, id: VmId) {
        self.close_all(id);
        lock(&self.open).retain(|key, _| key.0 != id);
        if self.layout.store().is_dir()
            && let Err(error) = self.remove_roots(&format!("{id}/"))
        {
            tracing::warn!(vm = %id, %error, "what is below removed disks is kept until the host process starts again");
        }
    }

    /// After a start of this process: lets go of what disks that are not there any more have kept, and has layers stored
    /// that an earlier process has left.
    pub(crate) fn tidy(&self, vms: &HashSet<VmId>) -> Result<()> {
        if !self.layout.store().is_dir() {
            return Ok(());
        }
        let mut kept: HashSet<String> = HashSet::new();
        let mut unread: HashSet<String> = HashSet::new();
        for id in vms {
            self.finish_removals(*id);
            match crate::record::Record::load(&self.layout.vm(*id)) {
                Ok(record) => kept.extend(memory_root(&record).map(|(name, _)| name)),
                Err(_) => drop(unread.insert(format!("{id}/"))),
            }
            match snapshots::memory_roots(&self.layout.vm(*id), *id) {
                Ok(roots) => kept.extend(roots.into_iter().map(|(name, _)| name)),
                Err(error) => {
                    tracing::error!(vm = %id, %error, "a VM's snapshots do not read");
                    unread.insert(format!("{id}/"));
                }
            }
            for name in self.names(*id) {
                let key = (*id, name);
                match Disk::record_in(&self.directory(&key)) {
                    Ok(record) => {
                        kept.extend(record.maps().into_iter().map(|map| root_name(&key, map)));
                        if record.unstored().is_some() {
                            self.store_soon(&key);
                        }
                    }
                    // What it stands on cannot be told, so all of it stays.
                    Err(error) => {
                        tracing::error!(vm = %id, disk = key.1, %error, "a disk's record does not read");
                        unread.insert(format!("{id}/{}/", key.1));
                    }
                }
            }
        }
        let catalog = self.store()?.catalog();
        for root in catalog.blocking_roots(Some(ROOT_KIND))? {
            let is_kept = kept.contains(&root.name) || unread.iter().any(|prefix| root.name.starts_with(prefix));
            // One that was set since this began belongs to a disk that was not there yet.
            if !is_kept && root.created_us < self.begun_us {
                catalog.blocking_remove_root(ROOT_KIND, &root.name, Some(root.map))?;
            }
        }
        Ok(())
    }

    /// Removes what an earlier process had begun to remove.
    fn finish_removals(&self, id: VmId) {
        for entry in fs::read_dir(self.of_vm(id)).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(REMOVED)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(vm = %id, %error, "a removed disk still takes room");
            }
        }
    }

    /// Names of a VM's disks.
    fn names(&self, id: VmId) -> Vec<String> {
        let entries = fs::read_dir(self.of_vm(id)).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.path().is_dir());
        let names = directories.map(|entry| entry.file_name().to_string_lossy().into_owned());
        // One that is being removed has a name that none can have.
        let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
        // The root first.
        names.sort_unstable_by_key(|name| (name != ROOT, name.clone()));
        names
    }

    /// The disks beside its root that a VM has plugged in.
    pub(crate) fn attached(&self, id: VmId) -> Result<Vec<Attached>> {
        attached::load(&self.of_vm(id))
    }

    /// What opens maps for disks.
    fn open_base(&self) -> impl Fn(Option<ChunkId>, Option<ChunkId>) -> Result<Arc<dyn Base>> {
        |map, origin| {
            let Some(map) = map else { return Ok(Arc::new(Nothing)) };
            let parent = origin.filter(|origin| *origin != map).and_then(|origin| {
                // It may be gone: no disk needs it, it only saves reading.
                self.base(origin, None)
                    .inspect_err(|error| tracing::debug!(%error, "a disk's origin is not shared"))
                    .ok()
            });
            Ok(self.base(map, parent)?)
        }
    }

    fn cache(&self, root: ChunkId) -> PathBuf {
        self.layout.store().join("cache").join(root.to_string())
    }

    /// A map, opened once for all disks above it.
    fn base(&self, root: ChunkId, parent: Option<Arc<ImageBase>>) -> Result<Arc<ImageBase>> {
        let mut bases = lock(&self.bases);
        if let Some(base) = bases.get(&root).and_then(Weak::upgrade) {
            return Ok(base);
        }
        bases.retain(|_, base| base.strong_count() > 0);
        let cache = self.cache(root);
        // A collection may be about to remove what no disk has used for long.
        let held = cache.parent().map(read_cache::hold).transpose()?;
        let base = Arc::new(ImageBase::open(self.store()?.clone(), root, &cache, parent)?);
        drop(held);
        bases.insert(root, Arc::downgrade(&base));
        drop(bases);
        self.fetch_ahead(root, &base);
        Ok(base)
    }

    /// Begins to fetch what the image's first start has read.
    fn fetch_ahead(&self, root: ChunkId, base: &Arc<ImageBase>) {
        let trace = match fs::read(self.cache(root).with_extension(TRACE)) {
            Ok(text) => serde_json::from_slice::<Trace>(&text),
            Err(_) => return,
        };
        match trace {
            Ok(trace) if trace.format == TRACE_FORMAT => {
                let base = base.clone();
                let fetch = move || {
                    if let Err(error) = base.prefetch(&trace.reads) {
                        tracing::warn!(%error, "an image was not fetched ahead");
                    }
                };
                if let Err(error) = thread::Builder::new().name("fetch ahead".into()).spawn(fetch) {
                    tracing::warn!(%error, "an image is not fetched ahead");
                }
            }
            // It only saves time.
            _ => tracing::warn!(%root, "the record of an image's first start does not read"),
        }
    }

    /// Keeps what the start of a VM has read of its image, for the next start of that image on a cold machine.
    pub(crate) fn keep_trace(&self, launch: &Launch) {
        let Ok(Some(root)) = root(launch) else { return };
        let Some(base) = lock(&self.bases).get(&root).and_then(Weak::upgrade) else { return };
        let id = launch.id;
        let path = self.cache(root).with_extension(TRACE);
        let reads = base.trace();
        tracing::info!(vm = %id, fetched_bytes = base.fetched_bytes(), image_bytes = base.length(), "the image was read");
        if path.exists() || reads.is_empty() {
            return;
        }
        let text = serde_json::to_vec(&Trace { format: TRACE_FORMAT, reads }).unwrap_or_default();
        let unfinished = path.with_extension("trace.new");
        if let Err(error) = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, &path)) {
            tracing::warn!(%error, "what an image's start reads is not remembered");
        }
    }
}

/// The map below a VM's disk, where it has one.
fn root(launch: &Launch) -> Result<Option<ChunkId>> {
    launch.image.map.as_deref().map(str::parse).transpose()
}
