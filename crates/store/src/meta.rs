//! Meta: what is wanted, and what was finished. The truth; queues and events are only hints.
//!
//! Writes are committed in groups and answered when they are on the disk: see [`crate::sql`]. Reads see every write
//! that was answered before them.

use burgeon_api::{
    Error, PipelineId, Result, VmId,
    http::RunPipeline,
    life::Life,
    pipeline::{FileEntry, PipelineView},
    profile::Profile,
    substrate::Recipe,
    vm::{Intent, Observed},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    chunk_store::Watch,
    places::Owner,
    rollback::RollBack,
    schema::META,
    sql::{Address, Connection, Database, Row, Table, claim_owner, copy, make_room},
};

static TABLES: [Table; 4] = [
    Table { name: "vm", key: &["id"] },
    Table { name: "pipeline", key: &["id"] },
    Table { name: "item", key: &["pipeline", "path"] },
    Table { name: "receipt", key: &["generation"] },
];

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
    /// How often its user has asked to start it again.
    pub starts: u32,
    /// Where its disk is cloned from, for a clone.
    pub source: Option<CloneSource>,
    /// How it is made a substrate, where it is to be one.
    pub substrate: Option<Recipe>,
    /// When it is removed or parked by itself.
    pub life: Life,
    /// Where the last of its starts is a return to a snapshot of it.
    pub rollback: Option<RollBack>,
}

impl VmRow {
    /// A VM that is wanted, and that no host knows yet.
    pub fn new(id: VmId, name: String, image: String, profile: Profile, created_s: u64) -> VmRow {
        VmRow {
            id,
            name,
            image,
            profile,
            intent: Intent::Running,
            observed: Observed::Pending,
            launched: false,
            pipeline: None,
            version: 1,
            created_s,
            starts: 0,
            source: None,
            substrate: None,
            life: Life::default(),
            rollback: None,
        }
    }
}

/// The VM that another one is cloned from, and the image that this one was started from: its kernel fits the disk,
/// whatever has become of the image since.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CloneSource {
    pub source: burgeon_api::host::Source,
    pub image: burgeon_api::image::Image,
    /// Whether it takes over the other's memory too.
    #[serde(default)]
    pub begin: burgeon_api::host::Begin,
    /// And what it keeps with that.
    #[serde(default)]
    pub keep: burgeon_api::substrate::Keep,
    /// And what it shall have in place of what the other one has.
    #[serde(default)]
    pub resize: burgeon_api::vm::Resize,
}

/// A row of `pipeline`.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineRow {
    pub request: RunPipeline,
    pub view: PipelineView,
}

/// A row that does not read, with what can be told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// As it is kept, which need not be an id.
    pub id: String,
    pub name: String,
    pub reason: String,
}

impl Damaged {
    fn of(row: &Row, error: Error) -> Damaged {
        let text = |index: usize| row.text(index).unwrap_or_default().to_string();
        Damaged { id: text(0), name: text(1), reason: error.message }
    }
}

