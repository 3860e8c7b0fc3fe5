//! Programs of the machine that the builder runs, each with a deadline.

use std::{
    ffi::OsStr,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use burgeon_api::{Error, ErrorKind, Result, path_text};
use rustix::process::{Pid, Signal, kill_process_group};

/// Where the programs are. A program that is missing is told when it is needed.
#[derive(Clone, Debug)]
pub struct Tools {
    pub apt_get: PathBuf,
    pub apt_cache: PathBuf,
    /// apt's downloader, outside the usual directories.
    pub apt_helper: PathBuf,
    pub dpkg_deb: PathBuf,
    pub mke2fs: PathBuf,
    pub debugfs: PathBuf,
    pub qemu_img: PathBuf,
    pub xz: PathBuf,
    pub zstd: PathBuf,
}

impl Tools {
    /// Looks for the programs in `path` (the value of `PATH`) and where Debian puts those of root.
    pub fn find(path: &OsStr) -> Tools {
        let mut directories: Vec<PathBuf> = std::env::split_paths(path).filter(|path| path.is_absolute()).collect();
        directories.extend(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
        let find = |name: &str| {
            directories
                .iter()
                .map(|directory| directory.join(name))
                .find(|program| program.is_file())
                .unwrap_or_else(|| PathBuf::from(name))
        };
        Tools {
            apt_get: find("apt-get"),
            apt_cache: find("apt-cache"),
            apt_helper: PathBuf::from("/usr/lib/apt/apt-helper"),
            dpkg_deb: find("dpkg-deb"),
            mke2fs: find("mke2fs"),
            debugfs: find("debugfs"),
            qemu_img: find("qemu-img"),
            xz: find("xz"),
            zstd: find("zstd"),
        }
    }
}

/// Limits of one run: a deadline and the user's wish to stop.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a> {
    pub(crate) deadline: Duration,
    pub(crate) cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Limits<'_> {
    pub(crate) fn within(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    pub(crate) fn check_cancelled(self) -> Result<()> {
        if (self.cancelled)() { Err(cancelled()) } else { Ok(()) }
    }
}

pub(crate) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "cancelled")
}

pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// A program with the environment that all of ours get: no locale, so that order and messages are fixed, and no secrets.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for name in burgeon_api::remote::SECRETS {
        command.env_remove(name);
    }
    command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    command
}

/// Runs a program to its end and gives its outputs, whatever its status.
pub(crate) fn run(command: Command, limits: Limits<'_>) -> Result<Finished> {
    run_watched(command, limits, &mut || {})
}

/// As [`run`], and calls `tick` a few times per second while the program runs.
pub(crate) fn run_watched(mut command: Command, limits: Limits<'_>, tick: &mut dyn FnMut()) -> Result<Finished> {
    let name = program_name(&command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(|error| cannot_start(&name, &error))?;
    let (done, ended) = mpsc::channel();
    let readers = (reader(child.stdout.take(), done.clone()), reader(child.stderr.take(), done));
    let status = wait(&mut child, &name, limits, &ended, tick)?;
    let join = |handle: thread::JoinHandle<Vec<u8>>| handle.join().unwrap_or_default();
    Ok(Finished { status, stdout: join(readers.0), stderr: join(readers.1) })
}

/// Runs a program that must succeed; its standard error is the message where it does not.
pub(crate) fn run_ok(command: Command, limits: Limits<'_>) -> Result<Finished> {
    let name = program_name(&command);
    let finished = run(command, limits)?;
    if finished.status.success() { Ok(finished) } else { Err(failed(&name, &finished)) }
}

/// Starts a program whose output is read as a stream. The child is killed when dropped.
pub(crate) fn stream(mut command: Command) -> Result<Streaming> {
    let name = program_name(&command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(|error| cannot_start(&name, &error))?;
    let stderr = reader(child.stderr.take(), mpsc::channel().0);
    Ok(Streaming { child, name, stderr: Some(stderr) })
}

/// A program whose standard output is being read.
pub(crate) struct Streaming {
    child: Child,
    name: String,
    stderr: Option<thread::JoinHandle<Vec<u8>>>,
}

impl Read for Streaming {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match &mut self.child.stdout {
            Some(stdout) => stdout.read(buffer),
            None => Ok(0),
        }
    }
}

impl Streaming {
    /// Reads what is left, waits, and tells a failure.
    pub(crate) fn finish(mut self) -> Result<()> {
        let drained = std::io::copy(&mut self, &mut std::io::sink());
        drained.map_err(|error| Error::io(format!("cannot read from {}", self.name), &error))?;
        let status = self.child.wait().map_err(|error| Error::io(format!("cannot wait for {}", self.name), &error))?;
        let stderr = self.stderr.take().and_then(|handle| handle.join().ok()).unwrap_or_default();
        if status.success() {
            Ok(())
        } else {
            Err(failed(&self.name, &Finished { status, stdout: Vec::new(), stderr }))
        }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

/// Waits for the end of a program. `ended` hears of each output that is closed, which is when most
/// programs end: a build runs hundreds of short ones, and must not sleep past their ends.
fn wait(
    child: &mut Child,
    name: &str,
    limits: Limits<'_>,
    ended: &mpsc::Receiver<()>,
    tick: &mut dyn FnMut(),
) -> Result<ExitStatus> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        let status = child.try_wait().map_err(|error| Error::io(format!("cannot wait for {name}"), &error))?;
        if let Some(status) = status {
            return Ok(status);
        }
        let error = if (limits.cancelled)() {
            cancelled()
        } else if start.elapsed() > limits.deadline {
            Error::deadline(format!("{name} took longer than {} s", limits.deadline.as_secs()))
        } else {
            tick();
            match ended.recv_timeout(pause) {
                Ok(()) | Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    // Both outputs are closed: it is about to end, or went on silently.
                    thread::sleep(pause.min(Duration::from_millis(1)));
                    pause = Duration::from_millis(1);
                }
            }
            continue;
        };
        kill(child);
        return Err(error);
    }
}

