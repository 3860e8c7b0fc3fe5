//! Disks of a VM that runs: plugging in, unplugging and growing, by QEMU's monitor; and what the guest's agent can say
//! of them. A VM that has stopped changes only what its next start finds.

use std::{sync::Arc, time::Duration};

use burgeon_api::{
    Error, Result, VmId,
    disk::DiskChanged,
    exec::{ExecSpec, Exit},
    host::DiskRequest,
    substrate::Recipe,
};
use burgeon_guest::client::AgentClient;
use burgeon_qemu::{
    command::{disk_device, disk_node, node_name},
    memory::Base,
    qmp::Qmp,
};
use serde_json::json;
use tokio::{
    sync::OwnedMutexGuard,
    time::{Instant, sleep, timeout},
};

use crate::{
    disks::{Begin, Disks, Key},
    record::Record,
    vm,
};

/// How long a guest may take to let go of a disk.
const UNPLUG: Duration = Duration::from_secs(15);
/// For a small command in the guest.
const GUEST: Duration = Duration::from_secs(30);
/// For a substrate's warm-up, and until its ready command succeeds; and between two tries of that.
const WARM: Duration = Duration::from_secs(900);
const READY: Duration = Duration::from_secs(300);
const AGAIN: Duration = Duration::from_millis(100);
/// How long a guest may take to find a new disk, before its name is left out of the answer.
const APPEARS: Duration = Duration::from_secs(3);

/// A VM whose disks may be changed, or that may be captured: nobody else does, and it neither starts nor is removed,
/// while this is held.
pub(crate) struct Gate {
    pub(crate) _guard: OwnedMutexGuard<()>,
    pub(crate) record: Record,
    /// Where it runs.
    pub(crate) monitor: Option<Qmp>,
    pub(crate) agent: Option<AgentClient>,
    /// That of a paused VM, which cannot answer.
    pub(crate) resting_agent: Option<AgentClient>,
    /// What its memory began with, where that is known.
    pub(crate) base: Option<Arc<Base>>,
}

/// Runs work that waits for files on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal(format!("change a disk: {error}")))?
}

impl Gate {
    /// # Errors
    /// As the request needs; then the disks are as before.
    pub(crate) async fn change(self, disks: &Arc<Disks>, vm: VmId, request: DiskRequest) -> Result<DiskChanged> {
        if self.record.paused && !matches!(request, DiskRequest::Remove { .. }) {
            return Err(vm::is_paused(&self.record.launch.name));
        }
        match request {
            DiskRequest::Attach { disk, size, map } => {
                let begin = match (map, size) {
                    (Some(map), size) => Begin::Of { map: map.parse()?, size },
                    (None, Some(size)) => Begin::Empty { size },
                    (None, None) => Begin::There,
                };
                self.attach(disks, (vm, disk), begin).await
            }
            DiskRequest::Detach { disk, force } => self.detach(disks, (vm, disk), force).await,
            DiskRequest::Grow { disk, size } => self.grow(disks, (vm, disk), size).await,
            DiskRequest::Remove { disk } => {
                let disks = disks.clone();
                blocking(move || disks.remove(&(vm, disk))).await.map(|()| DiskChanged::default())
            }
            DiskRequest::RollBack { disk, snapshot } => {
                if self.monitor.is_some() {
                    let name = &self.record.launch.name;
                    return Err(Error::conflict(format!("VM {name} runs, and would not notice that its disk changed"))
                        .with_hint(format!("stop it first: burgeon vm stop {name}")));
                }
                burgeon_api::name::check("snapshot", &snapshot)?;
                let disks = disks.clone();
                blocking(move || disks.roll_back(&(vm, disk), &snapshot)).await.map(|()| DiskChanged::default())
            }
            other => Err(Error::internal(format!("{other:?} changes no disk"))),
        }
    }

    fn owner(&self) -> Option<u32> {
        self.record.run_as().user()
    }

    async fn attach(self, disks: &Arc<Disks>, key: Key, begin: Begin) -> Result<DiskChanged> {
        let (of_begin, of_key) = (disks.clone(), key.clone());
        let (attached, is_new) = blocking(move || of_begin.begin_attach(&of_key, begin)).await?;
        // Written down first: a process that dies behind this line finds a disk that is to be served, and QEMU's next
        // start has it. The other way round, a guest could have a disk that nobody serves.
        let (of_record, of_key, of_attached, owner) = (disks.clone(), key.clone(), attached.clone(), self.owner());
        let serve = self.monitor.is_some();
        let outcome = blocking(move || {
            of_record.set_attached(of_key.0, &of_key.1, Some(of_attached))?;
            if serve { of_record.serve(&of_key, owner) } else { Ok(()) }
        })
        .await;
        let plugged = match (outcome, &self.monitor) {
            (Ok(()), Some(monitor)) => plug_in(monitor, &key.1, attached.port).await,
            (outcome, _) => outcome,
        };
        if let Err(error) = plugged {
            let disks = disks.clone();
            blocking(move || {
                disks.close(&key);
                disks.set_attached(key.0, &key.1, None)?;
                if is_new { disks.remove(&key) } else { Ok(()) }
            })
            .await?;
            return Err(error);
        }
        let mut changed = DiskChanged::default();
        match (&self.monitor, &self.agent) {
            (None, _) => changed.notes.push("the VM has stopped; it has the disk when it is started".into()),
            (Some(_), Some(agent)) => {
                changed.device = device(agent, &key.1).await;
                if changed.device.is_none() {
                    changed.notes.push(format!(
                        "it is plugged in, and the guest has not shown it within {} s; it needs the driver virtio_blk",
                        APPEARS.as_secs()
                    ));
                }
            }
            (Some(_), None) => {}
        }
        Ok(changed)
    }

