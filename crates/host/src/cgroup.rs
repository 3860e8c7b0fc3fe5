//! Limits by cgroup v2, where the machine lets us make groups. Where it does not, the limits say so.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burgeon_api::{profile::Profile, vm::Limit};

const ROOT: &str = "/sys/fs/cgroup";
/// Where Burgeon's own processes are; VMs have groups beside it.
const LEAF: &str = "burgeon-server";
/// QEMU's own memory beside the guest's: code, translation cache, device buffers.
const OVERHEAD: u64 = 384 << 20;

/// The group below which every VM gets one of its own, or the reason why there is none.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    base: Result<PathBuf, String>,
}

impl Groups {
    /// Makes this process's own group a parent: the process moves into a leaf, and the controllers
    /// are handed down. Only a delegated group (or root) allows that.
    pub(crate) fn prepare() -> Groups {
        Groups { base: prepare(Path::new(ROOT), &fs::read_to_string("/proc/self/cgroup").unwrap_or_default()) }
    }

    /// Puts a process under its profile's limits, and tells which of them hold.
    pub(crate) fn limit(&self, name: &str, pid: u32, profile: &Profile) -> Vec<Limit> {
        // A guest can use all that its machine has, whatever it has been given.
        let cpu_percent = profile.cpu_percent.unwrap_or(profile.most_cpus() * 100);
        let memory = profile.most_memory().bytes() + OVERHEAD;
        let wanted = [
            ("memory", format!("{} bytes", memory), "memory.max", memory.to_string()),
            (
                "cpu",
                format!("{cpu_percent} % of one CPU"),
                "cpu.max",
                format!("{} 100000", u64::from(cpu_percent) * 1000),
            ),
            ("processes", "128 threads".to_string(), "pids.max", (128 + profile.most_cpus()).to_string()),
        ];
        let entered = self.base.clone().and_then(|base| {
            let group = base.join(name);
            fs::create_dir_all(&group).map_err(|error| format!("create a cgroup: {error}"))?;
            fs::write(group.join("cgroup.procs"), pid.to_string())
                .map_err(|error| format!("enter a cgroup: {error}"))?;
            Ok(group)
        });
        wanted
            .into_iter()
            .map(|(limit, value, file, text)| {
                let outcome = entered
                    .as_ref()
                    .map_err(Clone::clone)
                    .and_then(|group| fs::write(group.join(file), text).map_err(|error| format!("{file}: {error}")));
                let enforcement = match outcome {
                    Ok(()) => "enforced".to_string(),
                    Err(reason) => format!("not enforced: {reason}"),
                };
                Limit { name: limit.to_string(), value, enforcement }
            })
            .collect()
    }

    /// Removes a VM's group once its process has ended.
    pub(crate) fn remove(&self, name: &str) {
        if let Ok(base) = &self.base
            && let Err(error) = fs::remove_dir(base.join(name))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::debug!(%error, name, "a cgroup stays");
        }
    }
}

/// The group of this process, or its parent when it is in the leaf already.
fn own_group(root: &Path, own: &str) -> Result<PathBuf, String> {
    if !root.join("cgroup.controllers").exists() {
        return Err("cgroup v2 is not mounted at /sys/fs/cgroup".to_string());
    }
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or("this process is in no cgroup v2")?;
    let path = path.strip_suffix(LEAF).unwrap_or(path);
    Ok(root.join(path.trim_end_matches('/')))
}

/// Moves this process into the leaf, so that controllers can be handed to its siblings: cgroup v2
/// allows that only to groups without processes.
fn enter_leaf(group: &Path) -> Result<(), String> {
    let leaf = group.join(LEAF);
    fs::create_dir_all(&leaf).map_err(|error| describe("create a cgroup", &error))?;
    fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())
        .map_err(|error| describe("move into a cgroup", &error))
}

fn describe(action: &str, error: &std::io::Error) -> String {
    format!("{action}: {error} (a delegated cgroup is needed)")
}

fn prepare(root: &Path, own: &str) -> Result<PathBuf, String> {
    let group = own_group(root, own)?;
    enter_leaf(&group)?;
    fs::write(group.join("cgroup.subtree_control"), "+memory +cpu +pids")
        .map_err(|error| describe("hand down controllers", &error))?;
    Ok(group)
}

/// For the process that starts host and control: both then begin in the leaf, out of the VMs' way.
/// Where there is no group to divide, nothing happens; the host process says so with each limit.
pub(crate) fn separate() {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if let Err(reason) = own_group(Path::new(ROOT), &own).and_then(|group| enter_leaf(&group)) {
        tracing::debug!(%reason, "no cgroup of its own");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_enforced_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let groups = Groups { base: prepare(directory.path(), "0::/user\n") };
        let limits = groups.limit("x", 1, &Profile::default());
        assert_eq!(limits.len(), 3);
        assert!(limits.iter().all(|limit| limit.enforcement.starts_with("not enforced: cgroup v2 is not mounted")));
    }

    #[test]
    fn limits_are_written_where_groups_can_be_made() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.controllers"), "memory cpu pids").unwrap();
        fs::create_dir(directory.path().join("mine")).unwrap();
        let groups = Groups { base: prepare(directory.path(), "0::/mine\n") };
        let limits = groups.limit("vm", 1, &Profile { cpus: 2, ..Profile::default() });
        assert!(limits.iter().all(|limit| limit.enforcement == "enforced"), "{limits:?}");
        assert_eq!(fs::read_to_string(directory.path().join("mine/vm/cpu.max")).unwrap(), "200000 100000");
        // A host process that was started inside the leaf divides the group above it.
        let again = prepare(directory.path(), "0::/mine/burgeon-server\n").unwrap();
        assert_eq!(again, directory.path().join("mine"));
    }
}
