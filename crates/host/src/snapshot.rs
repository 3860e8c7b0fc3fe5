//! Taking a snapshot of a VM: its instant is captured as for a fork, and kept as for a parked VM, while it goes on.
//!
//! ```text
//! begun -> captured, disks sealed -> [the VM goes on] -> memory in the store, devices written -> in its place
//! ```
//! Whatever fails or dies before the last step leaves no snapshot, and nothing that the next start does not sweep.

use std::{fs, path::Path, sync::Arc};

use burgeon_api::{Error, RequestId, Result, snapshot::VmSnapshot, substrate::Docked};
use burgeon_plan::snapshot::next_name;
use burgeon_store::{
    disk::Disk,
    steps::{Step, reached},
};

use crate::{
    disks::{Disks, Key, store_source},
    fork::{Captured, End},
    frozen::{self, DEVICES},
    plug::{Gate, blocking},
    snapshots::{self, Snapshot},
    start::Context,
};

type Held = Arc<Vec<(Key, Arc<Disk>)>>;

impl Gate {
    /// Keeps the VM's instant under a name: of one that runs or is paused, or what is kept of one that is parked. The same
    /// request keeps one.
    ///
    /// # Errors
    /// `Invalid` for a bad name, `Conflict` for one that is taken and for a VM that has stopped; `Refused` for a VM that cannot
    /// be captured; those of guest, QEMU and store. Then there is no snapshot, and the VM is as before.
    pub(crate) async fn snapshot(
        &self,
        context: &Context,
        request: RequestId,
        name: Option<String>,
    ) -> Result<VmSnapshot> {
        let launch = &self.record.launch;
        let vm = context.layout.vm(launch.id);
        let there = snapshots::list(&vm)?;
        if let Some(same) = there.iter().find(|snapshot| snapshot.about.request == request) {
            return Ok(same.about.clone());
        }
        let names = there.iter().map(|snapshot| snapshot.about.name.as_str());
        let name = name.unwrap_or_else(|| next_name(names));
        burgeon_api::name::check("snapshot", &name)?;
        if there.iter().any(|snapshot| snapshot.about.name == name) {
            let vm = &launch.name;
            return Err(Error::conflict(format!("VM {vm} has a snapshot {name} already")).with_hint(format!(
                "choose another name, or remove that one first: burgeon vm snapshots {vm} --rm {name}"
            )));
        }
        let disks = context.disks.clone();
        let held: Held = Arc::new(disks.hold_all(launch)?);
        let taken_s = (store_source().now_us)() / 1_000_000;
        let kept = async {
            let begun = snapshots::begin(&vm, request)?;
            let docked = match &self.record.docked {
                Some(docked) if self.monitor.is_none() => {
                    self.share(context, &begun, &name, docked, held.clone()).await?
                }
                _ => self.keep(context, &begun, &name, held.clone()).await?,
            };
            reached(Step::SnapshotKept);
            let of_disks = held.iter().map(|(key, _)| key.1.clone()).collect();
            let about = VmSnapshot { name: name.clone(), request, taken_s, disks: of_disks, docked };
            let number = there.iter().map(|snapshot| snapshot.number).max().unwrap_or(0) + 1;
            let attached = disks.attached(launch.id)?;
            let snapshot = Snapshot::new(number, about, attached, self.record.frozen);
            snapshots::publish(&begun, &vm, &snapshot)?;
            Ok(snapshot.about)
        };
        let kept = kept.await.map_err(|error: Error| error.context(format!("snapshot of VM {}", launch.name)));
        if kept.is_err() {
            let id = launch.id;
            let discarded = blocking(move || {
                snapshots::discard(&vm, request);
                disks.let_snapshot_go(id, &name)
            });
            // The reason why there is none is worth more than this.
            if let Err(error) = discarded.await {
                tracing::warn!(vm = %launch.name, %error, "a part of a snapshot is kept until the host process starts again");
            }
        }
        kept
    }

    /// Captures the VM, and keeps that.
    async fn keep(&self, context: &Context, begun: &Path, name: &str, held: Held) -> Result<Docked> {
        let running = self.running(context).await?;
        let (record, disks, id) = (&self.record, context.disks.clone(), self.record.launch.id);
        let compatibility =
            context.substrates.compatibility(&context.qemu, &record.launch, record.accelerator, disks.attached(id)?)?;
        // What is captured lies in memory until it is stored.
        let _room = context.room.take(record.launch.profile.memory)?;
        let into = self.new_base()?;
        let seal = {
            let (disks, name) = (disks.clone(), name.to_string());
            move || disks.seal_for(&held, &name)
        };
        let Captured { frozen, stood_us, .. } = self.capture(&running, into, End::GoesOn, seal).await?;
        reached(Step::SnapshotCaptured);
        let (begun, name) = (begun.to_path_buf(), name.to_string());
        blocking(move || {
            let root = |map| Disks::snapshot_root(id, &name, map);
            frozen::keep(&disks, &begun, root, &frozen, compatibility, stood_us)
        })
        .await
    }

    /// Has what is kept of a parked VM kept for the snapshot too.
    async fn share(&self, context: &Context, begun: &Path, name: &str, docked: &Docked, held: Held) -> Result<Docked> {
        let (disks, id) = (context.disks.clone(), self.record.launch.id);
        let (vm, begun, name) = (context.layout.vm(id), begun.to_path_buf(), name.to_string());
        // Nothing is added to the store, and nobody stood still for it.
        let docked = Docked { stored: Default::default(), captured_us: 0, ..docked.clone() };
        blocking(move || {
            disks.seal_for(&held, &name)?;
            let (from, to) = (vm.join(DEVICES), begun.join(DEVICES));
            fs::hard_link(&from, &to).map_err(|error| Error::io(format!("share {}", from.display()), &error))?;
            disks.share_memory(id, &name, docked.map.parse()?)?;
            Ok(docked)
        })
        .await
    }
}