    async fn detach(self, disks: &Arc<Disks>, key: Key, force: bool) -> Result<DiskChanged> {
        let attached = disks.attached(key.0)?;
        if !attached.iter().any(|attached| attached.disk == key.1) {
            return Err(Error::not_found(format!("no disk {} is plugged into the VM", key.1)));
        }
        let mut changed = DiskChanged::default();
        if let Some(agent) = &self.agent
            && !force
        {
            match mounted(agent, &key.1).await {
                Ok(None) => {}
                Ok(Some(device)) => {
                    return Err(Error::conflict(format!("the guest has a file system of {device} mounted"))
                        .with_hint("unmount it first; --force pulls the disk out from under it"));
                }
                Err(error) => changed.notes.push(format!("the guest was not asked whether it is mounted: {error}")),
            }
        }
        if let Some(monitor) = &self.monitor {
            unplug(monitor, &key.1).await?;
        }
        let disks = disks.clone();
        blocking(move || {
            disks.close(&key);
            disks.set_attached(key.0, &key.1, None)
        })
        .await?;
        Ok(changed)
    }

    async fn grow(self, disks: &Arc<Disks>, key: Key, size: u64) -> Result<DiskChanged> {
        let (of_disk, of_key) = (disks.clone(), key.clone());
        blocking(move || of_disk.grow(&of_key, size)).await?;
        let is_plugged = key.1 == burgeon_api::disk::ROOT || disks.attached(key.0)?.iter().any(|one| one.disk == key.1);
        let mut changed = DiskChanged::default();
        if self.monitor.is_none() {
            changed.notes.push("the VM has stopped; its next start finds the new size".into());
        }
        if let Some(monitor) = self.monitor.as_ref().filter(|_| is_plugged) {
            disks.reconnect(&key);
            let node = node_name(&key.1);
            // Any request makes QEMU connect again, and so learn the new size; only then can it be told to use it.
            let flush = json!({"command-line": format!("qemu-io {node} \"flush\"")});
            monitor.execute("human-monitor-command", flush).await?;
            monitor.execute("block_resize", json!({"node-name": node, "size": size})).await?;
            match &self.agent {
                None => {
                    changed.notes.push("the guest sees the new size; what is on the disk has yet to be grown".into())
                }
                Some(agent) => {
                    if let Err(error) = agent.grow().await {
                        let note = format!("the guest sees the new size; its file system did not grow: {error}");
                        changed.notes.push(note);
                    }
                }
            }
        }
        Ok(changed)
    }
}

async fn plug_in(monitor: &Qmp, disk: &str, port: u8) -> Result<()> {
    monitor.execute("blockdev-add", disk_node(disk)).await?;
    let plugged = monitor.execute("device_add", disk_device(disk, port)).await;
    if plugged.is_err() {
        monitor.execute("blockdev-del", json!({"node-name": node_name(disk)})).await?;
    }
    plugged.map(drop)
}

/// Asks the guest to let go of a disk, and waits until it has.
async fn unplug(monitor: &Qmp, disk: &str) -> Result<()> {
    let node = node_name(disk);
    let mut events = monitor.subscribe();
    match monitor.execute("device_del", json!({"id": node})).await {
        // It is gone already: an earlier try came too late for its own answer.
        Err(error) if error.message.contains("not found") => {}
        asked => {
            asked?;
            let deleted = async {
                loop {
                    match events.recv().await {
                        Ok(event) if event.name == "DEVICE_DELETED" && event.data["device"] == node => return Ok(()),
                        Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                        Err(_) => return Err(Error::unavailable("the VM has ended")),
                    }
                }
            };
            timeout(UNPLUG, deleted).await.map_err(|_| {
                Error::deadline(format!("the guest does not let go of disk {disk} within {} s", UNPLUG.as_secs()))
                    .with_hint("it may be starting still; try again, or stop the VM first")
            })??;
        }
    }
    match monitor.execute("blockdev-del", json!({"node-name": node})).await {
        Err(error) if !error.message.contains("ind node") => Err(error),
        _ => Ok(()),
    }
}

/// Runs a shell's words in the guest: its exit code and what it said.
async fn ask(agent: &AgentClient, script: &str, argument: &str) -> Result<(Option<i32>, String)> {
    ask_within(agent, script, argument, GUEST).await
}

