//! The requests of garbage collection for threads that may wait. What they do is told in [`super::collect`].

use burgeon_api::Result;

use super::{
    Candidate, Catalog, Entry, PackState, PackUsage,
    collect::{
        chunks_after, condemn_pack, drop_packs, forget_pack, is_used, let_go_of_copies, move_chunks, pack_usage,
        read_state, unused_packs,
    },
};
use crate::{ChunkId, PackId, Place};

impl Catalog {
    /// [`Catalog::chunks_after`].
    ///
    /// # Errors
    /// The database's; so for all of these.
    pub fn blocking_chunks_after(&self, cursor: Option<ChunkId>, limit: u32) -> Result<Vec<Candidate>> {
        self.database.blocking_read("list chunks", move |connection| chunks_after(connection, cursor.as_ref(), limit))
    }

    /// [`Catalog::pack_usage`].
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_pack_usage(&self) -> Result<Vec<PackUsage>> {
        self.database.blocking_read("add up packs", pack_usage)
    }

    /// [`Catalog::packs`].
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_packs(&self) -> Result<Vec<(PackId, u64, PackState)>> {
        self.database.blocking_read("list packs", |connection| {
            let rows = connection.query("SELECT id, length, state FROM pack ORDER BY id", &[])?;
            rows.iter().map(|row| Ok((PackId(row.bytes(0)?), row.unsigned(1)?, read_state(row.text(2)?)?))).collect()
        })
    }

    /// Whether any chunk has its place in this pack. Reads every chunk's row where none has.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_is_used(&self, id: PackId) -> Result<bool> {
        self.database.blocking_read("look for chunks of a pack", move |connection| is_used(connection, id))
    }

    /// Forgets chunks whose copies were found to be damaged, where their places are still these. Answers how many went.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_let_go_of_copies(&self, copies: Vec<(ChunkId, Place)>) -> Result<u64> {
        self.database
            .blocking_write("let go of damaged copies", move |connection| let_go_of_copies(connection, &copies))
    }

    /// [`Catalog::move_chunks`].
    ///
    /// # Errors
    /// As there.
    pub fn blocking_move_chunks(
        &self,
        to: PackId,
        length: u64,
        moves: Vec<(PackId, Entry)>,
        now_us: u64,
    ) -> Result<u64> {
        self.database
            .blocking_write("move chunks", move |connection| move_chunks(connection, to, length, &moves, now_us))
    }

    /// [`Catalog::drop_packs`].
    ///
    /// # Errors
    /// As there.
    pub fn blocking_drop_packs(&self, ids: Vec<PackId>, added_before_us: u64) -> Result<Vec<PackId>> {
        let unused = self.database.blocking_read("find unused packs", unused_packs)?;
        let free: Vec<PackId> = ids.into_iter().filter(|id| unused.contains(id)).collect();
        self.database.blocking_write("drop packs", move |connection| drop_packs(connection, &free, added_before_us))
    }

    /// [`Catalog::forget_pack`].
    ///
    /// # Errors
    /// As there.
    pub fn blocking_forget_pack(&self, id: PackId) -> Result<()> {
        self.database.blocking_write("forget pack", move |connection| forget_pack(connection, id))
    }

    /// Gives a pack that has no row one that says it is dropping, so that its writer, if there still is one, can not add
    /// it any more. Answers whether it is dropping: if so, its object may be removed. The row is of now, so that it
    /// outlives this collection, and goes as that of any dropping pack; its length is 0.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_condemn_pack(&self, id: PackId, now_us: u64) -> Result<bool> {
        self.database.blocking_write("condemn pack", move |connection| condemn_pack(connection, id, now_us))
    }
}
