//! How many QEMUs wait, with a substrate's state taken up, for VMs that are going to go on from it.
//!
//! One that waits takes memory and no time. A substrate that is in use has one at least; after a burst there are as many
//! as the burst was large, within limits; an hour that nobody asks in needs none.

use std::time::Duration;

/// A burst is what comes within this time.
pub const BURST: Duration = Duration::from_secs(60);
/// After its last use, a substrate has some waiting for so long.
pub const IDLE: Duration = Duration::from_secs(10 * 60);
/// Without being asked, no more than these wait for one substrate.
pub const MOST: u32 = 8;
/// And no more than these when a user asks.
pub use burgeon_api::substrate::MOST_STANDBYS as MOST_ASKED;

/// What is known of a substrate's use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// How many a user wants to have waiting, whatever happens.
    pub asked: Option<u32>,
    /// Since it was made or used last.
    pub idle: Duration,
    /// VMs that went on from it within the last [`BURST`].
    pub burst: u32,
}

/// How many shall wait. `room`: how many more than those that wait now (`waiting`) the machine has memory for.
pub fn wanted(demand: Demand, waiting: u32, room: u32) -> u32 {
    let wanted = match demand.asked {
        Some(asked) => asked.min(MOST_ASKED),
        None if demand.idle >= IDLE => 0,
        None => demand.burst.clamp(1, MOST),
    };
    wanted.min(waiting.saturating_add(room))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_wait_as_the_last_minute_took() {
        let demand = |idle, burst| Demand { asked: None, idle: Duration::from_secs(idle), burst };
        assert_eq!(wanted(demand(0, 0), 0, 100), 1);
        assert_eq!(wanted(demand(1, 5), 0, 100), 5);
        assert_eq!(wanted(demand(1, 25), 0, 100), MOST);
        assert_eq!(wanted(demand(599, 0), 1, 100), 1);
        assert_eq!(wanted(demand(600, 0), 1, 100), 0);
        // Those that wait have their memory already.
        assert_eq!(wanted(demand(1, 5), 2, 1), 3);
        assert_eq!(wanted(demand(1, 5), 2, 0), 2);
        let asked = |asked| Demand { asked: Some(asked), ..demand(3600, 0) };
        assert_eq!((wanted(asked(3), 0, 100), wanted(asked(0), 2, 100), wanted(asked(3), 0, 0)), (3, 0, 0));
        assert_eq!(wanted(asked(1000), 0, 1000), MOST_ASKED);
    }
}
