//! The socket, and the connections on it.

use std::{
    collections::BTreeMap,
    fs, io,
    net::Shutdown,
    os::unix::{
        fs::{FileTypeExt, lchown},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use burgeon_api::{Error, Result};

use super::{Export, helpers::Helpers, session};

/// Connections at a time; QEMU makes one.
const MOST_CONNECTIONS: usize = 64;
/// For a request that is under way when the server stops.
const PATIENCE: Duration = Duration::from_secs(10);

struct Shared {
    export: Arc<dyn Export>,
    helpers: Helpers,
    stopping: AtomicBool,
    connections: Mutex<BTreeMap<u64, UnixStream>>,
    /// A connection has ended.
    ended: Condvar,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, BTreeMap<u64, UnixStream>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A served export. Dropped, it stops: connections are closed, requests under way are finished, the socket is removed.
pub struct Server {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    socket: PathBuf,
    accepting: Option<JoinHandle<()>>,
}

/// The user who gets a server's socket, and where it is made before it is that user's.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    pub user: u32,
    /// A path in a directory where nobody else can put anything; the socket is moved from there to its place. In a
    /// directory of the user's own, another file could take its name before it is given away.
    pub made_at: &'a Path,
}

impl Server {
    /// Serves `export` on a new socket, which replaces one that was left behind.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn start(socket: &Path, export: Arc<dyn Export>, owner: Option<Owner<'_>>) -> Result<Server> {
        let failed = |error: io::Error| Error::io(format!("serve a disk on {}", socket.display()), &error);
        let made_at = owner.map_or(socket, |owner| owner.made_at);
        match fs::symlink_metadata(made_at) {
            Ok(old) if old.file_type().is_socket() => fs::remove_file(made_at).map_err(failed)?,
            Ok(_) => {
                return Err(Error::refused(format!("{} is there and is no socket", made_at.display()))
                    .with_hint("choose another path, or remove it"));
            }
            Err(_) => {}
        }
        let listener = Arc::new(UnixListener::bind(made_at).map_err(failed)?);
        if let Some(Owner { user, made_at }) = owner {
            lchown(made_at, Some(user), None).and_then(|()| fs::rename(made_at, socket)).map_err(failed)?;
        }
        let shared = Arc::new(Shared {
            export,
            helpers: Helpers::default(),
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            ended: Condvar::new(),
        });
        let accepting = thread::Builder::new()
            .name("nbd".into())
            .spawn({
                let (shared, listener) = (shared.clone(), listener.clone());
                move || accept(&shared, &listener)
            })
            .map_err(failed)?;
        Ok(Server { shared, listener, socket: socket.to_path_buf(), accepting: Some(accepting) })
    }
}

impl Server {
    /// Ends the connections there are. Clients that connect again learn the export's size anew.
    pub fn disconnect(&self) {
        for connection in self.shared.connections().values() {
            let _gone_already = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        let _wakes_accept = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        for connection in self.shared.connections().values() {
            let _gone_already = connection.shutdown(Shutdown::Both);
        }
        if let Some(accepting) = self.accepting.take() {
            let _it_has_logged = accepting.join();
        }
        let connections = self.shared.connections();
        let ended = self.shared.ended.wait_timeout_while(connections, PATIENCE, |connections| !connections.is_empty());
        if ended.is_err() || ended.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!(socket = %self.socket.display(), "a disk's connection did not end in time");
        }
        let _gone_already = fs::remove_file(&self.socket);
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut next = 0;
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::Acquire) {
            break;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "a disk's socket does not accept");
                // Out of descriptors, most likely: others may give some back.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        next += 1;
        if let Err(error) = begin(shared, next, stream) {
            tracing::warn!(%error, "a disk's connection was refused");
        }
    }
    // Those that were accepted while the others were being closed.
    for connection in shared.connections().values() {
        let _gone_already = connection.shutdown(Shutdown::Both);
    }
}

fn begin(shared: &Arc<Shared>, number: u64, stream: UnixStream) -> io::Result<()> {
    let mut connections = shared.connections();
    if connections.len() >= MOST_CONNECTIONS {
        return Err(io::Error::other(format!("there are {MOST_CONNECTIONS} already")));
    }
    connections.insert(number, stream.try_clone()?);
    drop(connections);
    let of_thread = shared.clone();
    let started = thread::Builder::new().name("nbd connection".into()).spawn(move || {
        if let Err(error) = session::serve(stream, &of_thread.export, &of_thread.helpers) {
            tracing::debug!(%error, "a disk's connection ended");
        }
        of_thread.connections().remove(&number);
        of_thread.ended.notify_all();
    });
    if started.is_err() {
        shared.connections().remove(&number);
    }
    started.map(drop)
}
