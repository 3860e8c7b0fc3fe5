//! The control process against a host process that is played: what only the timing of answers can show.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod damage;
mod desk;
mod host;
mod reconcile;
mod store;
