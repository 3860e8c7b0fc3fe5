//! Connections for reads that need not wait behind writes.
//!
//! Each read sees one state of the database: everything that was answered before it was asked.

use std::sync::Arc;

use burgeon_api::{Error, Result};
use tokio::sync::{mpsc, oneshot};

use super::{
    Address, Component, Connection,
    committer::closed,
    connection::{Ended, Trouble, on_thread},
};

type Read = Box<dyn FnOnce(&mut Connection) + Send>;

/// Reads that wait at one connection before their senders do.
const MOST_WAITING: usize = 256;
/// How often a read is repeated, on new connections.
const MOST_REPEATS: u32 = 5;

/// Handles to the threads that read. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Readers {
    threads: Vec<mpsc::Sender<Read>>,
    // Behind the senders, so that the threads end before this waits for that.
    _ended: Arc<Vec<Ended>>,
}

impl Readers {
    pub(super) fn start(address: &Address, component: &'static Component) -> Result<Readers> {
        let start = |_| {
            let (reads, mut receiver) = mpsc::channel::<Read>(MOST_WAITING);
            let name = format!("{} reads", component.name);
            let ended = on_thread(
                name,
                address,
                component,
                false,
                |_, _| Ok(()),
                move |mut connection| {
                    while let Some(read) = receiver.blocking_recv() {
                        read(&mut connection);
                    }
                },
            )?;
            Ok((reads, ended))
        };
        let started: Vec<_> = (0..component.readers.max(1)).map(start).collect::<Result<_>>()?;
        let (threads, ended): (Vec<_>, Vec<_>) = started.into_iter().unzip();
        Ok(Readers { threads, _ended: Arc::new(ended) })
    }

    /// The connection with the fewest waiting reads.
    fn least_busy(&self) -> Result<&mpsc::Sender<Read>> {
        self.threads.iter().max_by_key(|thread| thread.capacity()).ok_or_else(closed)
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (read, answer) = asked(body);
        self.least_busy()?.send(read).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    pub(super) fn blocking_read<T: Send + 'static>(
        &self,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (read, answer) = asked(body);
        self.least_busy()?.blocking_send(read).map_err(|_| closed())?;
        answer.blocking_recv().map_err(|_| closed())?
    }
}

fn asked<T: Send + 'static>(
    mut body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
) -> (Read, oneshot::Receiver<Result<T>>) {
    let (reply, answer) = oneshot::channel();
    let read = move |connection: &mut Connection| {
        // Nobody waits for it any more.
        if !reply.is_closed() {
            drop(reply.send(run(connection, &mut body)));
        }
    };
    (Box::new(read), answer)
}

fn run<T>(connection: &mut Connection, body: &mut impl FnMut(&mut Connection) -> Result<T>) -> Result<T> {
    let mut repeats = 0;
    loop {
        let outcome = connection.begin_read().and_then(|()| body(connection));
        let failed = connection.take_failed();
        let trouble = connection.take_trouble();
        connection.rollback();
        repeats += 1;
        match trouble {
            Some(Trouble::Lost(error)) if repeats <= MOST_REPEATS => {
                tracing::warn!(%error, "connecting again");
                connection.reconnect()?;
            }
            Some(Trouble::Repeat(_)) if repeats <= MOST_REPEATS => {}
            Some(Trouble::Lost(error) | Trouble::Repeat(error) | Trouble::Ended(error)) => return Err(error),
            None if failed && outcome.is_ok() => {
                return Err(Error::internal("a read went on after a statement of it failed"));
            }
            None => return outcome,
        }
    }
}
