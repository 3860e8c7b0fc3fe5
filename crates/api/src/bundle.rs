//! The manifest of an exported substrate: what the file's chunks make.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    disk::{self, MOST_ATTACHED, ROOT},
    image::Image,
    name,
    profile::Profile,
    substrate::{Docked, Recipe},
};

/// See the module. Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    /// The version of the Burgeon that wrote it.
    pub burgeon: String,
    /// Seconds since 1970, when the substrate was made.
    pub created_s: u64,
    /// What it was started from, as its `image.json`.
    pub image: Image,
    pub profile: Profile,
    pub recipe: Recipe,
    pub docked: Docked,
    /// The root first.
    pub disks: Vec<BundledDisk>,
    pub files: Vec<BundledFile>,
}

/// A disk of a substrate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundledDisk {
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// None: zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// The hot-plug port; the root has none, nor has a disk that is not plugged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

/// A file, stored as a block map, whose length is the file's, rounded up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundledFile {
    pub name: String,
    pub length: u64,
    pub map: String,
}

/// The substrate's own files.
pub const DEVICES: &str = "devices";
pub const KERNEL: &str = "vmlinuz";
pub const INITRAMFS: &str = "initramfs";
/// Those of its image, where that was at hand.
pub const IMAGE_KERNEL: &str = "image/vmlinuz";
pub const IMAGE_INITRAMFS: &str = "image/initramfs.cpio";

const OWN: [&str; 3] = [DEVICES, KERNEL, INITRAMFS];
const OF_IMAGE: [&str; 2] = [IMAGE_KERNEL, IMAGE_INITRAMFS];

impl Manifest {
    pub const FORMAT: u32 = 1;

