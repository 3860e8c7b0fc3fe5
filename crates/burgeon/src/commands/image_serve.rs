//! `image serve`: an image's disk, read-only, to any NBD client, for as long as the command runs.
//!
//! This process serves by itself: what it gives away ends with it, and neither host nor control has to remember it. The
//! store takes several processes. A hold keeps the image's chunks, whatever becomes of the image meanwhile.

use std::{
    io,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use burgeon_api::{ByteSize, Error, Result, VmId, image::ImageView};
use burgeon_qemu::nbd::{Export, Server};
use burgeon_store::{
    ChunkId,
    chunk_store::ChunkStore,
    hold::{Hold, Purpose},
    map::{Map, MapReader},
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};

use super::{Context, environment};
use crate::{client::escape, output};

/// Decoded nodes in memory.
const NODES: usize = 1024;
/// How often the hold on the image's chunks is renewed.
const RENEW: Duration = Duration::from_secs(3600);
/// The longest path of a unix socket.
const MOST_PATH: usize = 107;
/// Reads that fail are told so often, then only to the client.
const TOLD: u32 = 10;

/// The disk of an image.
struct Served {
    store: Arc<ChunkStore>,
    nodes: MapReader<Arc<ChunkStore>>,
    map: Map,
    failures: AtomicU32,
}

impl Served {
    fn read_pieces(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let pieces = self.map.lookup(&self.nodes, offset..offset + bytes.len() as u64)?;
        // Each of them once, and all together.
        let mut ids: Vec<ChunkId> = pieces.iter().filter_map(|piece| piece.source.map(|(id, _)| id)).collect();
        ids.sort_unstable();
        ids.dedup();
        let chunks = self.store.get_all(&ids)?;
        for piece in pieces {
            let position = |at: u64| usize::try_from(at - offset).unwrap_or(0);
            let target = &mut bytes[position(piece.range.start)..position(piece.range.end)];
            let Some((id, within)) = piece.source else {
                target.fill(0);
                continue;
            };
            let chunk = ids.binary_search(&id).map(|index| &chunks[index]);
            let chunk = chunk.map_err(|_| Error::internal("a chunk that was fetched is missing"))?;
            let within = usize::try_from(within).unwrap_or(usize::MAX);
            let part = chunk.get(within..within.saturating_add(target.len()));
            let part = part.ok_or_else(|| Error::damaged(format!("{id:?} is shorter than the map says")))?;
            target.copy_from_slice(part);
        }
        Ok(())
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "an image does not change")
}

impl Export for Served {
    fn size(&self) -> u64 {
        self.map.length()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    /// Chunks are fetched and decompressed: helpers do it, several at a time.
    fn is_near(&self, _: u64, _: u64) -> bool {
        false
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read_pieces(offset, bytes).map_err(|error| {
            if self.failures.fetch_add(1, Ordering::Relaxed) < TOLD {
                output::note(&format!("a read of {} bytes at {offset} failed: {error}", bytes.len()));
            }
            io::Error::other(error)
        })
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(read_only())
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn hole(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        let pieces = self.map.lookup(&self.nodes, offset..end).map_err(io::Error::other)?;
        let hole = pieces.first().is_some_and(|piece| piece.source.is_none());
        let last = pieces.iter().take_while(|piece| piece.source.is_none() == hole).last();
        Ok((hole, last.map_or(end, |piece| piece.range.end) - offset))
    }
}

/// Serves until Ctrl-C or SIGTERM.
pub(super) async fn serve(context: &Context, name: &str, socket: &Path) -> Result<u8> {
    let failed = |error: io::Error| Error::io("wait for signals", &error);
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt()).map_err(failed)?, signal(SignalKind::terminate()).map_err(failed)?);
    let socket =
        std::path::absolute(socket).map_err(|error| Error::io(format!("find {}", socket.display()), &error))?;
    if socket.as_os_str().len() > MOST_PATH {
        return Err(Error::invalid(format!("{} is too long for a socket", socket.display()))
            .with_hint(format!("choose a path of at most {MOST_PATH} bytes")));
    }
    if UnixStream::connect(&socket).is_ok() {
        return Err(Error::conflict(format!("somebody listens on {} already", socket.display()))
            .with_hint("choose another path"));
    }
    let client = context.client()?;
    let view: ImageView = client.get(&format!("/v1/images/{}", escape(name))).await?;
    let image = view.image.ok_or_else(|| Error::damaged(view.problem.unwrap_or_default()))?;
    let Some(map) = &image.map else {
        return Err(match image.disk {
            None => Error::invalid(format!("image {name} has no disk")),
            Some(_) => Error::refused(format!("the disk of image {name} is not in the store"))
                .with_hint("build or import it again"),
        });
    };
    let map: ChunkId = map.parse()?;
    let files = client.layout.files();
    let elsewhere = environment::elsewhere(&environment::of_process)?;
    let path = socket.clone();
    let hold_name = format!("{name}/{}", VmId::generate());
    let (hold, server, size) = blocking(move || {
        let store = ChunkStore::open(elsewhere.settled(&files)?, burgeon_host::store_source())?;
        let hold = Hold::share(&store, Purpose::Served, hold_name, map)?;
        let map = Map::open(&*store, map)?;
        let nodes = MapReader::new(store.clone(), NODES);
        let served = Served { store, nodes, map, failures: AtomicU32::new(0) };
        // The socket is for this user only, from its first moment.
        rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
        let size = served.size();
        Ok((hold, Server::start(&path, Arc::new(served), None)?, size))
    })
    .await?;
    let shown = socket.display().to_string();
    let uri = format!("nbd+unix:///?socket={}", shown.split('/').map(escape).collect::<Vec<_>>().join("/"));
    if context.json {
        output::json(&json!({
            "image": name, "digest": image.digest, "socket": shown, "uri": uri, "size": size, "read_only": true
        }))?;
    } else {
        output::note(&format!("image {name}, {}, read-only, until Ctrl-C; copy it with", ByteSize(size)));
        output::note(&format!("  nbdcopy '{uri}' {name}.raw"));
        output::note(&format!("  qemu-img convert -O qcow2 '{uri}' {name}.qcow2"));
        output::print(&format!("{uri}\n"));
    }
    let hold = Arc::new(hold);
    let mut renew = tokio::time::interval(RENEW);
    // The first tick comes at once.
    renew.tick().await;
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = renew.tick() => {
                let hold = hold.clone();
                if let Err(error) = blocking(move || hold.renew()).await {
                    output::note(&format!("the image's chunks may be collected within a day: {error}"));
                }
            }
        }
    }
    // Connections end before the chunks are let go of.
    blocking(move || {
        drop(server);
        drop(hold);
        Ok(())
    })
    .await?;
    Ok(0)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(work).await.map_err(|error| Error::internal(format!("a task of image serve: {error}")))?
}
