//! dpkg's database, written as dpkg leaves it after unpacking: packages are `unpacked`, and
//! `dpkg --configure` inside the VM does the rest. Formats as in dpkg 1.21 (`/var/lib/dpkg`).

use std::collections::BTreeMap;

use burgeon_api::{Error, Result};
use md5::{Digest, Md5};

use crate::{
    deb::{Deb, Unpacked},
    hash,
    tree::{Kind, Meta, Tree},
};

/// What a guest never reads, left out as dpkg itself would by its option `path-exclude`: manuals,
/// translations, and the hardware database, whose compilation alone takes seconds.
const EXCLUDED: [&str; 6] = [
    "usr/share/man/",
    "usr/share/info/",
    "usr/share/locale/",
    "usr/share/lintian/",
    "usr/lib/udev/hwdb.d/",
    "lib/udev/hwdb.d/",
];
const DOCUMENTS: &str = "usr/share/doc/";

/// Whether a path of a package is left out. Copyright files stay.
pub(crate) fn excluded(path: &[u8]) -> bool {
    EXCLUDED.iter().any(|prefix| path.starts_with(prefix.as_bytes()))
        || (path.starts_with(DOCUMENTS.as_bytes())
            && path[DOCUMENTS.len()..].contains(&b'/')
            && !path.ends_with(b"/copyright"))
}

/// The same rules for dpkg inside the guest, so that packages installed later are treated alike.
fn exclusions() -> String {
    let mut text = String::from(
        "# Written by Burgeon. Remove to keep manuals and translations of packages installed from now on.\n",
    );
    for prefix in EXCLUDED {
        text.push_str(&format!("path-exclude=/{prefix}*\n"));
    }
    text.push_str(&format!("path-exclude=/{DOCUMENTS}*/*\npath-include=/{DOCUMENTS}*/copyright\n"));
    text
}

/// Makes `/bin` and its like links into `/usr`, before any package is unpacked.
pub(crate) fn merge_directories(tree: &mut Tree) -> Result<()> {
    tree.put_directory(b"usr", Meta::root(0o755))?;
    for name in ["bin", "lib", "lib64", "sbin"] {
        let target = format!("usr/{name}");
        tree.put_directory(target.as_bytes(), Meta::root(0o755))?;
        tree.put_link(name.as_bytes(), Meta::root(0o777), target.as_bytes())?;
    }
    Ok(())
}

/// A package of the database.
struct Package {
    status: String,
    /// The name under which its files in `info` begin.
    info: String,
    architecture: String,
    name: String,
    preinst: bool,
}

#[derive(Default)]
pub(crate) struct Database {
    packages: BTreeMap<String, Package>,
}

/// A script that must run before packages are configured.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Preinst {
    pub(crate) package: String,
    pub(crate) architecture: String,
    /// Its path in the tree.
    pub(crate) path: String,
}

const INFO: &str = "var/lib/dpkg/info";

impl Database {
    /// Prepares the directories; call it after the first package is unpacked or before, as suits.
    pub(crate) fn create(tree: &mut Tree) -> Result<Database> {
        for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "etc/dpkg/dpkg.cfg.d"] {
            tree.make_parents(directory.as_bytes())?;
            if tree.get(directory.as_bytes()).is_none() {
                tree.put_directory(directory.as_bytes(), Meta::root(0o755))?;
            }
        }
        put(tree, &format!("{INFO}/format"), 0o644, b"1\n")?;
        for empty in ["available", "diversions", "statoverride"] {
            put(tree, &format!("var/lib/dpkg/{empty}"), 0o644, b"")?;
        }
        put(tree, "etc/dpkg/dpkg.cfg.d/burgeon", 0o644, exclusions().as_bytes())?;
        Ok(Database::default())
    }

    /// Enters a package that was unpacked.
    pub(crate) fn add(&mut self, tree: &mut Tree, deb: &Deb, unpacked: &Unpacked) -> Result<()> {
        let name = deb.name();
        let architecture = deb.field("Architecture");
        if !usable(name) || !usable(architecture) {
            return Err(Error::damaged("the package's control file lacks a usable name or architecture"));
        }
        // Packages that can be installed for several architectures at once carry it in their names.
        let info = if deb.field("Multi-Arch") == "same" { format!("{name}:{architecture}") } else { name.to_string() };
        let mut list = Vec::new();
        for path in &unpacked.list {
            list.extend_from_slice(path);
            list.push(b'\n');
        }
        put(tree, &format!("{INFO}/{info}.list"), 0o644, &list)?;
        for (file, (mode, bytes)) in &deb.control_files {
            if usable(file) {
                put(tree, &format!("{INFO}/{info}.{file}"), if mode & 0o100 == 0 { 0o644 } else { 0o755 }, bytes)?;
            }
        }
        let package = Package {
            status: status(deb, &conffiles(tree, deb)?),
            info,
            architecture: architecture.to_string(),
            name: name.to_string(),
            preinst: deb.control_files.contains_key("preinst"),
        };
        self.packages.insert(name.to_string(), package);
        Ok(())
    }

    /// Writes the list of packages, and gives the scripts to run first.
    pub(crate) fn finish(self, tree: &mut Tree) -> Result<Vec<Preinst>> {
        let text: String = self.packages.values().map(|package| package.status.as_str()).collect();
        put(tree, "var/lib/dpkg/status", 0o644, text.as_bytes())?;
        let preinst = |package: &Package| Preinst {
            package: package.name.clone(),
            architecture: package.architecture.clone(),
            path: format!("/{INFO}/{}.preinst", package.info),
        };
        let mut scripts: Vec<&Package> = self.packages.values().filter(|package| package.preinst).collect();
        // It makes the first users and groups, which the others may name.
        scripts.sort_by_key(|package| package.name != "base-passwd");
        Ok(scripts.into_iter().map(preinst).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.packages.len()
    }
}

