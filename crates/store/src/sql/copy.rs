//! Rows from one database to another, which may be of the other engine.

use burgeon_api::{Error, Result};

use super::{Database, Value, claim_owner};
use crate::{chunk_store::Watch, places::Owner};

/// Rows in one request.
const PAGE: usize = 4096;

/// A table to copy.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) name: &'static str,
    /// The columns of its key, which are its first ones.
    pub(crate) key: &'static [&'static str],
}

/// Gives a database to an owner, with these tables empty. `identity` is the table that says whose it is.
///
/// # Errors
/// `Refused` for a database that is another's, or nobody's and not empty.
pub(crate) fn make_room(
    to: &Database,
    identity: &'static str,
    what: &'static str,
    tables: &'static [Table],
    owner: &Owner,
) -> Result<()> {
    let owner = owner.clone();
    to.blocking_write("make room", move |connection| {
        let known = format!("SELECT 1 FROM {identity} WHERE name = 'owner'");
        if connection.query_first(&known, &[])?.is_none() {
            for Table { name, .. } in tables {
                // Counters are there from the beginning.
                if *name != "counter" && connection.query_first(&format!("SELECT 1 FROM {name}"), &[])?.is_some() {
                    return Err(Error::refused(format!("the database holds a {what} already"))
                        .with_hint("give it a database of its own: createdb NAME"));
                }
            }
        }
        claim_owner(connection, identity, what, &owner)?;
        tables
            .iter()
            .try_for_each(|Table { name, .. }| connection.execute(&format!("DELETE FROM {name}"), &[]).map(drop))
    })
}

/// Copies the rows of these tables, which are empty there. Answers how many.
///
/// # Errors
/// Those of both databases, and of `watch`.
pub(crate) fn copy(from: &Database, to: &Database, tables: &'static [Table], watch: &mut Watch<'_>) -> Result<u64> {
    let mut copied = 0;
    for table in tables {
        let mut after: Vec<Value> = Vec::new();
        loop {
            watch("rows", copied, 0)?;
            let key = table.key.join(", ");
            let begin = if after.is_empty() {
                String::new()
            } else {
                let values: Vec<String> = (1..=after.len()).map(|number| format!("${number}")).collect();
                format!("WHERE ({key}) > ({})", values.join(", "))
            };
            let sql = format!("SELECT * FROM {} {begin} ORDER BY {key} LIMIT {PAGE}", table.name);
            let last = std::mem::take(&mut after);
            let rows = from.blocking_read("copy rows", move |connection| connection.query(&sql, &last))?;
            let Some(last) = rows.last() else { break };
            after = last.0.iter().take(table.key.len()).cloned().collect();
            let (count, columns) = (rows.len(), last.0.len());
            let values: Vec<String> = (1..=columns).map(|number| format!("${number}")).collect();
            let sql = format!("INSERT INTO {} VALUES ({})", table.name, values.join(", "));
            let rows: Vec<Vec<Value>> = rows.into_iter().map(|row| row.0).collect();
            to.blocking_write("copy rows", move |connection| connection.execute_each(&sql, &rows).map(drop))?;
            copied += count as u64;
            if count < PAGE {
                break;
            }
        }
    }
    Ok(copied)
}
