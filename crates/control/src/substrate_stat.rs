//! What a substrate holds: in the store beside its image, and in the machine's memory.

use std::collections::HashSet;

use burgeon_api::{
    ByteSize, Result,
    disk::DiskView,
    image::Image,
    substrate::{Docked, Part, SubstrateStat, SubstrateUser},
};
use burgeon_image::Stored;
use burgeon_store::{ChunkId, chunk_store::ChunkStore, map, meta::VmRow};

use crate::{
    state::{Shared, blocking},
    substrates,
};

/// Names in one request to the catalog.
const NAMES: usize = 4096;

/// # Errors
/// `Conflict` for one that is not docked; those of host and store.
pub(crate) async fn stat(state: &Shared, row: VmRow) -> Result<SubstrateStat> {
    let docked = substrates::docked(state, &row).await?;
    let image = state.host.image_of(row.id).await?;
    let disks = state.host.disks(row.id).await?;
    let clones = substrates::clones(&state.meta.vms().await?, row.id);
    let shares = state.host.shares(row.id, clones.iter().map(|clone| clone.id).collect()).await?;
    let user = |clone: VmRow| {
        let share = shares.users.iter().find(|share| share.vm == Some(clone.id)).cloned();
        let view = state.view(clone);
        SubstrateUser { name: Some(view.name), state: view.observed.name().into(), share }
    };
    let mut users: Vec<SubstrateUser> = clones.into_iter().map(user).collect();
    let waiting = shares.users.iter().filter(|share| share.vm.is_none());
    users.extend(waiting.map(|share| SubstrateUser {
        name: None,
        state: "waiting".into(),
        share: Some(share.clone()),
    }));
    let of_task = state.clone();
    blocking("look at what a substrate holds", move || {
        let stored = Holdings::of(&of_task, &row, &image, &docked, disks)?;
        Ok(SubstrateStat {
            id: row.id,
            name: row.name,
            image: row.image,
            image_stored: ByteSize(stored.image),
            memory: stored.memory,
            disks: stored.disks,
            devices: docked.devices,
            beside_image: ByteSize(stored.beside_image + docked.devices.bytes()),
            held: shares.held,
            users,
        })
    })
    .await
}

struct Holdings {
    image: u64,
    memory: Part,
    disks: Vec<(String, Part)>,
    beside_image: u64,
}

impl Holdings {
    fn of(state: &Shared, row: &VmRow, image: &Image, docked: &Docked, disks: Vec<DiskView>) -> Result<Holdings> {
        let store = &state.store;
        let of_image = image.map.as_deref().map(|map| chunks(store, map)).transpose()?.unwrap_or_default();
        // Its files, where it is still the image that the substrate was made of.
        let files = burgeon_image::list(&state.data_paths())?.into_iter().find_map(|found| match found {
            Stored::Good { image: found, stored } if found.name == row.image && found.digest == image.digest => {
                Some(stored.bytes())
            }
            _ => None,
        });
        let of_memory = chunks(store, &docked.map)?;
        let mut all = of_memory.clone();
        let memory = part(store, row.profile.memory, &of_memory, &of_image)?;
        let mut parts = Vec::new();
        for disk in disks {
            let of_disk = disk.map.as_deref().map(|map| chunks(store, map)).transpose()?.unwrap_or_default();
            parts.push((disk.name, Part { unstored: disk.own, ..part(store, disk.size, &of_disk, &of_image)? }));
            all.extend(of_disk);
        }
        Ok(Holdings {
            image: weight(store, of_image.iter())?.1 + files.unwrap_or(0),
            memory,
            disks: parts,
            beside_image: weight(store, all.difference(&of_image))?.1,
        })
    }
}

fn part(store: &ChunkStore, size: ByteSize, chunks: &HashSet<ChunkId>, of_image: &HashSet<ChunkId>) -> Result<Part> {
    let (plain, stored) = weight(store, chunks.iter())?;
    let (_, new) = weight(store, chunks.difference(of_image))?;
    Ok(Part {
        size,
        plain: ByteSize(plain),
        stored: ByteSize(stored),
        new: ByteSize(new),
        unstored: ByteSize::default(),
    })
}

/// All chunks of a map, its nodes among them.
fn chunks(store: &ChunkStore, map: &str) -> Result<HashSet<ChunkId>> {
    let mut all = HashSet::new();
    map::chunks(store, map.parse()?, &mut |_, id| Ok(all.insert(id)))?;
    Ok(all)
}

/// Plain bytes of chunks, and what they take in packs.
fn weight<'a>(store: &ChunkStore, chunks: impl Iterator<Item = &'a ChunkId>) -> Result<(u64, u64)> {
    let chunks: Vec<ChunkId> = chunks.copied().collect();
    let (mut plain, mut stored) = (0, 0);
    for some in chunks.chunks(NAMES) {
        for place in store.catalog().blocking_places(some.to_vec())?.into_iter().flatten() {
            plain += u64::from(place.length);
            stored += u64::from(place.stored);
        }
    }
    Ok((plain, stored))
}
