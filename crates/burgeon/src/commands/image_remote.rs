//! `image push`, `image pull` and `image remote`.

use std::path::Path;

use burgeon_api::{
    ByteSize, Error, Result,
    http::Progress,
    remote::{ListRemote, Moved, PullImage, PushImage, Remote, RemoteImage, S3Access},
};

use super::{Context, vm::now_s};
use crate::{client::escape, output};

pub(super) async fn push(context: &Context, image: &str, remote: &str) -> Result<u8> {
    let request = PushImage { remote: address(remote)? };
    let lines = context.client()?.lines(&format!("/v1/images/{}/push", escape(image)), Some(&request)).await?;
    let (Progress::Pushed(moved), took) = super::store::follow(lines).await? else { return Err(strange()) };
    told(context, &moved, "sent", took)
}

pub(super) async fn pull(context: &Context, remote: &str, name: String, digest: Option<String>) -> Result<u8> {
    let request = PullImage { remote: address(remote)?, name, digest };
    let lines = context.client()?.lines("/v1/images/pull", Some(&request)).await?;
    let (Progress::Pulled(moved), took) = super::store::follow(lines).await? else { return Err(strange()) };
    told(context, &moved, "read", took)
}

pub(super) async fn list(context: &Context, remote: &str, quiet: bool) -> Result<u8> {
    let request = ListRemote { remote: address(remote)? };
    let images: Vec<RemoteImage> = context.client()?.post("/v1/images/remote", &request).await?;
    if context.json {
        output::json(&images)?;
    } else if quiet {
        let mut names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
        names.dedup();
        output::print(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
    } else {
        let now = now_s();
        let row = |image: &RemoteImage| {
            let broken = image.problem.is_some();
            vec![
                image.name.clone(),
                image.digest.clone(),
                if image.latest { "latest".into() } else { String::new() },
                image.disk.map(|size| size.to_string()).unwrap_or_default(),
                if broken { String::new() } else { output::age(now.saturating_sub(image.created_s)) },
                image.problem.clone().unwrap_or_else(|| image.description.clone()),
            ]
        };
        output::table(&["name", "digest", "", "disk", "age", "description"], images.iter().map(row).collect());
    }
    Ok(u8::from(images.iter().any(|image| image.problem.is_some())))
}

fn strange() -> Error {
    Error::damaged("the server gave a strange answer")
}

fn told(context: &Context, moved: &Moved, done: &str, took: std::time::Duration) -> Result<u8> {
    if context.json {
        output::json(moved)?;
    } else {
        output::note(&format!(
            "{} chunks, {}; {} new, {}, {} {done} ({:.1} s)",
            moved.chunks,
            ByteSize(moved.bytes),
            moved.new_chunks,
            ByteSize(moved.new_bytes),
            ByteSize(moved.moved_bytes),
            took.as_secs_f64()
        ));
        output::print(&format!("{}\n", moved.image.digest));
    }
    Ok(0)
}

/// The address of a remote, with what this process's environment says of how to reach it: the server was perhaps
/// started from another.
fn address(remote: &str) -> Result<Remote> {
    if remote.starts_with("s3://") {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        return Ok(Remote { url: remote.into(), s3: access(&variable)? });
    }
    // Relative to where the user is, not to the server.
    let path = remote.strip_prefix("file://").unwrap_or(remote);
    if path.contains("://") {
        return Ok(Remote { url: remote.into(), s3: None });
    }
    let path = std::path::absolute(Path::new(path)).map_err(|error| Error::io(format!("find {path}"), &error))?;
    let url = path.to_str().ok_or_else(|| Error::invalid("the path of the remote is not UTF-8"))?;
    Ok(Remote { url: url.into(), s3: None })
}

/// What the environment says of S3; none without keys.
fn access(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<S3Access>> {
    let (Some(access_key), Some(secret_key)) = (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY"))
    else {
        return Ok(None);
    };
    if variable("AWS_SESSION_TOKEN").is_some() {
        return Err(Error::invalid("keys with a session token (AWS_SESSION_TOKEN) are not known here")
            .with_hint("use keys without one"));
    }
    let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
    let certificate = variable("AWS_CA_BUNDLE")
        .map(|file| std::fs::read_to_string(&file).map_err(|error| Error::io(format!("read {file}"), &error)))
        .transpose()?;
    let allowed = variable("AWS_ALLOW_HTTP").is_some_and(|value| value == "true" || value == "1");
    let allow_http = allowed || endpoint.as_deref().is_some_and(is_this_machine);
    let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
    let region = region.unwrap_or_else(|| "us-east-1".into());
    Ok(Some(S3Access { endpoint, region, access_key, secret_key, allow_http, certificate }))
}

/// Whether an address without TLS never leaves this machine.
fn is_this_machine(endpoint: &str) -> bool {
    let Some(rest) = endpoint.strip_prefix("http://") else { return false };
    let host = rest.split('/').next().unwrap_or_default();
    let host = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let host = host.map_or(rest.split('/').next().unwrap_or_default(), |(host, _)| host);
    matches!(host, "127.0.0.1" | "localhost" | "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_tells_how_s3_is_reached() {
        let given = |pairs: &'static [(&'static str, &'static str)]| {
            access(&|name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_string()))
        };
        assert_eq!(given(&[("AWS_ACCESS_KEY_ID", "a")]).unwrap(), None);
        let keys = given(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]).unwrap().unwrap();
        assert_eq!((keys.region.as_str(), keys.endpoint, keys.allow_http), ("us-east-1", None, false));
        let other = given(&[
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_ENDPOINT_URL", "http://localhost:9000/"),
            ("AWS_REGION", "r"),
        ]);
        let other = other.unwrap().unwrap();
        assert!(other.allow_http && other.region == "r");
        let token = given(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_SESSION_TOKEN", "t")]);
        assert!(token.unwrap_err().hint.is_some());
        for (endpoint, ours) in [
            ("http://127.0.0.1:1", true),
            ("http://[::1]:1", true),
            ("http://localhost", true),
            ("http://localhost.example.org", false),
            ("http://10.0.0.1:9000", false),
            ("https://localhost", false),
        ] {
            assert_eq!(is_this_machine(endpoint), ours, "{endpoint}");
        }
    }

    #[test]
    fn directories_are_told_in_full() {
        assert_eq!(address("/a/b").unwrap().url, "/a/b");
        assert_eq!(address("file:///a").unwrap().url, "/a");
        assert!(address("a").unwrap().url.starts_with('/'));
        assert_eq!(address("ftp://a").unwrap().url, "ftp://a");
    }
}
