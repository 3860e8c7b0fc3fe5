//! Tests that show an image being made and used. Packages come from the machine's apt once, then
//! from `$BURGEON_TEST_CACHE` (by default a directory beside the build's output).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod disk;
mod imports;
mod oci;
mod recipes;
mod runner;
mod support;
