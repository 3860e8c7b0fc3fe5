//! Holds: roots for as long as something goes on, such as a copy to another place. A hold is let go of when it is dropped;
//! one whose process died is let go of once its time is over, by the next collection.

use std::{sync::Arc, time::Duration};

use burgeon_api::Result;

use crate::{ChunkId, catalog::NewRoot, chunk_store::ChunkStore};

/// What a hold is for; each is a kind of roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// An image's disk is served to others.
    Served,
    /// An image is copied to a remote.
    Pushed,
    /// A VM's disk is stored, and given to who makes an image of it.
    HandedOver,
    /// A substrate is written to a file.
    Exported,
    /// A substrate is read from a file, and not in its place yet.
    Imported,
}

impl Purpose {
    fn kind(self) -> &'static str {
        match self {
            Purpose::Served => "served",
            Purpose::Pushed => "pushed",
            Purpose::HandedOver => "handover",
            Purpose::Exported => "export",
            Purpose::Imported => "import",
        }
    }
}

/// For how long a hold keeps without being renewed.
pub const TERM: Duration = Duration::from_secs(24 * 3600);

/// Keeps what a map leads to. See the module. Calls block.
pub struct Hold {
    store: Arc<ChunkStore>,
    purpose: Purpose,
    name: String,
    map: ChunkId,
}

impl Hold {
    /// Takes a map that a root keeps already. The name is one that nobody else uses.
    ///
    /// # Errors
    /// `Conflict` where nothing keeps the map any more; the catalog's.
    pub fn share(store: &Arc<ChunkStore>, purpose: Purpose, name: String, map: ChunkId) -> Result<Hold> {
        let hold = Hold { store: store.clone(), purpose, name, map };
        hold.renew()?;
        Ok(hold)
    }

    /// The root that [`crate::chunk_store::Writer::finish`] sets over what it has stored; then [`Self::of`] takes it.
    #[must_use]
    pub fn root(store: &ChunkStore, purpose: Purpose, name: String, map: ChunkId) -> NewRoot {
        let expires_us = Some(store.now_us() + u64::try_from(TERM.as_micros()).unwrap_or(u64::MAX));
        NewRoot { expires_us, ..NewRoot::new(purpose.kind(), name, map) }
    }

    /// The hold whose root has just been set.
    #[must_use]
    pub fn of(store: &Arc<ChunkStore>, purpose: Purpose, root: &NewRoot) -> Hold {
        Hold { store: store.clone(), purpose, name: root.name.clone(), map: root.map }
    }

    /// The map that is kept.
    #[must_use]
    pub fn map(&self) -> ChunkId {
        self.map
    }

    /// Keeps for another [`TERM`].
    ///
    /// # Errors
    /// As [`Self::share`].
    pub fn renew(&self) -> Result<()> {
        let root = Hold::root(&self.store, self.purpose, self.name.clone(), self.map);
        self.store.catalog().blocking_share_root(root, self.store.now_us())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let removed = self.store.catalog().blocking_remove_root(self.purpose.kind(), &self.name, Some(self.map));
        if let Err(error) = removed {
            tracing::warn!(kind = self.purpose.kind(), name = self.name, %error, "chunks are held for a day longer");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::chunk_store::{Source, Writer};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_hold_ends_with_its_owner_or_with_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let now_us = Arc::new(AtomicU64::new(1_000_000));
        let clock = now_us.clone();
        let source = Source { now_us: Arc::new(move || clock.load(Ordering::Relaxed)), uuid: Arc::new(|| [7; 16]) };
        let store = tokio::task::spawn_blocking({
            let path = directory.path().to_path_buf();
            move || {
                let store = ChunkStore::open(&path, source).unwrap();
                let mut writer = Writer::new(&store);
                writer.put(b"kept".to_vec()).unwrap();
                let map = ChunkId::of(b"kept");
                assert!(Hold::share(&store, Purpose::Served, "none".into(), map).is_err(), "nothing keeps it yet");
                let root = Hold::root(&store, Purpose::Pushed, "first".into(), map);
                writer.finish(root.clone()).unwrap();
                let first = Hold::of(&store, Purpose::Pushed, &root);
                let second = Hold::share(&store, Purpose::Served, "second".into(), map).unwrap();
                assert_eq!(store.catalog().blocking_roots(None).unwrap().len(), 2);
                drop(first);
                // Its process dies.
                std::mem::forget(second);
                store
            }
        })
        .await
        .unwrap();
        let names = async || {
            let expiring = store.clone();
            let expire = move || expiring.catalog().blocking_expire_roots(expiring.now_us());
            tokio::task::spawn_blocking(expire).await.unwrap().unwrap();
            let roots = store.catalog().roots(None).await.unwrap();
            roots.into_iter().map(|root| root.name).collect::<Vec<String>>()
        };
        assert_eq!(names().await, ["second"]);
        let term_us = u64::try_from(TERM.as_micros()).unwrap();
        now_us.fetch_add(term_us - 1, Ordering::Relaxed);
        assert_eq!(names().await, ["second"], "not before its time");
        now_us.fetch_add(1, Ordering::Relaxed);
        assert!(names().await.is_empty());
    }
}
