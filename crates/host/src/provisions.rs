//! What VMs are given before their workload runs ([`burgeon_api::provisions`]).
//!
//! ```text
//! Provide -> kept for the VM -> Launch: moved into its directory -> given to its guest
//! ```
//! Environment and files are in a file, and outlive this process. Secrets are in its memory only, until the VM is up and
//! never for longer than an hour: with them gone, the VM that was to have them fails by that reason.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use burgeon_api::{
    Error, Result, VmId,
    host::Launch,
    provisions::{Content, ProvidedFile, Provisions},
};
use burgeon_guest::{client::AgentClient, protocol::Provision};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{layout::Layout, record::Record, start::clock_ns};

/// In a VM's directory.
const FILE: &str = "provisions.json";
const FORMAT: u32 = 1;
/// Agents before it take none of this.
const REVISION: u16 = 3;
/// How long secrets are kept for a VM that does not come up.
const UNUSED: Duration = Duration::from_secs(3600);
/// Of all VMs, in bytes.
const MOST_SECRETS: usize = 64 << 20;
/// What was provided for a VM that nobody has launched since is nobody's.
const ABANDONED: Duration = Duration::from_secs(7 * 86_400);

/// What lasts of the provisions of a VM.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    format: u32,
    environment: BTreeMap<String, String>,
    files: Vec<ProvidedFile>,
    /// Their names.
    secrets: Vec<String>,
}

impl Kept {
    fn load(path: &Path) -> Result<Option<Kept>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("read {}", path.display()), &error)),
        };
        let damaged = |what: String| Error::damaged(format!("{} does not read: {what}", path.display()));
        let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if kept.format != FORMAT {
            return Err(damaged(format!("its format is {}, not {FORMAT}", kept.format)));
        }
        Ok(Some(kept))
    }

    /// Replaces the file as a whole.
    fn store(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            let mut out = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            out.write_all(&serde_json::to_vec(self)?)?;
            out.sync_data()?;
            fs::rename(&new, path)
        };
        write().map_err(|error| Error::io(format!("write {}", path.display()), &error))
    }
}

impl Default for Kept {
    fn default() -> Kept {
        Kept { format: FORMAT, environment: BTreeMap::new(), files: Vec::new(), secrets: Vec::new() }
    }
}

struct Held {
    secrets: BTreeMap<String, Content>,
    until: Instant,
}

impl Held {
    fn bytes(&self) -> usize {
        self.secrets.values().map(|content| content.0.len()).sum()
    }
}

/// Secrets that wait for their VMs.
#[derive(Default)]
pub(crate) struct Secrets(Mutex<HashMap<VmId, Held>>);

impl Secrets {
    fn table(&self) -> MutexGuard<'_, HashMap<VmId, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, vm: VmId, secrets: BTreeMap<String, Content>) -> Result<()> {
        let now = Instant::now();
        let mut table = self.table();
        table.retain(|id, held| held.until > now && *id != vm);
        if secrets.is_empty() {
            return Ok(());
        }
        let held = Held { secrets, until: now + UNUSED };
        let all: usize = table.values().map(Held::bytes).sum();
        if all + held.bytes() > MOST_SECRETS {
            return Err(Error::unavailable("too many secrets wait for VMs that have not come up")
                .with_hint("remove VMs that do not come up: burgeon ps"));
        }
        table.insert(vm, held);
        Ok(())
    }

    fn of(&self, vm: VmId) -> BTreeMap<String, Content> {
        let now = Instant::now();
        self.table().get(&vm).filter(|held| held.until > now).map(|held| held.secrets.clone()).unwrap_or_default()
    }

    pub(crate) fn forget(&self, vm: VmId) {
        self.table().remove(&vm);
    }
}

/// Keeps what a VM is to be given that will be launched. What was kept for it before is replaced.
///
/// # Errors
/// `Invalid`, by name; `Unavailable` where too many secrets wait.
pub(crate) fn keep(layout: &Layout, secrets: &Secrets, vm: VmId, provisions: Provisions) -> Result<()> {
    provisions.check()?;
    let path = layout.provisions(vm);
    if provisions.is_empty() {
        secrets.forget(vm);
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", path.display()), &error))
            }
            _ => Ok(()),
        };
    }
    let Provisions { environment, files, secrets: values } = provisions;
    let kept = Kept { format: FORMAT, environment, files, secrets: values.keys().cloned().collect() };
    secrets.hold(vm, values)?;
    kept.store(&path)
}

