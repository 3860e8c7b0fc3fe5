//! Debian packages: reading them, and unpacking them into a tree as dpkg would.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use burgeon_api::{Error, Result};

use crate::{
    control::{Paragraph, dependency_names, paragraph},
    dpkg,
    process::{self, Limits, Tools},
    tree::{Kind, Meta, Tree, entry_path, joined, parent, shown},
};

const DEADLINE: Duration = Duration::from_secs(300);
/// Packages are decompressed on this many threads; one more than that gained nothing on two processors.
const THREADS: usize = 2;

/// A package, decompressed.
pub(crate) struct Deb {
    pub(crate) control: Paragraph,
    /// Files of the control part by name, with their permission bits; `control` itself left out.
    pub(crate) control_files: BTreeMap<String, (u32, Vec<u8>)>,
    /// The tar of its files.
    pub(crate) data: Vec<u8>,
}

impl Deb {
    pub(crate) fn field(&self, name: &str) -> &str {
        self.control.get(name).unwrap_or_default()
    }

    pub(crate) fn name(&self) -> &str {
        self.field("Package")
    }

    fn replaces(&self, other: &str) -> bool {
        dependency_names(self.field("Replaces")).any(|name| name == other)
    }
}

/// Reads one package with `dpkg-deb`.
pub(crate) fn read(package: &Path, tools: &Tools, limits: Limits<'_>) -> Result<Deb> {
    let output = |part: &str| {
        let mut command = process::command(&tools.dpkg_deb);
        command.arg(part).arg(package);
        process::run_ok(command, limits.within(DEADLINE)).map(|finished| finished.stdout)
    };
    let (control, control_files) = read_control(&output("--ctrl-tarfile")?)?;
    Ok(Deb { control, control_files, data: output("--fsys-tarfile")? })
}

type Control = (Paragraph, BTreeMap<String, (u32, Vec<u8>)>);

fn read_control(bytes: &[u8]) -> Result<Control> {
    let damaged = |error: io::Error| Error::damaged(format!("the package's control part cannot be read: {error}"));
    let mut control = None;
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let path = entry_path(&entry.path_bytes())?;
        let name = String::from_utf8_lossy(&path).into_owned();
        if !entry.header().entry_type().is_file() || name.contains('/') {
            continue;
        }
        let mode = entry.header().mode().map_err(damaged)? & 0o777;
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(damaged)?;
        if name == "control" {
            control = Some(paragraph(&String::from_utf8_lossy(&content)));
        } else {
            files.insert(name, (mode, content));
        }
    }
    match control {
        Some(control) => Ok((control, files)),
        None => Err(Error::damaged("the package has no control file")),
    }
}

/// Reads packages on a few threads and hands them over in the given order.
pub(crate) fn read_all(
    packages: &[PathBuf],
    tools: &Tools,
    limits: Limits<'_>,
    mut each: impl FnMut(usize, Deb) -> Result<()>,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(THREADS);
        for _ in 0..THREADS {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(package) = packages.get(index) else { return };
                    // The receiver is gone when unpacking failed: nothing more to do.
                    if sender.send((index, read(package, tools, limits))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut wanted = 0;
        for (index, deb) in receiver {
            early.insert(index, deb);
            while let Some(deb) = early.remove(&wanted) {
                each(wanted, deb?)?;
                wanted += 1;
            }
        }
        Ok(())
    })
}

/// Unpacks packages into one tree and remembers whose each path is.
#[derive(Default)]
pub(crate) struct Unpacker {
    /// Which package each path that is no directory came from, with the names it replaces.
    owners: BTreeMap<Vec<u8>, usize>,
    packages: Vec<(String, Paragraph)>,
    /// The newest time found in any package.
    pub(crate) newest: u64,
}

/// What unpacking one package found.
pub(crate) struct Unpacked {
    /// Its paths in the order of the archive, each with a leading slash, as dpkg's lists have them.
    pub(crate) list: Vec<Vec<u8>>,
}

