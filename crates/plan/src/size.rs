//! What a VM's memory and CPUs may be changed to.

use burgeon_api::{
    ByteSize, Error, Result,
    profile::{MEMORY_STEP, Profile},
    vm::{Resize, Size},
};

/// What a VM that has one size shall have, and what its user is told of that.
///
/// # Errors
/// `Refused`, for what its profile does not allow.
pub fn wanted(name: &str, profile: &Profile, has: Size, resize: Resize) -> Result<(Size, Option<String>)> {
    let (memory, note) = match resize.memory {
        Some(wish) => memory(name, profile, wish)?,
        None => (has.memory, None),
    };
    let cpus = match resize.cpus {
        Some(wish) => cpus(name, profile, wish)?,
        None => has.cpus,
    };
    Ok((Size { memory, cpus }, note))
}

fn memory(name: &str, profile: &Profile, wish: ByteSize) -> Result<(ByteSize, Option<String>)> {
    let (least, most) = (profile.memory, profile.most_memory());
    if least == most && wish != least {
        return Err(Error::refused(format!("VM {name} was started with a fixed memory of {least:#}"))
            .with_hint("start it with a profile that has max_memory"));
    }
    if wish > most {
        return Err(Error::refused(format!("VM {name} can have {most:#} of memory at most: its profile's max_memory")));
    }
    if wish < least {
        return Err(Error::refused(format!("VM {name} cannot have less memory than the {least:#} that it began with"))
            .with_hint(
                "what it was given beyond that can be taken back; a profile with less memory makes it smaller",
            ));
    }
    let rounded = ByteSize(least.0 + (wish.0 - least.0).next_multiple_of(MEMORY_STEP.0));
    let note = (rounded != wish).then(|| format!("rounded up to {rounded:#}, a multiple of {MEMORY_STEP:#}"));
    Ok((rounded, note))
}

fn cpus(name: &str, profile: &Profile, wish: u32) -> Result<u32> {
    let most = profile.most_cpus();
    if profile.max_cpus.is_none() && wish != most {
        let of_cpus = if most == 1 { "1 CPU".to_string() } else { format!("{most} CPUs") };
        return Err(Error::refused(format!("VM {name} was started with a fixed number of CPUs: {of_cpus}"))
            .with_hint("start it with a profile that has max_cpus"));
    }
    if wish == 0 || wish > most {
        return Err(Error::refused(format!("VM {name} can have 1 to {most} CPUs: its profile's max_cpus")));
    }
    Ok(wish)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_changes_within_its_profile() {
        let fixed = Profile { memory: ByteSize::mib(128), ..Profile::default() };
        let profile = Profile { max_memory: Some(ByteSize::mib(256)), cpus: 2, max_cpus: Some(4), ..fixed.clone() };
        let has = Size { memory: ByteSize::mib(160), cpus: 3 };
        let memory = |mib: u64| Resize { memory: Some(ByteSize::mib(mib)), cpus: None };
        let cpus = |cpus: u32| Resize { memory: None, cpus: Some(cpus) };
        let to = |resize: Resize| wanted("web", &profile, has, resize);
        assert_eq!(to(Resize::default()), Ok((has, None)));
        assert_eq!(to(memory(256)), Ok((Size { memory: ByteSize::mib(256), cpus: 3 }, None)));
        assert_eq!(to(cpus(1)), Ok((Size { memory: ByteSize::mib(160), cpus: 1 }, None)));
        let (rounded, note) = to(memory(199)).unwrap();
        assert_eq!(rounded.memory, ByteSize::mib(200));
        assert_eq!(note.unwrap(), "rounded up to 200M, a multiple of 2M");
        let refused = |resize: Resize| to(resize).unwrap_err().message;
        assert_eq!(refused(memory(258)), "VM web can have 256M of memory at most: its profile's max_memory");
        assert!(refused(memory(126)).contains("less memory than the 128M"));
        assert_eq!(refused(cpus(5)), "VM web can have 1 to 4 CPUs: its profile's max_cpus");
        assert!(refused(cpus(0)).contains("1 to 4 CPUs"));
        let refused = |resize: Resize| wanted("web", &fixed, fixed.size(), resize).unwrap_err().message;
        assert_eq!(refused(memory(256)), "VM web was started with a fixed memory of 128M");
        assert_eq!(refused(cpus(2)), "VM web was started with a fixed number of CPUs: 1 CPU");
        // What it has anyway is no change.
        assert!(wanted("web", &fixed, fixed.size(), memory(128)).is_ok());
    }
}
