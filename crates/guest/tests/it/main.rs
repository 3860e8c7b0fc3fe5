//! The real agent on a socket, driven by the real client.
#![allow(clippy::unwrap_used, reason = "a test stops at any error")]

mod channel;
mod each;
mod exec;
mod files;
mod harness;
