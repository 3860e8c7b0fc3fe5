//! Every behaviour of what is stored by SQL, on both engines.

mod catalog;
mod committer;
mod fence;
mod kills;
pub(crate) mod meta;
mod opening;
pub(crate) mod server;

use burgeon_store::sql::Address;

/// An empty database, with what must live as long as it is used.
pub(crate) struct Home {
    pub(crate) address: Address,
    _directory: Option<tempfile::TempDir>,
}

impl Home {
    fn sqlite() -> Home {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::from(directory.path().join("test.db").as_path());
        Home { address, _directory: Some(directory) }
    }

    fn postgres() -> Home {
        Home { address: server::shared().new_database(), _directory: None }
    }
}

/// Makes of each `async fn name(home: Home)` a test on SQLite and one on PostgreSQL.
macro_rules! on_both_engines {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(crate::sql::Home::sqlite()).await })+
        }
        mod postgres {
            $(#[tokio::test] async fn $name() { super::$name(crate::sql::Home::postgres()).await })+
        }
    };
}
pub(crate) use on_both_engines;
