//! Durable things. So far: meta, in SQLite.
#![forbid(unsafe_code)]

pub mod meta;
mod schema;