    /// Reads a manifest, and checks all that becomes a name or a size here.
    ///
    /// # Errors
    /// `Refused` for what a newer Burgeon wrote; `Damaged` for what makes no sense.
    pub fn read(bytes: &[u8]) -> Result<Manifest> {
        let unread = |error: serde_json::Error| Error::damaged(format!("the file's manifest does not read: {error}"));
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(unread)?;
        let newer = |what: &str, format: Option<u64>, known: u32| match format {
            Some(format) if format <= u64::from(known) => Ok(()),
            format => {
                let format = format.map_or_else(|| "none".into(), |format| format.to_string());
                Err(Error::refused(format!("{what} has format {format}; this Burgeon reads formats up to {known}"))
                    .with_hint("use the newer Burgeon that wrote it"))
            }
        };
        newer("the file's manifest", value["format"].as_u64(), Manifest::FORMAT)?;
        newer("the image in the file", value["image"]["format"].as_u64(), Image::FORMAT)?;
        let manifest: Manifest = serde_json::from_value(value).map_err(unread)?;
        manifest.check().map_err(|error| Error::damaged(format!("the file's manifest: {}", error.message)))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<()> {
        name::check("substrate", &self.name)?;
        name::check("image", &self.image.name)?;
        self.profile.check().map_err(|(key, error)| error.context(format!("profile, {key}")))?;
        for disk in &self.disks {
            disk::check_name(&disk.name)?;
        }
        let names: BTreeSet<&str> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
        let ports: Vec<u8> = self.disks.iter().filter_map(|disk| disk.port).collect();
        let is_port = |port: &u8| (1..=MOST_ATTACHED).contains(port);
        let different = ports.iter().collect::<BTreeSet<_>>().len() == ports.len();
        if names.len() != self.disks.len() || !different || !ports.iter().all(is_port) {
            return Err(Error::damaged("its disks do not fit together"));
        }
        if names.contains(ROOT) != self.image.map.is_some() || self.image.disk.is_some() != self.image.map.is_some() {
            return Err(Error::damaged("its root disk does not fit its image"));
        }
        let files: Vec<&str> = self.files.iter().map(|file| file.name.as_str()).collect();
        let known = |file: &&str| OWN.contains(file) || OF_IMAGE.contains(file);
        let different = files.iter().collect::<BTreeSet<_>>().len() == files.len();
        if !OWN.iter().all(|file| files.contains(file)) || !files.iter().all(known) || !different {
            return Err(Error::damaged(format!("it has files {}", files.join(", "))));
        }
        Ok(())
    }

    /// Whether its image can be made of it too.
    pub fn has_image(&self) -> bool {
        OF_IMAGE.iter().all(|wanted| self.files.iter().any(|file| file.name == *wanted))
    }

    /// All maps that it leads to.
    pub fn maps(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().filter_map(|disk| disk.map.as_deref());
        let files = self.files.iter().map(|file| file.map.as_str());
        let image = self.image.map.as_deref().filter(|_| self.has_image());
        [self.docked.map.as_str()].into_iter().chain(disks).chain(files).chain(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of format 1; see docs/formats.md.
    const KEPT: &str = r#"{"format":1,"name":"web","burgeon":"0.1.0","created_s":5,
        "image":{"format":3,"name":"tiny","boot":"agent","digest":"d","recipe":"","kernel_release":"6","disk":1048576,
            "map":"IMAGE","modules":[],"kernel_parameters":[],"init":"","created_s":4},
        "profile":{},"recipe":{"warm":"true"},
        "docked":{"map":"MEMORY","memory":"90 MiB","stored":"1 MiB","devices":"64 KiB","compatibility":{"format":1,
            "qemu":"7.2.22","program":"p","firmware":"f","accelerator":"tcg","machine":"m"},"captured_us":4000},
        "disks":[{"name":"root","size":1048576,"map":"ROOT"},{"name":"data","size":4096,"port":1}],
        "files":[{"name":"devices","length":7,"map":"A"},{"name":"vmlinuz","length":8,"map":"B"},
            {"name":"initramfs","length":9,"map":"C"}]}"#;

    fn read(text: &str) -> Result<Manifest> {
        Manifest::read(text.as_bytes())
    }

    #[test]
    fn a_manifest_is_read_and_what_does_not_fit_is_refused() {
        let manifest = read(KEPT).unwrap();
        assert_eq!(manifest.maps().collect::<Vec<_>>(), ["MEMORY", "ROOT", "A", "B", "C"]);
        assert_eq!(Manifest::read(&serde_json::to_vec(&manifest).unwrap()).unwrap(), manifest);
        let with_image = KEPT.replace(
            r#"{"name":"devices""#,
            r#"{"name":"image/vmlinuz","length":1,"map":"D"},{"name":"image/initramfs.cpio","length":1,"map":"E"},{"name":"devices""#,
        );
        assert_eq!(read(&with_image).unwrap().maps().last(), Some("IMAGE"));

        let newer = read(&KEPT.replacen("\"format\":1", "\"format\":2", 1)).unwrap_err();
        assert!(newer.message.contains("format 2; this Burgeon reads formats up to 1"), "{newer}");
        assert!(
            read(&KEPT.replace("\"format\":3", "\"format\":4")).unwrap_err().message.contains("the image in the file")
        );
        for (from, to, why) in [
            ("\"name\":\"web\"", "\"name\":\"../web\"", "name"),
            ("\"name\":\"tiny\"", "\"name\":\"a/b\"", "name"),
            ("\"name\":\"data\"", "\"name\":\"root\"", "do not fit together"),
            ("\"port\":1", "\"port\":9", "do not fit together"),
            ("\"name\":\"root\"", "\"name\":\"boot\"", "does not fit its image"),
            ("\"name\":\"vmlinuz\"", "\"name\":\"/etc/passwd\"", "it has files"),
            ("\"name\":\"vmlinuz\"", "\"name\":\"devices\"", "it has files"),
            ("\"recipe\":{", "\"recipe\":7,\"x\":{", "does not read"),
        ] {
            let error = read(&KEPT.replacen(from, to, 1)).unwrap_err();
            assert!(error.message.contains(why), "{from} {to}: {error}");
        }
    }
}