/// Moves what was kept for a VM into its new directory. Of the VM whose memory it goes on from it has the environment, which
/// is in that memory, also when it boots one day.
///
/// # Errors
/// The system's; `Damaged` for what is kept and does not read.
pub(crate) fn move_in(layout: &Layout, launch: &Launch, directory: &Path) -> Result<()> {
    let (from, to) = (layout.provisions(launch.id), directory.join(FILE));
    let source = launch.source.as_ref().filter(|_| launch.begin.is_activation());
    let inherited = match source {
        Some(source) => Kept::load(&layout.vm(source.vm).join(FILE))?.map(|kept| kept.environment),
        None => None,
    };
    if let Some(inherited) = inherited.filter(|environment| !environment.is_empty()) {
        let mut own = Kept::load(&from)?.unwrap_or_default();
        for (name, value) in inherited {
            own.environment.entry(name).or_insert(value);
        }
        own.store(&from)?;
    }
    match fs::rename(from, to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("move what the VM is to be given into its directory", &error))
        }
        _ => Ok(()),
    }
}

/// Removes what was kept for VMs that nobody has launched for long.
pub(crate) fn sweep(layout: &Layout) {
    for entry in fs::read_dir(layout.all_provisions()).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|about| about.modified()).ok().and_then(|since| since.elapsed().ok());
        if age.is_some_and(|age| age > ABANDONED)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, "what was provided for a VM that is not there takes room");
        }
    }
}

/// Whether the VM in this directory is given something when it boots.
pub(crate) fn are_there(directory: &Path) -> bool {
    directory.join(FILE).exists()
}

/// Whether secrets are among it.
pub(crate) fn have_secrets(directory: &Path) -> bool {
    Kept::load(&directory.join(FILE)).is_ok_and(|kept| kept.is_some_and(|kept| !kept.secrets.is_empty()))
}

/// What a VM is given now: all of it where it has never run; later its environment, and files where no disk has them.
///
/// # Errors
/// `Refused` where its secrets are gone; `Damaged` for a file that does not read.
pub(crate) fn of(secrets: &Secrets, directory: &Path, record: &Record) -> Result<Provisions> {
    let Some(Kept { environment, files, secrets: names, .. }) = Kept::load(&directory.join(FILE))? else {
        return Ok(Provisions::default());
    };
    if record.starts > 0 {
        let files = if record.launch.image.disk.is_some() { Vec::new() } else { files };
        return Ok(Provisions { environment, files, secrets: BTreeMap::new() });
    }
    let values = secrets.of(record.launch.id);
    if names.iter().any(|name| !values.contains_key(name)) {
        let name = &record.launch.name;
        return Err(Error::refused(format!(
            "the secrets of VM {name} were lost with the host process, or not used for an hour"
        ))
        .with_hint("remove the VM, and make it again with them"));
    }
    Ok(Provisions { environment, files, secrets: values })
}

fn check_agent(agent: &AgentClient, provisions: &Provisions) -> Result<()> {
    if provisions.is_empty() || agent.hello().map_or(1, |about| about.revision()) >= REVISION {
        return Ok(());
    }
    Err(Error::refused("the guest's agent is older than this Burgeon, and takes no environment, files or secrets")
        .with_hint("make the substrate again, or stop the VM, start it and fork it then"))
}

async fn put_files(agent: &AgentClient, provisions: &Provisions) -> Result<()> {
    if provisions.files.is_empty() {
        return Ok(());
    }
    // They bear the time of now, also in a guest that has been away.
    agent.clock(clock_ns()).await?;
    for file in &provisions.files {
        let put = async {
            if let Some((directory, _)) = file.path.rsplit_once('/').filter(|(directory, _)| !directory.is_empty()) {
                agent.make_directory(directory.as_bytes(), 0o755).await?;
            }
            let size = file.content.0.len() as u64;
            agent.put(file.path.as_bytes(), file.mode, size, file.content.0.as_slice()).await
        };
        put.await.map_err(|error: Error| error.context(format!("give the guest the file {}", file.path)))?;
    }
    Ok(())
}

/// Environment and secrets, in the words of the protocol.
fn words(provisions: &Provisions) -> Vec<Provision> {
    let Provisions { environment, secrets, .. } = provisions;
    let variables: Vec<_> =
        environment.iter().map(|(name, value)| (name.clone().into_bytes(), value.clone().into_bytes())).collect();
    let environment = (!variables.is_empty()).then_some(Provision::Environment(variables));
    let secret = |(name, content): (&String, &Content)| Provision::Secret {
        name: name.clone().into_bytes(),
        content: content.0.clone(),
    };
    environment.into_iter().chain(secrets.iter().map(secret)).collect()
}

