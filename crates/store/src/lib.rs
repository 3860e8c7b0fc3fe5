//! Durable things: meta, the catalog of chunks, and the SQL below both.
#![forbid(unsafe_code)]

pub mod catalog;
mod ids;
pub mod meta;
mod schema;
pub mod sql;

pub use ids::{ChunkId, PackId, Place};
