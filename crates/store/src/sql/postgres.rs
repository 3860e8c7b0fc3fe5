//! PostgreSQL, driven from the calling thread.
//!
//! A current-thread runtime moves the connection only while a statement is under way. Many rows of one statement are
//! sent behind one another without waiting for each answer.

use std::{collections::HashMap, error::Error as _, time::Duration};

use burgeon_api::{Error, Result, path_text::printable};
use bytes::BytesMut;
use futures_util::future::try_join_all;
use tokio::runtime::Runtime;
use tokio_postgres::{
    Client, Config, NoTls, Statement,
    error::SqlState,
    types::{FromSql, IsNull, ToSql, Type},
};

use super::{Address, Component, Row, Value};

/// An answer that takes longer is taken for a lost connection.
const ANSWER: Duration = Duration::from_secs(90);
/// Connecting, with the words that are said first.
const CONNECT: Duration = Duration::from_secs(5);
/// Rows under way at once.
const IN_FLIGHT: usize = 512;
/// What a session must be like, whatever the server's defaults. A client that is gone must not hold the write lock,
/// and an acknowledged commit is on the server's disk.
const SESSION: &str = "
    SET lock_timeout = '20s';
    SET idle_in_transaction_session_timeout = '60s';
    SET default_transaction_isolation = 'read committed';
    SET client_min_messages = 'warning';
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
";

/// In the number of a lock that a connection keeps for as long as it lives; those of transactions are without.
const EXCLUSIVE: i64 = 1 << 56;

/// What the server's own views call this process.
fn application(component: &Component) -> String {
    let system = rustix::system::uname();
    format!("burgeon {}, process {} on {}", component.name, std::process::id(), system.nodename().to_string_lossy())
}

pub(super) struct Postgres {
    runtime: Runtime,
    client: Client,
    statements: HashMap<String, Statement>,
    component: &'static Component,
}

/// What went wrong, as far as it decides what is done next.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The connection is gone.
    Lost(Error),
    /// The same transaction may well succeed when it is repeated.
    Repeat(Error),
    /// The statement was refused.
    Refused(Error),
}

impl Fault {
    pub(super) fn error(self) -> Error {
        match self {
            Fault::Lost(error) | Fault::Repeat(error) | Fault::Refused(error) => error,
        }
    }
}

