//! Where an image came from: the steps that made it, as `image.json` keeps them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One step of an image's making. The steps of an image are told oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub origin: Origin,
    /// Seconds since 1970.
    pub when_s: u64,
    /// The version of the Burgeon that did it.
    pub burgeon: String,
    /// The digest of the image as it was after this step.
    pub digest: String,
    /// The block map of its disk after this step, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// Bytes of the disk that stand in chunks; the others are zeros.
    pub bytes: u64,
    /// Bytes of the chunks that the store did not have before; of a committed disk, those where it is not as that of the image
    /// that it began with.
    pub new_bytes: u64,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Origin {
    Built {
        /// The recipe's file, as its user named it.
        recipe: String,
        /// As `Image::recipe`.
        digest: String,
    },
    Imported {
        /// The path of the file.
        file: String,
        format: Format,
        /// SHA-256 of the file; absent for one that is too long to read it again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
        /// The image whose kernel it got.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kernel_of: Option<String>,
        /// What an OCI image says of how its programs are to be run. Nothing here does so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        container: Option<Box<Container>>,
    },
    Pulled {
        /// The address of the remote, without secrets.
        remote: String,
    },
    Committed {
        /// The VM whose disk was taken.
        vm: String,
        /// The image that it was made from, and the digest of that.
        image: String,
        image_digest: String,
    },
}

/// What an imported file was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    Raw,
    Qcow2,
    Tar,
    Oci,
}

/// The configuration of an OCI image, as far as it is about running its programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// Digest of the manifest, such as `sha256:..`.
    pub manifest: String,
    /// Such as `linux/amd64`.
    pub platform: String,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub working_directory: String,
    pub user: String,
}

impl Format {
    /// As in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Tar => "tar",
            Format::Oci => "oci",
        }
    }
}

impl Origin {
    /// A line for people.
    #[must_use]
    pub fn told(&self) -> String {
        match self {
            Origin::Built { recipe, digest } => format!("built from {recipe} ({})", short(digest)),
            Origin::Imported { file, format, sha256, kernel_of, .. } => {
                let hash = sha256.as_ref().map(|hash| format!(" ({})", short(hash))).unwrap_or_default();
                let kernel = kernel_of.as_ref().map(|image| format!(", kernel of {image}")).unwrap_or_default();
                format!("imported from {file}, {}{hash}{kernel}", format.name())
            }
            Origin::Pulled { remote } => format!("pulled from {remote}"),
            Origin::Committed { vm, image, image_digest } => {
                format!("committed from VM {vm} of image {image} ({})", short(image_digest))
            }
        }
    }
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_written_as_documented() {
        let step = Step {
            origin: Origin::Built { recipe: "tiny.toml".into(), digest: "0123456789abcdef".into() },
            when_s: 7,
            burgeon: "0.1.0".into(),
            digest: "d".into(),
            map: None,
            bytes: 5,
            new_bytes: 3,
        };
        let text = concat!(
            r#"{"origin":{"built":{"recipe":"tiny.toml","digest":"0123456789abcdef"}},"#,
            r#""when_s":7,"burgeon":"0.1.0","digest":"d","bytes":5,"new_bytes":3}"#
        );
        assert_eq!(serde_json::to_string(&step).unwrap(), text);
        assert_eq!(serde_json::from_str::<Step>(text).unwrap(), step);
        assert_eq!(step.origin.told(), "built from tiny.toml (0123456789ab)");
        let origin = Origin::Imported {
            file: "/a.tar".into(),
            format: Format::Tar,
            sha256: None,
            kernel_of: Some("tiny".into()),
            container: None,
        };
        let text = r#"{"imported":{"file":"/a.tar","format":"tar","kernel_of":"tiny"}}"#;
        assert_eq!(serde_json::to_string(&origin).unwrap(), text);
        assert_eq!(origin.told(), "imported from /a.tar, tar, kernel of tiny");
    }
}
