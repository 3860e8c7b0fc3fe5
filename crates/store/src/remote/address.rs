//! Addresses of remotes. Pure.

use std::{path::PathBuf, time::Duration};

use burgeon_api::{Error, Result, path_text::printable, remote};

use crate::objects::S3Settings;

/// How long one request may take: a pack goes in one, over a slow line.
const DEADLINE: Duration = Duration::from_secs(600);

/// Where a remote is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Directory(PathBuf),
    S3(Box<S3Settings>),
}

/// Reads an address.
///
/// # Errors
/// `Invalid`, with what is known.
pub(super) fn read(remote: &remote::Remote) -> Result<Address> {
    let url = remote.url.as_str();
    if url.starts_with("s3://") {
        return Ok(Address::S3(Box::new(S3Settings::at(url, remote.s3.clone(), DEADLINE)?)));
    }
    let path = url.strip_prefix("file://").unwrap_or(url);
    if path.starts_with('/') {
        return Ok(Address::Directory(path.into()));
    }
    Err(Error::invalid(format!("\"{}\" is no address of a remote", printable(url)))
        .with_hint("known are /DIRECTORY, file:///DIRECTORY and s3://BUCKET/PREFIX"))
}

#[cfg(test)]
mod tests {
    use burgeon_api::remote::{Remote, S3Access};

    use super::*;

    #[test]
    fn addresses_are_directories_or_buckets() {
        let at = |url: &str, s3: Option<S3Access>| read(&Remote { url: url.into(), s3 });
        assert_eq!(at("/a/b", None).unwrap(), Address::Directory("/a/b".into()));
        assert_eq!(at("file:///a", None).unwrap(), Address::Directory("/a".into()));
        let access = S3Access {
            endpoint: None,
            region: "r".into(),
            access_key: "key".into(),
            secret_key: "hidden".into(),
            allow_http: false,
            certificate: None,
        };
        assert!(!format!("{access:?}").contains("hidden"));
        let Address::S3(settings) = at("s3://bucket/a/b/", Some(access.clone())).unwrap() else { panic!() };
        assert_eq!((settings.bucket.as_str(), settings.prefix.as_str()), ("bucket", "a/b"));
        let Address::S3(settings) = at("s3://bucket", Some(access)).unwrap() else { panic!() };
        assert_eq!((settings.bucket.as_str(), settings.prefix.as_str()), ("bucket", ""));
        let error = at("s3://bucket", None).unwrap_err();
        assert!(error.hint.unwrap().contains("AWS_ACCESS_KEY_ID"));
        for wrong in ["", "a/b", "http://a/b", "file://host/a", "S3://b"] {
            let error = at(wrong, None).unwrap_err();
            assert!(error.hint.unwrap().contains("s3://BUCKET/PREFIX"), "{wrong}");
        }
    }
}
