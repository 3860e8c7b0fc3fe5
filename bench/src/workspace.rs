//! What must vanish at the end: one directory below /tmp, and every process that has its working directory
//! in it. The server, its two processes and all QEMUs, ours and the rival's, are started there; so nothing
//! else can be met, and nothing is missed, even a VM that outlived its host process.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{http::Client, report::talk};

const SERVER_START: Duration = Duration::from_secs(30);
const LOGGED: Duration = Duration::from_secs(90);
const SERVER_END: Duration = Duration::from_secs(15);

pub(crate) struct Workspace {
    directory: TempDir,
    /// The directory's path without links, as /proc shows it.
    real: PathBuf,
    program: PathBuf,
    /// A data directory whose packages are used and added to.
    cache: Option<PathBuf>,
    stopped: AtomicBool,
    server: Mutex<Option<Child>>,
}

impl Workspace {
    /// Makes the directory, with copies of the recipes (a build writes its lock file beside its recipe) and
    /// of the packages kept from earlier runs.
    pub(crate) fn create(program: PathBuf, recipes: &Path, cache: Option<PathBuf>) -> Result<Workspace> {
        // Short, because unix sockets below it have at most 107 bytes of path.
        let directory =
            tempfile::Builder::new().prefix("bb-").tempdir_in("/tmp").context("make a directory in /tmp")?;
        let real = directory.path().canonicalize()?;
        let workspace =
            Workspace { real, directory, program, cache, stopped: AtomicBool::new(false), server: Mutex::new(None) };
        fs::create_dir(workspace.recipes())?;
        for entry in fs::read_dir(recipes).with_context(|| format!("read {}", recipes.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "toml" || end == "lock") {
                fs::copy(&path, workspace.recipes().join(path.file_name().unwrap_or_default()))?;
            }
        }
        fs::create_dir_all(workspace.packages())?;
        // The mark of a data directory: what holds something and has none is refused.
        fs::write(workspace.data().join("burgeon-data"), "1\n")?;
        if let Some(kept) = workspace.kept_packages() {
            copy_new(&kept, &workspace.packages()).context("take packages from BURGEON_TEST_CACHE")?;
        }
        Ok(workspace)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn recipes(&self) -> PathBuf {
        self.path("recipes")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path("data")
    }

    fn packages(&self) -> PathBuf {
        self.data().join("cache/packages")
    }

    fn kept_packages(&self) -> Option<PathBuf> {
        self.cache.as_ref().map(|cache| cache.join("cache/packages"))
    }

    /// Keeps the packages that were fetched for later runs.
    pub(crate) fn keep_packages(&self) -> Result<()> {
        let Some(kept) = self.kept_packages() else { return Ok(()) };
        fs::create_dir_all(&kept)?;
        copy_new(&self.packages(), &kept).context("keep packages in BURGEON_TEST_CACHE")
    }

    /// A command of the product on this data directory, with its talk shown only when it fails.
    pub(crate) fn burgeon(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.arg("--data").arg(self.data()).args(arguments).current_dir(self.recipes());
        run(&mut self.confine(command)?)
    }

    /// Prepares a process of this bench: it is met by the cleaning up, and not by the terminal's Ctrl-C.
    ///
    /// # Errors
    /// When the bench was interrupted: nothing more may be started.
    pub(crate) fn confine(&self, mut command: Command) -> Result<Command> {
        ensure!(!self.stopped.load(Ordering::SeqCst), "interrupted");
        command.process_group(0).stdin(Stdio::null());
        if command.get_current_dir().is_none() {
            command.current_dir(&self.real);
        }
        Ok(command)
    }

    /// The server's client. The server is started at the first call, and stays.
    pub(crate) fn server(&self) -> Result<Client> {
        let client = Client { socket: self.data().join("control.sock") };
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if server.is_some() {
            return Ok(client);
        }
        let log = self.path("serve.log");
        let output = fs::File::create(&log)?;
        let mut command = Command::new(&self.program);
        command.arg("--data").arg(self.data()).arg("serve").stdout(output.try_clone()?).stderr(output);
        *server = Some(self.confine(command)?.spawn().context("start burgeon serve")?);
        let deadline = Instant::now() + SERVER_START;
        loop {
            let view = client.get::<burgeon_api::http::ServerView>("/v1/server");
            if view.is_ok_and(|view| view.accelerator.is_some()) {
                return Ok(client);
            }
            if Instant::now() > deadline {
                bail!(
                    "burgeon serve does not answer; it says: {}",
                    fs::read_to_string(&log).unwrap_or_default().trim()
                );
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the server logs a line with `text`, and reads the number behind `field` in it.
    pub(crate) fn wait_for_log(&self, text: &str, field: &str) -> Result<u64> {
        let deadline = Instant::now() + LOGGED;
        loop {
            let log = fs::read_to_string(self.path("serve.log"))?;
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                let digits = line.split_once(field).map_or("", |(_, rest)| rest);
                let digits = digits.split(' ').next().unwrap_or_default();
                return digits.parse().with_context(|| format!("the server's log says {line:?}"));
            }
            ensure!(Instant::now() < deadline, "the server does not log \"{text}\"");
            sleep(Duration::from_millis(100));
        }
    }

    /// Ends the server and its processes; the next call of [`Self::server`] starts it again.
    pub(crate) fn stop_server(&self) -> Result<()> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut server) = server {
            let pid = i32::try_from(server.id()).ok().and_then(Pid::from_raw);
            let asked = pid.is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
            let deadline = Instant::now() + SERVER_END;
            while asked && server.try_wait()?.is_none() && Instant::now() < deadline {
                sleep(Duration::from_millis(20));
            }
            self.kill_all();
            server.wait()?;
        }
        Ok(())
    }

    /// Nothing is started from now on, and what runs is ended, so that whoever waits for it goes on.
    pub(crate) fn interrupt(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.kill_all();
    }

    /// Ends everything and removes the directory.
    pub(crate) fn clean_up(&self) -> Result<()> {
        self.stopped.store(true, Ordering::SeqCst);
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Child::id);
        if let Some(server) = server {
            // VMs outlive a server on purpose, so they go first.
            self.kill_others(server);
        }
        self.stop_server()?;
        self.kill_all();
        fs::remove_dir_all(self.directory.path()).with_context(|| format!("remove {}", self.directory.path().display()))
    }

