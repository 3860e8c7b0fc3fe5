//! Drives the product in a data directory of its own.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use burgeon_store::steps::{DIE_AT, Step};
use serde_json::Value;

/// No command of a test takes longer, or it hangs.
const DEADLINE: Duration = Duration::from_secs(240);

pub(crate) struct Lab {
    directory: tempfile::TempDir,
    /// What commands, and the servers that they start, get in their environment.
    pub(crate) environment: Vec<(String, String)>,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// The command must have succeeded.
    #[track_caller]
    pub(crate) fn good(self) -> Done {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let done = self.good();
        serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {}", done.stdout))
    }
}

impl Lab {
    /// A lab with these images, which are built once for all tests.
    pub(crate) fn new(images: &[&str]) -> Lab {
        let directory = tempfile::Builder::new().prefix("bg").tempdir_in("/tmp").unwrap();
        let lab = Lab { directory, environment: Vec::new() };
        fs::create_dir_all(lab.data().join("images")).unwrap();
        fs::write(lab.data().join("burgeon-data"), "1\n").unwrap();
        for image in images {
            let from = cached_image(image);
            let to = lab.data().join("images").join(image);
            fs::create_dir_all(&to).unwrap();
            for entry in fs::read_dir(&from).unwrap() {
                let entry = entry.unwrap();
                let to = to.join(entry.file_name());
                link(&entry.path(), &to);
            }
            copy_store(&from.join("../../store"), &lab.data().join("store"));
        }
        lab
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("d")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file beside the data directory.
    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        self.command_in(&self.data(), words)
    }

    /// A command with another data directory.
    pub(crate) fn command_in(&self, data: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burgeon"));
        command.arg("--data").arg(data).args(words).current_dir(self.directory.path());
        command.env_remove("BURGEON_DATA").env("BURGEON_ACCEL", accelerator()).env("NO_COLOR", "1");
        command.env(DIE_AT, self.path("die-at"));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Has the next server process that has done this step die there.
    pub(crate) fn die_at(&self, step: Step) {
        self.file("die-at", &format!("{step:?}"));
    }

    pub(crate) fn has_yet_to_die(&self) -> bool {
        self.path("die-at").exists()
    }

    /// Runs a command to its end.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> Done {
        finish(self.command(words).spawn().unwrap())
    }

    /// Runs a command with input.
    #[track_caller]
    pub(crate) fn run_with(&self, words: &[&str], input: &[u8]) -> Done {
        let mut child = self.command(words).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        // A command that does not read to the end closes the pipe; that is its right.
        std::thread::spawn(move || drop(stdin.write_all(&input)));
        finish(child)
    }

    #[track_caller]
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let mut all = vec!["-o", "json"];
        all.extend(words);
        self.run(&all).json()
    }

    /// A running VM of this name.
    #[track_caller]
    pub(crate) fn vm(&self, image: &str, name: &str, profile: &str) -> Value {
        self.json(&["vm", "create", image, "--name", name, "--profile", profile])
    }

    /// The process of one of Burgeon's own, from its lock.
    #[track_caller]
    pub(crate) fn pid(&self, kind: &str) -> u32 {
        fs::read_to_string(self.data().join(format!("{kind}.lock"))).unwrap().trim().parse().unwrap()
    }

    #[track_caller]
    pub(crate) fn pid_of_vm(&self, name: &str) -> u32 {
        let view = self.json(&["vm", "show", name]);
        u32::try_from(view["on_host"]["pid"].as_u64().unwrap_or_else(|| panic!("{view}"))).unwrap()
    }

    /// QEMU processes of VMs.
    pub(crate) fn qemus(&self) -> Vec<u32> {
        self.processes_below().into_iter().filter(|(_, cwd)| !waits(cwd)).map(|(pid, _)| pid).collect()
    }

    /// QEMU processes that wait for VMs of a substrate.
    pub(crate) fn standbys(&self) -> Vec<u32> {
        self.processes_below().into_iter().filter(|(_, cwd)| waits(cwd)).map(|(pid, _)| pid).collect()
    }

    /// Processes that work below the data directory, and where.
    fn processes_below(&self) -> Vec<(u32, PathBuf)> {
        processes_in(&self.data())
    }
}

/// Processes that work below a directory, and where.
fn processes_in(directory: &Path) -> Vec<(u32, PathBuf)> {
    let below = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_path_buf());
    let all = processes().into_iter().filter_map(|pid| Some((pid, cwd(pid)?)));
    all.filter(|(_, cwd)| cwd.starts_with(&below)).collect()
}

