//! Direct, relayed by the host: a payload goes from VM to VM through memory and is stored nowhere.
//! After a crash of the control process an item begins anew from the input.

use std::collections::HashMap;

use burgeon_api::Result;
use bytes::Bytes;

use super::Transport;

/// Its size is bounded by the run: only so many items are between two steps at a time.
#[derive(Default)]
pub(crate) struct Direct {
    payloads: HashMap<u64, Bytes>,
}

impl Transport for Direct {
    fn put(&mut self, item: u64, payload: Bytes) -> Result<()> {
        self.payloads.insert(item, payload);
        Ok(())
    }

    fn get(&self, item: u64) -> Result<Option<Bytes>> {
        Ok(self.payloads.get(&item).cloned())
    }

    fn forget(&mut self, item: u64) {
        self.payloads.remove(&item);
    }
}