    fn kill_all(&self) {
        self.kill_others(0);
    }

    /// Kills the VMs, or everything, until nothing is left: a server that is killed half-way may have started one more.
    fn kill_others(&self, server: u32) {
        for _ in 0..50 {
            let mut left = self.processes();
            if server != 0 {
                left.retain(|(_, command)| command.contains("qemu"));
            }
            if left.is_empty() {
                return;
            }
            for (pid, _) in left {
                let _ended_by_itself = kill_process(pid, Signal::KILL);
            }
            sleep(Duration::from_millis(20));
        }
        talk("some processes do not end");
    }

    /// Processes that have their working directory here, with their names. Zombies have none.
    fn processes(&self) -> Vec<(Pid, String)> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&self.real)))
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw)?;
                Some((pid, fs::read_to_string(entry.path().join("comm")).unwrap_or_default()))
            })
            .collect()
    }
}

/// Runs a command to its end and gives what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Copies the files of one directory that another lacks; each appears there whole.
fn copy_new(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if target.exists() || !entry.file_type()?.is_file() {
            continue;
        }
        let new = to.join(format!(".{}.{}", entry.file_name().to_string_lossy(), std::process::id()));
        fs::copy(entry.path(), &new)?;
        fs::rename(&new, &target)?;
    }
    Ok(())
}

/// A hard link, or a copy where links cannot be made.
pub(crate) fn link(from: &Path, to: &Path) -> Result<()> {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_started_inside_is_ended_and_removed() {
        let recipes = tempfile::tempdir().unwrap();
        fs::write(recipes.path().join("tiny.toml"), "x").unwrap();
        let workspace = Workspace::create("/bin/true".into(), recipes.path(), None).unwrap();
        let root = workspace.path("");
        assert!(workspace.recipes().join("tiny.toml").exists());
        let mut sleeper = Command::new("sleep");
        sleeper.arg("1000");
        let mut child = workspace.confine(sleeper).unwrap().spawn().unwrap();
        // Children are reaped by whoever started them; a zombie is no longer in the directory.
        while workspace.processes().is_empty() {
            sleep(Duration::from_millis(1));
        }
        workspace.clean_up().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!root.exists());
        assert!(workspace.confine(Command::new("true")).is_err());
    }

    #[test]
    fn packages_are_taken_and_kept() {
        let cache = tempfile::tempdir().unwrap();
        let recipes = tempfile::tempdir().unwrap();
        let kept = cache.path().join("cache/packages");
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("a.deb"), "a").unwrap();
        let workspace = Workspace::create("/bin/true".into(), recipes.path(), Some(cache.path().into())).unwrap();
        assert_eq!(fs::read(workspace.packages().join("a.deb")).unwrap(), b"a");
        fs::write(workspace.packages().join("b.deb"), "b").unwrap();
        workspace.keep_packages().unwrap();
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 2);
        workspace.clean_up().unwrap();
    }
}
