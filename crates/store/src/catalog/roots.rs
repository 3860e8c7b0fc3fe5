//! Roots: the names that keep chunks alive.

use burgeon_api::{Error, Result};

use super::{Catalog, blob, fence, must_claim};
use crate::{
    ChunkId,
    sql::{Connection, Row},
};

/// A name for what is stored. Whatever its map leads to stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub kind: String,
    pub name: String,
    /// The chunk that all others of this root are found from.
    pub map: ChunkId,
    /// When it was last set.
    pub created_us: u64,
    /// From when on it no longer keeps anything; the next collection removes it.
    pub expires_us: Option<u64>,
    pub note: String,
}

/// A root to be set.
#[derive(Clone, Debug)]
pub struct NewRoot {
    pub kind: String,
    pub name: String,
    /// What the caller has seen under this name: nothing, or this map.
    pub expected: Option<ChunkId>,
    pub map: ChunkId,
    /// Other chunks that must be here too: all that the map leads to. Very many are better verified before, in pieces, with
    /// [`Catalog::verify_claims`], between [`Catalog::blocking_removals`] and [`Catalog::blocking_set_root_since`].
    pub relied: Vec<ChunkId>,
    pub expires_us: Option<u64>,
    pub note: String,
}

impl NewRoot {
    /// A root under a name that nothing has yet, or that has this map already; it keeps the map for good.
    #[must_use]
    pub fn new(kind: &str, name: String, map: ChunkId) -> NewRoot {
        let (relied, note) = (Vec::new(), String::new());
        NewRoot { kind: kind.into(), name, expected: None, map, relied, expires_us: None, note }
    }
}

impl Catalog {
    /// Sets a root, if everything that it relies on is here. The map and all of that count as touched now.
    ///
    /// # Errors
    /// `Conflict` when the name holds another map than expected, and when a chunk is gone.
    pub async fn set_root(&self, root: NewRoot, now_us: u64) -> Result<()> {
        self.database.write("set root", move |connection| set_root(connection, &root, now_us)).await
    }

    /// [`Catalog::set_root`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_set_root(&self, root: NewRoot, now_us: u64) -> Result<()> {
        self.database.blocking_write("set root", move |connection| set_root(connection, &root, now_us))
    }

    /// Sets a root over a map that a root keeps already, so that nothing below it needs to be looked at. `relied` does
    /// not matter. A thread waits.
    ///
    /// # Errors
    /// As [`Self::set_root`]; `Conflict` too where no root keeps the map: what it leads to may be gone.
    pub fn blocking_share_root(&self, root: NewRoot, now_us: u64) -> Result<()> {
        self.database.blocking_write("share root", move |connection| {
            let kept = "SELECT 1 FROM root WHERE map = $1 LIMIT 1";
            if connection.query_first(kept, &[blob(&root.map)])?.is_none() {
                return Err(Error::conflict(format!("nothing keeps the map {} any more", root.map)));
            }
            // No collection need look again: whichever root was the first to have the map was told of when it was set.
            put_root(connection, &root, now_us)
        })
    }

    /// One root.
    ///
    /// # Errors
    /// The database's.
    pub async fn root(&self, kind: &str, name: &str) -> Result<Option<Root>> {
        let (kind, name) = (kind.to_string(), name.to_string());
        self.database.read("find root", move |connection| find(connection, &kind, &name)).await
    }

    /// All roots, or those of one kind, by kind and name.
    ///
    /// # Errors
    /// The database's.
    pub async fn roots(&self, kind: Option<&str>) -> Result<Vec<Root>> {
        let kind = kind.map(ToString::to_string);
        self.database.read("list roots", move |connection| roots(connection, kind.as_deref())).await
    }

    /// [`Catalog::roots`] for a thread that may wait.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_roots(&self, kind: Option<&str>) -> Result<Vec<Root>> {
        let kind = kind.map(ToString::to_string);
        self.database.blocking_read("list roots", move |connection| roots(connection, kind.as_deref()))
    }

    /// Removes a root; its chunks go with the next collection, where nothing else keeps them. Answers whether it was
    /// there. `expected` is the map the caller has seen, where it cares.
    ///
    /// # Errors
    /// `Conflict` when the name holds another map than expected.
    pub async fn remove_root(&self, kind: &str, name: &str, expected: Option<ChunkId>) -> Result<bool> {
        let (kind, name) = (kind.to_string(), name.to_string());
        self.database.write("remove root", move |connection| remove(connection, &kind, &name, expected)).await
    }

    /// Removes a root, unless somebody has set it again since it was seen like this. Answers whether it went.
    ///
    /// # Errors
    /// The database's.
    pub async fn remove_root_as_seen(&self, root: Root) -> Result<bool> {
        self.database
            .write("remove root", move |connection| {
                let sql = "DELETE FROM root WHERE kind = $1 AND name = $2 AND map = $3 AND created_us = $4";
                let seen =
                    [root.kind.as_str().into(), root.name.as_str().into(), blob(&root.map), root.created_us.into()];
                connection.execute(sql, &seen).map(|removed| removed == 1)
            })
            .await
    }

    /// [`Catalog::remove_root`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_remove_root(&self, kind: &str, name: &str, expected: Option<ChunkId>) -> Result<bool> {
        let (kind, name) = (kind.to_string(), name.to_string());
        self.database.blocking_write("remove root", move |connection| remove(connection, &kind, &name, expected))
    }

    /// Removes all roots whose time is over. Answers how many. A thread waits.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_expire_roots(&self, now_us: u64) -> Result<u64> {
        self.database.blocking_write("let go of expired roots", move |connection| {
            connection.execute("DELETE FROM root WHERE expires_us <= $1", &[now_us.into()])
        })
    }

    /// Gives the root with this map another name.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when the new name is taken, or the old one holds another map.
    pub async fn rename_root(&self, kind: &str, from: &str, to: &str, map: ChunkId) -> Result<()> {
        let (kind, from, to) = (kind.to_string(), from.to_string(), to.to_string());
        self.database
            .write("rename root", move |connection| {
                let (old, new) = (find(connection, &kind, &from)?, find(connection, &kind, &to)?);
                match (old, new) {
                    (Some(old), _) if old.map != map => Err(changed(&kind, &from)),
                    (Some(_), _) if from == to => Ok(()),
                    (Some(_), Some(_)) => Err(Error::conflict(format!("a {kind} named \"{to}\" exists"))
                        .with_hint("choose another name, or remove that one first")),
                    (Some(_), None) => {
                        let names = [kind.as_str().into(), from.as_str().into(), to.as_str().into()];
                        connection.execute("UPDATE root SET name = $3 WHERE kind = $1 AND name = $2", &names)?;
                        Ok(())
                    }
                    // The same request again.
                    (None, Some(new)) if new.map == map => Ok(()),
                    (None, _) => Err(Error::not_found(format!("there is no {kind} \"{from}\""))),
                }
            })
            .await
    }
}