impl Unpacker {
    /// Unpacks one package.
    ///
    /// # Errors
    /// `Invalid` where a path leads out of the tree or two packages hold the same file, neither
    /// saying that it replaces the other.
    pub(crate) fn unpack(&mut self, deb: &Deb, tree: &mut Tree) -> Result<Unpacked> {
        let index = self.packages.len();
        self.packages.push((deb.name().to_string(), deb.control.clone()));
        let damaged = |error: io::Error| Error::damaged(format!("it cannot be read: {error}"));
        let mut list = Vec::new();
        let mut archive = tar::Archive::new(deb.data.as_slice());
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            let raw = entry_path(&entry.path_bytes())?;
            list.push(if raw.is_empty() { b"/.".to_vec() } else { [b"/", raw.as_slice()].concat() });
            let header = entry.header();
            let meta = Meta {
                mode: header.mode().map_err(damaged)? & 0o7777,
                uid: id(header.uid().map_err(damaged)?)?,
                gid: id(header.gid().map_err(damaged)?)?,
                mtime: header.mtime().map_err(damaged)?,
                attributes: BTreeMap::new(),
            };
            self.newest = self.newest.max(meta.mtime);
            if dpkg::excluded(&raw) {
                continue;
            }
            let path = tree.canonical(&raw)?;
            self.put(index, deb, tree, &path, meta, &mut entry)?;
        }
        Ok(Unpacked { list })
    }

    fn put(
        &mut self,
        index: usize,
        deb: &Deb,
        tree: &mut Tree,
        path: &[u8],
        meta: Meta,
        entry: &mut tar::Entry<'_, &[u8]>,
    ) -> Result<()> {
        let kind = entry.header().entry_type();
        let there = tree.get(path).map(|node| node.kind.clone());
        if kind.is_dir() {
            // As dpkg does, a directory that is there stays as it is, and so does a link to one.
            return match there {
                Some(Kind::Directory) => Ok(()),
                Some(Kind::Link(target)) if leads_to_directory(tree, path, &target) => Ok(()),
                _ => {
                    tree.make_parents(path)?;
                    tree.put_directory(path, meta)
                }
            };
        }
        if there == Some(Kind::Directory) {
            return Ok(());
        }
        if let Some(owner) = self.owners.get(path).copied()
            && owner != index
        {
            let (other, control) = &self.packages[owner];
            let replaced = dependency_names(control.get("Replaces").unwrap_or_default());
            if !deb.replaces(other) {
                if replaced.into_iter().any(|name| name == deb.name()) {
                    return Ok(());
                }
                let message = format!("packages {other} and {} both hold /{}", deb.name(), shown(path));
                return Err(Error::invalid(message)
                    .with_hint("leave one of them out; diversions between packages are not supported in recipes"));
            }
        }
        self.owners.insert(path.to_vec(), index);
        tree.make_parents(path)?;
        put_entry(tree, path, meta, entry)
    }
}

/// Puts what is no directory from a tar entry into a tree.
pub(crate) fn put_entry<R: Read>(
    tree: &mut Tree,
    path: &[u8],
    meta: Meta,
    entry: &mut tar::Entry<'_, R>,
) -> Result<()> {
    let damaged = |error: io::Error| Error::damaged(format!("the archive cannot be read: {error}"));
    let kind = entry.header().entry_type();
    if kind.is_symlink() {
        let target = entry.link_name_bytes().unwrap_or_default().into_owned();
        tree.put_link(path, meta, &target)
    } else if kind.is_hard_link() {
        let target = tree.canonical(&entry_path(&entry.link_name_bytes().unwrap_or_default())?)?;
        tree.put_hard_link(path, &target)
    } else if kind.is_character_special() || kind.is_block_special() {
        let number = |number: io::Result<Option<u32>>| number.map_err(damaged).map(Option::unwrap_or_default);
        let (major, minor) = (number(entry.header().device_major())?, number(entry.header().device_minor())?);
        tree.put_special(path, meta, Kind::Device { block: kind.is_block_special(), major, minor })
    } else if kind.is_fifo() {
        tree.put_special(path, meta, Kind::Fifo)
    } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
        tree.put_file(path, meta, entry)
    } else {
        Err(Error::invalid(format!("/{} is of a kind that an image cannot hold", shown(path))))
    }
}

pub(crate) fn id(number: u64) -> Result<u32> {
    u32::try_from(number).map_err(|_| Error::invalid(format!("owner {number} is beyond what a disk can hold")))
}

