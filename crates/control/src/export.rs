//! Images on their way out: written to a file, or read to see whether they are whole.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use burgeon_api::{
    Error, Result,
    http::{ExportImage, Exported, Progress},
    image::Image,
    store::{Checked, Problem},
};
use burgeon_store::{
    ChunkId,
    chunk_store::{ChunkStore, Watch},
    map::{self, Map},
};
use rustix::fs::{CWD, RenameFlags};
use tokio::sync::mpsc;

use crate::{images, state::Shared, store::watch};

/// Address space in one step.
const STEP: u64 = 8 << 20;
/// Zeros of this length become holes.
const BLOCK: usize = 64 << 10;
/// Chunks in one step of a check.
const CHUNKS: usize = 128;

/// Where the bytes of an image's disk are.
enum Source {
    Map(Map),
    /// An image from before disks were in the store.
    File(File, u64),
}

/// Writes the image's disk to a raw file. The file appears under its name when it is whole.
pub(crate) fn export(state: &Shared, image: Image, request: ExportImage) -> Result<mpsc::Receiver<Progress>> {
    let file = PathBuf::from(&request.file);
    let parts = file.parent().zip(file.file_name()).filter(|_| file.is_absolute());
    let Some((directory, name)) = parts.map(|(directory, name)| (directory.to_path_buf(), name.to_os_string())) else {
        return Err(Error::invalid(format!("{} is no absolute path of a file", file.display())));
    };
    if image.disk.is_none() {
        return Err(Error::invalid(format!("image {} has no disk", image.name)));
    }
    if fs::symlink_metadata(&file).is_ok_and(|about| about.is_dir() || !request.force) {
        return Err(exists(&file));
    }
    Ok(images::run(state, move |state, tell, cancelled| {
        let source = source(state, &image)?;
        let mut unfinished = directory.join(".burgeon-").into_os_string();
        unfinished.push(burgeon_api::VmId::generate().short());
        unfinished.push("-");
        unfinished.push(&name);
        let unfinished = Unfinished(PathBuf::from(unfinished));
        let failed = |error: io::Error| Error::io(format!("write {}", file.display()), &error);
        let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished.0).map_err(failed)?;
        let mut watch = watch(true, tell, cancelled);
        let (length, written) = copy(&state.store, &source, &out, &mut watch).map_err(|error| match error {
            Problematic::Ours(error) => error,
            Problematic::Theirs(error) => failed(error),
        })?;
        watch("sync", 0, 0)?;
        out.sync_all().map_err(failed)?;
        let flags = if request.force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        rustix::fs::renameat_with(CWD, &unfinished.0, CWD, &file, flags).map_err(|error| match error {
            rustix::io::Errno::EXIST => exists(&file),
            error => failed(error.into()),
        })?;
        Ok(Progress::Exported(Exported { file: request.file, length, written }))
    }))
}

fn exists(file: &Path) -> Error {
    Error::conflict(format!("{} exists", file.display())).with_hint("choose another name, or replace it with --force")
}

/// A file that is removed unless it was renamed before.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %self.0.display(), %error, "an unfinished file stays");
        }
    }
}

/// Whose fault it is that a copy ended.
enum Problematic {
    Ours(Error),
    Theirs(io::Error),
}

fn source(state: &Shared, image: &Image) -> Result<Source> {
    if let Some(map) = &image.map {
        return Ok(Source::Map(Map::open(&*state.store, map.parse()?)?));
    }
    let path = state.layout.image(&image.name).join(Image::DISK);
    let failed = |error: io::Error| Error::io(format!("read {}", path.display()), &error);
    let file = File::open(&path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Ok(Source::File(file, length))
}

/// Copies all but zeros; answers the length and what was written.
fn copy(store: &ChunkStore, source: &Source, out: &File, watch: &mut Watch<'_>) -> Result<(u64, u64), Problematic> {
    let length = match source {
        Source::Map(map) => map.length(),
        Source::File(_, length) => *length,
    };
    out.set_len(length).map_err(Problematic::Theirs)?;
    let mut written = 0;
    let mut buffer = vec![0; usize::try_from(STEP.min(length)).unwrap_or(0)];
    let mut at = 0;
    while at < length {
        watch("export", at, length).map_err(Problematic::Ours)?;
        let end = (at + STEP).min(length);
        let bytes = &mut buffer[..usize::try_from(end - at).unwrap_or(0)];
        match source {
            Source::Map(map) => {
                let pieces = map.lookup(store, at..end).map_err(Problematic::Ours)?;
                if pieces.iter().all(|piece| piece.source.is_none()) {
                    at = end;
                    continue;
                }
                store.read_map(map, at, bytes).map_err(Problematic::Ours)?;
            }
            Source::File(file, _) => file
                .read_exact_at(bytes, at)
                .map_err(|error| Problematic::Ours(Error::io("read the image's disk", &error)))?,
        }
        for (index, block) in bytes.chunks(BLOCK).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                out.write_all_at(block, at + (index * BLOCK) as u64).map_err(Problematic::Theirs)?;
                written += block.len() as u64;
            }
        }
        at = end;
    }
    Ok((length, written))
}

/// Reads every chunk of the image's disk. That its other files are there was seen when the image was looked up.
pub(crate) fn verify(state: &Shared, image: Image) -> mpsc::Receiver<Progress> {
    images::run(state, move |state, tell, cancelled| {
        let mut checked = Checked::default();
        if let Some(root) = &image.map {
            let mut watch = watch(false, tell, cancelled);
            verify_map(&state.store, &image.name, root.parse()?, &mut checked, &mut watch)?;
        }
        Ok(Progress::Checked(checked))
    })
}

fn verify_map(
    store: &ChunkStore,
    image: &str,
    root: ChunkId,
    checked: &mut Checked,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let problem = |error: Error| Problem { place: format!("image {image}"), what: error.message };
    let mut chunks = HashSet::new();
    watch("map", 0, 0)?;
    // A map that breaks off still names what was read of it. Data may have the bytes of a node.
    let walked = map::chunks(store, root, &mut |kind, id| Ok(chunks.insert((kind, id))));
    let mut chunks: Vec<ChunkId> = chunks.into_iter().map(|(_, id)| id).collect();
    chunks.sort_unstable();
    chunks.dedup();
    for some in chunks.chunks(CHUNKS) {
        watch("verify", checked.chunks, chunks.len() as u64)?;
        match store.get_many(some) {
            Ok(read) => checked.bytes += read.iter().map(|chunk| chunk.len() as u64).sum::<u64>(),
            Err(_) => {
                for id in some {
                    match store.get_many(&[*id]) {
                        Ok(read) => checked.bytes += read.iter().map(|chunk| chunk.len() as u64).sum::<u64>(),
                        Err(error) => checked.problems.push(problem(error)),
                    }
                }
            }
        }
        checked.chunks += some.len() as u64;
    }
    checked.roots = 1;
    if let Err(error) = walked
        && checked.problems.is_empty()
    {
        checked.problems.push(problem(error));
    }
    Ok(())
}
