//! Durable things. So far: meta, in SQLite.
#![forbid(unsafe_code)]

pub mod chunk;
pub mod cut;
mod ids;
pub mod map;
pub mod meta;
pub mod objects;
pub mod pack;
mod schema;
#[cfg(test)]
mod testing;
mod wire;

pub use ids::{ChunkId, PackId, Place};
