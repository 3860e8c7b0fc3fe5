//! One helper through which the tests drive the product.

use std::{
    future::Future,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use burgeon_api::exec::{ExecSpec, Exit};
use burgeon_guest::client::{AgentClient, Options};
use tokio::{
    net::{UnixListener, UnixStream},
    time::Instant,
};

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_burgeon-agent");
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for anything, and not for ever.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it takes too long")
}

pub(crate) fn options(session: u8) -> Options {
    Options::new([session; 16], "tested", || 1)
}

/// An agent that dials a socket of ours, again and again.
pub(crate) struct Guest {
    agent: Child,
    listener: UnixListener,
    pub(crate) directory: tempfile::TempDir,
}

impl Guest {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = Command::new(AGENT).arg("--channel").arg(&socket).stdin(Stdio::null()).spawn().unwrap();
        Self { agent, listener, directory }
    }

    pub(crate) async fn accept(&self) -> UnixStream {
        soon(self.listener.accept()).await.unwrap().0
    }

    pub(crate) async fn attach(&self, session: u8) -> AgentClient {
        let client = AgentClient::connect(self.accept().await, options(session));
        soon(client.wait_ready(Instant::now() + PATIENCE)).await.unwrap();
        client
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
    }
}

pub(crate) async fn started() -> (Guest, AgentClient) {
    let guest = Guest::start();
    let client = guest.attach(1).await;
    (guest, client)
}

pub(crate) fn spec(argv: &[&str]) -> ExecSpec {
    ExecSpec { argv: argv.iter().map(ToString::to_string).collect(), cwd: Some("/".into()), ..ExecSpec::default() }
}

pub(crate) fn sh(script: &str) -> ExecSpec {
    spec(&["sh", "-c", script])
}

/// Runs a command without input to its end.
pub(crate) async fn output(client: &AgentClient, spec: ExecSpec) -> (String, String, Exit) {
    let exec = soon(client.exec(spec)).await.unwrap();
    let (stdin, mut output, _control) = exec.split();
    stdin.finish();
    let (out, errors, exit) = soon(output.collect(1 << 20)).await;
    (String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&errors).into_owned(), exit)
}
