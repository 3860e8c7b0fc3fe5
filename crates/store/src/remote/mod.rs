//! Remotes: images in a directory or a bucket, for other machines. It owns their layout (docs/formats.md, "Remotes"),
//! what a copy to one moves, and what a copy from one verifies. Nobody has to run a server.
//!
//! ```text
//! burgeon-remote.json           says that this is a remote; written first
//! packs/XX/PACK.pack            chunks, as in a store
//! images/NAME/DIGEST.json       a version of an image: its image.json, its files, the packs that hold its chunks
//! images/NAME/latest.json       which version is meant when nobody says; written last
//! ```
//!
//! A copy that breaks off leaves packs that no manifest names. Which chunks a remote has is told by the indexes of the
//! packs that manifests name, so a new version moves only what is new.
//!
//! Calls block, and need a runtime's handle for what they wait for.

mod address;
mod index;
mod manifest;
mod pull;
mod push;

use burgeon_api::{
    Error, ErrorKind, Result,
    remote::{self, RemoteImage},
};
use bytes::Bytes;
use tokio::runtime::Handle;

pub use manifest::{Manifest, StoredFile, StoredPack};
pub use pull::{PHASES_IN_BYTES, Pulled, held_bytes, held_bytes_in, pull};
pub use push::{Pushed, push};

use self::{
    address::Address,
    manifest::{Latest, MARKER, MOST_MANIFEST, MOST_SHORT, Marker},
};
use crate::objects::{Directory, Objects, S3, Tag};

/// See the module.
#[derive(Clone, Debug)]
pub struct Remote {
    objects: Objects,
    handle: Handle,
    url: String,
}

fn manifest_name(name: &str, digest: &str) -> String {
    format!("images/{name}/{digest}.json")
}

fn latest_name(name: &str) -> String {
    format!("images/{name}/latest.json")
}

impl Remote {
    /// A remote that is there.
    ///
    /// # Errors
    /// `Invalid` for what is no address; `NotFound` where there is none; `Refused` where another Burgeon's or other things
    /// are; those of the place.
    pub fn open(address: &remote::Remote, handle: Handle) -> Result<Remote> {
        let remote = Remote::at(address, handle, false)?;
        if remote.marker()? {
            return Ok(remote);
        }
        let error = Error::not_found(format!("{} is no remote of Burgeon", remote.url));
        let oci = remote.wait(remote.objects.read("oci-layout", MOST_SHORT)).is_ok_and(|found| found.is_some());
        Err(if oci {
            error.with_hint("it is an OCI image: burgeon image import DIRECTORY NAME")
        } else {
            error.with_hint("check the address; burgeon image push NAME REMOTE makes a remote of an empty place")
        })
    }

    /// A remote to write to; an empty place becomes one.
    ///
    /// # Errors
    /// As [`Self::open`]; `Refused` where other things are.
    pub fn create(address: &remote::Remote, handle: Handle) -> Result<Remote> {
        let remote = Remote::at(address, handle, true)?;
        if !remote.marker()? {
            if !remote.wait(remote.objects.list(""))?.is_empty() {
                return Err(Error::refused(format!("{} holds other things, and is no remote of Burgeon", remote.url))
                    .with_hint("choose an empty directory, or a prefix that is not used"));
            }
            let text = manifest::text(&Marker::ours())?;
            remote.wait(remote.objects.put_new(MARKER, text.into()))?;
        }
        Ok(remote)
    }

    fn at(address: &remote::Remote, handle: Handle, create: bool) -> Result<Remote> {
        let url = address.url.clone();
        match address::read(address)? {
            Address::Directory(path) => {
                if !create && !path.is_dir() {
                    return Err(Error::not_found(format!("there is no directory {}", path.display()))
                        .with_hint("check the address; burgeon image push NAME REMOTE makes a remote"));
                }
                Ok(Remote { objects: Directory::open(path)?.into(), handle, url })
            }
            Address::S3(settings) => {
                let s3 = S3::new(*settings).map_err(|error| match error.hint {
                    // The settings are the user's environment.
                    Some(_) => error.with_hint("use TLS, or set AWS_ALLOW_HTTP=true where the network is trusted"),
                    None => error,
                })?;
                handle.block_on(s3.check())?;
                Ok(Remote { objects: s3.into(), handle, url })
            }
        }
    }

