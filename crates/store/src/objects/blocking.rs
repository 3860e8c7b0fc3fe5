//! Objects for threads that may wait: those of a store, whose readers and writers are threads.
//!
//! A directory is read by its files. A bucket is asked on a runtime of its own, so that any thread may wait for it,
//! whatever runtime that thread belongs to; a bounded number of requests is under way at once.

use std::time::SystemTime;

use burgeon_api::Result;
use bytes::Bytes;

use super::{Directory, Object, OpenFile, check_name};

/// See the module.
#[derive(Debug)]
pub enum Blocking {
    Directory(Directory),
    #[cfg(feature = "s3")]
    Bucket(super::Bucket),
}

/// An object held open, for many reads. What a reader goes on with is read ahead where that saves waiting.
#[derive(Debug)]
pub enum OpenObject {
    File(OpenFile),
    #[cfg(feature = "s3")]
    InBucket(super::bucket::InBucket),
}

impl Blocking {
    /// Whether the place is there.
    ///
    /// # Errors
    /// As [`super::S3::check`].
    pub fn check(&self) -> Result<()> {
        match self {
            Blocking::Directory(_) => Ok(()),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.check(),
        }
    }

    /// As [`super::Objects::put_new`].
    ///
    /// # Errors
    /// As there; so for all of these.
    pub fn put_new(&self, name: &str, bytes: &[u8]) -> Result<()> {
        match self {
            Blocking::Directory(directory) => directory.put_new(name, bytes),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.put_new(name, Bytes::copy_from_slice(bytes)),
        }
    }

    /// A whole object of at most `most` bytes; none where there is no such object.
    ///
    /// # Errors
    /// As [`super::Objects::read`].
    pub fn read(&self, name: &str, most: u64) -> Result<Option<Bytes>> {
        check_name(name)?;
        match self {
            Blocking::Directory(directory) => Ok(directory.read(name, most)?.map(|(bytes, _)| bytes)),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.read(name, most),
        }
    }

    /// Opens an object.
    ///
    /// # Errors
    /// `NotFound` where there is no such object.
    pub fn open_object(&self, name: &str) -> Result<OpenObject> {
        match self {
            Blocking::Directory(directory) => directory.open_object(name).map(OpenObject::File),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.open_object(name).map(OpenObject::InBucket),
        }
    }

    /// How long an object is.
    ///
    /// # Errors
    /// `NotFound` where there is no such object.
    pub fn length(&self, name: &str) -> Result<u64> {
        match self {
            Blocking::Directory(directory) => directory.length(name),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.length(name),
        }
    }

    /// The objects below a folder, by name.
    ///
    /// # Errors
    /// What the place itself meets.
    pub fn list(&self, folder: &str) -> Result<Vec<Object>> {
        match self {
            Blocking::Directory(directory) => directory.list(folder),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.list(folder),
        }
    }

    /// Removes an object, if it is there.
    ///
    /// # Errors
    /// What the place itself meets.
    pub fn delete(&self, name: &str) -> Result<()> {
        match self {
            Blocking::Directory(directory) => directory.delete(name),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.delete(name),
        }
    }

    /// Removes what writers that died left unfinished before `before`, and says how many. A bucket has nothing unfinished.
    ///
    /// # Errors
    /// What the place itself meets.
    pub fn tidy(&self, before: SystemTime) -> Result<usize> {
        match self {
            Blocking::Directory(directory) => directory.tidy(before),
            #[cfg(feature = "s3")]
            Blocking::Bucket(_) => Ok(0),
        }
    }

    /// Where an object is, for people.
    #[must_use]
    pub fn describe(&self, name: &str) -> String {
        match self {
            Blocking::Directory(directory) => directory.describe(name),
            #[cfg(feature = "s3")]
            Blocking::Bucket(bucket) => bucket.describe(name),
        }
    }
}

impl OpenObject {
    /// Fills `bytes` from the object.
    ///
    /// # Errors
    /// `Damaged` where it ends too early.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            OpenObject::File(file) => file.read_at(offset, bytes),
            #[cfg(feature = "s3")]
            OpenObject::InBucket(object) => object.read_at(offset, bytes),
        }
    }

    /// Bytes of the object.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            OpenObject::File(file) => file.length(),
            #[cfg(feature = "s3")]
            OpenObject::InBucket(object) => object.length(),
        }
    }
}
