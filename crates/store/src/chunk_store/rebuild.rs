//! A new catalog, made of the packs alone: for one that is lost or damaged.
//!
//! Packs tell everything of themselves: their index, or where that is lost their records, name the chunks. What packs
//! cannot tell are roots; the caller gathers those from what names them elsewhere. The new catalog is made beside the
//! old one, and takes its place by a rename once it is complete; the old one is kept under another name. Nobody else may
//! have the store open meanwhile.
//!
//! The order of the last steps matters. SQLite would put a write-ahead log that it finds beside a file into that file,
//! so the old log moves away before the new file comes; and a store whose catalog is missing is refused as long as it
//! has packs ([`super::ChunkStore::open`]), because with an empty catalog, a collection would take all packs for left-overs. So
//! a kill between two of the steps leaves a store that is refused, until the catalog is rebuilt once more.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use burgeon_api::{
    Error, ErrorKind, Result,
    store::{Problem, Rebuilt},
};

use super::{Source, Watch, identity, is_away, object_name, scrub::index};
use crate::{
    ChunkId, PackId, StoreId,
    catalog::{Catalog, Entry, NewRoot},
    objects::{Blocking, OpenObject},
    pack,
    places::Places,
};

/// Chunks in one request to the catalog.
const PAGE: usize = 4096;
/// How long the threads of the new catalog may take to let go of it.
const TRIES: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(10);

/// A root as what names it outside the catalog tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedRoot {
    pub kind: String,
    pub name: String,
    pub map: ChunkId,
}

/// Makes a new catalog of the packs of a store, with these roots. See the module.
///
/// # Errors
/// `Refused` for a catalog of another store, which stays as it is. Those of the places, of the new catalog and of
/// `watch`: then an old catalog in a file is where it was, and one on a server is refused until it is made anew. What
/// cannot be read is in the answer.
pub fn rebuild(
    places: impl Into<Places>,
    source: &Source,
    roots: &[NamedRoot],
    watch: &mut Watch<'_>,
) -> Result<Rebuilt> {
    let places = places.into();
    let objects = places.open_objects()?;
    let marked = identity::marker(&objects)?;
    let mut rebuilt = Rebuilt::default();
    let mut fill = |catalog: &Catalog| {
        add_packs(catalog, &objects, source, &mut rebuilt, watch)?;
        set_roots(catalog, roots, source, &mut rebuilt, watch)?;
        // From here on it is the catalog of these packs, and not before.
        let store = catalog.blocking_set_store(marked.unwrap_or_else(|| StoreId((source.uuid)())))?;
        identity::set_marker(&objects, store)?;
        watch("replace", 0, 0)
    };
    let Some(file) = places.catalog_file() else {
        let catalog = on_server(&places, &objects, marked)?;
        fill(&catalog)?;
        return Ok(rebuilt);
    };
    let new = beside(&file, ".rebuilding");
    for left in [new.clone(), beside(&new, "-wal"), beside(&new, "-shm"), beside(&new, "-journal")] {
        remove(&left)?;
    }
    let filled = Catalog::open(&new).and_then(|catalog| fill(&catalog));
    // Where it breaks off too: threads that still let go of the file would take the log of the next one away.
    let settled = settle(&new);
    filled.and(settled)?;
    replace(&file, &new)?;
    // What roots lead to beyond their first chunk is for a check of the whole to tell.
    Ok(rebuilt)
}

/// The catalog on a server, empty. A kill from here on leaves one that is of no store, and is refused where there are
/// packs.
fn on_server(places: &Places, objects: &Blocking, marked: Option<StoreId>) -> Result<Catalog> {
    let catalog = Catalog::open(places.catalog_address())?;
    if let Some(owner) = &places.owner {
        catalog.blocking_claim_owner(owner)?;
    }
    if let (Some(of_catalog), true) = (catalog.blocking_store()?, marked.is_some())
        && Some(of_catalog) != marked
    {
        return Err(Error::refused(format!(
            "{} is the catalog of {of_catalog:?}, and not of the packs in {}",
            places.catalog_address(),
            objects.describe("")
        ))
        .with_hint("correct the address of the objects or of the database; nothing was changed"));
    }
    catalog.blocking_clear()?;
    Ok(catalog)
}

