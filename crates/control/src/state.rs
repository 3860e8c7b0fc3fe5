//! What every part of the control process may use.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use burgeon_api::{
    Error, Result, VmId,
    host::{Begin, Launch},
    image::Boot,
    profile::Profile,
    vm::{HostVm, Intent, Observed, VmView},
};
use burgeon_host::layout::Layout;
use burgeon_plan::vm::is_start_awaited;
use burgeon_store::{
    chunk_store::ChunkStore,
    meta::{Damaged, Meta, VmRow},
};
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{host_client::HostClient, life::Uses, pipelines::Pipelines};

pub(crate) type Shared = Arc<State>;

pub(crate) struct State {
    pub(crate) layout: Layout,
    pub(crate) meta: Meta,
    pub(crate) store: Arc<ChunkStore>,
    pub(crate) host: HostClient,
    pub(crate) version: String,
    pub(crate) settings: Vec<burgeon_api::http::Setting>,
    /// Wakes the reconcile loop.
    pub(crate) kick: Notify,
    /// What the host last said; the reconcile loop writes it.
    pub(crate) seen: watch::Sender<Seen>,
    pub(crate) pipelines: Pipelines,
    /// VMs of image builds: on the host, and in no row of meta.
    pub(crate) temporary: watch::Sender<BTreeSet<VmId>>,
    /// VMs that are just being forked or rolled back: others do nothing about them.
    pub(crate) forking: watch::Sender<BTreeSet<VmId>>,
    /// Open client connections and long work, for the idle exit.
    pub(crate) busy: Arc<AtomicUsize>,
    /// Which VMs are used.
    pub(crate) uses: Uses,
    /// One permit: for who collects or checks the whole store.
    pub(crate) store_work: Arc<tokio::sync::Semaphore>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// The host as it was last seen. Counts up with every look.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) looks: u64,
    pub(crate) unreachable: Option<String>,
    pub(crate) vms: Vec<HostVm>,
}

/// Counts as a connection for as long as it lives.
pub(crate) struct Busy(Arc<AtomicUsize>);

