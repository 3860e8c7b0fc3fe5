//! Moving what a data directory holds to where the settings say, once, while nobody uses it.
//!
//! Everything is copied first. Then `places.json` is put in place by a rename, from which moment on it lies elsewhere, and
//! what was left here is put away. A kill before that moment leaves the data directory as it was, and a kill after it
//! leaves files that nobody reads; the same again goes on in both cases. The owner is chosen before the first row is
//! copied, and kept in the unfinished file, so that a second try knows its own tables.

use std::{fs, io, path::Path, thread};

use burgeon_api::{Error, Result, store::Relocated};

use super::{
    CATALOG, Elsewhere, Files, Places,
    elsewhere::{owner, put_in_place, read, write},
};
use crate::{
    OwnerId,
    catalog::Catalog,
    chunk_store::{ChunkStore, Source, Watch, adopt, settle_file},
    meta::Meta,
    objects::{Blocking, Object},
};

/// The phase whose progress is in bytes.
pub const PACKS: &str = "packs";
/// Packs on their way at the same time.
const TOGETHER: usize = 4;

/// See the module. Whoever calls this sees to it that no server runs.
///
/// # Errors
/// `Invalid` where the settings name nothing; `Refused` for places that hold something else, and where the settings are
/// not those of the first time; those of all places, and of `watch`. What was here is still here then.
pub fn relocate(elsewhere: &Elsewhere, files: &Files, source: &Source, watch: &mut Watch<'_>) -> Result<Relocated> {
    if elsewhere.is_nothing() {
        return Err(Error::invalid("the settings name no place but the data directory")
            .with_hint("set BURGEON_OBJECTS, BURGEON_DATABASE or both, as the server is to have them"));
    }
    let id = (source.uuid)();
    if read(&files.record)?.is_some() {
        // Of the right kinds; then what a kill has left is put away.
        elsewhere.settle(files, id)?;
        put_away(elsewhere, files)?;
        return Ok(Relocated::default());
    }
    let unfinished = files.record.with_extension("json.moving");
    let record = match read(&unfinished)? {
        Some(record) => record,
        None => write(&unfinished, elsewhere, OwnerId(id))?,
    };
    if !elsewhere.is_of(&record) {
        return Err(Error::refused(format!("{} tells of a move to other places", unfinished.display()))
            .with_hint("finish that one with its settings, or remove the file to give it up"));
    }
    let places = elsewhere.places(files, Some(owner(&record, files)?));
    let mut moved = Relocated::default();
    if files.store.is_dir() {
        move_store(&places, files, source, watch, &mut moved)?;
    }
    if let (Some(address), Some(owner)) = (&elsewhere.meta, &places.owner)
        && files.meta.exists()
    {
        let target = Meta::open(address)?;
        moved.rows += Meta::open(&files.meta)?.blocking_copy_to(&target, owner, watch)?;
    }
    watch("replace", 0, 0)?;
    put_in_place(&unfinished, &files.record)?;
    put_away(elsewhere, files)?;
    Ok(moved)
}

fn move_store(
    places: &Places,
    files: &Files,
    source: &Source,
    watch: &mut Watch<'_>,
    moved: &mut Relocated,
) -> Result<()> {
    let here = Places::from(&files.store);
    let old = ChunkStore::open(&here, source.clone())?;
    let store = old.catalog().blocking_store()?.ok_or_else(|| Error::internal("an open store has no id"))?;
    if !places.has_objects_here() {
        let target = places.open_objects()?;
        adopt(&target, store)?;
        move_packs(&here.open_objects()?, &target, watch, moved)?;
    }
    if let (Some(address), Some(owner)) = (&places.catalog, &places.owner) {
        let target = Catalog::open(address)?;
        moved.rows += old.catalog().blocking_copy_to(&target, owner, watch)?;
        // From here on it is the catalog of these packs.
        if target.blocking_set_store(store)? != store {
            return Err(Error::refused(format!("{address} is the catalog of another store"))
                .with_hint("give it a database of its own: createdb NAME"));
        }
    }
    Ok(())
}

fn move_packs(from: &Blocking, to: &Blocking, watch: &mut Watch<'_>, moved: &mut Relocated) -> Result<()> {
    let packs = from.list("packs")?;
    let total: u64 = packs.iter().map(|pack| pack.length).sum();
    let there = to.list("packs")?;
    let is_there = |pack: &&Object| !there.iter().any(|other| other.name == pack.name && other.length == pack.length);
    let missing: Vec<&Object> = packs.iter().filter(is_there).collect();
    let mut done = total - missing.iter().map(|pack| pack.length).sum::<u64>();
    for some in missing.chunks(TOGETHER) {
        watch(PACKS, done, total)?;
        thread::scope(|scope| {
            let copies: Vec<_> = some.iter().map(|pack| scope.spawn(|| copy_pack(from, to, pack))).collect();
            copies.into_iter().try_for_each(|copy| {
                copy.join().map_err(|_| Error::internal("a thread that copies packs has panicked"))?
            })
        })?;
        done += some.iter().map(|pack| pack.length).sum::<u64>();
    }
    // Not by what was answered, but by what is there.
    let there = to.list("packs")?;
    let lost =
        packs.iter().find(|pack| !there.iter().any(|other| (&other.name, other.length) == (&pack.name, pack.length)));
    if let Some(lost) = lost {
        return Err(Error::damaged(format!("{} is not there as it is here", to.describe(&lost.name)))
            .with_hint("do the same again; nothing here was changed"));
    }
    moved.packs = packs.len() as u64;
    moved.pack_bytes = total;
    Ok(())
}

fn copy_pack(from: &Blocking, to: &Blocking, pack: &Object) -> Result<()> {
    let object = from.open_object(&pack.name)?;
    let mut bytes = vec![0; usize::try_from(object.length()).unwrap_or(usize::MAX)];
    object.read_at(0, &mut bytes)?;
    to.put_new(&pack.name, &bytes)
}

/// Removes packs that lie elsewhere by now, and names databases for what they are.
fn put_away(elsewhere: &Elsewhere, files: &Files) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| Error::io(format!("put {path} away"), &error)
    };
    if elsewhere.has_objects() {
        for name in ["packs", "burgeon-store.json"] {
            let path = files.store.join(name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(failed(&path))?,
            }
        }
    }
    let catalog = elsewhere.catalog.as_ref().map(|_| files.store.join(CATALOG));
    let meta = elsewhere.meta.as_ref().map(|_| files.meta.clone());
    for file in catalog.into_iter().chain(meta).filter(|file| file.exists()) {
        // All of it into the one file, once the threads that had it open have let go.
        settle_file(&file)?;
        fs::rename(&file, file.with_extension("db.moved")).map_err(failed(&file))?;
    }
    Ok(())
}
