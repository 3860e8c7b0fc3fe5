//! When a server that was started on demand exits: after it has served nobody for a while.
//!
//! The control process asks whenever something changed, and when the time it was told has passed.
//!
//! ```text
//! busy --nothing left--> idle since t --limit passed--> Exit
//!   ^                        |
//!   +------- anything -------+
//! ```

use std::time::Duration;

/// What the server is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Activity {
    /// VMs that have not ended, those of which nothing is known among them ([`crate::vm::is_over`] says no).
    pub vms: usize,
    /// Substrates for which a user wants QEMUs to wait.
    pub standbys: usize,
    /// Runs of pipelines that are not over.
    pub runs: usize,
    /// Open client connections.
    pub connections: usize,
}

impl Activity {
    pub fn is_none(&self) -> bool {
        *self == Activity::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Stay,
    /// Ask again at this time at the latest.
    StayUntil(Duration),
    Exit,
}

/// Since when nothing has been going on. Times count from the server's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Idle {
    since: Option<Duration>,
}

impl Idle {
    /// Whether to exit. Without a limit a server stays for ever.
    pub fn should_exit(&mut self, now: Duration, activity: &Activity, limit: Option<Duration>) -> Verdict {
        if !activity.is_none() {
            self.since = None;
            return Verdict::Stay;
        }
        let since = *self.since.get_or_insert(now);
        let Some(limit) = limit else { return Verdict::Stay };
        let end = since.saturating_add(limit);
        if now >= end { Verdict::Exit } else { Verdict::StayUntil(end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_server_exits_and_a_busy_one_stays() {
        let s = Duration::from_secs;
        let limit = Some(s(30));
        let none = Activity::default();
        let mut idle = Idle::default();
        assert_eq!(idle.should_exit(s(0), &Activity { connections: 1, ..none }, limit), Verdict::Stay);
        assert_eq!(idle.should_exit(s(10), &none, limit), Verdict::StayUntil(s(40)));
        assert_eq!(idle.should_exit(s(39), &none, limit), Verdict::StayUntil(s(40)));
        assert_eq!(idle.should_exit(s(39), &Activity { vms: 1, ..none }, limit), Verdict::Stay);
        assert_eq!(idle.should_exit(s(50), &none, limit), Verdict::StayUntil(s(80)));
        assert_eq!(idle.should_exit(s(60), &Activity { runs: 1, ..none }, limit), Verdict::Stay);
        assert_eq!(idle.should_exit(s(61), &none, None), Verdict::Stay);
        assert_eq!(idle.should_exit(s(91), &none, limit), Verdict::Exit);
        assert_eq!(idle.should_exit(Duration::MAX, &none, Some(Duration::MAX)), Verdict::Exit);
    }
}