impl Postgres {
    pub(super) fn connect(config: &Config, address: &Address, component: &'static Component) -> Result<Postgres> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::io("start a connection to PostgreSQL", &error))?;
        let client = runtime.block_on(async {
            let connect = async {
                let mut config = config.clone();
                config.application_name(application(component));
                let (client, connection) = config.connect(NoTls).await?;
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a connection to PostgreSQL ended");
                    }
                });
                client.batch_execute(SESSION).await?;
                Ok(client)
            };
            match tokio::time::timeout(CONNECT, connect).await {
                Ok(connected) => connected.map_err(|error| unconnected(&error, address)),
                Err(_) => Err(unreachable(address, &format!("no answer within {} s", CONNECT.as_secs()))),
            }
        })?;
        Ok(Postgres { runtime, client, statements: HashMap::new(), component })
    }

    /// Takes the lock of the one process that writes; the server lets go of it with the connection.
    pub(super) fn take_lock(&mut self, address: &Address) -> Result<()> {
        let (component, key) = (self.component, self.component.lock | EXCLUSIVE);
        let ask = |this: &mut Self, sql: &str| this.query_each(sql, &[Vec::new()]).map_err(Fault::error);
        let first = |answers: Vec<Vec<Row>>| answers.into_iter().flatten().next();
        let taken = first(ask(self, &format!("SELECT pg_try_advisory_lock({key})"))?);
        if taken.map(|row| row.boolean(0)).transpose()? == Some(true) {
            return Ok(());
        }
        let holder = first(ask(
            self,
            &format!(
                "SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory'
                 AND granted AND objsubid = 1 AND classid::bigint = {} AND objid::bigint = {}",
                key >> 32,
                key & 0xffff_ffff
            ),
        )?);
        let holder = holder.and_then(|row| row.text(0).map(printable).ok()).unwrap_or_else(|| "another one".into());
        Err(Error::conflict(format!("{} in {address} is in use by another server: {holder}", component.name))
            .with_hint("end that server first, or give this one a database of its own"))
    }

    pub(super) fn execute_each(&mut self, sql: &str, rows: &[Vec<Value>]) -> Result<Vec<u64>, Fault> {
        let statement = self.prepared(sql)?;
        let mut changed = Vec::with_capacity(rows.len());
        for some in rows.chunks(IN_FLIGHT) {
            let client = &self.client;
            let all = try_join_all(some.iter().map(|row| client.execute_raw(&statement, row)));
            changed.extend(self.answered(all)?);
        }
        Ok(changed)
    }

    pub(super) fn query_each(&mut self, sql: &str, rows: &[Vec<Value>]) -> Result<Vec<Vec<Row>>, Fault> {
        let statement = self.prepared(sql)?;
        let mut answers = Vec::with_capacity(rows.len());
        for some in rows.chunks(IN_FLIGHT) {
            let client = &self.client;
            let all = try_join_all(some.iter().map(|row| {
                let row: Vec<&(dyn ToSql + Sync)> = row.iter().map(|value| value as _).collect();
                let statement = &statement;
                async move { client.query(statement, &row).await }
            }));
            for answer in self.answered(all)? {
                let read = |row: &tokio_postgres::Row| {
                    (0..row.len()).map(|index| row.try_get(index)).collect::<Result<_, _>>().map(Row)
                };
                let rows = answer.iter().map(read).collect::<Result<_, _>>();
                answers.push(rows.map_err(|error| self.told(&error))?);
            }
        }
        Ok(answers)
    }

    pub(super) fn batch(&mut self, sql: &str) -> Result<(), Fault> {
        self.answered(self.client.batch_execute(sql))
    }

    fn prepared(&mut self, sql: &str) -> Result<Statement, Fault> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.answered(self.client.prepare(sql))?;
        self.statements.insert(sql.into(), statement.clone());
        Ok(statement)
    }

    fn answered<T>(&self, question: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Fault> {
        match self.runtime.block_on(async { tokio::time::timeout(ANSWER, question).await }) {
            Ok(answer) => answer.map_err(|error| self.told(&error)),
            Err(_) => Err(Fault::Lost(lost(&format!("no answer within {} s", ANSWER.as_secs())))),
        }
    }

    fn told(&self, error: &tokio_postgres::Error) -> Fault {
        let name = self.component.name;
        let Some(answer) = error.as_db_error() else {
            let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            return if self.client.is_closed() || error.is_closed() {
                Fault::Lost(lost(&reason))
            } else {
                Fault::Refused(Error::internal(format!("{name}: {reason}")))
            };
        };
        let text = format!("{name}: {}", answer.message());
        let code = answer.code();
        if ["57P01", "57P02", "57P03", "57P05", "25P03"].contains(&code.code()) || code.code().starts_with("08") {
            return Fault::Lost(lost(answer.message()));
        }
        match *code {
            SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED => {
                Fault::Repeat(Error::unavailable(text).with_hint("try again"))
            }
            SqlState::LOCK_NOT_AVAILABLE => Fault::Refused(
                Error::unavailable(format!("another process has been writing to {name} for too long: {text}"))
                    .with_hint("try again; SELECT * FROM pg_stat_activity shows who writes"),
            ),
            SqlState::DISK_FULL => Fault::Refused(
                Error::refused(format!("the disk of the PostgreSQL server is full: {text}"))
                    .with_hint("free some space there"),
            ),
            SqlState::DUPLICATE_TABLE => Fault::Refused(
                Error::refused(format!("{text}, and is not Burgeon's"))
                    .with_hint("give Burgeon a database of its own: createdb NAME"),
            ),
            SqlState::INSUFFICIENT_PRIVILEGE => Fault::Refused(
                Error::refused(text).with_hint("let the user own the database: ALTER DATABASE NAME OWNER TO USER"),
            ),
            SqlState::DATA_CORRUPTED | SqlState::INDEX_CORRUPTED => Fault::Refused(Error::damaged(text)),
            _ => Fault::Refused(Error::internal(format!("{text} ({})", code.code()))),
        }
    }
}

