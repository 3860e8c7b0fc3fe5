//! OCI image layouts (opencontainers/image-spec 1.1, "Image Layout"): a directory, or a tar of one. Nothing of them is
//! trusted: sizes are bounded, and every blob is compared with its digest before it is used.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, path_text::printable};
use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{hash, process::Limits};

/// The file that says that a directory is a layout.
pub(super) const MARKER: &str = "oci-layout";
const INDEX: &str = "index.json";
/// The longest JSON that is read.
const MOST_JSON: u64 = 4 << 20;
/// Indexes within indexes.
const MOST_DEPTH: usize = 4;
/// The most manifests that are looked at.
const MOST_MANIFESTS: usize = 1000;
/// Names beside `blobs` that a tar of a layout may hold; another name says that it is none.
const BESIDE: [&str; 6] = ["", ".", MARKER, INDEX, "manifest.json", "repositories"];

/// Where the files of a layout are.
pub(super) enum Layout {
    Directory(PathBuf),
    /// Offset and length of each file in the tar.
    Tar(File, BTreeMap<String, (u64, u64)>),
}

/// An object of the layout, by the hash of its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// The layers of an image, the lowest first, and its configuration.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Config {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default)]
    config: Option<Run>,
}

/// How an image's programs are to be run.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Run {
    pub(super) env: Option<Vec<String>>,
    pub(super) cmd: Option<Vec<String>>,
    pub(super) entrypoint: Option<Vec<String>>,
    pub(super) working_dir: Option<String>,
    pub(super) user: Option<String>,
}

/// The image that was chosen.
pub(super) struct Chosen {
    pub(super) digest: String,
    pub(super) platform: String,
    pub(super) manifest: Manifest,
    pub(super) run: Run,
}

impl Platform {
    fn told(&self) -> String {
        let parts = [&self.os, &self.architecture, &self.variant];
        let parts: Vec<String> =
            parts.into_iter().filter(|part| !part.is_empty()).map(|part| printable(part)).collect();
        parts.join("/")
    }

    /// Reads `OS/ARCHITECTURE` or `OS/ARCHITECTURE/VARIANT`.
    fn read(text: &str) -> Result<Platform> {
        let parts: Vec<&str> = text.split('/').collect();
        let platform = match parts.as_slice() {
            [os, architecture] => (*os, *architecture, ""),
            [os, architecture, variant] => (*os, *architecture, *variant),
            _ => ("", "", ""),
        };
        match platform {
            ("linux", architecture @ ("amd64" | "386"), variant) => {
                Ok(Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() })
            }
            _ => Err(Error::invalid(format!("VMs here do not run programs for \"{}\"", printable(text)))
                .with_hint("give linux/amd64 or linux/386")),
        }
    }

    fn is_wished(&self, wish: &Platform) -> bool {
        self.os == wish.os
            && self.architecture == wish.architecture
            && (wish.variant.is_empty() || self.variant == wish.variant)
    }
}

impl Layout {
    /// The layout in a directory, if it is one.
    pub(super) fn of_directory(path: &Path) -> Option<Layout> {
        path.join(MARKER).is_file().then(|| Layout::Directory(path.into()))
    }

    /// The layout in a tar, if it is one. Most others are known by their first names.
    pub(super) fn of_tar(path: &Path) -> io::Result<Option<Layout>> {
        let mut archive = tar::Archive::new(File::open(path)?);
        let mut files = BTreeMap::new();
        for entry in archive.entries_with_seek()? {
            let Ok(entry) = entry else { return Ok(None) };
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let name = name.strip_prefix("./").unwrap_or(&name).trim_end_matches('/');
            if !(BESIDE.contains(&name) || name == "blobs" || name.starts_with("blobs/")) {
                return Ok(None);
            }
            if entry.header().entry_type().is_file() {
                files.insert(name.to_string(), (entry.raw_file_position(), entry.size()));
            }
        }
        let is_layout = files.contains_key(MARKER) && files.contains_key(INDEX);
        Ok(if is_layout { Some(Layout::Tar(File::open(path)?, files)) } else { None })
    }

    fn open(&self, name: &str) -> Result<Box<dyn Read>> {
        let failed = |error: io::Error| {
            let error = Error::io(format!("read {name} of the OCI layout"), &error);
            error.with_hint("the layout is not whole: copy it again")
        };
        match self {
            Layout::Directory(path) => {
                let path = path.join(name);
                // Looked at before it is opened: a pipe would wait for its writer.
                if !path.metadata().map_err(failed)?.is_file() {
                    return Err(Error::invalid(format!("{name} of the OCI layout is no ordinary file")));
                }
                Ok(Box::new(File::open(path).map_err(failed)?))
            }
            Layout::Tar(file, files) => {
                let (offset, length) = files.get(name).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
                let reader = TarFile { file: file.try_clone().map_err(failed)?, offset: *offset, left: *length };
                Ok(Box::new(reader))
            }
        }
    }

    /// The bytes of a blob, as they are; verified or not.
    fn blob(&self, digest: &str) -> Result<Box<dyn Read>> {
        self.open(&format!("blobs/sha256/{}", hex_of(digest)?))
    }

