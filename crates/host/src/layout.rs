//! Where things lie below the data directory, and the lock that keeps two processes from sharing one.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, VmId};
use burgeon_store::places::Files;
use rustix::fs::FlockOperation;

/// A unix socket's path has 107 bytes; the longest below the data directory needs 33 of them.
const LONGEST_DATA: usize = 74;

/// A file that says whose directory this is, with the version of the layout.
const MARKER: &str = "burgeon-data";

/// The data directory. Everything of Burgeon lies below it.
#[derive(Clone, Debug)]
pub struct Layout {
    pub data: PathBuf,
}

impl Layout {
    /// Makes the directories there must be, for this user only.
    ///
    /// # Errors
    /// `Invalid` for a path too long for sockets; the system's reason otherwise.
    pub fn create(data: &Path) -> Result<Layout> {
        let data = std::path::absolute(data).map_err(|error| Error::io("resolve the data directory", &error))?;
        if data.as_os_str().len() > LONGEST_DATA {
            return Err(Error::invalid(format!(
                "the data directory's path has {} bytes; unix sockets below it leave room for {LONGEST_DATA}",
                data.as_os_str().len()
            ))
            .with_hint("choose a shorter one: --data DIR or BURGEON_DATA"));
        }
        let layout = Layout { data };
        layout.claim()?;
        let below = [layout.vms(), layout.all_provisions(), layout.images(), layout.cache(), layout.temporary()];
        for directory in [layout.data.clone()].into_iter().chain(below) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .map_err(|error| Error::io(format!("create {}", directory.display()), &error))?;
        }
        fs::set_permissions(&layout.data, fs::Permissions::from_mode(0o700))
            .map_err(|error| Error::io(format!("protect {}", layout.data.display()), &error))?;
        Ok(layout)
    }

    /// Makes sure that the directory is ours: empty, new, or marked by an earlier Burgeon. Another
    /// one, such as /tmp, must not lose its permissions to us.
    fn claim(&self) -> Result<()> {
        let marker = self.data.join(MARKER);
        if marker.exists() {
            return Ok(());
        }
        let shown = self.data.display();
        match fs::read_dir(&self.data).map(|mut entries| entries.next().is_some()) {
            Ok(true) => {
                return Err(Error::refused(format!("{shown} holds something, and is no data directory of Burgeon"))
                    .with_hint("give an empty or a new directory: --data DIR or BURGEON_DATA"));
            }
            Ok(false) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&self.data)
                    .map_err(|error| Error::io(format!("create {shown}"), &error))?;
            }
            Err(error) => return Err(Error::io(format!("read {shown}"), &error)),
        }
        fs::write(&marker, "1\n").map_err(|error| Error::io(format!("write {}", marker.display()), &error))
    }

    pub fn vms(&self) -> PathBuf {
        self.data.join("vms")
    }
    /// A VM's directory: named by the end of its id, which is random.
    pub fn vm(&self, id: VmId) -> PathBuf {
        let text = id.uuid().simple().to_string();
        self.vms().join(&text[20..])
    }
    /// What VMs are to be given that are not launched yet.
    pub fn all_provisions(&self) -> PathBuf {
        self.data.join("provisions")
    }
    pub fn provisions(&self, id: VmId) -> PathBuf {
        self.all_provisions().join(format!("{id}.json"))
    }
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }
    pub fn image(&self, name: &str) -> PathBuf {
        self.images().join(name)
    }
    pub fn cache(&self) -> PathBuf {
        self.data.join("cache")
    }
    /// Chunks of images and disks, their catalog, and the cache of what was read.
    pub fn store(&self) -> PathBuf {
        self.data.join("store")
    }
    pub fn temporary(&self) -> PathBuf {
        self.data.join("tmp")
    }
    pub fn host_socket(&self) -> PathBuf {
        self.data.join("host.sock")
    }
    pub fn control_socket(&self) -> PathBuf {
        self.data.join("control.sock")
    }
    pub fn meta(&self) -> PathBuf {
        self.data.join("meta.db")
    }
    /// What of it may lie elsewhere.
    pub fn files(&self) -> Files {
        let system = rustix::system::uname();
        Files {
            record: self.data.join("places.json"),
            store: self.store(),
            meta: self.meta(),
            name: format!("{}:{}", system.nodename().to_string_lossy(), self.data.display()),
        }
    }
    pub fn kvm_verdict(&self) -> PathBuf {
        self.data.join("kvm.json")
    }
}

/// Held by the one process of its kind that serves a data directory.
#[derive(Debug)]
pub struct Lock {
    _file: fs::File,
}

impl Lock {
    /// Whether a process has the lock of `kind` at the moment.
    pub fn is_taken(layout: &Layout, kind: &str) -> bool {
        let Ok(file) = fs::File::open(layout.data.join(format!("{kind}.lock"))) else { return false };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
    }

    /// Takes the locks of all servers: for work on a data directory that none of them may have open.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_all(layout: &Layout) -> Result<Vec<Lock>> {
        let locks = ["serve", "host", "control"].map(|kind| Lock::take(layout, kind));
        locks.into_iter().collect::<Result<_>>().map_err(|error| {
            error.with_hint("stop the server first: one that a command started leaves 60 s after the last use")
        })
    }

    /// Takes the lock of `kind` (`host`, `control`, `serve`), or says who has it.
    ///
    /// # Errors
    /// `Conflict` when another process has it.
    pub fn take(layout: &Layout, kind: &str) -> Result<Lock> {
        use std::io::{Read, Seek, Write};
        let path = layout.data.join(format!("{kind}.lock"));
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| Error::io(format!("open {}", path.display()), &error))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut owner = String::new();
            // Whoever it is, the lock is taken; the number is only for the message.
            drop(file.read_to_string(&mut owner));
            return Err(Error::conflict(format!(
                "{} is served by another {kind} process (pid {})",
                layout.data.display(),
                owner.trim()
            ))
            .with_hint("stop it first, or choose another directory with --data DIR"));
        }
        // One write of one length: a reader never finds half a number, or none.
        let line = format!("{:<12}\n", std::process::id());
        file.rewind()
            .and_then(|()| file.write_all(line.as_bytes()))
            .map_err(|error| Error::io(format!("write {}", path.display()), &error))?;
        Ok(Lock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_per_data_directory() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        let first = Lock::take(&layout, "host").unwrap();
        let error = Lock::take(&layout, "host").unwrap_err();
        assert!(error.message.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        assert!(Lock::take(&layout, "host").is_ok());
        let long = directory.path().join("x".repeat(90));
        assert!(Layout::create(&long).unwrap_err().message.contains("unix sockets"));
        assert!(!long.exists());
        let foreign = directory.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("letter"), "dear").unwrap();
        let before = fs::metadata(&foreign).unwrap().permissions();
        assert!(Layout::create(&foreign).unwrap_err().message.contains("no data directory"));
        assert_eq!(fs::metadata(&foreign).unwrap().permissions(), before);
    }
}
