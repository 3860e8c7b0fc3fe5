//! The catalog: what chunks, packs and roots there are. The store's own index, used by several processes at once.
//!
//! What makes garbage collection safe beside writers:
//!
//! - A root is set only while everything it is said to rely on is here; or while another root keeps the same map
//!   ([`Catalog::blocking_share_root`]). A sweep is refused once a root was set that its collection has not seen, and a
//!   root once chunks were deleted since its writer saw its own (`fence.rs`). No clock is needed for that.
//! - So that writers seldom have to begin again, one that finds a chunk here touches it in the same transaction
//!   ([`Catalog::claim`]), and a sweep deletes only what nobody touched for a while.
//! - A pack that is here gets no more rows: [`Catalog::add_pack`] and [`Catalog::move_chunks`] add a pack with its rows
//!   or not at all. One that has no rows left is dropped in two steps, around the removal of its object, so that a kill
//!   between them leaves a row that the next collection finishes. Its number is kept, so that it is never added again,
//!   however late its writer is.
//!
//! Every request may be repeated: the same again changes nothing and gets the same answer.

mod blocking;
mod collect;
mod fence;
mod identity;
mod roots;
mod schema;

use burgeon_api::{Error, Result};

pub use self::{
    collect::{Candidate, PackState, PackUsage, Statistics},
    fence::{Removals, RootsSeen},
    roots::{NewRoot, Root},
};
use crate::{
    ChunkId, PackId, Place,
    sql::{Address, Connection, Database, Row, Value},
};

/// A chunk of a new pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: ChunkId,
    /// What the chunk is for; the catalog only keeps it.
    pub kind: u8,
    pub place: Place,
}

/// What became of a new pack's chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// Chunks that another pack had before, and where: their copies in the new pack are not used.
    pub elsewhere: Vec<(ChunkId, Place)>,
}

/// A handle to the catalog. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Catalog {
    database: Database,
}

impl Catalog {
    /// Opens or creates the catalog, in a file or on a PostgreSQL server.
    ///
    /// # Errors
    /// As [`Database::open`].
    pub fn open(address: impl Into<Address>) -> Result<Catalog> {
        Ok(Catalog { database: Database::open(&address.into(), &schema::CATALOG)? })
    }

    /// Where these chunks are, so that they need not be stored again. Those that are here count as touched now, and no
    /// collection that begins later than this less its grace deletes them.
    ///
    /// # Errors
    /// The database's; so for all of these.
    pub async fn claim(&self, ids: Vec<ChunkId>, now_us: u64) -> Result<Vec<Option<Place>>> {
        self.database.write_trusted("claim chunks", move |connection| claim(connection, &ids, now_us)).await
    }

    /// [`Catalog::claim`] for a thread that may wait.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_claim(&self, ids: Vec<ChunkId>, now_us: u64) -> Result<Vec<Option<Place>>> {
        self.database.blocking_write_trusted("claim chunks", move |connection| claim(connection, &ids, now_us))
    }

    /// Where these chunks are. Nothing is touched, so this is no ground to leave out storing one.
    ///
    /// # Errors
    /// The database's.
    pub async fn places(&self, ids: Vec<ChunkId>) -> Result<Vec<Option<Place>>> {
        self.database.read("find chunks", move |connection| places(connection, &ids)).await
    }

    /// [`Catalog::places`] for a thread that may wait.
    ///
    /// # Errors
    /// The database's.
    pub fn blocking_places(&self, ids: Vec<ChunkId>) -> Result<Vec<Option<Place>>> {
        self.database.blocking_read("find chunks", move |connection| places(connection, &ids))
    }

    /// Adds a pack that lies complete on its disk, with its chunks. A chunk that already has a place keeps it, and is
    /// touched. Asking again with the same pack changes nothing.
    ///
    /// # Errors
    /// `Invalid` for an entry of another pack; `Conflict` for a pack that is being dropped.
    pub async fn add_pack(&self, pack: PackId, length: u64, now_us: u64, entries: Vec<Entry>) -> Result<Added> {
        let new = NewPack::new(pack, length, now_us, entries)?;
        self.database.write_trusted("add pack", move |connection| new.add(connection)).await
    }

    /// [`Catalog::add_pack`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_add_pack(&self, pack: PackId, length: u64, now_us: u64, entries: Vec<Entry>) -> Result<Added> {
        let new = NewPack::new(pack, length, now_us, entries)?;
        self.database.blocking_write_trusted("add pack", move |connection| new.add(connection))
    }

    /// Claims chunks that must all be here: before a root that relies on them is set.
    ///
    /// # Errors
    /// `Conflict` that names the first missing one.
    pub async fn verify_claims(&self, ids: Vec<ChunkId>, now_us: u64) -> Result<()> {
        self.database.write_trusted("verify claims", move |connection| must_claim(connection, &ids, now_us)).await
    }

    /// [`Catalog::verify_claims`] for a thread that may wait.
    ///
    /// # Errors
    /// As there.
    pub fn blocking_verify_claims(&self, ids: Vec<ChunkId>, now_us: u64) -> Result<()> {
        self.database.blocking_write_trusted("verify claims", move |connection| must_claim(connection, &ids, now_us))
    }
}

