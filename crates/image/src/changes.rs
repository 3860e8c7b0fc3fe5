//! Merges what a VM changed into a tree: the tar of an overlay's upper directory.
//!
//! A character device 0:0 says that a path is gone, the attribute `trusted.overlay.opaque` that
//! nothing below it remains (Linux, `Documentation/filesystems/overlayfs.rst`). The tar comes out
//! of a guest and is trusted with nothing: paths must stay inside and lead through directories.

use std::{collections::BTreeMap, io::Read};

use burgeon_api::{Error, Result};

use crate::{
    deb::{id, put_entry},
    tree::{Kind, Meta, Tree, entry_path, shown},
};

const ATTRIBUTE: &str = "SCHILY.xattr.";
const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// Kept attributes: file capabilities. Others belong to the overlay or to the machine.
const KEPT: &[u8] = b"security.capability";

/// Reads a tar of changes to its end.
pub(crate) fn apply(tree: &mut Tree, changes: impl Read) -> Result<()> {
    let damaged = |error: std::io::Error| Error::damaged(format!("the changes cannot be read: {error}"));
    let mut archive = tar::Archive::new(changes);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let path = entry_path(&entry.path_bytes())?;
        let mut attributes = BTreeMap::new();
        if let Some(extensions) = entry.pax_extensions().map_err(damaged)? {
            for extension in extensions {
                let extension = extension.map_err(damaged)?;
                if let Some(name) = extension.key_bytes().strip_prefix(ATTRIBUTE.as_bytes()) {
                    attributes.insert(name.to_vec(), extension.value_bytes().to_vec());
                }
            }
        }
        let opaque = attributes.remove(OPAQUE).is_some_and(|value| value == b"y");
        attributes.retain(|name, _| name == KEPT);
        let header = entry.header();
        let meta = Meta {
            mode: header.mode().map_err(damaged)? & 0o7777,
            uid: id(header.uid().map_err(damaged)?)?,
            gid: id(header.gid().map_err(damaged)?)?,
            mtime: header.mtime().map_err(damaged)?,
            attributes,
        };
        let kind = header.entry_type();
        let number = |number: std::io::Result<Option<u32>>| number.ok().flatten();
        if kind.is_character_special()
            && number(header.device_major()) == Some(0)
            && number(header.device_minor()) == Some(0)
        {
            tree.remove(&path)?;
        } else if kind.is_dir() {
            if opaque {
                clear(tree, &path)?;
            }
            check_parent(tree, &path)?;
            tree.put_directory(&path, meta)?;
        } else {
            check_parent(tree, &path)?;
            put_entry(tree, &path, meta, &mut entry)?;
        }
    }
    Ok(())
}

fn clear(tree: &mut Tree, path: &[u8]) -> Result<()> {
    // Children only; deeper paths go with them.
    for below in tree.below(path) {
        tree.remove(&below)?;
    }
    Ok(())
}

/// An overlay holds the directories above everything it holds, so no link can be among them.
fn check_parent(tree: &Tree, path: &[u8]) -> Result<()> {
    if path.is_empty() || tree.get(crate::tree::parent(path)).is_some_and(|node| node.kind == Kind::Directory) {
        Ok(())
    } else {
        Err(Error::damaged(format!("the VM gave back /{} without its directory", shown(path))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tar::EntryType;

    fn append(
        builder: &mut tar::Builder<Vec<u8>>,
        path: &str,
        kind: EntryType,
        data: &[u8],
        attributes: &[(&str, &[u8])],
    ) {
        builder.append_pax_extensions(attributes.iter().copied()).unwrap();
        crate::deb::tests::entry(builder, path, kind, "", data);
    }

    fn base() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::create(&directory.path().join("tree")).unwrap();
        for path in ["etc", "etc/old", "var"] {
            tree.put_directory(path.as_bytes(), Meta::root(0o700)).unwrap();
        }
        for path in ["etc/gone", "etc/kept", "etc/old/a", "etc/changed"] {
            tree.put_file(path.as_bytes(), Meta::root(0o600), &mut &b"before"[..]).unwrap();
        }
        tree.put_link(b"out", Meta::root(0o777), b"/tmp").unwrap();
        (directory, tree)
    }

    #[test]
    fn whiteouts_opaque_directories_and_attributes_merge() {
        let (_directory, mut tree) = base();
        let mut builder = tar::Builder::new(Vec::new());
        append(&mut builder, "./", EntryType::Directory, b"", &[]);
        append(&mut builder, "./etc/", EntryType::Directory, b"", &[]);
        append(
            &mut builder,
            "./etc/changed",
            EntryType::Regular,
            b"after",
            &[("SCHILY.xattr.security.capability", b"\x01\0\x02")],
        );
        append(&mut builder, "./etc/gone", EntryType::Char, b"", &[]);
        append(&mut builder, "./etc/old/", EntryType::Directory, b"", &[("SCHILY.xattr.trusted.overlay.opaque", b"y")]);
        append(
            &mut builder,
            "./etc/old/b",
            EntryType::Regular,
            b"new",
            &[("SCHILY.xattr.trusted.overlay.origin", b"x")],
        );
        append(&mut builder, "./var", EntryType::Regular, b"now a file", &[]);
        apply(&mut tree, builder.into_inner().unwrap().as_slice()).unwrap();
        let paths: Vec<String> = tree.iter().map(|(path, _)| shown(path)).collect();
        assert_eq!(paths, ["", "etc", "etc/changed", "etc/kept", "etc/old", "etc/old/b", "out", "var"]);
        let changed = tree.get(b"etc/changed").unwrap();
        assert_eq!(changed.meta.attributes[KEPT], b"\x01\0\x02");
        assert_eq!((changed.meta.mode, changed.meta.gid), (0o4711, 42));
        assert!(tree.get(b"etc/old/b").unwrap().meta.attributes.is_empty());
        assert_eq!(tree.get(b"etc").unwrap().meta.mode, 0o755);
        assert_eq!(tree.read(b"etc/kept").unwrap(), b"before");
    }

    #[test]
    fn a_guest_cannot_write_outside() {
        for (path, kind) in [
            ("../x", EntryType::Regular),
            ("out/x", EntryType::Regular),
            ("out/x", EntryType::Directory),
            ("etc/../../x", EntryType::Regular),
            ("", EntryType::Regular),
            ("", EntryType::Char),
        ] {
            let (_directory, mut tree) = base();
            let mut builder = tar::Builder::new(Vec::new());
            append(&mut builder, path, kind, b"", &[]);
            assert!(apply(&mut tree, builder.into_inner().unwrap().as_slice()).is_err(), "{path}");
        }
    }
}
