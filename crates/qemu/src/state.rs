//! The state of a machine's devices and CPUs, without its memory: saved from a paused QEMU, loaded into one that waits.
//!
//! QEMU's own way to save a machine writes its memory too. `xen-save-devices-state` leaves that out; in spite of its name
//! every QEMU has it. What it writes is read by `migrate-incoming`.

use std::{fs::File, os::fd::AsRawFd, time::Duration};

use burgeon_api::{Error, Result, profile::Profile};
use rustix::fs::MemfdFlags;
use serde_json::{Value, json};
use tokio::{sync::broadcast::error::RecvError, time::timeout};

use crate::{
    command::growth_length,
    growth,
    memory::{Block, Guest},
    process::Identity,
    qmp::Qmp,
};

/// How long loading may take. It is a matter of milliseconds.
const LOADED: Duration = Duration::from_secs(20);
/// QEMU's name for a descriptor that it is given.
const NAME: &str = "state";

/// The state of devices, in memory.
#[derive(Debug)]
pub struct Devices(File);

impl Devices {
    /// # Errors
    /// The system's.
    pub fn from_bytes(bytes: &[u8]) -> Result<Devices> {
        let devices = Devices::empty()?;
        std::os::unix::fs::FileExt::write_all_at(&devices.0, bytes, 0)
            .map_err(|error| Error::io("keep the devices' state", &error))?;
        Ok(devices)
    }

    fn empty() -> Result<Devices> {
        rustix::fs::memfd_create("burgeon-devices", MemfdFlags::CLOEXEC)
            .map(|file| Devices(file.into()))
            .map_err(|error| Error::io("keep the devices' state", &error.into()))
    }

    /// # Errors
    /// The system's.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        std::fs::read(self.path()).map_err(|error| Error::io("read the devices' state", &error))
    }

    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    /// Opened anew, so that several may read from the beginning.
    fn open(&self, write: bool) -> Result<File> {
        let opened = File::options().read(!write).write(write).open(self.path());
        opened.map_err(|error| Error::io("open the devices' state", &error))
    }

    /// Gives QEMU the place that it is going to save the state to. Ahead, because while a machine stands each word to QEMU
    /// counts.
    ///
    /// # Errors
    /// QEMU's.
    pub async fn prepare(qmp: &Qmp) -> Result<Saving> {
        let devices = Devices::empty()?;
        let file = devices.open(true)?;
        let given = qmp.execute_with("add-fd", Value::Null, Some(file.into()), LOADED).await?;
        Ok(Saving { devices, set: given["fdset-id"].clone() })
    }

    /// Loads the state into a machine that was started for it. It stays paused.
    ///
    /// # Errors
    /// `Refused` where the machine is another one; `Deadline`; `Unavailable` where QEMU ends over it.
    pub async fn load(&self, qmp: &Qmp) -> Result<()> {
        let mut events = qmp.subscribe();
        qmp.execute_with("getfd", json!({"fdname": NAME}), Some(self.open(false)?.into()), LOADED).await?;
        qmp.execute("migrate-incoming", json!({"uri": format!("fd:{NAME}")})).await?;
        let loaded = async {
            loop {
                match events.recv().await {
                    Ok(event) if event.name == "MIGRATION" => match event.data["status"].as_str() {
                        Some("completed") => return Ok(()),
                        Some("failed") => return Err(Error::refused("QEMU does not take the devices' state")),
                        _ => {}
                    },
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => {
                        return Err(Error::unavailable("QEMU ended while it loaded the devices' state"));
                    }
                }
            }
        };
        timeout(LOADED, loaded).await.map_err(|_| Error::deadline("the devices' state was not loaded in time"))?
    }
}

/// The state of devices, on its way to memory.
#[derive(Debug)]
pub struct Saving {
    devices: Devices,
    set: Value,
}

impl Saving {
    /// Saves the state of a machine that is paused.
    ///
    /// # Errors
    /// QEMU's, with the device that cannot be saved.
    pub async fn save(&self, qmp: &Qmp) -> Result<()> {
        let name = format!("/dev/fdset/{}", self.set);
        // Not live: else QEMU gives its disks away, as before a migration.
        qmp.execute("xen-save-devices-state", json!({"filename": name, "live": false})).await.map(drop)
    }

    /// Takes the place back, whether the state was saved or not.
    ///
    /// # Errors
    /// QEMU's.
    pub async fn end(self, qmp: &Qmp) -> Result<Devices> {
        qmp.execute("remove-fd", json!({"fdset-id": self.set})).await?;
        Ok(self.devices)
    }
}

/// Has a machine that waits for its state tell when that is loaded. Before [`Devices::load`].
///
/// # Errors
/// QEMU's.
pub async fn tell_when_loaded(qmp: &Qmp) -> Result<()> {
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    qmp.execute("migrate-set-capabilities", events).await.map(drop)
}

/// Opens the memory of a guest with this profile.
///
/// # Errors
/// QEMU's; those of [`Guest::open`].
pub async fn open_memory(qmp: &Qmp, process: &Identity, profile: &Profile) -> Result<Guest> {
    let main = Block { address: memory_address(qmp, 0).await?, length: profile.memory.bytes() };
    let growth = match growth_length(profile) {
        0 => None,
        length => Some(Block { address: memory_address(qmp, growth::begins_at(qmp).await?).await?, length }),
    };
    Guest::open(process, main, growth)
}

/// Where QEMU has what a guest has at an address, in its own address space.
///
/// # Errors
/// QEMU's; `Damaged` for an answer that is no address.
pub async fn memory_address(qmp: &Qmp, of_guest: u64) -> Result<u64> {
    let question = json!({"command-line": format!("gpa2hva {of_guest:#x}")});
    let answer = qmp.execute("human-monitor-command", question).await?;
    address(answer.as_str().unwrap_or_default())
        .ok_or_else(|| Error::damaged(format!("QEMU does not tell where the guest's memory is: {answer}")))
}

fn address(answer: &str) -> Option<u64> {
    let digits = answer.trim().rsplit_once(" is 0x")?.1;
    u64::from_str_radix(digits, 16).ok()
}

/// Pauses the machine: its CPUs stand, and nothing is on its way to a disk.
///
/// # Errors
/// QEMU's.
pub async fn pause(qmp: &Qmp) -> Result<()> {
    qmp.execute("stop", Value::Null).await.map(drop)
}

/// Lets it go on.
///
/// # Errors
/// QEMU's.
pub async fn go_on(qmp: &Qmp) -> Result<()> {
    qmp.execute("cont", Value::Null).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_qemus_words() {
        assert_eq!(address("Host virtual address for 0x0 (pc.ram) is 0x7fd7ebe00000\r\n"), Some(0x7fd7_ebe0_0000));
        assert_eq!(address("No memory is mapped at address 0x0\r\n"), None);
    }
}
