//! QEMU's process: starting it without privileges and outliving its parent, telling it from another
//! process of the same number, and ending it.

use std::{
    fs,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use burgeon_api::{Error, Result, vm::Accelerator};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

/// What tells a process from a later one with the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: u32,
    /// Clock ticks after the host's boot at which it started: field 22 of /proc/PID/stat.
    pub start_ticks: u64,
    pub executable: PathBuf,
}

/// Who QEMU runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAs {
    /// The user of the host process.
    Same,
    /// A user and group of this number, with no privileges and at most one other group.
    User { number: u32, group: Option<u32> },
}

impl RunAs {
    /// The number of a user that is not ours.
    pub fn user(self) -> Option<u32> {
        match self {
            RunAs::User { number, .. } => Some(number),
            RunAs::Same => None,
        }
    }
}

/// Reads who a process is, if it is there and no zombie.
pub fn identity_of(pid: u32) -> Option<Identity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; fields are counted behind its end.
    let rest = &stat[stat.rfind(')')? + 2..];
    let fields: Vec<&str> = rest.split(' ').collect();
    if matches!(fields.first(), Some(&"Z" | &"X")) {
        return None;
    }
    Some(Identity {
        pid,
        start_ticks: fields.get(19)?.parse().ok()?,
        executable: fs::read_link(format!("/proc/{pid}/exe")).ok()?,
    })
}

/// A number that changes with every boot of the host.
pub fn host_boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

/// A process that need not be our child, held so that its number cannot be taken by another.
#[derive(Debug)]
pub struct Process {
    pub identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes hold of a running process.
    ///
    /// # Errors
    /// `NotFound` when it is gone or is another one by now.
    pub fn hold(identity: &Identity) -> Result<Process> {
        let gone = || Error::not_found(format!("process {} is gone", identity.pid));
        let pid = i32::try_from(identity.pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(|_| gone())?;
        if identity_of(identity.pid).as_ref() != Some(identity) {
            return Err(gone());
        }
        // SAFETY: an `OwnedFd` always gives the same open descriptor for as long as it lives, and it
        // lives inside the `AsyncFd` until that is deregistered.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(|error| Error::internal(format!("watch QEMU's process: {error}")))?;
        Ok(Process { identity: identity.clone(), pidfd })
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) {
        // An error can only mean that the descriptor cannot be watched; then poll is asked directly.
        if self.pidfd.readable().await.is_err() {
            while identity_of(self.identity.pid).as_ref() == Some(&self.identity) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// How it has ended, where the process was our child; takes it off the process table.
    pub fn reap(&self) -> Option<End> {
        let status = rustix::process::waitid(
            WaitId::PidFd(self.pidfd.get_ref().as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        )
        .ok()??;
        status.exit_status().map(End::Code).or_else(|| status.terminating_signal().map(End::Signal))
    }

    pub fn kill(&self) {
        if let Err(error) = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            tracing::debug!(%error, pid = self.identity.pid, "the process had ended already");
        }
    }
}

/// How a process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Code(i32),
    Signal(i32),
}

impl End {
    /// Whether it met memory that is there no more: of a file that was cut short, or that the machine cannot read.
    pub fn is_of_lost_memory(&self) -> bool {
        *self == End::Signal(Signal::BUS.as_raw())
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Code(code) => write!(out, "exit code {code}"),
            End::Signal(signal) => write!(out, "signal {signal}"),
        }
    }
}

/// Starts QEMU in `directory` with `arguments`.
///
/// It gets a session of its own and no descriptor of ours but `inherited`, so that it outlives this process; what it
/// says goes to `log`, which lies outside that directory.
///
/// # Errors
/// `Internal` or `Refused` with the system's reason.
pub fn start(
    program: &Path,
    arguments: &[String],
    directory: &Path,
    log: &Path,
    run_as: RunAs,
    inherited: Option<BorrowedFd<'_>>,
) -> Result<Identity> {
    let output = fs::File::create(log).map_err(|error| Error::io(format!("create {}", log.display()), &error))?;
    let errors = output.try_clone().map_err(|error| Error::io("share QEMU's log", &error))?;
    // Opened now: below a home directory of mode 0700 the path would not be reachable for another user.
    let entered = fs::File::open(directory).map_err(|error| Error::io("open the VM's directory", &error))?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(errors);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LANG", "C.UTF-8");
    let inherited = inherited.map(|inherited| inherited.as_raw_fd());
    let prepare = move || -> io::Result<()> {
        if let Some(number) = inherited {
            // SAFETY: the caller borrows it to this function, which outlives the child's way to its program.
            let inherited = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?;
        }
        rustix::process::fchdir(&entered)?;
        rustix::process::setsid()?;
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, none)?;
        if let RunAs::User { number, group } = run_as {
            match group {
                Some(group) => rustix::thread::set_thread_groups(&[rustix::process::Gid::from_raw(group)])?,
                None => rustix::thread::set_thread_groups(&[])?,
            }
            let (group, user) = (rustix::process::Gid::from_raw(number), rustix::process::Uid::from_raw(number));
            rustix::thread::set_thread_res_gid(group, group, group)?;
            rustix::thread::set_thread_res_uid(user, user, user)?;
        }
        if run_as == RunAs::Same {
            // The host process, and the one after it, read the guest's memory; Yama else lets only parents do that.
            let _there_may_be_no_yama = rustix::process::set_ptracer(rustix::process::PTracer::Any);
        }
        rustix::thread::set_no_new_privs(true)?;
        Ok(())
    };
    // SAFETY: `prepare` runs in the child between fork and exec. It only makes system calls through
    // rustix's raw backend: it takes no lock and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn().map_err(|error| Error::io(format!("start {}", program.display()), &error))?;
    let pid = child.id();
    // The handle is dropped on purpose: `Process::reap` collects the status through a pidfd.
    drop(child);
    identity_of(pid).ok_or_else(|| Error::internal(format!("QEMU ended at once: {}", log_tail(log, 600))))
}

