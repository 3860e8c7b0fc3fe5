//! The snapshots of a VM, as its directory has them: `snapshots/NAME` with the file `snapshot.json` and the devices' state.
//!
//! The memory lies in the store, kept by a root of its own; what the disks held, the disks have under a name that no
//! user can give (`disks/snapshots.rs`). A snapshot is there when its directory has its name, and gone when it has not: all
//! else follows from that.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use burgeon_api::{Error, RequestId, Result, host::Launch, snapshot::VmSnapshot};
use serde::{Deserialize, Serialize};

use crate::{
    disks::Attached,
    frozen::{Frozen, compare},
    record::Record,
    start::Context,
};

const FORMAT: u32 = 1;
const DIRECTORY: &str = "snapshots";
const FILE: &str = "snapshot.json";
/// One that is being made or removed has a name that begins so, which none can have.
const UNFINISHED: &str = ".";

/// What is written down of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) format: u32,
    /// Counts those of this VM. Times need not differ.
    pub(crate) number: u64,
    pub(crate) about: VmSnapshot,
    pub(crate) attached: Vec<Attached>,
    /// Its user had frozen its workload.
    pub(crate) frozen: bool,
}

impl Snapshot {
    pub(crate) fn new(number: u64, about: VmSnapshot, attached: Vec<Attached>, frozen: bool) -> Snapshot {
        Snapshot { format: FORMAT, number, about, attached, frozen }
    }

    fn load(directory: &Path) -> Result<Snapshot> {
        let path = directory.join(FILE);
        let bytes = fs::read(&path).map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        let damaged = |error| Error::damaged(format!("{} does not read: {error}", path.display()));
        let snapshot: Snapshot = serde_json::from_slice(&bytes).map_err(damaged)?;
        if snapshot.format != FORMAT {
            let (shown, format) = (path.display(), snapshot.format);
            return Err(Error::refused(format!("{shown} has format {format}; this Burgeon knows {FORMAT}")));
        }
        Ok(snapshot)
    }

    /// Whether this machine can have a VM go on from it.
    ///
    /// # Errors
    /// `Refused`, with what differs.
    pub(crate) fn check(&self, context: &Context, launch: &Launch) -> Result<()> {
        let was = &self.about.docked.compatibility;
        let now = context.substrates.compatibility(&context.qemu, launch, was.accelerator, self.attached.clone())?;
        compare(&format!("snapshot {} of VM {}", self.about.name, launch.name), was, &now)
    }

    /// Brings it into memory.
    ///
    /// # Errors
    /// `Damaged`; those of the store.
    pub(crate) async fn bring(&self, context: &Context, record: &Record) -> Result<Frozen> {
        let directory = place(&context.layout.vm(record.launch.id), &self.about.name);
        context.substrates.bring(&context.disks, directory, &self.about.docked, &record.launch).await
    }
}

/// Where a snapshot of a VM is.
pub(crate) fn place(vm: &Path, name: &str) -> PathBuf {
    vm.join(DIRECTORY).join(name)
}

/// Names of a VM's snapshots.
///
/// # Errors
/// Where their directory does not read.
pub(crate) fn names(vm: &Path) -> Result<Vec<String>> {
    let directory = vm.join(DIRECTORY);
    let failed = |error: io::Error| Error::io(format!("read {}", directory.display()), &error);
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if !name.starts_with(UNFINISHED) {
            names.push(name);
        }
    }
    Ok(names)
}

/// A VM's snapshots, the oldest first.
///
/// # Errors
/// `Damaged` for one that does not read.
pub(crate) fn list(vm: &Path) -> Result<Vec<Snapshot>> {
    let mut all: Vec<Snapshot> =
        names(vm)?.iter().map(|name| Snapshot::load(&place(vm, name))).collect::<Result<_>>()?;
    all.sort_by_key(|snapshot| snapshot.number);
    Ok(all)
}

/// # Errors
/// `NotFound`, with those there are; `Damaged`.
pub(crate) fn find(vm: &Path, name: &str) -> Result<Snapshot> {
    let names = names(vm)?;
    if names.iter().any(|known| known == name) {
        return Snapshot::load(&place(vm, name));
    }
    let there = if names.is_empty() { "it has none".into() } else { format!("it has {}", names.join(", ")) };
    let shown = burgeon_api::path_text::printable(name);
    Err(Error::not_found(format!("the VM has no snapshot {shown}: {there}"))
        .with_hint("burgeon vm snapshots VM lists what there is"))
}

/// Where the snapshot of a request is made.
fn unfinished(vm: &Path, request: RequestId) -> PathBuf {
    place(vm, &format!("{UNFINISHED}new-{request}"))
}

/// Whether the snapshot of a request is just being made.
pub(crate) fn is_begun(vm: &Path, request: RequestId) -> bool {
    unfinished(vm, request).exists()
}

