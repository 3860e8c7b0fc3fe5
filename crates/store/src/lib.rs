//! Durable things. So far: meta, in SQLite.
#![forbid(unsafe_code)]

pub mod disk;
mod ids;
pub mod meta;
mod schema;

pub use ids::{ChunkId, PackId, Place};
