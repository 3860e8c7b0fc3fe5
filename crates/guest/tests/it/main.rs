//! The real agent on a socket, driven by the real client.

mod channel;
mod each;
mod exec;
mod files;
mod harness;
