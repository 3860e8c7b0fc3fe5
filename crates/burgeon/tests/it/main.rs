//! The product as its users meet it: the real binary, real VMs, real kills.
//!
//! Each test has a [`lab::Lab`]: a data directory of its own with images from a shared cache, and the
//! promise that nothing of it is left at the end.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod bad_input;
mod commits;
mod deaths;
mod disks;
mod documents;
mod elsewhere;
mod full_disk;
mod growth;
mod holds;
mod image_travels;
mod images;
mod kills;
mod lab;
mod phases;
mod pipelines;
#[allow(dead_code, reason = "it is shared with the tests of burgeon-store")]
#[path = "../../../store/tests/it/sql/server.rs"]
mod postgres;
mod provisions;
mod receipts;
#[path = "../../../store/tests/it/s3_server.rs"]
mod s3_server;
mod snapshots;
mod substrate_travels;
mod substrates;
mod vms;
