//! A bucket for threads that may wait.
//!
//! Requests run on a runtime of this bucket's own, as many at once as [`AT_ONCE`] says; each has the deadline of the
//! settings, within which the client repeats what failed for a moment, ever later and at random.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};

use burgeon_api::{Error, Result};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::{runtime::Runtime, sync::Semaphore};

use super::{Object, Objects, S3, S3Settings, check_name};

/// Requests under way at once, of all threads of the process: enough to fill a line, not so many that one starves.
pub(crate) const AT_ONCE: usize = 8;
/// Bytes that are read behind a read that goes on where the last one ended, doubled each time up to the second number.
const AHEAD: (u64, u64) = (64 << 10, 4 << 20);

/// A handle to a bucket. Cheap to clone; the runtime ends with the last one.
#[derive(Clone, Debug)]
pub struct Bucket {
    s3: Arc<S3>,
    objects: Objects,
    requests: Arc<Requests>,
}

struct Requests {
    runtime: Option<Runtime>,
    permits: Arc<Semaphore>,
    /// How many were made.
    count: AtomicU64,
}

impl fmt::Debug for Requests {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Requests")
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // The last handle may be dropped within another runtime, where waiting for this one is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Bucket {
    /// Prepares a client; nothing is asked of the server yet.
    ///
    /// # Errors
    /// `Invalid` for settings that cannot be right.
    pub fn new(settings: S3Settings) -> Result<Bucket> {
        let s3 = Arc::new(S3::new(settings)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("objects")
            .enable_all()
            .build()
            .map_err(|error| Error::io("start the threads that ask a bucket", &error))?;
        let requests =
            Requests { runtime: Some(runtime), permits: Arc::new(Semaphore::new(AT_ONCE)), count: AtomicU64::new(0) };
        Ok(Bucket { objects: Objects::S3(s3.clone()), s3, requests: Arc::new(requests) })
    }

    /// Asks the server for the bucket, so that wrong settings are told at once.
    ///
    /// # Errors
    /// As [`S3::check`].
    pub fn check(&self) -> Result<()> {
        let s3 = self.s3.clone();
        self.wait(async move { s3.check().await })
    }

    /// How many requests were made of it.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.count.load(Ordering::Relaxed)
    }

    /// Waits for a request, which has a deadline of its own, until there is a permit for it and then until it is done.
    fn wait<T: Send + 'static>(&self, request: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let permits = self.requests.permits.clone();
        self.requests.count.fetch_add(1, Ordering::Relaxed);
        self.run(async move {
            let permit = permits.acquire().await;
            let outcome = request.await;
            drop(permit);
            outcome
        })
    }

    fn run<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let ended = || Error::internal("a request to a bucket was cut off");
        let runtime = self.requests.runtime.as_ref().ok_or_else(ended)?;
        let (reply, answer) = mpsc::sync_channel(1);
        // The asker waits for as long as this has not ended.
        runtime.spawn(async move { drop(reply.send(work.await)) });
        answer.recv().map_err(|_| ended())?
    }

    pub(super) fn put_new(&self, name: &str, bytes: Bytes) -> Result<()> {
        let (objects, name) = (self.objects.clone(), name.to_owned());
        self.wait(async move { objects.put_new(&name, bytes).await })
    }

    pub(super) fn read(&self, name: &str, most: u64) -> Result<Option<Bytes>> {
        let (objects, name) = (self.objects.clone(), name.to_owned());
        self.wait(async move { Ok(objects.read(&name, most).await?.map(|(bytes, _)| bytes)) })
    }

    pub(super) fn length(&self, name: &str) -> Result<u64> {
        let (objects, name) = (self.objects.clone(), name.to_owned());
        self.wait(async move { objects.length(&name).await })
    }

    pub(super) fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let (objects, folder) = (self.objects.clone(), folder.to_owned());
        self.wait(async move { objects.list(&folder).await })
    }

    pub(super) fn delete(&self, name: &str) -> Result<()> {
        let (objects, name) = (self.objects.clone(), name.to_owned());
        self.wait(async move { objects.delete(&name).await })
    }

    pub(super) fn describe(&self, name: &str) -> String {
        self.s3.describe(name)
    }

    /// As [`Objects::get_range`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let (objects, name) = (self.objects.clone(), name.to_owned());
        self.wait(async move { objects.get_range(&name, range).await })
    }

    /// What of the range the object has, which begins within it.
    ///
    /// # Errors
    /// As [`Objects::get_range`].
    pub(crate) fn get_up_to(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        check_name(name)?;
        let (s3, name) = (self.s3.clone(), name.to_owned());
        self.wait(async move { s3.get_up_to(&name, range).await })
    }

    /// Several parts of objects, side by side; each has an answer of its own.
    ///
    /// # Errors
    /// None but that of a runtime that ends; those of the parts are in the answers.
    pub(crate) fn get_ranges(&self, wanted: Vec<(String, Range<u64>)>) -> Result<Vec<Result<Bytes>>> {
        let (objects, permits) = (self.objects.clone(), self.requests.permits.clone());
        self.requests.count.fetch_add(wanted.len() as u64, Ordering::Relaxed);
        self.run(async move {
            let get = async |(name, range): (String, Range<u64>)| {
                let permit = permits.acquire().await;
                let bytes = objects.get_range(&name, range).await;
                drop(permit);
                bytes
            };
            Ok(join_all(wanted.into_iter().map(get)).await)
        })
    }

    pub(super) fn open_object(&self, name: &str) -> Result<InBucket> {
        let length = self.length(name)?;
        Ok(InBucket { bucket: self.clone(), name: name.into(), length, ahead: Mutex::default() })
    }
}

/// An object that is read in order, mostly.
#[derive(Debug)]
pub struct InBucket {
    bucket: Bucket,
    name: String,
    length: u64,
    ahead: Mutex<Ahead>,
}

/// What was read last, and more than was asked for.
#[derive(Clone, Debug, Default)]
struct Ahead {
    start: u64,
    bytes: Bytes,
    /// Where the last read ended.
    end: u64,
    /// Bytes that the next one takes beyond its own, if it begins there.
    more: u64,
}

impl Ahead {
    fn part(&self, range: &Range<u64>) -> Option<Bytes> {
        let from = usize::try_from(range.start.checked_sub(self.start)?).ok()?;
        let to = usize::try_from(range.end.checked_sub(self.start)?).ok()?;
        (to <= self.bytes.len()).then(|| self.bytes.slice(from..to))
    }
}

impl InBucket {
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(bytes.len() as u64);
        if range.end > self.length {
            let (place, length) = (self.bucket.describe(&self.name), self.length);
            let Range { start, end } = range;
            return Err(Error::damaged(format!("{place} has {length} bytes, not those from {start} to {end}")));
        }
        let lock = || self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let before = lock().clone();
        if let Some(part) = before.part(&range) {
            lock().end = range.end;
            bytes.copy_from_slice(&part);
            return Ok(());
        }
        let goes_on = range.start == before.end && before.end > 0;
        let more = if goes_on { (before.more * 2).clamp(AHEAD.0, AHEAD.1) } else { 0 };
        let until = range.end.saturating_add(more).min(self.length);
        let read = self.bucket.get_range(&self.name, range.start..until)?;
        bytes.copy_from_slice(&read[..bytes.len()]);
        *lock() = Ahead { start: range.start, bytes: read, end: range.end, more };
        Ok(())
    }
}
