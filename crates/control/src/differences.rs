//! What differs between two images: the facts in their metadata, and the bytes of their disks.
//!
//! Two maps that share a subtree are the same below it, so most of what is the same is never looked at. What is left
//! may still hold the same bytes, cut otherwise: those stretches are read and compared.

use std::{collections::BTreeSet, ops::Range};

use burgeon_api::{
    Error, Result,
    differences::{Chunks, DiffImage, Differences, Extent, Fact, Side},
    http::Progress,
    image::{Boot, Image},
};
use burgeon_store::{
    ChunkId,
    chunk::Kind,
    chunk_store::{ChunkStore, Watch},
    map::{self, Map},
};
use tokio::sync::mpsc;

use crate::{images, state::Shared, store::watch};

/// Address space that is read and compared in one step.
const STEP: u64 = 8 << 20;
/// What is told of bytes that differ is in blocks of this size.
const BLOCK: usize = 4 << 10;
/// Names in one request to the catalog.
const NAMES: usize = 4096;
/// The most stretches that are listed: an answer has to fit into memory.
const MOST_EXTENTS: usize = 1 << 20;

/// Compares two images.
pub(crate) fn differences(state: &Shared, a: Image, b: Image, request: &DiffImage) -> Result<mpsc::Receiver<Progress>> {
    for image in [&a, &b] {
        if image.disk.is_some() && image.map.is_none() {
            return Err(Error::refused(format!("the disk of image {} is not in the store", image.name))
                .with_hint("build or import it again"));
        }
    }
    let listed = request.extents;
    Ok(images::run(state, move |state, tell, cancelled| {
        let files = |image: &Image| -> Result<Vec<(&'static str, String)>> {
            let directory = state.layout.image(&image.name);
            let name = |file: &'static str| -> Result<(&'static str, String)> {
                if image.boot == Boot::Firmware {
                    return Ok((file, "none".into()));
                }
                let bytes = std::fs::read(directory.join(file))
                    .map_err(|error| Error::io(format!("read {file} of image {}", image.name), &error))?;
                Ok((file, format!("{} bytes, BLAKE3 {}", bytes.len(), ChunkId::of(&bytes))))
            };
            Ok(vec![name(Image::KERNEL)?, name(Image::INITRAMFS)?])
        };
        let facts = facts(&a, &b, files(&a)?, &files(&b)?);
        let mut watch = watch(true, tell, cancelled);
        let disks = compare(&state.store, root(&a)?, root(&b)?, &mut watch)?;
        let side = |image: Image, only_here: Chunks| Side {
            image: image.name,
            digest: image.digest,
            disk: image.disk,
            only_here,
        };
        if listed && disks.extents.len() > MOST_EXTENTS {
            return Err(Error::refused(format!("{} stretches differ, too many to list", disks.extents.len()))
                .with_hint("leave out --extents"));
        }
        Ok(Progress::Differences(Box::new(Differences {
            a: side(a, disks.only_a),
            b: side(b, disks.only_b),
            facts,
            different_bytes: disks.extents.iter().map(|extent| extent.length).sum(),
            in_both: disks.in_both,
            shared_permille: permille(disks.in_both.bytes, disks.in_both.bytes + disks.only_b.bytes),
            extents: listed.then_some(disks.extents),
        })))
    }))
}

fn root(image: &Image) -> Result<Option<ChunkId>> {
    image.map.as_deref().map(str::parse).transpose()
}

/// Where there is nothing, nothing is missing.
fn permille(part: u64, all: u64) -> u64 {
    if all == 0 {
        return 1000;
    }
    u64::try_from(u128::from(part) * 1000 / u128::from(all)).unwrap_or(1000)
}

/// What the metadata of two images does not have in common.
fn facts(a: &Image, b: &Image, of_a: Vec<(&'static str, String)>, of_b: &[(&'static str, String)]) -> Vec<Fact> {
    let size = |image: &Image| image.disk.map_or_else(|| "none".to_string(), |size| size.to_string());
    let boot = |image: &Image| match image.boot {
        Boot::Agent => "agent",
        Boot::Firmware => "firmware",
    };
    let rows = [
        ("boot", boot(a).to_string(), boot(b).to_string()),
        ("kernel release", a.kernel_release.clone(), b.kernel_release.clone()),
        ("kernel parameters", a.kernel_parameters.join(" "), b.kernel_parameters.join(" ")),
        ("modules", a.modules.join(" "), b.modules.join(" ")),
        ("init", a.init.clone(), b.init.clone()),
        ("disk", size(a), size(b)),
        ("recipe", a.recipe.clone(), b.recipe.clone()),
        ("description", a.description.clone(), b.description.clone()),
    ];
    let files = of_a.into_iter().zip(of_b).map(|((file, a), (_, b))| (file, a, b.clone()));
    rows.into_iter()
        .chain(files)
        .filter(|(_, a, b)| a != b)
        .map(|(what, a, b)| Fact { what: what.into(), a, b })
        .collect()
}

