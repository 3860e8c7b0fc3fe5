//! The lock file beside a recipe: which packages exactly. Version 1.
//!
//! A lock that fits its recipe, with its packages in the cache, needs neither apt nor a network.
//! It names no host: where an archive is comes from the machine's apt at the time of fetching.

use std::{collections::BTreeMap, fs, io, path::Path};

use burgeon_api::{
    Error, Result,
    document::Document,
    recipe::{Kind, Recipe},
};
use serde::{Deserialize, Serialize};

use crate::hash;

/// What a package is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    /// Installed in the image.
    System,
    /// Holds the kernel and its modules.
    Kernel,
    /// Busybox for an initramfs, the image's or the one in which the image is configured.
    Busybox,
}

/// One package, told by its bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Locked {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
    pub(crate) role: Role,
    /// The code name under which the archive lists it, such as `bookworm-security`.
    pub(crate) archive: String,
    /// Where it is below the archive's root.
    pub(crate) file: String,
    pub(crate) size: u64,
    pub(crate) sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    /// The version of this file format: 1.
    pub(crate) format: u32,
    /// SHA-256 of the parts of the recipe that choose packages.
    pub(crate) inputs: String,
    #[serde(rename = "package")]
    pub(crate) packages: Vec<Locked>,
}

const FORMAT: u32 = 1;
const HEADING: &str =
    "# The packages of the recipe beside this file. Written by `burgeon image build`; keep it with the recipe.\n";

/// A digest of what the choice of packages depends on.
pub(crate) fn inputs(recipe: &Recipe, architecture: &str) -> String {
    let mut packages: Vec<&str> = recipe.packages.iter().map(String::as_str).collect();
    packages.sort_unstable();
    packages.dedup();
    let kind = match recipe.kind {
        Kind::Disk => "disk",
        Kind::Initramfs => "initramfs",
    };
    let text = format!(
        "burgeon lock inputs 1\n{kind}\n{}\n{architecture}\n{}\n{}\n",
        recipe.suite,
        recipe.kernel,
        packages.join(" ")
    );
    hash::of_bytes(text.as_bytes())
}

impl Lock {
    pub(crate) fn new(inputs: String, mut packages: Vec<Locked>) -> Lock {
        packages.sort();
        Lock { format: FORMAT, inputs, packages }
    }

    /// Reads a lock; `None` where there is no file.
    pub(crate) fn read(path: &Path) -> Result<Option<Lock>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), &error)),
        };
        let document = Document::new(path.display().to_string(), text);
        let lock: Lock = document.parse().map_err(hint)?;
        if lock.format != FORMAT {
            let message = format!("lock format {} is not known; this Burgeon reads format 1", lock.format);
            return Err(hint(document.error_at(&["format".into()], message)));
        }
        for (index, package) in lock.packages.iter().enumerate() {
            package.check().map_err(|message| hint(document.error_at(&["package".into(), index.into()], message)))?;
        }
        Ok(Some(lock))
    }

    pub(crate) fn text(&self) -> Result<String> {
        let body = toml::to_string(self).map_err(|error| Error::internal(format!("cannot write a lock: {error}")))?;
        Ok(format!("{HEADING}{body}"))
    }

    /// The one package of a role.
    pub(crate) fn of_role(&self, role: Role) -> Result<&Locked> {
        let mut found = self.packages.iter().filter(|package| package.role == role);
        match (found.next(), found.next()) {
            (Some(package), None) => Ok(package),
            _ => Err(hint(Error::invalid(format!("the lock does not name exactly one package of role {role:?}")))),
        }
    }

    /// The packages installed in the image, by name.
    pub(crate) fn system(&self) -> impl Iterator<Item = &Locked> {
        self.packages.iter().filter(|package| package.role == Role::System)
    }

    /// What differs in `new`, for people; empty where nothing does.
    pub(crate) fn changes(&self, new: &Lock) -> Vec<String> {
        let versions = |lock: &Lock| -> BTreeMap<(Role, String), (String, String)> {
            let entry = |package: &Locked| {
                ((package.role, package.name.clone()), (package.version.clone(), package.sha256.clone()))
            };
            lock.packages.iter().map(entry).collect()
        };
        let (old, new) = (versions(self), versions(new));
        let mut lines = Vec::new();
        for ((role, name), (version, sha256)) in &new {
            match old.get(&(*role, name.clone())) {
                None => lines.push(format!("{name} {version} added")),
                Some((before, _)) if before != version => lines.push(format!("{name} {before} -> {version}")),
                Some((_, before)) if before != sha256 => lines.push(format!("{name} {version} has other contents")),
                Some(_) => {}
            }
        }
        for (key, (version, _)) in &old {
            if !new.contains_key(key) {
                lines.push(format!("{} {version} removed", key.1));
            }
        }
        lines
    }
}

