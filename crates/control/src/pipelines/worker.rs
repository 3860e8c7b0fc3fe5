//! One VM at work: its command runs in an exec session; items go in, results come out.

use std::collections::VecDeque;

use burgeon_api::{
    Error, ExecId, Result, VmId,
    exec::{Attach, ExecSpec, Exit, Frame},
    host::Request,
    pipeline::{ItemHeader, ResultHeader},
};
use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::mpsc;

use crate::{
    exec_client::{FrameReader, FrameWriter, InputWindow},
    host_client::HostClient,
};

/// The longest header line that a VM may send.
const MOST_HEADER: usize = 256 << 10;
/// What is kept of a command's standard error, for messages.
const MOST_STDERR: usize = 2048;

/// An item for the VM.
pub(crate) struct Work {
    pub(crate) header: ItemHeader,
    pub(crate) payload: Bytes,
}

/// What a VM answers.
pub(crate) struct Answer {
    pub(crate) header: ResultHeader,
    /// Empty where the header announces more than is allowed: the item fails by its size.
    pub(crate) payload: Bytes,
}

/// Runs the command in the VM until it ends or `work` is closed, which ends it.
///
/// # Errors
/// Why the VM can give no more results.
pub(crate) async fn run(
    host: &HostClient,
    vm: VmId,
    spec: ExecSpec,
    payload_limit: u64,
    mut work: mpsc::Receiver<Work>,
    answers: &mpsc::Sender<Answer>,
) -> Result<()> {
    let attach = Attach { exec: ExecId::generate(), spec, resume: false, stdout_received: 0, stderr_received: 0 };
    let stream = host.stream(Request::Exec { vm, attach: Box::new(attach) }).await?;
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    let mut window = InputWindow::default();
    let mut outgoing: VecDeque<Bytes> = VecDeque::new();
    let mut parser = Parser::new(payload_limit);
    let mut stderr = Vec::new();
    let (mut stdout_received, mut stderr_received) = (0, 0);
    loop {
        while let Some(front) = outgoing.front_mut() {
            let count = window.room().min(front.len());
            if count == 0 {
                break;
            }
            let data = front.split_to(count);
            window.sent += count as u64;
            if front.is_empty() {
                outgoing.pop_front();
            }
            writer.send(&Frame::Stdin(data.to_vec())).await?;
        }
        tokio::select! {
            frame = reader.next() => match frame? {
                Some(Frame::Stdout(data)) => {
                    stdout_received += data.len() as u64;
                    let mut results = Vec::new();
                    let sound = parser.take(&data, &mut results);
                    for answer in results {
                        if answers.send(answer).await.is_err() {
                            return writer.send(&Frame::Hangup).await;
                        }
                    }
                    sound?;
                    writer.send(&Frame::OutputReceived { stdout: stdout_received, stderr: stderr_received }).await?;
                }
                Some(Frame::Stderr(data)) => {
                    stderr_received += data.len() as u64;
                    stderr.extend_from_slice(&data);
                    let excess = stderr.len().saturating_sub(MOST_STDERR);
                    stderr.drain(..excess);
                    writer.send(&Frame::OutputReceived { stdout: stdout_received, stderr: stderr_received }).await?;
                }
                Some(Frame::StdinReceived(taken)) => window.taken = taken,
                Some(Frame::Exit(exit)) => {
                    writer.send(&Frame::Hangup).await?;
                    return Err(ended(&exit, &stderr));
                }
                Some(Frame::Failed(error)) => return Err(error),
                Some(_) => return Err(Error::damaged("the host process sent a frame that only clients send")),
                None => return Err(Error::unavailable("the host process closed the session")),
            },
            item = work.recv(), if outgoing.is_empty() => {
                let Some(item) = item else {
                    // Nobody needs the VM any more.
                    return writer.send(&Frame::Hangup).await;
                };
                let mut line = serde_json::to_vec(&item.header).map_err(|error| Error::internal(error.to_string()))?;
                line.push(b'\n');
                outgoing.push_back(line.into());
                if !item.payload.is_empty() {
                    outgoing.push_back(item.payload);
                }
            }
        }
    }
}

