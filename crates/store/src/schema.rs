//! The schema of meta and its versions.

use burgeon_api::{Error, Result};
use rusqlite::Connection;

/// One entry per version; entry n brings version n to n + 1.
const MIGRATIONS: [&str; 2] = [FIRST, SECOND];

pub(crate) const FIRST: &str = "
    CREATE TABLE vm (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        image TEXT NOT NULL,
        profile TEXT NOT NULL,
        intent TEXT NOT NULL,
        observed TEXT NOT NULL,
        launched INTEGER NOT NULL,
        pipeline TEXT,
        version INTEGER NOT NULL,
        created_s INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX vm_pipeline ON vm (pipeline) WHERE pipeline IS NOT NULL;
    CREATE TABLE pipeline (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        request TEXT NOT NULL,
        state TEXT NOT NULL,
        view TEXT NOT NULL,
        created_s INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE item (
        pipeline TEXT NOT NULL,
        path BLOB NOT NULL,
        entry TEXT NOT NULL,
        PRIMARY KEY (pipeline, path)
    ) STRICT, WITHOUT ROWID;
";

/// VMs that are started again.
const SECOND: &str = "
    ALTER TABLE vm ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;
";

/// Brings the database to this program's version.
///
/// # Errors
/// `Refused` for a database of a newer Burgeon.
pub(crate) fn migrate(connection: &mut Connection) -> Result<()> {
    let failed = |error: rusqlite::Error| Error::internal(format!("prepare meta: {error}"));
    let known = MIGRATIONS.len();
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > known {
        return Err(Error::refused(format!(
            "meta has schema version {version}; this Burgeon knows versions up to {known}"
        ))
        .with_hint("use the newer Burgeon that wrote it, or another data directory"));
    }
    for (index, migration) in MIGRATIONS.iter().enumerate().skip(version) {
        let transaction = connection.transaction().map_err(failed)?;
        transaction.execute_batch(migration).map_err(failed)?;
        transaction.pragma_update(None, "user_version", index + 1).map_err(failed)?;
        transaction.commit().map_err(failed)?;
    }
    Ok(())
}
