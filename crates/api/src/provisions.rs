//! What a VM is given before its workload runs: environment, files and secrets.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{Error, Result, path_text::printable};

/// All values and names of an environment, in bytes: with the secrets they go to the guest in one message.
pub const MOST_ENVIRONMENT: usize = 16 << 10;
pub const MOST_VARIABLES: usize = 256;
/// All files, in bytes.
pub const MOST_FILES: usize = 1 << 20;
/// All secrets with their names, in bytes.
pub const MOST_SECRETS: usize = 32 << 10;
const MOST_FILE_COUNT: usize = 256;
const MOST_SECRET_COUNT: usize = 64;
const LONGEST_SECRET_NAME: usize = 128;
/// Where the agent has its own files.
const AGENTS: &str = "/run/burgeon";
/// In a value it stands for the number of the VM among those of one request, from 1 on.
const ORDINAL: &str = "{n}";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Provisions {
    /// Variables that every command in the VM has, and that are in `/run/burgeon/environment`. In values, `{n}` stands for
    /// the number of the VM among those of the request.
    pub environment: BTreeMap<String, String>,
    pub files: Vec<ProvidedFile>,
    /// By name, for `/run/burgeon/secrets`. They are kept in memory only.
    pub secrets: BTreeMap<String, Content>,
}

/// A file of root's, which takes the place of one that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvidedFile {
    /// Absolute. Directories that are missing are made.
    pub path: String,
    /// Permission bits.
    #[serde(default = "readable")]
    pub mode: u32,
    pub content: Content,
}

/// The permission bits of a file for which none are given.
pub fn readable() -> u32 {
    0o644
}

/// Bytes; in JSON, base64. They are shown in no log.
#[derive(Clone, Default, PartialEq, Eq, JsonSchema)]
#[schemars(transparent)]
pub struct Content(#[schemars(with = "String")] pub Vec<u8>);

impl fmt::Debug for Content {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} bytes", self.0.len())
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        STANDARD.decode(text).map(Content).map_err(|_| de::Error::custom("the content is not base64"))
    }
}

impl Provisions {
    pub fn is_empty(&self) -> bool {
        self.environment.is_empty() && self.files.is_empty() && self.secrets.is_empty()
    }

    /// # Errors
    /// `Invalid`, with the variable, file or secret that is wrong, and why.
    pub fn check(&self) -> Result<()> {
        self.check_environment()?;
        self.check_files()?;
        self.check_secrets()
    }

    /// What the VM of this number gets.
    #[must_use]
    pub fn numbered(&self, number: usize) -> Provisions {
        let mut own = self.clone();
        let number = number.to_string();
        own.environment.values_mut().for_each(|value| *value = value.replace(ORDINAL, &number));
        own
    }

    fn check_environment(&self) -> Result<()> {
        if self.environment.len() > MOST_VARIABLES {
            let count = self.environment.len();
            return Err(Error::invalid(format!("env: {count} variables; at most {MOST_VARIABLES} can be given")));
        }
        for (name, value) in &self.environment {
            let wrong = |what: &str| Err(Error::invalid(format!("env \"{}\": {what}", printable(name))));
            let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            if !begins || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                return wrong("a variable's name has letters, digits and _, and does not begin with a digit");
            }
            if value.contains('\0') {
                return wrong("its value holds a NUL byte");
            }
        }
        let bytes = self.environment.iter().map(|(name, value)| name.len() + value.len()).sum();
        within("env", bytes, MOST_ENVIRONMENT, "put what is large into a file: --file")
    }

    fn check_files(&self) -> Result<()> {
        if self.files.len() > MOST_FILE_COUNT {
            let count = self.files.len();
            return Err(Error::invalid(format!("file: {count} files; at most {MOST_FILE_COUNT} can be given")));
        }
        let mut paths = BTreeSet::new();
        for file in &self.files {
            let path = &file.path;
            let wrong = |what: &str| Err(Error::invalid(format!("file \"{}\": {what}", printable(path))));
            let mut parts = path.split('/').skip(1);
            if !path.starts_with('/') || path.contains('\0') || parts.any(|part| matches!(part, "" | "." | "..")) {
                return wrong("the path in the guest begins with /, and has no part that is empty, . or ..");
            }
            if path.strip_prefix(AGENTS).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
                return wrong("what is in /run/burgeon is the agent's");
            }
            if file.mode > 0o7777 {
                return wrong(&format!("{:o} are no permission bits", file.mode));
            }
            if !paths.insert(path) {
                return wrong("it is given twice");
            }
        }
        let bytes = self.files.iter().map(|file| file.content.0.len()).sum();
        within("file", bytes, MOST_FILES, "copy what is larger once the VM runs: burgeon vm cp")
    }

    fn check_secrets(&self) -> Result<()> {
        if self.secrets.len() > MOST_SECRET_COUNT {
            let count = self.secrets.len();
            return Err(Error::invalid(format!("secret: {count} secrets; at most {MOST_SECRET_COUNT} can be given")));
        }
        for name in self.secrets.keys() {
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
            if !begins || name.len() > LONGEST_SECRET_NAME || !name.chars().all(good) {
                return Err(Error::invalid(format!(
                    "secret \"{}\": its name has up to {LONGEST_SECRET_NAME} letters, digits, dots, _ and -, and begins with a letter, a digit or _",
                    printable(name)
                )));
            }
        }
        let bytes = self.secrets.iter().map(|(name, content)| name.len() + content.0.len()).sum();
        within("secret", bytes, MOST_SECRETS, "give a key by which the guest opens what is larger")
    }
}

