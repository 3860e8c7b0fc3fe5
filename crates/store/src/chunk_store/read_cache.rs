//! The plain copies of what VMs have read of maps, `cache/MAP.{data,map,trace}` in the store's directory: when they go.
//!
//! A cache is of use while a root names its map. Whoever opens one has set such a root before, and holds the lock of the
//! directory while it opens the files; so does a collection while it looks at the roots and removes the files of a map.
//! So the two files of a cache are opened or removed together: a map beside new, empty data would say that blocks are
//! there which are not. A process that has the files open after all, above a root that is gone, goes on with what it
//! has; nobody else sees those any more, and the disk has their room back when it closes them.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use burgeon_api::{Error, Result, store::Collected};
use rustix::fs::FlockOperation;

use super::{ChunkStore, Watch};
use crate::{
    ChunkId,
    steps::{Step, reached},
};

const LOCK: &str = ".lock";
/// The map first: without it, the data means nothing, and a new map says that all is absent.
const EXTENSIONS: [&str; 4] = ["map", "data", "trace", "trace.new"];

/// Held while the files of a cache are opened or removed.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

/// Takes the lock of a directory of caches, which is made if it is not there. Waits for who has it: not long.
///
/// # Errors
/// Those of the file system.
pub fn hold(directory: &Path) -> Result<Held> {
    let path = directory.join(LOCK);
    let failed = |error: io::Error| Error::io(format!("lock {}", directory.display()), &error);
    fs::create_dir_all(directory).map_err(failed)?;
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    Ok(Held { _file: file })
}

/// What lies there of one map.
#[derive(Default)]
struct Cached {
    bytes: u64,
    written: Option<SystemTime>,
}

/// Removes caches of maps that no root names, and that nobody wrote to for the grace.
///
/// # Errors
/// Those of the catalog, of the file system and of `watch`.
pub fn drop_caches(
    store: &ChunkStore,
    directory: &Path,
    grace_us: u64,
    watch: &mut Watch<'_>,
    report: &mut Collected,
) -> Result<()> {
    let cut = SystemTime::UNIX_EPOCH + Duration::from_micros(store.now_us().saturating_sub(grace_us));
    watch("caches", 0, 0)?;
    for (map, cached) in list(directory)? {
        if named(store, map)? || cached.written.is_none_or(|written| written >= cut) {
            continue;
        }
        watch("caches", report.caches_removed, 0)?;
        let held = hold(directory)?;
        // Again, now that nobody can open it without having set a root before.
        if !named(store, map)? {
            remove(directory, map)?;
            reached(Step::CacheRemoved);
            report.caches_removed += 1;
            report.cache_bytes_freed += cached.bytes;
        }
        drop(held);
    }
    Ok(())
}

fn named(store: &ChunkStore, map: ChunkId) -> Result<bool> {
    Ok(store.catalog.blocking_roots(None)?.iter().any(|root| root.map == map))
}

fn list(directory: &Path) -> Result<BTreeMap<ChunkId, Cached>> {
    let mut found: BTreeMap<ChunkId, Cached> = BTreeMap::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(Error::io(format!("read {}", directory.display()), &error)),
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some((stem, extension)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        let (Ok(map), true) = (stem.parse::<ChunkId>(), EXTENSIONS.contains(&extension)) else { continue };
        // A file that goes meanwhile needs nobody.
        let Ok(about) = entry.metadata() else { continue };
        let cached = found.entry(map).or_default();
        cached.bytes += about.blocks() * 512;
        cached.written = cached.written.max(about.modified().ok());
    }
    Ok(found)
}

fn remove(directory: &Path, map: ChunkId) -> Result<()> {
    for extension in EXTENSIONS {
        let path: PathBuf = directory.join(format!("{map}.{extension}"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", path.display()), &error));
            }
            _ => {}
        }
    }
    Ok(())
}
