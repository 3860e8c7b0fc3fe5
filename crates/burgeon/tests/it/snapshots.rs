//! Snapshots of VMs with their memory, and the return to them, on real guests.

use std::{collections::BTreeSet, fs, path::PathBuf};

use burgeon_api::ByteSize;
use burgeon_store::steps::Step;
use serde_json::{Value, json};

use crate::lab::{Lab, finish, is_running, kill, until};

/// A process that counts, with a word that only its own memory has.
const COUNTS: &str = r#"(word=$(cat /proc/sys/kernel/random/uuid); i=0
    while :; do i=$((i+1)); echo "$word $i" > /tmp/new; mv /tmp/new /tmp/told; usleep 5000 2>/dev/null || sleep 0.01; done
    ) </dev/null >/dev/null 2>&1 & until test -s /tmp/told; do sleep 0.1; done"#;

#[track_caller]
fn told(lab: &Lab, vm: &str) -> (String, u32) {
    let said = lab.said(vm, "cat /tmp/told");
    let (word, count) = said.split_once(' ').unwrap();
    (word.to_string(), count.parse().unwrap())
}

fn snapshots(lab: &Lab, vm: &str) -> Vec<String> {
    let all = lab.json(&["vm", "snapshots", vm]);
    all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_string()).collect()
}

#[track_caller]
fn size(of: &Value) -> ByteSize {
    of.as_str().unwrap().parse().unwrap()
}

fn roots(lab: &Lab) -> u64 {
    lab.json(&["store", "stat"])["roots"]["disk"].as_u64().unwrap_or(0)
}

fn only_vm(lab: &Lab) -> PathBuf {
    fs::read_dir(lab.data().join("vms")).unwrap().next().unwrap().unwrap().path()
}

