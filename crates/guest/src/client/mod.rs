//! The host's side of an agent channel.
//!
//! [`AgentClient`] is a cheap handle; one task per channel owns the stream, the decoder and all streams' state.
//! The task ends when every handle is dropped, when the channel ends, or by [`AgentClient::close`].
//!
//! States of a channel: connecting (Hello is sent, everything but its Welcome is ignored) -> attached ->
//! ended (with a reason). An agent that starts anew, or control messages that were lost, lead from attached back to
//! connecting: all that was under way fails, and a new session begins.
//!
//! The guest is not trusted. Its queues are bounded by the credit that they were given; bytes that are no
//! frames of the protocol are counted, and tolerated up to [`Options::noise_limit`] in ten seconds.

mod handle;
mod streams;
mod task;

use std::{sync::Arc, time::Duration};

pub use handle::{AgentClient, FileContent, Put};
pub use streams::{ExecControl, ExecEvent, ExecHandle, ExecOutput, StdinSender};

use crate::protocol::About;

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Random; names the session. A client that connects with another one ends everything of the earlier.
    pub session: [u8; 16],
    /// Becomes the guest's host name unless it is empty.
    pub vm_name: String,
    /// Nanoseconds since 1970; read at each attach.
    pub clock: fn() -> u64,
    /// Within this time the agent answers a request, and takes or gives the next piece of a file.
    pub request_deadline: Duration,
    /// Hello is repeated in these intervals until it is answered.
    pub hello_interval: Duration,
    /// The agent is known to stand between two frames, as it does in a captured state: then it gets no zeros before the
    /// first Hello, which a guest that has just gone on takes long to read. They come before a repeated one.
    pub at_rest: bool,
    /// Stray bytes within ten seconds, after which the channel is declared damaged.
    pub noise_limit: u64,
}

impl Options {
    /// The usual behaviour, with what only the caller can choose.
    pub fn new(session: [u8; 16], vm_name: impl Into<String>, clock: fn() -> u64) -> Self {
        Self {
            session,
            vm_name: vm_name.into(),
            clock,
            request_deadline: Duration::from_secs(30),
            hello_interval: Duration::from_secs(2),
            at_rest: false,
            noise_limit: 1 << 20,
        }
    }
}

/// What a channel tells unasked. A listener that is slower than the events misses the oldest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentEvent {
    /// The agent started; attaching follows by itself.
    Ready(Arc<About>),
    /// The session began.
    Attached(Arc<About>),
    /// A stage of the guest's start failed; the agent answers from its initramfs.
    BootFailed { stage: String, reason: String },
    /// What the agent had to skip of our bytes so far.
    GuestNoise { skipped: u64 },
    /// What we had to skip or ignore of the guest's bytes so far.
    HostNoise { skipped: u64 },
    /// The session was lost and everything in it failed; a new one is being opened.
    SessionLost { reason: String },
    /// The channel is over.
    Ended { reason: String },
}
