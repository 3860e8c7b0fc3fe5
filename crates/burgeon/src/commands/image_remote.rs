//! `image push`, `image pull` and `image remote`.

use std::path::Path;

use burgeon_api::{
    ByteSize, Error, Result,
    http::Progress,
    remote::{ListRemote, Moved, PullImage, PushImage, Remote, RemoteImage},
};

use super::{Context, environment, vm::now_s};
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
        return Ok(Remote { url: remote.into(), s3: environment::s3_access(&environment::of_process)? });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_told_in_full() {
        assert_eq!(address("/a/b").unwrap().url, "/a/b");
        assert_eq!(address("file:///a").unwrap().url, "/a");
        assert!(address("a").unwrap().url.starts_with('/'));
        assert_eq!(address("ftp://a").unwrap().url, "ftp://a");
    }
}
