//! Commands inside VMs: what to run, how it ended, and the frames of an exec session.
//!
//! A session is a stream of frames between a client and the host process; the control process
//! passes it on without reading it. Either side may lose the connection and come back: byte counts
//! say where to go on, so nothing is lost or repeated.
//!
//! ```text
//! frame:  kind u8 | length u32, little-endian | payload (at most 65,536 bytes)
//! ```

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, ExecId, Result};

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

/// A command to run inside a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// The program, looked up in `PATH`, and its arguments. Empty: the user's login shell.
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; the user's home when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User name or number; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A terminal of this size instead of three streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// The command is killed after this many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_ms: Option<u64>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "how")]
pub enum Exit {
    /// It returned this code.
    Code { code: i32 },
    /// It was ended by this signal.
    Signal { signal: i32 },
    /// It was killed because its time was up.
    TimeLimit,
    /// It could not be started: `not_found` tells "no such command" from "cannot run it".
    NotStarted { reason: String, not_found: bool },
    /// Its VM or its host process went away.
    Lost { reason: String },
}

impl Exit {
    /// The exit code that `burgeon exec` passes on: the guest's own, 128 + signal, or
    /// 124 (time limit), 125 (our failure), 126 (cannot run), 127 (no such command), as timeout(1) and env(1) do.
    pub fn code(&self) -> i32 {
        match self {
            Exit::Code { code } => *code,
            Exit::Signal { signal } => 128 + signal,
            Exit::TimeLimit => 124,
            Exit::Lost { .. } => 125,
            Exit::NotStarted { not_found, .. } => 126 + i32::from(*not_found),
        }
    }
}

/// The largest payload of a session frame.
pub const MOST_PAYLOAD: usize = 64 << 10;
/// Bytes that a side may send on one stream before they are acknowledged.
pub const WINDOW: u64 = 256 << 10;

/// Opens or joins a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Attach {
    /// Chosen by the client. A second attach with the same id joins the running command.
    pub exec: ExecId,
    pub spec: ExecSpec,
    /// The client had a connection for this command before: if the host does not know the command any
    /// more it says so, and never runs it a second time.
    #[serde(default)]
    pub resume: bool,
    /// Bytes of output already received, to go on from there.
    #[serde(default)]
    pub stdout_received: u64,
    #[serde(default)]
    pub stderr_received: u64,
}

