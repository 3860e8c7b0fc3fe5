//! A root file system in the making: bytes in an ordinary directory, everything else in a table.
//!
//! Owners, modes, devices and extended attributes live in the table, since an ordinary user cannot
//! give them to files. Paths are bytes without a leading slash; the root is the empty path. What is
//! written on this machine always lies inside the directory: parents are resolved in the table
//! first, so no symbolic link of the tree is ever followed by the kernel.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    ops::Bound,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use burgeon_api::{Error, Result, path_text};

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// Bytes are in the tree's directory.
    File,
    Link(Vec<u8>),
    Device {
        block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Everything about a path but its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: u64,
    /// Extended attributes by full name.
    pub(crate) attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Meta {
    pub(crate) fn root(mode: u32) -> Meta {
        Meta { mode, uid: 0, gid: 0, mtime: 0, attributes: BTreeMap::new() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
}

pub(crate) struct Tree {
    directory: PathBuf,
    nodes: BTreeMap<Vec<u8>, Node>,
}

/// Longest chain of symbolic links followed, as in the kernel.
const LINKS: usize = 40;

impl Tree {
    /// An empty tree whose bytes are kept in `directory`, which must not exist.
    pub(crate) fn create(directory: &Path) -> Result<Tree> {
        fs::create_dir(directory).map_err(|error| at(directory, &error))?;
        let root = Node { kind: Kind::Directory, meta: Meta::root(0o755) };
        Ok(Tree { directory: directory.to_owned(), nodes: BTreeMap::from([(Vec::new(), root)]) })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn get(&self, path: &[u8]) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// All paths in order; parents come before what they hold.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_slice(), node))
    }

    pub(crate) fn metas_mut(&mut self) -> impl Iterator<Item = &mut Meta> {
        self.nodes.values_mut().map(|node| &mut node.meta)
    }

    /// Paths below a directory, not the directory itself.
    pub(crate) fn below(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let mut start = path.to_vec();
        if !start.is_empty() {
            start.push(b'/');
        }
        self.nodes
            .range((Bound::Excluded(start.clone()), Bound::Unbounded))
            .take_while(|(path, _)| path.starts_with(&start))
            .map(|(path, _)| path.clone())
            .collect()
    }

    /// Where the bytes of a path are on this machine.
    pub(crate) fn host_path(&self, path: &[u8]) -> PathBuf {
        self.directory.join(OsStr::from_bytes(path))
    }

    pub(crate) fn read(&self, path: &[u8]) -> Result<Vec<u8>> {
        match self.get(path).map(|node| &node.kind) {
            Some(Kind::File) => {
                let host = self.host_path(path);
                fs::read(&host).map_err(|error| at(&host, &error))
            }
            _ => Err(Error::not_found(format!("/{} is no file of the image", shown(path)))),
        }
    }

    /// The path with all links of its parents followed inside the tree. The last part is kept.
    pub(crate) fn canonical(&self, path: &[u8]) -> Result<Vec<u8>> {
        let mut todo: Vec<Vec<u8>> = parts(path).rev().map(<[u8]>::to_vec).collect();
        let mut done: Vec<u8> = Vec::new();
        let mut followed = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                done.truncate(done.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                continue;
            }
            let next = joined(&done, &part);
            match self.nodes.get(&next).map(|node| &node.kind) {
                Some(Kind::Link(target)) if !todo.is_empty() => {
                    followed += 1;
                    if followed > LINKS {
                        return Err(Error::invalid(format!("/{} leads through a loop of links", shown(path))));
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    todo.extend(parts(target).rev().map(<[u8]>::to_vec));
                }
                _ => done = next,
            }
        }
        Ok(done)
    }

    /// Makes a directory, or changes the one that is there.
    pub(crate) fn put_directory(&mut self, path: &[u8], meta: Meta) -> Result<()> {
        if let Some(node) = self.nodes.get_mut(path)
            && node.kind == Kind::Directory
        {
            node.meta = meta;
            return Ok(());
        }
        self.make_room(path)?;
        let host = self.host_path(path);
        fs::create_dir(&host).map_err(|error| at(&host, &error))?;
        self.nodes.insert(path.to_vec(), Node { kind: Kind::Directory, meta });
        Ok(())
    }

    /// Writes a file, in place of whatever is there.
    pub(crate) fn put_file(&mut self, path: &[u8], meta: Meta, bytes: &mut dyn Read) -> Result<()> {
        self.make_room(path)?;
        let host = self.host_path(path);
        let mut write = || -> io::Result<()> {
            let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&host)?;
            io::copy(bytes, &mut file).map(drop)
        };
        write().map_err(|error| at(&host, &error))?;
        self.nodes.insert(path.to_vec(), Node { kind: Kind::File, meta });
        Ok(())
    }

    pub(crate) fn put_link(&mut self, path: &[u8], meta: Meta, target: &[u8]) -> Result<()> {
        if target.is_empty() || target.len() > 4095 || target.contains(&0) || target.contains(&b'\n') {
            return Err(Error::invalid(format!("the target of the link /{} is malformed", shown(path))));
        }
        self.make_room(path)?;
        let host = self.host_path(path);
        std::os::unix::fs::symlink(OsStr::from_bytes(target), &host).map_err(|error| at(&host, &error))?;
        self.nodes.insert(path.to_vec(), Node { kind: Kind::Link(target.to_vec()), meta });
        Ok(())
    }

    /// Gives a file a second name.
    pub(crate) fn put_hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let node = match self.nodes.get(target) {
            Some(node) if node.kind == Kind::File && path != target => node.clone(),
            _ => return Err(Error::invalid(format!("/{} is a second name of no file", shown(path)))),
        };
        self.make_room(path)?;
        let (old, new) = (self.host_path(target), self.host_path(path));
        fs::hard_link(old, &new).map_err(|error| at(&new, &error))?;
        self.nodes.insert(path.to_vec(), node);
        Ok(())
    }

    /// A device or a pipe: in the table only.
    pub(crate) fn put_special(&mut self, path: &[u8], meta: Meta, kind: Kind) -> Result<()> {
        self.make_room(path)?;
        self.nodes.insert(path.to_vec(), Node { kind, meta });
        Ok(())
    }

    /// Removes a path and all below it; nothing there is no error.
    pub(crate) fn remove(&mut self, path: &[u8]) -> Result<()> {
        if path.is_empty() {
            return Err(Error::invalid("the root of an image cannot be removed"));
        }
        let Some(node) = self.nodes.get(path) else { return Ok(()) };
        let host = self.host_path(path);
        let removed = match node.kind {
            Kind::Directory => fs::remove_dir_all(&host),
            Kind::File | Kind::Link(_) => fs::remove_file(&host),
            Kind::Device { .. } | Kind::Fifo => Ok(()),
        };
        removed.map_err(|error| at(&host, &error))?;
        for path in self.below(path) {
            self.nodes.remove(&path);
        }
        self.nodes.remove(path);
        Ok(())
    }

    /// Makes the missing parents of a canonical path, owned by root.
    pub(crate) fn make_parents(&mut self, path: &[u8]) -> Result<()> {
        for (index, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            if !self.nodes.contains_key(&path[..index]) {
                self.put_directory(&path[..index], Meta::root(0o755))?;
            }
        }
        Ok(())
    }

    /// Checks that the parent is a directory of this tree, and removes what is in the way.
    fn make_room(&mut self, path: &[u8]) -> Result<()> {
        if path.is_empty() {
            return Err(Error::invalid("the root of an image can only be a directory"));
        }
        match self.nodes.get(parent(path)).map(|node| &node.kind) {
            Some(Kind::Directory) => self.remove(path),
            _ => Err(Error::invalid(format!("the parent of /{} is no directory", shown(path)))),
        }
    }
}

fn at(path: &Path, error: &io::Error) -> Error {
    Error::io(format!("cannot write {}", path.display()), error)
}

/// A path for people.
pub(crate) fn shown(path: &[u8]) -> String {
    path_text::printable(&path_text::encode(path).0)
}

pub(crate) fn parent(path: &[u8]) -> &[u8] {
    &path[..path.iter().rposition(|byte| *byte == b'/').unwrap_or(0)]
}

pub(crate) fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// The path of an archive's entry in our form.
///
/// # Errors
/// `Invalid` for names that lead out of the tree or that an image should not hold.
pub(crate) fn entry_path(raw: &[u8]) -> Result<Vec<u8>> {
    let refuse = |why: &str| Err(Error::invalid(format!("the archive holds the path \"{}\": {why}", shown(raw))));
    let mut path = Vec::with_capacity(raw.len());
    for part in parts(raw) {
        if part == b".." {
            return refuse("it leads out of the image");
        }
        if part.len() > 255 || part.iter().any(|byte| *byte == 0 || *byte == b'\n') {
            return refuse("the name is not usable");
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    if path.len() > 4095 { refuse("it is too long") } else { Ok(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree::create(&directory.path().join("tree")).unwrap();
        (directory, tree)
    }

    #[test]
    fn entry_paths_stay_inside() {
        assert_eq!(entry_path(b"./usr//bin/./sh").unwrap(), b"usr/bin/sh");
        assert_eq!(entry_path(b"/etc/").unwrap(), b"etc");
        assert_eq!(entry_path(b"./").unwrap(), b"");
        for bad in [&b"../a"[..], b"a/../../b", b"a/..", b"a\nb", &[b'x'; 300]] {
            assert!(entry_path(bad).is_err(), "{}", shown(bad));
        }
    }

    #[test]
    fn links_of_parents_are_followed_inside_the_tree_only() {
        let (_directory, mut tree) = tree();
        tree.put_directory(b"usr", Meta::root(0o755)).unwrap();
        tree.put_directory(b"usr/bin", Meta::root(0o755)).unwrap();
        tree.put_link(b"bin", Meta::root(0o777), b"usr/bin").unwrap();
        tree.put_link(b"out", Meta::root(0o777), b"/../../tmp").unwrap();
        tree.put_link(b"loop", Meta::root(0o777), b"loop").unwrap();
        assert_eq!(tree.canonical(b"bin/sh").unwrap(), b"usr/bin/sh");
        assert_eq!(tree.canonical(b"bin").unwrap(), b"bin");
        assert_eq!(tree.canonical(b"out/x").unwrap(), b"tmp/x");
        assert!(tree.canonical(b"loop/x").is_err());
        // Unresolved, a link as a parent is refused: the kernel would follow it.
        let error = tree.put_file(b"out/x", Meta::root(0o644), &mut &b"x"[..]).unwrap_err();
        assert!(error.message.contains("no directory"));
        assert!(tree.put_directory(b"out/x", Meta::root(0o755)).is_err());
        assert!(tree.put_link(b"out/x", Meta::root(0o777), b"y").is_err());
    }

    #[test]
    fn replacing_a_link_does_not_write_through_it() {
        let (directory, mut tree) = tree();
        let outside = directory.path().join("outside");
        fs::write(&outside, "safe").unwrap();
        tree.put_link(b"a", Meta::root(0o777), outside.as_os_str().as_bytes()).unwrap();
        tree.put_file(b"a", Meta::root(0o644), &mut &b"new"[..]).unwrap();
        assert_eq!(fs::read_to_string(outside).unwrap(), "safe");
        assert_eq!(tree.read(b"a").unwrap(), b"new");
    }

    #[test]
    fn removing_takes_what_is_below_and_nothing_beside() {
        let (_directory, mut tree) = tree();
        for path in [&b"a"[..], b"a/b", b"a-b"] {
            tree.put_directory(path, Meta::root(0o755)).unwrap();
        }
        tree.put_file(b"a/b/c", Meta::root(0o644), &mut &b""[..]).unwrap();
        tree.put_hard_link(b"a-b/d", b"a/b/c").unwrap();
        assert_eq!(tree.below(b"a"), [b"a/b".to_vec(), b"a/b/c".to_vec()]);
        tree.remove(b"a").unwrap();
        assert_eq!(tree.iter().map(|(path, _)| path).collect::<Vec<_>>(), [&b""[..], b"a-b", b"a-b/d"]);
    }
}
