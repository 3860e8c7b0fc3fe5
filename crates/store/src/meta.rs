//! Meta: what is wanted, and what was finished. The truth; queues and events are only hints.
//!
//! One thread owns the database. Requests that wait at the same time are committed together, each in
//! a savepoint of its own, so that one that is refused does not take the others with it. An answer is
//! given only after the commit is on the disk.

use std::{path::Path, thread};

use burgeon_api::{
    Error, ErrorKind, PipelineId, Result, VmId,
    http::RunPipeline,
    pipeline::{FileEntry, PipelineView},
    profile::Profile,
    vm::{Intent, Observed},
};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{mpsc, oneshot};

use crate::schema;

type Work = Box<dyn FnOnce(&Connection) -> Answer + Send>;
/// Whether the work's savepoint is kept, and the reply to send after the commit.
type Answer = (bool, Box<dyn FnOnce(Result<()>) + Send>);

/// Requests committed together at most.
const MOST_GROUPED: usize = 256;

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
    fn of(row: &Row<'_>, error: Error) -> Damaged {
        let text = |index: usize| {
            let bytes = row.get_ref(index).ok().and_then(|value| value.as_bytes().ok()).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        Damaged { id: text(0), name: text(1), reason: error.message }
    }
}

/// A handle to the meta database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Meta {
    work: mpsc::Sender<Work>,
}