/// One frame of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Client to host: input of the command.
    Stdin(Vec<u8>),
    /// Client to host: no more input.
    StdinEnd,
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// Client to host: bytes consumed so far, by stream.
    OutputReceived {
        stdout: u64,
        stderr: u64,
    },
    /// Host to client: bytes of input taken so far. The first frame of every attach.
    StdinReceived(u64),
    Signal(i32),
    Resize(TerminalSize),
    /// Host to client, last: how it ended.
    Exit(Exit),
    /// Host to client, last: the session failed.
    Failed(Error),
    /// Client to host: the session is over for the client, be it that it has the exit or that its user
    /// went away; a command that still runs is ended. Without this frame a lost connection only means
    /// that the client will come back.
    Hangup,
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Frame::Stdin(_) => 1,
            Frame::StdinEnd => 2,
            Frame::Stdout(_) => 3,
            Frame::Stderr(_) => 4,
            Frame::OutputReceived { .. } => 5,
            Frame::StdinReceived(_) => 6,
            Frame::Signal(_) => 7,
            Frame::Resize(_) => 8,
            Frame::Exit(_) => 9,
            Frame::Failed(_) => 10,
            Frame::Hangup => 11,
        }
    }

    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.push(self.kind());
        out.extend([0; 4]);
        match self {
            Frame::Stdin(data) | Frame::Stdout(data) | Frame::Stderr(data) => out.extend(data),
            Frame::StdinEnd | Frame::Hangup => {}
            Frame::OutputReceived { stdout, stderr } => {
                out.extend(stdout.to_le_bytes());
                out.extend(stderr.to_le_bytes());
            }
            Frame::StdinReceived(count) => out.extend(count.to_le_bytes()),
            Frame::Signal(signal) => out.extend(signal.to_le_bytes()),
            Frame::Resize(size) => {
                out.extend(size.rows.to_le_bytes());
                out.extend(size.columns.to_le_bytes());
            }
            Frame::Exit(exit) => out.extend(serde_json::to_vec(exit).unwrap_or_default()),
            Frame::Failed(error) => out.extend(serde_json::to_vec(error).unwrap_or_default()),
        }
        let length = u32::try_from(out.len() - start - 5).unwrap_or(u32::MAX);
        out[start + 1..start + 5].copy_from_slice(&length.to_le_bytes());
    }

    /// Takes one whole frame from the front of `input`: the frame and how many bytes it took, or
    /// `None` while it is not whole.
    ///
    /// # Errors
    /// `Damaged` for an unknown kind, a length beyond [`MOST_PAYLOAD`], or a payload of the wrong shape.
    pub fn decode(input: &[u8]) -> Result<Option<(Frame, usize)>> {
        let Some((&kind, rest)) = input.split_first() else {
            return Ok(None);
        };
        let Some(length) = rest.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MOST_PAYLOAD {
            return Err(Error::damaged(format!("exec session: frame of {length} bytes")));
        }
        let Some(payload) = rest.get(4..4 + length) else {
            return Ok(None);
        };
        let wrong = || Error::damaged(format!("exec session: frame kind {kind} with {length} bytes"));
        let word = |at: usize| payload.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        let half = |at: usize| payload.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_le_bytes);
        let frame = match kind {
            1 => Frame::Stdin(payload.to_vec()),
            2 => Frame::StdinEnd,
            3 => Frame::Stdout(payload.to_vec()),
            4 => Frame::Stderr(payload.to_vec()),
            5 => Frame::OutputReceived { stdout: word(0).ok_or_else(wrong)?, stderr: word(8).ok_or_else(wrong)? },
            6 => Frame::StdinReceived(word(0).ok_or_else(wrong)?),
            7 => Frame::Signal(i32::from_le_bytes(payload.try_into().map_err(|_| wrong())?)),
            8 => Frame::Resize(TerminalSize { rows: half(0).ok_or_else(wrong)?, columns: half(2).ok_or_else(wrong)? }),
            9 => Frame::Exit(serde_json::from_slice(payload).map_err(|_| wrong())?),
            10 => Frame::Failed(serde_json::from_slice(payload).map_err(|_| wrong())?),
            11 => Frame::Hangup,
            _ => return Err(wrong()),
        };
        Ok(Some((frame, 5 + length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_pinned_bytes() {
        let pinned: [(Frame, &[u8]); 7] = [
            (Frame::Stdin(b"hi".to_vec()), b"\x01\x02\0\0\0hi"),
            (Frame::StdinEnd, b"\x02\0\0\0\0"),
            (Frame::StdinReceived(258), b"\x06\x08\0\0\0\x02\x01\0\0\0\0\0\0"),
            (Frame::Signal(15), b"\x07\x04\0\0\0\x0f\0\0\0"),
            (Frame::Resize(TerminalSize { rows: 24, columns: 80 }), b"\x08\x04\0\0\0\x18\0\x50\0"),
            (Frame::Exit(Exit::Code { code: 3 }), b"\x09\x19\0\0\0{\"how\":\"code\",\"code\":3}" as &[u8]),
            (Frame::OutputReceived { stdout: 1, stderr: 2 }, b"\x05\x10\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"),
        ];
        for (frame, bytes) in pinned {
            let mut out = Vec::new();
            frame.encode(&mut out);
            if !matches!(frame, Frame::Exit(_)) {
                assert_eq!(out, bytes, "{frame:?}");
            }
            assert_eq!(Frame::decode(&out).unwrap(), Some((frame, out.len())));
            assert_eq!(Frame::decode(&out[..out.len() - 1]).unwrap(), None);
        }
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Frame::decode(&[99, 0, 0, 0, 0]).is_err());
        assert!(Frame::decode(&[1, 255, 255, 255, 255]).is_err());
        assert!(Frame::decode(&[7, 1, 0, 0, 0, 9]).is_err());
    }

    #[test]
    fn exit_codes_follow_env_and_timeout() {
        assert_eq!(Exit::Signal { signal: 9 }.code(), 137);
        assert_eq!(Exit::NotStarted { reason: String::new(), not_found: true }.code(), 127);
        assert_eq!(Exit::NotStarted { reason: String::new(), not_found: false }.code(), 126);
        assert_eq!(Exit::TimeLimit.code(), 124);
        assert_eq!(Exit::Lost { reason: String::new() }.code(), 125);
    }
}
