//! Where a database is, and by that, which engine holds it.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use burgeon_api::{Error, Result};
use tokio_postgres::config::{Host, SslMode};

/// `sqlite:PATH` or a plain path; `postgres://USER:PASSWORD@HOST/DATABASE` or `host=DIRECTORY user=USER dbname=DATABASE`.
#[derive(Clone)]
pub enum Address {
    Sqlite(PathBuf),
    Postgres(Box<tokio_postgres::Config>),
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Address {
        Address::Sqlite(path.into())
    }
}

impl From<&PathBuf> for Address {
    fn from(path: &PathBuf) -> Address {
        Address::Sqlite(path.into())
    }
}

impl From<&Address> for Address {
    fn from(address: &Address) -> Address {
        address.clone()
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let help = "sqlite:PATH, postgres://USER:PASSWORD@HOST/DATABASE, or host=DIRECTORY user=USER dbname=DATABASE";
        if let Some(path) = text.strip_prefix("sqlite:") {
            if path.is_empty() {
                return Err(Error::invalid("the address of a database names no file").with_hint(help));
            }
            return Ok(Address::Sqlite(path.into()));
        }
        if ["postgres://", "postgresql://", "host="].iter().any(|start| text.starts_with(start)) {
            // The text may hold a password, so that it is not repeated here.
            let config = text.parse::<tokio_postgres::Config>().map_err(|error| {
                let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                Error::invalid(format!("the address of the PostgreSQL database does not read: {reason}"))
                    .with_hint(help)
            })?;
            if config.get_ssl_mode() == SslMode::Require {
                return Err(Error::refused("Burgeon speaks to PostgreSQL without TLS, and the address requires it")
                    .with_hint("use a unix socket or a private network, and leave out sslmode=require"));
            }
            return Ok(Address::Postgres(Box::new(config)));
        }
        match text.split_once("://") {
            Some((scheme, _)) => {
                let scheme = burgeon_api::path_text::printable(scheme);
                Err(Error::invalid(format!("\"{scheme}\" is no database that Burgeon knows")).with_hint(help))
            }
            None if text.is_empty() => Err(Error::invalid("the address of a database is empty").with_hint(help)),
            None => Ok(Address::Sqlite(text.into())),
        }
    }
}

impl fmt::Display for Address {
    /// Without the password: this goes into logs and errors.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Sqlite(path) => write!(formatter, "{}", path.display()),
            Address::Postgres(config) => {
                let host = match config.get_hosts().first() {
                    Some(Host::Tcp(name)) => name.clone(),
                    Some(Host::Unix(path)) => path.display().to_string(),
                    None => "no host".into(),
                };
                let user = config.get_user().unwrap_or_default();
                write!(formatter, "PostgreSQL database {} at {host}, user {user}", self.database())
            }
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl Address {
    /// The name of a PostgreSQL database; its user's name where none is given.
    pub(super) fn database(&self) -> &str {
        match self {
            Address::Sqlite(_) => "",
            Address::Postgres(config) => config.get_dbname().or(config.get_user()).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_the_engine_and_never_the_password() {
        let read = |text: &str| text.parse::<Address>();
        assert_eq!(read("sqlite:/data/meta.db").unwrap().to_string(), "/data/meta.db");
        assert_eq!(read("/data/meta.db").unwrap().to_string(), "/data/meta.db");
        assert_eq!(
            read("postgres://ann:secret@db.lan/burgeon").unwrap().to_string(),
            "PostgreSQL database burgeon at db.lan, user ann"
        );
        assert_eq!(
            read("host=/run/postgresql user=ann password=secret").unwrap().to_string(),
            "PostgreSQL database ann at /run/postgresql, user ann"
        );
        for wrong in ["", "sqlite:", "mysql://x", "postgres://ann:secret@db.lan/burgeon?nonsense=secret"] {
            let error = read(wrong).unwrap_err();
            assert!(error.hint.is_some() && !error.message.contains("ann:secret"), "{error}");
        }
        let error = read("postgres://ann@db.lan/burgeon?sslmode=require").unwrap_err();
        assert!(error.message.contains("TLS"), "{error}");
    }
}