fn within(what: &str, bytes: usize, most: usize, hint: &str) -> Result<()> {
    if bytes <= most {
        return Ok(());
    }
    Err(Error::invalid(format!("{what}: {bytes} bytes in all; at most {most} can be given")).with_hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(name: &str, value: &str) -> Provisions {
        Provisions { environment: [(name.into(), value.into())].into(), ..Provisions::default() }
    }

    fn file(path: &str, mode: u32, bytes: usize) -> ProvidedFile {
        ProvidedFile { path: path.into(), mode, content: Content(vec![0; bytes]) }
    }

    fn files(files: &[ProvidedFile]) -> Provisions {
        Provisions { files: files.to_vec(), ..Provisions::default() }
    }

    fn secret(name: &str, bytes: usize) -> Provisions {
        Provisions { secrets: [(name.into(), Content(vec![7; bytes]))].into(), ..Provisions::default() }
    }

    #[test]
    fn what_cannot_be_given_is_refused_by_its_name() {
        let good = [
            environment("_A1", "it's\nlong"),
            files(&[file("/etc/app.conf", 0o600, MOST_FILES), file("/run/burgeonet", 0o7777, 0)]),
            secret("db.password-1", 30_000),
            Provisions::default(),
        ];
        assert!(good.iter().all(|provisions| provisions.check().is_ok()));
        let many = |count: usize| (0..count).map(|n| format!("N{n}"));
        let bad = [
            (environment("1A", ""), "env \"1A\""),
            (environment("", ""), "env \"\""),
            (environment("A-B", ""), "env \"A-B\""),
            (environment("A", "\0"), "env \"A\": its value holds a NUL"),
            (environment("A", &"x".repeat(MOST_ENVIRONMENT)), "env: 16385 bytes"),
            (
                Provisions {
                    environment: many(257).map(|name| (name, String::new())).collect(),
                    ..Provisions::default()
                },
                "env: 257 variables",
            ),
            (files(&[file("etc/a", 0o644, 0)]), "file \"etc/a\""),
            (files(&[file("/etc/../a", 0o644, 0)]), "file \"/etc/../a\""),
            (files(&[file("/etc/", 0o644, 0)]), "file \"/etc/\""),
            (files(&[file("/run/burgeon/secrets/a", 0o644, 0)]), "the agent's"),
            (files(&[file("/a", 0o10000, 0)]), "10000 are no permission bits"),
            (files(&[file("/a", 0o644, 0), file("/a", 0o600, 0)]), "file \"/a\": it is given twice"),
            (files(&[file("/a", 0o644, MOST_FILES), file("/b", 0o644, 1)]), "file: 1048577 bytes"),
            (secret("..", 1), "secret \"..\""),
            (secret("a/b", 1), "secret \"a/b\""),
            (secret("", 1), "secret \"\""),
            (secret("a", MOST_SECRETS), "secret: 32769 bytes"),
        ];
        for (provisions, named) in bad {
            let error = provisions.check().unwrap_err();
            assert!(error.message.contains(named), "{error} names not {named}");
        }
    }

    #[test]
    fn a_number_stands_in_values_only() {
        let own = environment("N", "worker-{n} of {n}").numbered(3);
        assert_eq!(own.environment["N"], "worker-3 of 3");
    }

    #[test]
    fn contents_go_over_whole_and_are_not_shown() {
        let all = Provisions { files: vec![file("/a", 0o600, 3)], ..secret("key", 2) };
        let text = serde_json::to_string(&all).unwrap();
        assert!(text.contains("\"content\":\"AAAA\"") && text.contains("\"key\":\"Bwc=\""), "{text}");
        assert_eq!(serde_json::from_str::<Provisions>(&text).unwrap(), all);
        let shown = format!("{all:?}");
        assert!(shown.contains("\"key\": 2 bytes") && !shown.contains('7'), "{shown}");
        assert!(serde_json::from_str::<Content>("\"not base64\"").is_err());
    }
}
