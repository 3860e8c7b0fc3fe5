//! The one thread that writes. Requests that wait at the same time are committed together, and each is answered only
//! after that commit is on the disk.
//!
//! A request runs in a savepoint of its own, so that one that is refused does not take the others with it. Trusted
//! requests go without: should one of them be refused after all, the group is rolled back and runs again, with
//! savepoints. For this, and because a lost connection or a serialization failure repeats a group, a request's body may
//! run more than once; it changes nothing but the database.

use std::{sync::Arc, thread, time::Duration};

use burgeon_api::{Error, Result};
use tokio::sync::{mpsc, oneshot};

use super::{
    Address, Component, Connection,
    connection::{Ended, Trouble, on_thread},
};

/// Requests committed together at most.
const MOST_GROUPED: usize = 256;
/// How often the others get the processor before a group is begun: those who were just answered often ask again at
/// once. It costs nothing where nobody else has work.
const PAUSES: u32 = 16;
/// Requests that wait before their senders do.
const MOST_WAITING: usize = 1024;
/// How often a group is repeated after serialization failures, or on new connections.
const MOST_REPEATS: u32 = 20;

/// A request: its body, its outcome, and who waits for it.
trait Request: Send {
    /// Whether the changes are to be kept.
    fn run(&mut self, connection: &mut Connection) -> bool;
    fn guarded(&self) -> bool;
    fn refuse(&mut self, error: Error);
    fn answer(self: Box<Self>, committed: Result<()>);
}

struct Asked<T, Body> {
    body: Body,
    guarded: bool,
    outcome: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<T: Send, Body: FnMut(&mut Connection) -> Result<T> + Send> Request for Asked<T, Body> {
    fn run(&mut self, connection: &mut Connection) -> bool {
        let outcome = (self.body)(connection);
        let keep = outcome.is_ok();
        self.outcome = Some(outcome);
        keep
    }

    fn guarded(&self) -> bool {
        self.guarded
    }

    fn refuse(&mut self, error: Error) {
        self.outcome = Some(Err(error));
    }

    fn answer(self: Box<Self>, committed: Result<()>) {
        let outcome = self.outcome.unwrap_or_else(|| Err(Error::internal("a request was not run")));
        // The asker may have gone away.
        drop(self.reply.send(committed.and(outcome)));
    }
}

/// A handle to the thread that writes. Cheap to clone; the thread ends with the last handle.
#[derive(Clone)]
pub struct Committer {
    requests: mpsc::Sender<Box<dyn Request>>,
    // Behind the sender, so that the thread ends before this waits for that.
    _ended: Arc<Ended>,
}

impl std::fmt::Debug for Committer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Committer")
    }
}

impl Committer {
    /// Starts the thread, which opens its connection and prepares it.
    pub(super) fn start(
        address: &Address,
        component: &'static Component,
        prepare: impl FnOnce(&mut Connection, &Address) -> Result<()> + Send + 'static,
    ) -> Result<Committer> {
        let (requests, receiver) = mpsc::channel(MOST_WAITING);
        let ended = on_thread(component.name.into(), address, component, true, prepare, move |connection| {
            commit_loop(connection, receiver);
        })?;
        Ok(Committer { requests, _ended: Arc::new(ended) })
    }

    /// Runs a request and waits until it is on the disk.
    ///
    /// # Errors
    /// The body's. `Unavailable` where the database is away, or where a lost connection leaves the outcome unknown.
    pub async fn write<T: Send + 'static>(
        &self,
        guarded: bool,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (request, answer) = asked(guarded, body);
        self.requests.send(request).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    /// [`Committer::write`] for a thread that may wait; never for an asynchronous task.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_write<T: Send + 'static>(
        &self,
        guarded: bool,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (request, answer) = asked(guarded, body);
        self.requests.blocking_send(request).map_err(|_| closed())?;
        answer.blocking_recv().map_err(|_| closed())?
    }
}

fn asked<T: Send + 'static>(
    guarded: bool,
    body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
) -> (Box<dyn Request>, oneshot::Receiver<Result<T>>) {
    let (reply, answer) = oneshot::channel();
    (Box::new(Asked { body, guarded, outcome: None, reply }), answer)
}

pub(super) fn closed() -> Error {
    Error::unavailable("the database is closed")
}