async fn ask_within(
    agent: &AgentClient,
    script: &str,
    argument: &str,
    patience: Duration,
) -> Result<(Option<i32>, String)> {
    let words = ["sh", "-c", script, "sh", argument].map(String::from).to_vec();
    let spec = ExecSpec {
        argv: words,
        env: [("PATH".to_string(), "/usr/sbin:/usr/bin:/sbin:/bin".to_string())].into(),
        cwd: Some("/".into()),
        user: None,
        terminal: None,
        time_limit_ms: u64::try_from(patience.as_millis()).ok(),
    };
    let asked = async {
        let (said, wrong, exit) = agent.exec(spec).await?.output.collect(4096).await;
        let said = if said.is_empty() { wrong } else { said };
        let code = match exit {
            Exit::Code { code } => Some(code),
            _ => None,
        };
        Ok((code, String::from_utf8_lossy(&said).trim().to_string()))
    };
    // The guest keeps the time too, and ends the command.
    let late = || Error::deadline(format!("the guest did not answer within {} s", patience.as_secs()));
    timeout(patience + GUEST, asked).await.map_err(|_| late())?
}

impl Gate {
    /// Has the guest made ready to be captured, as its recipe says.
    ///
    /// # Errors
    /// What its commands say.
    pub(crate) async fn warm_up(&self, recipe: &Recipe) -> Result<()> {
        let name = &self.record.launch.name;
        let agent = self.agent.as_ref().ok_or_else(|| Error::unavailable(format!("VM {name} has no agent")))?;
        warm_up(agent, recipe).await
    }
}

async fn warm_up(agent: &AgentClient, recipe: &Recipe) -> Result<()> {
    let shown = |said: &str| burgeon_api::path_text::printable(said.get(..400).unwrap_or(said));
    if let Some(warm) = &recipe.warm {
        match ask_within(agent, warm, "", WARM).await? {
            (Some(0), _) => {}
            (code, said) => {
                let code = code.map_or("a signal, or when its time was up".to_string(), |code| format!("code {code}"));
                return Err(Error::refused(format!("the warm-up ended with {code}: {}", shown(&said))));
            }
        }
    }
    let Some(ready) = &recipe.ready else { return Ok(()) };
    let until = Instant::now() + READY;
    loop {
        let said = match ask(agent, ready, "").await? {
            (Some(0), _) => return Ok(()),
            (_, said) => said,
        };
        if Instant::now() > until {
            let seconds = READY.as_secs();
            return Err(Error::deadline(format!("the guest was not ready within {seconds} s: {}", shown(&said))));
        }
        sleep(AGAIN).await;
    }
}

/// A name that a guest tells is shown to people.
fn plain(name: &str) -> Option<String> {
    (!name.is_empty() && name.len() <= 32 && name.bytes().all(|byte| byte.is_ascii_alphanumeric()))
        .then(|| format!("/dev/{name}"))
}

/// The guest's name for a disk, once it has found it.
async fn device(agent: &AgentClient, disk: &str) -> Option<String> {
    const FIND: &str = r#"for d in /sys/block/*; do
        [ "$(cat $d/serial 2>/dev/null)" = "$1" ] && echo ${d##*/} && exit 0; done; exit 1"#;
    let until = Instant::now() + APPEARS;
    loop {
        match ask(agent, FIND, disk).await {
            Ok((Some(0), name)) => return plain(&name),
            Ok((Some(1), _)) if Instant::now() < until => sleep(Duration::from_millis(30)).await,
            _ => return None,
        }
    }
}

/// The device of a disk of which the guest has something mounted.
async fn mounted(agent: &AgentClient, disk: &str) -> Result<Option<String>> {
    const LOOK: &str = r#"for d in /sys/block/*; do
        [ "$(cat $d/serial 2>/dev/null)" = "$1" ] || continue
        grep -q "^/dev/${d##*/}" /proc/mounts && echo ${d##*/} && exit 7; done; exit 0"#;
    match ask(agent, LOOK, disk).await? {
        (Some(0), _) => Ok(None),
        (Some(7), name) => Ok(Some(plain(&name).unwrap_or_else(|| "the disk".into()))),
        (code, _) => Err(Error::unavailable(format!("its shell ended with {code:?}"))),
    }
}

/// Of a disk whose guest is paused, and cannot be asked.
pub(crate) const UNSYNCED: &str = "the VM is paused, and was not synced: its disk is as after a power cut";

/// Brings what the guest has in memory to its disks, as far as its agent can have that done. Without it, what follows
/// sees the disks as after a power cut, which file systems are made for.
pub(crate) async fn sync_guest(agent: &AgentClient) -> Option<String> {
    match ask(agent, "exec sync", "").await {
        Ok((Some(0), _)) => None,
        Ok((code, _)) => Some(format!("the guest's sync ended with {code:?}: its disk is as after a power cut")),
        Err(error) => Some(format!("the guest was not synced ({error}): its disk is as after a power cut")),
    }
}
