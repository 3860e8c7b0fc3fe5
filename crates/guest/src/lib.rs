//! What passes between a host and the agent inside a system VM.
//!
//! * [`protocol`]: the frames and messages of the agent channel, version 1. No input or output.
//! * [`client`] (feature `client`): the host's side on tokio, [`client::AgentClient`].
//! * The binary `burgeon-agent` (feature `agent`): the guest's side, a small static program that is
//!   also the `/init` of Burgeon's initramfs.
//!
//! A guest is never trusted: whatever it sends, the client's memory is bounded and it never panics.
//! The agent trusts its host, and still survives any bytes on the channel.
#![forbid(unsafe_code)]

#[cfg(feature = "client")]
pub mod client;
pub mod protocol;
