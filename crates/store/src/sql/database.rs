//! A component's database: one thread that writes, and some that read.

use burgeon_api::{Error, Result};

use super::{Address, Committer, Component, Connection, migrate::migrate, readers::Readers};

/// A handle to a component's database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Database {
    committer: Committer,
    readers: Readers,
}

impl Database {
    /// Opens or creates the tables.
    ///
    /// # Errors
    /// `Refused` for a newer schema, for wrong credentials, or where something else is stored there; `Damaged` for a file
    /// that is no database; `NotFound` for a PostgreSQL database that does not exist; `Unavailable` where no server
    /// answers.
    pub fn open(address: &Address, component: &'static Component) -> Result<Database> {
        let committer = Committer::start(address, component, migrate)?;
        Ok(Database { committer, readers: Readers::start(address, component)? })
    }

    /// Runs a request in a savepoint, and waits until it is on the disk.
    ///
    /// # Errors
    /// The body's and the database's; so for all of these.
    pub async fn write<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.committer.write(true, body).await.map_err(told(action))
    }

    /// [`Database::write`] without a savepoint: faster, for requests that are hardly ever refused.
    ///
    /// # Errors
    /// As there.
    pub async fn write_trusted<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.committer.write(false, body).await.map_err(told(action))
    }

    /// Reads on a connection of its own.
    ///
    /// # Errors
    /// As above.
    pub async fn read<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.readers.read(body).await.map_err(told(action))
    }

    /// [`Database::write`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_write<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.committer.blocking_write(true, body).map_err(told(action))
    }

    /// [`Database::write_trusted`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_write_trusted<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.committer.blocking_write(false, body).map_err(told(action))
    }

    /// [`Database::read`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_read<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnMut(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.readers.blocking_read(body).map_err(told(action))
    }
}

fn told(action: &'static str) -> impl FnOnce(Error) -> Error {
    move |error| error.context(action)
}
