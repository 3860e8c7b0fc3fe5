//! A connection to either engine.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use burgeon_api::{Error, ErrorKind, Result};

use super::{
    Address, Component, Row, Value,
    postgres::{Fault, Postgres},
    sqlite::Sqlite,
};

/// How long a lost server is waited for before those who wait for it are told.
const RECONNECT: Duration = Duration::from_secs(6);
/// How often a lock is asked for that another process has.
const LOCKED: Duration = Duration::from_millis(100);

/// A connection, inside a transaction of the [`Committer`](super::Committer) or of a reader.
pub struct Connection {
    engine: Engine,
    address: Address,
    component: &'static Component,
    /// Whether it writes; of a component for one process at a time, that takes the lock of all.
    writes: bool,
    /// What the last statement that failed met, until somebody asks.
    trouble: Option<Trouble>,
    /// Whether a statement failed since it was last asked.
    failed: bool,
}

enum Engine {
    Sqlite(Sqlite),
    Postgres(Box<Postgres>),
    /// Lost, and not there again yet.
    Gone,
}

/// Trouble of the whole transaction, beyond the statement that met it.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    /// The connection is gone.
    Lost(Error),
    /// The transaction may succeed when repeated.
    Repeat(Error),
    /// The engine has ended the transaction.
    Ended(Error),
}

impl Connection {
    fn open(address: &Address, component: &'static Component, writes: bool) -> Result<Connection> {
        let begun = Instant::now();
        let engine = loop {
            match Self::engine(address, component, writes) {
                // Another process has the lock: perhaps one that has just died, which the server is about to notice.
                Err(error) if error.kind == ErrorKind::Conflict && begun.elapsed() < RECONNECT => thread::sleep(LOCKED),
                engine => break engine?,
            }
        };
        Ok(Connection { engine, address: address.clone(), component, writes, trouble: None, failed: false })
    }

    fn engine(address: &Address, component: &'static Component, writes: bool) -> Result<Engine> {
        Ok(match address {
            Address::Sqlite(path) => Engine::Sqlite(Sqlite::open(path, component)?),
            Address::Postgres(config) => {
                let mut engine = Postgres::connect(config, address, component)?;
                if writes && component.exclusive {
                    engine.take_lock(address)?;
                }
                Engine::Postgres(Box::new(engine))
            }
        })
    }

    /// Runs a statement; answers how many rows it changed.
    ///
    /// # Errors
    /// The engine's, as one of Burgeon's; so for all of these. The request that met it is refused, even if it says that
    /// it succeeded.
    pub fn execute(&mut self, sql: &str, parameters: &[Value]) -> Result<u64> {
        Ok(self.execute_each(sql, &[parameters.to_vec()])?.first().copied().unwrap_or_default())
    }

    /// Runs a statement once for each of many parameter lists: far faster than one by one.
    ///
    /// # Errors
    /// The engine's.
    pub fn execute_each(&mut self, sql: &str, rows: &[Vec<Value>]) -> Result<Vec<u64>> {
        let outcome = match &mut self.engine {
            Engine::Sqlite(engine) => engine.execute_each(sql, rows).map_err(Fault::Refused),
            Engine::Postgres(engine) => engine.execute_each(sql, rows),
            Engine::Gone => Err(gone()),
        };
        self.noted(outcome)
    }

    /// All rows of an answer.
    ///
    /// # Errors
    /// The engine's.
    pub fn query(&mut self, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
        Ok(self.query_each(sql, &[parameters.to_vec()])?.pop().unwrap_or_default())
    }

    /// The first row of an answer.
    ///
    /// # Errors
    /// The engine's.
    pub fn query_first(&mut self, sql: &str, parameters: &[Value]) -> Result<Option<Row>> {
        Ok(self.query(sql, parameters)?.into_iter().next())
    }

    /// The answers to one statement for each of many parameter lists.
    ///
    /// # Errors
    /// The engine's.
    pub fn query_each(&mut self, sql: &str, rows: &[Vec<Value>]) -> Result<Vec<Vec<Row>>> {
        let outcome = match &mut self.engine {
            Engine::Sqlite(engine) => engine.query_each(sql, rows).map_err(Fault::Refused),
            Engine::Postgres(engine) => engine.query_each(sql, rows),
            Engine::Gone => Err(gone()),
        };
        self.noted(outcome)
    }

    /// Several statements without parameters.
    pub(super) fn batch(&mut self, sql: &str) -> Result<()> {
        let outcome = match &mut self.engine {
            Engine::Sqlite(engine) => engine.batch(sql).map_err(Fault::Refused),
            Engine::Postgres(engine) => engine.batch(sql),
            Engine::Gone => Err(gone()),
        };
        self.noted(outcome)
    }

    fn short(&mut self, sql: &str) -> Result<()> {
        match &self.engine {
            Engine::Sqlite(engine) => {
                let outcome = engine.short(sql).map_err(Fault::Refused);
                self.noted(outcome)
            }
            _ => self.batch(sql),
        }
    }

    fn noted<T>(&mut self, outcome: Result<T, Fault>) -> Result<T> {
        outcome.map_err(|fault| {
            self.failed = true;
            match &fault {
                Fault::Lost(error) => self.trouble = Some(Trouble::Lost(error.clone())),
                Fault::Repeat(error) => self.trouble = Some(Trouble::Repeat(error.clone())),
                Fault::Refused(error) => {
                    if self.trouble.is_none()
                        && let Engine::Sqlite(engine) = &self.engine
                        && !engine.in_transaction()
                    {
                        self.trouble = Some(Trouble::Ended(error.clone()));
                    }
                }
            }
            fault.error()
        })
    }

