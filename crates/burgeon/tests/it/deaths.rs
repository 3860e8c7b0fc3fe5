//! Servers that die, as by kill -9, at each step of an import and of a commit: what was acknowledged is whole, nothing is
//! there by half, and the same command then does its work.

use std::{fs, path::Path};

use burgeon_store::steps::Step;

use crate::lab::{Lab, until};

const IMPORT: [Step; 5] = [Step::ObjectBeside, Step::PackWritten, Step::PackKnown, Step::RootSet, Step::ImagePublished];
/// The first of these end the host process, the last three control.
const HOST_DEATHS: u64 = 7;
const COMMIT: [Step; 10] = [
    Step::DiskSealed,
    Step::ObjectBeside,
    Step::PackWritten,
    Step::PackKnown,
    Step::RootSet,
    Step::LayerStored,
    Step::HandedOver,
    Step::HandoverReceived,
    Step::ImageKept,
    Step::ImagePublished,
];

/// Runs a command whose server dies at a step.
#[track_caller]
fn dies_at(lab: &Lab, step: Step, words: &[&str]) {
    lab.die_at(step);
    let done = lab.run(words);
    assert!(!lab.has_yet_to_die(), "{step:?} was never met: {done:?}");
    assert_eq!(done.code, 1, "{step:?}: {done:?}");
    assert!(!done.stderr.contains("panic"), "{step:?}: {done:?}");
}

/// All images are there, and the store has all that they need.
#[track_caller]
fn assert_whole(lab: &Lab, step: Step) {
    for image in lab.json(&["image", "ls"]).as_array().unwrap() {
        assert!(image["problem"].is_null(), "{step:?}: {image}");
    }
    let checked = lab.json(&["store", "fsck"]);
    assert!(checked["problems"].as_array().unwrap().is_empty(), "{step:?}: {checked}");
}

/// All of them can be read.
#[track_caller]
fn verify_all(lab: &Lab) {
    for name in names(lab) {
        lab.run(&["image", "verify", &name]).good();
    }
}

fn names(lab: &Lab) -> Vec<String> {
    lab.run(&["image", "ls", "-q"]).good().stdout.lines().map(String::from).collect()
}

/// Half-made things of images.
fn half_made(lab: &Lab) -> usize {
    let entries = fs::read_dir(lab.data().join("tmp")).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("image-")).count()
}

/// A disk with a boot sector, and bytes that no other has.
fn disk(path: &Path, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes: Vec<u8> = Vec::with_capacity(1 << 20);
    while bytes.len() < 1 << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_import_that_dies_leaves_nothing_by_half() {
    let lab = Lab::new(&[]);
    // The store's own mark is an object too, made when it is opened first.
    lab.run(&["store", "stat"]).good();
    let raw = lab.path("disk.raw");
    let words = ["image", "import", raw.to_str().unwrap()];
    let mut acknowledged = Vec::new();
    for (step, seed) in IMPORT.into_iter().zip(1..) {
        disk(&raw, seed);
        let name = format!("disk-{seed}");
        let words = [&words[..], &[name.as_str()]].concat();
        dies_at(&lab, step, &words);
        assert_whole(&lab, step);
        let there = names(&lab);
        assert!(acknowledged.iter().all(|name| there.contains(name)), "{step:?}: {there:?}");
        assert_eq!(there.contains(&name), step == Step::ImagePublished, "{step:?}: {there:?}");
        lab.run(&words).good();
        assert_eq!(half_made(&lab), 0, "{step:?}");
        acknowledged.push(name);
        assert_whole(&lab, step);
    }
    assert_eq!(names(&lab), acknowledged);
    verify_all(&lab);
}

#[test]
fn a_commit_that_dies_leaves_nothing_by_half() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "one", "worker");
    let shell = |script: &str| lab.run(&["exec", "one", "--", "/bin/sh", "-c", script]);
    for (step, number) in COMMIT.into_iter().zip(1..) {
        shell(&format!("head -c 200000 /dev/urandom >/root/{number}; echo {number} >/root/last")).good();
        let name = format!("mine-{number}");
        let words = ["image", "commit", "one", &name];
        dies_at(&lab, step, &words);
        // What control says may be older than the death; the count of adoptions tells.
        let adoptions = number.min(HOST_DEATHS);
        until("the VM goes on", || {
            let view = lab.json(&["vm", "show", "one"]);
            view["state"] == "running" && view["on_host"]["adoptions"] == adoptions
        });
        assert_whole(&lab, step);
        let is_there = names(&lab).contains(&name);
        assert_eq!(is_there, step == Step::ImagePublished, "{step:?}");
        if !is_there {
            lab.run(&words).good();
        }
        assert_eq!(half_made(&lab), 0, "{step:?}");
        // What was sealed for a try that died is let go.
        let record = fs::read_dir(lab.data().join("vms")).unwrap().next().unwrap().unwrap().path();
        let record = fs::read_to_string(record.join("disks/root/disk.record")).unwrap();
        assert!(!record.lines().last().unwrap().contains(".handover"), "{step:?}: {record}");
    }
    verify_all(&lab);
    lab.run(&["vm", "rm", "one"]).good();
    // The last one has all that was written, in its place.
    lab.vm("mine-10", "two", "worker");
    let last = lab.run(&["exec", "two", "--", "/bin/sh", "-c", "cat /root/last; ls /root | wc -l"]).good();
    assert_eq!(last.stdout, "10\n11\n");
}
