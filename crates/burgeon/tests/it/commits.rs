//! Disks of VMs that become images.

use std::fs;

use crate::lab::{Lab, until};

fn shell(lab: &Lab, vm: &str, script: &str) -> String {
    lab.run(&["exec", vm, "--", "/bin/sh", "-c", script]).good().stdout.trim().to_string()
}

fn roots(lab: &Lab, kind: &str) -> u64 {
    lab.json(&["store", "stat"])["roots"][kind].as_u64().unwrap_or(0)
}

#[test]
fn a_disk_becomes_an_image_whose_vms_are_machines_of_their_own() {
    let lab = Lab::new(&["debian-minimal", "tiny"]);
    lab.vm("debian-minimal", "one", "worker");
    shell(&lab, "one", "echo first >/root/word; echo key >/etc/ssh/ssh_host_x; echo old >/etc/machine-id");
    lab.run(&["vm", "disk", "snapshot", "one", "first"]).good();
    shell(&lab, "one", "echo second >/root/word");

    // What the guest has written is in it, though it has synced nothing; and it goes on.
    let made = lab.json(&["image", "commit", "one", "mine", "--message", "all set up"]);
    assert_eq!((&made["name"], &made["description"]), (&"mine".into(), &"all set up".into()), "{made}");
    let step = &made["history"].as_array().unwrap().last().unwrap()["origin"]["committed"];
    assert_eq!((&step["vm"], &step["image"]), (&"one".into(), &"debian-minimal".into()), "{made}");
    let new_bytes = made["history"].as_array().unwrap().last().unwrap()["new_bytes"].as_u64().unwrap();
    assert!(new_bytes > 4096 && new_bytes < 4 << 20, "{made}");
    assert_eq!(shell(&lab, "one", "cat /root/word /etc/machine-id"), "second\nold");
    lab.vm("mine", "two", "worker");
    assert_eq!(shell(&lab, "two", "cat /root/word; ls /etc/ssh/ssh_host_x 2>&1 | grep -c 'No such'"), "second\n1");
    assert_eq!(shell(&lab, "two", "wc -c </etc/machine-id"), "0", "systemd fills it");
    assert_eq!(lab.json(&["vm", "disk", "ls", "one"])[0]["snapshots"].as_array().unwrap().len(), 1);

    // What a snapshot holds.
    lab.run(&["image", "commit", "one", "early", "--snapshot", "first"]).good();
    lab.vm("early", "three", "worker");
    assert_eq!(shell(&lab, "three", "cat /root/word"), "first");

    // A VM that has stopped, with a disk that has grown since.
    lab.run(&["vm", "stop", "--force", "three"]).good();
    lab.run(&["vm", "disk", "resize", "three", "4G"]).good();
    let grown = lab.json(&["image", "commit", "three", "grown"]);
    assert_eq!(grown["disk"], "4G");
    assert_eq!(grown["history"].as_array().unwrap().len(), made["history"].as_array().unwrap().len() + 1);

    lab.vm("tiny", "memory", "tiny");
    lab.run(&["vm", "create", "debian-minimal", "--name", "young", "--no-wait"]).good();
    for (words, told) in [
        // First, while it starts.
        (&["young", "new"][..], "try again once it runs or has stopped"),
        (&["one", "mine"], "there is an image mine already"),
        (&["one", "Mine"], "holds 'M'"),
        (&["none", "new"], "there is no VM"),
        (&["memory", "new"], "no disk that could become an image"),
        (&["one", "new", "--snapshot", "third"], "no snapshot third: it has first"),
    ] {
        let refused = lab.run(&[&["image", "commit"], words].concat());
        assert!(refused.code == 1 && refused.stderr.contains(told), "{words:?}: {}", refused.stderr);
    }
    // Its kernel is that of its image.
    lab.run(&["image", "rm", "debian-minimal"]).good();
    let refused = lab.run(&["image", "commit", "one", "new"]);
    assert!(refused.code == 1 && refused.stderr.contains("debian-minimal, which was removed"), "{refused:?}");
    assert!(refused.stderr.contains("build or import that again"), "{refused:?}");
    assert_eq!(roots(&lab, "handover"), 0);

    // Nothing is left of the VMs, and the images are whole.
    lab.run(&["vm", "rm", "one", "two", "three", "memory", "young"]).good();
    until("their disks are let go", || roots(&lab, "disk") == 0);
    for image in ["mine", "early", "grown"] {
        lab.run(&["image", "verify", image]).good();
    }
    let checked = lab.json(&["store", "fsck"]);
    assert!(checked["problems"].as_array().unwrap().is_empty(), "{checked}");
}

#[test]
fn the_disk_of_a_foreign_image_becomes_one_though_that_is_gone() {
    let lab = Lab::new(&[]);
    let raw = lab.path("foreign.raw");
    let mut bytes = vec![0; 1 << 20];
    // Jumps to itself.
    bytes[..2].copy_from_slice(&[0xeb, 0xfe]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&raw, &bytes).unwrap();
    let imported = lab.run(&["-o", "json", "image", "import", raw.to_str().unwrap(), "foreign"]).json();
    lab.run(&["vm", "create", "foreign", "--name", "one"]).good();
    lab.run(&["image", "rm", "foreign"]).good();
    let committed = lab.run(&["-o", "json", "image", "commit", "one", "mine"]);
    assert!(committed.stderr.contains("no agent"), "{committed:?}");
    let made = committed.json();
    assert_eq!((&made["boot"], &made["map"]), (&"firmware".into(), &imported["map"]), "{made}");
    assert_eq!(made["history"][1]["new_bytes"], 0, "{made}");
    lab.run(&["vm", "create", "mine", "--name", "two"]).good();
    let out = lab.path("out.raw");
    lab.run(&["image", "export", "mine", out.to_str().unwrap()]).good();
    assert!(fs::read(&out).unwrap() == bytes);
    lab.run(&["vm", "rm", "one", "two"]).good();
}
