//! Bytes of payloads that a run holds in memory, and how many more it may take in.

#[derive(Debug)]
pub(super) struct Budget {
    most: u64,
    held: u64,
}

impl Budget {
    pub(super) fn new(most: u64) -> Self {
        Self { most, held: 0 }
    }

    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// Whether a file of this size may be read. With nothing held any may: else the largest would wait for ever.
    pub(super) fn fits(&self, size: u64) -> bool {
        self.held == 0 || self.held.saturating_add(size) <= self.most
    }

    /// An item that weighed `before` weighs `after` now. Whether that made room.
    pub(super) fn change(&mut self, before: u64, after: u64) -> bool {
        self.held = self.held.saturating_sub(before).saturating_add(after);
        after < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_goes_alone_and_the_rest_up_to_the_limit() {
        let mut budget = Budget::new(100);
        assert!(budget.fits(1000));
        assert!(!budget.change(0, 60));
        assert!(budget.fits(40) && !budget.fits(41));
        // A result may be larger than what it was made of.
        assert!(!budget.change(60, 300));
        assert!(!budget.fits(0) && !budget.fits(u64::MAX));
        assert!(budget.change(300, 0));
        assert!(budget.fits(u64::MAX));
        assert_eq!(budget.held(), 0);
    }
}