impl Locked {
    /// A lock comes from a file that anyone may have written; its parts become paths and arguments.
    fn check(&self) -> std::result::Result<(), String> {
        let word = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.~:_/".contains(&byte))
                && !text.split('/').any(|part| part.is_empty() || part == "." || part == "..")
                && !text.starts_with('-')
        };
        let plain = |text: &str| word(text) && !text.contains('/');
        let digits = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if !plain(&self.name) || !plain(&self.version) || !plain(&self.architecture) {
            return Err("the package's name, version or architecture is malformed".into());
        }
        if !word(&self.file) || !self.file.ends_with(".deb") || !word(&self.archive) {
            return Err(format!("the archive or file of package {} is malformed", self.name));
        }
        if self.sha256.len() != 64 || !self.sha256.bytes().all(digits) {
            return Err(format!("the sha256 of package {} is not 64 hexadecimal digits", self.name));
        }
        Ok(())
    }
}

fn hint(error: Error) -> Error {
    error.with_hint("delete the lock file; the next build makes a new one")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str) -> Locked {
        Locked {
            name: name.into(),
            version: version.into(),
            architecture: "amd64".into(),
            role: Role::System,
            archive: "bookworm".into(),
            file: format!("pool/main/{name}_{version}_amd64.deb"),
            size: 10,
            sha256: hash::of_bytes(version.as_bytes()),
        }
    }

    fn recipe(extra: &str) -> Recipe {
        let text = format!(
            "format = 1\nname = \"d\"\nkind = \"disk\"\nsuite = \"bookworm\"\nkernel = \"linux-image-cloud-amd64\"\nsize = \"2G\"\n{extra}"
        );
        Recipe::read(&Document::new("r.toml", text)).unwrap()
    }

    #[test]
    fn the_bytes_of_a_lock_are_fixed_and_read_back() {
        let lock = Lock::new("abc".into(), vec![package("b", "2"), package("a", "1:1.0~rc1+b1")]);
        let text = lock.text().unwrap();
        let start = "# The packages of the recipe beside this file. Written by `burgeon image build`; keep it with the recipe.\n\
            format = 1\ninputs = \"abc\"\n\n[[package]]\nname = \"a\"\nversion = \"1:1.0~rc1+b1\"\narchitecture = \"amd64\"\n\
            role = \"system\"\narchive = \"bookworm\"\nfile = \"pool/main/a_1:1.0~rc1+b1_amd64.deb\"\nsize = 10\nsha256 = \"";
        assert!(text.starts_with(start), "{text}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.lock");
        assert_eq!(Lock::read(&path).unwrap(), None);
        fs::write(&path, text).unwrap();
        assert_eq!(Lock::read(&path).unwrap(), Some(lock));
    }

    #[test]
    fn only_what_chooses_packages_makes_a_lock_stale() {
        let plain = inputs(&recipe("packages = [\"bb\", \"aa\"]"), "amd64");
        assert_eq!(plain, inputs(&recipe("description = \"x\"\npackages = [\"aa\", \"bb\"]"), "amd64"));
        assert_ne!(plain, inputs(&recipe("packages = [\"aa\"]"), "amd64"));
        assert_ne!(plain, inputs(&recipe("packages = [\"aa\", \"bb\"]"), "arm64"));
    }

    #[test]
    fn changes_are_told_by_name() {
        let old = Lock::new(String::new(), vec![package("a", "1"), package("b", "1"), package("c", "1")]);
        let new = Lock::new(String::new(), vec![package("a", "1"), package("b", "2"), package("d", "1")]);
        assert_eq!(old.changes(&new), ["b 1 -> 2", "d 1 added", "c 1 removed"]);
        assert!(old.changes(&old).is_empty());
    }

    #[test]
    fn hostile_and_unknown_locks_are_refused_with_their_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.lock");
        let good = Lock::new("abc".into(), vec![package("a", "1")]).text().unwrap();
        for (from, to, word) in [
            ("pool/main/a_1", "pool/../../a_1", "malformed"),
            ("name = \"a\"", "name = \"-o\"", "malformed"),
            ("\"bookworm\"", "\"/etc\"", "malformed"),
            ("sha256 = \"", "sha256 = \"../", "64"),
            ("format = 1", "format = 7", "format 7"),
            ("size = 10", "sise = 10", "sise"),
        ] {
            fs::write(&path, good.replace(from, to)).unwrap();
            let error = Lock::read(&path).unwrap_err();
            assert!(error.message.contains(word) && error.location.is_some() && error.hint.is_some(), "{error}");
        }
    }
}
