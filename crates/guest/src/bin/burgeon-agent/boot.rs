//! The start of a guest from Burgeon's initramfs, with the agent as its first process.
//!
//! ```text
//! mounts -> early modules -> the port -> [root: modules, device, mount, switch] -> Ready -> [the image's init]
//! ```
//! The initramfs holds `/init` (this program), `/burgeon/modules`, `/burgeon/modules.growth` and `/burgeon/modules.root`
//! (paths below `/burgeon`, one a line, in the order of loading), and the device node `/dev/console`, which the kernel's
//! built-in archive brings too. Words of the kernel command line:
//!
//! | word | meaning |
//! |---|---|
//! | `burgeon.root=/dev/vda` | the image's disk, ext4; absent: the initramfs is the root |
//! | `burgeon.init=/sbin/init` | process 1 becomes this program of the image; absent: the agent stays process 1 |
//! | `burgeon.name=NAME` | host name |
//!
//! A root that cannot be had is told on the console and as `BootFailed`, and the agent serves the initramfs; for an
//! init that cannot be run, the same, and the agent serves the image as process 1.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    mount::MountFlags,
};

use crate::{
    agent::{self, Setup},
    channel::{Channel, open_port},
    disk, freeze,
    sys::{self, Fork, Texts},
    system::{self, console},
};

/// The agent beside an image's init is started again with this, the port and the pipe that says it has begun.
pub(crate) const INHERIT: &[u8] = b"--inherit";
const PORT: &str = "burgeon.agent.0";
/// Where other programs of the guest find this one.
const OWN_COPY: &str = "/run/burgeon/agent";
/// systemd's last round of killing spares processes whose name begins so, as its documentation for root storage
/// daemons says.
const OWN_NAME: &str = "@burgeon-agent";
/// As which a virtio device shows itself that brings memory.
const MEMORY_DEVICE: &str = "0x0018";
const PATIENCE: Duration = Duration::from_secs(10);
/// The init may not wait for a host that is not there.
const START_PATIENCE_MS: i64 = 5000;

#[derive(Debug, Default, PartialEq)]
struct Words {
    root: Option<String>,
    init: Option<String>,
    name: Option<String>,
    /// The VM, where its disk is a clone of another one's.
    instance: Option<String>,
}

impl Words {
    fn read(command_line: &str) -> Self {
        let mut words = Self::default();
        for word in command_line.split_whitespace() {
            let Some((key, value)) = word.strip_prefix("burgeon.").and_then(|word| word.split_once('=')) else {
                continue;
            };
            let value = (!value.is_empty()).then(|| value.to_string());
            match key {
                "root" => words.root = value,
                "init" => words.init = value,
                "name" => words.name = value,
                "instance" => words.instance = value,
                _ => {}
            }
        }
        words
    }
}

