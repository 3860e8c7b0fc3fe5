//! Objects: named bytes that are written once, read in ranges, and deleted. It owns the seam between what is stored
//! (packs, manifests) and where: a directory of this machine, or a bucket of an S3 server. Both keep one contract,
//! which `tests/it/contract.rs` holds them to:
//!
//! - a name never changes its bytes: [`Objects::put_new`] does not overwrite, and [`Objects::replace`] is for the few
//!   that are made to change, by one writer after the other;
//! - an object is there whole or not at all, and once it was put it is durable;
//! - deleting what is not there is no error, so that every request can be repeated.

mod blocking;
#[cfg(feature = "s3")]
mod bucket;
mod directory;
mod replace;
#[cfg(feature = "s3")]
mod s3;

use std::{ops::Range, sync::Arc, time::SystemTime};

use burgeon_api::{Error, Result};
use bytes::Bytes;

pub use blocking::{Blocking, OpenObject};
#[cfg(feature = "s3")]
pub(crate) use bucket::AT_ONCE;
#[cfg(feature = "s3")]
pub use bucket::Bucket;
pub use directory::{Directory, OpenFile};
pub use replace::Tag;
#[cfg(feature = "s3")]
pub use s3::{S3, S3Settings};

/// Most bytes of an object's name.
const MOST_NAME: usize = 200;

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub name: String,
    pub length: u64,
    /// By the clock of the machine that keeps it.
    pub modified: SystemTime,
}

/// Where objects are. Cheap to clone; clones are the same place.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Objects {
    Directory(Arc<Directory>),
    #[cfg(feature = "s3")]
    S3(Arc<S3>),
}

impl Objects {
    /// Stores an object under a name that is not taken. Where it is, by an object of the same length, that object is
    /// taken for this one: a writer whose answer was lost may ask again, because names are those of contents or
    /// chosen at random.
    ///
    /// # Errors
    /// `Conflict` where the name has an object of another length, `Invalid` for a name that no object has, `Refused`
    /// where there is no room or no permission, and what the place itself meets.
    pub async fn put_new(&self, name: &str, bytes: Bytes) -> Result<()> {
        check_name(name)?;
        match self {
            Objects::Directory(directory) => {
                let name = name.to_owned();
                blocking(directory, move |directory| directory.put_new(&name, &bytes)).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3.put_new(name, bytes).await,
        }
    }

    /// A part of an object, whole.
    ///
    /// # Errors
    /// `NotFound` where there is no such object, `Damaged` where it ends before the range does.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        check_name(name)?;
        check_range(name, &range)?;
        match self {
            Objects::Directory(directory) => {
                let name = name.to_owned();
                blocking(directory, move |directory| directory.get_range(&name, range)).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3.get_range(name, range).await,
        }
    }

    /// How long an object is.
    ///
    /// # Errors
    /// `NotFound` where there is no such object.
    pub async fn length(&self, name: &str) -> Result<u64> {
        check_name(name)?;
        match self {
            Objects::Directory(directory) => {
                let name = name.to_owned();
                blocking(directory, move |directory| directory.length(&name)).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3.length(name).await,
        }
    }

    /// The objects below a folder, by name; an empty folder name means all.
    ///
    /// # Errors
    /// What the place itself meets.
    pub async fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let folder = folder.trim_end_matches('/');
        if !folder.is_empty() {
            check_name(folder)?;
        }
        match self {
            Objects::Directory(directory) => {
                let folder = folder.to_owned();
                blocking(directory, move |directory| directory.list(&folder)).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3.list(folder).await,
        }
    }

    /// Removes an object, if it is there.
    ///
    /// # Errors
    /// What the place itself meets.
    pub async fn delete(&self, name: &str) -> Result<()> {
        check_name(name)?;
        match self {
            Objects::Directory(directory) => {
                let name = name.to_owned();
                blocking(directory, move |directory| directory.delete(&name)).await
            }
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3.delete(name).await,
        }
    }

    /// Where an object is, for people: `/var/lib/burgeon/packs/ab/c.pack`.
    #[must_use]
    pub fn describe(&self, name: &str) -> String {
        match self {
            Objects::Directory(directory) => directory.describe(name),
            #[cfg(feature = "s3")]
            Objects::S3(s3) => s3.describe(name),
        }
    }
}

impl From<Directory> for Objects {
    fn from(directory: Directory) -> Objects {
        Objects::Directory(Arc::new(directory))
    }
}

#[cfg(feature = "s3")]
impl From<S3> for Objects {
    fn from(s3: S3) -> Objects {
        Objects::S3(Arc::new(s3))
    }
}

async fn blocking<T: Send + 'static>(
    directory: &Arc<Directory>,
    run: impl FnOnce(&Directory) -> Result<T> + Send + 'static,
) -> Result<T> {
    let directory = Arc::clone(directory);
    match tokio::task::spawn_blocking(move || run(&directory)).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(format!("a task of the object store: {error}"))),
    }
}

/// Names are folders and a file, of characters that every place takes as they are. Nothing begins with a dot: such
/// names are for what is half written.
fn check_name(name: &str) -> Result<()> {
    let part = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        !part.is_empty() && !part.starts_with('.') && part.bytes().all(plain)
    };
    if name.len() <= MOST_NAME && name.split('/').all(part) {
        return Ok(());
    }
    Err(Error::invalid(format!("\"{}\" is no name of an object", burgeon_api::path_text::printable(name))))
}

fn check_range(name: &str, range: &Range<u64>) -> Result<()> {
    if range.start <= range.end {
        return Ok(());
    }
    Err(Error::invalid(format!("bytes {} to {} are no range of {name}", range.start, range.end)))
}
