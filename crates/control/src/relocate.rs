//! Meta and the store of a data directory that no server has open, to where the settings say.

use std::path::Path;

use burgeon_api::{Result, http::Progress, store::Relocated};
use burgeon_host::layout::{Layout, Lock};
use burgeon_store::places::{self, Elsewhere};

use crate::store::watch;

/// Moves them. Blocks.
///
/// # Errors
/// `Conflict` while a server has the data directory; as [`places::relocate`].
pub fn relocate(
    data: &Path,
    elsewhere: &Elsewhere,
    tell: &(dyn Fn(Progress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Relocated> {
    let layout = Layout::create(data)?;
    let _locks = Lock::take_all(&layout)?;
    let (mut bytes, mut rows) = (watch(true, tell, cancelled), watch(false, tell, cancelled));
    let mut told = |phase: &'static str, done, total| match phase {
        places::PACKS => bytes(phase, done, total),
        _ => rows(phase, done, total),
    };
    places::relocate(elsewhere, &layout.files(), &burgeon_host::store_source(), &mut told)
}
