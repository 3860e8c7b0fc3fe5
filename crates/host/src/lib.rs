//! The host process: the parent of every VM of this machine.
//!
//! It owns QEMU's processes, their consoles, the agents' channels and the streams to them. It decides
//! nothing: the control process tells it what to launch and to remove. When it dies, the VMs go on, and
//! the next one finds them by their records and takes them up again.
#![deny(unsafe_code)]

mod activate;
mod cgroup;
mod console;
mod disks;
mod display;
mod fork;
mod frozen;
mod handover;
mod identity;
mod kept;
pub mod layout;
mod pause;
mod plug;
mod prepare;
mod provisions;
mod record;
mod registry;
mod resize;
mod room;
mod seed;
mod server;
mod session;
mod shares;
mod snapshot;
mod snapshots;
mod ssh_key;
mod standby;
mod start;
mod take_in;
mod vm;

use std::{os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc};

use burgeon_api::{Error, Result};
use burgeon_qemu::{
    facts::Qemu,
    probe::{Verdict, Wish},
};
use burgeon_store::places::Elsewhere;
pub use disks::{disk_roots, store_source};
use tokio::{
    net::UnixListener,
    sync::{OnceCell, Semaphore},
};

use crate::{
    layout::{Layout, Lock},
    registry::Registry,
    server::About,
    start::Context,
};

/// What a host process is started with.
#[derive(Clone, Debug)]
pub struct Options {
    pub data: PathBuf,
    pub wish: Wish,
    /// Memory that VMs leave to others, where a user says how much.
    pub reserve: Option<burgeon_api::ByteSize>,
    /// The guest agent: a static program put into every initramfs.
    pub agent: &'static [u8],
    /// The version told to the control process.
    pub build: String,
    /// What of the store is not in the data directory.
    pub elsewhere: Elsewhere,
    /// Told to who asks; what they say has been done.
    pub settings: Vec<burgeon_api::http::Setting>,
}

/// Memory and CPUs of this machine.
pub fn capacity() -> burgeon_api::profile::Capacity {
    burgeon_qemu::facts::capacity()
}

/// Called by the process that starts host and control, before it does.
pub fn separate_from_vms() {
    cgroup::separate();
}

/// How a VM is stopped on a user's request.
pub fn stop_mode(force: bool) -> burgeon_api::host::StopMode {
    use burgeon_api::host::StopMode;
    if force { StopMode::Kill } else { StopMode::Graceful { deadline_ms: 90_000 } }
}

/// Runs the host process until it is told to leave.
///
/// # Errors
/// `Conflict` when another host process serves the data directory; `NotFound` without QEMU.
pub async fn run(options: Options) -> Result<()> {
    let layout = Layout::create(&options.data)?;
    let _lock = Lock::take(&layout, "host")?;
    let qemu = Qemu::find().await?;
    let verdict = OnceCell::new();
    if options.wish == Wish::Auto
        && let Some(known) = Verdict::load(&layout.kvm_verdict(), &qemu)
    {
        // The cell is new.
        drop(verdict.set(known));
    }
    let cpus = usize::try_from(burgeon_qemu::facts::capacity().cpus).unwrap_or(1);
    let context = Arc::new(Context {
        agent: options.agent,
        qemu,
        wish: options.wish,
        verdict,
        groups: cgroup::Groups::prepare(),
        boot_slots: Semaphore::new(cpus.max(2)),
        activation_slots: Semaphore::new(2 * cpus.max(2)),
        disks: disks::Disks::start(layout.clone(), options.elsewhere)?,
        substrates: frozen::Substrates::default(),
        siblings: identity::Siblings::default(),
        secrets: provisions::Secrets::default(),
        room: room::Room::new(options.reserve),
        standbys: standby::Standbys::default(),
        layout: layout.clone(),
    });
    let socket = layout.host_socket();
    if socket.exists() {
        // The lock is ours, so nobody listens there.
        std::fs::remove_file(&socket).map_err(|error| Error::io("replace the host's socket", &error))?;
    }
    provisions::sweep(&layout);
    let registry = Registry::start(context.clone());
    let listener =
        UnixListener::bind(&socket).map_err(|error| Error::io(format!("listen on {}", socket.display()), &error))?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| Error::io("protect the host's socket", &error))?;
    tracing::info!(data = %layout.data.display(), "the host process serves");
    let keeper = tokio::spawn(standby::keep(context.clone()));
    let about = About { build: options.build, settings: options.settings };
    let served = server::serve(listener, context.clone(), registry, about).await;
    keeper.abort();
    context.standbys.close();
    served
}
