//! Images of VMs' disks. The host process stores the disk and keeps it for a while; this makes the image of it.

use burgeon_api::{
    ByteSize, Error, ErrorKind, Result, VmId,
    host::{DiskRequest, Handover, StoredDisk},
    http::{CommitImage, Progress},
    image::Image,
    vm::Observed,
};
use burgeon_image::{CommitRequest, DataPaths, DiskDigest, KeptDisk};
use burgeon_store::{
    ChunkId,
    chunk_store::{ChunkStore, Watch},
    hold::{Hold, Purpose},
    map::{self, Map},
    remote::{held_bytes, held_bytes_in},
    steps::{Step, reached},
};
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    disks,
    host_client::Storing,
    images,
    state::{Shared, blocking, now_s},
    store::watch,
};

/// Address space in one step.
const STEP: u64 = 8 << 20;

/// An image that is wanted, and the one that its VM was started from.
struct Wanted {
    from: Image,
    vm: String,
    name: String,
    message: String,
}

impl Wanted {
    fn request<'a>(&'a self, data: &'a DataPaths) -> CommitRequest<'a> {
        let Wanted { from, vm, name, message } = self;
        CommitRequest { data, from, vm, name, description: message, now_s: now_s() }
    }
}

/// Makes an image of a VM's root disk.
///
/// # Errors
/// Those of the request: a name that is taken, a VM that has no disk, is starting, or has lost its kernel.
pub(crate) async fn commit(state: &Shared, request: CommitImage) -> Result<mpsc::Receiver<Progress>> {
    let row = state.meta.vm(&request.vm).await?;
    let (id, vm) = (row.id, row.name.clone());
    if state.view(row).observed == Observed::Pending {
        return Err(Error::conflict(format!("VM {vm} is pending: it has no disk yet"))
            .with_hint("try again once it runs or has stopped"));
    }
    let from = state.host.image_of(id).await?;
    let wanted = Wanted { from, vm, name: request.name, message: request.message };
    let data = state.data_paths();
    let wanted = blocking("look at the image", move || {
        burgeon_image::check_commit(&wanted.request(&data))?;
        Ok(wanted)
    })
    .await?;
    let root = VmId::generate().to_string();
    let disk = burgeon_api::disk::ROOT.to_string();
    let hand_over = DiskRequest::HandOver { disk, snapshot: request.snapshot, root: root.clone() };
    let storing = state.host.hand_over(id, hand_over).await?;
    Ok(images::run(state, move |state, tell, cancelled| {
        let stored = Handle::current().block_on(receive(storing, tell, cancelled))?;
        reached(Step::HandoverReceived);
        let map: ChunkId = stored.map.parse()?;
        // From here on the root is ours; it goes when this ends, whichever way.
        let _handed_over =
            Hold::of(&state.store, Purpose::HandedOver, &Hold::root(&state.store, Purpose::HandedOver, root, map));
        let image = make(state, &wanted, &stored, &mut watch(true, tell, cancelled))?;
        tracing::info!(image = image.name, vm = wanted.vm, "a disk became an image");
        Ok(Progress::Image(Box::new(image)))
    }))
}

/// Follows the host until the disk is stored.
async fn receive(
    mut storing: Storing,
    tell: &(dyn Fn(Progress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<StoredDisk> {
    loop {
        if cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
        }
        match storing.next().await? {
            Handover::Step { done, total } => {
                tell(Progress::Step { phase: "store".into(), done, total, bytes: true });
            }
            Handover::Note(note) => tell(Progress::Note(note)),
            Handover::Stored(stored) => return Ok(stored),
            Handover::Failed(error) => return Err(error),
        }
    }
}

fn make(state: &Shared, wanted: &Wanted, stored: &StoredDisk, watch: &mut Watch<'_>) -> Result<Image> {
    let map = Map::open(&*state.store, stored.map.parse()?)?;
    let digest = digest(&state.store, &map, watch)?;
    let (bytes, new_bytes) = (held_bytes(&state.store, &map)?, changed_bytes(&state.store, &wanted.from, &map)?);
    let disk = KeptDisk { map: stored.map.clone(), bytes, new_bytes };
    let root = disks::root(&wanted.name, map.root());
    state.store.catalog().blocking_share_root(root, disks::now_us())?;
    reached(Step::ImageKept);
    let data = state.data_paths();
    let image = burgeon_image::commit(&wanted.request(&data), ByteSize(stored.size), &digest, &disk)?;
    reached(Step::ImagePublished);
    Ok(image)
}

/// Bytes where the disk is not as that of the image that its VM was started from. Who stored them, and when, does not matter.
fn changed_bytes(store: &ChunkStore, from: &Image, map: &Map) -> Result<u64> {
    let Some(before) = &from.map else { return Ok(0) };
    let changed = map::diff(store, &Map::open(store, before.parse()?)?, map)?;
    changed.into_iter().map(|range| held_bytes_in(store, map, range.start..range.end.min(map.length()))).sum()
}

/// Reads all of a disk. So it is also seen that an image's disk can be read before there is an image.
fn digest(store: &ChunkStore, map: &Map, watch: &mut Watch<'_>) -> Result<String> {
    let length = map.length();
    let mut digest = DiskDigest::new(length);
    let mut buffer = vec![0; usize::try_from(STEP.min(length)).unwrap_or(0)];
    let block = usize::try_from(DiskDigest::BLOCK).unwrap_or(usize::MAX);
    let mut at = 0;
    while at < length {
        watch("digest", at, length)?;
        let end = (at + STEP).min(length);
        if map.lookup(store, at..end)?.iter().any(|piece| piece.source.is_some()) {
            let bytes = &mut buffer[..usize::try_from(end - at).unwrap_or(0)];
            store.read_map(map, at, bytes)?;
            for (index, bytes) in bytes.chunks(block).enumerate() {
                digest.add(at + (index * block) as u64, bytes);
            }
        }
        at = end;
    }
    watch("digest", length, length)?;
    Ok(digest.finish())
}
