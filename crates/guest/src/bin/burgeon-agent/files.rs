//! Files of the guest: put, get, list, make directory.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use burgeon_guest::protocol::{Answer, Failure, FailureKind, FileEntry, FileKind, Sequence};
use rustix::fs::{Dir, Mode, OFlags};

use crate::{
    exec::{Returns, Source},
    spawn::{SAFE_OPEN, failure, io_failure},
};

/// Entries of a directory that one reply may hold, in bytes of names and numbers.
const LIST_BYTES: usize = 48 << 10;

fn path(bytes: &[u8]) -> Result<&Path, Failure> {
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(failure(FailureKind::Invalid, "the path is empty or holds a NUL byte"));
    }
    Ok(Path::new(std::ffi::OsStr::from_bytes(bytes)))
}

/// Names in a directory, in any order. Without the C library's `opendir`, whose memory is new pages each time: in a guest
/// that goes on from a captured state that is a matter of milliseconds.
pub(crate) fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let directory = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    Ok(names)
}

/// A file that stays open once it was. What a clone does not open, its kernel need not look for.
pub(crate) struct Kept {
    path: &'static str,
    file: OnceLock<File>,
}

impl Kept {
    pub(crate) const fn new(path: &'static str) -> Kept {
        Kept { path, file: OnceLock::new() }
    }

    pub(crate) fn file(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = File::open(self.path)?;
        Ok(self.file.get_or_init(|| file))
    }
}

/// Writes a small file, over what it holds: it is as long as before most times, and then keeps its page.
pub(crate) fn write_over(path: &str, content: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    let length = file.metadata()?.len();
    file.write_all(content.as_bytes())?;
    if length > content.len() as u64 { file.set_len(content.len() as u64) } else { Ok(()) }
}

fn shown(action: &str, path: &Path) -> String {
    format!("cannot {action} {}", path.display())
}

/// A file on its way into the guest. Until it is whole it has another name; dropped before, it is gone.
pub(crate) struct Put {
    pub(crate) id: u32,
    file: File,
    temporary: Option<PathBuf>,
    target: PathBuf,
    mode: u32,
    size: u64,
    written: u64,
    pub(crate) received: Sequence,
    pub(crate) returns: Returns,
}

impl Put {
    pub(crate) fn new(id: u32, target: &[u8], mode: u32, size: u64, nonce: u64) -> Result<Self, Failure> {
        let target = path(target)?.to_path_buf();
        let refuse = |error: io::Error| io_failure(&shown("write", &target), &error);
        if target.is_dir() || target.file_name().is_none() {
            return Err(failure(FailureKind::Exists, format!("{} is a directory", target.display())));
        }
        let temporary = target.with_file_name(format!(".burgeon-put-{nonce:016x}"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(refuse)?;
        let (received, returns) = (Sequence::default(), Returns::default());
        Ok(Self { id, file, temporary: Some(temporary), target, mode, size, written: 0, received, returns })
    }

    pub(crate) fn data(&mut self, data: &[u8]) -> Result<(), Failure> {
        self.written += data.len() as u64;
        if self.written > self.size {
            let message = format!("{} was to have {} bytes, and more came", self.target.display(), self.size);
            return Err(failure(FailureKind::Invalid, message));
        }
        self.file.write_all(data).map_err(|error| io_failure(&shown("write", &self.target), &error))
    }

    pub(crate) fn finish(&mut self) -> Result<Answer, Failure> {
        if self.written != self.size {
            let (target, size, written) = (self.target.display(), self.size, self.written);
            return Err(failure(FailureKind::Invalid, format!("{target}: {written} of {size} bytes came")));
        }
        let refuse = |error: io::Error| io_failure(&shown("write", &self.target), &error);
        self.file.set_permissions(Permissions::from_mode(self.mode & 0o7777)).map_err(refuse)?;
        if let Some(temporary) = &self.temporary {
            std::fs::rename(temporary, &self.target).map_err(refuse)?;
        }
        self.temporary = None;
        Ok(Answer::Done)
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _gone_with_its_directory = std::fs::remove_file(temporary);
        }
    }
}

/// A file on its way out.
pub(crate) struct Get {
    pub(crate) source: Source,
}

impl Get {
    pub(crate) fn new(stream: u32, wanted: &[u8]) -> Result<(Self, Answer), Failure> {
        let wanted = path(wanted)?;
        let refuse = |error: io::Error| io_failure(&shown("read", wanted), &error);
        let flags = i32::try_from(SAFE_OPEN.bits()).unwrap_or(0);
        let file = OpenOptions::new().read(true).custom_flags(flags).open(wanted).map_err(refuse)?;
        let meta = file.metadata().map_err(refuse)?;
        if !meta.is_file() {
            return Err(failure(FailureKind::Invalid, format!("{} is no regular file", wanted.display())));
        }
        // A directory of a broken file system may open and still not read.
        file.read_at(&mut [0], 0).map_err(refuse)?;
        let mut source = Source::new(file.into(), stream);
        source.ready = true;
        Ok((Self { source }, Answer::File { mode: meta.mode() & 0o7777, size: meta.len() }))
    }
}

/// A part of a directory's entries, in byte order of their names.
pub(crate) fn list(directory: &[u8], after: &[u8]) -> Result<Answer, Failure> {
    let directory = path(directory)?;
    let refuse = |error: io::Error| io_failure(&shown("list", directory), &error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(refuse)? {
        let name = entry.map_err(refuse)?.file_name().into_vec();
        if after.is_empty() || name[..] > *after {
            names.push(name);
        }
    }
    names.sort_unstable();
    let mut entries = Vec::new();
    let mut bytes = 0;
    let mut more = false;
    for name in names {
        bytes += name.len() + 24;
        if bytes > LIST_BYTES {
            more = true;
            break;
        }
        // An entry that went away meanwhile is none.
        let Ok(meta) = std::fs::symlink_metadata(directory.join(std::ffi::OsStr::from_bytes(&name))) else { continue };
        let kind = match meta.file_type() {
            kind if kind.is_file() => FileKind::File,
            kind if kind.is_dir() => FileKind::Directory,
            kind if kind.is_symlink() => FileKind::Link,
            _ => FileKind::Other,
        };
        entries.push(FileEntry { name, kind, mode: meta.mode() & 0o7777, size: meta.len(), modified_s: meta.mtime() });
    }
    Ok(Answer::Entries { entries, more })
}

pub(crate) fn make_directory(wanted: &[u8], mode: u32) -> Result<Answer, Failure> {
    let wanted = path(wanted)?;
    let made = DirBuilder::new().recursive(true).mode(mode & 0o7777).create(wanted);
    made.map(|()| Answer::Done).map_err(|error| io_failure(&shown("make directory", wanted), &error))
}
