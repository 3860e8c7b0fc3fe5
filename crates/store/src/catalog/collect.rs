//! What garbage collection needs of the catalog. Who marks what is reachable is elsewhere; here every deletion is
//! checked again, in the transaction that makes it.

use std::collections::BTreeSet;

use burgeon_api::{Error, Result};

use super::{Catalog, Entry, RootsSeen, blob, fence, insert_pack, pack_blob, read_place};
use crate::{
    ChunkId, PackId, Place,
    sql::{Connection, Row, Value},
};

pub(super) const LIVE: &str = "live";
const DROPPING: &str = "dropping";

/// A chunk that a collection looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub id: ChunkId,
    pub kind: u8,
    pub place: Place,
    pub touched_us: u64,
}

/// Where a pack is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackState {
    Live,
    /// No chunk lies in it: its object is removed, then its row.
    Dropping,
}

/// A pack, and what of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUsage {
    pub id: PackId,
    /// Of the whole object, in bytes.
    pub length: u64,
    pub state: PackState,
    pub created_us: u64,
    /// Stored bytes of the chunks that have their place here.
    pub live_stored: u64,
    pub live_chunks: u64,
}

/// Sums over the catalog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub packs: u64,
    /// Those of `packs` whose removal is not finished.
    pub packs_dropping: u64,
    pub pack_bytes: u64,
    pub chunks: u64,
    /// Bytes of all chunks as stored, and as they are.
    pub stored_bytes: u64,
    pub plain_bytes: u64,
    pub roots: u64,
}

impl Catalog {
    /// Chunks in the order of their ids, behind `cursor`. Fewer than `limit` are the last ones.
    ///
    /// # Errors
    /// The database's; so for all of these.
    pub async fn chunks_after(&self, cursor: Option<ChunkId>, limit: u32) -> Result<Vec<Candidate>> {
        self.database.read("list chunks", move |connection| chunks_after(connection, cursor.as_ref(), limit)).await
    }

    /// Deletes those of the chunks that nobody touched since, and tells which. Their bytes stay in their packs until
    /// those are repacked or dropped. None, and nothing is deleted, where a root was set since the roots were seen.
    ///
    /// # Errors
    /// The database's.
    pub async fn sweep(
        &self,
        ids: Vec<ChunkId>,
        untouched_since_us: u64,
        seen: RootsSeen,
    ) -> Result<Option<Vec<ChunkId>>> {
        self.database
            .write_trusted("sweep chunks", move |connection| sweep(connection, &ids, untouched_since_us, seen))
            .await
    }

    /// [`Catalog::sweep`] for a thread that may wait.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_sweep(
        &self,
        ids: Vec<ChunkId>,
        untouched_since_us: u64,
        seen: RootsSeen,
    ) -> Result<Option<Vec<ChunkId>>> {
        self.database
            .blocking_write_trusted("sweep chunks", move |connection| sweep(connection, &ids, untouched_since_us, seen))
    }

    /// All packs, oldest id first, with what of them is used. Reads every chunk's row.
    ///
    /// # Errors
    /// The database's.
    pub async fn pack_usage(&self) -> Result<Vec<PackUsage>> {
        self.database.read("add up packs", pack_usage).await
    }

    /// All packs, oldest id first, without looking at chunks.
    ///
    /// # Errors
    /// The database's.
    pub async fn packs(&self) -> Result<Vec<(PackId, u64, PackState)>> {
        self.database
            .read("list packs", |connection| {
                let rows = connection.query("SELECT id, length, state FROM pack ORDER BY id", &[])?;
                rows.iter()
                    .map(|row| Ok((PackId(row.bytes(0)?), row.unsigned(1)?, read_state(row.text(2)?)?)))
                    .collect()
            })
            .await
    }

    /// Gives chunks their places in a new pack, which lies complete on its disk; each comes with the pack in which it lay.
    /// Chunks that have gone, or have their place elsewhere by now, are left as they are. Answers how many have their
    /// place in the new pack.
    ///
    /// # Errors
    /// `Invalid` for an entry of another pack than the new one; `Conflict` for a new pack that is being dropped.
    pub async fn move_chunks(&self, to: PackId, length: u64, moves: Vec<(PackId, Entry)>, now_us: u64) -> Result<u64> {
        self.database.write("move chunks", move |connection| move_chunks(connection, to, length, &moves, now_us)).await
    }

    /// The first step of dropping packs: those of them that no chunk names, and that were added before the time given,
    /// get the state `Dropping` and are told; so are those that have it already. Their objects may then be removed, and
    /// then their rows, by [`Catalog::forget_pack`].
    ///
    /// The time is a kindness to a writer that adds its pack once more, because the outcome was unknown: it is refused
    /// once the pack was dropped.
    ///
    /// # Errors
    /// The database's.
    pub async fn drop_packs(&self, ids: Vec<PackId>, added_before_us: u64) -> Result<Vec<PackId>> {
        // A pack that is here and has no row never gets one again, so that this may be seen before the transaction:
        // it reads every chunk, which should not keep writers waiting.
        let unused = self.database.read("find unused packs", unused_packs).await?;
        let free: Vec<PackId> = ids.into_iter().filter(|id| unused.contains(id)).collect();
        self.database.write("drop packs", move |connection| drop_packs(connection, &free, added_before_us)).await
    }

    /// [`Catalog::drop_packs`] for one; whether it is dropping now.
    ///
    /// # Errors
    /// The database's.
    pub async fn drop_pack(&self, id: PackId, added_before_us: u64) -> Result<bool> {
        Ok(self.drop_packs(vec![id], added_before_us).await?.contains(&id))
    }

    /// The second step: forgets a dropping pack whose object is removed.
    ///
    /// # Errors
    /// `Conflict` for a pack that is not dropping.
    pub async fn forget_pack(&self, id: PackId) -> Result<()> {
        self.database.write("forget pack", move |connection| forget_pack(connection, id)).await
    }

    /// Sums over everything. Reads every chunk's row.
    ///
    /// # Errors
    /// The database's.
    pub async fn statistics(&self) -> Result<Statistics> {
        self.database.read("add up the catalog", statistics).await
    }
}

