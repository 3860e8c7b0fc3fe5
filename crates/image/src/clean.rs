//! Takes out of a configured system what differs from build to build, or belongs to one machine.

use burgeon_api::Result;

use crate::tree::{Kind, Meta, Tree};

/// Everything below these goes; the directories stay.
const EMPTIED: [&str; 10] = [
    "dev",
    "proc",
    "run",
    "sys",
    "tmp",
    "var/cache/apt",
    "var/cache/ldconfig",
    "var/lib/apt/lists",
    "var/lib/dpkg/updates",
    "var/tmp",
];

/// Single paths that go: seeds, locks, and the copies that tools keep of what they changed.
const REMOVED: [&str; 22] = [
    "etc/.pwd.lock",
    "etc/group-",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "root/.bash_history",
    "usr/sbin/policy-rc.d",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd/credential.secret",
    "var/lib/systemd/random-seed",
    "var/lib/urandom/random-seed",
];

/// Cleans the tree and brings all times to `epoch` at the latest.
pub(crate) fn normalise(tree: &mut Tree, epoch: u64) -> Result<()> {
    for directory in EMPTIED {
        for path in tree.below(directory.as_bytes()) {
            tree.remove(&path)?;
        }
    }
    for path in REMOVED {
        tree.remove(path.as_bytes())?;
    }
    // Keys of a server belong to one machine; it makes its own at its first start.
    for path in tree.below(b"etc/ssh").into_iter().filter(|path| path.starts_with(b"etc/ssh/ssh_host_")) {
        tree.remove(&path)?;
    }
    let logs = tree.below(b"var/log").into_iter().filter(|path| is_file(tree, path)).collect::<Vec<_>>();
    for path in logs {
        // Some are made with an owner of their own and expected to be there; those stay, empty.
        if [&b"var/log/btmp"[..], b"var/log/wtmp", b"var/log/lastlog", b"var/log/faillog"].contains(&path.as_slice()) {
            empty(tree, &path)?;
        } else {
            tree.remove(&path)?;
        }
    }
    for path in compiled_python(tree) {
        tree.remove(&path)?;
    }
    // An empty machine-id is filled at boot. Absent, or "uninitialized", it would also make systemd
    // apply all presets at every first boot of every VM.
    if tree.get(b"etc/machine-id").is_some() || tree.get(b"usr/lib/systemd/systemd").is_some() {
        tree.make_parents(b"etc/machine-id")?;
        tree.put_file(b"etc/machine-id", Meta::root(0o444), &mut &b""[..])?;
    }
    for meta in tree.metas_mut() {
        // What the builder itself made has no time of its own.
        meta.mtime = if meta.mtime == 0 { epoch } else { meta.mtime.min(epoch) };
    }
    Ok(())
}

fn is_file(tree: &Tree, path: &[u8]) -> bool {
    tree.get(path).is_some_and(|node| node.kind == Kind::File)
}

fn empty(tree: &mut Tree, path: &[u8]) -> Result<()> {
    let Some(meta) = tree.get(path).map(|node| node.meta.clone()) else { return Ok(()) };
    tree.put_file(path, meta, &mut &b""[..])
}

/// Python writes time stamps into what it compiles; it compiles again when asked.
fn compiled_python(tree: &Tree) -> Vec<Vec<u8>> {
    let compiled = |path: &[u8]| path.ends_with(b"/__pycache__") || path.ends_with(b".pyc");
    tree.iter().map(|(path, _)| path).filter(|path| compiled(path)).map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_build_to_build_goes() {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::create(&directory.path().join("tree")).unwrap();
        for path in [
            "etc/machine-id",
            "etc/passwd",
            "etc/passwd-",
            "usr/lib/python3/__pycache__/a.cpython-311.pyc",
            "usr/lib/python3/a.py",
            "var/log/dpkg.log",
            "var/log/journal/x/system.journal",
            "var/log/lastlog",
            "var/cache/ldconfig/aux-cache",
            "tmp/a/b",
        ] {
            tree.make_parents(path.as_bytes()).unwrap();
            let meta = Meta { mtime: 1000, uid: 7, ..Meta::root(0o640) };
            tree.put_file(path.as_bytes(), meta, &mut &b"text"[..]).unwrap();
        }
        normalise(&mut tree, 500).unwrap();
        let files: Vec<String> =
            tree.iter().filter(|(_, node)| node.kind == Kind::File).map(|(path, _)| crate::tree::shown(path)).collect();
        assert_eq!(files, ["etc/machine-id", "etc/passwd", "usr/lib/python3/a.py", "var/log/lastlog"]);
        assert_eq!(tree.read(b"etc/machine-id").unwrap(), b"");
        assert_eq!(tree.read(b"var/log/lastlog").unwrap(), b"");
        assert_eq!(tree.get(b"var/log/lastlog").unwrap().meta.uid, 7);
        assert!(tree.get(b"var/log/journal").is_some());
        assert!(tree.iter().all(|(_, node)| node.meta.mtime <= 500));
    }
}
