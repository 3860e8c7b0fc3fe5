//! What this machine offers: QEMU and its version, the time stamp counter, memory and CPUs.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use burgeon_api::{ByteSize, Error, Result, profile::Capacity};
use tokio::process::Command;

/// The oldest QEMU that Burgeon runs on.
pub const OLDEST: (u32, u32) = (7, 2);
const PROGRAM: &str = "qemu-system-x86_64";
pub const INSTALL_HINT: &str = "install it: apt-get install --no-install-recommends qemu-system-x86 qemu-utils";

/// An installed QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    pub program: PathBuf,
    pub version: String,
}

impl Qemu {
    /// Finds QEMU in `PATH` and asks its version.
    ///
    /// # Errors
    /// `NotFound` with the line that installs it; `Refused` for one that is too old.
    pub async fn find() -> Result<Qemu> {
        let program = find_program(PROGRAM)
            .ok_or_else(|| Error::not_found(format!("{PROGRAM} is not installed")).with_hint(INSTALL_HINT))?;
        let output = run(Command::new(&program).arg("--version"), Duration::from_secs(10)).await?;
        let version = parse_version(&output)
            .ok_or_else(|| Error::damaged(format!("{PROGRAM} --version said: {}", output.trim())))?;
        let mut numbers = version.split('.').map(|part| part.parse().unwrap_or(0));
        let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if found < OLDEST {
            return Err(Error::refused(format!("QEMU {version} is older than {}.{}", OLDEST.0, OLDEST.1))
                .with_hint(INSTALL_HINT));
        }
        Ok(Qemu { program, version })
    }
}

fn parse_version(output: &str) -> Option<String> {
    let rest = output.strip_prefix("QEMU emulator version ")?;
    let version: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    (!version.is_empty()).then_some(version)
}

/// The first executable of this name in `PATH`, and in the system's own directories, which an ordinary
/// user's `PATH` may lack.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|directory| directory.join(name))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
}

/// Runs a helper program to its end within a deadline and returns its output.
///
/// # Errors
/// The program's own words where it fails.
pub async fn run(command: &mut Command, deadline: Duration) -> Result<String> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(deadline, output)
        .await
        .map_err(|_| Error::deadline(format!("{name} took longer than {} s", deadline.as_secs())))?
        .map_err(|error| Error::io(format!("run {name}"), &error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::refused(format!("{name}: {}", burgeon_api::path_text::printable(said.trim()))))
}

/// The time stamp counter's rate as the kernel tells it.
pub fn tsc_khz() -> Option<u64> {
    parse_tsc_khz(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn parse_tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz"))?;
    let (mega, fraction) = line.split_once(':')?.1.trim().split_once('.')?;
    let fraction: String = fraction.chars().chain("000".chars()).take(3).collect();
    Some(mega.parse::<u64>().ok()? * 1000 + fraction.parse::<u64>().ok()?)
}

/// Memory and CPUs of this machine.
pub fn capacity() -> Capacity {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Capacity { memory: ByteSize::kib(kib), cpus: u32::try_from(cpus).unwrap_or(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_what_programs_print() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright";
        assert_eq!(parse_version(text).as_deref(), Some("7.2.22"));
        assert_eq!(parse_version("qemu: command not found"), None);
        assert_eq!(parse_tsc_khz("model name\t: X\ncpu MHz\t\t: 2596.118\n"), Some(2_596_118));
        assert_eq!(parse_tsc_khz("cpu MHz\t\t: 2596.1\n"), Some(2_596_100));
        assert_eq!(parse_tsc_khz(""), None);
    }
}
