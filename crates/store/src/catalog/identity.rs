//! Which store the catalog is of, and whose it is.

use burgeon_api::{Error, Result};

use super::Catalog;
use crate::{
    chunk_store::Watch,
    ids::StoreId,
    places::Owner,
    sql::{Connection, Table, claim_owner, copy, make_room},
};

/// Of both tables: this one is the catalog's.
const TABLE: &str = "store_identity";
const STORE: &str = "store";
/// All others.
static TABLES: [Table; 5] = [
    Table { name: "pack", key: &["id"] },
    Table { name: "chunk", key: &["id"] },
    Table { name: "root", key: &["kind", "name"] },
    Table { name: "counter", key: &["name"] },
    Table { name: "gone", key: &["id"] },
];

impl Catalog {
    /// The store that this is the catalog of, if it knows. A thread waits.
    ///
    /// # Errors
    /// The database's; `Damaged` for what is no id.
    pub fn blocking_store(&self) -> Result<Option<StoreId>> {
        self.database.blocking_read("look whose catalog it is", store)
    }

    /// Makes it the catalog of a store, unless it is one already. Answers of which. A thread waits.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_set_store(&self, id: StoreId) -> Result<StoreId> {
        self.database.blocking_write("name the store", move |connection| {
            let sql = "INSERT INTO store_identity VALUES ($1, $2) ON CONFLICT DO NOTHING";
            connection.execute(sql, &[STORE.into(), id.to_string().into()])?;
            store(connection)?.ok_or_else(|| Error::internal("a row that was written is not there"))
        })
    }

    /// Makes it the catalog of an owner, unless it has one. A thread waits.
    ///
    /// # Errors
    /// `Refused` where it is another's; the database's.
    pub fn blocking_claim_owner(&self, owner: &Owner) -> Result<()> {
        let owner = owner.clone();
        self.database.blocking_write("look whose catalog it is", move |connection| {
            claim_owner(connection, TABLE, "catalog", &owner)
        })
    }

    /// Copies everything but the identity to another catalog, which is given to an owner. A thread waits.
    ///
    /// # Errors
    /// `Refused` for a catalog of somebody else's, and for one that is not empty; those of both databases, and of
    /// `watch`.
    pub(crate) fn blocking_copy_to(&self, to: &Catalog, owner: &Owner, watch: &mut Watch<'_>) -> Result<u64> {
        make_room(&to.database, TABLE, "catalog", &TABLES, owner)?;
        copy(&self.database, &to.database, &TABLES, watch)
    }

    /// Forgets everything, so that it can be made anew; it is nobody's catalog until it is given to a store again.
    /// A thread waits.
    ///
    /// # Errors
    /// The database's.
    pub(crate) fn blocking_clear(&self) -> Result<()> {
        self.database.blocking_write("empty the catalog", |connection| {
            for table in ["chunk", "pack", "root", "gone"] {
                connection.execute(&format!("DELETE FROM {table}"), &[])?;
            }
            connection.execute("DELETE FROM store_identity WHERE name = $1", &[STORE.into()]).map(drop)
        })
    }
}

fn store(connection: &mut Connection) -> Result<Option<StoreId>> {
    let row = connection.query_first("SELECT value FROM store_identity WHERE name = $1", &[STORE.into()])?;
    row.map(|row| row.text(0)?.parse().map_err(|error| Error::damaged(format!("the catalog's store: {error}"))))
        .transpose()
}
