//! The guest as a whole: what it is, its figures, its clock, its name, its end.

use std::{fs, io, path::Path};

use burgeon_guest::protocol::{About, Answer, Failure, FailureKind, Figures, REVISION, StopHow, VERSION};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    rand::GetRandomFlags,
    system::RebootCommand,
    time::{ClockId, Timespec},
};

use crate::{
    spawn::{failure, io_failure},
    sys,
};

/// systemd's signals to process 1, as systemd(1) has them: SIGRTMIN+4 is power off, SIGRTMIN+5 reboot.
const SYSTEMD_POWER_OFF: i32 = 34 + 4;
const SYSTEMD_REBOOT: i32 = 34 + 5;
/// A clock that is off by less is left to the guest.
const CLOCK_TOLERANCE_NS: u64 = 500_000_000;

pub(crate) fn is_init() -> bool {
    std::process::id() == 1
}

pub(crate) fn console(text: &str) {
    let _nobody_to_tell = io::Write::write_all(&mut io::stderr(), format!("burgeon-agent: {text}\n").as_bytes());
}

/// A random number. Never waits: early in a boot the kernel may have little to offer.
pub(crate) fn nonce() -> u64 {
    let mut bytes = [0; 8];
    let _few_bytes_always_come = rustix::rand::getrandom(&mut bytes, GetRandomFlags::INSECURE);
    u64::from_le_bytes(bytes)
}

pub(crate) fn about(warnings: &[String]) -> About {
    let uname = rustix::system::uname();
    About {
        agent_version: format!("{}+{REVISION}", env!("CARGO_PKG_VERSION")),
        protocol_version: u16::from(VERSION),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string(),
        kernel: uname.release().to_string_lossy().into_owned(),
        host_name: uname.nodename().to_string_lossy().into_owned(),
        is_init: is_init(),
        uptime_ms: uptime_ms(),
        nonce: nonce(),
        warnings: warnings.to_vec(),
    }
}

fn uptime_ms() -> u64 {
    let time = rustix::time::clock_gettime(ClockId::Boottime);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1000 + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000
}

pub(crate) fn figures() -> Answer {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let kib: Option<u64> = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut words = load.split_whitespace();
    let hundredths = words.next().and_then(|word| word.replace('.', "").parse().ok()).unwrap_or(0);
    let processes = words.nth(2).and_then(|word| word.split('/').nth(1)?.parse().ok()).unwrap_or(0);
    Answer::Figures(Figures {
        uptime_ms: uptime_ms(),
        load_hundredths: hundredths,
        memory_total: memory("MemTotal"),
        memory_available: memory("MemAvailable"),
        processes,
    })
}

pub(crate) fn set_clock(time_ns: u64) -> Result<Answer, Failure> {
    let time = Timespec {
        tv_sec: i64::try_from(time_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(time_ns % 1_000_000_000).unwrap_or(0),
    };
    let set = rustix::time::clock_settime(ClockId::Realtime, time);
    set.map(|()| Answer::Done).map_err(|error| io_failure("cannot set the clock", &error.into()))
}

/// Sets the clock when it is clearly wrong.
pub(crate) fn correct_clock(time_ns: u64) {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let now_ns = u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0);
    if time_ns != 0 && now_ns.abs_diff(time_ns) > CLOCK_TOLERANCE_NS {
        let _the_guest_keeps_its_own = set_clock(time_ns);
    }
}

pub(crate) fn set_host_name(name: &str) -> Result<Answer, Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
        return Err(failure(FailureKind::Invalid, "a host name has 1 to 64 letters, digits, dots and hyphens"));
    }
    let set = rustix::system::sethostname(name.as_bytes());
    set.map(|()| Answer::Done).map_err(|error| io_failure("cannot set the host name", &error.into()))
}

/// Asks the image's own init to stop the guest.
pub(crate) fn ask_init(how: StopHow) -> Result<(), Failure> {
    let refuse = |error: io::Error| io_failure("cannot stop the guest", &error);
    let power_off = how == StopHow::PowerOff;
    if Path::new("/run/systemd/system").is_dir() {
        return sys::kill(1, if power_off { SYSTEMD_POWER_OFF } else { SYSTEMD_REBOOT }).map_err(refuse);
    }
    let program = if power_off { "/sbin/poweroff" } else { "/sbin/reboot" };
    if Path::new(program).exists() && std::process::Command::new(program).spawn().is_ok() {
        return Ok(());
    }
    // What busybox's init and its relatives understand.
    sys::kill(1, if power_off { libc::SIGUSR2 } else { libc::SIGTERM }).map_err(refuse)
}

/// Ends the guest at once, after what is written has reached its disks.
pub(crate) fn finish(how: StopHow) -> ! {
    let _none_left = sys::kill(-1, libc::SIGKILL);
    rustix::fs::sync();
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut words = line.split(' ');
        let (Some(device), Some(target)) = (words.next(), words.next()) else { continue };
        if device.starts_with("/dev/") && rustix::mount::unmount(target, UnmountFlags::empty()).is_err() {
            let _still_synced = rustix::mount::mount_remount(target, MountFlags::RDONLY, "");
        }
    }
    rustix::fs::sync();
    let command = if how == StopHow::PowerOff { RebootCommand::PowerOff } else { RebootCommand::Restart };
    let _no_way_back = rustix::system::reboot(command);
    sys::exit_now(1)
}