/// `tcg` unless somebody asks for more: a probe of KVM in every lab would only cost time.
fn accelerator() -> String {
    std::env::var("BURGEON_TEST_ACCEL").unwrap_or_else(|_| "tcg".into())
}

/// Whether it is the directory of a QEMU that waits. One that has been removed is nobody's any more.
fn waits(cwd: &Path) -> bool {
    cwd.parent().is_some_and(|vm| vm.join("standby").exists() || !vm.exists())
}

fn processes() -> Vec<u32> {
    fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn cwd(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

fn command_line(pid: u32) -> String {
    fs::read(format!("/proc/{pid}/cmdline"))
        .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "))
        .unwrap_or_default()
}

pub(crate) fn kill(pid: u32, signal: &str) {
    send(pid, signal).unwrap_or_else(|error| panic!("kill -{signal} {pid}: {error}"));
}

pub(crate) fn send(pid: u32, signal: &str) -> rustix::io::Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let signal = match signal {
        "BUS" => rustix::process::Signal::BUS,
        "INT" => rustix::process::Signal::INT,
        "STOP" => rustix::process::Signal::STOP,
        "CONT" => rustix::process::Signal::CONT,
        _ => rustix::process::Signal::KILL,
    };
    rustix::process::kill_process(pid, signal)
}

pub(crate) fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('Z' | 'X')))
}

/// Asks until it is so; for what another process does in its own time.
#[track_caller]
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
pub(crate) fn finish(child: Child) -> Done {
    let pid = child.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || drop(sender.send(child.wait_with_output())));
    match receiver.recv_timeout(DEADLINE) {
        Ok(output) => done(&output.unwrap()),
        Err(_) => {
            kill(pid, "KILL");
            panic!("a command hung: {}", command_line(pid));
        }
    }
}

fn done(output: &Output) -> Done {
    use std::os::unix::process::ExitStatusExt;
    Done {
        code: output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let data = self.data();
        // A test may have further data directories beside its own.
        let all = self.directory.path();
        let ours = |pid: &u32| command_line(*pid).contains(&format!("--data {}/", all.display()));
        let servers: Vec<u32> = processes().into_iter().filter(ours).collect();
        let below: Vec<u32> = processes_in(all).into_iter().map(|(pid, _)| pid).collect();
        for pid in servers.iter().chain(&below) {
            if send(*pid, "KILL").is_err() {
                eprintln!("process {pid} had ended by itself");
            }
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(data.join("serve.log")).unwrap_or_default();
            eprintln!("--- serve.log\n{log}");
        }
        let begun = Instant::now();
        while !processes_in(all).is_empty() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn link(from: &Path, to: &Path) {
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop)).unwrap();
}

/// The store of the cache, for a lab of its own: the catalog as it is at one moment, then the packs, which never change.
fn copy_store(from: &Path, to: &Path) {
    if to.exists() || !from.join("catalog.db").exists() {
        return;
    }
    fs::create_dir_all(to).unwrap();
    let catalog = rusqlite::Connection::open(from.join("catalog.db")).unwrap();
    catalog.busy_timeout(Duration::from_secs(10)).unwrap();
    catalog.execute("VACUUM INTO ?1", [to.join("catalog.db").to_str().unwrap()]).unwrap();
    // Images without a disk make no packs.
    for folder in fs::read_dir(from.join("packs")).into_iter().flatten().map(Result::unwrap) {
        let into = to.join("packs").join(folder.file_name());
        fs::create_dir_all(&into).unwrap();
        for pack in fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
            // One that is being written has a dot in front, and is named by no catalog yet.
            if !pack.file_name().to_string_lossy().starts_with('.') {
                link(&pack.path(), &into.join(pack.file_name()));
            }
        }
    }
}

/// The directory of an image in the cache that `./x test` has filled; built here when it has not.
fn cached_image(name: &str) -> PathBuf {
    let cache = std::env::var_os("BURGEON_TEST_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("images"), PathBuf::from);
    fs::create_dir_all(&cache).unwrap();
    let directory = cache.join("images").join(name);
    fs::write(cache.join("burgeon-data"), "1\n").unwrap();
    let lock = fs::File::create(cache.join(format!("{name}.building"))).unwrap();
    lock.lock().unwrap();
    if !directory.join("image.json").exists() {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../images/{name}.toml"));
        let output = Command::new(env!("CARGO_BIN_EXE_burgeon"))
            .arg("--data")
            .arg(&cache)
            .args(["image", "build"])
            .arg(recipe)
            .env("BURGEON_ACCEL", accelerator())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    directory
}
