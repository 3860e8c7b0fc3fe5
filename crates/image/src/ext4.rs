//! Writes a tree as an ext4 disk, without root.
//!
//! `mke2fs -d` copies names and bytes (in sorted order: seen with e2fsprogs 1.47.0); owners, modes, times,
//! devices and attributes are then set by `debugfs` from the tree's table. That is done for every
//! path and by every user alike, root too, so that all make the same bytes. Time, UUID and hash
//! seed are given, and the machine's own mke2fs.conf is not read.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File},
    path::Path,
    time::Duration,
};

use burgeon_api::{ByteSize, Error, ErrorKind, Result};

use crate::{
    hash,
    process::{self, Limits, Tools},
    tree::{Kind, Node, Tree, parent, shown},
};

const DEADLINE: Duration = Duration::from_secs(600);

const CONFIGURATION: &str = "[defaults]\n\tbase_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr\n\
    \tdefault_mntopts = acl,user_xattr\n\tenable_periodic_fsck = 0\n\tblocksize = 4096\n\tinode_size = 256\n\
    \tinode_ratio = 16384\n[fs_types]\n\text4 = {\n\
    \t\tfeatures = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize\n\t}\n";

pub(crate) struct Disk<'a> {
    pub(crate) size: ByteSize,
    /// A text from which UUID and hash seed are derived.
    pub(crate) identity: &'a str,
    /// Seconds since 1970 for the file system's own times.
    pub(crate) epoch: u64,
}

impl Disk<'_> {
    /// Makes `out`, which is sparse and must not exist. `work` takes scripts.
    ///
    /// # Errors
    /// `Refused` where the tree does not fit.
    pub(crate) fn write(&self, tree: &Tree, out: &Path, work: &Path, tools: &Tools, limits: Limits<'_>) -> Result<()> {
        let io = |error: std::io::Error| Error::io(format!("cannot write {}", out.display()), &error);
        let limits = limits.within(DEADLINE);
        let configuration = work.join("mke2fs.conf");
        fs::write(&configuration, CONFIGURATION).map_err(io)?;
        File::create_new(out).and_then(|file| file.set_len(self.size.0)).map_err(io)?;
        let uuid = |purpose| uuid(&format!("{purpose}\n{}", self.identity));
        let mut command = process::command(&tools.mke2fs);
        command
            .env("MKE2FS_CONFIG", &configuration)
            .env("E2FSPROGS_FAKE_TIME", self.epoch.to_string())
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-J", "size=16", "-U", &uuid("uuid")])
            // Tables count as written: they are holes of the file, which read as zeros, and the
            // guest's kernel is spared from writing them in every VM.
            .arg("-E")
            .arg(format!(
                "hash_seed={},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,no_copy_xattrs,nodiscard",
                uuid("hash seed")
            ))
            .arg("-d")
            .arg(tree.directory())
            .arg(out);
        process::run_ok(command, limits).map_err(|error| self.too_small(error))?;
        self.set_inodes(tree, out, work, tools, limits)
    }

    fn set_inodes(&self, tree: &Tree, out: &Path, work: &Path, tools: &Tools, limits: Limits<'_>) -> Result<()> {
        let script = script(tree, work, self.epoch)?;
        let path = work.join("debugfs.script");
        fs::write(&path, script).map_err(|error| Error::io("cannot write the list of inodes", &error))?;
        let mut command = process::command(&tools.debugfs);
        command.env("E2FSPROGS_FAKE_TIME", self.epoch.to_string()).args(["-w", "-f"]).arg(&path).arg(out);
        let finished = process::run_ok(command, limits)?;
        // debugfs succeeds whatever happens to its commands, and complains on standard error only.
        let said = String::from_utf8_lossy(&finished.stderr);
        match said.lines().find(|line| !line.starts_with("debugfs ") && !line.trim().is_empty()) {
            None => hash::punch_zeros(out),
            Some(line) => Err(self.too_small(Error::internal(format!("debugfs: {line}")))),
        }
    }

    fn too_small(&self, error: Error) -> Error {
        let full = ["Could not allocate", "No free space", "no free space", "inode bitmap"];
        // A full machine is told as such by its error kind; this is the image that is full.
        if error.kind == ErrorKind::Internal && full.iter().any(|word| error.message.contains(word)) {
            Error::refused(format!("the system does not fit into {:#}", self.size))
                .with_hint("give the recipe a larger size")
        } else {
            error
        }
    }
}

