//! The control process: what is wanted, and the HTTP API to say so.
//!
//! It decides (with [`burgeon_plan`]), records (in meta) and asks the host process to act. It may be
//! killed at any time: no VM stops, and the next one goes on from what meta says.
#![forbid(unsafe_code)]

mod api;
mod bundles;
mod commit;
mod differences;
mod disks;
pub mod exec_client;
mod export;
mod host_client;
mod images;
mod life;
mod pipelines;
mod places;
mod rebuild;
mod receipts;
mod reconcile;
mod relocate;
mod remotes;
mod snapshots;
mod state;
mod store;
mod substrate_stat;
mod substrates;
mod transport;

use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use axum::{extract::Request, middleware::Next};
use burgeon_api::{Error, Result};
use burgeon_host::layout::{Layout, Lock};
use burgeon_store::places::Elsewhere;
use tokio::{
    net::UnixListener,
    sync::{Notify, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use api::openapi;
pub use places::check as check_places;
pub use rebuild::rebuild;
pub use relocate::relocate;

use crate::{
    host_client::HostClient,
    state::{Busy, Seen, State, blocking},
};

/// What a control process is started with.
#[derive(Clone, Debug)]
pub struct Options {
    pub data: PathBuf,
    pub version: String,
    /// Leave, and tell the host process to, after this time without any use.
    pub idle_exit: Option<Duration>,
    /// What of meta and the store is not in the data directory.
    pub elsewhere: Elsewhere,
    /// Told to who asks; what they say has been done.
    pub settings: Vec<burgeon_api::http::Setting>,
}

/// Runs the control process until it is idle or `shutdown` is cancelled.
///
/// # Errors
/// `Conflict` when another one serves the data directory; meta's errors.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<()> {
    let layout = Layout::create(&options.data)?;
    let _lock = Lock::take(&layout, "control")?;
    images::remove_left_over(&layout.temporary());
    let (meta, store) = {
        let (layout, elsewhere) = (layout.clone(), options.elsewhere);
        blocking("open meta and the store", move || places::open(&layout, &elsewhere)).await?
    };
    let socket = layout.control_socket();
    if socket.exists() {
        // The lock is ours, so nobody listens there.
        std::fs::remove_file(&socket).map_err(|error| Error::io("replace the control socket", &error))?;
    }
    let state = Arc::new(State {
        host: HostClient::new(layout.host_socket()),
        meta,
        store,
        version: options.version,
        settings: options.settings,
        kick: Notify::new(),
        seen: watch::Sender::new(Seen::default()),
        pipelines: pipelines::Pipelines::default(),
        temporary: watch::Sender::new(BTreeSet::new()),
        uses: life::Uses::new(),
        forking: watch::Sender::new(BTreeSet::new()),
        busy: Arc::new(AtomicUsize::new(0)),
        store_work: Arc::new(tokio::sync::Semaphore::new(1)),
        shutdown: shutdown.clone(),
        tasks: TaskTracker::new(),
        layout,
    });
    state.tasks.spawn(reconcile::run(state.clone()));
    state.tasks.spawn(reconcile::watch_host(state.clone()));
    state.tasks.spawn(reconcile::idle_exit(state.clone(), options.idle_exit));
    pipelines::resume(&state).await?;
    substrates::resume(&state).await?;
    let busy = state.busy.clone();
    let count = move |request: Request, next: Next| {
        let guard = Busy::new(&busy);
        async move {
            let response = next.run(request).await;
            drop(guard);
            response
        }
    };
    let router = api::routes().0.layer(axum::middleware::from_fn(count)).with_state(state.clone());
    let listener =
        UnixListener::bind(&socket).map_err(|error| Error::io(format!("listen on {}", socket.display()), &error))?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| Error::io("protect the control socket", &error))?;
    tracing::info!(socket = %socket.display(), "the control process serves");
    let serving = axum::serve(listener, router).into_future();
    let outcome = tokio::select! {
        outcome = serving => outcome.map_err(|error| Error::io("serve HTTP", &error)),
        () = shutdown.cancelled() => Ok(()),
    };
    shutdown.cancel();
    state.tasks.close();
    if tokio::time::timeout(Duration::from_secs(5), state.tasks.wait()).await.is_err() {
        tracing::warn!("some work was cut off at the end");
    }
    outcome
}
