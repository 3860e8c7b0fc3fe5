//! Disks of VMs: plugged in and out, grown, kept, cloned, under a guest that runs.

use crate::lab::{Lab, kill, until};

fn shell(lab: &Lab, vm: &str, script: &str) -> String {
    lab.run(&["exec", vm, "--", "sh", "-c", script]).good().stdout.trim().to_string()
}

fn disk(lab: &Lab, vm: &str, name: &str) -> serde_json::Value {
    let disks = lab.json(&["vm", "disk", "ls", vm]);
    disks.as_array().unwrap().iter().find(|disk| disk["name"] == name).cloned().unwrap_or_default()
}

#[test]
fn disks_come_and_go_grow_and_are_kept() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "one", "default");

    // The root grows with its file system.
    let size = |vm: &str| shell(&lab, vm, "df -B1 --output=size / | tail -n 1").parse::<u64>().unwrap();
    let before = size("one");
    lab.run(&["vm", "disk", "resize", "one", "3G"]).good();
    assert!(size("one") > before + (900 << 20), "{} {before}", size("one"));
    let shrunk = lab.run(&["vm", "disk", "resize", "one", "1G"]);
    assert!(shrunk.code == 1 && shrunk.stderr.contains("cannot shrink"), "{}", shrunk.stderr);

    // What a disk holds stays when it is unplugged, and when the host process dies.
    let attached = lab.json(&["vm", "disk", "attach", "one", "data", "--size", "64M"]);
    let device = attached["device"].as_str().unwrap().to_string();
    let sum = format!("head -c 8M {device} | md5sum");
    shell(&lab, "one", &format!("head -c 8M /dev/urandom > {device}; sync"));
    let first = shell(&lab, "one", &sum);
    lab.run(&["vm", "disk", "snapshot", "one", "--disk", "data", "first"]).good();
    lab.run(&["vm", "disk", "detach", "one", "data"]).good();
    assert_eq!(shell(&lab, "one", &format!("ls {device} 2>&1 | grep -c 'No such file'")), "1");
    assert_eq!(disk(&lab, "one", "data")["attached"], false);
    kill(lab.pid("host"), "KILL");
    until("the next host process plugs it in", || {
        let again = lab.run(&["vm", "disk", "attach", "one", "data", "-o", "json"]);
        again.code == 0 && again.json()["device"] == device.as_str()
    });
    assert_eq!(shell(&lab, "one", &sum), first);
    // Its snapshot moves into the store behind its back.
    shell(&lab, "one", &format!("head -c 1M /dev/zero > {device}; sync"));
    until("the snapshot is stored", || disk(&lab, "one", "data")["snapshots"][0]["stored"] == true);
    let changed = lab.json(&["vm", "disk", "diff", "one", "--disk", "data", "first"]);
    assert_eq!((&changed["bytes"], &changed["stretches"][0]["offset"]), (&"1M".into(), &0.into()), "{changed}");

    // Bad requests change nothing.
    for (words, said) in [
        (&["attach", "one", "data", "--size", "1G"][..], "plugged in"),
        (&["attach", "one", "other"], "no disk other"),
        (&["attach", "one", "UPPER", "--size", "1G"], "holds 'U'"),
        (&["attach", "one", "odd", "--size", "1000"], "steps of 512"),
        (&["attach", "one", "odd", "--image", "nothing"], "no image nothing"),
        (&["rm", "one", "data"], "plugged in"),
        (&["rm", "one", "root"], "goes with its VM"),
        (&["detach", "one", "root"], "no disk root"),
        (&["snapshot", "one", "--disk", "data", "first"], "already"),
        (&["rollback", "one", "--disk", "data", "first"], "runs"),
        (&["rollback", "one", "--disk", "data", "second"], "runs"),
        (&["diff", "one", "--disk", "data", "second"], "no snapshot second: it has first"),
        (&["snapshot", "one", "--disk", "../disks/data", "third"], "holds '/'"),
        (&["resize", "one", "--disk", "none", "1G"], "no disk none: it has root, data"),
    ] {
        let mut all = vec!["vm", "disk"];
        all.extend(words);
        let done = lab.run(&all);
        assert!(done.code == 1 && done.stderr.contains(said), "{words:?}: {}", done.stderr);
    }

    // A clone has what was written, a name and an identity of its own, and no part in what comes after.
    shell(&lab, "one", "echo mine > /root/word; ssh-keygen -A >&2; sync");
    lab.run(&["vm", "clone", "one", "--name", "two"]).good();
    shell(&lab, "one", "echo other > /root/word; sync");
    assert_eq!(shell(&lab, "two", "cat /root/word; hostname"), "mine\ntwo");
    assert!(size("two") > before + (900 << 20));
    let identity = |vm: &str| {
        shell(
            &lab,
            vm,
            "until test -s /etc/machine-id; do sleep 0.1; done; cat /etc/machine-id; ls /etc/ssh/ssh_host_* 2>/dev/null | wc -l",
        )
    };
    let (one, two) = (identity("one"), identity("two"));
    assert!(one.ends_with("\n6") && one.len() > 32 && one[..32] != two[..32], "{one} {two}");

    // Back to a snapshot, once nobody looks.
    lab.run(&["vm", "stop", "--force", "one"]).good();
    lab.run(&["vm", "disk", "rollback", "one", "--disk", "data", "first"]).good();
    // What it stands on may go meanwhile; collections take nothing that a disk needs.
    lab.run(&["image", "rm", "debian-minimal"]).good();
    lab.run(&["store", "gc"]).good();
    lab.run(&["vm", "start", "one"]).good();
    assert_eq!(shell(&lab, "one", &sum), first);
    assert_eq!(shell(&lab, "one", "cat /root/word"), "other");
    lab.run(&["vm", "rm", "one"]).good();
    assert_eq!(shell(&lab, "two", "cat /root/word"), "mine");
    let checked = lab.json(&["store", "fsck"]);
    assert!(checked["problems"].as_array().unwrap().is_empty(), "{checked}");
    lab.run(&["vm", "rm", "two"]).good();
}
