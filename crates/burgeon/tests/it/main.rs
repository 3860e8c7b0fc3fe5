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
mod full_disk;
mod image_travels;
mod images;
mod kills;
mod lab;
mod pipelines;
mod substrates;
mod vms;