#[test]
fn a_vm_returns_to_what_it_was_as_often_as_its_user_likes() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    lab.said("one", COUNTS);
    lab.said("one", "echo first > /tmp/note");
    let first = lab.json(&["vm", "snapshot", "one"]);
    assert_eq!((&first["name"], &first["disks"]), (&json!("s1"), &json!([])));
    let (word, then) = told(&lab, "one");
    until("it goes on", || told(&lab, "one").1 > then + 50);

    // What has not changed since is not stored again.
    lab.said("one", "echo second > /tmp/note; head -c 500000 /dev/urandom > /tmp/noise");
    let second = lab.json(&["vm", "snapshot", "one", "later"]);
    let (stored, all) = (size(&second["stored"]), size(&second["memory"]));
    assert!(stored > ByteSize::kib(400) && stored < ByteSize::mib(8) && all > ByteSize::mib(20), "{second}");
    assert!(second["captured_us"].as_u64().unwrap() > 0);
    assert_eq!(snapshots(&lab, "one"), ["s1", "later"]);

    // The process is the one of then, and so are the files; who it is, it shows anew.
    let qemu = lab.pid_of_vm("one");
    let id = lab.json(&["vm", "show", "one"])["id"].clone();
    let mut shown = BTreeSet::new();
    for (snapshot, note, noise) in [("s1", "first", 0), ("later", "second", 500_000), ("s1", "first", 0)] {
        let before = told(&lab, "one").1;
        lab.run(&["vm", "rollback", "one", snapshot]).good();
        let (same, now) = told(&lab, "one");
        assert_eq!(same, word);
        if snapshot == "s1" && shown.is_empty() {
            assert!(now < before, "{now} {before}");
        }
        until("it counts", || told(&lab, "one").1 > now);
        assert_eq!(
            lab.said("one", "cat /tmp/note; cat /tmp/noise 2>/dev/null | wc -c; hostname"),
            format!("{note}\n{noise}\none")
        );
        lab.said("one", "echo spoiled > /tmp/note; rm -f /tmp/noise");
        let receipt = lab.receipt("one");
        assert_eq!(receipt["origin"], format!("snapshot {snapshot} of VM one"));
        shown.extend(["generation", "sample", "boot_id"].map(|key| receipt[key].to_string()));
        assert!(receipt["clock_offset_us"].as_i64().unwrap().abs() < 100_000, "{receipt}");
    }
    assert_eq!(shown.len(), 9);
    let view = lab.json(&["vm", "show", "one"]);
    assert_eq!((&view["id"], &view["on_host"]["snapshots"]), (&id, &json!(2)));
    assert!(!is_running(qemu) && lab.qemus().len() == 1);

    // Of one that is paused, and of one that is parked; from any state, and without a name to the latest.
    lab.said("one", "echo paused > /tmp/note");
    lab.run(&["vm", "pause", "one"]).good();
    assert_eq!(lab.json(&["vm", "snapshot", "one"])["name"], "s2");
    assert_eq!(lab.json(&["vm", "show", "one"])["state"], "paused");
    lab.run(&["vm", "rollback", "one", "s1"]).good();
    assert_eq!(lab.said("one", "cat /tmp/note"), "first");
    lab.run(&["vm", "rollback", "one"]).good();
    assert_eq!(lab.said("one", "cat /tmp/note"), "paused");
    lab.said("one", "echo parked > /tmp/note");
    lab.run(&["vm", "park", "one"]).good();
    let parked = lab.json(&["vm", "snapshot", "one"]);
    assert_eq!(
        (size(&parked["stored"]), lab.json(&["vm", "show", "one"])["state"].as_str()),
        (ByteSize(0), Some("parked"))
    );
    lab.run(&["vm", "rollback", "one", "s2"]).good();
    assert_eq!(lab.said("one", "cat /tmp/note"), "paused");
    lab.run(&["vm", "stop", "--force", "one"]).good();
    lab.run(&["vm", "rollback", "one"]).good();
    assert_eq!(lab.said("one", "cat /tmp/note"), "parked");
    kill(lab.pid_of_vm("one"), "KILL");
    until("its end is seen", || lab.json(&["vm", "show", "one"])["state"] == "failed");
    lab.run(&["vm", "rollback", "one", "s1"]).good();
    assert_eq!((lab.said("one", "cat /tmp/note"), told(&lab, "one").0), ("first".into(), word.clone()));

    // Others go on from it as new machines.
    lab.run(&["vm", "create", "--snapshot", "one/later", "--name", "two"]).good();
    assert_eq!(lab.said("two", "cat /tmp/note; hostname"), "second\ntwo");
    assert_eq!(told(&lab, "two").0, word);
    assert_ne!(lab.receipt("two")["generation"], lab.receipt("one")["generation"]);

    // The next processes have them too. What a removed one kept, a collection takes.
    for process in ["control", "host", "serve"] {
        kill(lab.pid(process), "KILL");
    }
    until("it is found again", || lab.json(&["vm", "show", "one"])["state"] == "running");
    lab.run(&["vm", "rollback", "one", "later"]).good();
    assert_eq!(lab.said("one", "cat /tmp/note"), "second");
    let before = roots(&lab);
    lab.run(&["vm", "snapshots", "one", "--rm", "s1", "--rm", "s2"]).good();
    assert_eq!((roots(&lab), snapshots(&lab, "one").len()), (before - 2, 2));
    lab.run(&["store", "gc"]).good();
    lab.run(&["vm", "rollback", "one", "later"]).good();
    assert!(lab.json(&["store", "fsck"])["problems"].as_array().unwrap().is_empty());
    lab.run(&["vm", "rm", "one"]).good();
    assert_eq!(lab.said("two", "cat /tmp/note"), "second");
    lab.run(&["vm", "rm", "two"]).good();
    until("no root is left", || roots(&lab) == 0);
    until("no directory is left", || fs::read_dir(lab.data().join("vms")).unwrap().next().is_none());
    assert!(lab.qemus().is_empty());
}

