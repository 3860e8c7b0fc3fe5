//! `vm cp`: files and directories to and from a VM.

use std::{
    ffi::OsString,
    io::Write,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, http::GuestFile, path_text};
use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::io::AsyncReadExt;

use crate::client::{Body, Client, escape, full};

/// One side of a copy.
enum Side {
    Here(PathBuf),
    /// A VM and a path in it, as bytes.
    There(String, Vec<u8>),
}

fn side(text: &str) -> Result<Side> {
    match text.split_once(':') {
        Some((vm, path)) if !vm.contains('/') && !vm.is_empty() => {
            if !path.starts_with('/') {
                return Err(Error::invalid(format!("{text}: paths in a VM are absolute")));
            }
            Ok(Side::There(vm.to_string(), path.as_bytes().to_vec()))
        }
        _ => Ok(Side::Here(PathBuf::from(text))),
    }
}

pub(super) async fn copy(client: &Client, from: &str, to: &str, recursive: bool) -> Result<u8> {
    match (side(from)?, side(to)?) {
        (Side::Here(from), Side::There(vm, to)) => {
            let to = if to.ends_with(b"/") { join(&to, name_of(&from)?.as_bytes()) } else { to };
            send(client, &from, &vm, &to, recursive).await?;
        }
        (Side::There(vm, from), Side::Here(to)) => {
            let name = from.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            let to = if to.is_dir() { to.join(OsString::from_vec(name.to_vec())) } else { to };
            fetch(client, &vm, &from, &to, recursive).await?;
        }
        _ => {
            return Err(Error::invalid("one side is a path here, the other VM:PATH")
                .with_hint("for example: burgeon vm cp ./file web:/root/file"));
        }
    }
    Ok(0)
}

fn name_of(path: &Path) -> Result<&std::ffi::OsStr> {
    path.file_name().ok_or_else(|| Error::invalid(format!("{} has no name to copy to", path.display())))
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    while path.last() == Some(&b'/') {
        path.pop();
    }
    path.push(b'/');
    path.extend(name);
    path
}

fn query(vm: &str, noun: &str, path: &[u8]) -> String {
    let (text, escaped) = path_text::encode(path);
    format!("/v1/vms/{}/{noun}?path={}&path_escaped={escaped}", escape(vm), escape(&text))
}

/// Puts a file of known content.
pub(super) async fn put_bytes(client: &Client, vm: &str, path: &str, mode: &str, content: Bytes) -> Result<()> {
    let length = content.len() as u64;
    client.put(&format!("{}&mode={mode}", query(vm, "files", path.as_bytes())), length, full(content)).await
}

async fn send(client: &Client, from: &Path, vm: &str, to: &[u8], recursive: bool) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("read {}", from.display()), &error);
    let about = std::fs::metadata(from).map_err(failed)?;
    let mode = about.permissions().mode() & 0o7777;
    if about.is_dir() {
        if !recursive {
            return Err(
                Error::invalid(format!("{} is a directory", from.display())).with_hint("copy it with --recursive")
            );
        }
        let path = format!("{}&mode={mode:o}", query(vm, "directories", to));
        client.put(&path, 0, full(Bytes::new())).await?;
        let mut entries =
            std::fs::read_dir(from).map_err(failed)?.collect::<std::io::Result<Vec<_>>>().map_err(failed)?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() || kind.is_file() {
                Box::pin(send(client, &entry.path(), vm, &join(to, entry.file_name().as_bytes()), recursive)).await?;
            } else {
                crate::output::note(&format!("left out, neither file nor directory: {}", entry.path().display()));
            }
        }
        return Ok(());
    }
    if !about.is_file() {
        return Err(Error::invalid(format!("{} is neither a file nor a directory", from.display())));
    }
    let file = tokio::fs::File::open(from).await.map_err(failed)?;
    let length = about.len();
    let stream = futures_stream(file.take(length));
    client.put(&format!("{}&mode={mode:o}", query(vm, "files", to)), length, stream).await
}

fn futures_stream(file: tokio::io::Take<tokio::fs::File>) -> Body {
    let stream = tokio_util::io::ReaderStream::with_capacity(file, 64 << 10);
    BodyExt::boxed(StreamBody::new(FrameStream(stream)))
}

/// Pieces of a file as frames of a body.
struct FrameStream(tokio_util::io::ReaderStream<tokio::io::Take<tokio::fs::File>>);

impl futures_util::Stream for FrameStream {
    type Item = std::io::Result<Frame<Bytes>>;
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::pin::Pin::new(&mut self.0).poll_next(context).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

async fn fetch(client: &Client, vm: &str, from: &[u8], to: &Path, recursive: bool) -> Result<()> {
    let listed = client.get::<Vec<GuestFile>>(&query(vm, "directories", from)).await;
    if let Ok(entries) = listed {
        let shown = path_text::encode(from).0;
        if !recursive {
            return Err(Error::invalid(format!("{shown} is a directory")).with_hint("copy it with --recursive"));
        }
        std::fs::create_dir_all(to).map_err(|error| Error::io(format!("create {}", to.display()), &error))?;
        for entry in entries {
            let name = path_text::decode(&entry.name, entry.name_escaped);
            // The guest chooses these names; none of them may lead out of the directory.
            if name.contains(&b'/') || name == b".." || name == b"." || name.is_empty() {
                return Err(Error::damaged(format!(
                    "the VM told a file name that is none: \"{}\"",
                    path_text::printable(&entry.name)
                )));
            }
            let there = join(from, &name);
            let here = to.join(OsString::from_vec(name));
            match entry.kind.as_str() {
                "file" | "directory" => Box::pin(fetch(client, vm, &there, &here, recursive)).await?,
                _ => crate::output::note(&format!(
                    "left out, neither file nor directory: {}",
                    path_text::printable(&entry.name)
                )),
            }
        }
        return Ok(());
    }
    let response = client.get_raw(&query(vm, "files", from)).await?;
    let header =
        |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(ToString::to_string);
    let mode = header("burgeon-mode").and_then(|mode| u32::from_str_radix(&mode, 8).ok()).unwrap_or(0o644);
    let size: u64 = header("content-length").and_then(|size| size.parse().ok()).unwrap_or(0);
    let new = to.with_file_name(format!(".{}.burgeon-new", name_of(to)?.to_string_lossy()));
    let outcome = receive(response.into_body(), &new, size).await.and_then(|()| {
        let place = || -> std::io::Result<()> {
            // Set-user-id bits of a guest's file mean nothing good here.
            std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode & 0o777))?;
            std::fs::rename(&new, to)
        };
        place().map_err(|error| Error::io(format!("write {}", to.display()), &error))
    });
    if outcome.is_err() {
        // Nothing half-made stays; it may not even be there.
        drop(std::fs::remove_file(&new));
    }
    outcome
}

async fn receive(mut body: hyper::body::Incoming, new: &Path, size: u64) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("write {}", new.display()), &error);
    let mut file = std::fs::File::create(new).map_err(failed)?;
    let mut got = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::unavailable(format!("the file broke off: {error}")))?;
        if let Some(data) = frame.data_ref() {
            got += data.len() as u64;
            file.write_all(data).map_err(failed)?;
        }
    }
    if got != size {
        return Err(Error::unavailable(format!("the file broke off: {got} of {size} bytes came")));
    }
    Ok(())
}
