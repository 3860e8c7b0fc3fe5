//! Which store packs and a catalog are of. Both keep the same id, so that two that do not belong together are refused
//! before anything is changed: a collection would take the packs of another store for left-overs.
//!
//! The catalog gets an id first, then the packs their marker. So packs that have a marker are of a catalog that has an
//! id, and a catalog with an id whose packs have none is one that a kill interrupted here.

use std::fs;

use burgeon_api::{Error, Result, path_text::printable};
use serde::{Deserialize, Serialize};

use super::{Places, Source, object_name};
use crate::{StoreId, catalog::Catalog, objects::Blocking};

/// The object that says whose the packs are.
const MARKER: &str = "burgeon-store.json";
/// The one that says that a place is a remote.
const REMOTE: &str = "burgeon-remote.json";
const MOST: u64 = 4096;
const FORMAT: u32 = 1;
const KIND: &str = "burgeon store";
const REBUILD: &str = "stop the server, and run burgeon store fsck --rebuild, which makes a new catalog of the packs";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    format: u32,
    kind: String,
    store: String,
}

/// The store that the packs say they are of, if they say so.
///
/// # Errors
/// `Refused` and `Damaged` for a marker that is not this version's, and what the place meets: wrong keys, no bucket.
pub(super) fn marker(objects: &Blocking) -> Result<Option<StoreId>> {
    let Some(bytes) = objects.read(MARKER, MOST)? else {
        // Some servers answer for a bucket that is not there as for an object.
        objects.check()?;
        return Ok(None);
    };
    let place = objects.describe(MARKER);
    let marker: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::damaged(format!("{place} does not read: {error}")))?;
    let format = marker.get("format").and_then(serde_json::Value::as_u64).unwrap_or_default();
    if format != u64::from(FORMAT) {
        return Err(Error::refused(format!("{place} has format {format}; this Burgeon knows {FORMAT}"))
            .with_hint("use the newer Burgeon that wrote it, or another place"));
    }
    let marker: Marker =
        serde_json::from_value(marker).map_err(|error| Error::damaged(format!("{place} does not read: {error}")))?;
    if marker.kind != KIND {
        return Err(Error::refused(format!("{place} is of a {}, not of a store", printable(&marker.kind))));
    }
    marker.store.parse().map(Some).map_err(|error| Error::damaged(format!("{place}: {error}")))
}

/// Makes a new place one of a store, whose packs are to be copied there.
///
/// # Errors
/// `Refused` for a place that holds another store's packs, or images for other machines.
pub(crate) fn adopt(objects: &Blocking, store: StoreId) -> Result<()> {
    let other = |what: &str| {
        Error::refused(format!("{} holds {what}", objects.describe("")))
            .with_hint("choose an empty directory, or a prefix that is not used")
    };
    match marker(objects)? {
        Some(marked) if marked == store => Ok(()),
        Some(_) => Err(other("the packs of another store")),
        None if objects.read(REMOTE, MOST)?.is_some() => Err(other("images for other machines")),
        None if !objects.list("packs")?.is_empty() => Err(other("packs of nobody")),
        None => set_marker(objects, store),
    }
}

pub(super) fn set_marker(objects: &Blocking, store: StoreId) -> Result<()> {
    let marker = Marker { format: FORMAT, kind: KIND.into(), store: store.to_string() };
    let text = serde_json::to_vec(&marker).map_err(|error| Error::internal(format!("write a marker: {error}")))?;
    objects.put_new(MARKER, &text)
}

/// Refuses a store that has packs and whose catalog's file is not there: SQLite would make an empty one.
///
/// # Errors
/// `Damaged`, and those of the place.
pub(super) fn check_file(places: &Places, objects: &Blocking) -> Result<()> {
    let Some(file) = places.catalog_file() else { return Ok(()) };
    // An empty file is what SQLite makes into a new database.
    if fs::metadata(&file).is_ok_and(|about| about.len() > 0) || objects.list("packs")?.is_empty() {
        return Ok(());
    }
    Err(lost(&file.display().to_string()))
}

fn lost(catalog: &str) -> Error {
    Error::damaged(format!("the store has packs, and its catalog {catalog} is lost")).with_hint(REBUILD)
}

/// Sees to it that packs and catalog are of one store, which a new pair becomes.
///
/// # Errors
/// `Refused` for those of two, and for a place that is something else; `Damaged` for packs whose catalog is lost.
pub(super) fn settle(
    places: &Places,
    objects: &Blocking,
    catalog: &Catalog,
    marked: Option<StoreId>,
    source: &Source,
) -> Result<StoreId> {
    let address = places.catalog_address();
    let of_catalog = catalog.blocking_store()?;
    match (marked, of_catalog) {
        (Some(marked), Some(of_catalog)) if marked == of_catalog => return Ok(marked),
        (Some(marked), Some(of_catalog)) => {
            return Err(apart(&format!("{address} is the catalog of {of_catalog:?}"), objects, marked));
        }
        (Some(marked), None) => {
            if !catalog.blocking_packs()?.is_empty() {
                return Err(apart(&format!("{address} is the catalog of an older store"), objects, marked));
            }
            if !objects.list("packs")?.is_empty() {
                return Err(lost(&address.to_string()));
            }
            return same(catalog.blocking_set_store(marked)?, objects, marked, &address.to_string());
        }
        (None, _) => {}
    }
    // A pair in one directory is taken as it is, as it always was.
    if !places.is_local() {
        check_new(objects, catalog, of_catalog, &address.to_string())?;
    }
    let store = catalog.blocking_set_store(StoreId((source.uuid)()))?;
    set_marker(objects, store)?;
    let marked = marker(objects)?.ok_or_else(|| Error::internal("a marker that was written is not there"))?;
    same(store, objects, marked, &address.to_string())
}

/// Whether packs without a marker can be those of this catalog.
fn check_new(objects: &Blocking, catalog: &Catalog, of_catalog: Option<StoreId>, address: &str) -> Result<()> {
    if objects.read(REMOTE, MOST)?.is_some() {
        let place = objects.describe("");
        return Err(Error::refused(format!("{place} holds images for other machines, and is no place for a store"))
            .with_hint("choose another prefix; burgeon image pull copies images from there"));
    }
    match catalog.blocking_packs()?.first() {
        // As a kill has left it, or a copy to another place.
        Some((pack, ..)) if objects.length(&object_name(*pack)).is_ok() => Ok(()),
        Some((pack, ..)) => Err(Error::refused(format!(
            "{address} is the catalog of another store: {} is not there",
            objects.describe(&object_name(*pack))
        ))
        .with_hint("correct the address of the objects or of the database; nothing was changed")),
        None if of_catalog.is_none() && !objects.list("packs")?.is_empty() => Err(lost(address)),
        None => Ok(()),
    }
}

fn apart(catalog: &str, objects: &Blocking, marked: StoreId) -> Error {
    let place = objects.describe("");
    Error::refused(format!("{catalog}, and the objects in {place} are those of {marked:?}"))
        .with_hint("correct the address of the objects or of the database; nothing was changed")
}

fn same(store: StoreId, objects: &Blocking, marked: StoreId, address: &str) -> Result<StoreId> {
    if store == marked {
        return Ok(store);
    }
    Err(apart(&format!("{address} is the catalog of {store:?}"), objects, marked))
}