#[test]
fn disks_return_with_the_memory_that_fits_them() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "one", "worker");
    let sums =
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum /root/much | cut -d' ' -f1; head -c 1M /dev/vdb | sha256sum";
    let write =
        "head -c 3M /dev/urandom > /root/much; head -c 1M /dev/urandom | dd of=/dev/vdb conv=notrunc 2>/dev/null";
    lab.run(&["vm", "disk", "attach", "one", "data", "--size", "64M"]).good();
    lab.said("one", "until test -b /dev/vdb; do sleep 0.1; done");
    // Half of it is still in the guest's memory: nothing was synced.
    lab.said("one", write);
    let first = lab.json(&["vm", "snapshot", "one"]);
    assert_eq!(first["disks"], json!(["root", "data"]));
    let of_first = lab.said("one", &format!("sync; {sums}"));
    lab.said("one", write);
    lab.run(&["vm", "snapshot", "one"]).good();
    let of_second = lab.said("one", &format!("sync; {sums}"));
    assert_ne!(of_first, of_second);

    // What is plugged in or grown later is not part of what it was.
    lab.said("one", &format!("{write}; sync"));
    lab.run(&["vm", "disk", "attach", "one", "late", "--size", "16M"]).good();
    lab.run(&["vm", "disk", "resize", "one", "--disk", "data", "96M"]).good();
    lab.run(&["vm", "disk", "snapshot", "one", "mine"]).good();
    lab.run(&["vm", "rollback", "one", "s1"]).good();
    assert_eq!(lab.said("one", &format!("sync; {sums}")), of_first);
    let disk = |name: &str| {
        let disks = lab.json(&["vm", "disk", "ls", "one"]);
        disks.as_array().unwrap().iter().find(|disk| disk["name"] == name).cloned().unwrap()
    };
    assert_eq!((&disk("data")["size"], &disk("late")["attached"]), (&json!("64M"), &json!(false)));
    // Those of disks are their user's alone, and stay.
    assert_eq!(disk("root")["snapshots"].as_array().unwrap().len(), 1);
    let refused = lab.run(&["vm", "disk", "rm-snapshot", "one", ".vm-s1"]);
    assert!(refused.code == 1 && refused.stderr.contains("begins, ends or doubles badly"), "{}", refused.stderr);

    lab.run(&["vm", "rollback", "one", "s2"]).good();
    assert_eq!(lab.said("one", &format!("sync; {sums}")), of_second);
    // A disk goes no sooner than the snapshots that it is in.
    lab.run(&["vm", "disk", "detach", "one", "data"]).good();
    let refused = lab.run(&["vm", "disk", "rm", "one", "data"]);
    assert!(refused.code == 1 && refused.stderr.contains("disk data is in snapshot s1"), "{}", refused.stderr);
    lab.run(&["vm", "rollback", "one", "s1"]).good();
    assert_eq!(lab.said("one", &format!("sync; {sums}")), of_first);

    lab.run(&["vm", "create", "--snapshot", "one/s2", "--name", "two"]).good();
    assert_eq!(lab.said("two", &format!("sync; {sums}")), of_second);
    lab.run(&["vm", "snapshots", "one", "--rm", "s1", "--rm", "s2"]).good();
    lab.run(&["vm", "disk", "detach", "one", "data"]).good();
    lab.run(&["vm", "disk", "rm", "one", "data"]).good();
    lab.run(&["store", "gc"]).good();
    assert!(lab.json(&["store", "fsck"])["problems"].as_array().unwrap().is_empty());
    // Both boot from what they have now.
    lab.run(&["vm", "stop", "one", "two"]).good();
    lab.run(&["vm", "start", "one", "two"]).good();
    let sum = |vm: &str| lab.said(vm, "sha256sum /root/much | cut -d' ' -f1");
    assert!(of_first.starts_with(&sum("one")) && of_second.starts_with(&sum("two")));
}

