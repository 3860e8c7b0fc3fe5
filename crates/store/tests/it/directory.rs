//! Objects in a directory.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use burgeon_api::ErrorKind;
use burgeon_store::objects::{Directory, Objects};
use bytes::Bytes;

use crate::contract::{self, Creates};

fn files(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_keeps_the_contract() {
    let temporary = tempfile::tempdir().unwrap();
    let objects = Objects::from(Directory::open(temporary.path().join("not/there/yet")).unwrap());
    contract::keeps(&objects, Creates::Once).await;
    assert_eq!(files(&temporary.path().join("not/there/yet/race")), ["one"], "nothing is left of those that lost");
    assert!(objects.describe("packs/ab/one.pack").ends_with("not/there/yet/packs/ab/one.pack"));
    // Another process that opens it finds the same.
    let again = Objects::from(Directory::open(temporary.path().join("not/there/yet")).unwrap());
    assert_eq!(again.list("").await.unwrap(), objects.list("").await.unwrap());
}

#[test]
fn unfinished_files_are_not_listed_and_go_when_they_are_old() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = Directory::open(temporary.path()).unwrap();
    directory.put_new("packs/a", b"a").unwrap();
    let left = temporary.path().join("packs/.new-1-0");
    std::fs::write(&left, b"half").unwrap();
    let about = std::fs::metadata(&left).unwrap().modified().unwrap();
    assert_eq!(directory.list("").unwrap().len(), 1);
    assert_eq!(directory.tidy(about).unwrap(), 0, "not older than that");
    assert_eq!(directory.tidy(about + Duration::from_secs(1)).unwrap(), 1);
    assert_eq!(files(&temporary.path().join("packs")), ["a"]);
    assert_eq!(directory.tidy(SystemTime::UNIX_EPOCH).unwrap(), 0);

    // A name that a writer of an earlier process left is skipped.
    let taken = temporary.path().join(format!("packs/.new-{}-2", std::process::id()));
    std::fs::write(&taken, b"half").unwrap();
    for name in ["packs/b", "packs/c", "packs/d"] {
        directory.put_new(name, b"x").unwrap();
    }
    assert_eq!(std::fs::read(taken).unwrap(), b"half");
}

#[test]
fn an_open_object_is_read_without_a_wait() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = Directory::open(temporary.path()).unwrap();
    directory.put_new("a", b"0123456789").unwrap();
    let mut bytes = [0; 4];
    directory.read_at("a", 3, &mut bytes).unwrap();
    assert_eq!(&bytes, b"3456");
    let open = directory.open_object("a").unwrap();
    directory.delete("a").unwrap();
    open.read_at(6, &mut bytes).unwrap();
    assert_eq!((&bytes, open.length()), (b"6789", 10));
    assert_eq!(open.read_at(7, &mut bytes).unwrap_err().kind, ErrorKind::Damaged);
    assert_eq!(open.read_at(u64::MAX - 1, &mut bytes).unwrap_err().kind, ErrorKind::Internal);
    assert_eq!(directory.read_at("a", 0, &mut bytes).unwrap_err().kind, ErrorKind::NotFound);
}

#[test]
fn what_is_in_the_way_is_told() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = Directory::open(temporary.path()).unwrap();
    directory.put_new("a/b", b"x").unwrap();
    assert_eq!(directory.put_new("a", b"x").unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(directory.open_object("a").unwrap_err().kind, ErrorKind::NotFound);
    let error = directory.put_new("a/b/c", b"x").unwrap_err();
    assert!(error.message.contains("a/b/c"), "{error}");
    assert!(Directory::open(temporary.path().join("a/b")).is_err());
}

/// A file system of 64 KiB, until it is dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Option<Small> {
        let temporary = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        match rustix::mount::mount("burgeon-test", temporary.path(), "tmpfs", flags, Some(c"size=64k")) {
            Ok(()) => Some(Small(temporary)),
            Err(rustix::io::Errno::PERM) => None,
            Err(error) => panic!("mount a small file system: {error}"),
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_is_told_and_nothing_is_left() {
    let Some(small) = Small::mount() else {
        println!("skipped: only root can mount the small file system that this test fills");
        return;
    };
    let directory = Directory::open(small.0.path().join("objects")).unwrap();
    directory.put_new("small", &[1; 10_000]).unwrap();
    let error = directory.put_new("large", &[1; 100_000]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("objects/large") && error.hint.is_some(), "{error:?}");
    assert_eq!(files(&small.0.path().join("objects")), ["small"]);
    directory.put_new("another", &Bytes::from(vec![2; 20_000])).unwrap();
}