const COLUMNS: &str = "SELECT kind, name, map, created_us, expires_us, note FROM root";

fn remove(connection: &mut Connection, kind: &str, name: &str, expected: Option<ChunkId>) -> Result<bool> {
    let Some(root) = find(connection, kind, name)? else { return Ok(false) };
    if expected.is_some_and(|map| map != root.map) {
        return Err(changed(kind, name));
    }
    connection.execute("DELETE FROM root WHERE kind = $1 AND name = $2", &[kind.into(), name.into()])?;
    Ok(true)
}

pub(super) fn set_root(connection: &mut Connection, root: &NewRoot, now_us: u64) -> Result<()> {
    put_root(connection, root, now_us)?;
    fence::root_was_set(connection)
}

fn put_root(connection: &mut Connection, root: &NewRoot, now_us: u64) -> Result<()> {
    must_claim(connection, &[root.map], now_us)?;
    must_claim(connection, &root.relied, now_us)?;
    let current = find(connection, &root.kind, &root.name)?;
    let current_map = current.as_ref().map(|root| root.map);
    if current_map != root.expected && current_map != Some(root.map) {
        return Err(match (&current, root.expected) {
            (Some(_), None) => Error::conflict(format!("a {} named \"{}\" exists", root.kind, root.name))
                .with_hint("choose another name, or remove that one first"),
            _ => changed(&root.kind, &root.name),
        });
    }
    let sql = "INSERT INTO root VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (kind, name)
        DO UPDATE SET map = excluded.map, created_us = excluded.created_us, expires_us = excluded.expires_us, note = excluded.note";
    let values = [
        root.kind.as_str().into(),
        root.name.as_str().into(),
        blob(&root.map),
        now_us.into(),
        root.expires_us.into(),
        root.note.as_str().into(),
    ];
    connection.execute(sql, &values)?;
    Ok(())
}

fn find(connection: &mut Connection, kind: &str, name: &str) -> Result<Option<Root>> {
    let sql = format!("{COLUMNS} WHERE kind = $1 AND name = $2");
    connection.query_first(&sql, &[kind.into(), name.into()])?.as_ref().map(read).transpose()
}

pub(super) fn roots(connection: &mut Connection, kind: Option<&str>) -> Result<Vec<Root>> {
    let rows = match kind {
        None => connection.query(&format!("{COLUMNS} ORDER BY kind, name"), &[])?,
        Some(kind) => connection.query(&format!("{COLUMNS} WHERE kind = $1 ORDER BY name"), &[kind.into()])?,
    };
    rows.iter().map(read).collect()
}

fn read(row: &Row) -> Result<Root> {
    Ok(Root {
        kind: row.text(0)?.into(),
        name: row.text(1)?.into(),
        map: ChunkId(row.bytes(2)?),
        created_us: row.unsigned(3)?,
        expires_us: row.optional_unsigned(4)?,
        note: row.text(5)?.into(),
    })
}

fn changed(kind: &str, name: &str) -> Error {
    Error::conflict(format!("the {kind} \"{name}\" has changed")).with_hint("read it again and repeat")
}
