//! The store on real directories, databases and servers, in one binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "helpers of tests are tests")]
#![forbid(unsafe_code)]

mod contract;
mod deaths;
mod directory;
#[cfg(feature = "s3")]
mod pairs;
#[cfg(feature = "s3")]
mod remote;
#[cfg(feature = "s3")]
mod s3;
#[cfg(feature = "s3")]
mod s3_server;
mod sql;
