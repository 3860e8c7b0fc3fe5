//! A host process that dies, as by kill -9, at each phase of VMs that are captured and go on: nobody runs who has shown no
//! receipt, who ran before runs on, and nothing is left.

use std::fs;

use burgeon_store::steps::Step;

use crate::lab::{Lab, until};

/// What host processes leave in a data directory: VMs, and what they were about to make.
fn left(lab: &Lab) -> usize {
    let of = |directory: &str| fs::read_dir(lab.data().join(directory)).into_iter().flatten().flatten();
    let begun = |name: &str| name.starts_with("standby") || name.starts_with("snapshot");
    of("vms").count() + of("tmp").filter(|entry| begun(&entry.file_name().to_string_lossy())).count()
}

fn state(lab: &Lab, vm: &str) -> String {
    let shown = lab.run(&["vm", "show", vm, "-o", "json"]);
    if shown.code == 0 { shown.json()["state"].as_str().unwrap().to_string() } else { "none".into() }
}

/// Runs a command whose host process dies at a step.
#[track_caller]
fn dies_at(lab: &Lab, step: Step, words: &[&str]) {
    lab.die_at(step);
    let done = lab.run(words);
    assert!(!lab.has_yet_to_die(), "{step:?} was never met: {done:?}");
}

#[test]
fn who_has_shown_no_receipt_to_a_host_process_that_lives_does_not_run() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    for step in [Step::Spawned, Step::Loaded, Step::Identified, Step::Thawed, Step::Claimed, Step::Handed] {
        let waiting = if matches!(step, Step::Claimed | Step::Handed) { "1" } else { "0" };
        lab.run(&["substrate", "dock", "base", waiting]).good();
        dies_at(&lab, step, &["vm", "create", "-s", "base", "--name", "c"]);
        until("it is told", || matches!(state(&lab, "c").as_str(), "failed" | "none"));
        lab.run(&["substrate", "dock", "base", "0"]).good();
        drop(lab.run(&["vm", "rm", "c"]));
        until(&format!("{step:?} leaves no QEMU"), || lab.qemus().is_empty() && lab.standbys().is_empty());
        until(&format!("{step:?} leaves nothing but the substrate"), || left(&lab) == 1);
    }
    lab.run(&["vm", "create", "-s", "base", "--name", "c"]).good();
    assert_eq!(lab.said("c", "hostname"), "c");
    lab.run(&["vm", "rm", "c"]).good();
    lab.run(&["substrate", "rm", "base"]).good();
    until("nothing is left", || left(&lab) == 0);
}

#[test]
fn who_is_captured_when_the_host_process_dies_goes_on_or_is_kept() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "a", "tiny");
    lab.said("a", "head -c 16 /dev/urandom | hexdump -ve '1/1 \"%02x\"' > /tmp/word; (while :; do echo x >> /tmp/count; sleep 0.1; done) >/dev/null 2>&1 &");
    let word = lab.said("a", "cat /tmp/word");
    let goes_on = |step: Step| {
        until(&format!("{step:?}: it goes on"), || lab.run(&["exec", "a", "true"]).code == 0);
        let count = || lab.said("a", "wc -c < /tmp/count").parse::<u64>().unwrap();
        let counted = count();
        until(&format!("{step:?}: it counts"), || count() > counted);
        assert_eq!(lab.said("a", "cat /tmp/word"), word, "{step:?}");
        assert_eq!(lab.qemus().len(), 1, "{step:?}");
    };
    dies_at(&lab, Step::Captured, &["fork", "a", "--name", "f"]);
    until("the fork is told", || matches!(state(&lab, "f").as_str(), "failed" | "none"));
    drop(lab.run(&["vm", "rm", "f"]));
    goes_on(Step::Captured);
    for step in [Step::Captured, Step::StateKept] {
        dies_at(&lab, step, &["vm", "park", "a"]);
        goes_on(step);
    }
    dies_at(&lab, Step::StateRecorded, &["vm", "park", "a"]);
    until("it is parked", || state(&lab, "a") == "parked");
    until("its process has ended", || lab.qemus().is_empty());
    lab.run(&["vm", "start", "a"]).good();
    goes_on(Step::StateRecorded);
    assert_eq!(left(&lab), 1);

    for step in [Step::Captured, Step::StateKept, Step::StateRecorded] {
        dies_at(&lab, step, &["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]);
        until(&format!("{step:?}: it is a substrate or none"), || {
            matches!(state(&lab, "base").as_str(), "docked" | "failed" | "none")
        });
        drop(lab.run(&["substrate", "rm", "base"]));
        goes_on(step);
        until(&format!("{step:?} leaves nothing"), || left(&lab) == 1 && lab.standbys().is_empty());
    }
    lab.run(&["vm", "rm", "a"]).good();
    until("nothing is left", || left(&lab) == 0 && lab.qemus().is_empty());
}