/// A directory for a snapshot that is being made.
pub(crate) fn begin(vm: &Path, request: RequestId) -> Result<PathBuf> {
    let failed = |error: io::Error| Error::io("make a snapshot's directory", &error);
    let directory = unfinished(vm, request);
    gone(fs::remove_dir_all(&directory)).map_err(failed)?;
    // Not the VM's own: where that is gone, it has just been removed.
    match fs::create_dir(vm.join(DIRECTORY)) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    fs::create_dir(&directory).map_err(failed)?;
    Ok(directory)
}

/// Puts what has begun into its place: from then on it is there, whole.
pub(crate) fn publish(begun: &Path, vm: &Path, snapshot: &Snapshot) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut out = fs::File::create(begun.join(FILE))?;
        io::Write::write_all(&mut out, &serde_json::to_vec_pretty(snapshot)?)?;
        out.sync_all()?;
        fs::File::open(begun)?.sync_all()?;
        fs::rename(begun, place(vm, &snapshot.about.name))?;
        fs::File::open(vm.join(DIRECTORY))?.sync_all()
    };
    write().map_err(|error| Error::io("keep a snapshot", &error))
}

/// Takes a snapshot out of its place, in one step; then nothing is left of its directory.
///
/// # Errors
/// `NotFound`, with those there are.
pub(crate) fn remove(vm: &Path, name: &str) -> Result<()> {
    // One that does not read may go all the same.
    if !names(vm)?.iter().any(|known| known == name) {
        return find(vm, name).map(drop);
    }
    let failed = |error: io::Error| Error::io("remove a snapshot", &error);
    let removed = place(vm, &format!("{UNFINISHED}removed-{name}"));
    gone(fs::remove_dir_all(&removed)).map_err(failed)?;
    fs::rename(place(vm, name), &removed).map_err(failed)?;
    fs::remove_dir_all(&removed).map_err(failed)
}

/// Removes the directory of one that was not made.
pub(crate) fn discard(vm: &Path, request: RequestId) {
    if let Err(error) = gone(fs::remove_dir_all(unfinished(vm, request))) {
        tracing::warn!(%error, "a part of a snapshot takes room until the host process starts again");
    }
}

/// Removes what an earlier process has left unfinished.
pub(crate) fn sweep(vm: &Path) {
    for entry in fs::read_dir(vm.join(DIRECTORY)).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED)
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "a part of a snapshot still takes room");
        }
    }
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of format 1; see docs/formats.md.
    const KEPT: &str = r#"{"format":1,"number":7,"about":{"name":"s1","request":"01a2183d-ad40-755a-b23a-3dc2f6bd0da0",
        "taken_s":5,"disks":["root","data"],"map":"MAP","memory":"90 MiB","stored":"1 MiB","devices":"64 KiB",
        "compatibility":{"format":1,"qemu":"7.2.22","program":"p","firmware":"f","accelerator":"tcg","machine":"m"},
        "captured_us":4000},"attached":[{"disk":"data","port":1}],"frozen":false}"#;

    #[test]
    fn snapshots_are_there_or_not_and_come_in_order() {
        let vm = tempfile::tempdir().unwrap();
        let vm = vm.path();
        assert_eq!(list(vm).unwrap(), []);
        let first: Snapshot = serde_json::from_str(&KEPT.replace("\n", "")).unwrap();
        assert_eq!((first.number, first.about.disks.len(), first.attached[0].port), (7, 2, 1));
        let mut second = first.clone();
        (second.number, second.about.name) = (8, "before".into());
        for snapshot in [&second, &first] {
            let begun = begin(vm, snapshot.about.request).unwrap();
            assert!(is_begun(vm, snapshot.about.request));
            publish(&begun, vm, snapshot).unwrap();
        }
        assert_eq!(list(vm).unwrap(), [first.clone(), second]);
        assert_eq!(find(vm, "s1").unwrap(), first);
        assert!(find(vm, "../s1").unwrap_err().message.contains("it has "));

        // What was begun is no snapshot, and goes with the next start.
        begin(vm, RequestId::generate()).unwrap();
        assert_eq!(names(vm).unwrap().len(), 2);
        sweep(vm);
        assert_eq!(fs::read_dir(vm.join(DIRECTORY)).unwrap().count(), 2);
        // One of another version is told by name, and can be removed.
        let newer =
            fs::read_to_string(place(vm, "s1").join(FILE)).unwrap().replacen("\"format\": 1", "\"format\": 2", 1);
        fs::write(place(vm, "s1").join(FILE), newer).unwrap();
        assert!(list(vm).unwrap_err().message.contains("has format 2; this Burgeon knows 1"));
        remove(vm, "s1").unwrap();
        assert_eq!(remove(vm, "s1").unwrap_err().kind, burgeon_api::ErrorKind::NotFound);
        assert_eq!(names(vm).unwrap(), ["before"]);
    }
}