impl Meta {
    /// Opens or creates the database.
    ///
    /// # Errors
    /// `Refused` for a newer schema; `Damaged` for a file that is no database.
    pub fn open(path: &Path) -> Result<Meta> {
        let failed = |error: rusqlite::Error| {
            let kind = match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => ErrorKind::Damaged,
                _ => ErrorKind::Internal,
            };
            Error::new(kind, format!("open {}: {error}", path.display()))
        };
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(std::time::Duration::from_secs(5)).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        connection.pragma_update(None, "foreign_keys", "ON").map_err(failed)?;
        schema::migrate(&mut connection)?;
        let (work, receiver) = mpsc::channel(1024);
        thread::Builder::new()
            .name("meta".into())
            .spawn(move || commit_loop(&mut connection, receiver))
            .map_err(|error| Error::io("start the meta thread", &error))?;
        Ok(Meta { work })
    }

    async fn with<T: Send + 'static>(
        &self,
        action: &'static str,
        body: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = oneshot::channel();
        let work: Work = Box::new(move |connection| {
            let outcome = body(connection);
            let keep = outcome.is_ok();
            (
                keep,
                Box::new(move |committed: Result<()>| {
                    // The asker may have gone away.
                    drop(sender.send(committed.and(outcome)));
                }),
            )
        });
        let gone = || Error::unavailable("meta is closed");
        self.work.send(work).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?.map_err(|error| error.context(action))
    }

    /// Adds a VM. Asking again with the same id changes nothing.
    ///
    /// # Errors
    /// `Conflict` when the name is taken by another.
    pub async fn create_vm(&self, row: VmRow) -> Result<VmRow> {
        self.with("create VM", move |connection| {
            if let Some(existing) = find_vm(connection, "id", &row.id.to_string())? {
                return Ok(existing);
            }
            if find_vm(connection, "name", &row.name)?.is_some() {
                return Err(Error::conflict(format!("a VM named \"{}\" exists", row.name))
                    .with_hint(format!("choose another name, or remove it: burgeon vm rm {}", row.name)));
            }
            connection
                .prepare_cached("INSERT INTO vm VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)")
                .and_then(|mut statement| {
                    statement.execute(params![
                        row.id.to_string(),
                        row.name,
                        row.image,
                        to_json(&row.profile),
                        to_json(&row.intent),
                        to_json(&row.observed),
                        row.launched,
                        row.pipeline.map(|id| id.to_string()),
                        signed(row.version),
                        signed(row.created_s),
                        row.starts,
                    ])
                })
                .map_err(sql)?;
            Ok(row)
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
        self.with("list VMs", |connection| {
            let mut statement = connection.prepare_cached("SELECT * FROM vm ORDER BY id").map_err(sql)?;
            let rows = statement.query_map([], |row| Ok(read_vm(row).map_err(|error| Damaged::of(row, error))));
            apart(rows.map_err(sql)?)
        })
        .await
    }

    /// Forgets a VM whose row does not read, by its id as it is kept.
    ///
    /// # Errors
    /// The database's.
    pub async fn forget_damaged_vm(&self, id: String) -> Result<()> {
        self.with("forget VM", move |connection| {
            connection.execute("DELETE FROM vm WHERE id = ?1", [id]).map_err(sql)?;
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
        self.with("find VM", move |connection| {
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
        self.with("change VM", move |connection| {
            let row = find_vm(connection, "id", &id.to_string())?
                .ok_or_else(|| Error::not_found(format!("VM {id} is gone")))?;
            if expected.is_some_and(|version| version != row.version) {
                return Err(Error::conflict(format!("VM {} has changed: its version is {}", row.name, row.version))
                    .with_hint("read it again and repeat"));
            }
            if row.intent == Intent::Removed || row.intent == intent {
                return Ok(row);
            }
            let row = VmRow { intent, version: row.version + 1, ..row };
            connection
                .prepare_cached("UPDATE vm SET intent = ?2, version = ?3 WHERE id = ?1")
                .and_then(|mut statement| {
                    statement.execute(params![id.to_string(), to_json(&row.intent), signed(row.version)])
                })
                .map_err(sql)?;
            Ok(row)
        })
        .await
    }

    /// Wants a VM that has stopped started again.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when the row is not the one that the caller has seen.
    pub async fn start_again(&self, seen: VmRow) -> Result<VmRow> {
        self.with("start VM", move |connection| {
            let row = VmRow {
                intent: Intent::Running,
                observed: Observed::Pending,
                version: seen.version + 1,
                starts: seen.starts + 1,
                ..seen
            };
            let changed = connection
                .prepare_cached(
                    "UPDATE vm SET intent = ?2, observed = ?3, version = ?4, starts = ?5 WHERE id = ?1 AND version = ?6",
                )
                .and_then(|mut statement| {
                    statement.execute(params![
                        row.id.to_string(),
                        to_json(&row.intent),
                        to_json(&row.observed),
                        signed(row.version),
                        row.starts,
                        signed(seen.version),
                    ])
                })
                .map_err(sql)?;
            if changed == 0 {
                return Err(Error::conflict(format!("VM {} has changed", row.name)).with_hint("read it again and repeat"));
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
        self.with("keep VM's state", move |connection| {
            connection
                .prepare_cached("UPDATE vm SET observed = ?2, launched = ?3 WHERE id = ?1")
                .and_then(|mut statement| statement.execute(params![id.to_string(), to_json(&observed), launched]))
                .map_err(sql)?;
            Ok(())
        })
        .await
    }

    /// Forgets a VM that the host has removed.
    ///
    /// # Errors
    /// The database's.
    pub async fn forget_vm(&self, id: VmId) -> Result<()> {
        self.with("forget VM", move |connection| {
            connection.execute("DELETE FROM vm WHERE id = ?1", [id.to_string()]).map_err(sql)?;
            Ok(())
        })
        .await
    }

    /// Marks every VM of a run for removal.
    ///
    /// # Errors
    /// The database's.
    pub async fn remove_vms_of(&self, pipeline: PipelineId) -> Result<()> {
        self.with("remove the VMs of a run", move |connection| {
            connection
                .execute(
                    "UPDATE vm SET intent = ?2, version = version + 1 WHERE pipeline = ?1 AND intent <> ?2",
                    params![pipeline.to_string(), to_json(&Intent::Removed)],
                )
                .map_err(sql)?;
            Ok(())
        })
        .await
    }

    /// Adds a run. Asking again with the same id changes nothing.
    ///
    /// # Errors
    /// The database's.
    pub async fn create_pipeline(&self, row: PipelineRow) -> Result<()> {
        self.with("create run", move |connection| {
            connection
                .execute(
                    "INSERT INTO pipeline VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING",
                    params![
                        row.view.id.to_string(),
                        row.view.name,
                        to_json(&row.request),
                        to_json(&row.view.state),
                        to_json(&row.view),
                        signed(row.view.created_s),
                    ],
                )
                .map_err(sql)?;
            Ok(())
        })
        .await
    }

    /// Keeps how far a run is, together with items finished since.
    ///
    /// # Errors
    /// The database's.
    pub async fn keep_progress(&self, view: PipelineView, items: Vec<(Vec<u8>, FileEntry)>) -> Result<()> {
        self.with("keep the run's progress", move |connection| {
            connection
                .prepare_cached("UPDATE pipeline SET state = ?2, view = ?3 WHERE id = ?1")
                .and_then(|mut statement| {
                    statement.execute(params![view.id.to_string(), to_json(&view.state), to_json(&view)])
                })
                .map_err(sql)?;
            let mut statement = connection
                .prepare_cached("INSERT INTO item VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")
                .map_err(sql)?;
            let id = view.id.to_string();
            for (path, entry) in items {
                statement.execute(params![id, path, to_json(&entry)]).map_err(sql)?;
            }
            Ok(())
        })
        .await
    }

    /// All runs, oldest first, and the rows that do not read.
    ///
    /// # Errors
    /// The database's.
    pub async fn pipelines(&self) -> Result<(Vec<PipelineRow>, Vec<Damaged>)> {
        self.with("list runs", |connection| {
            let mut statement =
                connection.prepare_cached("SELECT id, name, request, view FROM pipeline ORDER BY id").map_err(sql)?;
            let read = |row: &Row<'_>| -> Result<PipelineRow> {
                let text = |index: usize| row.get::<_, String>(index).map_err(sql);
                Ok(PipelineRow { request: from_json(&text(2)?)?, view: from_json(&text(3)?)? })
            };
            let rows = statement.query_map([], |row| Ok(read(row).map_err(|error| Damaged::of(row, error))));
            apart(rows.map_err(sql)?)
        })
        .await
    }

    /// The finished items of a run, by path.
    ///
    /// # Errors
    /// `Damaged` for a row that does not read.
    pub async fn items(&self, pipeline: PipelineId) -> Result<Vec<(Vec<u8>, FileEntry)>> {
        self.with("read the run's items", move |connection| {
            let mut statement = connection
                .prepare_cached("SELECT path, entry FROM item WHERE pipeline = ?1 ORDER BY path")
                .map_err(sql)?;
            let rows = statement
                .query_map([pipeline.to_string()], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, String>(1)?)))
                .map_err(sql)?;
            rows.map(|row| {
                let (path, entry) = row.map_err(sql)?;
                Ok((path, from_json(&entry)?))
            })
            .collect()
        })
        .await
    }

    /// Drops the items of runs that are over and reported; their views stay.
    ///
    /// # Errors
    /// The database's.
    pub async fn drop_items(&self, pipeline: PipelineId) -> Result<()> {
        self.with("drop the run's items", move |connection| {
            connection.execute("DELETE FROM item WHERE pipeline = ?1", [pipeline.to_string()]).map_err(sql)?;
            Ok(())
        })
        .await
    }
}

fn commit_loop(connection: &mut Connection, mut receiver: mpsc::Receiver<Work>) {
    while let Some(first) = receiver.blocking_recv() {
        let mut group = vec![first];
        while group.len() < MOST_GROUPED
            && let Ok(next) = receiver.try_recv()
        {
            group.push(next);
        }
        let mut replies = Vec::with_capacity(group.len());
        let committed = (|| {
            let mut transaction = connection.transaction().map_err(sql)?;
            for work in group {
                let savepoint = transaction.savepoint().map_err(sql)?;
                let (keep, reply) = work(&savepoint);
                if keep {
                    savepoint.commit().map_err(sql)?;
                } else {
                    // Dropping a savepoint rolls it back.
                    drop(savepoint);
                }
                replies.push(reply);
            }
            transaction.commit().map_err(sql)
        })();
        if let Err(error) = &committed {
            tracing::error!(%error, "meta could not commit");
        }
        for reply in replies {
            reply(committed.clone());
        }
    }
}

/// Rows that read, and those that do not.
fn apart<T>(
    rows: impl Iterator<Item = rusqlite::Result<std::result::Result<T, Damaged>>>,
) -> Result<(Vec<T>, Vec<Damaged>)> {
    let (mut good, mut damaged) = (Vec::new(), Vec::new());
    for row in rows {
        match row.map_err(sql)? {
            Ok(row) => good.push(row),
            Err(row) => damaged.push(row),
        }
    }
    Ok((good, damaged))
}

fn find_vm(connection: &Connection, column: &'static str, key: &str) -> Result<Option<VmRow>> {
    connection
        .prepare_cached(&format!("SELECT * FROM vm WHERE {column} = ?1"))
        .and_then(|mut statement| {
            let read = |row: &Row<'_>| {
                read_vm(row).map_err(|error| {
                    let Damaged { id, name, reason } = Damaged::of(row, error);
                    let shown = burgeon_api::path_text::printable(&name);
                    Error::damaged(format!("the row of VM {shown} does not read: {reason}"))
                        .with_hint(format!("burgeon vm rm {id} removes it, with the VM"))
                })
            };
            statement.query_row([key], |row| Ok(read(row))).optional()
        })
        .map_err(sql)?
        .transpose()
}

fn read_vm(row: &Row<'_>) -> Result<VmRow> {
    let text = |index: usize| row.get::<_, String>(index).map_err(sql);
    let number = |index: usize| row.get::<_, i64>(index).map_err(sql).map(i64::unsigned_abs);
    Ok(VmRow {
        id: text(0)?.parse()?,
        name: text(1)?,
        image: text(2)?,
        profile: from_json(&text(3)?)?,
        intent: from_json(&text(4)?)?,
        observed: from_json(&text(5)?)?,
        launched: row.get(6).map_err(sql)?,
        pipeline: row.get::<_, Option<String>>(7).map_err(sql)?.map(|id| id.parse()).transpose()?,
        version: number(8)?,
        created_s: number(9)?,
        starts: row.get(10).map_err(sql)?,
    })
}

#[expect(clippy::needless_pass_by_value, reason = "given to map_err as it is")]
fn sql(error: rusqlite::Error) -> Error {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => Error::refused("the disk that holds meta is full")
            .with_hint("free some space, or put the data directory elsewhere with --data DIR"),
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            Error::damaged(format!("meta is damaged: {error}"))
        }
        _ => Error::internal(format!("meta: {error}")),
    }
}

fn to_json(value: &impl Serialize) -> String {
    // Types of burgeon-api have string keys and no failing serializer.
    serde_json::to_string(value).unwrap_or_default()
}

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::damaged(format!("meta holds a row that does not read: {error}")))
}

