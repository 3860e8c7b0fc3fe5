//! `substrate export` and `substrate import`: the server has the substrate, this process has the file.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use burgeon_api::{Error, ErrorKind, Result, VmId, exec::Frame, http::Progress, substrate::SubstrateView};
use burgeon_control::exec_client::{FrameReader, FrameWriter};
use rustix::fs::{CWD, RenameFlags};
use tokio::io::{AsyncRead, AsyncReadExt, ReadHalf};

use super::{Context, substrate::of};
use crate::{
    client::{Upgraded, escape},
    output,
    progress::BuildProgress,
};

/// Of one frame.
const PIECE: usize = 64 << 10;

pub(super) async fn export(context: &Context, substrate: &str, file: &Path, force: bool) -> Result<u8> {
    let mut out = Out::open(file, force)?;
    let stream = context.client()?.upgrade(&format!("{}/export", of(substrate))).await?;
    // The connection ends with its other half.
    let (read, _write) = tokio::io::split(stream);
    let mut written = 0;
    let mut take = |bytes: &[u8]| {
        written += bytes.len() as u64;
        out.write(bytes)
    };
    tokio::select! {
        outcome = follow(FrameReader::new(read), None, &mut take) => outcome?,
        _ = tokio::signal::ctrl_c() => return Err(Error::new(ErrorKind::Cancelled, "interrupted")),
    }
    out.finish(force)?;
    output::note(&format!("{} written", burgeon_api::ByteSize(written)));
    Ok(0)
}

pub(super) async fn import(context: &Context, file: &Path, name: Option<String>) -> Result<u8> {
    let failed = |error: io::Error| Error::io(format!("read {}", file.display()), &error);
    let (input, length): (Box<dyn AsyncRead + Unpin>, _) = if is_standard(file) {
        (Box::new(tokio::io::stdin()), None)
    } else {
        let opened = tokio::fs::File::open(file).await.map_err(failed)?;
        let about = opened.metadata().await.map_err(failed)?;
        if about.is_dir() {
            return Err(Error::invalid(format!("{} is a directory", file.display())));
        }
        (Box::new(opened), Some(about.len()))
    };
    let name = name.map(|name| format!("&name={}", escape(&name))).unwrap_or_default();
    let path = format!("/v1/substrates/import?id={}{name}", VmId::generate());
    let stream = context.client()?.upgrade(&path).await?;
    let (read, write) = tokio::io::split(stream);
    let mut writer = FrameWriter::new(write);
    let up = async move {
        let mut input = input;
        loop {
            let mut piece = vec![0; PIECE];
            let count = match input.read(&mut piece).await {
                Ok(count) => count,
                Err(error) => return failed(error),
            };
            piece.truncate(count);
            let frame = if count == 0 { Frame::StdinEnd } else { Frame::Stdin(piece) };
            // What the server says last tells why it takes no more.
            if writer.send(&frame).await.is_err() || count == 0 {
                return std::future::pending().await;
            }
        }
    };
    let mut answer = Vec::new();
    let mut take = |bytes: &[u8]| {
        answer.extend_from_slice(bytes);
        Ok(())
    };
    tokio::select! {
        outcome = follow(FrameReader::new(read), length, &mut take) => outcome?,
        error = up => return Err(error),
    }
    let view: SubstrateView = serde_json::from_slice(&answer)
        .map_err(|error| Error::damaged(format!("the server's answer does not read: {error}")))?;
    if context.json {
        output::json(&view)?;
    } else {
        output::print(&format!("{}\n", view.name));
    }
    Ok(0)
}

fn is_standard(file: &Path) -> bool {
    file == Path::new("-")
}

/// Shows the work of the server until its end, and takes the bytes that it sends. `length`: of the file that it reads.
async fn follow(
    mut reader: FrameReader<ReadHalf<Upgraded>>,
    length: Option<u64>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut progress = BuildProgress::new();
    loop {
        match reader.next().await? {
            Some(Frame::Stdout(bytes)) => take(&bytes)?,
            Some(Frame::Stderr(told)) => {
                let told = serde_json::from_slice(&told)
                    .map_err(|error| Error::damaged(format!("the server's progress does not read: {error}")))?;
                progress.show(&match (told, length) {
                    // How long the file is, the server does not know.
                    (Progress::Step { phase, done, total: 0, bytes: true }, Some(total)) if done > 0 => {
                        Progress::Step { phase, done, total, bytes: true }
                    }
                    (told, _) => told,
                });
            }
            Some(Frame::Exit(_)) => {
                progress.finish();
                return Ok(());
            }
            Some(Frame::Failed(error)) => {
                progress.finish();
                return Err(error);
            }
            Some(_) => return Err(Error::damaged("the server sent a frame that only clients send")),
            None => {
                return Err(Error::unavailable("the server broke off").with_hint("ask again: nothing half-made stays"));
            }
        }
    }
}

/// Where an export goes. A file has its name when it is whole, and is gone where it is not.
enum Out {
    Standard,
    File { file: fs::File, unfinished: PathBuf, path: PathBuf },
}

impl Out {
    fn open(path: &Path, force: bool) -> Result<Out> {
        if is_standard(path) {
            if io::stdout().is_terminal() {
                return Err(Error::invalid("a substrate is nothing for a terminal")
                    .with_hint("give a file, or send the output on: burgeon substrate export NAME - | ssh HOST ..."));
            }
            return Ok(Out::Standard);
        }
        if fs::symlink_metadata(path).is_ok_and(|about| about.is_dir() || !force) {
            return Err(exists(path));
        }
        let Some(name) = path.file_name() else {
            return Err(Error::invalid(format!("{} is no name of a file", path.display())));
        };
        let mut hidden = std::ffi::OsString::from(".burgeon-");
        hidden.push(VmId::generate().short());
        hidden.push("-");
        hidden.push(name);
        let unfinished = path.with_file_name(hidden);
        // What was in a guest's memory is for nobody else.
        let opened = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let file = opened.map_err(|error| Error::io(format!("write {}", path.display()), &error))?;
        Ok(Out::File { file, unfinished, path: path.to_path_buf() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Out::Standard => io::stdout().write_all(bytes).map_err(|error| Error::io("write standard output", &error)),
            Out::File { file, path, .. } => {
                file.write_all(bytes).map_err(|error| Error::io(format!("write {}", path.display()), &error))
            }
        }
    }

    fn finish(self, force: bool) -> Result<()> {
        match &self {
            Out::Standard => io::stdout().flush().map_err(|error| Error::io("write standard output", &error)),
            Out::File { file, unfinished, path } => {
                let failed = |error: io::Error| Error::io(format!("write {}", path.display()), &error);
                file.sync_all().map_err(failed)?;
                let flags = if force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
                rustix::fs::renameat_with(CWD, unfinished, CWD, path, flags).map_err(|error| match error {
                    rustix::io::Errno::EXIST => exists(path),
                    error => failed(error.into()),
                })
            }
        }
    }
}

fn exists(path: &Path) -> Error {
    Error::conflict(format!("{} exists", path.display())).with_hint("choose another name, or replace it with --force")
}

impl Drop for Out {
    fn drop(&mut self) {
        if let Out::File { unfinished, .. } = self
            && let Err(error) = fs::remove_file(&*unfinished)
            && error.kind() != io::ErrorKind::NotFound
        {
            output::note(&format!("{} stays: {error}", unfinished.display()));
        }
    }
}
