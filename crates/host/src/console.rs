//! A VM's serial console: always read, kept in a log of bounded size, and shown to whoever attaches.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{broadcast, mpsc},
};

use burgeon_qemu::command::file;

/// Each of the two files of the log. A guest that floods its console fills these and no more.
const LOG_BYTES: u64 = 1 << 20;

/// The console of one VM. The task that reads it ends when QEMU closes the socket.
#[derive(Clone, Debug)]
pub(crate) struct Console {
    input: mpsc::Sender<Vec<u8>>,
    output: broadcast::Sender<Bytes>,
}

impl Console {
    pub(crate) fn attach(stream: UnixStream, directory: &Path) -> Console {
        let (input, receiver) = mpsc::channel(16);
        let (output, _) = broadcast::channel(256);
        let log = Log::open(directory);
        tokio::spawn(own(stream, log, receiver, output.clone()));
        Console { input, output }
    }

    /// Joins a client: what the guest prints from now on, and what the client types.
    pub(crate) async fn serve(self, client: UnixStream) {
        let (mut read, mut write) = client.into_split();
        let mut output = self.output.subscribe();
        let mut typed = vec![0; 4096];
        loop {
            tokio::select! {
                said = output.recv() => match said {
                    Ok(bytes) => if write.write_all(&bytes).await.is_err() { return },
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        if write.write_all(b"\r\n[some output left out]\r\n").await.is_err() { return }
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                count = read.read(&mut typed) => match count {
                    Ok(count) if count > 0 => if self.input.send(typed[..count].to_vec()).await.is_err() { return },
                    _ => return,
                },
            }
        }
    }
}

async fn own(
    stream: UnixStream,
    mut log: Option<Log>,
    mut input: mpsc::Receiver<Vec<u8>>,
    output: broadcast::Sender<Bytes>,
) {
    let (mut read, mut write) = stream.into_split();
    let mut buffer = vec![0; 16 << 10];
    let mut typing = true;
    loop {
        tokio::select! {
            count = read.read(&mut buffer) => {
                let Ok(count @ 1..) = count else { return };
                if let Some(log) = &mut log {
                    log.append(&buffer[..count]);
                }
                // Nobody attached is the usual case.
                drop(output.send(Bytes::copy_from_slice(&buffer[..count])));
            }
            bytes = input.recv(), if typing => match bytes {
                Some(bytes) => if write.write_all(&bytes).await.is_err() { return },
                None => typing = false,
            },
        }
    }
}

struct Log {
    directory: PathBuf,
    file: fs::File,
    length: u64,
}

impl Log {
    fn open(directory: &Path) -> Option<Log> {
        let path = directory.join(file::CONSOLE_LOG);
        let mut file = fs::OpenOptions::new().append(true).create(true).open(path).ok()?;
        let length = file.seek(SeekFrom::End(0)).ok()?;
        Some(Log { directory: directory.to_path_buf(), file, length })
    }

    /// A log that cannot be written (full disk) must not stop the VM; the bytes are lost then.
    fn append(&mut self, bytes: &[u8]) {
        if self.length >= LOG_BYTES {
            let path = self.directory.join(file::CONSOLE_LOG);
            let rotated = fs::rename(&path, self.directory.join("console.log.1"));
            if let (Ok(()), Ok(file)) = (rotated, fs::File::create(&path)) {
                self.file = file;
                self.length = 0;
            }
        }
        if self.length < LOG_BYTES && self.file.write_all(bytes).is_ok() {
            self.length += bytes.len() as u64;
        }
    }
}

/// The text that is kept of a VM's console.
pub(crate) fn log_text(directory: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    for name in ["console.log.1", file::CONSOLE_LOG] {
        if let Ok(file) = fs::File::open(directory.join(name)) {
            // What can be read of a log is better than nothing.
            drop(file.take(2 * LOG_BYTES).read_to_end(&mut text));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_keeps_to_two_files() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::open(directory.path()).unwrap();
        for round in 0..600_u32 {
            log.append(&[b'a' + u8::try_from(round % 26).unwrap(); 16 << 10]);
        }
        log.append(b"the end");
        let text = log_text(directory.path());
        assert!(text.ends_with(b"the end"));
        assert!(text.len() as u64 <= 2 * LOG_BYTES + (32 << 10), "{}", text.len());
    }
}
