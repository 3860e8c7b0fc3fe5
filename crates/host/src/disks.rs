//! The disks of this host's VMs: each a stack of layers above its image's map in the store, served to its QEMU.
//!
//! What a VM writes lies in `disk` in its directory; what is read of an image lies plain in the store's cache, shared by
//! all VMs of the image. A root in the catalog keeps the image's chunks for as long as the VM is there, whatever becomes
//! of the image. Calls block.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    thread,
};

use burgeon_api::{Error, Result, VmId, host::Launch};
use burgeon_qemu::{
    command::file,
    nbd::{Owner, Server},
};
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    chunk_store::{ChunkStore, Source, read_cache},
    disk::{Disk, ImageBase},
};

use crate::{layout::Layout, prepare};

/// The directory of a VM's layers, beside QEMU's own.
const LAYERS: &str = "disk";
/// A disk's first layer. The others are named when they are sealed.
const FIRST: &str = "layer-0";
/// Roots of VMs' disks.
const ROOT_KIND: &str = "disk";
/// Which parts of an image its first start read; beside the cache of the image.
const TRACE: &str = "trace";
const TRACE_FORMAT: u32 = 1;

struct Served {
    base: Arc<ImageBase>,
    root: ChunkId,
    /// Dropped, the socket is gone.
    _server: Server,
}

/// See the module.
pub(crate) struct Disks {
    layout: Layout,
    /// Opened with the first disk that needs it.
    store: OnceLock<Arc<ChunkStore>>,
    bases: Mutex<HashMap<ChunkId, Weak<ImageBase>>>,
    served: Mutex<HashMap<VmId, Served>>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Trace {
    format: u32,
    /// Offset and length, in the order of the reads.
    reads: Vec<(u64, u64)>,
}

/// The shell's clock and random numbers.
#[expect(clippy::disallowed_methods, reason = "the shell that reads the clock")]
fn source() -> Source {
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
    pub(crate) fn new(layout: Layout) -> Disks {
        Disks { layout, store: OnceLock::new(), bases: Mutex::default(), served: Mutex::default() }
    }

    fn store(&self) -> Result<&Arc<ChunkStore>> {
        if let Some(store) = self.store.get() {
            return Ok(store);
        }
        let store = ChunkStore::open(&self.layout.store(), source())?;
        Ok(self.store.get_or_init(|| store))
    }

    /// Makes an empty layer above the image's disk, in place of what an earlier try has left, and serves the disk.
    pub(crate) fn create(&self, vm: &Path, launch: &Launch, owner: Option<u32>) -> Result<()> {
        let Some(root) = root(launch)? else { return Ok(()) };
        self.close(launch.id);
        let layers = vm.join(LAYERS);
        match fs::remove_dir_all(&layers) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("clear the VM's disk", &error));
            }
            _ => fs::create_dir(&layers).map_err(|error| Error::io("create the VM's disk", &error))?,
        }
        let store = self.store()?;
        let now_us = (source().now_us)();
        let keep = NewRoot {
            kind: ROOT_KIND.into(),
            name: launch.id.to_string(),
            expected: None,
            map: root,
            relied: Vec::new(),
            expires_us: None,
            note: String::new(),
        };
        // The image's own root keeps the map now; without it, chunks below the map may be gone though the map is here.
        store.catalog().blocking_share_root(keep, now_us).map_err(|error| {
            error
                .context(format!("use the disk of image {}", launch.image.name))
                .with_hint("build or import the image again")
        })?;
        self.serve(vm, launch, owner)
    }

    /// Serves a disk that is there, unless that is done already.
    pub(crate) fn serve(&self, vm: &Path, launch: &Launch, owner: Option<u32>) -> Result<()> {
        let Some(root) = root(launch)? else { return Ok(()) };
        if lock(&self.served).contains_key(&launch.id) {
            return Ok(());
        }
        let base = self.base(root)?;
        let size = prepare::disk_size(launch).bytes();
        let disk = Disk::open(&vm.join(LAYERS), size, &[FIRST.to_string()], base.clone())?;
        let socket = vm.join(file::QEMU_DIRECTORY).join(file::DISK);
        let made_at = vm.join(file::DISK);
        let owner = owner.map(|user| Owner { user, made_at: &made_at });
        let server = Server::start(&socket, Arc::new(disk), owner)?;
        lock(&self.served).insert(launch.id, Served { base, root, _server: server });
        Ok(())
    }

    /// Stops serving a VM's disk.
    pub(crate) fn close(&self, id: VmId) {
        let served = lock(&self.served).remove(&id);
        // Its connections end before this returns, and the table is not held meanwhile.
        drop(served);
    }

    /// Lets go of the image below a disk that is gone.
    pub(crate) fn forget(&self, id: VmId) {
        self.close(id);
        if let Some(store) = self.store.get()
            && let Err(error) = store.catalog().blocking_remove_root(ROOT_KIND, &id.to_string(), None)
        {
            tracing::warn!(vm = %id, %error, "the image below a removed disk is kept until the host process starts again");
        }
    }

    /// Lets go of what disks of VMs that are not there any more have kept.
    pub(crate) fn tidy(&self, vms: &HashSet<VmId>) -> Result<()> {
        if !self.layout.store().is_dir() {
            return Ok(());
        }
        let store = self.store()?;
        for root in store.catalog().blocking_roots(Some(ROOT_KIND))? {
            if root.name.parse().is_ok_and(|id| !vms.contains(&id)) {
                store.catalog().blocking_remove_root(ROOT_KIND, &root.name, Some(root.map))?;
            }
        }
        Ok(())
    }

    fn cache(&self, root: ChunkId) -> PathBuf {
        self.layout.store().join("cache").join(root.to_string())
    }

    /// The image's map, opened once for all VMs above it.
    fn base(&self, root: ChunkId) -> Result<Arc<ImageBase>> {
        let mut bases = lock(&self.bases);
        if let Some(base) = bases.get(&root).and_then(Weak::upgrade) {
            return Ok(base);
        }
        bases.retain(|_, base| base.strong_count() > 0);
        let cache = self.cache(root);
        // A collection may be about to remove what no disk has used for long.
        let held = cache.parent().map(read_cache::hold).transpose()?;
        let base = Arc::new(ImageBase::open(self.store()?.clone(), root, &cache)?);
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
    pub(crate) fn keep_trace(&self, id: VmId) {
        let Some((base, root)) = lock(&self.served).get(&id).map(|served| (served.base.clone(), served.root)) else {
            return;
        };
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