    /// The address, as its user wrote it.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether there is a marker, which then is of this version.
    fn marker(&self) -> Result<bool> {
        let Some((bytes, _)) = self.wait(self.objects.read(MARKER, MOST_SHORT))? else { return Ok(false) };
        let place = self.objects.describe(MARKER);
        let marker: Marker = manifest::read(&bytes, &place, |_| None)?;
        if marker == Marker::ours() { Ok(true) } else { Err(Error::damaged(format!("{place} is of something else"))) }
    }

    fn wait<T>(&self, request: impl Future<Output = T>) -> T {
        self.handle.block_on(request)
    }

    fn latest(&self, name: &str) -> Result<Option<(String, Tag)>> {
        let object = latest_name(name);
        let Some((bytes, tag)) = self.wait(self.objects.read(&object, MOST_SHORT))? else { return Ok(None) };
        let latest: Latest = manifest::read(&bytes, &self.objects.describe(&object), |_| None)?;
        Ok(Some((latest.digest, tag)))
    }

    fn read_manifest(&self, name: &str, digest: &str) -> Result<Option<(Manifest, Tag)>> {
        let object = manifest_name(name, digest);
        let Some((bytes, tag)) = self.wait(self.objects.read(&object, MOST_MANIFEST))? else { return Ok(None) };
        Ok(Some((Manifest::read(&bytes, name, digest, &self.objects.describe(&object))?, tag)))
    }

    /// The manifest of an image: of this version, or of the latest.
    ///
    /// # Errors
    /// `NotFound`; `Refused` and `Damaged` for what does not read.
    pub fn manifest(&self, name: &str, digest: Option<&str>) -> Result<Manifest> {
        burgeon_api::name::check("image", name)?;
        let hint = format!("see what there is: burgeon image remote {}", self.url);
        let digest = match digest {
            Some(digest) => digest.to_string(),
            None => self.latest(name)?.map(|(digest, _)| digest).ok_or_else(|| {
                Error::not_found(format!("there is no image {name} in {}", self.url)).with_hint(&hint)
            })?,
        };
        if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::invalid(format!("\"{}\" is no digest", burgeon_api::path_text::printable(&digest)))
                .with_hint(hint));
        }
        self.read_manifest(name, &digest)?.map(|(manifest, _)| manifest).ok_or_else(|| {
            Error::not_found(format!("{} has no version {digest} of image {name}", self.url)).with_hint(hint)
        })
    }

    /// Every version that is named by an object: image and digest.
    fn versions(&self, folder: &str) -> Result<Vec<(String, String)>> {
        let objects = self.wait(self.objects.list(folder))?;
        let version = |object: &str| {
            let (name, file) = object.strip_prefix("images/")?.split_once('/')?;
            let digest = file.strip_suffix(".json").filter(|digest| digest.len() == 64)?;
            Some((name.to_string(), digest.to_string()))
        };
        Ok(objects.iter().filter_map(|object| version(&object.name)).collect())
    }

    /// All versions of all images, by name; the latest first.
    ///
    /// # Errors
    /// Those of the place. A version that does not read is told as such.
    pub fn images(&self) -> Result<Vec<RemoteImage>> {
        let mut found = Vec::new();
        for (name, digest) in self.versions("images")? {
            let manifest = self.manifest(&name, Some(&digest));
            let latest = self.latest(&name).ok().flatten().is_some_and(|(latest, _)| latest == digest);
            let mut row = RemoteImage {
                name,
                digest,
                latest,
                created_s: 0,
                disk: None,
                description: String::new(),
                problem: None,
            };
            match manifest {
                Ok(Manifest { image, .. }) => {
                    row.created_s = image.created_s;
                    row.disk = image.disk;
                    row.description = image.description;
                }
                // Removed meanwhile.
                Err(error) if error.kind == ErrorKind::NotFound => continue,
                Err(error) if matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused | ErrorKind::Invalid) => {
                    row.problem = Some(error.message);
                }
                Err(error) => return Err(error),
            }
            found.push(row);
        }
        found.sort_by(|a, b| a.name.cmp(&b.name).then(b.latest.cmp(&a.latest)).then(b.created_s.cmp(&a.created_s)));
        Ok(found)
    }

    fn put_pack(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.wait(self.objects.put_new(name, Bytes::from(bytes)))
    }
}
