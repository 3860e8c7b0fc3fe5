//! A store whose disk becomes full in the middle of an import, of an image or of a substrate.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use crate::lab::{Lab, is_running, kill, until};

/// Puts a small file system of its own at the store's directory, then becomes the server.
const SCRIPT: &str = "mount -t tmpfs -o size=12m tmpfs \"$0\" && exec \"$@\"";
const UNSHARE: [&str; 2] = ["--mount", "--map-root-user"];

fn noise(length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length / 8).flat_map(|_| next()).collect();
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

fn has_mounts() -> bool {
    let has = Command::new("unshare").args(UNSHARE).arg("true").status().is_ok_and(|status| status.success());
    if !has {
        eprintln!("left out: this machine gives no mounts of its own to a process");
    }
    has
}

/// A server whose store has a small disk.
fn serve_small(lab: &Lab) -> Child {
    let store = lab.data().join("store");
    fs::create_dir(&store).unwrap();
    let serve = lab.command(&["serve"]);
    let mut server = Command::new("unshare");
    server.args(UNSHARE).args(["sh", "-c", SCRIPT]).arg(&store).arg(serve.get_program()).args(serve.get_args());
    for (name, value) in serve.get_envs() {
        match value {
            Some(value) => server.env(name, value),
            None => server.env_remove(name),
        };
    }
    let log = File::create(lab.path("serve.log")).unwrap();
    let server = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    until("the server serves", || lab.data().join("control.sock").exists());
    server
}

#[test]
fn a_substrate_for_which_there_is_no_room_is_not_made() {
    if !has_mounts() {
        return;
    }
    let source = Lab::new(&["tiny"]);
    source.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    let file = source.path("base.substrate");
    source.run(&["substrate", "export", "base", file.to_str().unwrap()]).good();
    // More than the store has room for, whatever is on it.
    assert!(fs::metadata(&file).unwrap().len() > 14 << 20);
    let lab = Lab::new(&[]);
    let mut server = serve_small(&lab);
    for _ in 0..2 {
        let failed = lab.run(&["substrate", "import", file.to_str().unwrap()]);
        assert_eq!(failed.code, 1, "{failed:?}");
        assert!(failed.stderr.contains("No space left") || failed.stderr.contains("is full"), "{failed:?}");
        assert!(failed.stderr.contains("hint: free some space"), "{failed:?}");
        assert_eq!(lab.json(&["substrate", "ls"]), serde_json::json!([]));
        assert_eq!(lab.json(&["image", "ls"]), serde_json::json!([]));
        assert_eq!(lab.json(&["store", "stat"])["roots"], serde_json::json!({}));
        assert!(fs::read_dir(lab.data().join("vms")).unwrap().next().is_none());
    }
    let checked = lab.json(&["store", "fsck"]);
    assert!(checked["problems"].as_array().unwrap().is_empty(), "{checked}");
    kill(server.id(), "INT");
    server.wait().unwrap();
}

#[test]
fn an_import_that_finds_no_room_changes_nothing_and_works_once_there_is_some() {
    if !has_mounts() {
        return;
    }
    let lab = Lab::new(&[]);
    let mut server = serve_small(&lab);
    let store = lab.data().join("store");
    // The file system as the server sees it.
    let inside = PathBuf::from(format!("/proc/{}/root{}", lab.pid("control"), store.display()));
    let filler = inside.join("filler");

    let (small, large) = (lab.path("small.raw"), lab.path("large.raw"));
    fs::write(&small, noise(1 << 20)).unwrap();
    fs::write(&large, noise(6 << 20)).unwrap();
    let import = |file: &PathBuf, name: &str| lab.run(&["image", "import", file.to_str().unwrap(), name]);
    import(&small, "small").good();
    let before = lab.json(&["store", "stat"]);
    let whole = || {
        let checked = lab.json(&["store", "fsck"]);
        assert!(checked["problems"].as_array().unwrap().is_empty(), "{checked}");
        lab.run(&["image", "verify", "small"]).good();
        assert_eq!(lab.run(&["image", "ls", "-q"]).good().stdout, "small\n");
    };
    // From no room at all to nearly enough.
    for room in [0_u64, 300 << 10, 2 << 20, 5 << 20] {
        let mut file = File::create(&filler).unwrap();
        while file.write_all(&[7; 4096]).is_ok() {}
        let length = file.metadata().unwrap().len();
        file.set_len(length - room).unwrap();
        let failed = import(&large, "large");
        assert_eq!(failed.code, 1, "{room}: {failed:?}");
        assert!(failed.stderr.contains("No space left") || failed.stderr.contains("is full"), "{room}: {failed:?}");
        assert!(failed.stderr.contains("hint: free some space"), "{room}: {failed:?}");
        whole();
        let after = lab.json(&["store", "stat"]);
        assert_eq!((&after["chunks"], &after["roots"]), (&before["chunks"], &before["roots"]), "{room}");
        let leftover = fs::read_dir(lab.data().join("tmp")).unwrap().flatten();
        assert_eq!(leftover.filter(|entry| entry.file_name().to_string_lossy().starts_with("image-")).count(), 0);
    }
    fs::remove_file(&filler).unwrap();
    import(&large, "large").good();
    lab.run(&["image", "verify", "large"]).good();
    let out = lab.path("out.raw");
    lab.run(&["image", "export", "large", out.to_str().unwrap()]).good();
    assert!(fs::read(&out).unwrap() == fs::read(&large).unwrap());

    let pid = server.id();
    kill(pid, "INT");
    server.wait().unwrap();
    assert!(!is_running(pid));
}