#[test]
fn servers_that_die_leave_a_snapshot_or_none_and_a_vm_that_has_returned_or_not() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "one", "worker");
    lab.said("one", COUNTS);
    lab.said("one", "echo kept > /root/note; sync");
    let word = told(&lab, "one").0;
    lab.run(&["vm", "snapshot", "one", "good"]).good();
    let qemu = lab.pid_of_vm("one");
    let before = roots(&lab);
    for (step, adoptions) in
        [Step::SnapshotCaptured, Step::PackWritten, Step::RootSet, Step::SnapshotKept].into_iter().zip(1..)
    {
        lab.said("one", "head -c 200000 /dev/urandom > /tmp/noise; head -c 200000 /dev/urandom > /root/noise");
        lab.die_at(step);
        let done = lab.run(&["vm", "snapshot", "one", "new"]);
        assert!(!lab.has_yet_to_die() && done.code == 1, "{step:?}: {done:?}");
        until("the VM goes on", || {
            let view = lab.json(&["vm", "show", "one"]);
            view["state"] == "running" && view["on_host"]["adoptions"] == adoptions
        });
        let counted = told(&lab, "one").1;
        until("it counts", || told(&lab, "one").1 > counted);
        assert_eq!(snapshots(&lab, "one"), ["good"], "{step:?}");
        assert_eq!(fs::read_dir(only_vm(&lab).join("snapshots")).unwrap().count(), 1, "{step:?}");
        let record = fs::read_to_string(only_vm(&lab).join("disks/root/disk.record")).unwrap();
        assert!(!record.lines().last().unwrap().contains(".vm-new"), "{step:?}: {record}");
    }
    assert_eq!(lab.pid_of_vm("one"), qemu);
    // Its request reaches the host again, and takes one.
    let taking = lab.command(&["vm", "snapshot", "one", "new"]).spawn().unwrap();
    kill(lab.pid("control"), "KILL");
    finish(taking).good();
    assert_eq!(snapshots(&lab, "one"), ["good", "new"]);
    lab.run(&["vm", "snapshots", "one", "--rm", "new"]).good();

    // Whoever dies: it has returned, as a whole, when the command says so.
    for step in [Step::RollbackWanted, Step::RollbackRecorded, Step::DisksRolledBack, Step::RolledBack] {
        lab.said("one", "echo spoiled > /root/note; sync; echo spoiled > /tmp/spoiled");
        lab.die_at(step);
        let done = lab.run(&["vm", "rollback", "one"]);
        assert!(!lab.has_yet_to_die(), "{step:?}: {done:?}");
        done.good();
        assert_eq!(lab.said("one", "cat /root/note; test -e /tmp/spoiled || echo none"), "kept\nnone", "{step:?}");
        let (same, counted) = told(&lab, "one");
        assert_eq!(same, word, "{step:?}");
        until("it counts", || told(&lab, "one").1 > counted);
        assert_eq!(lab.qemus().len(), 1, "{step:?}");
        let view = lab.json(&["vm", "show", "one"]);
        assert_eq!(view["on_host"]["starts"], view["starts"], "{step:?}");
    }
    // A stop and a start later it boots, and nobody returns it once more.
    lab.said("one", "echo mine > /root/note; sync");
    lab.run(&["vm", "stop", "one"]).good();
    lab.run(&["vm", "start", "one"]).good();
    assert_eq!(lab.said("one", "cat /root/note"), "mine");
    until("what stays is what is needed", || roots(&lab) <= before + 2);
    assert!(lab.json(&["store", "fsck"])["problems"].as_array().unwrap().is_empty());
    lab.run(&["vm", "rm", "one"]).good();
    until("no root is left", || roots(&lab) == 0);
}