/// Commands that set what `mke2fs -d` could not know.
fn script(tree: &Tree, work: &Path, epoch: u64) -> Result<Vec<u8>> {
    let mut script = Vec::new();
    let mut attributes = 0;
    for (path, node) in tree.iter() {
        let name = quoted(path);
        if matches!(node.kind, Kind::Device { .. } | Kind::Fifo) {
            make_special(&mut script, path, node);
        }
        let mut line = |field: &str, value: String| {
            script.extend_from_slice(b"sif ");
            script.extend_from_slice(&name);
            script.extend_from_slice(format!(" {field} {value}\n").as_bytes());
        };
        line("mode", format!("0{:o}", kind_bits(&node.kind) | node.meta.mode));
        line("uid", node.meta.uid.to_string());
        line("gid", node.meta.gid.to_string());
        line("mtime", format!("@{}", node.meta.mtime));
        // When a file was made and read is nobody's concern, and differs from build to build.
        for field in ["atime", "ctime", "crtime"] {
            line(field, format!("@{epoch}"));
        }
        for (key, value) in &node.meta.attributes {
            let file = work.join(format!("attribute.{attributes}"));
            attributes += 1;
            fs::write(&file, value).map_err(|error| Error::io("cannot write an attribute", &error))?;
            let mut command: OsString = "ea_set -f ".into();
            command.push(&file);
            script.extend_from_slice(command.as_encoded_bytes());
            script.push(b' ');
            script.extend_from_slice(&name);
            script.push(b' ');
            script.extend_from_slice(key);
            script.push(b'\n');
        }
        if path.contains(&b'\n') {
            return Err(Error::invalid(format!("the name /{} cannot be written to a disk", shown(path))));
        }
    }
    Ok(script)
}

fn make_special(script: &mut Vec<u8>, path: &[u8], node: &Node) {
    let name = &path[parent(path).len()..];
    let name = name.strip_prefix(b"/").unwrap_or(name);
    script.extend_from_slice(b"cd ");
    script.extend_from_slice(&quoted(parent(path)));
    script.extend_from_slice(b"\nmknod ");
    let mut word = vec![b'"'];
    push_escaped(&mut word, name);
    script.extend_from_slice(&word);
    script.extend_from_slice(b"\" ");
    let arguments = match node.kind {
        Kind::Device { block, major, minor } => format!("{} {major} {minor}", if block { 'b' } else { 'c' }),
        _ => "p".to_string(),
    };
    script.extend_from_slice(arguments.as_bytes());
    script.extend_from_slice(b"\ncd /\n");
}

/// A path as debugfs reads it: within quotes, a quote is written twice.
fn quoted(path: &[u8]) -> Vec<u8> {
    let mut out = b"\"/".to_vec();
    push_escaped(&mut out, path);
    out.push(b'"');
    out
}

fn push_escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        out.push(*byte);
        if *byte == b'"' {
            out.push(b'"');
        }
    }
}

fn kind_bits(kind: &Kind) -> u32 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::Device { block: false, .. } => 0o020_000,
        Kind::Directory => 0o040_000,
        Kind::Device { block: true, .. } => 0o060_000,
        Kind::File => 0o100_000,
        Kind::Link(_) => 0o120_000,
    }
}

/// A UUID made from a text: version 8, for values of one's own (RFC 9562).
fn uuid(text: &str) -> String {
    let digest = hash::of_bytes(text.as_bytes());
    let mut uuid = String::new();
    let _ = write!(
        uuid,
        "{}-{}-8{}-a{}-{}",
        &digest[..8],
        &digest[8..12],
        &digest[13..16],
        &digest[17..20],
        &digest[20..32]
    );
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Meta;

    #[test]
    fn scripts_say_everything_about_each_path() {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::create(&directory.path().join("tree")).unwrap();
        tree.put_directory(b"d", Meta::root(0o1777)).unwrap();
        let kind = Kind::Device { block: false, major: 1, minor: 3 };
        tree.put_special(b"d/odd \"name", Meta { uid: 5, gid: 6, mtime: 7, ..Meta::root(0o666) }, kind).unwrap();
        let script = String::from_utf8(script(&tree, directory.path(), 99).unwrap()).unwrap();
        let last: Vec<&str> = script.lines().skip(14).collect();
        let name = "\"/d/odd \"\"name\"";
        let expected = format!(
            "cd \"/d\"\nmknod \"odd \"\"name\" c 1 3\ncd /\nsif {name} mode 020666\nsif {name} uid 5\nsif {name} gid 6\n\
             sif {name} mtime @7\nsif {name} atime @99\nsif {name} ctime @99\nsif {name} crtime @99"
        );
        assert_eq!(last.join("\n"), expected);
        assert!(script.starts_with("sif \"/\" mode 040755\n"));
    }

    #[test]
    fn uuids_are_well_formed_and_stable() {
        assert_eq!(uuid("a"), uuid("a"));
        assert_ne!(uuid("a"), uuid("b"));
        assert_eq!(uuid("a").len(), 36);
    }
}
