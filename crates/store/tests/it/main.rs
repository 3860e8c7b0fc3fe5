//! Tests of burgeon-store on real directories and servers: one binary.
#![allow(clippy::unwrap_used, reason = "a test that panics says where")]
#![forbid(unsafe_code)]

mod contract;
mod directory;
#[cfg(feature = "s3")]
mod s3;
