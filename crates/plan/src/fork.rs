//! How the memory of a VM gets to the VMs that are forked from it.
//!
//! What the VM has written since it began with its base is copied once while it stands still. It then either goes into
//! each child above the same base, or makes a new base together with the old one, which costs one copy of the base and
//! nothing for each child.

/// How the children get their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They begin with the source's base; what it has written is put into each.
    Above,
    /// They begin with a new base that holds all of it.
    NewBase,
}

/// More than this in each child is worth a base of its own.
const MOST_COPIED: u64 = 64 << 20;

/// `base` is what the source's base holds, where it has one that is at hand; `written` what it has written above it.
/// All in bytes.
pub fn way(base: Option<u64>, written: u64, children: u32) -> Way {
    match base {
        // In time and in memory, the copies against one more base.
        Some(base)
            if written <= MOST_COPIED && written.saturating_mul(children.into()) <= base.saturating_add(written) =>
        {
            Way::Above
        }
        // A single child of little.
        Some(_) if children <= 1 && written <= MOST_COPIED => Way::Above,
        _ => Way::NewBase,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_is_copied_and_much_is_shared() {
        const MIB: u64 = 1 << 20;
        assert_eq!(way(Some(70 * MIB), 2 * MIB, 1), Way::Above);
        assert_eq!(way(Some(70 * MIB), 2 * MIB, 30), Way::Above);
        assert_eq!(way(Some(70 * MIB), 20 * MIB, 10), Way::NewBase);
        assert_eq!(way(Some(10 * MIB), 60 * MIB, 1), Way::Above);
        assert_eq!(way(Some(10 * MIB), 65 * MIB, 1), Way::NewBase);
        assert_eq!(way(None, MIB, 1), Way::NewBase);
    }
}
