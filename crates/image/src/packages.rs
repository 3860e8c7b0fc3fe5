//! From a recipe to verified packages: the lock where it fits, apt where it does not.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burgeon_api::{
    Error, ErrorKind, Result,
    document::{Document, Part},
    http::Progress,
    recipe::{Kind, Recipe},
};

use crate::{
    apt::Apt,
    cache::Cache,
    lock::{self, Lock, Locked, Role},
    process::{Limits, Tools},
    work,
};

pub(crate) const ARCHITECTURE: &str = "amd64";
const BUSYBOX: &str = "busybox-static";

/// What choosing packages needs to know.
pub(crate) struct Chooser<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) document: &'a Document,
    pub(crate) lock_path: &'a Path,
    pub(crate) locked: bool,
    pub(crate) archive: Option<&'a str>,
    pub(crate) cache: &'a Path,
    pub(crate) tools: &'a Tools,
    pub(crate) limits: Limits<'a>,
    pub(crate) progress: &'a (dyn Fn(Progress) + Sync),
}

impl Chooser<'_> {
    /// The lock that holds for this build: the one there, or a new one, already written.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let inputs = lock::inputs(self.recipe, ARCHITECTURE);
        let found = self.read_lock()?;
        match found {
            Some(lock) if lock.inputs == inputs => return Ok(lock),
            Some(_) if self.locked => {
                return Err(Error::conflict(format!("lock {} does not fit the recipe", self.lock_path.display()))
                    .with_hint("build once without --locked, and look at what changed"));
            }
            None if self.locked => {
                return Err(Error::not_found(format!("there is no lock {}", self.lock_path.display()))
                    .with_hint("build once without --locked"));
            }
            _ => {}
        }
        let reason = if found.is_some() { "the recipe asks for other packages than its lock" } else { "" };
        self.resolve(found.as_ref(), &inputs, reason)
    }

    /// The files of all packages of the lock, fetched where they are missing. Where the archive
    /// does not hold them any more, packages are chosen anew and the new lock is given back.
    pub(crate) fn fetch(&self, lock: Lock) -> Result<(Lock, BTreeMap<String, PathBuf>)> {
        match self.fetch_once(&lock) {
            Err(error) if error.kind == ErrorKind::NotFound && self.locked => {
                Err(error.with_hint("the archive has moved on; build without --locked to choose packages anew"))
            }
            Err(error) if error.kind == ErrorKind::NotFound => {
                // Chosen anew before, and kept here because the recipe's directory cannot be written.
                if let Ok(Some(second)) = Lock::read(&self.second_path())
                    && second.inputs == lock.inputs
                    && second != lock
                    && let Ok(files) = self.fetch_once(&second)
                {
                    return Ok((second, files));
                }
                (self.progress)(Progress::Note(error.message));
                let new = self.resolve(Some(&lock), &lock.inputs, "the archive no longer holds what the lock names")?;
                let files = self.fetch_once(&new)?;
                Ok((new, files))
            }
            other => other.map(|files| (lock, files)),
        }
    }

    fn fetch_once(&self, lock: &Lock) -> Result<BTreeMap<String, PathBuf>> {
        let cache = Cache::open(self.cache)?;
        let mut files = BTreeMap::new();
        let mut missing: Vec<&Locked> = Vec::new();
        for package in &lock.packages {
            self.limits.check_cancelled()?;
            match cache.verified(package)? {
                Some(file) => drop(files.insert(package.sha256.clone(), file)),
                None => missing.push(package),
            }
        }
        if missing.is_empty() {
            return Ok(files);
        }
        missing.sort_by(|a, b| a.sha256.cmp(&b.sha256));
        missing.dedup_by(|a, b| a.sha256 == b.sha256);
        let total: u64 = missing.iter().map(|package| package.size).sum();
        let step = |done: u64| {
            (self.progress)(Progress::Step { phase: "fetch".into(), done: done.min(total), total, bytes: true });
        };
        step(0);
        let work = work::WorkDirectory::create(&self.cache.join("partial"))?;
        let apt = self.open_apt()?;
        apt.fetch(&missing, work.path(), &mut || step(bytes_in(work.path())))?;
        for package in missing {
            cache.insert(package, &work.path().join(&package.sha256))?;
            let damaged = || Error::damaged(format!("package {} vanished from the cache", package.name));
            files.insert(package.sha256.clone(), cache.verified(package)?.ok_or_else(damaged)?);
        }
        step(total);
        Ok(files)
    }

    fn open_apt(&self) -> Result<Apt<'_>> {
        Apt::open(self.cache, &self.recipe.suite, ARCHITECTURE, self.archive, self.tools, self.limits)
            .map_err(|error| self.document.locate(&[Part::Key("suite")], error))
    }

    fn resolve(&self, old: Option<&Lock>, inputs: &str, reason: &str) -> Result<Lock> {
        let step = |done| {
            (self.progress)(Progress::Step { phase: "resolve".into(), done, total: 3, bytes: false });
        };
        step(0);
        let apt = self.open_apt()?;
        apt.update()?;
        step(1);
        let at = |key: &'static str| move |error: Error| self.document.locate(&[Part::Key(key)], error);
        let mut packages = Vec::new();
        if self.recipe.kind == Kind::Disk {
            // apt would take `usrmerge`, which converts a running system with perl; our tree is
            // merged from the start, and this package says so.
            let (mut names, exists) = apt.essential(&["usr-is-merged"])?;
            if exists == [true] {
                names.push("usr-is-merged".into());
            }
            names.extend(self.recipe.packages.iter().cloned());
            packages = apt.resolve(&names).map_err(at("packages"))?;
        }
        step(2);
        packages.push(apt.kernel(&self.recipe.kernel).map_err(at("kernel"))?);
        packages.push(apt.single(BUSYBOX, Role::Busybox)?);
        step(3);
        let new = Lock::new(inputs.to_string(), packages);
        if let Some(old) = old {
            let changes = old.changes(&new);
            let what = if changes.is_empty() { "nothing".to_string() } else { changes.join(", ") };
            (self.progress)(Progress::Note(format!("{reason}; packages were chosen anew, changed: {what}")));
        }
        self.write_lock(&new)?;
        Ok(new)
    }

    /// Where the lock is kept when the recipe's directory cannot be written.
    fn second_path(&self) -> PathBuf {
        self.cache.join("locks").join(format!("{}.lock", self.recipe.name))
    }

    fn read_lock(&self) -> Result<Option<Lock>> {
        let first = Lock::read(self.lock_path)?;
        let inputs = lock::inputs(self.recipe, ARCHITECTURE);
        if self.locked || first.as_ref().is_some_and(|lock| lock.inputs == inputs) {
            return Ok(first);
        }
        match Lock::read(&self.second_path()) {
            Ok(Some(second)) if second.inputs == inputs => Ok(Some(second)),
            _ => Ok(first),
        }
    }

    fn write_lock(&self, lock: &Lock) -> Result<()> {
        let text = lock.text()?;
        let Err(error) = work::write_atomically(self.lock_path, text.as_bytes()) else {
            drop(fs::remove_file(self.second_path()));
            return Ok(());
        };
        let second = self.second_path();
        work::create_directories(second.parent().unwrap_or(self.cache))?;
        work::write_atomically(&second, text.as_bytes())?;
        let message = format!("{}; the lock is kept in {}", error.message, second.display());
        (self.progress)(Progress::Note(message));
        Ok(())
    }
}

/// Bytes fetched so far; apt keeps what it is fetching in the same directory or one below.
fn bytes_in(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}
