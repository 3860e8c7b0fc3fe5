//! The images that are kept: `images/<name>/` with `image.json` and the files it names.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use burgeon_api::{
    ByteSize, Error, Result,
    http::Progress,
    image::{Boot, Image},
    name,
};
use sha2::{Digest, Sha256};

use crate::{
    hash,
    work::{self, DataPaths},
};

/// An image as it was found.
#[derive(Clone, Debug)]
pub enum Stored {
    Good {
        image: Image,
        /// Bytes that it takes on disk.
        stored: ByteSize,
    },
    /// Something named like an image that cannot be used, and why.
    Broken { name: String, error: Error },
}

/// All images in order of their names. A broken one does not hide the others.
///
/// # Errors
/// Where the directory of images cannot be read.
pub fn list(data: &DataPaths) -> Result<Vec<Stored>> {
    let failed = |error: io::Error| Error::io(format!("cannot read {}", data.images.display()), &error);
    let entries = match fs::read_dir(&data.images) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed)?.file_name());
    }
    names.sort();
    let stored = |name: std::ffi::OsString| {
        let name = name.to_string_lossy().into_owned();
        match show(data, &name) {
            Ok((image, _)) => {
                let stored = stored_bytes(&data.images.join(&name));
                Stored::Good { image, stored }
            }
            Err(error) => Stored::Broken { name, error },
        }
    };
    Ok(names.into_iter().map(stored).collect())
}

/// One image and its directory, its files checked for being there at their full size.
///
/// # Errors
/// `NotFound` where there is none of that name, `Damaged` where it cannot be used.
pub fn show(data: &DataPaths, image: &str) -> Result<(Image, PathBuf)> {
    name::check("image", image)?;
    let directory = data.images.join(image);
    let path = directory.join(Image::FILE);
    let damaged = |why: String| {
        Error::damaged(format!("image {image} is broken: {why}"))
            .with_hint(format!("build or import it again, or remove it: burgeon image rm {image}"))
    };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !directory.exists() => {
            return Err(Error::not_found(format!("there is no image {image}"))
                .with_hint("see which there are: burgeon image ls"));
        }
        Err(error) => return Err(damaged(format!("{}: {error}", Image::FILE))),
    };
    let found: Image = serde_json::from_str(&text).map_err(|error| damaged(format!("{}: {error}", Image::FILE)))?;
    if !(Image::OLDEST_FORMAT..=Image::FORMAT).contains(&found.format) {
        return Err(damaged(format!(
            "format {} is not known; this Burgeon reads formats {} to {}",
            found.format,
            Image::OLDEST_FORMAT,
            Image::FORMAT
        )));
    }
    if found.name != image {
        return Err(damaged(format!("it says that its name is {}", found.name)));
    }
    check_files(&found, &directory, &damaged)?;
    Ok((found, directory))
}

/// Checks that the files that an image needs lie in its directory, at their full size.
fn check_files(found: &Image, directory: &Path, damaged: &dyn Fn(String) -> Error) -> Result<()> {
    let check = |file: &str, start: &[u8], size: Option<u64>| -> Result<()> {
        let read = || -> io::Result<(u64, Vec<u8>)> {
            let mut handle = fs::File::open(directory.join(file))?;
            let mut head = vec![0; start.len()];
            handle.read_exact(&mut head)?;
            Ok((handle.metadata()?.len(), head))
        };
        let (length, head) = read().map_err(|error| damaged(format!("{file}: {error}")))?;
        match size {
            Some(size) if size != length => Err(damaged(format!("{file} has {length} bytes instead of {size}"))),
            _ if head != start => Err(damaged(format!("{file} does not begin as it should"))),
            _ => Ok(()),
        }
    };
    if found.boot == Boot::Agent {
        check(Image::KERNEL, b"MZ", None)?;
        check(Image::INITRAMFS, b"070701", None)?;
    }
    if let Some(size) = found.disk.filter(|_| found.map.is_none()) {
        check(Image::DISK, b"", Some(size.0))?;
    }
    Ok(())
}

/// Takes an image that was made elsewhere: `fill` puts its files into a directory, sets the root of its disk and says
/// what it is. It appears under its name in one step, in place of the image of that name. Where something fails,
/// nothing of it stays in `images/`.
///
/// # Errors
/// Those of `fill`; `Damaged` where the files are not those of such an image.
pub fn receive(data: &DataPaths, fill: &mut dyn FnMut(&Path) -> Result<Image>) -> Result<Image> {
    let work = work::WorkDirectory::create(&data.temporary)?;
    let directory = work.path().join("image");
    fs::create_dir(&directory).map_err(|error| Error::io("cannot create the image's directory", &error))?;
    let image = fill(&directory)?;
    name::check("image", &image.name)?;
    check_files(&image, &directory, &|why| Error::damaged(format!("image {} is broken: {why}", image.name)))?;
    publish(data, &image, &directory)?;
    Ok(image)
}

