//! The host keys of the guest's SSH server.

use std::{fs, io, os::unix::fs::OpenOptionsExt, path::Path};

use crate::{files::names, sys};

const DIRECTORY: &str = "etc/ssh";
const PRIVATE: &str = "etc/ssh/ssh_host_ed25519_key";
const PUBLIC: &str = "etc/ssh/ssh_host_ed25519_key.pub";
/// Where a server that stays says who it is.
const SERVER: &str = "/run/sshd.pid";

/// Removes all host keys below `root`.
pub(crate) fn remove(root: &Path) -> io::Result<()> {
    let directory = root.join(DIRECTORY);
    for name in names(&directory).unwrap_or_default() {
        if name.to_string_lossy().starts_with("ssh_host_") {
            fs::remove_file(directory.join(name))?;
        }
    }
    Ok(())
}

/// Whether there is a server, or keys of one.
pub(crate) fn is_there(root: &Path) -> bool {
    let has = |name: &str| name == "sshd_config" || name == "sshd_config.d" || name.starts_with("ssh_host_");
    names(&root.join(DIRECTORY)).unwrap_or_default().iter().any(|name| has(&name.to_string_lossy()))
}

/// Puts a key in the place of all others; the public one as it is in its file then.
pub(crate) fn replace(root: &Path, private: &[u8], public: &[u8]) -> io::Result<Vec<u8>> {
    remove(root)?;
    for (path, content, mode) in [(PRIVATE, private, 0o600), (PUBLIC, public, 0o644)] {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(root.join(path))?;
        io::Write::write_all(&mut file, content)?;
    }
    fs::read(root.join(PUBLIC))
}

/// Has a server that runs read its keys anew, which it does before it accepts anybody: the signal is there when it goes
/// on. Those who are logged in stay.
pub(crate) fn have_read_anew() {
    let Ok(Ok(pid)) = fs::read_to_string(SERVER).map(|text| text.trim().parse::<i32>()) else { return };
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    if program.file_name().is_some_and(|name| name == "sshd") {
        let _ended_meanwhile = sys::kill(pid, libc::SIGHUP);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_key_takes_the_place_of_all() {
        let root = std::env::temp_dir().join(format!("burgeon-keys-{}", std::process::id()));
        fs::create_dir_all(root.join(DIRECTORY)).unwrap();
        assert!(!is_there(&root));
        for name in ["ssh_host_rsa_key", "ssh_host_rsa_key.pub", "ssh_host_ed25519_key", "sshd_config"] {
            fs::write(root.join(DIRECTORY).join(name), "old").unwrap();
        }
        assert!(is_there(&root));
        assert_eq!(replace(&root, b"private", b"public").unwrap(), b"public");
        let mut names: Vec<String> = fs::read_dir(root.join(DIRECTORY))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["ssh_host_ed25519_key", "ssh_host_ed25519_key.pub", "sshd_config"]);
        assert_eq!(fs::read(root.join(PRIVATE)).unwrap(), b"private");
        assert_eq!(fs::metadata(root.join(PRIVATE)).unwrap().permissions().mode() & 0o777, 0o600);
        fs::remove_dir_all(&root).unwrap();
    }
}