pub(super) fn chunks_after(
    connection: &mut Connection,
    cursor: Option<&ChunkId>,
    limit: u32,
) -> Result<Vec<Candidate>> {
    let columns = "SELECT id, kind, touched_us, pack, position, stored, length FROM chunk";
    let rows = match cursor {
        None => connection.query(&format!("{columns} ORDER BY id LIMIT $1"), &[i64::from(limit).into()])?,
        Some(id) => connection
            .query(&format!("{columns} WHERE id > $1 ORDER BY id LIMIT $2"), &[blob(id), i64::from(limit).into()])?,
    };
    rows.iter().map(read_candidate).collect()
}

pub(super) fn pack_usage(connection: &mut Connection) -> Result<Vec<PackUsage>> {
    let sql = "SELECT pack.id, pack.length, pack.state, pack.created_us,
            CAST(COALESCE(used.stored, 0) AS BIGINT), CAST(COALESCE(used.chunks, 0) AS BIGINT)
        FROM pack LEFT JOIN (
            SELECT pack AS id, SUM(stored) AS stored, COUNT(*) AS chunks FROM chunk GROUP BY pack
        ) AS used ON used.id = pack.id
        ORDER BY pack.id";
    connection.query(sql, &[])?.iter().map(read_usage).collect()
}

pub(super) fn drop_packs(connection: &mut Connection, free: &[PackId], added_before_us: u64) -> Result<Vec<PackId>> {
    let rows: Vec<_> = free.iter().map(|id| vec![pack_blob(id), added_before_us.into()]).collect();
    let drop = format!("UPDATE pack SET state = '{DROPPING}' WHERE id = $1 AND created_us < $2");
    let changed = connection.execute_each(&drop, &rows)?;
    Ok(kept(free, &changed))
}

pub(super) fn forget_pack(connection: &mut Connection, id: PackId) -> Result<()> {
    let sql = format!("DELETE FROM pack WHERE id = $1 AND state = '{DROPPING}'");
    if connection.execute(&sql, &[pack_blob(&id)])? == 1 {
        connection.execute("INSERT INTO gone VALUES ($1) ON CONFLICT DO NOTHING", &[pack_blob(&id)])?;
    } else if connection.query_first("SELECT 1 FROM pack WHERE id = $1", &[pack_blob(&id)])?.is_some() {
        return Err(Error::conflict(format!("pack {id} is in use")));
    }
    Ok(())
}

/// Whether the pack had no row before, or was condemned already.
pub(super) fn condemn_pack(connection: &mut Connection, id: PackId, now_us: u64) -> Result<bool> {
    let row = [pack_blob(&id), 0_u64.into(), DROPPING.into(), now_us.into()];
    connection.execute("INSERT INTO pack VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING", &row)?;
    let state = connection.query_first("SELECT state FROM pack WHERE id = $1", &[pack_blob(&id)])?;
    Ok(state.is_some_and(|row| row.text(0).is_ok_and(|state| state == DROPPING)))
}

fn sweep(
    connection: &mut Connection,
    ids: &[ChunkId],
    untouched_since_us: u64,
    seen: RootsSeen,
) -> Result<Option<Vec<ChunkId>>> {
    if !fence::sees_all_roots(connection, seen)? {
        return Ok(None);
    }
    let rows: Vec<_> = ids.iter().map(|id| vec![blob(id), untouched_since_us.into()]).collect();
    let deleted = connection.execute_each("DELETE FROM chunk WHERE id = $1 AND touched_us < $2", &rows)?;
    let deleted = kept(ids, &deleted);
    if !deleted.is_empty() {
        fence::chunks_were_deleted(connection)?;
    }
    Ok(Some(deleted))
}

pub(super) fn is_used(connection: &mut Connection, id: PackId) -> Result<bool> {
    Ok(connection.query_first("SELECT 1 FROM chunk WHERE pack = $1 LIMIT 1", &[pack_blob(&id)])?.is_some())
}

