//! What a VM's user has stopped of it, written down for the next host process.

use burgeon_api::{
    Error, Result,
    vm::{GuestView, Observed},
};
use burgeon_guest::client::AgentClient;

use super::Owner;
use crate::record::Record;

/// What its user has stopped, or lets go on.
pub(crate) enum Hold {
    /// Whether the workload is frozen.
    Frozen(bool),
    Paused,
    /// It is about to go on.
    GoesOn,
    /// It goes on; with its agent, where that was met only now.
    Resumed(Option<(AgentClient, GuestView)>),
}

/// What is told to who asks something of a paused guest.
pub(crate) fn is_paused(name: &str) -> Error {
    Error::conflict(format!("VM {name} is paused")).with_hint(format!("let it go on first: burgeon vm resume {name}"))
}

impl Owner {
    pub(super) fn hold(&mut self, hold: Hold) -> Result<()> {
        let Some(up) = &mut self.up else {
            return Err(Error::conflict(format!("VM {} has just ended", self.record.launch.name)));
        };
        if matches!(hold, Hold::Paused) && self.stopping.is_some() {
            return Err(Error::conflict(format!("VM {} is stopping", self.record.launch.name)));
        }
        let record = match &hold {
            Hold::Frozen(frozen) => Record { frozen: *frozen, ..self.record.clone() },
            Hold::Paused => Record { paused: true, ..self.record.clone() },
            Hold::GoesOn | Hold::Resumed(_) => Record { paused: false, ..self.record.clone() },
        };
        if record != self.record {
            record.store(&self.directory)?;
            self.record = record;
        }
        match hold {
            // Until its agent has answered it is not called running.
            Hold::Frozen(_) | Hold::GoesOn => {}
            Hold::Paused => {
                // One whose disk could not be written tries again when it is resumed.
                self.disk_retry_at = None;
                self.publish(|view| view.observed = Observed::Paused);
            }
            Hold::Resumed(met) => {
                let guest = met.as_ref().map(|(_, guest)| guest.clone());
                if let Some((agent, guest)) = met {
                    (up.agent, up.guest) = (Some(agent), Some(guest));
                }
                self.publish(|view| {
                    view.observed = Observed::Running;
                    view.guest = guest.or(view.guest.take());
                });
            }
        }
        Ok(())
    }
}
