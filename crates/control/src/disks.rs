//! Disks of images on their way into the store, and what keeps them there.
//!
//! An image's `image.json` names its map; a root in the catalog, named after both, keeps the chunks. The root is set
//! first and removed last: whatever breaks off in between, an image that can be seen has all its chunks.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use burgeon_api::{Error, ErrorKind, Result};
use burgeon_image::{DataPaths, DiskStore, KeptDisk, Stored};
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    chunk_store::{ChunkStore, Writer, ingest},
    cut::Cutter,
    map::Map,
    remote::held_bytes,
};

/// Roots of images' disks.
pub(crate) const ROOT_KIND: &str = "image";
/// A root that no image names is left alone for so long: its image may be about to be written.
const GRACE_US: u64 = 3600 * 1_000_000;

/// Microseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "the shell that reads the clock")]
pub(crate) fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The root that keeps the disk of an image.
pub(crate) fn root(image: &str, map: ChunkId) -> NewRoot {
    NewRoot::new(ROOT_KIND, format!("{image}/{map}"), map)
}

/// Takes the disks of new images.
pub(crate) struct Keeper<'a> {
    pub(crate) store: &'a ChunkStore,
    pub(crate) data: &'a DataPaths,
    pub(crate) cancelled: &'a (dyn Fn() -> bool + Sync),
}

/// A reader that ends with an error once it is told to.
struct Cancellable<'a, R> {
    reader: R,
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl<R: Read> Read for Cancellable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.cancelled)() { Err(io::Error::other("cancelled")) } else { self.reader.read(buffer) }
    }
}

impl DiskStore for Keeper<'_> {
    fn keep(&self, image: &str, disk: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<KeptDisk> {
        let failed = |error: io::Error| Error::io(format!("read {}", disk.display()), &error);
        let file = File::open(disk).map_err(failed)?;
        let total = file.metadata().map_err(failed)?.len();
        // An older build of the same image shares most of its blocks, wherever they now are.
        let older = burgeon_image::show(self.data, image).ok().and_then(|(image, _)| image.map?.parse().ok());
        let older = older.map(|root| Map::open(self.store, root)).transpose().unwrap_or_else(|error| {
            tracing::warn!(image, %error, "the older image's disk cannot be read, so nothing is shared with it");
            None
        });
        let reader = Cancellable { reader: BufReader::with_capacity(1 << 20, file), cancelled: self.cancelled };
        let mut writer = Writer::new(self.store);
        let mut told = 0;
        let ingested = ingest(self.store, &mut writer, reader, Cutter::FastCdc16K, older, &mut |done| {
            if done - told >= 8 << 20 || done == total {
                told = done;
                progress(done, total);
            }
        });
        let map = ingested
            .map_err(|error| if (self.cancelled)() { Error::new(ErrorKind::Cancelled, "cancelled") } else { error })?;
        let space = map.map;
        let map = space.root();
        let written = writer.finish(root(image, map))?;
        tracing::info!(
            image,
            bytes = written.bytes,
            new_bytes = written.new_bytes,
            stored_bytes = written.new_stored,
            "the image's disk is stored"
        );
        let bytes = held_bytes(self.store, &space)?;
        Ok(KeptDisk { map: map.to_string(), bytes, new_bytes: written.new_bytes })
    }
}

/// Removes the roots that no image names any more; one that is being set again meanwhile, for an image that is about to be
/// there, stays. What only they kept is collected later.
/// Done before every collection. Answers how many went.
pub(crate) async fn let_go(store: &ChunkStore, data: &DataPaths) -> Result<u64> {
    let mut named = HashSet::new();
    for stored in burgeon_image::list(data)? {
        match stored {
            Stored::Good { image, .. } => named.extend(image.map.map(|map| format!("{}/{map}", image.name))),
            // What a broken one names cannot be told, so whatever has its name stays.
            Stored::Broken { name, .. } => {
                let of_image = format!("{name}/");
                let roots = store.catalog().roots(Some(ROOT_KIND)).await?;
                named.extend(roots.into_iter().map(|root| root.name).filter(|name| name.starts_with(&of_image)));
            }
        }
    }
    let now_us = now_us();
    let mut gone = 0;
    for root in store.catalog().roots(Some(ROOT_KIND)).await? {
        if !named.contains(&root.name) && root.created_us + GRACE_US < now_us {
            gone += u64::from(store.catalog().remove_root_as_seen(root).await?);
        }
    }
    Ok(gone)
}
