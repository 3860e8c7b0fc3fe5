//! Meta and the store of a data directory, wherever they are.

use std::sync::Arc;

use burgeon_api::{Result, VmId};
use burgeon_host::layout::{Layout, Lock};
use burgeon_store::{
    chunk_store::ChunkStore,
    meta::Meta,
    places::{Elsewhere, Places},
};

/// Opens both. Blocks.
///
/// # Errors
/// What is wrong with the settings or with what they name; `Refused` for what is another server's, `Conflict` while
/// another one uses meta.
pub(crate) fn open(layout: &Layout, elsewhere: &Elsewhere) -> Result<(Meta, Arc<ChunkStore>)> {
    let files = layout.files();
    let places = settle(layout, elsewhere)?;
    let meta = Meta::open(elsewhere.meta_address(&files))?;
    if let (Some(owner), true) = (&places.owner, elsewhere.meta.is_some()) {
        meta.blocking_claim_owner(owner)?;
    }
    Ok((meta, ChunkStore::open(places, burgeon_host::store_source())?))
}

pub(crate) fn settle(layout: &Layout, elsewhere: &Elsewhere) -> Result<Places> {
    elsewhere.settle(&layout.files(), *VmId::generate().uuid().as_bytes())
}

/// Whether a server could use what is elsewhere: told at once, and not by a process that dies over and over. Does
/// nothing where all is in the data directory, or where a control process runs. Blocks.
///
/// # Errors
/// As a control process would meet them.
pub fn check(layout: &Layout, elsewhere: &Elsewhere) -> Result<()> {
    if Lock::is_taken(layout, "control") {
        return Ok(());
    }
    if elsewhere.is_nothing() { settle(layout, elsewhere).map(drop) } else { open(layout, elsewhere).map(drop) }
}