fn add_packs(
    catalog: &Catalog,
    objects: &Blocking,
    source: &Source,
    rebuilt: &mut Rebuilt,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let found = objects.list("packs")?;
    let total = found.len() as u64;
    for (done, object) in found.into_iter().enumerate() {
        watch("packs", done as u64, total)?;
        let stem = object.name.rsplit('/').next().and_then(|file| file.strip_suffix(".pack"));
        let Some(Ok(id)) = stem.map(str::parse::<PackId>) else { continue };
        if object.name != object_name(id) {
            continue;
        }
        let place = objects.describe(&object.name);
        match entries_of(objects, id, &object.name) {
            Ok((length, entries, lost)) => {
                rebuilt.packs += 1;
                if let Some(lost) = lost {
                    rebuilt.packs_salvaged += 1;
                    rebuilt.problems.push(Problem { place, what: lost.message });
                }
                let added = catalog.blocking_add_pack(id, length, (source.now_us)(), entries.clone())?;
                rebuilt.chunks += (entries.len() - added.elsewhere.len()) as u64;
            }
            Err(error) if matches!(error.kind, ErrorKind::Damaged | ErrorKind::Refused) => {
                rebuilt.packs_lost += 1;
                let what = format!("nothing of it can be read: {}", error.message);
                rebuilt.problems.push(Problem { place, what });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The chunks of a pack, by its index; by its records where the index is lost, and then why.
fn entries_of(objects: &Blocking, id: PackId, name: &str) -> Result<(u64, Vec<Entry>, Option<Error>)> {
    let object = objects.open_object(name)?;
    let length = object.length();
    let known = match index(&object, id, length) {
        Ok(known) => (known, None),
        Err(error) if is_away(&error) => return Err(error),
        Err(error) => {
            let salvage = pack::scan(id, InOrder { object: &object, at: 0 })?;
            let why = salvage.stopped.map_or_else(|| error.message.clone(), |stopped| stopped.message);
            let lost = Error::damaged(format!("its index is lost, {} chunks were read: {why}", salvage.entries.len()));
            (salvage.entries, Some(lost))
        }
    };
    let entries = known.0.iter().map(|entry| Entry { id: entry.id, kind: entry.kind as u8, place: entry.place });
    Ok((length, entries.collect(), known.1))
}

/// An object from its front to its end.
struct InOrder<'a> {
    object: &'a OpenObject,
    at: u64,
}

impl Read for InOrder<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let rest = self.object.length().saturating_sub(self.at);
        let count = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
        self.object.read_at(self.at, &mut bytes[..count]).map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}

fn set_roots(
    catalog: &Catalog,
    roots: &[NamedRoot],
    source: &Source,
    rebuilt: &mut Rebuilt,
    watch: &mut Watch<'_>,
) -> Result<()> {
    for some in roots.chunks(PAGE) {
        watch("roots", rebuilt.roots, roots.len() as u64)?;
        let places = catalog.blocking_places(some.iter().map(|root| root.map).collect())?;
        for (root, place) in some.iter().zip(places) {
            if place.is_none() {
                rebuilt.roots_lost += 1;
                let place = format!("{} {}", root.kind, root.name);
                rebuilt.problems.push(Problem { place, what: format!("its map, {:?}, is in no pack", root.map) });
                continue;
            }
            // Nobody collects meanwhile, and what is missing is to be told, not to keep the root from being set.
            let new = NewRoot::new(&root.kind, root.name.clone(), root.map);
            catalog.blocking_set_root(new, (source.now_us)())?;
            rebuilt.roots += 1;
        }
    }
    Ok(())
}

fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", file.display()), &error))
        }
        _ => Ok(()),
    }
}

/// Brings all of a database into its one file, once its threads have let go of it, and that to the disk.
pub(crate) fn settle(file: &Path) -> Result<()> {
    let failed = |error: rusqlite::Error| Error::internal(format!("finish {}: {error}", file.display()));
    let connection = rusqlite::Connection::open(file).map_err(failed)?;
    for _ in 0..TRIES {
        match connection.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get::<_, String>(0)) {
            Ok(mode) if mode == "delete" => {
                drop(connection);
                return File::open(file)
                    .and_then(|file| file.sync_all())
                    .map_err(|error| Error::io(format!("sync {}", file.display()), &error));
            }
            Ok(_) => {}
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {}
            Err(error) => return Err(failed(error)),
        }
        thread::sleep(PAUSE);
    }
    Err(Error::internal(format!("{} stays in use", file.display())))
}

fn replace(file: &Path, new: &Path) -> Result<()> {
    let kept = beside(file, ".replaced");
    let rename = |from: &Path, to: &Path| match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("rename {}", from.display()), &error))
        }
        _ => Ok(()),
    };
    if file.exists() {
        remove(&beside(&kept, "-wal"))?;
        rename(file, &kept)?;
        rename(&beside(file, "-wal"), &beside(&kept, "-wal"))?;
    }
    // One without its file belongs to nothing.
    remove(&beside(file, "-wal"))?;
    remove(&beside(file, "-shm"))?;
    rename(new, file)?;
    let directory = file.parent().unwrap_or(Path::new("/"));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io(format!("sync {}", directory.display()), &error))
}
