//! The processes of a machine: `host`, `control`, and `serve`, which runs both and starts them again.

use std::{path::Path, process::Stdio, time::Duration};

use burgeon_api::{ByteSize, Error, Result};
use burgeon_host::layout::{Layout, Lock};
use burgeon_store::places::Elsewhere;
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{Context, config, environment};
use crate::arguments::ServeArguments;

/// The guest agent, built with this program.
static AGENT: &[u8] = include_bytes!(env!("BURGEON_AGENT_FILE"));
/// A process that has run this long is well; one that ends sooner again and again is started ever later.
const WELL: Duration = Duration::from_secs(10);

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BURGEON_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").to_string()
}

fn asked_to_end() -> Result<CancellationToken> {
    let token = CancellationToken::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(|error| Error::io("wait for signals", &error))?;
        let token = token.clone();
        tokio::spawn(async move {
            signals.recv().await;
            token.cancel();
        });
    }
    Ok(token)
}

/// Memory that is left to others.
fn reserve() -> Result<Option<ByteSize>> {
    let given = std::env::var("BURGEON_RESERVE").ok().filter(|given| !given.is_empty());
    given.map(|given| given.parse()).transpose().map_err(|error: Error| error.context("read BURGEON_RESERVE"))
}

pub(super) async fn host(context: &Context) -> Result<u8> {
    log_to_stderr();
    let wish = std::env::var("BURGEON_ACCEL").unwrap_or_default().parse()?;
    let options = burgeon_host::Options {
        data: context.data.clone(),
        wish,
        reserve: reserve()?,
        agent: AGENT,
        build: version(),
        // Whatever this process was told: it has no use for meta.
        elsewhere: Elsewhere { meta: None, ..environment::elsewhere(&environment::of_process)? },
        settings: config::of_host(),
    };
    let token = asked_to_end()?;
    tokio::select! {
        outcome = burgeon_host::run(options) => outcome.map(|()| 0),
        // The VMs go on; the next host process adopts them.
        () = token.cancelled() => Ok(0),
    }
}

pub(super) async fn control(context: &Context, arguments: ServeArguments) -> Result<u8> {
    log_to_stderr();
    let options = burgeon_control::Options {
        data: context.data.clone(),
        version: version(),
        idle_exit: arguments.idle_exit.map(|span| span.0),
        elsewhere: environment::elsewhere(&environment::of_process)?,
        settings: config::of_control(arguments.idle_exit),
    };
    burgeon_control::run(options, asked_to_end()?).await.map(|()| 0)
}

pub(super) async fn serve(context: &Context, arguments: ServeArguments) -> Result<u8> {
    log_to_stderr();
    let wish: burgeon_qemu::probe::Wish = std::env::var("BURGEON_ACCEL").unwrap_or_default().parse()?;
    let layout = Layout::create(&context.data)?;
    let _lock = Lock::take(&layout, "serve")?;
    // What is missing is said at once, not by a process that dies over and over.
    burgeon_qemu::facts::Qemu::find().await?;
    let reserve = reserve()?;
    tracing::debug!(?wish, ?reserve, "the settings are sound");
    let elsewhere = environment::elsewhere(&environment::of_process)?;
    let of_layout = layout.clone();
    let checked = tokio::task::spawn_blocking(move || burgeon_control::check_places(&of_layout, &elsewhere)).await;
    checked.map_err(|error| Error::internal(format!("look for meta and the store: {error}")))??;
    if arguments.idle_exit.is_some()
        && let Err(error) = rustix::process::setsid()
    {
        tracing::debug!(%error, "this process leads a session already");
    }
    burgeon_host::separate_from_vms();
    let token = asked_to_end()?;
    let host = keep_up(&context.data, "host", Vec::new(), token.clone());
    let mut words = Vec::new();
    if let Some(idle) = arguments.idle_exit {
        words = vec!["--idle-exit".to_string(), idle.to_string()];
    }
    let control = keep_up(&context.data, "control", words, token.clone());
    tokio::select! {
        // The control process decides when an idle server leaves, and tells the host process.
        outcome = control => { token.cancel(); outcome }
        outcome = host => outcome,
    }
    .map(|()| 0)
}

/// Runs one of the two processes, and runs it again when it dies, until it leaves by itself with success.
async fn keep_up(data: &Path, kind: &'static str, words: Vec<String>, token: CancellationToken) -> Result<()> {
    let program = std::env::current_exe().map_err(|error| Error::io("find this program", &error))?;
    let layout = Layout::create(data)?;
    let mut pause = Duration::from_millis(50);
    loop {
        // One that an earlier server has left is as good as ours; it is taken over when it ends.
        while Lock::is_taken(&layout, kind) {
            tokio::select! {
                () = sleep(Duration::from_millis(300)) => {}
                () = token.cancelled() => return Ok(()),
            }
        }
        let begun = Instant::now();
        let mut command = Command::new(&program);
        command.arg("--data").arg(data).arg(kind).args(&words).stdin(Stdio::null());
        if kind == "host" {
            for name in environment::of_meta() {
                command.env_remove(name);
            }
        }
        let mut child = command.spawn().map_err(|error| Error::io(format!("start burgeon {kind}"), &error))?;
        let status = tokio::select! {
            status = child.wait() => status.map_err(|error| Error::io(format!("wait for burgeon {kind}"), &error))?,
            () = token.cancelled() => return end(&mut child, kind).await,
        };
        if status.success() {
            return Ok(());
        }
        tracing::error!(%status, "burgeon {kind} has ended; it is started again");
        pause =
            if begun.elapsed() > WELL { Duration::from_millis(50) } else { (pause * 2).min(Duration::from_secs(5)) };
        tokio::select! {
            () = sleep(pause) => {}
            () = token.cancelled() => return Ok(()),
        }
    }
}

async fn end(child: &mut Child, kind: &str) -> Result<()> {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
        && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::TERM)
    {
        tracing::debug!(%error, "burgeon {kind} had ended already");
    }
    match tokio::time::timeout(Duration::from_secs(8), child.wait()).await {
        Ok(_) => Ok(()),
        Err(_) => {
            tracing::warn!("burgeon {kind} does not end; it is killed");
            child.kill().await.map_err(|error| Error::io(format!("kill burgeon {kind}"), &error))
        }
    }
}
