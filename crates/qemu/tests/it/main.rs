//! Disks served to the tools of others.
#![allow(clippy::unwrap_used, reason = "tests stop at any error")]

mod nbd;
