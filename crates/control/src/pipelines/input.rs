//! The files below a run's input directory, in the order of their names.

use std::{
    ffi::OsString,
    fs,
    io::Read,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result};

/// An entry of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A regular file: its path below the input, as bytes.
    File { path: Vec<u8>, size: u64 },
    /// A file or directory that cannot be read, and why.
    Unreadable { path: Vec<u8>, reason: String },
    /// A symbolic link, socket, pipe or device: not read.
    Skipped,
}

/// Walks the input and tells what it finds, until `tell` says that nobody listens.
///
/// # Errors
/// `NotFound` or `Refused` when the input itself cannot be read.
pub(crate) fn walk(input: &Path, tell: &mut dyn FnMut(Found) -> bool) -> Result<()> {
    let about =
        fs::metadata(input).map_err(|error| Error::io(format!("read the input {}", input.display()), &error))?;
    if about.is_file() {
        let name = input.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
        tell(look(input, name, about.len()));
        return Ok(());
    }
    fs::read_dir(input).map_err(|error| Error::io(format!("read the input {}", input.display()), &error))?;
    let mut stack = vec![Vec::new()];
    while let Some(below) = stack.pop() {
        let directory = input.join(OsString::from_vec(below.clone()));
        let listed = fs::read_dir(&directory).and_then(Iterator::collect::<std::io::Result<Vec<fs::DirEntry>>>);
        let mut entries = match listed {
            Ok(entries) => entries,
            Err(error) => {
                if !tell(Found::Unreadable { path: below, reason: format!("directory cannot be read: {error}") }) {
                    return Ok(());
                }
                continue;
            }
        };
        entries.sort_by_key(fs::DirEntry::file_name);
        let mut deeper = Vec::new();
        for entry in entries {
            let mut path = below.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(entry.file_name().as_bytes());
            let found = match entry.metadata() {
                Ok(about) if about.is_dir() => {
                    deeper.push(path);
                    continue;
                }
                Ok(about) if about.is_file() => look(&entry.path(), path, about.len()),
                Ok(_) => Found::Skipped,
                Err(error) => Found::Unreadable { path, reason: format!("cannot be read: {error}") },
            };
            if !tell(found) {
                return Ok(());
            }
        }
        stack.extend(deeper.into_iter().rev());
    }
    Ok(())
}

fn look(file: &Path, path: Vec<u8>, size: u64) -> Found {
    match open(file) {
        Ok(_) => Found::File { path, size },
        Err(error) => Found::Unreadable { path, reason: format!("cannot be read: {error}") },
    }
}

/// Opens a regular file and nothing else: no link is followed, no pipe waited for.
fn open(file: &Path) -> std::io::Result<fs::File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    fs::OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(file)
}

/// Reads a file of the input whole.
///
/// # Errors
/// The system's reason, or that it is larger than `most` bytes.
pub(crate) fn read(input: &Path, path: &[u8], most: u64) -> Result<Vec<u8>> {
    let file: PathBuf =
        if input.is_file() { input.to_path_buf() } else { input.join(OsString::from_vec(path.to_vec())) };
    let mut content = Vec::new();
    open(&file)
        .and_then(|file| file.take(most.saturating_add(1)).read_to_end(&mut content))
        .map_err(|error| Error::io("cannot be read", &error))?;
    if content.len() as u64 > most {
        return Err(Error::refused(format!("larger than the step's payload limit of {}", burgeon_api::ByteSize(most))));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_regular_file_is_found_once_and_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("b/c")).unwrap();
        for name in ["z", "a", "b/x", "b/c/new\nline"] {
            fs::write(root.join(name), name).unwrap();
        }
        fs::write(root.join(OsString::from_vec(vec![b'n', 0xff])), "raw").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
        let mut found = Vec::new();
        walk(root, &mut |entry| {
            found.push(entry);
            true
        })
        .unwrap();
        let names: Vec<Vec<u8>> = found
            .iter()
            .filter_map(|entry| match entry {
                Found::File { path, .. } => Some(path.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(names, [b"a".to_vec(), vec![b'n', 0xff], b"z".to_vec(), b"b/x".to_vec(), b"b/c/new\nline".to_vec()]);
        assert_eq!(found.iter().filter(|entry| **entry == Found::Skipped).count(), 1);
        assert_eq!(read(root, b"b/x", 100).unwrap(), b"b/x");
        assert!(read(root, b"b/x", 2).unwrap_err().message.contains("payload limit"));
        assert!(read(root, b"link", 100).is_err(), "links are not followed");
        assert!(walk(&root.join("missing"), &mut |_| true).is_err());
    }
}
