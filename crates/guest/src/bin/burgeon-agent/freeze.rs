//! Cgroups: the agent's own, the commands', and the freezing of everything but the agent.

use std::{
    fs,
    io::{self, Write},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use burgeon_guest::protocol::{Failure, FailureKind};

use crate::{files::names, spawn::failure, system};

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "burgeon.agent";
/// Where commands run.
pub(crate) const COMMANDS: &str = "/sys/fs/cgroup/burgeon";
/// Where the image's init is while it is frozen, if it has made no cgroups yet: the root cannot be frozen.
const INIT: &str = "burgeon.init";
/// Where the image's init is then, or is by its own will as systemd is.
const OF_INIT: [&str; 2] = [INIT, "init.scope"];
const PATIENCE: Duration = Duration::from_secs(5);

/// Puts the agent into a cgroup of its own and makes the one of the commands.
pub(crate) fn set_up() -> io::Result<()> {
    join(&format!("{ROOT}/{AGENT}"))?;
    match fs::create_dir(COMMANDS) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Moves the calling process into a cgroup, which is made when it is not there.
pub(crate) fn join(cgroup: &str) -> io::Result<()> {
    let procs = format!("{cgroup}/cgroup.procs");
    match fs::write(&procs, "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir(cgroup)?;
            fs::write(&procs, "0")
        }
        other => other,
    }
}

/// A cgroup's directory, which is made when it is not there.
pub(crate) fn directory(cgroup: &str) -> io::Result<OwnedFd> {
    match fs::File::open(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir(cgroup)?;
            Ok(fs::File::open(cgroup)?.into())
        }
        other => Ok(other?.into()),
    }
}

/// Freezes every top-level cgroup but the agent's, and waits until all of them are still. The image's init is no exception:
/// one that is starting yet would write names of the machine that it was captured as.
/// What does not freeze in time is thawed again with the others.
pub(crate) fn freeze() -> Result<(), Failure> {
    let wrong = |error: io::Error| failure(FailureKind::Unsupported, format!("cannot freeze the workload: {error}"));
    // The init first, while the others run: the kernel may have it wait for one of them, as for a module's loading.
    take_init().map_err(wrong)?;
    let of_init: Vec<String> = OF_INIT.iter().filter(|group| set(group, true)).map(ToString::to_string).collect();
    wait(&of_init)?;
    gather_strays().map_err(wrong)?;
    wait(&set_all(true).map_err(wrong)?)
}

/// Waits until all of these are still; what is frozen is thawed where they are not in time.
fn wait(groups: &[String]) -> Result<(), Failure> {
    let until = Instant::now() + PATIENCE;
    for group in groups {
        while !is_frozen(group) {
            if Instant::now() > until {
                let _best_effort = thaw();
                let message = format!("cgroup {group} does not come to rest");
                return Err(failure(FailureKind::Unsupported, message));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Whether there is such a group, and it is frozen or thawed from now on.
fn set(group: &str, frozen: bool) -> bool {
    let switch = fs::File::options().write(true).open(format!("{ROOT}/{group}/cgroup.freeze"));
    switch.and_then(|mut switch| switch.write_all(if frozen { b"1" } else { b"0" })).is_ok()
}

pub(crate) fn thaw() -> Result<(), Failure> {
    let wrong = |error: io::Error| failure(FailureKind::Unsupported, format!("cannot thaw the workload: {error}"));
    set_all(false).map_err(wrong)?;
    if !system::is_init() && init_is_in(INIT) {
        fs::write(format!("{ROOT}/cgroup.procs"), "1").map_err(wrong)
    } else {
        Ok(())
    }
}

/// Has the image's init in a cgroup that can be frozen. Until it makes one it is in the root, or in the agent's, as the
/// program that it was.
fn take_init() -> io::Result<()> {
    if system::is_init() || !(init_is_in("") || init_is_in(AGENT)) {
        return Ok(());
    }
    let group = format!("{ROOT}/{INIT}");
    directory(&group)?;
    fs::write(format!("{group}/cgroup.procs"), "1")
}

fn init_is_in(group: &str) -> bool {
    let of_init = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
    of_init.lines().any(|line| line.strip_prefix("0::/") == Some(group))
}

fn set_all(frozen: bool) -> io::Result<Vec<String>> {
    let mut groups = Vec::new();
    for name in names(Path::new(ROOT))? {
        let name = name.to_string_lossy().into_owned();
        if name == AGENT {
            continue;
        }
        // A group may vanish meanwhile; what is none, and one without the switch holds no processes of ours to stop.
        if set(&name, frozen) {
            groups.push(name);
        }
    }
    Ok(groups)
}

fn is_frozen(group: &str) -> bool {
    match fs::read_to_string(format!("{ROOT}/{group}/cgroup.events")) {
        Ok(events) => events.lines().any(|line| line == "frozen 1"),
        Err(_) => true,
    }
}

/// The root cgroup cannot be frozen: moves its processes, which an init without cgroups leaves there, to the
/// commands. A process may fork while it is looked at, so that is repeated until nothing new is found.
fn gather_strays() -> io::Result<()> {
    let own = std::process::id();
    for _ in 0..8 {
        let mut moved = false;
        for line in fs::read_to_string(format!("{ROOT}/cgroup.procs"))?.lines() {
            let Ok(pid) = line.parse::<u32>() else { continue };
            // A kernel thread has no program, and freezing waits for it in vain.
            if pid == 1 || pid == own || fs::read_link(format!("/proc/{pid}/exe")).is_err() {
                continue;
            }
            moved |= fs::write(format!("{COMMANDS}/cgroup.procs"), line).is_ok();
        }
        if !moved {
            break;
        }
    }
    if Path::new(COMMANDS).is_dir() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::NotFound)) }
}
