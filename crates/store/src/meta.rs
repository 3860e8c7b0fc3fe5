//! Meta: what is wanted, and what was finished. The truth; queues and events are only hints.
//!
//! Writes are committed in groups and answered when they are on the disk: see [`crate::sql`]. Reads see every write
//! that was answered before them.

use burgeon_api::{
    Error, PipelineId, Result, VmId,
    http::RunPipeline,
    pipeline::{FileEntry, PipelineView},
    profile::Profile,
    vm::{Intent, Observed},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    schema::META,
    sql::{Address, Connection, Database, Row},
};

/// A row of `vm`.
#[derive(Clone, Debug, PartialEq)]
pub struct VmRow {
    pub id: VmId,
    pub name: String,
    pub image: String,
    pub profile: Profile,
    pub intent: Intent,
    /// What was last known; the host knows better while it can be asked.
    pub observed: Observed,
    /// Whether the host has ever confirmed the launch. Such a VM is never started a second time by itself.
    pub launched: bool,
    pub pipeline: Option<PipelineId>,
    pub version: u64,
    pub created_s: u64,
}

/// A row of `pipeline`.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineRow {
    pub request: RunPipeline,
    pub view: PipelineView,
}

/// A handle to the meta database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Meta {
    database: Database,
}

impl Meta {
    /// Opens or creates the database, in a file or on a PostgreSQL server.
    ///
    /// # Errors
    /// `Refused` for a newer schema; `Damaged` for a file that is no database; `NotFound`, `Refused` or `Unavailable`
    /// for a server's database that is not there, not allowed or not reached.
    pub fn open(address: impl Into<Address>) -> Result<Meta> {
        Ok(Meta { database: Database::open(&address.into(), &META)? })
    }

    /// Adds a VM. Asking again with the same id changes nothing.
    ///
    /// # Errors
    /// `Conflict` when the name is taken by another.
    pub async fn create_vm(&self, row: VmRow) -> Result<VmRow> {
        self.database
            .write("create VM", move |connection| {
                if let Some(existing) = find_vm(connection, "id", &row.id.to_string())? {
                    return Ok(existing);
                }
                if find_vm(connection, "name", &row.name)?.is_some() {
                    return Err(Error::conflict(format!("a VM named \"{}\" exists", row.name))
                        .with_hint(format!("choose another name, or remove it: burgeon vm rm {}", row.name)));
                }
                connection.execute(
                    "INSERT INTO vm VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
                    &[
                        row.id.to_string().into(),
                        row.name.as_str().into(),
                        row.image.as_str().into(),
                        to_json(&row.profile).into(),
                        to_json(&row.intent).into(),
                        to_json(&row.observed).into(),
                        row.launched.into(),
                        row.pipeline.map(|id| id.to_string()).into(),
                        row.version.into(),
                        row.created_s.into(),
                    ],
                )?;
                Ok(row.clone())
            })
            .await
    }

    /// All VMs, oldest first.
    ///
    /// # Errors
    /// `Damaged` for a row that does not read.
    pub async fn vms(&self) -> Result<Vec<VmRow>> {
        self.database
            .read("list VMs", |connection| {
                connection.query("SELECT * FROM vm ORDER BY id", &[])?.iter().map(read_vm).collect()
            })
            .await
    }