/// Removes an image, a broken one too.
///
/// # Errors
/// `NotFound` where there is none of that name.
pub fn remove(data: &DataPaths, image: &str) -> Result<()> {
    name::check("image", image)?;
    let directory = data.images.join(image);
    if fs::symlink_metadata(&directory).is_err() {
        return Err(Error::not_found(format!("there is no image {image}")));
    }
    // Out of sight in one step first, so that a crash leaves no half of an image.
    let work = work::WorkDirectory::create(&data.temporary)?;
    fs::rename(&directory, work.path().join("removed"))
        .map_err(|error| Error::io(format!("cannot remove {}", directory.display()), &error))
}

/// The version of `image.json` that goes into digests. It stays when the format grows, so that the same image has the
/// same digest.
const DIGEST_FORMAT: u32 = 2;

/// The image's metadata with its digest: SHA-256 over the digests of kernel, initramfs and disk,
/// and over the metadata without the digest itself, the recipe's digest, the time and the history.
pub(crate) fn sealed(image: Image, directory: &Path) -> Result<Image> {
    let disk = image.disk.map(|_| hash::of_disk(&directory.join(Image::DISK))).transpose()?;
    sealed_with(image, directory, disk.as_deref())
}

/// [`sealed`], where the digest of the disk is known. `image` names no map yet.
pub(crate) fn sealed_with(mut image: Image, directory: &Path, disk: Option<&str>) -> Result<Image> {
    let mut hasher = Sha256::new();
    hasher.update(b"burgeon image 1\0");
    for file in [Image::KERNEL, Image::INITRAMFS] {
        let path = directory.join(file);
        let digest = if path.exists() { hash::of_file(&path)? } else { "none".into() };
        hasher.update(format!("{file} {digest}\n"));
    }
    if let Some(disk) = disk {
        hasher.update(format!("{} {disk}\n", Image::DISK));
    }
    let plain = Image {
        format: DIGEST_FORMAT,
        digest: String::new(),
        recipe: String::new(),
        created_s: 0,
        history: Vec::new(),
        ..image.clone()
    };
    hasher.update(text(&plain)?);
    image.digest = hash::hex(&hasher.finalize());
    Ok(image)
}

/// Where disks of images are kept: the store, behind a seam, because this crate knows none.
pub trait DiskStore: Sync {
    /// Keeps a disk for the image of that name. It is kept for as long as an
    /// image's `image.json` names the map; and at first for an hour, so that there is time to write one.
    ///
    /// # Errors
    /// Those of the store, a full disk among them.
    fn keep(&self, image: &str, disk: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<KeptDisk>;
}

/// A disk as it was stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptDisk {
    /// The name of its block map; empty without a disk.
    pub map: String,
    /// Bytes that stand in chunks; and bytes of the chunks that were not stored before.
    pub bytes: u64,
    pub new_bytes: u64,
}