#[test]
fn what_cannot_be_kept_or_returned_to_is_refused_by_name() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    let shown = lab.file("screen.toml", "memory = \"128M\"\ndisplay = true\n");
    lab.run(&["vm", "create", "tiny", "--name", "shown", "-p", shown.to_str().unwrap()]).good();
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    let refused = |words: &[&str], said: &[&str]| {
        let done = lab.run(words);
        assert_eq!(done.code, 1, "{words:?}: {}", done.stderr);
        for said in said {
            assert!(done.stderr.contains(said), "{words:?}: {}", done.stderr);
        }
    };
    refused(&["vm", "rollback", "one"], &["VM one has no snapshot", "burgeon vm snapshot one"]);
    lab.run(&["vm", "snapshot", "one"]).good();
    for (words, said) in [
        (&["snapshot", "one", "s1"][..], &["VM one has a snapshot s1 already", "burgeon vm snapshots one --rm s1"][..]),
        (&["snapshot", "one", "S1"], &["snapshot name \"S1\" holds 'S'"]),
        (&["snapshot", "one", "../s1"], &["holds '/'"]),
        (&["snapshot", "nobody"], &["there is no VM \"nobody\""]),
        (&["snapshot", "shown"], &["VM shown cannot be captured: its graphics card"]),
        (&["snapshot", "base"], &["base is a substrate"]),
        (&["rollback", "one", "s2"], &["VM one has no snapshot s2: it has s1", "burgeon vm snapshots one"]),
        (&["rollback", "base"], &["is a substrate"]),
        (&["rollback", "nobody"], &["there is no VM \"nobody\""]),
        (&["snapshots", "one", "--rm", "s2"], &["no snapshot s2: it has s1"]),
        (&["snapshots", "one", "--rm", "../s1"], &["no snapshot"]),
        (&["snapshots", "nobody"], &["there is no VM \"nobody\""]),
        (&["create", "--snapshot", "one"], &["\"one\" names no snapshot", "VM/NAME"]),
        (&["create", "--snapshot", "one/s2"], &["VM one has no snapshot s2"]),
    ] {
        refused(&[&["vm"], words].concat(), said);
    }
    lab.run(&["vm", "stop", "--force", "shown"]).good();
    refused(&["vm", "snapshot", "shown"], &["VM shown does not run", "burgeon vm start shown"]);
    assert!(snapshots(&lab, "shown").is_empty());

    let id = lab.json(&["vm", "show", "one"])["id"].as_str().unwrap().to_string();
    let directory = lab.data().join("vms").join(id.rsplit('-').next().unwrap());

    // While it is captured nobody returns it, then or later. A QEMU that stands makes that take as long as it takes here.
    let qemu = lab.pid_of_vm("one");
    kill(qemu, "STOP");
    let taking = lab.command(&["vm", "snapshot", "one"]).spawn().unwrap();
    until("it has begun", || fs::read_dir(directory.join("snapshots")).unwrap().count() == 2);
    refused(&["vm", "rollback", "one", "s1"], &["VM one is being captured", "try again"]);
    refused(&["vm", "snapshots", "one", "--rm", "s1"], &["VM one is being captured"]);
    kill(qemu, "CONT");
    finish(taking).good();
    lab.run(&["vm", "snapshots", "one", "--rm", "s2"]).good();

    // What another QEMU has made, this one does not take; the VM goes on as it is, and is not started for it later.
    let file = directory.join("snapshots/s1/snapshot.json");
    let text = fs::read_to_string(&file).unwrap();
    let mut changed: Value = serde_json::from_str(&text).unwrap();
    changed["about"]["compatibility"]["qemu"] = "1.0".into();
    fs::write(&file, changed.to_string()).unwrap();
    refused(&["vm", "rollback", "one"], &["snapshot s1 of VM one cannot go on here: QEMU was 1.0 and is"]);
    assert_eq!((lab.pid_of_vm("one"), lab.json(&["vm", "show", "one"])["starts"].as_u64()), (qemu, Some(0)));
    lab.run(&["exec", "one", "true"]).good();
    // One that does not read is told, and can be removed.
    fs::write(&file, "{").unwrap();
    refused(&["vm", "snapshots", "one"], &["snapshot.json does not read"]);
    lab.run(&["vm", "snapshots", "one", "--rm", "s1"]).good();
    assert!(snapshots(&lab, "one").is_empty());
}
