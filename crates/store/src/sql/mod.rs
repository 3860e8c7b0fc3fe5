//! One thin, synchronous way to speak SQL on two engines: SQLite for one machine, PostgreSQL for several.
//!
//! Statements are written once, with `$1`, `$2` for parameters, out of what both engines know. Writes go through one
//! thread, which commits those that wait together ([`Committer`]); reads have connections of their own. Writers of a
//! component exclude one another, also those of other processes: SQLite locks the file, PostgreSQL takes an advisory
//! lock. So a write transaction sees everything that was committed before it began, and nothing changes beside it.

mod address;
mod committer;
mod connection;
mod copy;
mod database;
mod migrate;
mod owner;
mod postgres;
mod readers;
mod sqlite;
mod value;

pub use address::Address;
pub use committer::Committer;
pub use connection::Connection;
pub(crate) use connection::check;
pub(crate) use copy::{Table, copy, make_room};
pub use database::Database;
pub use migrate::Component;
pub(crate) use owner::claim_owner;
pub use value::{Row, Value};
