//! The agent channel, version 1: a byte stream in both directions (a virtio-serial port named
//! `burgeon.agent.0`, or a unix socket), which may lose its host at any byte.
//!
//! # Frames
//! ```text
//! offset size  header, 20 bytes, little-endian; this layout is the same in every version
//!      0    4  magic "BgnF"
//!      4    1  version: 1
//!      5    1  kind: 1 control, 2 data, 3 data end, 4 window
//!      6    2  sequence: counts the frames that this side sent on this stream, from 0, wrapping
//!      8    4  stream: 0 for control; other numbers are chosen by the host
//!     12    4  length of the payload, at most 65,536
//!     16    4  CRC-32 (IEEE) of bytes 0 to 15
//! payload:
//!     control   one postcard message ([`HostMessage`] or [`GuestMessage`]), then its CRC-32 (4 bytes)
//!     data      raw bytes, unchecked: checksums are slow in emulated guests, and the transport is reliable
//!     data end  empty: no more data of this stream from this side
//!     window    u32: credit given back for a stream that this side receives
//! ```
//! A receiver that meets anything else skips to the next magic. It counts skipped bytes, except zeros, which
//! are filler. A header of another version with a right checksum is told by its version, so that it can be
//! refused by name. A sequence number that is not the expected one means lost frames: that stream is
//! failed, never continued; on stream 0 it ends the session.
//!
//! # Attach
//! ```text
//! agent                                        host
//!   Ready{about}  ->                             when the agent starts; waits in the channel for a host
//!                 <-  65,600 zero bytes, Hello{version, session, host time, VM name}
//!   ends every exec, put and get of other sessions
//!   Welcome{session, about}  ->                  or Refused{version, reason}
//! ```
//! The zeros complete a frame that the agent may still be waiting in from a host that went away (if that was
//! data, its stream gets up to 65,536 zeros just before it is ended: only an exec's input can see them).
//! Hello and Welcome restart the sequence of stream 0 at 0 in their direction. The host ignores
//! everything but Ready, Welcome and Refused before its own session's Welcome, and may repeat Hello
//! with the same session until then: that ends nothing.
//!
//! # Requests
//! The host sends `Request{id, ..}`; the agent answers each with exactly one `Reply{id, ..}`, in any order.
//!
//! | request | streams | reply |
//! |---|---|---|
//! | Exec | `s` input, `s+1` output (or terminal), `s+2` errors | when the program runs; `Exited{s}` after the last output |
//! | Put | `s`: host sends the content at once, then data end | when the file is in place under its name |
//! | Get | `s`: agent sends the content, then data end | before the content: mode and size |
//! | Close | ends the exec, put or get of stream `s` without further events | always |
//!
//! After an exec's first process has ended, its output is read until its end, or until 200 ms pass in which
//! the agent could have read and nothing came (a background process holds the pipe); then it is closed.
//! A put that breaks leaves nothing behind. Stream numbers are not used twice in a session.
//! Messages only grow at the end of an enum, which raises the [`REVISION`]; every other change is a new version. An
//! agent tells its revision in [`About`], and a host sends it nothing newer.
//!
//! # Flow control
//! Each direction of a stream starts with 1,048,576 bytes of credit. A data frame costs its length, but at
//! least 256, so that a receiver's queue is bounded in frames too. Receivers give credit back as their
//! consumer takes the data, in batches. Spending credit that is not there fails the stream. Control
//! goes before data, and data of several streams takes turns frame by frame.

mod frame;
mod message;
#[cfg(test)]
mod tests;

pub use frame::{
    BEST_PAYLOAD, CREDIT_BATCH, ControlFault, Decoder, FLUSH_BYTES, Frame, HEADER_BYTES, Header, Kind, LEAST_COST,
    MAGIC, MOST_PAYLOAD, Received, Sequence, VERSION, WINDOW, cost, decode_control, encode_control, encode_frame,
};
pub use message::{
    About, Answer, Exec, ExitStatus, Failure, FailureKind, Figures, FileEntry, FileKind, GuestMessage, Hello,
    HostMessage, Identity, Proof, Provision, REVISION, Receipt, Request, StopHow, TerminalSize,
};