fn commit_loop(mut connection: Connection, mut receiver: mpsc::Receiver<Box<dyn Request>>) {
    while let Some(first) = receiver.blocking_recv() {
        let mut group = vec![first];
        let mut pauses = 0;
        while group.len() < MOST_GROUPED && pauses < PAUSES {
            if let Ok(next) = receiver.try_recv() {
                group.push(next);
            } else {
                pauses += 1;
                thread::yield_now();
            }
        }
        let committed = commit_group(&mut connection, &mut group);
        if let Err(error) = &committed {
            tracing::error!(%error, component = connection.component().name, "a group could not be committed");
        }
        for request in group {
            request.answer(committed.clone());
        }
    }
}

/// Why a group is not committed.
enum Failure {
    /// A trusted request was refused.
    Savepoints,
    /// Nothing was committed: the same again may succeed.
    Repeat(Error),
    /// Nothing was committed: the same again, on a new connection.
    Reconnect(Error),
    Final(Error),
}

fn commit_group(connection: &mut Connection, group: &mut [Box<dyn Request>]) -> Result<()> {
    let mut guard_all = false;
    let mut repeats = 0;
    loop {
        let error = match attempt(connection, group, guard_all) {
            Ok(()) => return Ok(()),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Savepoints) => {
                guard_all = true;
                continue;
            }
            Err(Failure::Repeat(error)) => {
                // Later each time, so that two that fail each other come apart.
                thread::sleep(Duration::from_millis(2 * u64::from(repeats)));
                error
            }
            Err(Failure::Reconnect(error)) => {
                tracing::warn!(%error, "connecting again");
                connection.reconnect()?;
                error
            }
        };
        repeats += 1;
        if repeats > MOST_REPEATS {
            return Err(error);
        }
    }
}

fn attempt(connection: &mut Connection, group: &mut [Box<dyn Request>], guard_all: bool) -> Result<(), Failure> {
    let outcome = run_group(connection, group, guard_all);
    if outcome.is_err() {
        connection.rollback();
        return outcome;
    }
    let Err(error) = connection.commit() else { return Ok(()) };
    let failure = match connection.take_trouble() {
        // The commit may have reached the disk before the connection broke.
        Some(Trouble::Lost(error)) => {
            let error = Error::unavailable(format!("outcome unknown, the commit was under way: {}", error.message))
                .with_hint("ask again: what was done already is not done twice");
            if let Err(error) = connection.reconnect() {
                tracing::warn!(%error, "not connected again yet");
            }
            return Err(Failure::Final(error));
        }
        trouble => sort(trouble, error),
    };
    connection.rollback();
    Err(failure)
}

fn run_group(connection: &mut Connection, group: &mut [Box<dyn Request>], guard_all: bool) -> Result<(), Failure> {
    connection.begin_write().map_err(|error| sort(connection.take_trouble(), error))?;
    for request in group {
        let guarded = guard_all || request.guarded();
        let step = (|| {
            if guarded {
                connection.savepoint()?;
            }
            let mut keep = request.run(connection);
            if connection.take_failed() && keep {
                // PostgreSQL refuses everything behind a failed statement, SQLite does not: one rule for both.
                request.refuse(Error::internal("a request went on after a statement of it failed"));
                keep = false;
            }
            if guarded && keep {
                connection.keep_savepoint()?;
            } else if guarded {
                connection.undo_savepoint()?;
            }
            Ok(keep)
        })();
        // Trouble of the transaction decides, whatever the request made of it.
        match (connection.take_trouble(), step) {
            (None, Ok(true)) => {}
            (None, Ok(false)) if guarded => {}
            (None, Ok(false)) => return Err(Failure::Savepoints),
            (trouble, Err(error)) => return Err(sort(trouble, error)),
            (trouble @ Some(_), Ok(_)) => return Err(sort(trouble, Error::internal("the transaction was lost"))),
        }
    }
    Ok(())
}

fn sort(trouble: Option<Trouble>, error: Error) -> Failure {
    match trouble {
        Some(Trouble::Lost(error)) => Failure::Reconnect(error),
        Some(Trouble::Repeat(error)) => Failure::Repeat(error),
        Some(Trouble::Ended(error)) => Failure::Final(error),
        None => Failure::Final(error),
    }
}
