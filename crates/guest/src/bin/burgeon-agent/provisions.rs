//! What a guest is given beside its identity: an environment for its commands, and secrets.

use std::{
    fs,
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use burgeon_guest::protocol::{Failure, FailureKind, Provision};

use crate::{
    spawn::{failure, io_failure},
    system,
};

/// In memory, as all of /run.
const RUN: &str = "/run";
const DIRECTORY: &str = "/run/burgeon";
/// `NAME='VALUE'`, a variable a line, as sh(1) and systemd read it.
const ENVIRONMENT: &str = "/run/burgeon/environment";
const SECRETS: &str = "/run/burgeon/secrets";
// linux/magic.h.
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

type Variables = Vec<(Vec<u8>, Vec<u8>)>;

/// Takes what is for this module.
pub(crate) fn take(provisions: &[Provision]) -> Result<(), Failure> {
    for provision in provisions {
        match provision {
            Provision::Environment(given) => set_environment(Path::new(ENVIRONMENT), given)
                .map_err(|error| io_failure("cannot write the environment", &error))?,
            Provision::Secret { name, content } => put_secret(name, content)?,
            Provision::SshHostKey { .. } | Provision::KeepSecrets | Provision::Rehearsal => {}
        }
    }
    Ok(())
}

/// The environment that the guest was given; none where there is no such file, or somebody has written another into it.
pub(crate) fn environment() -> Variables {
    fs::read(ENVIRONMENT).ok().and_then(|text| parse(&text)).unwrap_or_default()
}

/// Sets variables; those that the guest was given before, with other names, stay.
fn set_environment(path: &Path, given: &Variables) -> io::Result<()> {
    let mut all = fs::read(path).ok().and_then(|text| parse(&text)).unwrap_or_default();
    all.retain(|(name, _)| given.iter().all(|(other, _)| other != name));
    all.extend_from_slice(given);
    fs::create_dir_all(path.parent().unwrap_or(Path::new(DIRECTORY)))?;
    replace(path, &text(&all), 0o644)
}

fn text(variables: &Variables) -> Vec<u8> {
    let mut text = Vec::new();
    for (name, value) in variables {
        text.extend_from_slice(name);
        text.extend_from_slice(b"='");
        for byte in value {
            match byte {
                b'\'' => text.extend_from_slice(br"'\''"),
                _ => text.push(*byte),
            }
        }
        text.extend_from_slice(b"'\n");
    }
    text
}

/// What [`text`] has written.
fn parse(mut text: &[u8]) -> Option<Variables> {
    let mut variables = Vec::new();
    while !text.is_empty() {
        let (name, mut rest) = text.split_at(text.iter().position(|byte| *byte == b'=')?);
        rest = rest.strip_prefix(b"='")?;
        let mut value = Vec::new();
        text = loop {
            let (part, behind) = rest.split_at(rest.iter().position(|byte| *byte == b'\'')?);
            value.extend_from_slice(part);
            match behind.strip_prefix(br"'\''") {
                Some(more) => {
                    value.push(b'\'');
                    rest = more;
                }
                None => break behind.strip_prefix(b"'\n")?,
            }
        };
        variables.push((name.to_vec(), value));
    }
    Some(variables)
}

fn put_secret(name: &[u8], content: &[u8]) -> Result<(), Failure> {
    let shown = String::from_utf8_lossy(name).into_owned();
    if name.is_empty() || name.starts_with(b".") || name.contains(&b'/') || name.contains(&0) {
        return Err(failure(FailureKind::Invalid, format!("\"{shown}\" cannot be the name of a secret")));
    }
    let cannot = |error: io::Error| io_failure(&format!("cannot write the secret {shown}"), &error);
    let kind = rustix::fs::statfs(RUN).map_err(|error| cannot(error.into()))?.f_type;
    if kind != TMPFS && kind != RAMFS {
        return Err(failure(FailureKind::Unsupported, format!("cannot write the secret {shown}: {RUN} is on a disk")));
    }
    let directory = Path::new(SECRETS);
    fs::create_dir_all(directory)
        .and_then(|()| fs::set_permissions(directory, fs::Permissions::from_mode(0o700)))
        .and_then(|()| replace(&directory.join(std::ffi::OsStr::from_bytes(name)), content, 0o400))
        .map_err(cannot)
}

/// Removes the secrets of the machine that this one was.
pub(crate) fn forget_secrets() -> io::Result<()> {
    match fs::remove_dir_all(SECRETS) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a file as a whole: a reader sees the old one or the new one.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_file_name(format!(".burgeon-{:016x}", system::nonce()));
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _none_there = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(all: &[(&str, &str)]) -> Variables {
        all.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
    }

    #[test]
    fn an_environment_is_read_as_it_was_written_and_by_the_shell_too() {
        let all = variables(&[("A", "plain"), ("B", ""), ("C", "it's 'quoted'\nand $long \\ \"text\""), ("D", "'")]);
        let written = text(&all);
        assert!(written.starts_with(b"A='plain'\nB=''\n"));
        assert_eq!(parse(&written).unwrap(), all);
        assert_eq!(parse(b""), Some(vec![]));
        for other in ["A=b\n", "A='b", "A", "A='b'c\n"] {
            assert_eq!(parse(other.as_bytes()), None, "{other}");
        }
        let script = [&written[..], br#"printf %s "$C$D""#].concat();
        let read = std::process::Command::new("/bin/sh").arg("-c").arg(std::ffi::OsStr::from_bytes(&script)).output();
        assert_eq!(read.unwrap().stdout, b"it's 'quoted'\nand $long \\ \"text\"'");
    }

    #[test]
    fn what_is_given_again_takes_the_place_of_what_was() {
        let directory = std::env::temp_dir().join(format!("burgeon-environment-{}", std::process::id()));
        let path = directory.join("environment");
        set_environment(&path, &variables(&[("A", "1"), ("B", "2")])).unwrap();
        set_environment(&path, &variables(&[("B", "3"), ("C", "4")])).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "A='1'\nB='3'\nC='4'\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        fs::remove_dir_all(&directory).unwrap();
    }
}
