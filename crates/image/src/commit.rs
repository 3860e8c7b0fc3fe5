//! A VM's disk becomes an image: beside it, the files that the VM was started with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burgeon_api::{
    ByteSize, Error, ErrorKind, Result,
    history::Origin,
    image::{Boot, Image},
    name,
};

use crate::{
    history::with_step,
    store::{self, KeptDisk},
    work::{DataPaths, WorkDirectory},
};

/// What the new image is made of.
#[derive(Clone, Copy, Debug)]
pub struct CommitRequest<'a> {
    pub data: &'a DataPaths,
    /// The image that the VM was started from, as it was then.
    pub from: &'a Image,
    /// The VM's name.
    pub vm: &'a str,
    /// Of the new image.
    pub name: &'a str,
    pub description: &'a str,
    /// Seconds since 1970.
    pub now_s: u64,
}

impl CommitRequest<'_> {
    /// The directory of the image that the VM was started from, where it still is what it was.
    fn source(&self) -> Result<PathBuf> {
        let CommitRequest { from, vm, .. } = self;
        let hint = format!(
            "the kernel of VM {vm} comes from image {}: build or import that again as it was, digest {}",
            from.name, from.digest
        );
        let started_from = format!("VM {vm} was started from image {}", from.name);
        match store::show(self.data, &from.name) {
            Ok((image, directory)) if image.digest == from.digest => Ok(directory),
            Ok(_) => Err(Error::refused(format!("{started_from}, which is another one by now")).with_hint(hint)),
            Err(error) if error.kind == ErrorKind::NotFound => {
                Err(Error::refused(format!("{started_from}, which was removed")).with_hint(hint))
            }
            Err(error) => Err(error),
        }
    }
}

/// Refuses what [`commit`] would refuse, before there is any work.
///
/// # Errors
/// `Conflict` where an image has the name; `Refused` where the VM has no disk, or its kernel is not there any more.
pub fn check(request: &CommitRequest<'_>) -> Result<()> {
    let CommitRequest { data, from, vm, name, .. } = request;
    name::check("image", name)?;
    if fs::symlink_metadata(data.images.join(name)).is_ok() {
        return Err(store::taken(name));
    }
    if from.disk.is_none() {
        return Err(Error::refused(format!("VM {vm} has no disk that could become an image"))
            .with_hint(format!("image {} is in memory; its VMs keep nothing", from.name)));
    }
    if from.boot == Boot::Agent { request.source().map(drop) } else { Ok(()) }
}

/// Makes the image of a disk of `size` bytes that is stored already, and that a root keeps under the image's name. `digest`
/// is the disk's, by [`crate::DiskDigest`].
///
/// # Errors
/// As [`check`]; then nothing of the image is there.
pub fn commit(request: &CommitRequest<'_>, size: ByteSize, digest: &str, disk: &KeptDisk) -> Result<Image> {
    check(request)?;
    let CommitRequest { data, from, vm, name, description, now_s } = request;
    let work = WorkDirectory::create(&data.temporary)?;
    let directory = work.path().join("image");
    fs::create_dir(&directory).map_err(|error| Error::io("cannot create the image's directory", &error))?;
    if from.boot == Boot::Agent {
        let source = request.source()?;
        for file in [Image::KERNEL, Image::INITRAMFS] {
            share(&source.join(file), &directory.join(file))?;
        }
        // It may have been replaced in between.
        request.source()?;
    }
    let image = Image {
        format: Image::FORMAT,
        name: (*name).into(),
        description: (*description).into(),
        digest: String::new(),
        recipe: String::new(),
        disk: Some(size),
        map: None,
        created_s: *now_s,
        ..(*from).clone()
    };
    let image = store::sealed_with(image, &directory, Some(digest))?;
    let image = Image { map: Some(disk.map.clone()), ..image };
    let origin = Origin::Committed { vm: (*vm).into(), image: from.name.clone(), image_digest: from.digest.clone() };
    let image = with_step(image, origin, disk, *now_s);
    store::publish_new(data, &image, &directory)?;
    Ok(image)
}

/// Files of images never change, so two of them may share one.
fn share(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to)
        .or_else(|_| fs::copy(from, to).map(drop))
        .map_err(|error| Error::io(format!("cannot take {}", from.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{self, data, image, store};

    #[test]
    fn an_image_is_committed_beside_the_one_that_its_vm_began_with() {
        let root = tempfile::tempdir().unwrap();
        let data = data(root.path());
        let from = store(&data, &image("base"));
        let request = CommitRequest { data: &data, from: &from, vm: "one", name: "mine", description: "why", now_s: 9 };
        let kept = KeptDisk { map: "m".into(), bytes: 5, new_bytes: 3 };
        let made = commit(&request, ByteSize(2 << 20), "d", &kept).unwrap();
        assert_eq!((made.description.as_str(), made.disk, made.created_s), ("why", Some(ByteSize(2 << 20)), 9));
        assert_eq!((made.map.as_deref(), made.history[0].bytes, made.history[0].new_bytes), (Some("m"), 5, 3));
        assert!(made.was_a_machine() && !from.was_a_machine());
        assert_eq!(store::show(&data, "mine").unwrap().0, made);
        // The same contents have the same digest, however they came about.
        let again = CommitRequest { name: "again", description: "", now_s: 10, ..request };
        let zeros = crate::DiskDigest::new(1 << 20).finish();
        let digest = commit(&again, ByteSize(1 << 20), &zeros, &kept).unwrap().digest;
        let stored = store(&tests::data(&root.path().join("other")), &Image { name: "again".into(), ..image("base") });
        assert_eq!(digest, stored.digest);

        assert_eq!(commit(&request, ByteSize(2 << 20), "d", &kept).unwrap_err().kind, ErrorKind::Conflict);
        let memory = Image { disk: None, ..from.clone() };
        let new = CommitRequest { name: "new", ..request };
        let refused = |from: &Image| check(&CommitRequest { from, ..new }).unwrap_err();
        assert!(refused(&memory).message.contains("no disk"));
        store(&data, &Image { init: "/bin/other".into(), ..image("base") });
        let other = refused(&from);
        assert!(other.kind == ErrorKind::Refused && other.message.contains("base, which is another one"), "{other}");
        assert!(other.hint.unwrap().contains(&from.digest));
        store::remove(&data, "base").unwrap();
        assert!(refused(&from).message.contains("base, which was removed"));
        // A foreign image needs none of its files.
        check(&CommitRequest { from: &Image { boot: Boot::Firmware, ..from.clone() }, ..new }).unwrap();
        assert_eq!(fs::read_dir(&data.temporary).unwrap().count(), 0);
    }
}
