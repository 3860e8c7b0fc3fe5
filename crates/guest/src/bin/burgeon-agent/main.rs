//! `burgeon-agent`: the guest's end of the agent channel, and the `/init` of Burgeon's initramfs.
//!
//! * as process 1 without arguments: see [`boot`];
//! * `burgeon-agent --channel PATH`: serves a virtio port, or a unix socket that it connects to;
//! * `burgeon-agent each -- COMMAND [ARGUMENT...]`: see [`each`].
#![deny(unsafe_op_in_unsafe_fn)]

mod agent;
mod boot;
mod channel;
mod connections;
mod cpus;
mod disk;
mod each;
mod exec;
mod files;
mod freeze;
mod generation;
mod identity;
mod provisions;
mod server_keys;
mod spawn;
mod sys;
mod system;
mod users;

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
    process::ExitCode,
};

use agent::Setup;
use channel::Channel;
use system::console;

/// The C library's gives memory back and takes it again all the time, which costs an emulated guest more than it saves.
#[global_allocator]
static MEMORY: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

const USAGE: &str = "usage: burgeon-agent --channel PATH | burgeon-agent each -- COMMAND [ARGUMENT...] | --version";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&[u8]> = arguments.iter().map(|word| word.as_bytes()).collect();
    match words.as_slice() {
        [b"each", b"--", ..] if words.len() > 2 => return each::run(&arguments[2..]),
        [b"--channel", path] => return serve(Path::new(&OsString::from_vec(path.to_vec()))),
        [boot::INHERIT, port, started] => return boot::serve_inherited(port, started),
        // A command that does nothing; see the protocol's `Rehearsal`.
        [b"rehearse"] => return ExitCode::SUCCESS,
        [b"--version"] => {
            console(env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        // The kernel gives words of its command line to the first process: none of them is ours.
        _ if system::is_init() => boot::run(),
        _ => console(USAGE),
    }
    ExitCode::from(2)
}

fn serve(path: &Path) -> ExitCode {
    let channel = match Channel::open(path) {
        Ok(channel) => channel,
        Err(error) => {
            console(&format!("cannot open {}: {error}", path.display()));
            return ExitCode::FAILURE;
        }
    };
    // A socket is a test, on a machine that is not the agent's to manage.
    let mut setup = Setup { manages_system: channel.is_port(), ..Setup::default() };
    if setup.manages_system
        && let Err(error) = freeze::set_up()
    {
        setup.warnings.push(format!("no cgroups: {error}"));
    }
    console(&format!("stopped: {}", agent::run(channel, setup)));
    ExitCode::FAILURE
}
