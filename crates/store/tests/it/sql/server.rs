//! A real PostgreSQL server for tests, on a unix socket in a directory of its own.
//!
//! A small guardian process owns it: when the test process closes the guardian's input, by whatever end, the guardian
//! stops the server and removes the directory.

use std::{
    io::Write,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use burgeon_store::sql::Address;

const INSTALL: &str = "PostgreSQL's server is missing: apt-get install -y --no-install-recommends postgresql";
/// An account without rights: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65534;

/// Runs the server as often as it is told `start`; `stop` is an immediate one, as a crash is. Answers each word with a
/// line. At the end of its input it stops the server and removes the directory.
const GUARDIAN: &str = r#"
trap '' INT TERM HUP
end() { [ -z "${server:-}" ] || { kill -QUIT "$server"; wait "$server"; server=''; }; }
while read -r word; do
    case $word in
    start) "$1/postgres" -D "$2/data" -k "$2" -c listen_addresses= -c max_connections=200 >>"$2/log" 2>&1 & server=$! ;;
    stop) end ;;
    esac
    echo "$word"
done
end
rm -rf "$2"
"#;

pub(crate) struct Server {
    guardian: Child,
    directory: PathBuf,
    databases: AtomicU32,
}

/// The server that most tests share, each with a database of its own.
pub(crate) fn shared() -> &'static Server {
    static SHARED: OnceLock<Server> = OnceLock::new();
    SHARED.get_or_init(Server::new)
}

impl Server {
    pub(crate) fn new() -> Server {
        let programs = programs();
        let directory = tempfile::Builder::new().prefix("burgeon-postgres-").tempdir().unwrap().keep();
        let root = rustix::process::geteuid().is_root();
        if root {
            chown(&directory, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let unprivileged = |program: &Path| {
            let mut command = Command::new(program);
            command.current_dir(&directory).env("LC_ALL", "C");
            if root {
                command.uid(NOBODY).gid(NOBODY);
            }
            command
        };
        let made = unprivileged(&programs.join("initdb"))
            .args(["--username=burgeon", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync", "--pgdata"])
            .arg(directory.join("data"))
            .output()
            .expect(INSTALL);
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let guardian = unprivileged(Path::new("/bin/sh"))
            .args(["-c", GUARDIAN, "guardian"])
            .args([&programs, &directory])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Server { guardian, directory, databases: AtomicU32::new(0) };
        server.start();
        server
    }

    fn tell(&mut self, word: &str) {
        use std::io::Read;
        let line = format!("{word}\n");
        self.guardian.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        let mut answer = vec![0; line.len()];
        self.guardian.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
    }

    pub(crate) fn start(&mut self) {
        self.tell("start");
        let end = Instant::now() + Duration::from_secs(60);
        while let Err(error) = self.run("postgres", "SELECT 1") {
            let log = std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            assert!(Instant::now() < end, "PostgreSQL does not answer: {error}\n{log}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the server at once, as a crash does.
    pub(crate) fn stop(&mut self) {
        self.tell("stop");
    }

    /// Runs SQL beside the store, for what the store never does itself.
    pub(crate) fn run(&self, database: &str, sql: &str) -> Result<(), tokio_postgres::Error> {
        let text = self.text(database);
        let sql = sql.to_string();
        // A thread of its own, because the caller may be a task.
        let work = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (client, connection) = tokio_postgres::connect(&text, tokio_postgres::NoTls).await?;
                tokio::spawn(connection);
                client.batch_execute(&sql).await
            })
        };
        thread::spawn(work).join().unwrap()
    }

    pub(crate) fn new_database(&self) -> Address {
        self.new_named_database().1
    }

    pub(crate) fn new_named_database(&self) -> (String, Address) {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.run("postgres", &format!("CREATE DATABASE {name}")).unwrap();
        let address = self.text(&name).parse().unwrap();
        (name, address)
    }

    pub(crate) fn text(&self, database: &str) -> String {
        format!("host={} user=burgeon dbname={database}", self.directory.display())
    }

    /// To allow and refuse users. Takes effect at once.
    pub(crate) fn set_access(&self, lines: &str) {
        std::fs::write(self.directory.join("data/pg_hba.conf"), lines).unwrap();
        self.run("postgres", "SELECT pg_reload_conf()").unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.guardian.stdin.take());
        drop(self.guardian.wait());
    }
}

/// The directory of the newest server's programs: in the search path, or where Debian puts them.
fn programs() -> PathBuf {
    let has = |directory: &PathBuf| directory.join("initdb").exists() && directory.join("postgres").exists();
    if let Some(found) = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).find(|path| has(path)) {
        return found;
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).filter(has).collect();
    found.sort();
    found.pop().expect(INSTALL)
}
