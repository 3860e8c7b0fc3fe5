//! Layers of an OCI image, one above the other in a tree (image-spec 1.1, "Image Layer Filesystem Changeset").

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read},
};

use burgeon_api::{ByteSize, Error, Result, history::Container, path_text::printable};

use super::{
    Contents, Import,
    layout::{Chosen, Descriptor, Layout},
};
use crate::{
    room::Bounded,
    tree::{Tree, parent, shown},
};

/// What begins the name of a whiteout: the rest names what is gone from the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// All that the layers below have in the directory is gone.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The layer that is being applied.
#[derive(Default)]
pub(super) struct Layer {
    /// What it has added: its own whiteouts do not touch that.
    added: BTreeSet<Vec<u8>>,
}

impl Layer {
    /// Applies an entry that says what is gone. Whether it is one.
    pub(super) fn whiteout(&self, tree: &mut Tree, path: &[u8]) -> Result<bool> {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        let directory = parent(path);
        if name == OPAQUE {
            for below in tree.below(directory) {
                self.remove(tree, &below)?;
            }
            return Ok(true);
        }
        let Some(gone) = name.strip_prefix(WHITEOUT) else { return Ok(false) };
        if gone.starts_with(WHITEOUT) {
            // A file of the driver that wrote the layer.
            return Ok(true);
        }
        if gone.is_empty() || gone == b"." || gone == b".." {
            return Err(Error::invalid(format!("/{} says that nothing is gone", shown(path))));
        }
        let mut target = directory.to_vec();
        if !target.is_empty() {
            target.push(b'/');
        }
        target.extend(gone);
        self.remove(tree, &target)?;
        Ok(true)
    }

    /// Removes what the layers below have of a path. What is not there is gone already.
    fn remove(&self, tree: &mut Tree, path: &[u8]) -> Result<()> {
        if tree.get(path).is_none() {
            return Ok(());
        }
        let mut inside = path.to_vec();
        inside.push(b'/');
        let added_inside = self.added.range(inside.clone()..).next().is_some_and(|added| added.starts_with(&inside));
        if !added_inside && !self.added.contains(path) {
            return tree.remove(path);
        }
        // The deepest first, so that a directory that is left empty goes too.
        for below in tree.below(path).into_iter().rev() {
            if !self.added.contains(&below) && tree.below(&below).is_empty() {
                tree.remove(&below)?;
            }
        }
        Ok(())
    }

    pub(super) fn add(&mut self, path: Vec<u8>) {
        self.added.insert(path);
    }
}

impl Import<'_> {
    /// Applies the layers of the image for the wished platform.
    pub(super) fn layers(&self, layout: &Layout, tree: &mut Tree) -> Result<(Contents, Container)> {
        let Chosen { digest, platform, manifest, run } = layout.choose(self.request.platform.as_deref())?;
        let mut contents = Contents { bytes: 0, newest: 0 };
        let mut left = self.request.max_size.bytes();
        let total = manifest.layers.len() as u64;
        for (index, blob) in manifest.layers.iter().enumerate() {
            let done = index as u64;
            (self.progress)(burgeon_api::http::Progress::Step { phase: "layers".into(), done, total, bytes: false });
            // A layer comes apart only after all of it was compared: what is not as told never reaches a decompressor.
            layout.verify(blob, self.limits)?;
            let mut archive = Bounded::new(decompressed(layout, blob)?, ByteSize(left));
            let unpacked = self.unpack(tree, &mut archive, &mut contents, Some(&mut Layer::default()));
            if unpacked.is_ok() {
                // What stands behind the archive's end is nothing, or more than anybody wants: only that matters.
                drop(std::io::copy(&mut archive, &mut std::io::sink()));
            }
            if archive.over {
                return Err(self.inflated());
            }
            unpacked.map_err(|error| error.context(format!("layer {}", blob.digest)))?;
            left = archive.left();
        }
        let container = Container {
            manifest: digest,
            platform,
            env: run.env.unwrap_or_default(),
            entrypoint: run.entrypoint.unwrap_or_default(),
            command: run.cmd.unwrap_or_default(),
            working_directory: run.working_dir.unwrap_or_default(),
            user: run.user.unwrap_or_default(),
        };
        Ok((contents, container))
    }
}

/// The tar of a layer, which was verified. How it is compressed is told by its first bytes, as runtimes do.
fn decompressed(layout: &Layout, blob: &Descriptor) -> Result<Box<dyn Read>> {
    let kind = blob.media_type.as_str();
    if !kind.is_empty() && !kind.contains("layer") && !kind.contains("rootfs.diff") {
        return Err(Error::refused(format!("{} is of type {}, and no layer", blob.digest, printable(kind))));
    }
    let failed = |error: std::io::Error| Error::io(format!("read blob {}", blob.digest), &error);
    let mut reader = BufReader::new(layout.verified(blob)?);
    let head = reader.fill_buf().map_err(failed)?;
    Ok(if head.starts_with(b"\x1f\x8b") {
        Box::new(flate2::bufread::MultiGzDecoder::new(reader))
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        // Its window is at most 128 MiB, whatever the bytes ask for.
        Box::new(zstd::stream::read::Decoder::with_buffer(reader).map_err(failed)?)
    } else {
        Box::new(reader)
    })
}
