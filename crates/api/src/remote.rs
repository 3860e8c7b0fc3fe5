//! Remotes: places outside this machine's data directory that images are copied to and from.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, image::Image};

/// Variables of a server's environment that hold secrets. The programs that it starts do not get them.
pub const SECRETS: [&str; 3] = ["AWS_SECRET_ACCESS_KEY", "BURGEON_DATABASE", "BURGEON_META_DATABASE"];

/// Where a remote is, and with what it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// `/DIRECTORY`, `file:///DIRECTORY` or `s3://BUCKET/PREFIX`.
    pub url: String,
    /// For `s3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Access>,
}

/// How an S3 server is reached: the user's own keys, sent with each request and kept nowhere.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct S3Access {
    /// Such as `https://s3.example.org:9000`; none means Amazon's, by region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
    /// Allows an endpoint without TLS.
    #[serde(default)]
    pub allow_http: bool,
    /// Certificates in PEM that are trusted beside the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
}

impl fmt::Debug for S3Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("S3Access")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("access_key", &self.access_key)
            .finish_non_exhaustive()
    }
}

/// `POST /v1/images/{image}/push`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PushImage {
    pub remote: Remote,
}

/// `POST /v1/images/pull`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PullImage {
    pub remote: Remote,
    pub name: String,
    /// The version to pull; without it, the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// `POST /v1/images/remote`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListRemote {
    pub remote: Remote,
}

/// A version of an image in a remote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemoteImage {
    pub name: String,
    pub digest: String,
    /// Whether it is the one that is pulled when nobody asks for another.
    pub latest: bool,
    /// Seconds since 1970, when it was made.
    pub created_s: u64,
    pub disk: Option<ByteSize>,
    pub description: String,
    /// What is wrong with it, if anything; then only name and digest mean something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// An image that was copied to or from a remote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Moved {
    pub image: Box<Image>,
    /// The address of the remote.
    pub remote: String,
    /// All chunks of the image, and their plain bytes.
    pub chunks: u64,
    pub bytes: u64,
    /// Those that the other side did not have before.
    pub new_chunks: u64,
    pub new_bytes: u64,
    /// Bytes that were sent or read for them.
    pub moved_bytes: u64,
}
