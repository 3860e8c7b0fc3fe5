//! `doctor`: what this machine lacks, and how to mend it.

use std::path::Path;

use burgeon_api::{ByteSize, Error, ErrorKind, Result};
use burgeon_host::layout::Layout;
use burgeon_qemu::{
    facts::{self, Qemu, find_program},
    probe::{self, Verdict},
};
use serde::Serialize;

use super::{Context, environment};
use crate::output;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Grade {
    Good,
    /// Burgeon works without it, slower or with fewer means.
    Lacking,
    /// Burgeon does not work without it.
    Missing,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    grade: Grade,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, grade: Grade::Good, found: found.into(), remedy: None }
    }
    fn lacking(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, grade: Grade::Lacking, found: found.into(), remedy: Some(remedy.into()) }
    }
    fn missing(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, grade: Grade::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

pub(super) async fn run(context: &Context) -> Result<u8> {
    let mut findings = Vec::new();
    let qemu = Qemu::find().await;
    match &qemu {
        Ok(qemu) => findings.push(Finding::good("qemu", format!("QEMU {}", qemu.version))),
        Err(error) => {
            findings.push(Finding::missing("qemu", error.to_string(), error.hint.clone().unwrap_or_default()))
        }
    }
    findings.extend(programs());
    findings.push(kvm(&context.data, qemu.ok().as_ref()));
    findings.push(data_directory(&context.data));
    findings.extend(elsewhere(&context.data).await);
    findings.push(space(&context.data));
    findings.push(memory());
    findings.push(cgroups());
    findings.push(ptrace());
    findings.push(open_files());
    findings.push(user());
    let missing = findings.iter().any(|finding| finding.grade == Grade::Missing);
    if context.json {
        output::json(&findings)?;
    } else {
        let rows = findings
            .iter()
            .map(|finding| {
                let grade = match finding.grade {
                    Grade::Good => "ok",
                    Grade::Lacking => "lacking",
                    Grade::Missing => "MISSING",
                };
                vec![finding.check.to_string(), grade.to_string(), finding.found.clone()]
            })
            .collect();
        output::table(&["check", "state", "found"], rows);
        for finding in &findings {
            if let Some(remedy) = &finding.remedy {
                output::print(&format!("{}: {remedy}\n", finding.check));
            }
        }
    }
    Ok(u8::from(missing))
}

fn programs() -> Vec<Finding> {
    [
        ("qemu-img", "makes VMs' disks", "apt-get install --no-install-recommends qemu-utils", true),
        ("mke2fs", "image build", "apt-get install e2fsprogs", false),
        ("debugfs", "image build", "apt-get install e2fsprogs", false),
        ("apt-get", "image build", "build images on a Debian machine, and import them here", false),
        ("xz", "image build and import", "apt-get install xz-utils", false),
        ("zstd", "image import", "apt-get install zstd", false),
        ("dpkg-deb", "image build", "build images on a Debian machine, and import them here", false),
    ]
    .into_iter()
    .map(|(name, purpose, remedy, needed)| match find_program(name) {
        Some(path) => Finding::good(name, path.display().to_string()),
        None if needed => Finding::missing(name, format!("not installed ({purpose})"), remedy),
        None => Finding::lacking(name, format!("not installed ({purpose})"), remedy),
    })
    .collect()
}

fn kvm(data: &Path, qemu: Option<&Qemu>) -> Finding {
    let known = qemu.and_then(|qemu| Verdict::load(&data.join("kvm.json"), qemu));
    let slow = "VMs run emulated, about ten times slower";
    match (probe::device(), known) {
        (_, Some(verdict)) if verdict.kvm_works => Finding::good("kvm", verdict.reason),
        (_, Some(verdict)) => Finding::lacking(
            "kvm",
            verdict.reason,
            format!("{slow}; on a machine of your own, enable virtualisation in its firmware"),
        ),
        (Err(reason), None) => {
            Finding::lacking("kvm", reason, format!("{slow}; load kvm_intel or kvm_amd, or join the group kvm"))
        }
        (Ok(()), None) => Finding::good("kvm", "/dev/kvm opens; the first VM's kernel will be run under it as a probe"),
    }
}

fn data_directory(data: &Path) -> Finding {
    match Layout::create(data) {
        Ok(layout) => {
            let probe = layout.temporary().join(format!("doctor-{}", std::process::id()));
            let written = std::fs::write(&probe, b"x").and_then(|()| std::fs::remove_file(&probe));
            match written {
                Ok(()) => Finding::good("data", layout.data.display().to_string()),
                Err(error) => Finding::missing(
                    "data",
                    format!("{}: {error}", layout.data.display()),
                    "give another directory: --data DIR",
                ),
            }
        }
        Err(error) => Finding::missing(
            "data",
            error.to_string(),
            error.hint.unwrap_or_else(|| "give another directory: --data DIR".into()),
        ),
    }
}

/// What the settings say is elsewhere: whether it can be reached, and is not forgotten.
async fn elsewhere(data: &Path) -> Vec<Finding> {
    let failed = |check: &'static str, error: Error| {
        Finding::missing(check, error.to_string(), error.hint.unwrap_or_else(|| "see burgeon config show".into()))
    };
    let given = match environment::elsewhere(&environment::of_process) {
        Ok(given) => given,
        Err(error) => return vec![failed("settings", error)],
    };
    let layout = Layout { data: std::path::absolute(data).unwrap_or_else(|_| data.into()) };
    let work = tokio::task::spawn_blocking(move || {
        let mut findings: Vec<Finding> = given
            .check()
            .into_iter()
            .map(|(check, found, reached)| match reached {
                Ok(()) => Finding::good(check, found),
                Err(error) => failed(check, error),
            })
            .collect();
        // Before the first server there is nothing to compare with.
        if let Err(error) = given.settled(&layout.files())
            && error.kind != ErrorKind::Unavailable
        {
            findings.push(failed("settings", error));
        }
        findings
    });
    work.await.unwrap_or_else(|error| vec![failed("settings", Error::internal(format!("look at them: {error}")))])
}