    /// What happened to the transaction since this was last asked.
    pub(super) fn take_trouble(&mut self) -> Option<Trouble> {
        self.trouble.take()
    }

    /// Whether a statement failed since this was last asked.
    pub(super) fn take_failed(&mut self) -> bool {
        std::mem::take(&mut self.failed)
    }

    /// Begins a transaction that no other writer of the component runs beside.
    pub(super) fn begin_write(&mut self) -> Result<()> {
        self.trouble = None;
        self.failed = false;
        match &self.engine {
            Engine::Postgres(_) => {
                let lock = self.component.lock;
                self.batch(&format!("BEGIN; SELECT pg_advisory_xact_lock({lock})"))
            }
            _ => self.short("BEGIN IMMEDIATE"),
        }
    }

    /// Begins a transaction that sees one state of the database.
    pub(super) fn begin_read(&mut self) -> Result<()> {
        self.trouble = None;
        self.failed = false;
        match &self.engine {
            Engine::Postgres(_) => self.batch("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            _ => self.short("BEGIN"),
        }
    }

    pub(super) fn commit(&mut self) -> Result<()> {
        self.short("COMMIT")
    }

    /// Gives the transaction up; nothing to do where it is gone already.
    pub(super) fn rollback(&mut self) {
        let open = match &self.engine {
            Engine::Sqlite(engine) => engine.in_transaction(),
            Engine::Postgres(_) => true,
            Engine::Gone => false,
        };
        // A connection on which even this fails is lost, or refuses the next BEGIN.
        if open && let Err(error) = self.short("ROLLBACK") {
            tracing::debug!(%error, "a transaction could not be rolled back");
        }
    }

    pub(super) fn savepoint(&mut self) -> Result<()> {
        self.short("SAVEPOINT request")
    }

    pub(super) fn keep_savepoint(&mut self) -> Result<()> {
        self.short("RELEASE request")
    }

    pub(super) fn undo_savepoint(&mut self) -> Result<()> {
        match &self.engine {
            Engine::Postgres(_) => self.batch("ROLLBACK TO request; RELEASE request"),
            _ => {
                self.short("ROLLBACK TO request")?;
                self.short("RELEASE request")
            }
        }
    }

    pub(super) fn is_postgres(&self) -> bool {
        matches!(self.address, Address::Postgres(_))
    }

    pub(super) fn component(&self) -> &'static Component {
        self.component
    }

    /// Connects again, for as long as those who wait can be made to.
    pub(super) fn reconnect(&mut self) -> Result<()> {
        // The old connection is closed first, so that the server need not keep its transaction.
        self.engine = Engine::Gone;
        let end = Instant::now() + RECONNECT;
        let mut pause = Duration::from_millis(20);
        loop {
            match Self::engine(&self.address, self.component, self.writes) {
                Ok(engine) => {
                    self.engine = engine;
                    tracing::info!(address = %self.address, "connected again");
                    return Ok(());
                }
                Err(error) if Instant::now() + pause >= end => return Err(error),
                Err(_) => thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
}

/// Opens a connection on a thread of its own, and works there. PostgreSQL's must not meet the runtime of the caller.
pub(super) fn on_thread(
    name: String,
    address: &Address,
    component: &'static Component,
    writes: bool,
    prepare: impl FnOnce(&mut Connection, &Address) -> Result<()> + Send + 'static,
    work: impl FnOnce(Connection) + Send + 'static,
) -> Result<Ended> {
    let (ready, opened) = mpsc::channel();
    let of_file = address.clone();
    let address = address.clone();
    let body = move || {
        let connection = Connection::open(&address, component, writes)
            .and_then(|mut connection| prepare(&mut connection, &address).map(|()| connection));
        match connection {
            Ok(connection) => {
                drop(ready.send(Ok(())));
                work(connection);
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    };
    let thread =
        thread::Builder::new().name(name).spawn(body).map_err(|error| Error::io("start a database thread", &error))?;
    let ended = Ended(matches!(of_file, Address::Sqlite(_)).then_some(thread));
    opened.recv().map_err(|_| Error::internal("a database thread ended at its start"))?.map(|()| ended)
}

/// Dropped after the last who asks a thread that has a file open, it waits until that has closed the file: SQLite removes a
/// file's log by its name then, and whoever opens the file next may have made one already. A server's connections are left
/// to themselves.
#[derive(Debug)]
pub(super) struct Ended(Option<thread::JoinHandle<()>>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            let _it_has_told_whoever_asked = thread.join();
        }
    }
}

/// Whether a database can be reached and read. Blocks.
///
/// # Errors
/// As [`super::Database::open`], as far as nothing is opened for it.
pub(crate) fn check(address: &Address) -> Result<()> {
    static NOTHING: Component = Component {
        name: "database",
        migrations: &[],
        user_version: false,
        lock: 0,
        exclusive: false,
        cache_kib: 64,
        checkpoint_pages: 1000,
        readers: 1,
    };
    let read = |connection: &mut Connection, _: &Address| connection.query("SELECT 1", &[]).map(drop);
    on_thread("check".into(), address, &NOTHING, false, read, drop).map(drop)
}

fn gone() -> Fault {
    Fault::Lost(Error::unavailable("there is no connection to the database").with_hint("try again"))
}
