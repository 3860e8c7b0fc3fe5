//! Which of its CPUs the guest uses. All that there may ever be are there from the beginning; those beyond the wanted number
//! are taken out of use.

use std::{fs, io, path::Path};

use burgeon_guest::protocol::{Failure, FailureKind};

use crate::spawn::failure;

pub(crate) const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Uses the first `wanted` CPUs and no others; how many are used then.
pub(crate) fn set(directory: &Path, wanted: Option<u32>) -> Result<u32, Failure> {
    let told = |error: io::Error| failure(FailureKind::Io, format!("cannot tell which CPUs there are: {error}"));
    let there = read(directory, "present").map_err(told)?;
    if let Some(wanted) = wanted {
        if wanted == 0 || wanted > there {
            return Err(failure(FailureKind::Invalid, format!("{wanted} CPUs of {there} cannot be used")));
        }
        // The first one is never taken away.
        for number in 1..there {
            let path = directory.join(format!("cpu{number}/online"));
            let value = if number < wanted { "1" } else { "0" };
            let is = fs::read_to_string(&path).unwrap_or_default();
            if is.trim() != value {
                fs::write(&path, value).map_err(|error| {
                    let what = if number < wanted { "put into use" } else { "taken out of use" };
                    failure(FailureKind::Io, format!("CPU {number} cannot be {what}: {error}"))
                })?;
            }
        }
    }
    read(directory, "online").map_err(told)
}

/// How many a list of the kernel's holds.
fn read(directory: &Path, list: &str) -> io::Result<u32> {
    Ok(count(&fs::read_to_string(directory.join(list))?))
}

/// How many numbers there are in a list like `0-3,7`.
fn count(list: &str) -> u32 {
    let of_range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    };
    list.trim().split(',').filter_map(of_range).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_counted_and_put_into_use_from_the_first_one_on() {
        assert_eq!((count("0\n"), count("0-3\n"), count("0-1,4,6-7\n"), count("\n")), (1, 4, 5, 0));
        let directory = std::env::temp_dir().join(format!("burgeon-cpus-{}", std::process::id()));
        for number in 1..3 {
            fs::create_dir_all(directory.join(format!("cpu{number}"))).unwrap();
            fs::write(directory.join(format!("cpu{number}/online")), "0\n").unwrap();
        }
        fs::write(directory.join("present"), "0-2\n").unwrap();
        fs::write(directory.join("online"), "0\n").unwrap();
        assert_eq!(set(&directory, None), Ok(1));
        set(&directory, Some(2)).unwrap();
        let is = |number: u32| fs::read_to_string(directory.join(format!("cpu{number}/online"))).unwrap();
        assert_eq!((is(1).trim(), is(2).trim()), ("1", "0"));
        assert_eq!(set(&directory, Some(4)).unwrap_err().kind, FailureKind::Invalid);
        assert_eq!(set(&directory, Some(0)).unwrap_err().kind, FailureKind::Invalid);
        fs::remove_dir_all(&directory).unwrap();
    }
}