/// A handle to the meta database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Meta {
    pub(crate) database: Database,
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

    /// Makes it the meta of an owner, unless it has one. A thread waits.
    ///
    /// # Errors
    /// `Refused` where it is another's.
    pub fn blocking_claim_owner(&self, owner: &Owner) -> Result<()> {
        let owner = owner.clone();
        self.database.blocking_write("look whose meta it is", move |connection| {
            claim_owner(connection, "meta_identity", "meta", &owner)
        })
    }

    /// Copies everything but the identity to another meta, which is given to an owner. A thread waits. Answers how many
    /// rows there are.
    ///
    /// # Errors
    /// `Refused` for a meta of somebody else's, and for one that is not empty; those of both databases, and of `watch`.
    pub(crate) fn blocking_copy_to(&self, to: &Meta, owner: &Owner, watch: &mut Watch<'_>) -> Result<u64> {
        make_room(&to.database, "meta_identity", "meta", &TABLES, owner)?;
        copy(&self.database, &to.database, &TABLES, watch)
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
                    "INSERT INTO vm VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
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
                        u64::from(row.starts).into(),
                        row.source.as_ref().map(to_json).into(),
                        row.substrate.as_ref().map(to_json).into(),
                        (!row.life.is_endless()).then(|| to_json(&row.life)).into(),
                        row.rollback.as_ref().map(to_json).into(),
                    ],
                )?;
                Ok(row.clone())
            })
            .await
    }

    /// All VMs whose rows read, oldest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn vms(&self) -> Result<Vec<VmRow>> {
        self.all_vms().await.map(|(rows, _)| rows)
    }

    /// All VMs, oldest first, and the rows that do not read: one of those hides no other.
    ///
    /// # Errors
    /// The database's.
    pub async fn all_vms(&self) -> Result<(Vec<VmRow>, Vec<Damaged>)> {
        self.database
            .read("list VMs", |connection| Ok(apart(&connection.query("SELECT * FROM vm ORDER BY id", &[])?, read_vm)))
            .await
    }

    /// Forgets a VM whose row does not read, by its id as it is kept.
    ///
    /// # Errors
    /// The database's.
    pub async fn forget_damaged_vm(&self, id: String) -> Result<()> {
        self.database
            .write("forget VM", move |connection| {
                connection.execute("DELETE FROM vm WHERE id = $1", &[id.as_str().into()])?;
                Ok(())
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

    /// Wants a VM that has stopped started again, or one returned to a snapshot of it.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when the row is not the one that the caller has seen.
    pub async fn start_again(&self, seen: VmRow, rollback: Option<RollBack>) -> Result<VmRow> {
        self.database
            .write("start VM", move |connection| {
                let row = VmRow {
                    intent: Intent::Running,
                    observed: Observed::Pending,
                    version: seen.version + 1,
                    starts: seen.starts + 1,
                    rollback: rollback.clone(),
                    ..seen.clone()
                };
                let changed = connection.execute(
                    "UPDATE vm SET intent = $2, observed = $3, version = $4, starts = $5, rollback = $6 \
                     WHERE id = $1 AND version = $7",
                    &[
                        row.id.to_string().into(),
                        to_json(&row.intent).into(),
                        to_json(&row.observed).into(),
                        row.version.into(),
                        u64::from(row.starts).into(),
                        row.rollback.as_ref().map(to_json).into(),
                        seen.version.into(),
                    ],
                )?;
                if changed == 0 {
                    return Err(
                        Error::conflict(format!("VM {} has changed", row.name)).with_hint("read it again and repeat")
                    );
                }
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

    /// All runs, oldest first, and the rows that do not read.
    ///
    /// # Errors
    /// The database's.
    pub async fn pipelines(&self) -> Result<(Vec<PipelineRow>, Vec<Damaged>)> {
        self.database
            .read("list runs", |connection| {
                let rows = connection.query("SELECT id, name, request, view FROM pipeline ORDER BY id", &[])?;
                let read =
                    |row: &Row| Ok(PipelineRow { request: from_json(row.text(2)?)?, view: from_json(row.text(3)?)? });
                Ok(apart(&rows, read))
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

pub(crate) fn find_vm(connection: &mut Connection, column: &'static str, key: &str) -> Result<Option<VmRow>> {
    let found = connection.query_first(&format!("SELECT * FROM vm WHERE {column} = $1"), &[key.into()])?;
    let read = |row: &Row| {
        read_vm(row).map_err(|error| {
            let Damaged { id, name, reason } = Damaged::of(row, error);
            let shown = burgeon_api::path_text::printable(&name);
            Error::damaged(format!("the row of VM {shown} does not read: {reason}"))
                .with_hint(format!("burgeon vm rm {id} removes it, with the VM"))
        })
    };
    found.as_ref().map(read).transpose()
}

/// Rows that read, and those that do not.
fn apart<T>(rows: &[Row], read: impl Fn(&Row) -> Result<T>) -> (Vec<T>, Vec<Damaged>) {
    let (mut good, mut damaged) = (Vec::new(), Vec::new());
    for row in rows {
        match read(row) {
            Ok(row) => good.push(row),
            Err(error) => damaged.push(Damaged::of(row, error)),
        }
    }
    (good, damaged)
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
        starts: u32::try_from(row.unsigned(10)?).unwrap_or(u32::MAX),
        source: row.optional_text(11)?.map(from_json).transpose()?,
        substrate: row.optional_text(12)?.map(from_json).transpose()?,
        life: row.optional_text(13)?.map(from_json).transpose()?.unwrap_or_default(),
        rollback: row.optional_text(14)?.map(from_json).transpose()?,
    })
}

pub(crate) fn to_json(value: &impl Serialize) -> String {
    // Types of burgeon-api have string keys and no failing serializer.
    serde_json::to_string(value).unwrap_or_default()
}

pub(crate) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::damaged(format!("meta holds a row that does not read: {error}")))
}

#[cfg(test)]
mod tests {
    use burgeon_api::ErrorKind;
    use rusqlite::{Connection, params};

    use super::*;

    fn open() -> (tempfile::TempDir, Meta) {
        let directory = tempfile::tempdir().unwrap();
        let meta = Meta::open(directory.path().join("meta.db").as_path()).unwrap();
        (directory, meta)
    }

    fn row(name: &str) -> VmRow {
        VmRow::new(VmId::generate(), name.into(), "tiny".into(), Profile::default(), 5)
    }

    #[tokio::test]
    async fn a_stopped_vm_is_asked_to_start_once_for_each_version_seen() {
        let (_directory, meta) = open();
        let web = meta.create_vm(row("web")).await.unwrap();
        let stopped = meta.set_intent(web.id, Intent::Stopped, None).await.unwrap();
        let again = meta.start_again(stopped.clone(), None).await.unwrap();
        assert_eq!((again.intent, again.starts, again.version), (Intent::Running, 1, 3));
        assert_eq!(meta.vm("web").await.unwrap(), again);
        assert_eq!(meta.start_again(stopped, None).await.unwrap_err().kind, ErrorKind::Conflict);
    }

    #[tokio::test]
    async fn a_damaged_row_hides_no_other_and_can_be_forgotten() {
        let (directory, meta) = open();
        let (web, bad) = (meta.create_vm(row("web")).await.unwrap(), meta.create_vm(row("bad")).await.unwrap());
        let other = Connection::open(directory.path().join("meta.db")).unwrap();
        for (column, garbage) in [("profile", "{"), ("intent", ""), ("observed", "{\"state\":\"confused\"}")] {
            let update = format!("UPDATE vm SET {column} = ?2 WHERE id = ?1");
            other.execute(&update, [&bad.id.to_string(), garbage]).unwrap();
            let (good, damaged) = meta.all_vms().await.unwrap();
            assert_eq!(good, std::slice::from_ref(&web), "{column}");
            assert_eq!((damaged[0].id.as_str(), damaged[0].name.as_str()), (bad.id.to_string().as_str(), "bad"));
            let error = meta.vm("bad").await.unwrap_err();
            assert!(error.kind == ErrorKind::Damaged && error.message.contains("VM bad"), "{error}");
            assert!(error.hint.unwrap().contains(&bad.id.to_string()));
        }
        other.execute("UPDATE vm SET id = 'no id' WHERE name = 'bad'", []).unwrap();
        assert_eq!(meta.all_vms().await.unwrap().1[0].id, "no id");
        meta.forget_damaged_vm("no id".into()).await.unwrap();
        assert_eq!(meta.all_vms().await.unwrap(), (vec![web], vec![]));
        other.execute("INSERT INTO pipeline VALUES ('p', 'run', '{}', '\"done\"', '[]', 7)", []).unwrap();
        let (good, damaged) = meta.pipelines().await.unwrap();
        assert_eq!((good, damaged[0].name.as_str()), (vec![], "run"));
    }

    #[tokio::test]
    async fn a_meta_of_the_first_version_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("meta.db");
        let id = VmId::generate();
        let old = Connection::open(&path).unwrap();
        old.execute_batch(crate::schema::FIRST).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        let values = params![id.to_string(), to_json(&Profile::default())];
        old.execute(
            r#"INSERT INTO vm VALUES (?1, 'web', 'tiny', ?2, '"stopped"', '{"state":"running"}', 1, NULL, 4, 5)"#,
            values,
        )
        .unwrap();
        drop(old);
        let meta = Meta::open(path.as_path()).unwrap();
        let kept = meta.vm("web").await.unwrap();
        assert_eq!((kept.id, kept.intent, kept.version, kept.starts), (id, Intent::Stopped, 4, 0));
    }
}
