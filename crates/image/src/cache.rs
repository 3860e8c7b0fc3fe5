//! The cache of packages: `packages/<sha256>.deb`. A package is checked each time it is used,
//! since an hour of work on a damaged copy would be lost work, and reading it once more is cheap.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result};

use crate::{hash, lock::Locked, work};

pub(crate) struct Cache {
    directory: PathBuf,
}

impl Cache {
    pub(crate) fn open(cache: &Path) -> Result<Cache> {
        let directory = cache.join("packages");
        work::create_directories(&directory)?;
        Ok(Cache { directory })
    }

    fn path(&self, sha256: &str) -> PathBuf {
        self.directory.join(format!("{sha256}.deb"))
    }

    /// Whether a package is there with its right size; its bytes are checked by [`Cache::verified`].
    pub(crate) fn has(&self, package: &Locked) -> bool {
        fs::metadata(self.path(&package.sha256)).is_ok_and(|metadata| metadata.len() == package.size)
    }

    /// The package's file, its bytes checked. A damaged file is removed and told as missing.
    pub(crate) fn verified(&self, package: &Locked) -> Result<Option<PathBuf>> {
        let path = self.path(&package.sha256);
        if !self.has(package) {
            return Ok(None);
        }
        if hash::of_file(&path)? == package.sha256 {
            return Ok(Some(path));
        }
        fs::remove_file(&path).map_err(|error| Error::io(format!("cannot remove {}", path.display()), &error))?;
        Ok(None)
    }

    /// Moves a fetched file into the cache, if it is what the lock says.
    pub(crate) fn insert(&self, package: &Locked, fetched: &Path) -> Result<()> {
        if hash::of_file(fetched)? != package.sha256 {
            return Err(Error::damaged(format!(
                "package {} {} was fetched with other contents than the lock says",
                package.name, package.version
            )));
        }
        let to = self.path(&package.sha256);
        let insert = || -> std::io::Result<()> {
            fs::File::open(fetched)?.sync_data()?;
            fs::rename(fetched, &to)
        };
        insert().map_err(|error| Error::io(format!("cannot put {} into the cache", package.name), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::Role;

    #[test]
    fn damaged_packages_are_noticed_and_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let package = Locked {
            name: "a".into(),
            version: "1".into(),
            architecture: "all".into(),
            role: Role::System,
            archive: "bookworm".into(),
            file: "a.deb".into(),
            size: 5,
            sha256: hash::of_bytes(b"hello"),
        };
        let fetched = directory.path().join("fetched");
        fs::write(&fetched, "wrong").unwrap();
        assert!(cache.insert(&package, &fetched).unwrap_err().message.contains("other contents"));
        fs::write(&fetched, "hello").unwrap();
        cache.insert(&package, &fetched).unwrap();
        let path = cache.verified(&package).unwrap().unwrap();
        fs::write(&path, "jello").unwrap();
        assert!(cache.has(&package));
        assert_eq!(cache.verified(&package).unwrap(), None);
        assert!(!path.exists());
    }
}
