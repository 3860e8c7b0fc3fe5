//! A new catalog for the store of a data directory that no server has open: the packs, and what names their roots.

use std::{fs, path::Path};

use burgeon_api::{
    Error, Result,
    http::Progress,
    store::{Problem, Rebuilt},
};
use burgeon_host::layout::{Layout, Lock};
use burgeon_image::{DataPaths, Stored};
use burgeon_store::chunk_store::{self, NamedRoot};

use crate::{disks, store::watch};

/// Makes a new catalog in place of a lost or damaged one. Blocks.
///
/// # Errors
/// `Conflict` while a server has the data directory; those of the file system, after which the old catalog is where it
/// was. What cannot be read is in the answer.
pub fn rebuild(
    data: &Path,
    tell: &(dyn Fn(Progress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Rebuilt> {
    let layout = Layout::create(data)?;
    // Whoever could have the store open.
    let locks = ["serve", "host", "control"].map(|kind| Lock::take(&layout, kind));
    let _locks = locks.into_iter().collect::<Result<Vec<_>>>().map_err(|error| {
        error.with_hint("stop the server first: one that a command started leaves 60 s after the last use")
    })?;
    let mut problems = Vec::new();
    let mut roots = of_images(&layout, &mut problems)?;
    roots.extend(of_disks(&layout, &mut problems)?);
    let mut watch = watch(false, tell, cancelled);
    let mut rebuilt = chunk_store::rebuild(&layout.store(), &disks::source(), &roots, &mut watch)?;
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

/// What the disks of VMs stand on, by the records of the host process, of which only these two keys are read.
fn of_disks(layout: &Layout, problems: &mut Vec<Problem>) -> Result<Vec<NamedRoot>> {
    let failed = |error: std::io::Error| Error::io(format!("read {}", layout.vms().display()), &error);
    let mut roots = Vec::new();
    for entry in fs::read_dir(layout.vms()).map_err(failed)? {
        let path = entry.map_err(failed)?.path().join("vm.json");
        if !path.exists() {
            continue;
        }
        let record: Option<serde_json::Value> =
            fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let text = |pointer: &str| record.as_ref().and_then(|record| record.pointer(pointer)?.as_str());
        match (text("/launch/id"), text("/launch/image/map").map(str::parse)) {
            (Some(_), None) => {}
            (Some(id), Some(Ok(map))) => roots.push(NamedRoot { kind: "disk".into(), name: id.into(), map }),
            _ => problems.push(Problem {
                place: path.display().to_string(),
                what: "it does not read, so what the VM's disk stands on cannot be told".into(),
            }),
        }
    }
    Ok(roots)
}