impl Busy {
    pub(crate) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Busy(count.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Seconds since 1970. The only place where the control process reads the wall clock.
#[expect(clippy::disallowed_methods, reason = "the shell that reads the clock")]
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl State {
    /// A VM's row with what the host says of it.
    pub(crate) fn view(&self, row: VmRow) -> VmView {
        let seen = self.seen.borrow();
        let on_host = seen.vms.iter().find(|vm| vm.id == row.id).cloned();
        let observed = match (&on_host, &seen.unreachable) {
            (Some(vm), None) if !is_start_awaited(row.starts, vm) => vm.observed.clone(),
            (_, Some(reason)) if row.launched && !burgeon_plan::vm::is_over(&row.observed) => {
                Observed::Unknown { reason: reason.clone() }
            }
            _ => row.observed.clone(),
        };
        VmView {
            id: row.id,
            name: row.name,
            image: row.image,
            profile: row.profile,
            intent: row.intent,
            observed,
            pipeline: row.pipeline.map(|id| id.to_string()),
            version: row.version,
            starts: row.starts,
            created_s: row.created_s,
            life: row.life,
            is_substrate: row.substrate.is_some(),
            on_host,
        }
    }

    /// A VM whose row does not read: what can be told of it all the same.
    pub(crate) fn damaged_view(&self, row: Damaged) -> VmView {
        let Damaged { id, name, reason } = row;
        let known: Option<VmId> = id.parse().ok();
        let on_host = known.and_then(|id| self.seen.borrow().vms.iter().find(|vm| vm.id == id).cloned());
        VmView {
            id: known.unwrap_or(VmId::NONE),
            image: String::new(),
            profile: Profile::default(),
            intent: Intent::Running,
            observed: Observed::Damaged {
                reason: format!("its row, id {id}, does not read: {reason}; burgeon vm rm {id} removes it"),
            },
            name: if name.is_empty() { id } else { name },
            pipeline: None,
            version: 0,
            starts: 0,
            created_s: 0,
            life: burgeon_api::life::Life::default(),
            is_substrate: false,
            on_host,
        }
    }

    /// All VMs as clients see them, those whose rows do not read at the end.
    ///
    /// # Errors
    /// Meta's.
    pub(crate) async fn views(&self) -> Result<Vec<VmView>> {
        let (rows, damaged) = self.meta.all_vms().await?;
        let good = rows.into_iter().map(|row| self.view(row));
        Ok(good.chain(damaged.into_iter().map(|row| self.damaged_view(row))).collect())
    }

    /// Checks and records a new VM; the reconcile loop starts it.
    ///
    /// # Errors
    /// The profile's or the image's fault, or a name that is taken.
    pub(crate) async fn create_vm(&self, row: VmRow) -> Result<VmRow> {
        burgeon_api::name::check("VM", &row.name)?;
        check_profile(&row.profile)?;
        let image = match &row.source {
            Some(source) => source.image.clone(),
            None => self.image(row.image.clone()).await?,
        };
        if let (Some(wish), Some(has)) = (row.profile.disk, image.disk)
            && wish < has
        {
            return Err(Error::invalid(format!("disk {wish} is smaller than the {has} of image {}", row.image)));
        }
        if row.profile.disk.is_some() && image.disk.is_none() {
            return Err(Error::invalid(format!("image {} has no disk, so the profile cannot size one", row.image)));
        }
        if row.profile.login.is_some() && image.boot == Boot::Agent {
            return Err(Error::invalid(format!("image {} has an agent, and its VMs take no login", row.image))
                .with_hint(
                    "burgeon shell VM opens a shell; burgeon vm ssh VM logs in where the image has an SSH server",
                ));
        }
        let row = self.meta.create_vm(row).await?;
        self.kick.notify_one();
        Ok(row)
    }

    pub(crate) async fn image(&self, name: String) -> Result<burgeon_api::image::Image> {
        let data = self.data_paths();
        blocking("look at the image", move || burgeon_image::show(&data, &name).map(|(image, _)| image)).await
    }

    pub(crate) fn data_paths(&self) -> burgeon_image::DataPaths {
        burgeon_image::DataPaths {
            images: self.layout.images(),
            cache: self.layout.cache(),
            temporary: self.layout.temporary(),
        }
    }

    pub(crate) async fn launch_of(&self, row: &VmRow) -> Result<Launch> {
        let begin = match (&row.source, &row.substrate) {
            (_, Some(_)) => Begin::BootForSubstrate,
            (Some(source), None) => source.begin,
            (None, None) => Begin::Boot,
        };
        if begin == Begin::Fork {
            // Forks are launched by the fork, at one instant.
            return Err(Error::unavailable("the fork was broken off").with_hint("fork the VM again"));
        }
        self.launch_at(row, begin).await
    }

    pub(crate) async fn launch_at(&self, row: &VmRow, begin: Begin) -> Result<Launch> {
        let image = match &row.source {
            Some(source) => source.image.clone(),
            None => self.image(row.image.clone()).await?,
        };
        Ok(Launch {
            id: row.id,
            name: row.name.clone(),
            image,
            image_directory: self.layout.image(&row.image).display().to_string(),
            profile: row.profile.clone(),
            source: row.source.as_ref().map(|source| source.source.clone()),
            begin,
            keep: row.source.as_ref().map(|source| source.keep).unwrap_or_default(),
            resize: row.source.as_ref().map(|source| source.resize).unwrap_or_default(),
        })
    }

    /// Waits until the reconcile loop has looked again and `found` answers.
    ///
    /// # Errors
    /// What `found` answers, or that the server is leaving.
    pub(crate) async fn when<T>(&self, mut found: impl FnMut(&Seen) -> Option<Result<T>>) -> Result<T> {
        let mut seen = self.seen.subscribe();
        loop {
            if let Some(answer) = found(&seen.borrow_and_update()) {
                return answer;
            }
            tokio::select! {
                changed = seen.changed() => changed.map_err(|_| Error::unavailable("the server is leaving"))?,
                () = self.shutdown.cancelled() => return Err(Error::unavailable("the server is leaving")),
            }
        }
    }

    /// Sets a VM's intent and wakes the loop.
    pub(crate) async fn intend(&self, id: VmId, intent: Intent, version: Option<u64>) -> Result<VmRow> {
        let row = self.meta.set_intent(id, intent, version).await?;
        self.kick.notify_one();
        Ok(row)
    }
}

pub(crate) fn check_profile(profile: &Profile) -> Result<()> {
    let name = |(key, error): (&str, Error)| error.context(format!("profile, {key}"));
    profile.check().map_err(name)?;
    profile.check_against(burgeon_host::capacity()).map_err(name)
}

/// Runs work that reads or writes files off the runtime's threads.
pub(crate) async fn blocking<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal(format!("{action}: {error}")))?
}
