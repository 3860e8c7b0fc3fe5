//! What substrates hold, and how they get to other machines.

use std::{fs, path::Path};

use burgeon_api::ByteSize;
use burgeon_store::steps::Step;
use serde_json::Value;

use crate::lab::{Done, Lab, finish, until};

fn bytes(value: &Value) -> u64 {
    value.as_str().unwrap_or_else(|| panic!("{value}")).parse::<ByteSize>().unwrap().bytes()
}

#[test]
fn what_a_substrate_holds_is_told_with_who_shares_it() {
    let lab = Lab::new(&["debian-minimal", "tiny"]);
    let refused = lab.run(&["substrate", "stat", "web"]);
    assert!(refused.stderr.contains("there is no substrate \"web\""), "{}", refused.stderr);
    lab.run(&["substrate", "create", "web", "--image", "debian-minimal"]).good();
    lab.run(&["substrate", "dock", "web", "0"]).good();
    lab.run(&["vm", "create", "-s", "web", "--name", "c", "--count", "2"]).good();
    lab.said("c-1", "head -c 20000000 /dev/urandom > /root/much");

    let stat = lab.json(&["substrate", "stat", "web"]);
    let (memory, image) = (&stat["memory"], bytes(&stat["image_stored"]));
    let (size, plain, stored) = (bytes(&memory["size"]), bytes(&memory["plain"]), bytes(&memory["stored"]));
    assert!(stored > 0 && stored < plain && plain < size && image > 0, "{stat}");
    // Its disk is the image's but for what the boot wrote.
    let disk = &stat["disks"][0];
    assert!(disk[0] == "root" && bytes(&disk[1]["new"]) < bytes(&disk[1]["stored"]) / 4, "{stat}");
    let beside = bytes(&stat["beside_image"]);
    let sum = bytes(&memory["new"]) + bytes(&disk[1]["new"]) + bytes(&stat["devices"]);
    assert!(beside > 0 && beside <= sum, "{stat}");
    let held = bytes(&stat["held"]);
    assert!(held > 0 && held < size, "{stat}");

    // The clones share what the substrate holds; what one writes is its own.
    let user = |name: &str| {
        let users = stat["users"].as_array().unwrap();
        users.iter().find(|user| user["name"] == name).unwrap_or_else(|| panic!("{stat}"))["share"].clone()
    };
    let (busy, idle) = (user("c-1"), user("c-2"));
    // Of random bytes the substrate has none. How much else each guest writes by itself differs.
    assert!(bytes(&busy["own"]) >= 20_000_000, "{stat}");
    for share in [&busy, &idle] {
        assert!(bytes(&share["own"]) > 0 && bytes(&share["own"]) < bytes(&share["proportional"]), "{stat}");
    }
    assert_eq!((&busy["of_held"], &idle["of_held"]), (&true.into(), &true.into()), "{stat}");
    let table = lab.run(&["substrate", "stat", "web"]).good().stdout;
    assert!(table.contains("beside the image's") && table.contains("disk root"), "{table}");
    assert!(table.contains("shared by 2 VMs and 0 QEMUs"), "{table}");

    // One without a disk, for which a QEMU waits.
    lab.run(&["substrate", "create", "small", "--image", "tiny", "-p", "tiny"]).good();
    lab.run(&["substrate", "dock", "small", "1"]).good();
    let stat = lab.json(&["substrate", "stat", "small"]);
    assert_eq!((&stat["disks"], &stat["users"][0]["state"]), (&serde_json::json!([]), &"waiting".into()), "{stat}");
    assert!(bytes(&stat["users"][0]["share"]["proportional"]) > 0, "{stat}");
}

/// Runs a command on another machine: its data directory is another one.
#[track_caller]
fn elsewhere(lab: &Lab, words: &[&str]) -> Done {
    finish(lab.command_in(&lab.path("e"), words).spawn().unwrap())
}

fn roots(data: &Path, kind: &str) -> u32 {
    let catalog = rusqlite::Connection::open(data.join("store/catalog.db")).unwrap();
    catalog.query_row("SELECT count(*) FROM root WHERE kind = ?1", [kind], |row| row.get(0)).unwrap()
}