/// Moves the image's disk from its directory into the store.
pub(crate) fn keep_disk(
    disks: &dyn DiskStore,
    image: Image,
    directory: &Path,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(Image, KeptDisk)> {
    if image.disk.is_none() {
        return Ok((image, KeptDisk::default()));
    }
    let disk = directory.join(Image::DISK);
    let kept = disks.keep(&image.name, &disk, &mut |done, total| {
        progress(Progress::Step { phase: "store".into(), done, total, bytes: true });
    })?;
    fs::remove_file(&disk).map_err(|error| Error::io(format!("remove {}", disk.display()), &error))?;
    Ok((Image { map: Some(kept.map.clone()), ..image }, kept))
}

/// Writes `image.json` and puts the directory in place of the image of that name.
pub(crate) fn publish(data: &DataPaths, image: &Image, directory: &Path) -> Result<()> {
    work::write_atomically(&directory.join(Image::FILE), text(image)?.as_bytes())?;
    work::publish(directory, &data.images.join(&image.name))
}

/// [`publish`] under a name that no image has.
///
/// # Errors
/// `Conflict` where one has it.
pub(crate) fn publish_new(data: &DataPaths, image: &Image, directory: &Path) -> Result<()> {
    work::write_atomically(&directory.join(Image::FILE), text(image)?.as_bytes())?;
    if work::publish_new(directory, &data.images.join(&image.name))? { Ok(()) } else { Err(taken(&image.name)) }
}

/// An image has this name.
pub(crate) fn taken(name: &str) -> Error {
    Error::conflict(format!("there is an image {name} already"))
        .with_hint(format!("choose another name, or remove that one first: burgeon image rm {name}"))
}

fn text(image: &Image) -> Result<String> {
    let text = serde_json::to_string_pretty(image);
    text.map(|text| text + "\n").map_err(|error| Error::internal(format!("cannot write {}: {error}", Image::FILE)))
}

fn stored_bytes(directory: &Path) -> ByteSize {
    let Ok(entries) = fs::read_dir(directory) else { return ByteSize(0) };
    ByteSize(entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn image(name: &str) -> Image {
        Image {
            format: 1,
            name: name.into(),
            description: String::new(),
            boot: Boot::Agent,
            digest: String::new(),
            recipe: String::new(),
            kernel_release: "6.1".into(),
            disk: Some(ByteSize(1 << 20)),
            map: None,
            modules: Vec::new(),
            kernel_parameters: Vec::new(),
            init: "/sbin/init".into(),
            created_s: 5,
            history: Vec::new(),
        }
    }

    pub(crate) fn data(root: &Path) -> DataPaths {
        DataPaths { images: root.join("images"), cache: root.join("cache"), temporary: root.join("tmp") }
    }

    pub(crate) fn store(data: &DataPaths, image: &Image) -> Image {
        let work = work::WorkDirectory::create(&data.temporary).unwrap();
        let directory = work.path().join("image");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(Image::KERNEL), "MZ kernel").unwrap();
        fs::write(directory.join(Image::INITRAMFS), "070701").unwrap();
        fs::File::create(directory.join(Image::DISK)).unwrap().set_len(1 << 20).unwrap();
        let image = sealed(image.clone(), &directory).unwrap();
        publish(data, &image, &directory).unwrap();
        image
    }

    #[test]
    fn broken_images_are_told_by_name_and_hide_nothing() {
        let root = tempfile::tempdir().unwrap();
        let data = data(root.path());
        assert!(list(&data).unwrap().is_empty());
        for name in ["a-good", "b-short", "c-unparsable", "d-missing", "e-renamed", "f-future"] {
            store(&data, &image(name));
        }
        let at = |name: &str, file: &str| data.images.join(name).join(file);
        fs::File::options().write(true).open(at("b-short", Image::DISK)).unwrap().set_len(77).unwrap();
        fs::write(at("c-unparsable", Image::FILE), "{").unwrap();
        fs::remove_file(at("d-missing", Image::KERNEL)).unwrap();
        fs::copy(at("a-good", Image::FILE), at("e-renamed", Image::FILE)).unwrap();
        let future = fs::read_to_string(at("f-future", Image::FILE)).unwrap().replace("\"format\": 1", "\"format\": 2");
        fs::write(at("f-future", Image::FILE), future).unwrap();
        fs::create_dir(data.images.join("Not A Name")).unwrap();
        fs::write(data.images.join("file"), "").unwrap();
        let said: Vec<String> = list(&data)
            .unwrap()
            .into_iter()
            .map(|stored| match stored {
                Stored::Good { image, .. } => image.name,
                Stored::Broken { name, error } => {
                    assert!(error.message.contains(&name) || name == "Not A Name", "{error}");
                    error.message
                }
            })
            .collect();
        assert_eq!(said.len(), 8);
        assert_eq!(said.iter().filter(|said| *said == "a-good").count(), 1);
        assert!(said.iter().any(|said| said.contains("77 bytes instead of 1048576")), "{said:?}");
        remove(&data, "c-unparsable").unwrap();
        assert_eq!(remove(&data, "c-unparsable").unwrap_err().kind, burgeon_api::ErrorKind::NotFound);
        assert!(remove(&data, "../tmp").is_err());
    }

    #[test]
    fn the_digest_leaves_out_time_recipe_and_history_only() {
        let root = tempfile::tempdir().unwrap();
        let data = data(root.path());
        let first = store(&data, &image("a"));
        let later = store(&data, &Image { created_s: 9, recipe: "x".into(), ..image("a") });
        assert_eq!(first.digest, later.digest);
        let origin = burgeon_api::history::Origin::Pulled { remote: "/r".into() };
        let told = crate::with_step(image("a"), origin, &KeptDisk::default(), 7);
        assert_eq!(first.digest, store(&data, &Image { format: Image::FORMAT, ..told }).digest);
        let history = show(&data, "a").unwrap().0.history;
        assert_eq!((history.len(), history[0].when_s), (1, 7));
        assert_ne!(first.digest, store(&data, &Image { init: "/bin/sh".into(), ..image("a") }).digest);
        assert_eq!(show(&data, "a").unwrap().0.init, "/bin/sh");
    }
}
