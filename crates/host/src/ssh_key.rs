//! SSH host keys for clones: made here, because a guest that goes on from another one's memory is the last to trust with
//! random numbers. Ed25519 (RFC 8032), in the files that OpenSSH reads (its PROTOCOL.key).

use base64::{Engine, engine::general_purpose};
use burgeon_api::{Error, Result};
use ring::signature::{Ed25519KeyPair, KeyPair};
use sha2::{Digest, Sha256};

const KIND: &[u8] = b"ssh-ed25519";
/// OpenSSH's own width of a line.
const LINE: usize = 70;

/// The two files of a host key.
pub(crate) struct Files {
    pub(crate) private: Vec<u8>,
    pub(crate) public: Vec<u8>,
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(bytes);
}

/// The key of a seed, with the host's name as its comment. `check` is any number: whoever decrypts a file compares the
/// two that it holds.
///
/// # Errors
/// `Internal` for a seed that is none.
pub(crate) fn files(seed: &[u8; 32], check: [u8; 4], host_name: &str) -> Result<Files> {
    let pair = Ed25519KeyPair::from_seed_unchecked(seed)
        .map_err(|_| Error::internal("an SSH host key could not be made of its seed"))?;
    let point = pair.public_key().as_ref();
    let comment = format!("root@{host_name}");
    let mut public = Vec::new();
    put(&mut public, KIND);
    put(&mut public, point);

    let mut secret = [check, check].concat();
    put(&mut secret, KIND);
    put(&mut secret, point);
    put(&mut secret, &[&seed[..], point].concat());
    put(&mut secret, comment.as_bytes());
    // As a cipher with blocks of 8 bytes would need it, also without one.
    for padding in 1_u8..8 {
        if secret.len() % 8 != 0 {
            secret.push(padding);
        }
    }
    let mut whole = b"openssh-key-v1\0".to_vec();
    for part in [&b"none"[..], b"none", b""] {
        put(&mut whole, part);
    }
    whole.extend(1_u32.to_be_bytes());
    put(&mut whole, &public);
    put(&mut whole, &secret);

    let encoded = general_purpose::STANDARD.encode(whole);
    let mut private = String::from("-----BEGIN OPENSSH PRIVATE KEY-----\n");
    for line in encoded.as_bytes().chunks(LINE) {
        private.extend(line.iter().map(|byte| char::from(*byte)));
        private.push('\n');
    }
    private.push_str("-----END OPENSSH PRIVATE KEY-----\n");
    let public = format!("ssh-ed25519 {} {comment}\n", general_purpose::STANDARD.encode(public));
    Ok(Files { private: private.into_bytes(), public: public.into_bytes() })
}

/// The fingerprint of a public key, in the words of ssh-keygen; nothing for a file that holds none.
pub(crate) fn fingerprint(public: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(public).ok()?;
    let key = general_purpose::STANDARD.decode(text.split(' ').nth(1)?.trim()).ok()?;
    Some(format!("SHA256:{}", general_purpose::STANDARD_NO_PAD.encode(Sha256::digest(key))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_key_is_that_of_the_rfc() {
        // RFC 8032, section 7.1, test 1.
        let seed: Vec<u8> = (0..32)
            .map(|at| {
                let digits = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
                u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).unwrap()
            })
            .collect();
        let files = files(seed.first_chunk().unwrap(), [7; 4], "web").unwrap();
        let public = String::from_utf8(files.public.clone()).unwrap();
        assert_eq!(
            public,
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINdamAGCsQq31Uv+08lkBzoO4XLz2qYjJa8CGmj3B1Ea root@web\n"
        );
        let private = String::from_utf8(files.private).unwrap();
        let lines: Vec<&str> = private.lines().collect();
        assert!(lines.iter().all(|line| line.len() <= LINE));
        let whole = general_purpose::STANDARD.decode(lines[1..lines.len() - 1].concat()).unwrap();
        assert!(whole.starts_with(b"openssh-key-v1\0"));
        assert!(whole.windows(32).any(|part| part == seed));
        assert_eq!(fingerprint(&files.public).unwrap().len(), "SHA256:".len() + 43);
        assert_eq!(fingerprint(b"no key"), None);
    }

    #[test]
    fn openssh_reads_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(&[5; 32], [1, 2, 3, 4], "web").unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, &files.private).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let made = std::process::Command::new("ssh-keygen").args(["-y", "-f"]).arg(&path).output();
        // A machine without OpenSSH has only the other test.
        let Ok(made) = made else { return };
        assert_eq!(String::from_utf8(made.stdout).unwrap().into_bytes(), files.public);
    }
}