/// Brings the guest up and serves it. Returns only when nothing can be served.
pub(crate) fn run() {
    let mut setup = Setup { manages_system: true, ..Setup::default() };
    mount_basics(&mut setup.warnings);
    let words = Words::read(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    load_modules("/burgeon/modules", &mut setup.warnings);
    if has_growth() {
        load_modules("/burgeon/modules.growth", &mut setup.warnings);
    }
    if let Some(name) = &words.name
        && let Err(error) = system::set_host_name(name)
    {
        warn(&mut setup.warnings, format!("burgeon.name: {}", error.message));
    }
    copy_self(&mut setup.warnings);
    if let Err(error) = freeze::set_up() {
        warn(&mut setup.warnings, format!("no cgroups: {error}"));
    }
    let port: OwnedFd = match find_port() {
        Ok(port) => port.into(),
        Err(error) => {
            console(&format!("no port {PORT}: {error}; is virtio_console among the modules? Powering off"));
            system::finish(burgeon_guest::protocol::StopHow::PowerOff);
        }
    };
    let mut init = None;
    if let Some(root) = &words.root {
        match enter_root(root, words.instance.as_deref(), &mut setup.warnings) {
            Ok(()) => init = words.init.as_deref(),
            Err((stage, reason)) => {
                console(&format!("{stage}: {reason}; the agent stays in the initramfs"));
                setup.boot_failure = Some((stage.to_string(), reason));
            }
        }
    }
    if let Some(init) = init {
        // Looked at before, because afterwards process 1 has no channel to tell it on.
        let runnable = rustix::fs::access(init, rustix::fs::Access::EXEC_OK);
        match runnable.map_err(io::Error::from).and_then(|()| start_beside(&port, &setup.warnings)) {
            Ok(true) => become_init(init),
            Ok(false) => {}
            Err(error) => {
                console(&format!("cannot start {init}: {error}; the agent stays process 1"));
                setup.boot_failure = Some(("init".to_string(), format!("{init}: {error}")));
            }
        }
    }
    match Channel::port(port) {
        Ok(channel) => console(&format!("stopped: {}", agent::run(channel, setup))),
        Err(error) => console(&format!("cannot use the port: {error}")),
    }
}

fn warn(warnings: &mut Vec<String>, text: String) {
    console(&text);
    warnings.push(text);
}

fn mount_basics(warnings: &mut Vec<String>) {
    let strict = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let basics: [(&str, &str, MountFlags, &CStrText); 6] = [
        ("proc", "/proc", strict, c""),
        ("sysfs", "/sys", strict, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755"),
        ("cgroup2", "/sys/fs/cgroup", strict, c"nsdelegate"),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, c"gid=5,mode=620,ptmxmode=666"),
    ];
    for (kind, target, flags, data) in basics {
        let _there_already = fs::create_dir_all(target);
        match rustix::mount::mount(kind, target, kind, flags, data) {
            // The kernel may have mounted /dev by itself.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => warn(warnings, format!("cannot mount {target}: {error}")),
        }
    }
}

type CStrText = std::ffi::CStr;

/// Loads the modules that a list names. Those that fail are told; what needs them fails later by itself.
fn load_modules(list: &str, warnings: &mut Vec<String>) {
    for line in fs::read_to_string(list).unwrap_or_default().lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let path = Path::new("/burgeon").join(line);
        // MODULE_INIT_COMPRESSED_FILE of linux/module.h: the kernel unpacks it.
        let flags = if path.extension().is_some_and(|end| end == "ko") { 0 } else { 4 };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) => {
                warn(warnings, format!("cannot open module {line}: {error}"));
                continue;
            }
        };
        match rustix::system::finit_module(&file, c"", flags) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            // The kernel's word for a symbol that no loaded module has.
            Err(rustix::io::Errno::NOENT) => {
                warn(warnings, format!("module {line} needs another one that is not listed before it"));
            }
            Err(error) => warn(warnings, format!("cannot load module {line}: {error}")),
        }
    }
}

/// Whether there is memory that this guest may be given while it runs.
fn has_growth() -> bool {
    let devices = fs::read_dir("/sys/bus/virtio/devices").into_iter().flatten().flatten();
    let mut kinds = devices.filter_map(|device| fs::read_to_string(device.path().join("device")).ok());
    kinds.any(|kind| kind.trim() == MEMORY_DEVICE)
}

fn copy_self(warnings: &mut Vec<String>) {
    let copy = || -> io::Result<()> {
        fs::create_dir_all("/run/burgeon")?;
        fs::copy("/proc/self/exe", OWN_COPY)?;
        fs::set_permissions(OWN_COPY, fs::Permissions::from_mode(0o755))
    };
    if let Err(error) = copy() {
        warn(warnings, format!("cannot copy the agent to {OWN_COPY}: {error}"));
    }
}

/// Tries until it succeeds or patience ends, in short pauses: the kernel has no better way to tell both.
fn wait_for<T>(pause: Duration, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(_) if Instant::now() < until => std::thread::sleep(pause),
            other => return other,
        }
    }
}

