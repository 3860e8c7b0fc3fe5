//! A connection without a socket in a directory, for fuzz/.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, OnceLock},
    thread,
};

use super::{Export, helpers::Helpers, session};

/// Says bytes to a server of the export, and gives what it answers.
///
/// # Panics
/// Where the machine has no more sockets or threads.
pub fn converse(said: &[u8], export: &Arc<dyn Export>) -> Vec<u8> {
    static HELPERS: OnceLock<Helpers> = OnceLock::new();
    let helpers = HELPERS.get_or_init(Helpers::default);
    let (mut client, server) = UnixStream::pair().expect("a pair of sockets");
    let mut writer = client.try_clone().expect("another handle");
    let mut answer = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| session::serve(server, export, helpers));
        scope.spawn(move || {
            // The server may hang up before it has heard all.
            drop(writer.write_all(said));
            drop(writer.shutdown(Shutdown::Write));
        });
        drop(client.read_to_end(&mut answer));
    });
    answer
}