    /// One VM by name or id.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn vm(&self, name_or_id: &str) -> Result<VmRow> {
        let key = name_or_id.to_string();
        self.database
            .read("find VM", move |connection| {
                let found = match find_vm(connection, "name", &key)? {
                    None => find_vm(connection, "id", &key)?,
                    found => found,
                };
                found.ok_or_else(|| {
                    Error::not_found(format!("there is no VM \"{}\"", burgeon_api::path_text::printable(&key)))
                        .with_hint("burgeon ps lists the VMs there are")
                })
            })
            .await
    }

    /// Sets what is wanted of a VM. `expected` is the version the caller has seen, where it cares.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when the row has changed since.
    pub async fn set_intent(&self, id: VmId, intent: Intent, expected: Option<u64>) -> Result<VmRow> {
        self.database
            .write("change VM", move |connection| {
                let row = find_vm(connection, "id", &id.to_string())?
                    .ok_or_else(|| Error::not_found(format!("VM {id} is gone")))?;
                if expected.is_some_and(|version| version != row.version) {
                    return Err(Error::conflict(format!(
                        "VM {} has changed: its version is {}",
                        row.name, row.version
                    ))
                    .with_hint("read it again and repeat"));
                }
                if row.intent == Intent::Removed || row.intent == intent {
                    return Ok(row);
                }
                let row = VmRow { intent, version: row.version + 1, ..row };
                connection.execute(
                    "UPDATE vm SET intent = $2, version = $3 WHERE id = $1",
                    &[id.to_string().into(), to_json(&row.intent).into(), row.version.into()],
                )?;
                Ok(row)
            })
            .await
    }

    /// Keeps what was last known of a VM.
    ///
    /// # Errors
    /// The database's.
    pub async fn set_observed(&self, id: VmId, observed: Observed, launched: bool) -> Result<()> {
        self.database
            .write("keep VM's state", move |connection| {
                connection.execute(
                    "UPDATE vm SET observed = $2, launched = $3 WHERE id = $1",
                    &[id.to_string().into(), to_json(&observed).into(), launched.into()],
                )?;
                Ok(())
            })
            .await
    }

    /// Forgets a VM that the host has removed.
    ///
    /// # Errors
    /// The database's.
    pub async fn forget_vm(&self, id: VmId) -> Result<()> {
        self.database
            .write("forget VM", move |connection| {
                connection.execute("DELETE FROM vm WHERE id = $1", &[id.to_string().into()])?;
                Ok(())
            })
            .await
    }

    /// Marks every VM of a run for removal.
    ///
    /// # Errors
    /// The database's.
    pub async fn remove_vms_of(&self, pipeline: PipelineId) -> Result<()> {
        self.database
            .write("remove the VMs of a run", move |connection| {
                connection.execute(
                    "UPDATE vm SET intent = $2, version = version + 1 WHERE pipeline = $1 AND intent <> $2",
                    &[pipeline.to_string().into(), to_json(&Intent::Removed).into()],
                )?;
                Ok(())
            })
            .await
    }

    /// Adds a run. Asking again with the same id changes nothing.
    ///
    /// # Errors
    /// The database's.
    pub async fn create_pipeline(&self, row: PipelineRow) -> Result<()> {
        self.database
            .write("create run", move |connection| {
                connection.execute(
                    "INSERT INTO pipeline VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
                    &[
                        row.view.id.to_string().into(),
                        row.view.name.as_str().into(),
                        to_json(&row.request).into(),
                        to_json(&row.view.state).into(),
                        to_json(&row.view).into(),
                        row.view.created_s.into(),
                    ],
                )?;
                Ok(())
            })
            .await
    }

    /// Keeps how far a run is, together with items finished since.
    ///
    /// # Errors
    /// The database's.
    pub async fn keep_progress(&self, view: PipelineView, items: Vec<(Vec<u8>, FileEntry)>) -> Result<()> {
        self.database
            .write("keep the run's progress", move |connection| {
                let id = view.id.to_string();
                connection.execute(
                    "UPDATE pipeline SET state = $2, view = $3 WHERE id = $1",
                    &[id.as_str().into(), to_json(&view.state).into(), to_json(&view).into()],
                )?;
                let rows: Vec<_> = items
                    .iter()
                    .map(|(path, entry)| vec![id.as_str().into(), path.as_slice().into(), to_json(entry).into()])
                    .collect();
                connection.execute_each("INSERT INTO item VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", &rows)?;
                Ok(())
            })
            .await
    }

    /// All runs, oldest first.
    ///
    /// # Errors
    /// `Damaged` for a row that does not read.
    pub async fn pipelines(&self) -> Result<Vec<PipelineRow>> {
        self.database
            .read("list runs", |connection| {
                let rows = connection.query("SELECT request, view FROM pipeline ORDER BY id", &[])?;
                let read =
                    |row: &Row| Ok(PipelineRow { request: from_json(row.text(0)?)?, view: from_json(row.text(1)?)? });
                rows.iter().map(read).collect()
            })
            .await
    }

    /// The finished items of a run, by path.
    ///
    /// # Errors
    /// `Damaged` for a row that does not read.
    pub async fn items(&self, pipeline: PipelineId) -> Result<Vec<(Vec<u8>, FileEntry)>> {
        self.database
            .read("read the run's items", move |connection| {
                let sql = "SELECT path, entry FROM item WHERE pipeline = $1 ORDER BY path";
                let rows = connection.query(sql, &[pipeline.to_string().into()])?;
                rows.iter().map(|row| Ok((row.blob(0)?.to_vec(), from_json(row.text(1)?)?))).collect()
            })
            .await
    }

    /// Drops the items of runs that are over and reported; their views stay.
    ///
    /// # Errors
    /// The database's.
    pub async fn drop_items(&self, pipeline: PipelineId) -> Result<()> {
        self.database
            .write("drop the run's items", move |connection| {
                connection.execute("DELETE FROM item WHERE pipeline = $1", &[pipeline.to_string().into()])?;
                Ok(())
            })
            .await
    }
}

fn find_vm(connection: &mut Connection, column: &'static str, key: &str) -> Result<Option<VmRow>> {
    let found = connection.query_first(&format!("SELECT * FROM vm WHERE {column} = $1"), &[key.into()])?;
    found.as_ref().map(read_vm).transpose()
}

fn read_vm(row: &Row) -> Result<VmRow> {
    Ok(VmRow {
        id: row.text(0)?.parse()?,
        name: row.text(1)?.into(),
        image: row.text(2)?.into(),
        profile: from_json(row.text(3)?)?,
        intent: from_json(row.text(4)?)?,
        observed: from_json(row.text(5)?)?,
        launched: row.boolean(6)?,
        pipeline: row.optional_text(7)?.map(str::parse).transpose()?,
        version: row.unsigned(8)?,
        created_s: row.unsigned(9)?,
    })
}

fn to_json(value: &impl Serialize) -> String {
    // Types of burgeon-api have string keys and no failing serializer.
    serde_json::to_string(value).unwrap_or_default()
}

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::damaged(format!("meta holds a row that does not read: {error}")))
}