fn find_port() -> io::Result<File> {
    wait_for(Duration::from_millis(1), || {
        for entry in fs::read_dir("/sys/class/virtio-ports")? {
            let entry = entry?;
            if fs::read_to_string(entry.path().join("name")).unwrap_or_default().trim() == PORT {
                return open_port(&PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        Err(io::Error::from(io::ErrorKind::NotFound))
    })
}

/// Makes the image's disk the root, and frees the initramfs.
fn enter_root(device: &str, instance: Option<&str>, warnings: &mut Vec<String>) -> Result<(), (&'static str, String)> {
    const NEW: &str = "/newroot";
    load_modules("/burgeon/modules.root", warnings);
    let there = wait_for(Duration::from_millis(5), || fs::metadata(device));
    there.map_err(|error| ("root device", format!("{device}: {error}")))?;
    let _there_already = fs::create_dir(NEW);
    rustix::mount::mount(device, NEW, "ext4", MountFlags::empty(), c"")
        .map_err(|error| ("root mount", format!("{device}: {error}")))?;
    if let Err(error) = disk::grow_one(device, NEW) {
        warn(warnings, format!("the file system on {device} stays smaller than the disk: {error}"));
    }
    if let Some(instance) = instance {
        // Two of the same would be worse than none.
        disk::renew(Path::new(NEW), instance).map_err(|error| ("renewal of a clone", error.to_string()))?;
    }
    let switch = || -> io::Result<()> {
        let old = rustix::fs::open("/", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for inside in ["/proc", "/sys", "/dev", "/run"] {
            let target = format!("{NEW}{inside}");
            let _there_already = fs::create_dir(&target);
            // /sys/fs/cgroup and /dev/pts move along with what they are mounted in.
            rustix::mount::mount_move(inside, target.as_str())?;
        }
        rustix::process::chdir(NEW)?;
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")?;
        empty_directory(&old, rustix::fs::fstat(&old)?.st_dev);
        Ok(())
    };
    switch().map_err(|error| ("root switch", error.to_string()))
}

/// Deletes what lies below a directory of the initramfs, without leaving its file system.
fn empty_directory(directory: &OwnedFd, device: u64) {
    let Ok(entries) = Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let Ok(meta) = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if meta.st_dev != device {
            continue;
        }
        let is_directory = FileType::from_raw_mode(meta.st_mode) == FileType::Directory;
        if is_directory {
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Ok(inner) = rustix::fs::openat(directory, name, flags, Mode::empty()) {
                empty_directory(&inner, device);
            }
        }
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let _kept_if_in_use = rustix::fs::unlinkat(directory, name, flags);
    }
}

/// Starts the agent as a process of its own. `true` in process 1, when the agent has said Ready or its time is
/// up; `false` in the child when it could not be made a program of its own and serves as it is.
fn start_beside(port: &OwnedFd, warnings: &[String]) -> io::Result<bool> {
    let (waiting, started) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match sys::fork()? {
        Fork::Parent => {
            drop(started);
            let mut fds = [rustix::event::PollFd::new(&waiting, rustix::event::PollFlags::IN)];
            let timeout =
                rustix::event::Timespec { tv_sec: START_PATIENCE_MS / 1000, tv_nsec: START_PATIENCE_MS % 1000 };
            let _ready_or_late = rustix::event::poll(&mut fds, Some(&timeout));
            Ok(true)
        }
        Fork::Child => {
            drop(waiting);
            rustix::process::setsid()?;
            freeze::join("/sys/fs/cgroup/burgeon.agent").ok();
            sys::keep_across_exec(port);
            sys::keep_across_exec(&started);
            let word = |text: &str| CString::new(text).unwrap_or_default();
            let argv = vec![
                word(OWN_NAME),
                CString::new(INHERIT).unwrap_or_default(),
                word(&port.as_raw_fd().to_string()),
                word(&started.as_raw_fd().to_string()),
            ];
            let env = vec![word(&format!("BURGEON_WARNINGS={}", warnings.join("\n")))];
            let error = sys::execve(&word(OWN_COPY), &Texts::new(argv), &Texts::new(env));
            console(&format!("cannot run {OWN_COPY}: {}", io::Error::from_raw_os_error(error)));
            Ok(false)
        }
    }
}

/// The agent beside an image's init, as [`start_beside`] runs it.
pub(crate) fn serve_inherited(port: &[u8], started: &[u8]) -> ExitCode {
    let take = |text: &[u8]| -> io::Result<OwnedFd> {
        let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        sys::inherited(number.unwrap_or(-1))
    };
    let warnings = std::env::var("BURGEON_WARNINGS").unwrap_or_default();
    let setup = Setup {
        manages_system: true,
        warnings: warnings.lines().map(str::to_string).collect(),
        boot_failure: None,
        started: take(started).ok(),
    };
    match take(port).and_then(Channel::port) {
        Ok(channel) => console(&format!("stopped: {}", agent::run(channel, setup))),
        Err(error) => console(&format!("cannot use the port: {error}")),
    }
    ExitCode::FAILURE
}

/// Makes process 1 the image's init. Should that fail, the agent's child already serves, so process 1 stays and
/// reaps.
fn become_init(init: &str) -> ! {
    sys::reset_signals();
    sys::unblock_signals();
    let word = |text: &str| CString::new(text).unwrap_or_default();
    if let Ok(console) = fs::OpenOptions::new().read(true).write(true).open("/dev/console") {
        let console = OwnedFd::from(console);
        for fd in 0..3 {
            let _the_kernels_own_remains = sys::duplicate_onto(console.as_raw_fd(), fd);
        }
    }
    // What the kernel itself gives to an init.
    let env = Texts::new(vec![word("HOME=/"), word("TERM=linux")]);
    let error = io::Error::from_raw_os_error(sys::execve(&word(init), &Texts::new(vec![word(init)]), &env));
    console(&format!("cannot run {init}: {error}; the agent goes on without it"));
    loop {
        // Nothing else is left to do for the first process: it must not end, and must take orphans.
        while matches!(sys::wait_any(), Ok(Some(_))) {}
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read() {
        let words = Words::read("quiet burgeon.root=/dev/vda burgeon.init= other.root=/x burgeon.name=a-1\n");
        assert_eq!(
            words,
            Words { root: Some("/dev/vda".into()), init: None, name: Some("a-1".into()), instance: None }
        );
    }
}
