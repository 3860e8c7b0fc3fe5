//! What a remote tells of a version of an image (docs/formats.md, "Remotes"). Pure: bytes in, bytes out.

use burgeon_api::{Error, Result, image::Image, name};
use serde::{Deserialize, Serialize};

use crate::{ChunkId, PackId, pack::MOST_PACK};

/// The version of the remote's marker, of manifests and of `latest.json`.
pub(super) const FORMAT: u32 = 1;
/// The longest manifest that is read, and the longest of the other two.
pub(super) const MOST_MANIFEST: u64 = 16 << 20;
pub(super) const MOST_SHORT: u64 = 4096;
/// The object that says that a place is a remote.
pub(super) const MARKER: &str = "burgeon-remote.json";

/// `images/NAME/DIGEST.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    /// As its `image.json`.
    pub image: Image,
    /// The files beside `image.json`.
    pub files: Vec<StoredFile>,
    /// The packs that hold all of its chunks.
    pub packs: Vec<StoredPack>,
}

/// A file, stored as a block map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredFile {
    pub name: String,
    /// In bytes; the map's length is this, rounded up.
    pub length: u64,
    pub map: String,
}

/// A pack of the remote.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredPack {
    pub pack: String,
    /// Bytes of the whole pack.
    pub length: u64,
    /// How many chunks are in it: so long is its index.
    pub chunks: u32,
}

/// `images/NAME/latest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Latest {
    pub(super) format: u32,
    pub(super) digest: String,
}

/// [`MARKER`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Marker {
    pub(super) format: u32,
    /// `burgeon remote`.
    pub(super) kind: String,
}

impl Marker {
    pub(super) fn ours() -> Marker {
        Marker { format: FORMAT, kind: "burgeon remote".into() }
    }
}

impl Manifest {
    /// Reads the manifest that lies under this name and digest; errors name the place.
    ///
    /// # Errors
    /// `Refused` for one that a newer Burgeon wrote; `Damaged` where it is none, or that of another image.
    pub fn read(bytes: &[u8], name: &str, digest: &str, place: &str) -> Result<Manifest> {
        let manifest: Manifest = read(bytes, place, |value| {
            let format = value["image"]["format"].as_u64().unwrap_or(0);
            if format > u64::from(Image::FORMAT) { Some(("image.json", format, Image::FORMAT)) } else { None }
        })?;
        let damaged = |why: String| Error::damaged(format!("{place}: {why}"));
        let Manifest { image, files, packs, .. } = &manifest;
        if image.name != name || image.digest != digest {
            return Err(damaged(format!("it is of image {} with digest {}", image.name, image.digest)));
        }
        name::check("image", name)?;
        if image.format < Image::OLDEST_FORMAT {
            return Err(damaged(format!("its image.json has format {}", image.format)));
        }
        if image.disk.is_some() != image.map.is_some() {
            return Err(damaged("it does not tell where its disk is".into()));
        }
        // Nothing else lies beside an image.json: these become names of files.
        if let Some(file) = files.iter().find(|file| ![Image::KERNEL, Image::INITRAMFS].contains(&file.name.as_str())) {
            return Err(damaged(format!("it has a file {:?}", file.name)));
        }
        for map in image.map.iter().chain(files.iter().map(|file| &file.map)) {
            map.parse::<ChunkId>().map_err(|error| damaged(error.message))?;
        }
        for pack in packs {
            pack.pack.parse::<PackId>().map_err(|error| damaged(error.message))?;
            if pack.length > MOST_PACK {
                return Err(damaged(format!("it names a pack of {} bytes", pack.length)));
            }
        }
        Ok(manifest)
    }
}

/// Reads one of the remote's JSON objects, whose version is looked at before the rest.
pub(super) fn read<T: for<'a> Deserialize<'a>>(
    bytes: &[u8],
    place: &str,
    newer: impl Fn(&serde_json::Value) -> Option<(&'static str, u64, u32)>,
) -> Result<T> {
    let damaged = |error: serde_json::Error| Error::damaged(format!("{place} does not read: {error}"));
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(damaged)?;
    let own = match value["format"].as_u64() {
        Some(format) if format > u64::from(FORMAT) => Some(("it", format, FORMAT)),
        Some(_) => newer(&value),
        None => return Err(Error::damaged(format!("{place} does not tell its format"))),
    };
    if let Some((what, format, known)) = own {
        let text = format!("{place}: {what} has format {format}; this Burgeon reads formats up to {known}");
        return Err(Error::refused(text).with_hint("use the newer Burgeon that wrote it"));
    }
    serde_json::from_value(value).map_err(damaged)
}

pub(super) fn text(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::internal(format!("cannot write an object of a remote: {error}")))?;
    text.push(b'\n');
    Ok(text)
}