const TOUCH: &str = "UPDATE chunk SET touched_us = $2 WHERE id = $1 AND touched_us < $2";
const FIND: &str = "SELECT pack, position, stored, length FROM chunk WHERE id = $1";

fn claim(connection: &mut Connection, ids: &[ChunkId], now_us: u64) -> Result<Vec<Option<Place>>> {
    let touches: Vec<_> = ids.iter().map(|id| vec![blob(id), now_us.into()]).collect();
    connection.execute_each(TOUCH, &touches)?;
    places(connection, ids)
}

fn must_claim(connection: &mut Connection, ids: &[ChunkId], now_us: u64) -> Result<()> {
    let missing = claim(connection, ids, now_us)?.iter().position(Option::is_none);
    match missing.and_then(|index| ids.get(index)) {
        None => Ok(()),
        Some(id) => Err(Error::conflict(format!("chunk {id} is gone, and what is stored refers to it"))
            .with_hint("import it again: chunks that are still here are not stored twice")),
    }
}

fn places(connection: &mut Connection, ids: &[ChunkId]) -> Result<Vec<Option<Place>>> {
    let ids: Vec<_> = ids.iter().map(|id| vec![blob(id)]).collect();
    let found = connection.query_each(FIND, &ids)?;
    found.iter().map(|rows| rows.first().map(|row| read_place(row, 0)).transpose()).collect()
}

/// A pack's rows, made by the caller so that the thread that writes does nothing but write.
struct NewPack {
    pack: PackId,
    length: u64,
    now_us: u64,
    /// In the table's order, so that neighbours go into a page together.
    ids: Vec<ChunkId>,
    rows: Vec<Vec<Value>>,
}

impl NewPack {
    fn new(pack: PackId, length: u64, now_us: u64, mut entries: Vec<Entry>) -> Result<NewPack> {
        if let Some(wrong) = entries.iter().find(|entry| entry.place.pack != pack) {
            return Err(Error::invalid(format!("chunk {} is said to lie in another pack than {pack}", wrong.id)));
        }
        entries.sort_unstable_by_key(|entry| entry.id);
        let row = |entry: &Entry| {
            let place = entry.place;
            vec![
                blob(&entry.id),
                pack_blob(&pack),
                place.offset.into(),
                place.stored.into(),
                place.length.into(),
                u32::from(entry.kind).into(),
                now_us.into(),
            ]
        };
        let rows = entries.iter().map(row).collect();
        Ok(NewPack { pack, length, now_us, ids: entries.iter().map(|entry| entry.id).collect(), rows })
    }

    fn add(&self, connection: &mut Connection) -> Result<Added> {
        let there: Vec<ChunkId> = if insert_pack(connection, self.pack, self.length, self.now_us)? {
            let sql = "INSERT INTO chunk VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING";
            let inserted = connection.execute_each(sql, &self.rows)?;
            self.ids.iter().zip(&inserted).filter(|(_, inserted)| **inserted == 0).map(|(id, _)| *id).collect()
        } else {
            self.ids.clone()
        };
        let mut added = Added::default();
        for (id, place) in there.iter().zip(claim(connection, &there, self.now_us)?) {
            match place {
                Some(place) if place.pack != self.pack => added.elsewhere.push((*id, place)),
                _ => {}
            }
        }
        Ok(added)
    }
}

/// Adds the row of a pack; whether it was not there before.
fn insert_pack(connection: &mut Connection, pack: PackId, length: u64, now_us: u64) -> Result<bool> {
    let live = collect::LIVE;
    if connection.query_first("SELECT 1 FROM gone WHERE id = $1", &[pack_blob(&pack)])?.is_some() {
        return Err(
            Error::conflict(format!("pack {pack} was dropped")).with_hint("store its chunks again, in a new pack")
        );
    }
    let row = [pack_blob(&pack), length.into(), live.into(), now_us.into()];
    let new = connection.execute("INSERT INTO pack VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING", &row)? == 1;
    if !new {
        let state = connection.query_first("SELECT state FROM pack WHERE id = $1", &[pack_blob(&pack)])?;
        if state.is_none_or(|row| row.text(0).is_ok_and(|state| state != live)) {
            return Err(Error::conflict(format!("pack {pack} is being dropped"))
                .with_hint("store its chunks again, in a new pack"));
        }
    }
    Ok(new)
}

fn blob(id: &ChunkId) -> Value {
    Value::Blob(id.0.to_vec())
}

fn pack_blob(id: &PackId) -> Value {
    Value::Blob(id.0.to_vec())
}

/// Four columns from `first` on.
fn read_place(row: &Row, first: usize) -> Result<Place> {
    let narrow = |index: usize| {
        u32::try_from(row.unsigned(index)?).map_err(|_| Error::damaged("a chunk's row tells an impossible length"))
    };
    Ok(Place {
        pack: PackId(row.bytes(first)?),
        offset: row.unsigned(first + 1)?,
        stored: narrow(first + 2)?,
        length: narrow(first + 3)?,
    })
}