/// SQLite's integers are signed; our counters never come near the sign.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str) -> VmRow {
        VmRow {
            id: VmId::generate(),
            name: name.into(),
            image: "tiny".into(),
            profile: Profile::default(),
            intent: Intent::Running,
            observed: Observed::Pending,
            launched: false,
            pipeline: None,
            version: 1,
            created_s: 5,
            starts: 0,
        }
    }

    fn open() -> (tempfile::TempDir, Meta) {
        let directory = tempfile::tempdir().unwrap();
        let meta = Meta::open(&directory.path().join("meta.db")).unwrap();
        (directory, meta)
    }

    #[tokio::test]
    async fn a_vm_lives_in_meta() {
        let (_directory, meta) = open();
        let web = meta.create_vm(row("web")).await.unwrap();
        assert_eq!(meta.create_vm(web.clone()).await.unwrap(), web, "the same id again changes nothing");
        assert_eq!(meta.create_vm(row("web")).await.unwrap_err().kind, ErrorKind::Conflict);
        assert_eq!(meta.vm("web").await.unwrap(), web);
        assert_eq!(meta.vm(&web.id.to_string()).await.unwrap(), web);
        let stale = meta.set_intent(web.id, Intent::Stopped, Some(9)).await.unwrap_err();
        assert_eq!(stale.kind, ErrorKind::Conflict);
        assert_eq!(meta.set_intent(web.id, Intent::Removed, Some(1)).await.unwrap().version, 2);
        let kept = meta.set_intent(web.id, Intent::Running, None).await.unwrap();
        assert_eq!(kept.intent, Intent::Removed, "removal is final");
        meta.forget_vm(web.id).await.unwrap();
        assert_eq!(meta.vm("web").await.unwrap_err().kind, ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_stopped_vm_is_asked_to_start_once_for_each_version_seen() {
        let (_directory, meta) = open();
        let web = meta.create_vm(row("web")).await.unwrap();
        let stopped = meta.set_intent(web.id, Intent::Stopped, None).await.unwrap();
        let again = meta.start_again(stopped.clone()).await.unwrap();
        assert_eq!((again.intent, again.starts, again.version), (Intent::Running, 1, 3));
        assert_eq!(meta.vm("web").await.unwrap(), again);
        assert_eq!(meta.start_again(stopped).await.unwrap_err().kind, ErrorKind::Conflict);
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
        old.execute_batch(schema::FIRST).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        let values = params![id.to_string(), to_json(&Profile::default())];
        old.execute(
            r#"INSERT INTO vm VALUES (?1, 'web', 'tiny', ?2, '"stopped"', '{"state":"running"}', 1, NULL, 4, 5)"#,
            values,
        )
        .unwrap();
        drop(old);
        let meta = Meta::open(&path).unwrap();
        let kept = meta.vm("web").await.unwrap();
        assert_eq!((kept.id, kept.intent, kept.version, kept.starts), (id, Intent::Stopped, 4, 0));
    }

    #[tokio::test]
    async fn a_refusal_does_not_take_its_group_with_it() {
        let (_directory, meta) = open();
        let all = (0..64).map(|index| {
            let meta = meta.clone();
            tokio::spawn(async move { meta.create_vm(row(&format!("vm-{}", index / 2))).await })
        });
        let mut refused = 0;
        for task in all.collect::<Vec<_>>() {
            refused += usize::from(task.await.unwrap().is_err());
        }
        assert_eq!(refused, 32);
        assert_eq!(meta.vms().await.unwrap().len(), 32);
    }

    #[tokio::test]
    async fn a_newer_schema_is_refused_by_name() {
        let (directory, meta) = open();
        drop(meta);
        let path = directory.path().join("meta.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let error = Meta::open(&path).unwrap_err();
        assert!(error.message.contains("schema version 99"), "{error}");
        std::fs::write(directory.path().join("junk"), vec![7; 5000]).unwrap();
        assert_eq!(Meta::open(&directory.path().join("junk")).unwrap_err().kind, ErrorKind::Damaged);
    }
}