fn ended(exit: &Exit, stderr: &[u8]) -> Error {
    let said = String::from_utf8_lossy(stderr);
    let said = said.lines().rfind(|line| !line.trim().is_empty()).map(burgeon_api::path_text::printable);
    let said = said.map(|line| format!(": {line}")).unwrap_or_default();
    let how = match exit {
        Exit::Code { code } => format!("the step's command ended with code {code}"),
        Exit::Signal { signal } => format!("the step's command was ended by signal {signal}"),
        Exit::TimeLimit => "the step's command ran out of time".to_string(),
        Exit::NotStarted { reason, .. } => format!("the step's command cannot be started: {reason}"),
        Exit::Lost { reason } => reason.clone(),
    };
    Error::unavailable(format!("{how}{said}"))
}

/// Results out of a stream of bytes: a line of JSON, then the payload that it announces.
struct Parser {
    buffer: BytesMut,
    header: Option<ResultHeader>,
    /// Bytes of an oversized payload still to be dropped.
    skipping: u64,
    payload_limit: u64,
}

impl Parser {
    fn new(payload_limit: u64) -> Self {
        Self { buffer: BytesMut::new(), header: None, skipping: 0, payload_limit }
    }

    fn take(&mut self, data: &[u8], answers: &mut Vec<Answer>) -> Result<()> {
        self.buffer.extend_from_slice(data);
        loop {
            if self.skipping > 0 {
                let count = self.buffer.len().min(usize::try_from(self.skipping).unwrap_or(usize::MAX));
                self.buffer.advance(count);
                self.skipping -= count as u64;
                if self.skipping > 0 {
                    return Ok(());
                }
            }
            if let Some(header) = &self.header {
                let size = usize::try_from(header.size).unwrap_or(usize::MAX);
                if self.buffer.len() < size {
                    return Ok(());
                }
                let payload = self.buffer.split_to(size).freeze();
                if let Some(header) = self.header.take() {
                    answers.push(Answer { header, payload });
                }
                continue;
            }
            let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else {
                if self.buffer.len() > MOST_HEADER {
                    return Err(Error::damaged("the step's command wrote something that is no result"));
                }
                return Ok(());
            };
            let line = self.buffer.split_to(end + 1);
            let header: ResultHeader = serde_json::from_slice(&line).map_err(|error| {
                let start = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
                let start = burgeon_api::path_text::printable(start.trim_end());
                Error::damaged(format!("the step's command wrote \"{start}\", which is no result: {error}"))
            })?;
            if header.size > self.payload_limit {
                self.skipping = header.size;
                answers.push(Answer { header, payload: Bytes::new() });
            } else {
                self.header = Some(header);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(pieces: &[&[u8]], limit: u64) -> (Vec<(u64, Vec<u8>)>, Result<()>) {
        let mut seen = Vec::new();
        let mut parser = Parser::new(limit);
        let outcome = pieces.iter().try_for_each(|piece| parser.take(piece, &mut seen));
        (seen.into_iter().map(|answer| (answer.header.item, answer.payload.to_vec())).collect(), outcome)
    }

    #[test]
    fn results_are_found_however_the_bytes_come() {
        let text: &[u8] =
            b"{\"item\":1,\"attempt\":1,\"vm\":\"a\",\"size\":3}\nabc{\"item\":2,\"attempt\":1,\"vm\":\"a\"}\n";
        let whole = feed(&[text], 10).0;
        assert_eq!(whole, [(1, b"abc".to_vec()), (2, vec![])]);
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(feed(&bytes, 10).0, whole);
        assert_eq!(feed(&bytes, 2).0, [(1, vec![]), (2, vec![])]);
    }

    #[test]
    fn what_is_no_result_is_told() {
        let error = feed(&[b"hello\n"], 10).1.unwrap_err();
        assert!(error.message.contains("hello"), "{error}");
        assert!(feed(&[&vec![b'x'; MOST_HEADER + 1]], 10).1.is_err());
    }
}
