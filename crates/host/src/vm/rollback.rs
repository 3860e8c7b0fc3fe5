//! A VM that returns to a snapshot of it.
//!
//! ```text
//! written down -> its process ends -> disks returned -> goes on from the snapshot -> receipt -> it is as any other
//! ```
//! From the first step to the last its record names the snapshot. Whoever finds that begins with the second step once more,
//! so it is rolled back as a whole, or not at all.

use burgeon_api::{Error, Result};
use burgeon_plan::snapshot::can_return;
use burgeon_store::steps::{Step, reached};

use super::Owner;
use crate::{activate::Claim, fork, plug::blocking, record::Record, snapshots, start::Context};

impl Owner {
    /// The answer tells that it is recorded; how it goes, the view tells.
    pub(super) async fn roll_back(&mut self, starts: u32, name: &str) -> Result<()> {
        if starts <= self.record.starts {
            return Ok(());
        }
        let vm = self.record.launch.name.clone();
        let observed = self.view.borrow().observed.clone();
        if self.starting.is_some() || self.removing.is_some() || self.stopping.is_some() || !can_return(&observed) {
            let state = if self.stopping.is_some() { "stopping" } else { observed.name() };
            return Err(Error::conflict(format!("VM {vm} is {state}: it cannot be rolled back now"))
                .with_hint("try again once it runs or has stopped"));
        }
        let Ok(_gate) = self.gate.clone().try_lock_owned() else {
            return Err(Error::conflict(format!("VM {vm} is being captured, or its disks changed, by somebody else"))
                .with_hint("try again"));
        };
        let snapshot = snapshots::find(&self.directory, name)?;
        snapshot.check(&self.context, &self.record.launch)?;
        let record = Record {
            starts,
            rolling_back: Some(name.to_string()),
            docked: None,
            accelerator: snapshot.about.docked.compatibility.accelerator,
            frozen: snapshot.frozen,
            paused: false,
            awaits_receipt: false,
            ended: None,
            ..self.record.clone()
        };
        record.store(&self.directory)?;
        self.record = record;
        reached(Step::RollbackRecorded);
        self.end_process().await;
        self.let_go();
        fork::capture_is_over(&self.directory);
        self.record = Record { process: None, user: None, limits: Vec::new(), ..self.record.clone() };
        self.begin_again();
        Ok(())
    }
}

/// Returns the disks of a VM that is being rolled back, and claims the rest.
pub(super) async fn claim(context: &Context, record: &Record) -> Result<Claim> {
    let id = record.launch.id;
    let name = record.rolling_back.as_deref().unwrap_or_default();
    let snapshot = snapshots::find(&context.layout.vm(id), name)?;
    snapshot.check(context, &record.launch)?;
    let (disks, of_disks) = (context.disks.clone(), snapshot.clone());
    blocking(move || disks.return_to(id, &of_disks)).await?;
    reached(Step::DisksRolledBack);
    Claim::of_snapshot(context, record, &snapshot).await
}
