//! Objects in a directory of this machine: each a file, below folders that come with it.
//!
//! An object is written to a file beside its place, whose name begins with a dot, synced, and renamed in a way that
//! replaces nothing; then the folder is synced. So a name that can be seen has all its bytes, after a power cut too,
//! and a file with a dot is what some writer left: [`Directory::tidy`] removes it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use burgeon_api::{Error, Result};
use bytes::Bytes;
use rustix::fs::{CWD, RenameFlags};

use super::{Object, check_name};
use crate::steps::{Step, reached};

const UNFINISHED: &str = ".new-";

/// A directory that holds objects. The process may have several for the same path.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    /// For names of unfinished files; a name that is taken is skipped.
    next: AtomicU64,
}

/// An object held open, for many reads.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl Directory {
    /// The directory at this path, made if it is not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(root: impl Into<PathBuf>) -> Result<Directory> {
        let root = root.into();
        make_folder(&root).map_err(|error| Error::io(format!("make {}", root.display()), &error))?;
        Ok(Directory { root, next: AtomicU64::new(0) })
    }

    /// As [`super::Objects::put_new`], and durable when it returns.
    ///
    /// # Errors
    /// As [`super::Objects::put_new`].
    pub fn put_new(&self, name: &str, bytes: &[u8]) -> Result<()> {
        check_name(name)?;
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        let failed = |error: io::Error| {
            let action = format!("write {}", path.display());
            match error.kind() {
                io::ErrorKind::AlreadyExists => Error::conflict(format!("{action}: {error}")),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Error::io(action, &error).with_hint("free some space, or put the objects elsewhere")
                }
                _ => Error::io(action, &error),
            }
        };
        make_folder(folder).map_err(failed)?;
        // Most repeated requests end here, before anything is written.
        if !self.taken(&path, bytes.len()).map_err(failed)? {
            let unfinished = self.write_beside(folder, bytes).map_err(failed)?;
            reached(Step::ObjectBeside);
            match rename_new(&unfinished, &path) {
                Ok(()) => {}
                Err(error) => {
                    remove_quietly(&unfinished);
                    if error.kind() != io::ErrorKind::AlreadyExists {
                        return Err(failed(error));
                    }
                    self.taken(&path, bytes.len()).map_err(failed)?;
                }
            }
        }
        // Where the name was taken too: its writer may have died before this.
        sync_folder(folder).map_err(failed)
    }

    /// A part of an object.
    ///
    /// # Errors
    /// As [`super::Objects::get_range`].
    pub fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let object = self.open_object(name)?;
        // Checked before memory is taken for it.
        let length = object.check(&range)?;
        let mut bytes = vec![0; length];
        object.read_at(range.start, &mut bytes)?;
        Ok(bytes.into())
    }

    /// Fills `bytes` from an object: the way of those who must not wait for another thread. Those who read one object
    /// often hold an [`OpenFile`].
    ///
    /// # Errors
    /// `NotFound` where there is no such object, `Damaged` where it ends too early.
    pub fn read_at(&self, name: &str, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.open_object(name)?.read_at(offset, bytes)
    }

    /// Opens an object. It can be read to its end even if it is deleted meanwhile.
    ///
    /// # Errors
    /// `NotFound` where there is no such object.
    pub fn open_object(&self, name: &str) -> Result<OpenFile> {
        check_name(name)?;
        let path = self.path(name);
        let open = || {
            let file = File::open(&path)?;
            let about = file.metadata()?;
            if !about.is_file() {
                return Err(io::ErrorKind::NotFound.into());
            }
            Ok((file, about.len()))
        };
        match open() {
            Ok((file, length)) => Ok(OpenFile { file, path, length }),
            Err(error) => Err(Error::io(format!("read {}", path.display()), &error)),
        }
    }

    /// How long an object is.
    ///
    /// # Errors
    /// `NotFound` where there is no such object.
    pub fn length(&self, name: &str) -> Result<u64> {
        self.open_object(name).map(|object| object.length)
    }

    /// The objects below a folder, by name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let mut found = Vec::new();
        self.walk(folder, &mut |name, about| {
            if check_name(&name).is_ok() {
                found.push(Object { name, length: about.len(), modified: about.modified()? });
            }
            Ok(())
        })?;
        found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Removes an object, if it is there. It may be there again after a power cut.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn delete(&self, name: &str) -> Result<()> {
        check_name(name)?;
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", path.display()), &error))
            }
            _ => Ok(()),
        }
    }

    /// Removes unfinished files that were last written before `before`, and says how many. A writer that goes on for
    /// longer than that fails; nothing wrong comes of it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn tidy(&self, before: SystemTime) -> Result<usize> {
        let mut removed = 0;
        self.walk("", &mut |name, about| {
            let file = name.rsplit('/').next().unwrap_or_default();
            if file.starts_with(UNFINISHED) && about.modified()? < before {
                fs::remove_file(self.path(&name))?;
                removed += 1;
            }
            Ok(())
        })?;
        Ok(removed)
    }

    /// The path of an object.
    #[must_use]
    pub fn describe(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Whether a name has an object of this length already; another length is an error.
    fn taken(&self, path: &Path, length: usize) -> io::Result<bool> {
        match fs::metadata(path) {
            Ok(about) if about.is_file() && about.len() == length as u64 => Ok(true),
            Ok(about) => Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("the name is taken, by {} bytes; these are {length}", about.len()),
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes and syncs a file with a new name. Leaves nothing where that fails.
    pub(super) fn write_beside(&self, folder: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
        let (path, mut file) = loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("{UNFINISHED}{}-{number}", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        };
        match file.write_all(bytes).and_then(|()| file.sync_data()) {
            Ok(()) => Ok(path),
            Err(error) => {
                remove_quietly(&path);
                Err(error)
            }
        }
    }

    /// Tells every file below a folder with its name. What vanishes meanwhile is left out.
    fn walk(&self, folder: &str, tell: &mut dyn FnMut(String, fs::Metadata) -> io::Result<()>) -> Result<()> {
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let path = self.path(&folder);
            let mut walk = || -> io::Result<()> {
                for entry in fs::read_dir(&path)? {
                    let entry = entry?;
                    let Ok(file) = entry.file_name().into_string() else { continue };
                    let name = if folder.is_empty() { file } else { format!("{folder}/{file}") };
                    let about = match entry.metadata() {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        about => about?,
                    };
                    if about.is_dir() {
                        folders.push(name);
                    } else if about.is_file() {
                        match tell(name, about) {
                            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                            told => told?,
                        }
                    }
                }
                Ok(())
            };
            match walk() {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("list {}", path.display()), &error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl OpenFile {
    /// Fills `bytes` from the object.
    ///
    /// # Errors
    /// `Damaged` where it ends too early.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.too_short(offset, offset.saturating_add(bytes.len() as u64)),
            _ => Error::io(format!("read {}", self.path.display()), &error),
        })
    }

    /// Bytes of the object.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    fn check(&self, range: &Range<u64>) -> Result<usize> {
        match usize::try_from(range.end.saturating_sub(range.start)) {
            Ok(length) if range.end <= self.length => Ok(length),
            _ => Err(self.too_short(range.start, range.end)),
        }
    }

    fn too_short(&self, start: u64, end: u64) -> Error {
        Error::damaged(format!("{} has {} bytes, not those from {start} to {end}", self.path.display(), self.length))
    }
}

/// Makes a folder and those above it that are missing, each durable.
pub(super) fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().unwrap_or(Path::new(""));
    make_folder(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        // Another thread made it, or what has the name is no folder.
        Err(error) if !folder.is_dir() => return Err(error),
        _ => {}
    }
    sync_folder(if above.as_os_str().is_empty() { Path::new(".") } else { above })
}

pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Renames to a name that is not taken.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems cannot; a second name that replaces nothing does the same in two steps.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

pub(super) fn remove_quietly(path: &Path) {
    // What stays is removed by `tidy`.
    drop(fs::remove_file(path));
}
