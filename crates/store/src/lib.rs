//! Durable things: meta, the catalog of chunks, and the SQL below both.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod catalog;
pub mod chunk;
pub mod chunk_store;
pub mod cut;
pub mod disk;
pub mod hold;
mod ids;
mod life;
pub mod map;
pub mod meta;
pub mod objects;
pub mod pack;
pub mod places;
mod receipts;
#[cfg(feature = "s3")]
pub mod remote;
pub mod rollback;
mod schema;
pub mod sql;
pub mod steps;
#[cfg(test)]
mod testing;
mod wire;

pub use ids::{ChunkId, OwnerId, PackId, Place, StoreId};
