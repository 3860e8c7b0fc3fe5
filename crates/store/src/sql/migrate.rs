//! Versions of schemas: one number for each component, in the table `schema_version` of its database.

use burgeon_api::{Error, Result};

use super::{Address, Connection};

/// A set of tables with a version of its own, and how its database is used.
#[derive(Debug)]
pub struct Component {
    /// As in `schema_version` and in messages.
    pub name: &'static str,
    /// One entry per version; entry n brings version n to n + 1. In SQLite's words; the
    /// one place that knows PostgreSQL's translates them.
    pub migrations: &'static [&'static str],
    /// Whether SQLite's own `user_version` holds the version too: for files that older versions of Burgeon wrote or
    /// may read.
    pub user_version: bool,
    /// The number of the advisory lock that its writers take on PostgreSQL.
    pub lock: i64,
    /// Whether only one process at a time may write to it, of all that reach its server: the one whose writing connection
    /// has a lock, which the server lets go of with the connection.
    pub exclusive: bool,
    /// Memory for pages of each connection, on SQLite.
    pub cache_kib: u32,
    /// Pages of the write-ahead log after which they go into the file, on SQLite.
    pub checkpoint_pages: u32,
    /// Connections for reads.
    pub readers: usize,
}

/// The advisory lock of those who change the table of versions.
const MIGRATION_LOCK: i64 = i64::from_be_bytes(*b"\0burgeon");

const TABLE: &str =
    "CREATE TABLE IF NOT EXISTS schema_version (component TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT;";

/// Brings the component's tables to this program's version, in one transaction.
///
/// # Errors
/// `Refused` for the database of a newer Burgeon, and for one that holds something else.
pub(super) fn migrate(connection: &mut Connection, address: &Address) -> Result<()> {
    let component = connection.component();
    connection.begin_write()?;
    let done = bring_up(connection, component, address).and_then(|changed| {
        if changed {
            connection.commit()
        } else {
            connection.rollback();
            Ok(())
        }
    });
    if done.is_err() {
        connection.rollback();
    }
    done.map_err(|error| error.context(format_args!("prepare {}", component.name)))
}

fn bring_up(connection: &mut Connection, component: &'static Component, address: &Address) -> Result<bool> {
    if connection.is_postgres() {
        // Components of one database have locks of their own, and make the one table of versions together.
        connection.batch(&format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))?;
    }
    let known = component.migrations.len();
    let (version, in_table) = version(connection, component, address)?;
    let reached = usize::try_from(version).unwrap_or(usize::MAX);
    if reached > known {
        return Err(Error::refused(format!(
            "{} has schema version {reached}; this Burgeon knows versions up to {known}",
            component.name
        ))
        .with_hint("use the newer Burgeon that wrote it, or another data directory or database"));
    }
    if reached == known && in_table {
        return Ok(false);
    }
    let postgres = connection.is_postgres();
    for migration in std::iter::once(&TABLE).chain(component.migrations.iter().skip(reached)) {
        if postgres {
            connection.batch(&words_of_postgres(migration))?;
        } else {
            connection.batch(migration)?;
        }
    }
    let sql = "INSERT INTO schema_version VALUES ($1, $2)
        ON CONFLICT (component) DO UPDATE SET version = excluded.version";
    let known = i64::try_from(known).unwrap_or(i64::MAX);
    connection.execute(sql, &[component.name.into(), known.into()])?;
    if !postgres && component.user_version {
        connection.batch(&format!("PRAGMA user_version = {known}"))?;
    }
    Ok(true)
}

/// The version that the database tells, and whether the table has it.
fn version(connection: &mut Connection, component: &'static Component, address: &Address) -> Result<(i64, bool)> {
    let tables = if connection.is_postgres() {
        "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()"
    } else {
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    };
    let tables = connection.query(tables, &[])?;
    let mut has_table = false;
    for table in &tables {
        has_table |= table.text(0)? == "schema_version";
    }
    let told = if has_table {
        connection
            .query_first("SELECT version FROM schema_version WHERE component = $1", &[component.name.into()])?
            .map(|row| row.integer(0))
            .transpose()?
    } else {
        None
    };
    if connection.is_postgres() {
        return Ok((told.unwrap_or_default(), told.is_some()));
    }
    let own = if component.user_version {
        connection.query_first("PRAGMA user_version", &[])?.map_or(Ok(0), |row| row.integer(0))?
    } else {
        0
    };
    if !has_table && own == 0 && !tables.is_empty() {
        return Err(Error::refused(format!("{address} is a database of something else"))
            .with_hint("give another file, or move this one away"));
    }
    // Before there was the table, the number in the file's header was the only one.
    Ok((told.unwrap_or_default().max(own), told.is_some()))
}

/// A migration in PostgreSQL's words. Migrations are written in SQLite's; this is the one place that knows how the
/// two differ.
fn words_of_postgres(migration: &str) -> String {
    migration
        .replace(") STRICT, WITHOUT ROWID;", ");")
        .replace(") STRICT;", ");")
        .replace(" INTEGER", " BIGINT")
        .replace(" BLOB", " BYTEA")
        // The order of bytes, whatever the database's locale.
        .replace(" TEXT", " TEXT COLLATE \"C\"")
}
