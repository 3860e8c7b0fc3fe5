//! `vm.json`: what a host process must know of a VM to find it again after its own death. Version 3.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use burgeon_api::{
    Error, Result,
    host::Launch,
    receipt::Receipt,
    substrate::Docked,
    vm::{Accelerator, Limit, Observed, Size},
};
use burgeon_qemu::{
    command::file,
    process::{self, Identity, RunAs, identity_of},
};
use serde::{Deserialize, Serialize};

pub(crate) const FORMAT: u32 = 3;
/// The oldest that reads: version 3 knows VMs that go on from captured states, which 2 has none of.
const OLDEST: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub format: u32,
    pub launch: Launch,
    pub accelerator: Accelerator,
    pub host_boot_id: String,
    /// Absent until QEMU has been started.
    pub process: Option<Identity>,
    /// The user that it runs as, where that is not ours. One that waited for this VM had its user before.
    #[serde(default)]
    pub user: Option<u32>,
    pub limits: Vec<Limit>,
    pub adoptions: u32,
    /// The number of the last start after the first; 0: it was started once.
    #[serde(default)]
    pub starts: u32,
    /// What it has shown of its identity, where it goes on from a captured state.
    #[serde(default)]
    pub receipt: Option<Receipt>,
    /// It is going on from a captured state, and has not shown its receipt yet.
    #[serde(default)]
    pub awaits_receipt: bool,
    /// It boots, and has not been given its environment, files and secrets yet.
    #[serde(default)]
    pub awaits_provisions: bool,
    /// What is kept of it, where it is a substrate or parked.
    #[serde(default)]
    pub docked: Option<Docked>,
    /// It is to go on from this snapshot of it. Set until it has: who finds this begins once more.
    #[serde(default)]
    pub rolling_back: Option<String>,
    /// How many QEMUs a user wants to wait for VMs that go on from it.
    #[serde(default)]
    pub standbys: Option<u32>,
    /// How much memory and how many CPUs it shall have, where that is not what it began with.
    #[serde(default)]
    pub size: Option<Size>,
    /// Its user has frozen its workload.
    #[serde(default)]
    pub frozen: bool,
    /// Its user has paused it: its CPUs stand, and its workload is frozen.
    #[serde(default)]
    pub paused: bool,
    /// How it ended, once it has.
    pub ended: Option<Observed>,
}

impl Record {
    /// Of a VM that is new.
    pub(crate) fn new(launch: Launch) -> Record {
        Record {
            format: FORMAT,
            launch,
            accelerator: Accelerator::Tcg,
            host_boot_id: process::host_boot_id(),
            process: None,
            user: None,
            limits: Vec::new(),
            adoptions: 0,
            starts: 0,
            receipt: None,
            awaits_receipt: false,
            awaits_provisions: false,
            docked: None,
            rolling_back: None,
            standbys: None,
            size: None,
            frozen: false,
            paused: false,
            ended: None,
        }
    }

    pub(crate) fn load(directory: &Path) -> Result<Record> {
        let path = directory.join(file::RECORD);
        let bytes = fs::read(&path).map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        let record: Record = serde_json::from_slice(&bytes)
            .map_err(|error| Error::damaged(format!("{} does not read: {error}", path.display())))?;
        if !(OLDEST..=FORMAT).contains(&record.format) {
            return Err(Error::refused(format!(
                "{} has format {}; this Burgeon knows {OLDEST} to {FORMAT}",
                path.display(),
                record.format
            )));
        }
        Ok(Record { format: FORMAT, ..record })
    }

    /// What it shall have.
    pub(crate) fn size(&self) -> Size {
        self.size.unwrap_or(self.launch.profile.size())
    }

    /// Whether its next start is no boot: it goes on from what is kept of it.
    pub(crate) fn goes_on(&self) -> bool {
        self.docked.is_some() || self.rolling_back.is_some()
    }

    /// It runs in this process from now on.
    pub(crate) fn of_process(self, process: Identity, run_as: RunAs, limits: Vec<Limit>) -> Record {
        let host_boot_id = process::host_boot_id();
        Record { host_boot_id, process: Some(process), user: run_as.user(), limits, ended: None, ..self }
    }

    /// Who its QEMU runs as.
    pub(crate) fn run_as(&self) -> RunAs {
        match (process::run_as(self.launch.id.uuid().as_u128(), self.accelerator), self.user) {
            (RunAs::User { group, .. }, Some(number)) => RunAs::User { number, group },
            (own, _) => own,
        }
    }

    /// Replaces the file as a whole: a reader sees the old record or the new one.
    pub(crate) fn store(&self, directory: &Path) -> Result<()> {
        let path = directory.join(file::RECORD);
        let new = directory.join("vm.json.new");
        let write = || -> std::io::Result<()> {
            let mut out = fs::File::create(&new)?;
            out.write_all(&serde_json::to_vec_pretty(self)?)?;
            out.sync_data()?;
            fs::rename(&new, &path)
        };
        write().map_err(|error| Error::io(format!("write {}", path.display()), &error))
    }
}

/// Finds a QEMU that runs in `directory` although the record does not name it: the host process died
/// between starting it and writing that down.
pub(crate) fn find_unrecorded(directory: &Path) -> Option<Identity> {
    let directory = fs::canonicalize(directory.join(file::QEMU_DIRECTORY)).ok()?;
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let cwd: PathBuf = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
        let identity = (cwd == directory).then(|| identity_of(pid)).flatten()?;
        identity.executable.file_name()?.to_str()?.starts_with("qemu-system").then_some(identity)
    })
}