fn kill(child: &mut Child) {
    if matches!(child.try_wait(), Ok(Some(_))) {
        return;
    }
    // The group, since apt's transports are children that would hold our pipes open.
    let group = Pid::from_child(child);
    let killed = kill_process_group(group, Signal::KILL);
    if killed.is_err() {
        drop(child.kill());
    }
    drop(child.wait());
}

fn reader(pipe: Option<impl Read + Send + 'static>, done: mpsc::Sender<()>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut out = Vec::new();
        if let Some(mut pipe) = pipe {
            drop(pipe.read_to_end(&mut out));
        }
        drop(done);
        out
    })
}

fn program_name(command: &Command) -> String {
    Path::new(command.get_program()).file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned()
}

fn cannot_start(name: &str, error: &std::io::Error) -> Error {
    if error.kind() != std::io::ErrorKind::NotFound {
        return Error::io(format!("cannot run {name}"), error);
    }
    let package = match name {
        "apt-get" | "apt-cache" | "apt-helper" => {
            return Error::refused(format!("recipes need apt, and there is no {name} on this machine"))
                .with_hint("build on Debian or a system derived from it, or copy images/ from such a machine");
        }
        "dpkg-deb" => "dpkg",
        "mke2fs" | "debugfs" => "e2fsprogs",
        "qemu-img" => "qemu-utils",
        "xz" => "xz-utils",
        other => other,
    };
    Error::refused(format!("{name} is not installed")).with_hint(format!("apt-get install {package}"))
}

/// The error of a program that ended badly: the last lines of what it said.
pub(crate) fn failed(name: &str, finished: &Finished) -> Error {
    let said = String::from_utf8_lossy(&finished.stderr);
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail: Vec<String> = lines.iter().rev().take(8).rev().map(|line| path_text::printable(line)).collect();
    let ending = match finished.status.code() {
        Some(code) => format!("{name} failed with status {code}"),
        None => format!("{name} was killed ({})", finished.status),
    };
    let full = said.contains("No space left on device");
    let error = Error::new(
        if full { ErrorKind::Refused } else { ErrorKind::Internal },
        if tail.is_empty() { ending } else { format!("{ending}: {}", tail.join("; ")) },
    );
    if full { error.with_hint("free some space, or put the data directory elsewhere with --data DIR") } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(seconds: u64) -> Limits<'static> {
        Limits { deadline: Duration::from_secs(seconds), cancelled: &|| false }
    }

    fn shell(script: &str) -> Command {
        let mut command = command(Path::new("/bin/sh"));
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_program_that_fails_tells_what_it_said() {
        let error = run_ok(shell("echo 'No such thing' >&2; exit 3"), limits(10)).map(drop).unwrap_err();
        assert_eq!(error.message, "sh failed with status 3: No such thing");
    }

    #[test]
    fn deadlines_and_cancelling_kill_the_whole_group() {
        let start = Instant::now();
        let error = run(shell("sleep 60 & wait"), limits(0)).map(drop).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Deadline);
        let limits = Limits { deadline: Duration::from_secs(60), cancelled: &|| true };
        assert_eq!(run(shell("sleep 60 & wait"), limits).map(drop).unwrap_err().kind, ErrorKind::Cancelled);
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let error = run(command(Path::new("/nonexistent/mke2fs")), limits(1)).map(drop).unwrap_err();
        assert_eq!(error.hint.unwrap(), "apt-get install e2fsprogs");
    }
}
