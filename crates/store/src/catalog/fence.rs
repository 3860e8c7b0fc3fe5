//! What keeps a collection and a writer's new root apart, without a clock.
//!
//! The catalog counts two things: how often a root was set, and how often rows of chunks were deleted. Each count is
//! raised in the transaction that it tells of.
//!
//! - A collection deletes chunks only while no root was set since it read all roots and marked what they lead to. Else
//!   the sweep is refused, and the collection marks what is new and asks again.
//! - A writer's root is set only while no chunk was deleted since before it saw that all of its chunks are there. Else
//!   the root is not set, and the writer looks at its chunks again.
//!
//! Write transactions exclude one another. So of a sweep and a root that do not know of each other, the first that is
//! committed makes the other one look again. Neither count ever goes back.

use burgeon_api::{Error, Result};

use super::{Catalog, NewRoot, Root, roots};
use crate::sql::Connection;

const ROOTS: &str = "roots set";
const REMOVALS: &str = "removals";

/// How often roots had been set when all roots were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootsSeen(u64);

/// How often chunks had been deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removals(u64);

impl Catalog {
    /// All roots, by kind and name, and what a sweep needs to tell whether one was set since. A thread waits.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_see_roots(&self) -> Result<(Vec<Root>, RootsSeen)> {
        self.database.blocking_read("list roots", |connection| {
            Ok((roots::roots(connection, None)?, RootsSeen(count(connection, ROOTS)?)))
        })
    }

    /// To be asked before a writer looks whether its chunks are there, for [`Catalog::blocking_set_root_since`]. A thread
    /// waits.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_removals(&self) -> Result<Removals> {
        self.database.blocking_read("count removals", |connection| Ok(Removals(count(connection, REMOVALS)?)))
    }

    /// [`Catalog::blocking_set_root`], if no chunk was deleted since. Answers whether the root is set; if it is not,
    /// nothing has changed, and what it relies on is to be looked at again.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_set_root_since(&self, root: NewRoot, since: Removals, now_us: u64) -> Result<bool> {
        self.database.blocking_write("set root", move |connection| {
            if count(connection, REMOVALS)? != since.0 {
                return Ok(false);
            }
            roots::set_root(connection, &root, now_us)?;
            Ok(true)
        })
    }
}

/// Whether no root was set since.
pub(super) fn sees_all_roots(connection: &mut Connection, seen: RootsSeen) -> Result<bool> {
    Ok(count(connection, ROOTS)? == seen.0)
}

pub(super) fn root_was_set(connection: &mut Connection) -> Result<()> {
    raise(connection, ROOTS)
}

pub(super) fn chunks_were_deleted(connection: &mut Connection) -> Result<()> {
    raise(connection, REMOVALS)
}

fn count(connection: &mut Connection, name: &str) -> Result<u64> {
    let row = connection.query_first("SELECT value FROM counter WHERE name = $1", &[name.into()])?;
    row.ok_or_else(|| Error::damaged(format!("the catalog does not count {name}")))?.unsigned(0)
}

fn raise(connection: &mut Connection, name: &str) -> Result<()> {
    if connection.execute("UPDATE counter SET value = value + 1 WHERE name = $1", &[name.into()])? == 1 {
        return Ok(());
    }
    Err(Error::damaged(format!("the catalog does not count {name}")))
}
