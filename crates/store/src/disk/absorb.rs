//! Storing a sealed layer: what it holds goes into chunks, above the map that it lies on.
//!
//! A chunk is what was written in one window of 64 KiB, from the first block of a run to its last. What lies between runs
//! stays in the chunks that it is in, so nothing is read from below, and little that is old is stored again.

use std::{ops::Range, path::Path};

use burgeon_api::{Error, Result};

use super::{layer::Layer, states::State};
use crate::{
    ChunkId,
    catalog::NewRoot,
    chunk_store::{ChunkStore, Watch, Writer, Written},
    map::Map,
};

const WINDOW: u64 = 64 << 10;

/// Stores the sealed layer at `path` above `base`, and sets the root that `root` makes of the new map. `watch` is told the
/// bytes done.
///
/// The caller keeps a root over `base` from before this until after it: what the new map has of it is not looked at, and
/// without a root it may be collected.
///
/// # Errors
/// Where the layer does not read; those of the store and of `watch`. Then nothing names what was stored.
pub fn absorb(
    store: &ChunkStore,
    base: Option<ChunkId>,
    path: &Path,
    root: impl FnOnce(ChunkId) -> NewRoot,
    watch: &mut Watch<'_>,
) -> Result<(Map, Written)> {
    let layer = Layer::open_sealed(path)?;
    let failed = |error: std::io::Error| Error::io(format!("read the layer {}", path.display()), &error);
    let base = base.map_or_else(|| Map::empty(layer.size()), |base| Map::open(store, base))?;
    let mut edit = base.edit();
    edit.resize(layer.size())?;
    let mut writer = Writer::new(store);
    let mut written: Vec<Range<u64>> = Vec::new();
    let (total, mut done) = (layer.data_bytes(), 0);
    let mut at = 0;
    while at < layer.size() {
        let (state, length) = layer.run(at, layer.size());
        let run = at..at + length;
        at = run.end;
        match state {
            State::Absent => continue,
            State::Zero => edit.clear(run)?,
            State::Data => {
                for piece in windows(run) {
                    watch("store", done, total)?;
                    let mut bytes = vec![0; usize::try_from(piece.end - piece.start).unwrap_or(0)];
                    layer.read(piece.start, &mut bytes).map_err(failed)?;
                    done += bytes.len() as u64;
                    if bytes.iter().all(|byte| *byte == 0) {
                        edit.clear(piece)?;
                    } else {
                        writer.put(bytes)?;
                        written.push(piece);
                    }
                }
            }
        }
    }
    for (piece, chunk) in written.into_iter().zip(writer.names()?) {
        edit.set(piece, *chunk, 0)?;
    }
    watch("store", total, total)?;
    let map = edit.finish(store, &mut writer)?;
    Ok((map, writer.finish(root(map.root()))?))
}

/// The map `base` with zeros behind its end, up to `length` bytes; `root` makes the new map's root. The caller keeps a root
/// over `base`, as for [`absorb`].
///
/// # Errors
/// Those of the store; `Invalid` for a length that no map has.
pub fn lengthen(store: &ChunkStore, base: ChunkId, length: u64, root: impl FnOnce(ChunkId) -> NewRoot) -> Result<Map> {
    let mut edit = Map::open(store, base)?.edit();
    edit.resize(length)?;
    let mut writer = Writer::new(store);
    let map = edit.finish(store, &mut writer)?;
    writer.finish(root(map.root()))?;
    Ok(map)
}

fn windows(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = run.start;
    std::iter::from_fn(move || {
        let start = at;
        at = run.end.min((start / WINDOW + 1) * WINDOW);
        (start < run.end).then_some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_do_not_depend_on_where_a_run_begins() {
        let of = |run| windows(run).collect::<Vec<_>>();
        assert_eq!(of(4096..WINDOW * 2 + 512), [4096..WINDOW, WINDOW..WINDOW * 2, WINDOW * 2..WINDOW * 2 + 512]);
        assert_eq!(of(WINDOW..WINDOW + 4096), vec![WINDOW..WINDOW + 4096]);
        assert!(of(7..7).is_empty());
    }
}
