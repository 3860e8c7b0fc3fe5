//! How an item's bytes get from one step to the next. One small file for each way.

mod direct;

use burgeon_api::Result;
use bytes::Bytes;

pub(crate) use direct::Direct;

/// Keeps payloads between steps. The control transport (which item goes where) is separate from it.
pub(crate) trait Transport: Send {
    /// Takes an item's payload from the step that made it, in place of an earlier one.
    fn put(&mut self, item: u64, payload: Bytes) -> Result<()>;
    /// The payload for the next step; it may be asked for again when an attempt fails. `None`: the
    /// item has not left the input yet.
    fn get(&self, item: u64) -> Result<Option<Bytes>>;
    /// The item is finished.
    fn forget(&mut self, item: u64);
}
