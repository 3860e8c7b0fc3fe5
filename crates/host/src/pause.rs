//! Pausing a VM and letting it go on.
//!
//! ```text
//! pause:  workload frozen -> CPUs stand (QEMU's disks are flushed) -> written down
//! resume: written down -> CPUs go on -> [agent met] -> clock set -> workload thawed
//! ```
//! The workload is frozen first, so that nothing of it ever sees the wrong time, and so that a paused VM can be forked
//! as it stands. The guest's own files are not brought to its disks: they are in its memory, which stays. A host process
//! that dies on either way leaves the mark of a capture, and the next one finds what the record says ([`crate::start::adopt`]).

use std::future::Future;

use burgeon_api::{Error, Result, image::Boot};
use burgeon_qemu::state;
use tokio::time::Instant;

use crate::{
    fork::{begin_capture, capture_is_over, was_being_captured},
    plug::Gate,
    start::{Context, MONITOR_DEADLINE, attach_agent, clock_ns},
    vm::Hold,
};

impl Gate {
    /// Has the VM stand still. `write_down` has its owner keep that.
    ///
    /// # Errors
    /// `Conflict` for a VM that does not run; those of guest and QEMU. Then it goes on.
    pub(crate) async fn pause<F: Future<Output = Result<()>>>(
        &self,
        context: &Context,
        write_down: impl Fn(Hold) -> F,
    ) -> Result<()> {
        let name = &self.record.launch.name;
        if self.record.paused {
            return Ok(());
        }
        let Some(monitor) = &self.monitor else {
            return Err(
                Error::conflict(format!("VM {name} does not run")).with_hint(format!("burgeon vm start {name}"))
            );
        };
        let directory = context.layout.vm(self.record.launch.id);
        begin_capture(&directory)?;
        let paused = async {
            if let Some(agent) = &self.agent {
                agent.freeze().await?;
            }
            state::pause(monitor).await?;
            write_down(Hold::Paused).await
        }
        .await;
        if paused.is_err() {
            state::go_on(monitor).await?;
            if let Some(agent) = self.agent.as_ref().filter(|_| !self.record.frozen) {
                // The reason why it failed is worth more than that this does too.
                let _thawed = agent.thaw().await;
            }
        }
        capture_is_over(&directory);
        paused.map_err(|error| error.context("pause the VM"))
    }

    /// Lets a paused VM go on.
    ///
    /// # Errors
    /// Those of guest and QEMU. Where the guest has not answered, the VM is paused as before.
    pub(crate) async fn resume<F: Future<Output = Result<()>>>(
        &self,
        context: &Context,
        write_down: impl Fn(Hold) -> F,
    ) -> Result<()> {
        let (name, image) = (&self.record.launch.name, &self.record.launch.image);
        let directory = context.layout.vm(self.record.launch.id);
        // The mark is left by one that could neither go on nor be paused again.
        if !self.record.paused && !was_being_captured(&directory) {
            return Ok(());
        }
        let Some(monitor) = &self.monitor else {
            return Err(Error::conflict(format!("VM {name} has just ended")));
        };
        begin_capture(&directory)?;
        let met = async {
            write_down(Hold::GoesOn).await?;
            state::go_on(monitor).await?;
            let met = match (&self.resting_agent, image.boot) {
                (None, Boot::Agent) => Some(attach_agent(&directory, name, Instant::now() + MONITOR_DEADLINE).await?),
                _ => None,
            };
            let agent = met.as_ref().map(|(agent, _)| agent).or(self.resting_agent.as_ref()).cloned();
            if let Some(agent) = &agent {
                agent.clock(clock_ns()).await?;
            }
            Ok((agent, met))
        }
        .await;
        let (agent, met) = match met {
            Ok(met) => met,
            Err(error) => {
                let stands = state::pause(monitor).await;
                let written = write_down(Hold::Paused).await;
                if stands.and(written).is_ok() {
                    capture_is_over(&directory);
                }
                return Err(Error::context(error, "resume the VM"));
            }
        };
        let thawed = match agent.filter(|_| !self.record.frozen) {
            Some(agent) => agent.thaw().await,
            None => Ok(()),
        };
        write_down(Hold::Resumed(met)).await?;
        capture_is_over(&directory);
        thawed
    }
}
