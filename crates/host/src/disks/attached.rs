//! Which disks beside its root a VM has plugged in, and where: `attached.json` among its disks.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, disk::MOST_ATTACHED};
use serde::{Deserialize, Serialize};

const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) disk: String,
    /// The hot-plug port, from 1.
    pub(crate) port: u8,
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    attached: Vec<Attached>,
}

fn path(disks: &Path) -> PathBuf {
    disks.join("attached.json")
}

/// # Errors
/// `Damaged` for a file that does not read.
pub(crate) fn load(disks: &Path) -> Result<Vec<Attached>> {
    let path = path(disks);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes.map_err(|error| Error::io(format!("read {}", path.display()), &error))?,
    };
    let document: Document = serde_json::from_slice(&bytes)
        .map_err(|error| Error::damaged(format!("{} does not read: {error}", path.display())))?;
    if document.format != FORMAT {
        let shown = path.display();
        return Err(Error::refused(format!("{shown} has format {}; this Burgeon knows {FORMAT}", document.format)));
    }
    Ok(document.attached)
}

/// Replaces the file as a whole. It survives a power cut when this returns.
pub(crate) fn store(disks: &Path, attached: Vec<Attached>) -> Result<()> {
    let path = path(disks);
    let write = || -> std::io::Result<()> {
        let new = path.with_extension("json.new");
        let mut out = fs::File::create(&new)?;
        out.write_all(&serde_json::to_vec_pretty(&Document { format: FORMAT, attached })?)?;
        out.sync_all()?;
        fs::rename(&new, &path)?;
        fs::File::open(disks)?.sync_all()
    };
    write().map_err(|error| Error::io(format!("write {}", path.display()), &error))
}

/// The lowest port that is free.
///
/// # Errors
/// `Refused` when all are taken.
pub(crate) fn free_port(attached: &[Attached]) -> Result<u8> {
    (1..=MOST_ATTACHED).find(|port| attached.iter().all(|one| one.port != *port)).ok_or_else(|| {
        Error::refused(format!("the VM has {MOST_ATTACHED} disks plugged in, and no port for another"))
            .with_hint("detach one first: burgeon vm disk detach VM DISK")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_and_remembered() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(load(directory.path()).unwrap(), []);
        let mut attached = Vec::new();
        for (index, port) in (1..=MOST_ATTACHED).enumerate() {
            assert_eq!(free_port(&attached).unwrap(), port);
            attached.push(Attached { disk: format!("d{index}"), port });
        }
        assert!(free_port(&attached).is_err());
        attached.remove(1);
        assert_eq!(free_port(&attached).unwrap(), 2);
        store(directory.path(), attached.clone()).unwrap();
        assert_eq!(load(directory.path()).unwrap(), attached);
        fs::write(path(directory.path()), "{}").unwrap();
        assert_eq!(load(directory.path()).unwrap_err().kind, burgeon_api::ErrorKind::Damaged);
    }
}
