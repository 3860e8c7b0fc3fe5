//! Objects that change: short ones that say which others count. A writer says what it has read, and is refused where
//! somebody else has written since, so that of two at the same time one has to look again.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
};

use burgeon_api::{Error, Result};
use bytes::Bytes;

use super::{
    Directory, Objects, blocking, check_name,
    directory::{make_folder, remove_quietly, sync_folder},
};
use crate::ChunkId;

/// In a directory, whoever replaces something holds this file locked.
const LOCK: &str = ".replace.lock";

/// What an object was when it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag(String);

impl Objects {
    /// A whole object of at most `most` bytes; none where there is no such object.
    ///
    /// # Errors
    /// `Damaged` for a longer one, and what the place itself meets.
    pub async fn read(&self, name: &str, most: u64) -> Result<Option<(Bytes, Tag)>> {
        check_name(name)?;
        match self {
            Objects::Directory(directory) => {
                let name = name.to_owned();
                blocking(directory, move |directory| directory.read(&name, most)).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3::read(s3, name, most).await,
        }
    }

    /// Writes an object in place of the one that was read; `expected` none: of none. The same bytes again are no conflict:
    /// the answer to the first request may have been lost.
    ///
    /// # Errors
    /// `Conflict` where there is another object than expected.
    pub async fn replace(&self, name: &str, bytes: Bytes, expected: Option<Tag>) -> Result<()> {
        check_name(name)?;
        match self {
            Objects::Directory(directory) => {
                let name = name.to_owned();
                blocking(directory, move |directory| directory.replace(&name, &bytes, expected.as_ref())).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3::replace(s3, name, bytes, expected).await,
        }
    }
}

fn too_long(place: &str, most: u64) -> Error {
    Error::damaged(format!("{place} is longer than the {most} bytes that it may have"))
}

fn changed(place: &str) -> Error {
    Error::conflict(format!("{place} was changed by somebody else")).with_hint("do the same again")
}

impl Directory {
    pub(super) fn read(&self, name: &str, most: u64) -> Result<Option<(Bytes, Tag)>> {
        let path = self.path(name);
        let read = || -> io::Result<Option<Vec<u8>>> {
            let file = match File::open(&path) {
                Ok(file) if file.metadata()?.is_file() => file,
                Ok(_) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            let mut bytes = Vec::new();
            file.take(most + 1).read_to_end(&mut bytes)?;
            Ok(Some(bytes))
        };
        let bytes = read().map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        match bytes {
            Some(bytes) if bytes.len() as u64 > most => Err(too_long(&self.describe(name), most)),
            Some(bytes) => {
                let tag = tag(&bytes);
                Ok(Some((bytes.into(), tag)))
            }
            None => Ok(None),
        }
    }

    fn replace(&self, name: &str, bytes: &[u8], expected: Option<&Tag>) -> Result<()> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&path);
        let failed = |error: io::Error| Error::io(format!("write {}", path.display()), &error);
        make_folder(folder).map_err(failed)?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.path(LOCK));
        let lock = lock.map_err(failed)?;
        lock.lock().map_err(failed)?;
        let current = match fs::read(&path) {
            Ok(current) => Some(tag(&current)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if current.as_ref() != Some(&tag(bytes)) {
            if current.as_ref() != expected {
                return Err(changed(&self.describe(name)));
            }
            let unfinished = self.write_beside(folder, bytes).map_err(failed)?;
            fs::rename(&unfinished, &path).map_err(|error| {
                remove_quietly(&unfinished);
                failed(error)
            })?;
        }
        sync_folder(folder).map_err(failed)
    }
}

fn tag(bytes: &[u8]) -> Tag {
    Tag(ChunkId::of(bytes).to_string())
}

#[cfg(feature = "s3")]
mod s3 {
    use object_store::{
        Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion,
    };

    use super::{Bytes, Result, Tag, changed, too_long};
    use crate::objects::{S3, s3::names_bucket};

    pub(super) async fn read(s3: &S3, name: &str, most: u64) -> Result<Option<(Bytes, Tag)>> {
        let path = s3.path(name);
        let found = match s3.deadline("read", name, s3.client.get(&path)).await? {
            Ok(found) => found,
            Err(StoreError::NotFound { source, path }) => {
                let error = StoreError::NotFound { source, path };
                return if names_bucket(&error) { Err(s3.told("read", name, &error)) } else { Ok(None) };
            }
            Err(error) => return Err(s3.told("read", name, &error)),
        };
        if found.meta.size > most {
            return Err(too_long(&s3.describe(name), most));
        }
        let tag = Tag(found.meta.e_tag.clone().unwrap_or_default());
        let bytes = s3.within("read", name, found.bytes()).await?;
        Ok(Some((bytes, tag)))
    }

    pub(super) async fn replace(s3: &S3, name: &str, bytes: Bytes, expected: Option<Tag>) -> Result<()> {
        let path = s3.path(name);
        let mode = match expected {
            Some(Tag(e_tag)) => PutMode::Update(UpdateVersion { e_tag: Some(e_tag), version: None }),
            None => PutMode::Create,
        };
        let options = PutOptions { mode, ..PutOptions::default() };
        let put = s3.client.put_opts(&path, PutPayload::from(bytes.clone()), options);
        match s3.deadline("write", name, put).await? {
            Ok(_) => Ok(()),
            Err(StoreError::Precondition { .. } | StoreError::AlreadyExists { .. }) => {
                match read(s3, name, bytes.len() as u64).await {
                    Ok(Some((there, _))) if there == bytes => Ok(()),
                    _ => Err(changed(&s3.describe(name))),
                }
            }
            Err(error) => Err(s3.told("write", name, &error)),
        }
    }
}