/// Nothing of an import stays that has a name, nor a directory.
#[track_caller]
fn nothing_is_left(data: &Path) {
    let temporary = || -> Vec<String> {
        let entries = fs::read_dir(data.join("tmp")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    };
    // What was on its way goes before the answer.
    let left = temporary();
    assert!(!left.iter().any(|name| name.starts_with("build-") || name.starts_with("image-")), "{left:?}");
    until("no VM's directory is left", || fs::read_dir(data.join("vms")).unwrap().next().is_none());
    until("no hold is left", || roots(data, "import") == 0 && roots(data, "disk") == 0);
    // QEMUs that waited are cleared away in the host's own time.
    until("all that is left goes", || {
        let left = temporary();
        assert!(left.iter().all(|name| name.starts_with("standby-")), "{left:?}");
        left.is_empty()
    });
}

#[test]
fn a_substrate_goes_to_another_machine_with_its_image() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.run(&[
        "substrate",
        "create",
        "web",
        "--image",
        "debian-minimal",
        "--warm",
        "echo kept > /root/note; echo warm > /run/state; sync",
    ])
    .good();
    let (there, file) = (lab.path("e"), lab.path("web.substrate"));
    let text = file.to_str().unwrap();
    lab.run(&["substrate", "export", "web", text]).good();
    // What was in memory is for nobody else, and zeros cost nothing.
    let about = fs::metadata(&file).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&about.permissions()) & 0o777, 0o600);
    let whole = lab.json(&["substrate", "stat", "web"]);
    assert!(about.len() < bytes(&whole["memory"]["size"]) / 2, "{} {whole}", about.len());
    assert_eq!((roots(&lab.data(), "export"), roots(&lab.data(), "import")), (0, 0));
    let refused = lab.run(&["substrate", "export", "web", text]);
    assert!(refused.code == 1 && refused.stderr.contains("exists"), "{}", refused.stderr);
    lab.run(&["substrate", "export", "web", text, "--force"]).good();
    let refused = lab.run(&["substrate", "export", "none", lab.path("none").to_str().unwrap()]);
    assert!(refused.stderr.contains("there is no substrate \"none\""), "{}", refused.stderr);
    assert_eq!(fs::read_dir(lab.path("")).unwrap().count(), 2, "a file is left");

    // On an empty machine: the image comes along, and VMs go on as at home.
    elsewhere(&lab, &["substrate", "import", text]).good();
    let images = elsewhere(&lab, &["-o", "json", "image", "ls"]).json();
    assert_eq!(images[0]["name"], "debian-minimal");
    elsewhere(&lab, &["vm", "create", "-s", "web", "--name", "clone"]).good();
    let said = elsewhere(&lab, &["exec", "clone", "sh", "-c", "cat /root/note /run/state; hostname"]).good().stdout;
    assert_eq!(said, "kept\nwarm\nclone\n");
    elsewhere(&lab, &["image", "verify", "debian-minimal"]).good();
    elsewhere(&lab, &["vm", "create", "debian-minimal", "--name", "booted"]).good();
    let refused = elsewhere(&lab, &["substrate", "import", text]);
    assert!(refused.code == 1 && refused.stderr.contains("named \"web\" exists"), "{}", refused.stderr);
    // By a pipe, under another name, and without its image; it is kept, whatever is collected.
    elsewhere(&lab, &["vm", "rm", "-f", "clone", "booted"]).good();
    elsewhere(&lab, &["substrate", "rm", "web"]).good();
    elsewhere(&lab, &["image", "rm", "debian-minimal"]).good();
    nothing_is_left(&there);
    let mut source = lab.command(&["substrate", "export", "web", "-"]).spawn().unwrap();
    let mut import = lab.command_in(&there, &["substrate", "import", "-", "other"]);
    let done = finish(import.stdin(source.stdout.take().unwrap()).spawn().unwrap()).good();
    assert!(source.wait().unwrap().success() && done.stdout == "other\n", "{done:?}");
    elsewhere(&lab, &["image", "rm", "debian-minimal"]).good();
    elsewhere(&lab, &["store", "gc"]).good();
    elsewhere(&lab, &["vm", "create", "-s", "other", "--name", "again"]).good();
    assert_eq!(elsewhere(&lab, &["exec", "again", "cat", "/root/note"]).good().stdout, "kept\n");
    elsewhere(&lab, &["vm", "rm", "-f", "again"]).good();
    elsewhere(&lab, &["substrate", "rm", "other"]).good();
    let checked = elsewhere(&lab, &["store", "fsck"]);
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    nothing_is_left(&there);
}

#[test]
fn a_file_that_is_no_whole_substrate_leaves_nothing() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    let file = lab.path("base.substrate");
    lab.run(&["substrate", "export", "base", file.to_str().unwrap()]).good();
    let (whole, there) = (fs::read(&file).unwrap(), lab.path("e"));
    let refused = |what: &str, content: &[u8], why: &str| {
        let path = lab.path(what);
        fs::write(&path, content).unwrap();
        let done = elsewhere(&lab, &["substrate", "import", path.to_str().unwrap()]);
        assert!(done.code == 1 && done.stderr.contains(why), "{what}: {}", done.stderr);
        assert_eq!(elsewhere(&lab, &["-o", "json", "substrate", "ls"]).json(), serde_json::json!([]), "{what}");
        assert_eq!(elsewhere(&lab, &["-o", "json", "image", "ls"]).json(), serde_json::json!([]), "{what}");
    };
    refused("empty", b"", "no exported substrate");
    refused("letter", b"dear reader, this is no substrate", "no exported substrate");
    refused("short", &whole[..whole.len() / 2], "before its end");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    refused("flipped", &flipped, "the file at byte");
    let done = elsewhere(&lab, &["substrate", "import", "no-such-file"]);
    assert!(done.stderr.contains("read no-such-file"), "{}", done.stderr);
    let done = elsewhere(&lab, &["substrate", "import", file.to_str().unwrap(), "../up"]);
    assert!(done.code == 1 && done.stderr.contains("name"), "{}", done.stderr);
    nothing_is_left(&there);

    // A death at any step leaves no substrate; the next try makes it.
    let mut lab = lab;
    lab.environment.push(("RUST_LOG".into(), "info".into()));
    for step in [Step::BundleStored, Step::TakenIn, Step::TakenInByHost] {
        lab.die_at(step);
        let done = elsewhere(&lab, &["substrate", "import", file.to_str().unwrap()]);
        assert!(done.code == 1 && !lab.has_yet_to_die(), "{step:?}: {done:?}");
        until("no substrate is left", || {
            let listed = elsewhere(&lab, &["-o", "json", "substrate", "ls"]);
            listed.code == 0 && listed.json() == serde_json::json!([])
        });
        until("no VM's directory is left", || fs::read_dir(there.join("vms")).unwrap().next().is_none());
    }
    until("it can be made", || elsewhere(&lab, &["substrate", "import", file.to_str().unwrap()]).code == 0);
    elsewhere(&lab, &["vm", "create", "-s", "base", "--name", "c"]).good();
    elsewhere(&lab, &["vm", "rm", "-f", "c"]).good();
}
