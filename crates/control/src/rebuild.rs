//! A new catalog for the store of a data directory that no server has open: the packs, and what names their roots.

use std::path::Path;

use burgeon_api::{
    Result,
    http::Progress,
    store::{Problem, Rebuilt},
};
use burgeon_host::layout::{Layout, Lock};
use burgeon_image::{DataPaths, Stored};
use burgeon_store::{
    chunk_store::{self, NamedRoot},
    places::Elsewhere,
};

use crate::{disks, store::watch};

/// Makes a new catalog in place of a lost or damaged one. Blocks.
///
/// # Errors
/// `Conflict` while a server has the data directory; those of the file system, after which the old catalog is where it
/// was. What cannot be read is in the answer.
pub fn rebuild(
    data: &Path,
    elsewhere: &Elsewhere,
    tell: &(dyn Fn(Progress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Rebuilt> {
    let layout = Layout::create(data)?;
    // Whoever could have the store open.
    let _locks = Lock::take_all(&layout)?;
    let mut problems = Vec::new();
    let mut roots = of_images(&layout, &mut problems)?;
    roots.extend(of_disks(&layout, &mut problems)?);
    let mut watch = watch(false, tell, cancelled);
    let mut rebuilt =
        chunk_store::rebuild(elsewhere.settled(&layout.files())?, &burgeon_host::store_source(), &roots, &mut watch)?;
    rebuilt.problems.extend(problems);
    Ok(rebuilt)
}

/// What images name.
fn of_images(layout: &Layout, problems: &mut Vec<Problem>) -> Result<Vec<NamedRoot>> {
    let data = DataPaths { images: layout.images(), cache: layout.cache(), temporary: layout.temporary() };
    let mut roots = Vec::new();
    for stored in burgeon_image::list(&data)? {
        match stored {
            Stored::Good { image, .. } => {
                if let Some(map) = &image.map {
                    roots.push(NamedRoot {
                        kind: disks::ROOT_KIND.into(),
                        name: format!("{}/{map}", image.name),
                        map: map.parse()?,
                    });
                }
            }
            Stored::Broken { name, error } => problems.push(Problem {
                place: format!("image {name}"),
                what: format!("what it keeps cannot be told: {}", error.message),
            }),
        }
    }
    Ok(roots)
}

/// What the disks of VMs stand on.
fn of_disks(layout: &Layout, problems: &mut Vec<Problem>) -> Result<Vec<NamedRoot>> {
    let roots = burgeon_host::disk_roots(layout, problems)?;
    Ok(roots.into_iter().map(|(name, map)| NamedRoot { kind: "disk".into(), name, map }).collect())
}
