//! Tests of burgeon-plan: one binary.
#![allow(clippy::unwrap_used, reason = "a test that panics says where")]
#![forbid(unsafe_code)]

mod compile;
mod hosts;
mod random;
mod scenarios;
