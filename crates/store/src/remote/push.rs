//! A copy of an image to a remote: only chunks that no pack known there holds, then the manifest, then `latest.json`.

use std::{collections::HashSet, path::Path, sync::Arc};

use burgeon_api::{Error, ErrorKind, Result, image::Image};

use super::{
    Manifest, Remote, StoredFile, StoredPack,
    index::Index,
    latest_name,
    manifest::{self, FORMAT, Latest},
    manifest_name,
};
use crate::{
    ChunkId, PackId,
    bundle::hold_file,
    chunk::Kind,
    chunk_store::{ChunkStore, Watch, object_name},
    hold::{Hold, Purpose},
    map,
    pack::{PACK_BYTES_REMOTE, PackWriter},
};

/// Chunks that are read at a time.
const BATCH: usize = 128;
/// Names in one request to the catalog.
const NAMES: usize = 4096;

/// What a push did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// All chunks of the image, and their plain bytes.
    pub chunks: u64,
    pub bytes: u64,
    /// Those that were sent, and the bytes of their packs.
    pub new_chunks: u64,
    pub new_bytes: u64,
    pub sent_bytes: u64,
}

/// Copies an image, whose files lie in `directory`, to a remote. `hold` is a name that nobody else uses.
///
/// # Errors
/// Those of the store and of the remote; `Conflict` where somebody else pushed the image at the same moment. Packs may be
/// left that nothing names.
pub fn push(
    store: &Arc<ChunkStore>,
    remote: &Remote,
    image: &Image,
    directory: &Path,
    hold: &str,
    watch: &mut Watch<'_>,
) -> Result<Pushed> {
    watch("look", 0, 0)?;
    let latest = remote.latest(&image.name)?;
    // One that does not read is replaced only if it is damaged: a newer Burgeon's stays.
    let existing = match remote.read_manifest(&image.name, &image.digest) {
        Err(error) if error.kind == ErrorKind::Damaged => Existing::Damaged,
        Err(error) => return Err(error),
        Ok(None) => Existing::No,
        Ok(Some((manifest, tag))) => Existing::Yes(Box::new(manifest), tag),
    };
    let mut holds = Vec::new();
    let mut roots = Vec::new();
    if let Some(map) = &image.map {
        let map = map.parse()?;
        holds.push(Hold::share(store, Purpose::Pushed, format!("{hold}/disk"), map)?);
        roots.push(map);
    }
    let mut files = Vec::new();
    for name in [Image::KERNEL, Image::INITRAMFS] {
        let path = directory.join(name);
        if path.exists() {
            let (length, kept) = hold_file(store, Purpose::Pushed, &path, format!("{hold}/{name}"))?;
            files.push(StoredFile { name: name.into(), length, map: kept.map().to_string() });
            roots.push(kept.map());
            holds.push(kept);
        }
    }
    let chunks = map::all_chunks(&**store, &roots)?;
    let mut index = Index::default();
    let packs = known_packs(remote, image)?;
    index.add(remote, &packs, watch)?;
    for problem in &index.problems {
        tracing::warn!(remote = remote.url(), error = %problem, "a pack of the remote cannot be relied on");
    }
    let mut pushed = send(store, remote, &chunks, &mut index, watch)?;
    pushed.chunks = chunks.len() as u64;

    let manifest = Manifest {
        format: FORMAT,
        image: image.clone(),
        files,
        packs: index.packs_of(chunks.iter().map(|(_, id)| id)),
    };
    let object = manifest_name(&image.name, &image.digest);
    let text = manifest::text(&manifest)?;
    match existing {
        // The first one stays as long as all that it needs is there.
        Existing::Yes(there, _) if pushed.new_chunks == 0 && covers(&there, &manifest) => {}
        Existing::Yes(_, tag) => remote.wait(remote.objects.replace(&object, text.into(), Some(tag)))?,
        Existing::No => remote.wait(remote.objects.replace(&object, text.into(), None))?,
        Existing::Damaged => {
            remote.wait(remote.objects.delete(&object))?;
            remote.wait(remote.objects.replace(&object, text.into(), None))?;
        }
    }
    if latest.as_ref().is_none_or(|(digest, _)| *digest != image.digest) {
        watch("publish", 0, 0)?;
        let text = manifest::text(&Latest { format: FORMAT, digest: image.digest.clone() })?;
        let tag = latest.map(|(_, tag)| tag);
        remote.wait(remote.objects.replace(&latest_name(&image.name), text.into(), tag))?;
    }
    drop(holds);
    Ok(pushed)
}

