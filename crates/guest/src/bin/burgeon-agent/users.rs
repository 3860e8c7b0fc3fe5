//! Users and groups of the guest, read from its own files: no name service is asked.

use std::fs;

use burgeon_guest::protocol::{Failure, FailureKind};

/// Who a command runs as.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) name: Vec<u8>,
    pub(crate) home: Vec<u8>,
    pub(crate) shell: Vec<u8>,
}

/// Finds a user by name or number; the agent's own user when none is named.
pub(crate) fn find(wanted: Option<&[u8]>) -> Result<User, Failure> {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let group = fs::read("/etc/group").unwrap_or_default();
    let own = rustix::process::geteuid().as_raw();
    let number = match wanted {
        None => Some(own),
        Some(text) => parse(text),
    };
    let found = passwd.split(|byte| *byte == b'\n').filter_map(entry).find(|user| match (wanted, number) {
        (Some(text), _) if user.name == text => true,
        (_, Some(number)) => user.uid == number,
        _ => false,
    });
    let mut user = match (found, number) {
        (Some(user), _) => user,
        // A number needs no entry; so does root in an image without /etc/passwd.
        (None, Some(uid)) => User {
            uid,
            gid: if uid == own { rustix::process::getegid().as_raw() } else { uid },
            groups: Vec::new(),
            name: if uid == 0 { b"root".to_vec() } else { uid.to_string().into_bytes() },
            home: if uid == 0 { b"/root".to_vec() } else { b"/".to_vec() },
            shell: b"/bin/sh".to_vec(),
        },
        (None, None) if wanted == Some(b"root") => return find(Some(b"0")),
        (None, None) => {
            let name = String::from_utf8_lossy(wanted.unwrap_or_default());
            return Err(Failure {
                kind: FailureKind::Invalid,
                message: format!("user \"{name}\" is not in /etc/passwd"),
            });
        }
    };
    user.groups = group.split(|byte| *byte == b'\n').filter_map(|line| member(line, &user.name)).collect();
    if !user.groups.contains(&user.gid) {
        user.groups.push(user.gid);
    }
    Ok(user)
}

fn entry(line: &[u8]) -> Option<User> {
    let mut fields = line.split(|byte| *byte == b':');
    let name = fields.next()?.to_vec();
    let (_, uid, gid) = (fields.next()?, parse(fields.next()?)?, parse(fields.next()?)?);
    let (_, home, shell) = (fields.next()?, fields.next()?.to_vec(), fields.next()?.to_vec());
    let or = |text: Vec<u8>, default: &[u8]| if text.is_empty() { default.to_vec() } else { text };
    Some(User { uid, gid, groups: Vec::new(), name, home: or(home, b"/"), shell: or(shell, b"/bin/sh") })
}

fn member(line: &[u8], name: &[u8]) -> Option<u32> {
    let mut fields = line.split(|byte| *byte == b':');
    let (_, _, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    members.split(|byte| *byte == b',').any(|member| member == name).then(|| parse(gid)).flatten()
}

fn parse(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read() {
        let user = entry(b"www:x:33:34:Web:/var/www:").unwrap();
        assert_eq!((user.uid, user.gid, &user.home[..], &user.shell[..]), (33, 34, &b"/var/www"[..], &b"/bin/sh"[..]));
        assert!(entry(b"broken:x:one").is_none());
        assert_eq!(member(b"adm:x:4:syslog,www", b"www"), Some(4));
        assert_eq!(member(b"adm:x:4:syslog,www", b"ww"), None);
    }
}