#[derive(Default)]
struct Disks {
    only_a: Chunks,
    only_b: Chunks,
    in_both: Chunks,
    extents: Vec<Extent>,
}

fn compare(store: &ChunkStore, a: Option<ChunkId>, b: Option<ChunkId>, watch: &mut Watch<'_>) -> Result<Disks> {
    watch("map", 0, 0)?;
    let chunks = |root: Option<ChunkId>| -> Result<BTreeSet<ChunkId>> {
        let mut found = BTreeSet::new();
        if let Some(root) = root {
            map::chunks(store, root, &mut |kind, id| {
                if kind == Kind::Data {
                    found.insert(id);
                }
                Ok(true)
            })?;
        }
        Ok(found)
    };
    let (of_a, of_b) = (chunks(a)?, chunks(b)?);
    let mut disks = Disks {
        only_a: measured(store, of_a.difference(&of_b))?,
        only_b: measured(store, of_b.difference(&of_a))?,
        in_both: measured(store, of_a.intersection(&of_b))?,
        extents: Vec::new(),
    };
    drop((of_a, of_b));
    let open = |root: Option<ChunkId>, length: u64| match root {
        Some(root) => Map::open(store, root),
        None => Map::empty(length),
    };
    // An image without a disk has one of no bytes.
    let (a, b) = (open(a, 0)?, open(b, 0)?);
    let ranges = map::diff(store, &a, &b)?;
    let total = ranges.iter().map(|range| range.end - range.start).sum();
    let mut done = 0;
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            watch("compare", done, total)?;
            let end = (at + STEP).min(range.end);
            compare_bytes(store, (&a, &b), at..end, &mut disks.extents)?;
            done += end - at;
            at = end;
        }
    }
    Ok(disks)
}

/// How many chunks, and how long.
fn measured<'a>(store: &ChunkStore, ids: impl Iterator<Item = &'a ChunkId>) -> Result<Chunks> {
    let mut measured = Chunks::default();
    let ids: Vec<ChunkId> = ids.copied().collect();
    for some in ids.chunks(NAMES) {
        for (id, place) in some.iter().zip(store.catalog().blocking_places(some.to_vec())?) {
            let place = place.ok_or_else(|| {
                Error::damaged(format!("{id:?} is not in the store"))
                    .with_hint("burgeon store fsck tells what misses it")
            })?;
            measured.chunks += 1;
            measured.bytes += u64::from(place.length);
        }
    }
    Ok(measured)
}

/// Adds the blocks of a stretch that are not the same. What lies behind the shorter map's end differs.
fn compare_bytes(store: &ChunkStore, (a, b): (&Map, &Map), range: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
    let both = range.end.min(a.length()).min(b.length());
    if range.start < both {
        let length = usize::try_from(both - range.start).unwrap_or(0);
        let (mut of_a, mut of_b) = (vec![0; length], vec![0; length]);
        store.read_map(a, range.start, &mut of_a)?;
        store.read_map(b, range.start, &mut of_b)?;
        // Blocks of the disk, not of the range: the first one may be short.
        let first = (BLOCK - usize::try_from(range.start % BLOCK as u64).unwrap_or(0)).min(length);
        let mut at = 0;
        let mut end = first;
        while at < length {
            if of_a[at..end] != of_b[at..end] {
                add(extents, range.start + at as u64, (end - at) as u64);
            }
            at = end;
            end = (at + BLOCK).min(length);
        }
    }
    let from = range.start.max(both);
    if from < range.end {
        add(extents, from, range.end - from);
    }
    Ok(())
}

/// Adds a stretch, or makes the last one longer where it goes on.
fn add(extents: &mut Vec<Extent>, offset: u64, length: u64) {
    match extents.last_mut() {
        Some(last) if last.offset + last.length == offset => last.length += length,
        _ => extents.push(Extent { offset, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_that_touch_are_one_and_shares_are_of_what_there_is() {
        let mut extents = Vec::new();
        for (offset, length) in [(0, 4096), (4096, 100), (8192, 4096)] {
            add(&mut extents, offset, length);
        }
        assert_eq!(extents, [Extent { offset: 0, length: 4196 }, Extent { offset: 8192, length: 4096 }]);
        assert_eq!(
            (permille(1, 4), permille(0, 0), permille(0, 3), permille(u64::MAX, u64::MAX)),
            (250, 1000, 0, 1000)
        );
    }
}