fn usable(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-._".contains(&byte))
}

/// The package's paragraph of the status file.
fn status(deb: &Deb, conffiles: &str) -> String {
    let mut text = format!("Package: {}\nStatus: install ok unpacked\n", deb.name());
    for (name, value) in deb.control.fields() {
        if !["package", "status", "conffiles"].contains(&name.to_ascii_lowercase().as_str()) {
            text.push_str(&format!("{name}: {value}\n"));
        }
    }
    text.push_str(conffiles);
    text.push('\n');
    text
}

/// The field that names configuration files with the MD5 of their bytes as unpacked. The files
/// are in place already, which dpkg accepts, so that it has none to move.
fn conffiles(tree: &Tree, deb: &Deb) -> Result<String> {
    let Some((_, list)) = deb.control_files.get("conffiles") else { return Ok(String::new()) };
    let mut text = String::new();
    for path in String::from_utf8_lossy(list).lines().filter(|line| line.starts_with('/')) {
        let canonical = tree.canonical(path.as_bytes())?;
        if tree.get(&canonical).is_some_and(|node| node.kind == Kind::File) {
            text.push_str(&format!(" {path} {}\n", hash::hex(&Md5::digest(tree.read(&canonical)?))));
        }
    }
    Ok(if text.is_empty() { text } else { format!("Conffiles:\n{text}") })
}

fn put(tree: &mut Tree, path: &str, mode: u32, mut bytes: &[u8]) -> Result<()> {
    let path = tree.canonical(path.as_bytes())?;
    tree.make_parents(&path)?;
    tree.put_file(&path, Meta::root(mode), &mut bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::{Unpacker, tests};

    #[test]
    fn the_database_is_what_dpkg_leaves_after_unpacking() {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::create(&directory.path().join("tree")).unwrap();
        let mut database = Database::create(&mut tree).unwrap();
        let mut unpacker = Unpacker::default();
        for (name, extra) in [("zlib", "Multi-Arch: same\n"), ("base-passwd", ""), ("aaa", "")] {
            let control = format!("Package: {name}\nVersion: 1\nArchitecture: amd64\n{extra}Description: d\n long\n");
            let mut deb = tests::deb(&control, |builder| {
                tests::entry(builder, &format!("./etc/{name}.conf"), tar::EntryType::Regular, "", b"a = 1\n");
            });
            deb.control_files.insert("preinst".into(), (0o755, b"#!/bin/sh\n".to_vec()));
            let conffiles = format!("/etc/{name}.conf\n/etc/gone\n").into_bytes();
            deb.control_files.insert("conffiles".into(), (0o644, conffiles));
            let unpacked = unpacker.unpack(&deb, &mut tree).unwrap();
            database.add(&mut tree, &deb, &unpacked).unwrap();
        }
        let scripts = database.finish(&mut tree).unwrap();
        let order: Vec<&str> = scripts.iter().map(|script| script.package.as_str()).collect();
        assert_eq!(order, ["base-passwd", "aaa", "zlib"]);
        assert_eq!(scripts[2].path, "/var/lib/dpkg/info/zlib:amd64.preinst");
        assert_eq!(tree.read(b"var/lib/dpkg/info/zlib:amd64.list").unwrap(), b"/etc/zlib.conf\n");
        let status = String::from_utf8(tree.read(b"var/lib/dpkg/status").unwrap()).unwrap();
        let first = "Package: aaa\nStatus: install ok unpacked\nVersion: 1\nArchitecture: amd64\nDescription: d\n long\n\
            Conffiles:\n /etc/aaa.conf 3d3eb1fa4ddd3a6c3ec04bd9ec8b2c4c\n\nPackage: base-passwd\n";
        let digest = hash::hex(&Md5::digest(b"a = 1\n"));
        assert!(status.starts_with(&first.replace("3d3eb1fa4ddd3a6c3ec04bd9ec8b2c4c", &digest)), "{status}");
    }

    #[test]
    fn manuals_stay_out_and_licences_stay_in() {
        for path in ["usr/share/man/man1/a.1.gz", "usr/share/doc/a/README", "usr/lib/udev/hwdb.d/20-pci.hwdb"] {
            assert!(excluded(path.as_bytes()), "{path}");
        }
        for path in ["usr/share/doc/a/copyright", "usr/share/doc/a", "usr/share/doc", "usr/share/man", "usr/bin/man"] {
            assert!(!excluded(path.as_bytes()), "{path}");
        }
    }
}
