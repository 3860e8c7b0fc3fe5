//! Directories: where images, the cache and half-made things live.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use burgeon_api::{Error, Result};
use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with};

/// The directories this crate writes to. All three must be on one file system, for atomic renames.
#[derive(Clone, Debug)]
pub struct DataPaths {
    /// One directory per image.
    pub images: PathBuf,
    /// Packages and apt's state; may be deleted at any time when nothing is being built.
    pub cache: PathBuf,
    /// Half-made things, removed after crashes.
    pub temporary: PathBuf,
}

pub(crate) fn create_directories(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| Error::io(format!("cannot create {}", path.display()), &error))
}

/// Told apart within one process; processes are told apart by their ids.
static COUNTER: AtomicU32 = AtomicU32::new(0);
const PREFIX: &str = "image-";
const LOCK: &str = "in-use";

/// A directory for one build. It is removed when dropped, and after a crash by the next build:
/// whoever works in it holds a lock that ends with its process.
pub(crate) struct WorkDirectory {
    path: PathBuf,
    _lock: File,
}

impl WorkDirectory {
    pub(crate) fn create(temporary: &Path) -> Result<WorkDirectory> {
        create_directories(temporary)?;
        remove_abandoned(temporary);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = temporary.join(format!("{PREFIX}{}-{number}", std::process::id()));
        let create = || -> std::io::Result<File> {
            drop(fs::remove_dir_all(&path));
            fs::create_dir(&path)?;
            let lock = File::create(path.join(LOCK))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        let lock = create().map_err(|error| Error::io(format!("cannot create {}", path.display()), &error))?;
        Ok(WorkDirectory { path, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        remove_tree(&self.path);
    }
}

/// Removes a directory whose own directories may lack write permission.
pub(crate) fn remove_tree(path: &Path) {
    drop(fs::remove_dir_all(path));
}

fn remove_abandoned(temporary: &Path) {
    let Ok(entries) = fs::read_dir(temporary) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let abandoned = match File::open(path.join(LOCK)) {
            Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
            // No lock file: it died between two calls, or is about to take it; age tells.
            Err(_) => entry
                .metadata()
                .and_then(|metadata| metadata.modified())
                .is_ok_and(|time| time.elapsed().is_ok_and(|age| age.as_secs() > 60)),
        };
        if abandoned {
            remove_tree(&path);
        }
    }
}

/// Writes a file so that a reader sees all of it or none, and a crash leaves the old one.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.{}-{number}", std::process::id()));
    let write = || -> std::io::Result<()> {
        fs::write(&temporary, bytes)?;
        File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        drop(fs::remove_file(&temporary));
        Error::io(format!("cannot write {}", path.display()), &error)
    })
}

/// Makes everything below `from` durable and puts it in place of `to` in one step.
pub(crate) fn publish(from: &Path, to: &Path) -> Result<()> {
    put(from, to, true).map(drop)
}

/// [`publish`], unless something is there. Answers whether it was done.
pub(crate) fn publish_new(from: &Path, to: &Path) -> Result<bool> {
    put(from, to, false)
}

fn put(from: &Path, to: &Path, replace: bool) -> Result<bool> {
    let swap = || -> std::io::Result<bool> {
        for entry in fs::read_dir(from)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(from)?.sync_all()?;
        let parent = to.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent)?;
        let directory = rustix::fs::CWD;
        match renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) if !replace => return Ok(false),
            // The old image ends where the new one was made, and is removed with it.
            Err(rustix::io::Errno::EXIST) => renameat_with(directory, from, directory, to, RenameFlags::EXCHANGE)?,
            Err(error) => return Err(error.into()),
        }
        File::open(parent)?.sync_all()?;
        Ok(true)
    };
    swap().map_err(|error| Error::io(format!("cannot put the image at {}", to.display()), &error))
}

/// A lock between processes, held until dropped.
pub(crate) fn lock_file(path: &Path) -> Result<File> {
    let lock = || -> std::io::Result<File> {
        let file = File::create(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    };
    lock().map_err(|error| Error::io(format!("cannot lock {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abandoned_directories_go_and_used_ones_stay() {
        let data = tempfile::tempdir().unwrap();
        let used = WorkDirectory::create(data.path()).unwrap();
        let dead = data.path().join("image-999999-0");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        fs::create_dir(data.path().join("of-someone-else")).unwrap();
        let second = WorkDirectory::create(data.path()).unwrap();
        assert!(used.path().exists() && second.path().exists() && !dead.exists());
        assert!(data.path().join("of-someone-else").exists());
        let path = used.path().to_owned();
        drop(used);
        assert!(!path.exists());
    }

    #[test]
    fn publishing_replaces_whole_directories() {
        let data = tempfile::tempdir().unwrap();
        let to = data.path().join("images/a");
        for text in ["one", "two"] {
            let from = data.path().join("new");
            drop(fs::remove_dir_all(&from));
            fs::create_dir(&from).unwrap();
            fs::write(from.join("file"), text).unwrap();
            publish(&from, &to).unwrap();
            assert_eq!(fs::read_to_string(to.join("file")).unwrap(), text);
        }
        assert_eq!(fs::read_to_string(data.path().join("new/file")).unwrap(), "one");
    }
}