/// Gives a guest what it is to have. Where its workload is frozen, it takes environment and secrets with its next identity.
///
/// # Errors
/// `Refused` for an agent that is too old; the guest's.
pub(crate) async fn give(agent: &AgentClient, provisions: &Provisions) -> Result<()> {
    check_agent(agent, provisions)?;
    put_files(agent, provisions).await?;
    let words = words(provisions);
    if words.is_empty() {
        return Ok(());
    }
    agent.provide(words).await.map_err(|error| error.context("give the guest its environment and secrets"))
}

#[cfg(test)]
mod tests {
    use burgeon_api::host::{Begin, Source};

    use super::*;

    fn secret(bytes: usize) -> BTreeMap<String, Content> {
        [("key".to_string(), Content(vec![42; bytes]))].into()
    }

    fn record(vm: VmId, starts: u32) -> Record {
        serde_json::from_value(serde_json::json!({
            "format": 3, "accelerator": "tcg", "host_boot_id": "", "process": null, "limits": [], "adoptions": 0,
            "starts": starts, "ended": null,
            "launch": {
                "id": vm, "name": "web", "image_directory": "/nowhere", "profile": {},
                "image": {
                    "format": 3, "name": "tiny", "boot": "agent", "digest": "", "recipe": "", "kernel_release": "",
                    "disk": null, "modules": [], "kernel_parameters": [], "init": "", "created_s": 0,
                },
            },
        }))
        .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn secrets_are_in_no_file_and_gone_with_the_process_or_the_hour() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        let (vm, secrets) = (VmId::generate(), Secrets::default());
        let environment: BTreeMap<_, _> = [("A".to_string(), "b".to_string())].into();
        let all = Provisions { environment, secrets: secret(9), ..Provisions::default() };
        keep(&layout, &secrets, vm, all.clone()).unwrap();
        let own = layout.vm(vm);
        fs::create_dir_all(&own).unwrap();
        let launch = record(vm, 0).launch;
        move_in(&layout, &launch, &own).unwrap();
        move_in(&layout, &launch, &own).unwrap();
        let text = fs::read_to_string(own.join(FILE)).unwrap();
        assert!(text.contains("\"key\"") && !text.contains("KioqKioq") && !text.contains("42,42"), "{text}");
        assert!(!layout.provisions(vm).exists() && are_there(&own) && have_secrets(&own));

        assert_eq!(of(&secrets, &own, &record(vm, 0)).unwrap(), all);
        let lost = of(&Secrets::default(), &own, &record(vm, 0)).unwrap_err();
        assert!(lost.message.contains("secrets of VM web were lost with the host process"), "{lost}");
        let again = of(&Secrets::default(), &own, &record(vm, 1)).unwrap();
        assert_eq!(again, Provisions { secrets: BTreeMap::new(), ..all.clone() });
        tokio::time::advance(UNUSED).await;
        assert!(of(&secrets, &own, &record(vm, 0)).is_err());

        // A fork has the environment of its source, and no secrets.
        let fork = VmId::generate();
        let mut of_fork = record(fork, 0);
        of_fork.launch.begin = Begin::Fork;
        of_fork.launch.source = Some(Source { vm, snapshot: None });
        let more: BTreeMap<_, _> = [("B".to_string(), "c".to_string())].into();
        fs::create_dir_all(layout.vm(fork)).unwrap();
        keep(&layout, &secrets, fork, Provisions { environment: more, ..Provisions::default() }).unwrap();
        move_in(&layout, &of_fork.launch, &layout.vm(fork)).unwrap();
        let has = of(&secrets, &layout.vm(fork), &of_fork).unwrap();
        assert_eq!((has.environment["A"].as_str(), has.environment["B"].as_str()), ("b", "c"));
        assert!(has.secrets.is_empty() && !have_secrets(&layout.vm(fork)));

        // What is taken back is gone.
        keep(&layout, &secrets, vm, all).unwrap();
        keep(&layout, &secrets, vm, Provisions::default()).unwrap();
        assert!(!layout.provisions(vm).exists() && secrets.of(vm).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn secrets_that_wait_are_bounded_and_make_room_in_time() {
        let secrets = Secrets::default();
        for _ in 0..MOST_SECRETS >> 20 {
            secrets.hold(VmId::generate(), secret(1 << 20)).unwrap();
        }
        let last = VmId::generate();
        assert!(secrets.hold(last, secret(1)).unwrap_err().message.contains("too many secrets"));
        tokio::time::advance(UNUSED).await;
        secrets.hold(last, secret(1)).unwrap();
        assert_eq!(secrets.table().len(), 1);
    }
}
