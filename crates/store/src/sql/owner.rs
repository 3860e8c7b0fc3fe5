//! Whose tables these are: on a server that several machines reach, those of one data directory are not another's.

use burgeon_api::{Error, Result, path_text::printable};

use super::Connection;
use crate::places::Owner;

/// Gives the tables of which `table` tells the identity to an owner, unless they have one.
///
/// # Errors
/// `Refused` where they are another's; the database's.
pub(crate) fn claim_owner(connection: &mut Connection, table: &str, what: &str, owner: &Owner) -> Result<()> {
    let find = format!("SELECT value FROM {table} WHERE name = $1");
    let mut read = |name: &str| -> Result<Option<String>> {
        let row = connection.query_first(&find, &[name.into()])?;
        row.map(|row| row.text(0).map(ToString::to_string)).transpose()
    };
    let (id, name) = (read("owner")?, read("owner name")?);
    if let Some(id) = id
        && id != owner.id.to_string()
    {
        let of = name.map(|name| printable(&name)).unwrap_or_default();
        return Err(Error::refused(format!("the {what} in the database is that of another server: {of}"))
            .with_hint("give each server a database of its own, or use this one from where it was made"));
    }
    let put = format!(
        "INSERT INTO {table} VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value
         WHERE {table}.value <> excluded.value"
    );
    connection.execute(&put, &["owner".into(), owner.id.to_string().into()])?;
    connection.execute(&put, &["owner name".into(), owner.name.as_str().into()])?;
    Ok(())
}
