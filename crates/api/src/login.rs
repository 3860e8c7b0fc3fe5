//! Who may log in to a VM of a foreign image: told to its cloud-init by the NoCloud seed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, path_text};

/// A user and the SSH keys that open their account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// Made, with the right to become root, where the image has no such user. Absent: the image's own default user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Public keys, each a line as in `id_ed25519.pub`.
    pub keys: Vec<String>,
}

const KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];
/// As useradd(8) has it.
const LONGEST_USER: usize = 32;
/// An RSA key of 16384 bits needs about 2800.
const LONGEST_KEY: usize = 8192;
const MOST_KEYS: usize = 64;

impl Login {
    /// # Errors
    /// `Invalid`, with what is wrong.
    pub fn check(&self) -> Result<()> {
        if let Some(user) = &self.user {
            check_user(user)?;
        }
        if self.keys.is_empty() || self.keys.len() > MOST_KEYS {
            return Err(Error::invalid(format!("a login has 1 to {MOST_KEYS} keys, not {}", self.keys.len())));
        }
        self.keys.iter().try_for_each(|key| check_key(key))
    }
}

fn check_user(user: &str) -> Result<()> {
    let good = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '_' | '-');
    let begins = user.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    if begins && user.len() <= LONGEST_USER && user.chars().all(good) {
        return Ok(());
    }
    Err(Error::invalid(format!("\"{}\" is no name of a user", path_text::printable(user)))
        .with_hint(format!("up to {LONGEST_USER} of a-z, 0-9, _ and -, beginning with a letter or _")))
}

/// Checks a line with a public key: its kind, the key itself, and a comment.
///
/// # Errors
/// `Invalid`, with what is wrong.
pub fn check_key(key: &str) -> Result<()> {
    let refused = |what: &str| {
        Err(Error::invalid(format!("the key {what}")).with_hint(
            "give the public half, one line, such as ~/.ssh/id_ed25519.pub; ssh-keygen -t ed25519 makes a pair",
        ))
    };
    if key.contains('\0') {
        return refused("holds a NUL byte");
    }
    if key.contains("PRIVATE KEY") {
        return refused("is a private one");
    }
    if key.contains(['\n', '\r']) {
        return refused("holds more than one line");
    }
    if key.len() > LONGEST_KEY || key.chars().any(char::is_control) {
        return refused("is no public SSH key");
    }
    let mut words = key.split(' ');
    let (kind, body) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !KINDS.contains(&kind) {
        return refused(&format!("is of the kind \"{}\", which is not known", path_text::printable(kind)));
    }
    // The key says its kind once more inside: length, then text.
    let inside = decoded(body).filter(|bytes| {
        let length = bytes.get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        length == u32::try_from(kind.len()).ok() && bytes[4..].starts_with(kind.as_bytes())
    });
    if inside.is_some_and(|bytes| bytes.len() > 4 + kind.len()) { Ok(()) } else { refused("is damaged") }
}

/// Base64, with its padding.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let plain = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - plain.len() > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for byte in plain.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g me@desk";

    #[test]
    fn a_good_key_passes_and_a_bad_one_is_refused_with_its_fault() {
        check_key(GOOD).unwrap();
        check_key(GOOD.strip_suffix(" me@desk").unwrap()).unwrap();
        for (key, word) in [
            (String::new(), "not known"),
            (format!("{GOOD}\nssh-ed25519 AAAA"), "more than one line"),
            (format!("{GOOD}\n"), "more than one line"),
            (format!("{GOOD}\0"), "NUL"),
            (format!("{GOOD}\u{1b}[2J"), "no public SSH key"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----".into(), "private"),
            (GOOD.replace("ssh-ed25519", "ssh-dss"), "ssh-dss"),
            (GOOD.replace("ssh-ed25519", "ssh-rsa"), "damaged"),
            (GOOD.replace("AAAAC3", "AAAAC"), "damaged"),
            (GOOD.replace("AAAAC3", "AAAA!3"), "damaged"),
            ("ssh-ed25519".into(), "damaged"),
            (format!("command=\"x\" {GOOD}"), "not known"),
        ] {
            let error = check_key(&key).unwrap_err();
            assert!(error.message.contains(word) && error.hint.is_some(), "{key:?}: {error}");
        }
    }

    #[test]
    fn users_have_names_that_useradd_takes() {
        let login = |user: &str| Login { user: Some(user.into()), keys: vec![GOOD.into()] };
        for good in ["me", "_x", "a-1"] {
            login(good).check().unwrap();
        }
        for bad in ["", "Me", "1a", "a b", "a\nb", "a\0", "root: {}", &"a".repeat(33)] {
            let error = login(bad).check().unwrap_err();
            assert!(error.message.contains("no name of a user"), "{error}");
        }
        assert!(Login { user: None, keys: vec![] }.check().is_err());
    }
}