fn leads_to_directory(tree: &Tree, path: &[u8], target: &[u8]) -> bool {
    let full = if target.starts_with(b"/") { target.to_vec() } else { joined(parent(path), target) };
    // One more part makes the tree follow the link itself, should the target be one.
    let inside = tree.canonical(&joined(&full, b"x"));
    inside.is_ok_and(|inside| tree.get(parent(&inside)).is_some_and(|node| node.kind == Kind::Directory))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn deb(control: &str, build: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Deb {
        let mut builder = tar::Builder::new(Vec::new());
        build(&mut builder);
        Deb { control: paragraph(control), control_files: BTreeMap::new(), data: builder.into_inner().unwrap() }
    }

    /// Writes an entry whose name may be anything, which the library itself would refuse.
    pub(crate) fn entry(
        builder: &mut tar::Builder<Vec<u8>>,
        name: &str,
        kind: tar::EntryType,
        link: &str,
        data: &[u8],
    ) {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o4711 });
        header.set_uid(0);
        header.set_gid(42);
        header.set_mtime(7);
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data).unwrap();
    }

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree::create(&directory.path().join("tree")).unwrap();
        (directory, tree)
    }

    #[test]
    fn packages_unpack_through_the_merged_directories() {
        let (_directory, mut tree) = tree();
        dpkg::merge_directories(&mut tree).unwrap();
        let deb = deb("Package: a\n", |builder| {
            entry(builder, "./", tar::EntryType::Directory, "", b"");
            entry(builder, "./bin/", tar::EntryType::Directory, "", b"");
            entry(builder, "./bin/su", tar::EntryType::Regular, "", b"program");
            entry(builder, "./bin/su2", tar::EntryType::Link, "./bin/su", b"");
            entry(builder, "./usr/share/man/man1/su.1.gz", tar::EntryType::Regular, "", b"text");
        });
        let mut unpacker = Unpacker::default();
        let unpacked = unpacker.unpack(&deb, &mut tree).unwrap();
        assert_eq!(unpacked.list[..3], [b"/.".to_vec(), b"/bin".to_vec(), b"/bin/su".to_vec()]);
        let meta = &tree.get(b"usr/bin/su").unwrap().meta;
        assert_eq!((meta.mode, meta.gid, meta.mtime, unpacker.newest), (0o4711, 42, 7, 7));
        assert_eq!(tree.read(b"usr/bin/su2").unwrap(), b"program");
        // Manual pages are left out as dpkg would by our configuration, yet listed.
        assert!(tree.get(b"usr/share/man/man1").is_none());
        assert_eq!(unpacked.list.len(), 5);
    }

    #[test]
    fn hostile_packages_stay_inside() {
        let (directory, mut tree) = tree();
        let outside = directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let out = outside.to_string_lossy().into_owned();
        type Entries<'a> = &'a [(&'a str, tar::EntryType, &'a str)];
        let hostile: [Entries<'_>; 3] = [
            &[("./../outside/a", tar::EntryType::Regular, "")],
            &[("./b", tar::EntryType::Link, "../outside/b")],
            &[("./c", tar::EntryType::Symlink, &out), ("./c/d", tar::EntryType::Regular, "")],
        ];
        for entries in hostile {
            let deb = deb("Package: evil\n", |builder| {
                for (name, kind, link) in entries {
                    entry(builder, name, *kind, link, b"");
                }
            });
            // Refused, or unpacked inside the tree, where the link leads to a place of the tree.
            drop(Unpacker::default().unpack(&deb, &mut tree));
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn two_owners_of_a_file_are_told_unless_one_replaces() {
        let file = |builder: &mut tar::Builder<Vec<u8>>| entry(builder, "./f", tar::EntryType::Regular, "", b"x");
        let (_directory, mut tree) = tree();
        let mut unpacker = Unpacker::default();
        unpacker.unpack(&deb("Package: a\n", file), &mut tree).map(drop).unwrap();
        let error = unpacker.unpack(&deb("Package: b\n", file), &mut tree).map(drop).unwrap_err();
        assert_eq!(error.message, "packages a and b both hold /f");
        unpacker.unpack(&deb("Package: c\nReplaces: a (<< 2), b\n", file), &mut tree).map(drop).unwrap();
        unpacker.unpack(&deb("Package: c2\nReplaces: c\n", file), &mut tree).map(drop).unwrap();
    }
}
