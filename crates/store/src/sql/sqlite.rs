//! SQLite: write-ahead log, every commit on the disk before it is answered.

use std::{borrow::Cow, path::Path, thread, time::Duration};

use burgeon_api::{Error, ErrorKind, Result};
use rusqlite::{ErrorCode, ToSql, types::ToSqlOutput, types::ValueRef};

use super::{Component, Row, Value};

/// How long a write waits for another process that writes.
const BUSY: Duration = Duration::from_secs(20);
/// Statements kept prepared.
const PREPARED: usize = 128;

pub(super) struct Sqlite {
    connection: rusqlite::Connection,
    component: &'static Component,
}

impl Sqlite {
    pub(super) fn open(path: &Path, component: &'static Component) -> Result<Sqlite> {
        let failed = |error: rusqlite::Error| {
            let text = format!("open {}: {error}", path.display());
            match error.sqlite_error_code() {
                Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Error::damaged(text)
                    .with_hint("the file is no SQLite database, or a damaged one: move it away, or bring back a copy"),
                Some(ErrorCode::CannotOpen) => {
                    Error::refused(text).with_hint("check that its directory exists and that this user may write to it")
                }
                Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
                    Error::refused(text).with_hint("check that this user may write to the file and its directory")
                }
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Error::unavailable(text),
                _ => Error::internal(text),
            }
        };
        let connection = rusqlite::Connection::open(path).map_err(failed)?;
        connection.busy_timeout(BUSY).map_err(failed)?;
        connection.set_prepared_statement_cache_capacity(PREPARED);
        enter_wal(&connection).map_err(failed)?;
        let pragmas = [
            ("synchronous", "FULL".to_string()),
            ("foreign_keys", "ON".to_string()),
            // Negative means KiB.
            ("cache_size", format!("-{}", component.cache_kib)),
            ("wal_autocheckpoint", component.checkpoint_pages.to_string()),
        ];
        for (name, value) in pragmas {
            connection.pragma_update(None, name, value).map_err(failed)?;
        }
        Ok(Sqlite { connection, component })
    }

    pub(super) fn execute_each(&self, sql: &str, rows: &[Vec<Value>]) -> Result<Vec<u64>> {
        let run = || {
            let mut statement = self.connection.prepare_cached(&numbered(sql))?;
            rows.iter()
                .map(|row| {
                    let changed = statement.execute(rusqlite::params_from_iter(row))?;
                    Ok(u64::try_from(changed).unwrap_or(u64::MAX))
                })
                .collect::<rusqlite::Result<Vec<u64>>>()
        };
        run().map_err(|error| self.told(error))
    }

    pub(super) fn query_each(&self, sql: &str, rows: &[Vec<Value>]) -> Result<Vec<Vec<Row>>> {
        let run = || {
            let mut statement = self.connection.prepare_cached(&numbered(sql))?;
            let columns = statement.column_count();
            let mut answers = Vec::with_capacity(rows.len());
            for row in rows {
                let mut found = statement.query(rusqlite::params_from_iter(row))?;
                let mut answer = Vec::new();
                while let Some(row) = found.next()? {
                    let values =
                        (0..columns).map(|index| row.get_ref(index)?.try_into()).collect::<rusqlite::Result<_>>()?;
                    answer.push(Row(values));
                }
                answers.push(answer);
            }
            Ok(answers)
        };
        run().map_err(|error| self.told(error))
    }

    pub(super) fn batch(&self, sql: &str) -> Result<()> {
        self.connection.execute_batch(sql).map_err(|error| self.told(error))
    }

    /// For the statements of every transaction, which are worth keeping prepared.
    pub(super) fn short(&self, sql: &str) -> Result<()> {
        let run = || self.connection.prepare_cached(sql)?.execute([]);
        run().map(|_| ()).map_err(|error| self.told(error))
    }

    /// Whether a transaction is open: SQLite ends one by itself when the disk is full or fails.
    pub(super) fn in_transaction(&self) -> bool {
        !self.connection.is_autocommit()
    }

    #[expect(clippy::needless_pass_by_value, reason = "given to map_err as it is")]
    fn told(&self, error: rusqlite::Error) -> Error {
        let name = self.component.name;
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Error::refused(format!("the disk that holds {name} is full"))
                .with_hint("free some space, or put the data directory elsewhere with --data DIR"),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Error::damaged(format!("{name} is damaged: {error}"))
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                let seconds = BUSY.as_secs();
                Error::unavailable(format!("another process has been writing to {name} for {seconds} s"))
                    .with_hint("try again; a process that hangs there shows in: fuser -v FILE")
            }
            _ => Error::new(ErrorKind::Internal, format!("{name}: {error}")),
        }
    }
}

/// Changing to the write-ahead log fails at once, without waiting, while another process does the same.
fn enter_wal(connection: &rusqlite::Connection) -> rusqlite::Result<()> {
    let mut tries = 0;
    loop {
        match connection.pragma_update(None, "journal_mode", "WAL") {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && tries < 200 => {
                tries += 1;
                thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

/// SQLite gives `$2` the next free number, whatever its name; `?2` is the second one.
fn numbered(sql: &str) -> Cow<'_, str> {
    if sql.contains('$') { Cow::Owned(sql.replace('$', "?")) } else { Cow::Borrowed(sql) }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => ValueRef::Null,
            Value::Boolean(value) => ValueRef::Integer((*value).into()),
            Value::Integer(value) => ValueRef::Integer(*value),
            Value::Text(value) => ValueRef::Text(value.as_bytes()),
            Value::Blob(value) => ValueRef::Blob(value),
        }))
    }
}

impl TryFrom<ValueRef<'_>> for Value {
    type Error = rusqlite::Error;

    fn try_from(value: ValueRef<'_>) -> rusqlite::Result<Value> {
        Ok(match value {
            ValueRef::Null => Value::Null,
            ValueRef::Integer(value) => Value::Integer(value),
            ValueRef::Text(value) => {
                Value::Text(std::str::from_utf8(value).map_err(rusqlite::Error::Utf8Error)?.into())
            }
            ValueRef::Blob(value) => Value::Blob(value.into()),
            // Our tables are STRICT and have none; an average could be one.
            ValueRef::Real(_) => return Err(rusqlite::Error::InvalidQuery),
        })
    }
}