/// The manifest that lies under the name of the new one.
enum Existing {
    No,
    Damaged,
    Yes(Box<Manifest>, crate::objects::Tag),
}

/// Whether an older manifest of the same contents tells all of the packs in which they are found now.
fn covers(there: &Manifest, new: &Manifest) -> bool {
    let packs: HashSet<&StoredPack> = there.packs.iter().collect();
    there.image.map == new.image.map && there.files == new.files && new.packs.iter().all(|pack| packs.contains(pack))
}

/// The packs that manifests name: all versions of this image, and of each other one the latest.
fn known_packs(remote: &Remote, image: &Image) -> Result<Vec<StoredPack>> {
    let mut packs = Vec::new();
    let mut others: Vec<String> = Vec::new();
    let mut add = |name: &str, digest: &str| match remote.read_manifest(name, digest) {
        Ok(Some((manifest, _))) => {
            packs.extend(manifest.packs);
            Ok(())
        }
        Ok(None) => Ok(()),
        // What they hold is not relied on.
        Err(error) if matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused) => {
            tracing::warn!(remote = remote.url(), %error, "a manifest of the remote does not read");
            Ok(())
        }
        Err(error) => Err(error),
    };
    for (name, digest) in remote.versions("images")? {
        if name == image.name {
            add(&name, &digest)?;
        } else if others.last() != Some(&name) {
            others.push(name);
        }
    }
    for name in others {
        if let Ok(Some((digest, _))) = remote.latest(&name) {
            add(&name, &digest)?;
        }
    }
    packs.sort_unstable();
    packs.dedup();
    Ok(packs)
}

/// Sends the chunks that the index does not know, in new packs, which it then knows.
fn send(
    store: &ChunkStore,
    remote: &Remote,
    chunks: &[(Kind, ChunkId)],
    index: &mut Index,
    watch: &mut Watch<'_>,
) -> Result<Pushed> {
    let mut pushed = Pushed::default();
    let mut missing: Vec<(Kind, ChunkId)> = Vec::new();
    let mut total = 0;
    for some in chunks.chunks(NAMES) {
        let ids = some.iter().map(|(_, id)| *id).collect();
        for ((kind, id), place) in some.iter().zip(store.catalog().blocking_places(ids)?) {
            // One that is gone is told when it is read.
            let length = place.map_or(0, |place| u64::from(place.length));
            pushed.bytes += length;
            if index.place(id).is_none() {
                missing.push((*kind, *id));
                total += length;
            }
        }
    }
    let mut done = 0;
    let mut pack: Option<PackWriter<Vec<u8>>> = None;
    for some in missing.chunks(BATCH) {
        watch("push", done, total)?;
        let ids: Vec<ChunkId> = some.iter().map(|(_, id)| *id).collect();
        for ((kind, _), encoded) in some.iter().zip(store.encoded(&ids)?) {
            let writer = match &mut pack {
                Some(writer) => writer,
                none => none.insert(PackWriter::new(PackId((store.source.uuid)()), Vec::new())?),
            };
            writer.append(*kind, &encoded)?;
            done += u64::from(encoded.length);
            pushed.new_chunks += 1;
            pushed.new_bytes += u64::from(encoded.length);
            if writer.length() >= PACK_BYTES_REMOTE {
                watch("push", done, total)?;
                close(remote, pack.take(), index, &mut pushed)?;
            }
        }
    }
    close(remote, pack, index, &mut pushed)?;
    watch("push", done, total)?;
    Ok(pushed)
}

fn close(remote: &Remote, pack: Option<PackWriter<Vec<u8>>>, index: &mut Index, pushed: &mut Pushed) -> Result<()> {
    let Some(pack) = pack else { return Ok(()) };
    let pack = pack.finish()?;
    remote.put_pack(&object_name(pack.pack), pack.sink)?;
    let chunks = u32::try_from(pack.entries.len()).map_err(|_| Error::internal("a pack has too many chunks"))?;
    let stored = StoredPack { pack: pack.pack.to_string(), length: pack.length, chunks };
    index.add_written(stored, pack.pack, &pack.entries);
    pushed.sent_bytes += pack.length;
    Ok(())
}
