//! How long VMs are kept: a column of meta.

use burgeon_api::{Error, Result, VmId, life::Life, vm::Intent};

use crate::meta::{Meta, VmRow, find_vm, to_json};

pub(crate) const MIGRATION: &str = "
    ALTER TABLE vm ADD COLUMN life TEXT;
";

impl Meta {
    /// Sets how long a VM is kept, by what holds so far.
    ///
    /// # Errors
    /// `NotFound`; the database's.
    pub async fn set_life(&self, id: VmId, change: impl Fn(Life) -> Life + Send + 'static) -> Result<VmRow> {
        self.database
            .write("change VM", move |connection| {
                let row = find_vm(connection, "id", &id.to_string())?
                    .ok_or_else(|| Error::not_found(format!("VM {id} is gone")))?;
                if row.intent == Intent::Removed {
                    return Err(Error::conflict(format!("VM {} is being removed", row.name)));
                }
                let row = VmRow { life: change(row.life), version: row.version + 1, ..row };
                connection.execute(
                    "UPDATE vm SET life = $2, version = $3 WHERE id = $1",
                    &[id.to_string().into(), to_json(&row.life).into(), row.version.into()],
                )?;
                Ok(row)
            })
            .await
    }
}