    /// Reads a blob to its end and compares its size and its digest.
    pub(super) fn verify(&self, blob: &Descriptor, limits: Limits<'_>) -> Result<()> {
        let mut reader = self.blob(&blob.digest)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut size = 0;
        loop {
            limits.check_cancelled()?;
            let count =
                reader.read(&mut buffer).map_err(|error| Error::io(format!("read blob {}", blob.digest), &error))?;
            if count == 0 {
                break;
            }
            size += count as u64;
            if size > blob.size {
                break;
            }
            hasher.update(&buffer[..count]);
        }
        check(blob, size, &hash::hex(&hasher.finalize()))
    }

    /// A blob that was verified.
    pub(super) fn verified(&self, blob: &Descriptor) -> Result<impl Read + use<>> {
        Ok(BufReader::with_capacity(256 << 10, self.blob(&blob.digest)?).take(blob.size))
    }

    fn json<T: DeserializeOwned>(&self, blob: &Descriptor) -> Result<T> {
        if blob.size > MOST_JSON {
            return Err(Error::refused(format!("{} has {} bytes, too many", printable(&blob.digest), blob.size)));
        }
        let mut bytes = Vec::new();
        let read = self.blob(&blob.digest)?.take(MOST_JSON + 1).read_to_end(&mut bytes);
        read.map_err(|error| Error::io(format!("read blob {}", blob.digest), &error))?;
        check(blob, bytes.len() as u64, &hash::of_bytes(&bytes))?;
        parse(&blob.digest, &bytes)
    }

    /// The one image of the layout for a platform.
    pub(super) fn choose(&self, platform: Option<&str>) -> Result<Chosen> {
        let wish = Platform::read(platform.unwrap_or("linux/amd64"))?;
        let mut bytes = Vec::new();
        let read = self.open(INDEX)?.take(MOST_JSON).read_to_end(&mut bytes);
        read.map_err(|error| Error::io(format!("read {INDEX}"), &error))?;
        let mut found = Vec::new();
        self.gather(&parse::<Index>(INDEX, &bytes)?.manifests, 0, &mut found)?;
        let (fits, others): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, platform)| platform.is_wished(&wish));
        let mut digests: Vec<&str> = fits.iter().map(|(descriptor, _)| descriptor.digest.as_str()).collect();
        digests.sort_unstable();
        digests.dedup();
        let (descriptor, platform) = match (fits.first(), digests.len()) {
            (Some(first), 1) => first,
            (None, _) => {
                let mut there: Vec<String> = others.iter().map(|(_, platform)| platform.told()).collect();
                there.sort();
                there.dedup();
                let text = format!("the OCI layout holds no image for {}, but for {}", wish.told(), there.join(", "));
                return Err(Error::refused(text).with_hint("choose another with --platform OS/ARCHITECTURE"));
            }
            (Some(_), count) => {
                let text = format!("the OCI layout holds {count} images for {}", wish.told());
                return Err(Error::refused(text).with_hint("copy the one that you want into a layout of its own"));
            }
        };
        let manifest: Manifest = self.json(descriptor)?;
        let config: Config = self.json(&manifest.config)?;
        Ok(Chosen {
            digest: descriptor.digest.clone(),
            platform: platform.told(),
            manifest,
            run: config.config.unwrap_or_default(),
        })
    }

    /// Adds all manifests of images below an index, each with its platform.
    fn gather(&self, manifests: &[Descriptor], depth: usize, found: &mut Vec<(Descriptor, Platform)>) -> Result<()> {
        if depth > MOST_DEPTH || found.len() + manifests.len() > MOST_MANIFESTS {
            return Err(Error::refused("the OCI layout holds too many indexes"));
        }
        for descriptor in manifests {
            if descriptor.media_type.contains("index") || descriptor.media_type.contains("manifest.list") {
                let index: Index = self.json(descriptor)?;
                self.gather(&index.manifests, depth + 1, found)?;
                continue;
            }
            let platform = match &descriptor.platform {
                Some(platform) => platform.clone(),
                // Told by the configuration, where the index does not.
                None => {
                    let manifest: Manifest = self.json(descriptor)?;
                    self.json::<Config>(&manifest.config)?.platform
                }
            };
            found.push((descriptor.clone(), platform));
        }
        Ok(())
    }
}

/// A file within a tar, by reads at places: several may be open at a time.
struct TarFile {
    file: File,
    offset: u64,
    left: u64,
}

impl Read for TarFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..most], self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// The digits of a digest, which become a file's name.
fn hex_of(digest: &str) -> Result<&str> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| Error::refused(format!("\"{}\" is no digest by SHA-256", printable(digest))))
}

fn check(blob: &Descriptor, size: u64, hex: &str) -> Result<()> {
    let problem = if size != blob.size {
        format!("it has other than the {} bytes that it should have", blob.size)
    } else if Ok(hex) != hex_of(&blob.digest) {
        format!("its digest is sha256:{hex}")
    } else {
        return Ok(());
    };
    Err(Error::damaged(format!("blob {} of the OCI layout is damaged: {problem}", blob.digest))
        .with_hint("copy the layout again"))
}

fn parse<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::damaged(format!("{} of the OCI layout does not read: {error}", printable(name))))
}