pub(super) fn let_go_of_copies(connection: &mut Connection, copies: &[(ChunkId, Place)]) -> Result<u64> {
    let rows: Vec<_> = copies
        .iter()
        .map(|(id, place)| vec![blob(id), pack_blob(&place.pack), place.offset.into(), place.stored.into()])
        .collect();
    let sql = "DELETE FROM chunk WHERE id = $1 AND pack = $2 AND position = $3 AND stored = $4";
    let deleted = connection.execute_each(sql, &rows)?.iter().sum();
    if deleted > 0 {
        fence::chunks_were_deleted(connection)?;
    }
    Ok(deleted)
}

pub(super) fn move_chunks(
    connection: &mut Connection,
    to: PackId,
    length: u64,
    moves: &[(PackId, Entry)],
    now_us: u64,
) -> Result<u64> {
    if moves.iter().any(|(from, entry)| *from == to || entry.place.pack != to) {
        return Err(Error::invalid(format!("chunks are moved from other packs to the new one, {to}, alone")));
    }
    if insert_pack(connection, to, length, now_us)? {
        let sql = "UPDATE chunk SET pack = $3, position = $4, stored = $5 WHERE id = $1 AND pack = $2";
        let rows: Vec<Vec<Value>> = moves
            .iter()
            .map(|(from, entry)| {
                let place = entry.place;
                vec![blob(&entry.id), pack_blob(from), pack_blob(&to), place.offset.into(), place.stored.into()]
            })
            .collect();
        return Ok(connection.execute_each(sql, &rows)?.iter().sum());
    }
    // The same request again: its pack was added with its rows.
    let ids: Vec<ChunkId> = moves.iter().map(|(_, entry)| entry.id).collect();
    let there = super::places(connection, &ids)?;
    let count = there.iter().flatten().filter(|place| place.pack == to).count();
    Ok(u64::try_from(count).unwrap_or(u64::MAX))
}

pub(super) fn unused_packs(connection: &mut Connection) -> Result<BTreeSet<PackId>> {
    let mut read = |sql: &str| -> Result<BTreeSet<PackId>> {
        connection.query(sql, &[])?.iter().map(|row| Ok(PackId(row.bytes(0)?))).collect()
    };
    let used = read("SELECT DISTINCT pack FROM chunk")?;
    Ok(read("SELECT id FROM pack")?.difference(&used).copied().collect())
}

fn statistics(connection: &mut Connection) -> Result<Statistics> {
    let mut numbers = |sql: &str| -> Result<Row> {
        connection.query_first(sql, &[])?.ok_or_else(|| Error::internal("a sum has no row"))
    };
    let packs = numbers(
        "SELECT COUNT(*), CAST(COALESCE(SUM(length), 0) AS BIGINT),
            CAST(COALESCE(SUM(CASE WHEN state = 'dropping' THEN 1 ELSE 0 END), 0) AS BIGINT) FROM pack",
    )?;
    let chunks = numbers(
        "SELECT COUNT(*), CAST(COALESCE(SUM(stored), 0) AS BIGINT), CAST(COALESCE(SUM(length), 0) AS BIGINT)
            FROM chunk",
    )?;
    let roots = numbers("SELECT COUNT(*) FROM root")?;
    Ok(Statistics {
        packs: packs.unsigned(0)?,
        pack_bytes: packs.unsigned(1)?,
        packs_dropping: packs.unsigned(2)?,
        chunks: chunks.unsigned(0)?,
        stored_bytes: chunks.unsigned(1)?,
        plain_bytes: chunks.unsigned(2)?,
        roots: roots.unsigned(0)?,
    })
}

/// Those whose statement changed a row.
fn kept<Id: Copy>(ids: &[Id], changed: &[u64]) -> Vec<Id> {
    ids.iter().zip(changed).filter(|(_, changed)| **changed > 0).map(|(id, _)| *id).collect()
}

fn read_candidate(row: &Row) -> Result<Candidate> {
    Ok(Candidate {
        id: ChunkId(row.bytes(0)?),
        kind: u8::try_from(row.integer(1)?).map_err(|_| Error::damaged("a chunk's row tells an impossible kind"))?,
        touched_us: row.unsigned(2)?,
        place: read_place(row, 3)?,
    })
}

fn read_usage(row: &Row) -> Result<PackUsage> {
    Ok(PackUsage {
        id: PackId(row.bytes(0)?),
        length: row.unsigned(1)?,
        state: read_state(row.text(2)?)?,
        created_us: row.unsigned(3)?,
        live_stored: row.unsigned(4)?,
        live_chunks: row.unsigned(5)?,
    })
}

pub(super) fn read_state(text: &str) -> Result<PackState> {
    match text {
        LIVE => Ok(PackState::Live),
        DROPPING => Ok(PackState::Dropping),
        _ => Err(Error::damaged("a pack's row tells a state that there is not")),
    }
}