fn lost(reason: &str) -> Error {
    Error::unavailable(format!("the connection to PostgreSQL was lost: {reason}"))
        .with_hint("try again when the PostgreSQL server is back")
}

fn unreachable(address: &Address, reason: &str) -> Error {
    Error::unavailable(format!("cannot reach {address}: {reason}"))
        .with_hint("check that the PostgreSQL server runs, and the host in the address")
}

fn unconnected(error: &tokio_postgres::Error, address: &Address) -> Error {
    let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    match error.code() {
        Some(&SqlState::INVALID_PASSWORD | &SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => {
            Error::refused(format!("{address}: the server refuses this user: {reason}"))
                .with_hint("check user and password in the address, and the server's pg_hba.conf")
        }
        Some(&SqlState::INVALID_CATALOG_NAME) => Error::not_found(format!("{address}: {reason}"))
            .with_hint(format!("create it: createdb {}", address.database())),
        Some(code) if code.code() == "57P03" || code.code() == "53300" => unreachable(address, &reason),
        Some(_) => Error::refused(format!("{address}: {reason}")),
        // A password is needed and the address has none.
        None if error.to_string().contains("configuration") => Error::refused(format!("{address}: {reason}"))
            .with_hint("check user and password in the address, and the server's pg_hba.conf"),
        None => unreachable(address, &reason),
    }
}

type Wrong = Box<dyn std::error::Error + Sync + Send>;

impl ToSql for Value {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Wrong> {
        match (self, kind) {
            (Value::Null, _) => Ok(IsNull::Yes),
            (Value::Boolean(value), &Type::BOOL) => value.to_sql(kind, out),
            (Value::Boolean(value), &Type::INT8) => i64::from(*value).to_sql(kind, out),
            (Value::Integer(value), &Type::INT8) => value.to_sql(kind, out),
            (Value::Integer(value), &Type::INT4) => i32::try_from(*value)?.to_sql(kind, out),
            (Value::Text(value), _) if <&str as ToSql>::accepts(kind) => value.as_str().to_sql(kind, out),
            (Value::Blob(value), &Type::BYTEA) => value.as_slice().to_sql(kind, out),
            _ => Err(format!("{self:?} was given for {kind}").into()),
        }
    }

    fn accepts(_kind: &Type) -> bool {
        true
    }

    tokio_postgres::types::to_sql_checked!();
}

impl<'a> FromSql<'a> for Value {
    fn from_sql(kind: &Type, raw: &'a [u8]) -> Result<Value, Wrong> {
        Ok(match *kind {
            Type::BOOL => Value::Boolean(bool::from_sql(kind, raw)?),
            Type::INT2 => Value::Integer(i16::from_sql(kind, raw)?.into()),
            Type::INT4 => Value::Integer(i32::from_sql(kind, raw)?.into()),
            Type::INT8 => Value::Integer(i64::from_sql(kind, raw)?),
            Type::BYTEA => Value::Blob(raw.into()),
            _ => Value::Text(<&str>::from_sql(kind, raw)?.into()),
        })
    }

    fn from_sql_null(_kind: &Type) -> Result<Value, Wrong> {
        Ok(Value::Null)
    }

    fn accepts(kind: &Type) -> bool {
        matches!(*kind, Type::BOOL | Type::INT2 | Type::INT4 | Type::INT8 | Type::BYTEA)
            || <&str as FromSql>::accepts(kind)
    }
}
