//! Snapshots of a VM: what one is called, and when a VM can return to one.

use burgeon_api::{
    Error, Result,
    vm::{Intent, Observed},
};

/// The name of a snapshot whose user gives none: one above the highest there is, so that the order of names is that of
/// time.
pub fn next_name<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let number = |name: &str| name.strip_prefix('s')?.parse::<u32>().ok();
    let highest = names.into_iter().filter_map(number).max().unwrap_or(0);
    format!("s{}", u64::from(highest) + 1)
}

/// Whether a VM in this state can be rolled back: it runs, or has certainly ended.
pub fn can_return(observed: &Observed) -> bool {
    matches!(
        observed,
        Observed::Running
            | Observed::Paused
            | Observed::Stopped { .. }
            | Observed::Parked { .. }
            | Observed::Failed { .. }
    )
}

/// Whether a VM's user may roll it back. Its end is no obstacle: what it returns to is kept apart from it.
///
/// # Errors
/// `Conflict` for a VM that is being removed or on its way, or is a substrate; `Unavailable` where nothing is known of it.
pub fn check_rollback(name: &str, intent: Intent, observed: &Observed) -> Result<()> {
    let refused = |what: String, hint: String| {
        Err(Error::conflict(format!("VM {name} cannot be rolled back: it {what}")).with_hint(hint))
    };
    match (intent, observed) {
        (Intent::Removed, _) => refused("is being removed".into(), "burgeon vm ls lists the VMs there are".into()),
        (_, observed) if can_return(observed) => Ok(()),
        (_, Observed::Docked) => refused(
            "is a substrate, and never runs itself".into(),
            format!("make a VM of it: burgeon vm create --substrate {name}"),
        ),
        (_, Observed::Unknown { reason } | Observed::Damaged { reason }) => {
            Err(Error::unavailable(format!("VM {name} cannot be rolled back: whether it runs is not known ({reason})"))
                .with_hint(format!("burgeon vm show {name} tells when it is known again")))
        }
        (_, observed) => refused(format!("is {}", observed.name()), "try again once it runs or has stopped".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_without_a_name_are_numbered_in_order() {
        assert_eq!(next_name([]), "s1");
        assert_eq!(next_name(["s1", "s2"]), "s3");
        // One that is gone leaves its number free only at the end.
        assert_eq!(next_name(["s2", "before", "s", "sx7"]), "s3");
        assert_eq!(next_name(["s4294967295", "s99999999999999999999"]), "s4294967296");
    }

    #[test]
    fn a_vm_returns_unless_somebody_else_is_at_it() {
        let reason = String::new;
        for (intent, observed, allowed) in [
            (Intent::Running, Observed::Running, true),
            (Intent::Running, Observed::Paused, true),
            (Intent::Stopped, Observed::Stopped { reason: reason() }, true),
            (Intent::Running, Observed::Parked { reason: reason() }, true),
            (Intent::Running, Observed::Failed { reason: reason() }, true),
            (Intent::Removed, Observed::Running, false),
            (Intent::Running, Observed::Docked, false),
            (Intent::Running, Observed::Pending, false),
            (Intent::Running, Observed::Starting { phase: "boot".into() }, false),
            (Intent::Running, Observed::Unknown { reason: reason() }, false),
        ] {
            let checked = check_rollback("web", intent, &observed);
            assert_eq!(checked.is_ok(), allowed, "{intent:?} {observed:?}");
            assert!(can_return(&observed) || !allowed);
            assert!(checked.err().is_none_or(|error| error.message.contains("VM web") && error.hint.is_some()));
        }
    }
}
