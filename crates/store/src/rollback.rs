//! VMs that are to return to a snapshot of theirs: a column of meta.

use burgeon_api::{RequestId, Result};
use serde::{Deserialize, Serialize};

use crate::meta::{Meta, VmRow};

pub(crate) const MIGRATION: &str = "
    ALTER TABLE vm ADD COLUMN rollback TEXT;
";

/// What the last start of a VM returns it to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollBack {
    /// Who has asked for it: the same request is no other rollback.
    pub request: RequestId,
    pub snapshot: String,
}

impl Meta {
    /// Takes back a rollback that the host has refused. A row that has changed since stays as it is.
    ///
    /// # Errors
    /// The database's.
    pub async fn take_back_rollback(&self, row: VmRow) -> Result<()> {
        self.database
            .write("take back a rollback", move |connection| {
                connection.execute(
                    "UPDATE vm SET rollback = NULL, starts = starts - 1, version = version + 1 \
                     WHERE id = $1 AND version = $2 AND rollback IS NOT NULL",
                    &[row.id.to_string().into(), row.version.into()],
                )?;
                Ok(())
            })
            .await
    }
}