fn space(data: &Path) -> Finding {
    let near = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(near) {
        Ok(about) => {
            let free = ByteSize(about.f_bavail * about.f_frsize);
            if free < ByteSize::gib(4) {
                Finding::lacking(
                    "space",
                    format!("{free} free"),
                    "an image build needs about 4 GiB: free some, or use --data DIR",
                )
            } else {
                Finding::good("space", format!("{free} free"))
            }
        }
        Err(error) => {
            Finding::lacking("space", format!("{}: {error}", near.display()), "check the directory's file system")
        }
    }
}

fn memory() -> Finding {
    let capacity = facts::capacity();
    let found = format!("{}, {} CPUs", capacity.memory, capacity.cpus);
    if capacity.memory < ByteSize::gib(2) {
        Finding::lacking("memory", found, "the examples need about 2 GiB: use fewer VMs or smaller profiles")
    } else {
        Finding::good("memory", found)
    }
}

fn cgroups() -> Finding {
    let remedy = "run burgeon serve as a systemd service with Delegate=yes (one is shipped); limits are shown as \"not enforced\" meanwhile";
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::lacking(
            "cgroups",
            "cgroup v2 is not mounted at /sys/fs/cgroup: VMs' limits are not enforced",
            remedy,
        );
    }
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default().to_string();
    let control = Path::new("/sys/fs/cgroup").join(path).join("cgroup.subtree_control");
    if rustix::fs::access(&control, rustix::fs::Access::WRITE_OK).is_ok() {
        Finding::good("cgroups", "cgroup v2, writable")
    } else {
        Finding::lacking(
            "cgroups",
            "cgroup v2, and this user may not make groups: VMs' limits are not enforced",
            remedy,
        )
    }
}

fn ptrace() -> Finding {
    match std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default().trim() {
        "" | "0" => Finding::good("ptrace scope", "not restricted"),
        "1" => Finding::good("ptrace scope", "1: only parents read their children's memory, as Burgeon does"),
        other => Finding::lacking(
            "ptrace scope",
            format!("{other}: no process may read another's memory"),
            "forking VMs will need it at 1: sysctl kernel.yama.ptrace_scope=1",
        ),
    }
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    if current < 1024 {
        Finding::lacking("open files", format!("limit {current}"), "raise it: ulimit -n 4096")
    } else {
        Finding::good("open files", format!("limit {current}"))
    }
}

fn user() -> Finding {
    if rustix::process::geteuid().is_root() {
        Finding::good("user", "root: each VM's QEMU runs as a user of its own")
    } else {
        Finding::good("user", "an ordinary user: QEMU runs as the same user, in its sandbox")
    }
}
