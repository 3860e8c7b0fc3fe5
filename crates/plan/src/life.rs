//! When a VM is removed or parked by itself.
//!
//! Asked for every VM whenever the control process looks. Its time to live ends a VM in whatever state it is; only one that
//! runs, and that nobody uses, is idle. One that is paused is its user's business.

use burgeon_api::{
    life::Life,
    vm::{Intent, Observed},
};

/// What is known of a VM. Times in seconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    pub life: &'a Life,
    pub intent: Intent,
    pub observed: &'a Observed,
    /// Commands, streams and files that are under way, and work of a pipeline.
    pub in_use: bool,
    /// When it was last used: by whatever was under way, or by being started.
    pub used_s: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Nothing,
    Remove,
    Park,
}

/// What is due now.
pub fn due(known: &Known<'_>, now_s: u64) -> Due {
    let idle_s = now_s.saturating_sub(known.used_s);
    match known.intent {
        Intent::Removed => Due::Nothing,
        _ if known.life.expires_s.is_some_and(|end| end <= now_s) => Due::Remove,
        Intent::Running if *known.observed == Observed::Running && !known.in_use => {
            if known.life.idle_park_s.is_some_and(|limit| idle_s >= limit) { Due::Park } else { Due::Nothing }
        }
        _ => Due::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use burgeon_api::{TimeSpan, life::SetLife};

    use super::*;

    #[test]
    fn a_vm_is_parked_when_idle_and_removed_when_its_time_is_over() {
        let life = Life { expires_s: Some(1000), idle_park_s: Some(60) };
        let known =
            Known { life: &life, intent: Intent::Running, observed: &Observed::Running, in_use: false, used_s: 100 };
        let parked = Observed::Parked { reason: String::new() };
        let cases = [
            (known, 159, Due::Nothing),
            (known, 160, Due::Park),
            // A clock that was set back.
            (known, 10, Due::Nothing),
            (Known { in_use: true, ..known }, 900, Due::Nothing),
            (Known { observed: &Observed::Paused, ..known }, 900, Due::Nothing),
            (Known { observed: &Observed::Pending, ..known }, 900, Due::Nothing),
            (Known { observed: &parked, ..known }, 900, Due::Nothing),
            (Known { intent: Intent::Stopped, ..known }, 900, Due::Nothing),
            (Known { in_use: true, ..known }, 1000, Due::Remove),
            (Known { observed: &parked, ..known }, 1000, Due::Remove),
            (Known { observed: &Observed::Paused, intent: Intent::Stopped, ..known }, 2000, Due::Remove),
            (Known { intent: Intent::Removed, ..known }, 2000, Due::Nothing),
            (Known { life: &Life::default(), ..known }, u64::MAX, Due::Nothing),
        ];
        for (known, now_s, expected) in cases {
            assert_eq!(due(&known, now_s), expected, "{known:?} at {now_s}");
        }
    }

    #[test]
    fn what_is_not_asked_for_stays_and_zero_takes_a_limit_away() {
        let span = |ms| Some(TimeSpan(Duration::from_millis(ms)));
        let life = Life::default().set(&SetLife { ttl: span(1500), idle_park: span(60_000) }, 10);
        assert_eq!(life, Life { expires_s: Some(12), idle_park_s: Some(60) });
        let life = life.set(&SetLife { ttl: span(0), idle_park: None }, 20);
        assert_eq!(life, Life { expires_s: None, idle_park_s: Some(60) });
        assert!(life.set(&SetLife { ttl: None, idle_park: span(0) }, 30).is_endless());
    }
}