/// Ends a child that was started just now. Nobody has reaped it, so its number is its own.
pub fn kill_child(identity: &Identity) {
    if let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) {
        let _ended_by_itself = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Makes a VM's directory its own: only QEMU's user (and root) may enter it.
///
/// # Errors
/// The system's reason.
pub fn give_directory(directory: &Path, run_as: RunAs) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let act = || -> io::Result<()> {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        if let RunAs::User { number, .. } = run_as {
            std::os::unix::fs::chown(directory, Some(number), Some(number))?;
        }
        Ok(())
    };
    act().map_err(|error| Error::io("hand the VM's directory to its user", &error))
}

/// The last part of a log as text, for messages.
pub fn log_tail(path: &Path, most: u64) -> String {
    use std::io::{Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<String> = text
        .lines()
        .map(|line| burgeon_api::path_text::printable(line.trim_end()))
        .filter(|line| !line.is_empty())
        .collect();
    let from = lines.len().saturating_sub(6);
    lines[from..].join(" | ")
}

/// Who a VM's QEMU runs as when this process is root: a user number that no distribution gives to
/// anybody, where this process may use such numbers; else `nobody`. With KVM it keeps the group of
/// /dev/kvm; where only root may open that device, nothing can be dropped, and `Same` says so.
pub fn run_as(vm: u128, accelerator: Accelerator) -> RunAs {
    use std::os::unix::fs::MetadataExt;
    if !rustix::process::geteuid().is_root() {
        return RunAs::Same;
    }
    let group = match (accelerator, fs::metadata("/dev/kvm")) {
        (Accelerator::Kvm, Ok(device)) if device.mode() & 0o006 == 0o006 => None,
        (Accelerator::Kvm, Ok(device)) if device.mode() & 0o060 == 0o060 => Some(device.gid()),
        (Accelerator::Kvm, _) => return RunAs::Same,
        (Accelerator::Tcg, _) => None,
    };
    const BASE: u64 = 800_000_000;
    let wanted = BASE + u64::try_from(vm & 0xff_ffff).unwrap_or(0);
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let mapped = map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(numbers[..], [inside, _, count] if wanted >= inside && wanted - inside < count)
    });
    RunAs::User { number: if mapped { u32::try_from(wanted).unwrap_or(65534) } else { 65534 }, group }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let me = identity_of(std::process::id()).unwrap();
        assert_eq!(me.executable, std::env::current_exe().unwrap());
        assert_eq!(identity_of(std::process::id()), Some(me.clone()));
        assert!(identity_of(u32::MAX).is_none());
    }

    #[tokio::test]
    async fn a_started_process_is_watched_and_ended() {
        let directory = tempfile::tempdir().unwrap();
        let identity = start(
            Path::new("/bin/sleep"),
            &["60".into()],
            directory.path(),
            &directory.path().join("log"),
            run_as(7, Accelerator::Tcg),
            None,
        )
        .unwrap();
        let process = Process::hold(&identity).unwrap();
        process.kill();
        tokio::time::timeout(Duration::from_secs(10), process.ended()).await.unwrap();
        assert_eq!(process.reap(), Some(End::Signal(9)));
        assert!(Process::hold(&identity).is_err());
    }
}
