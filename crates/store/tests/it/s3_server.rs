//! A real S3 server for tests: s3s-fs, which `./x test` installs. Tests of other crates use this file too.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

pub(crate) const BUCKET: &str = "burgeon";

/// A server with one bucket, until it is dropped.
pub(crate) struct Server {
    process: Child,
    pub(crate) port: u16,
    pub(crate) root: tempfile::TempDir,
}

/// The program: of the environment, or where `./x test` puts it, below the target directory of this test.
fn program() -> PathBuf {
    if let Some(program) = std::env::var_os("BURGEON_S3_SERVER") {
        return program.into();
    }
    let test = std::env::current_exe().unwrap();
    let found = test.ancestors().map(|above| above.join("tools/bin/s3s-fs")).find(|program| program.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "there is no S3 server to test with: run ./x test, which installs s3s-fs, or name one by BURGEON_S3_SERVER"
        )
    })
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl Server {
    pub(crate) fn start() -> Server {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(BUCKET)).unwrap();
        // Somebody else may take the port before the server does; then it ends, and another port is tried.
        for _ in 0..5 {
            let port = free_port();
            if let Some(process) = spawn(root.path(), port) {
                return Server { process, port, root };
            }
        }
        panic!("{} does not listen", program().display());
    }

    /// Ends the process, as a crash does.
    #[allow(dead_code, reason = "not all who use this file need it")]
    pub(crate) fn stop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }

    /// The same again, at the same place.
    #[allow(dead_code, reason = "not all who use this file need it")]
    pub(crate) fn start_again(&mut self) {
        self.stop();
        self.process = spawn(self.root.path(), self.port).expect("the S3 server does not start again");
    }
}

/// Starts a server and waits until it listens.
fn spawn(root: &Path, port: u16) -> Option<Child> {
    let mut process = Command::new(program())
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .args(["--access-key", "key", "--secret-key", "secret"])
        .arg(root)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) && process.try_wait().unwrap().is_none() {
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Some(process);
        }
        thread::sleep(Duration::from_millis(20));
    }
    drop(process.kill());
    process.wait().unwrap();
    None
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
