//! VMs that their users pause or freeze, on real guests.

use std::time::{Duration, SystemTime};

use crate::lab::{Lab, is_running, kill, until};

/// A workload that counts for ever, and keeps a word in memory that says which VM it began in.
const COUNTS: &str = r#"cat /proc/sys/kernel/random/uuid > /tmp/word
    (while :; do echo >> /tmp/count; usleep 5000 2>/dev/null || sleep 0.01; done) </dev/null >/dev/null 2>&1 &"#;

fn count(lab: &Lab, vm: &str) -> u32 {
    lab.said(vm, "wc -l < /tmp/count").parse().unwrap()
}

#[track_caller]
fn state(lab: &Lab, vm: &str) -> String {
    lab.json(&["vm", "show", vm])["state"].as_str().unwrap().to_string()
}

#[expect(clippy::disallowed_methods, reason = "the guest's clock is compared with this machine's")]
fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

/// The guest says when its clock begins a second; what its answer takes only makes that look later than it was.
#[track_caller]
fn clock_is_right(lab: &Lab, vm: &str) {
    let tick = "begun=$(date +%s); while [ $(date +%s) = $begun ]; do :; done; date +%s";
    until("its clock is right within 100 ms", || {
        let told = Duration::from_secs(lab.said(vm, tick).parse().unwrap());
        now().abs_diff(told) < Duration::from_millis(100)
    });
}

#[test]
fn a_paused_vm_stands_still_until_its_user_resumes_it() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    lab.said("one", COUNTS);
    let word = lab.said("one", "cat /tmp/word");
    lab.run(&["vm", "pause", "one"]).good();
    lab.run(&["vm", "pause", "one"]).good();
    assert_eq!(state(&lab, "one"), "paused");
    assert!(lab.run(&["vm", "ls"]).stdout.contains("paused"));

    // Whoever needs the guest is told what to do; nobody lets it go on behind its user's back.
    for words in [
        &["exec", "one", "true"][..],
        &["vm", "cp", "one:/tmp/word", "word"],
        &["vm", "freeze", "one"],
        &["vm", "stop", "one"],
        &["vm", "start", "one"],
        &["vm", "disk", "attach", "one", "data", "--size", "64M"],
    ] {
        let refused = lab.run(words);
        assert!(refused.code != 0 && refused.stderr.contains("VM one is paused"), "{words:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("burgeon vm resume one"), "{words:?}: {}", refused.stderr);
    }
    let refused = lab.run(&["vm", "pause", "two"]);
    assert!(refused.stderr.contains("there is no VM \"two\""), "{}", refused.stderr);

    // Its forks go on; it does not.
    lab.run(&["fork", "one", "--name", "fork"]).good();
    assert_eq!(lab.said("fork", "cat /tmp/word"), word);
    let counted = count(&lab, "fork");
    until("the fork counts", || count(&lab, "fork") > counted);
    assert_eq!(state(&lab, "one"), "paused");

    // The next processes find it as it was, and fork it too.
    let qemu = lab.pid_of_vm("one");
    for process in ["control", "host", "serve"] {
        kill(lab.pid(process), "KILL");
    }
    until("it is found again", || state(&lab, "one") == "paused");
    assert_eq!(lab.json(&["vm", "show", "one"])["on_host"]["adoptions"], 1);
    lab.run(&["fork", "one", "--name", "late"]).good();
    assert_eq!(lab.said("late", "cat /tmp/word"), word);
    assert_eq!((state(&lab, "one"), is_running(qemu)), ("paused".into(), true));

    lab.run(&["vm", "resume", "one"]).good();
    lab.run(&["vm", "resume", "one"]).good();
    clock_is_right(&lab, "one");
    assert_eq!(lab.said("one", "cat /tmp/word"), word);
    let now = count(&lab, "one");
    until("it counts", || count(&lab, "one") > now);
    // Without a new host process in between too.
    lab.run(&["vm", "pause", "one"]).good();
    lab.run(&["vm", "resume", "one"]).good();
    clock_is_right(&lab, "one");

    // Parked as it stands, it goes on when it is started.
    lab.run(&["vm", "pause", "one"]).good();
    lab.run(&["vm", "park", "one"]).good();
    assert_eq!((state(&lab, "one"), is_running(qemu)), ("parked".into(), false));
    let refused = lab.run(&["vm", "pause", "one"]);
    assert!(refused.code == 1 && refused.stderr.contains("VM one is parked"), "{}", refused.stderr);
    assert_eq!(lab.said("one", "cat /tmp/word"), word);
    lab.run(&["vm", "stop", "--force", "one"]).good();
    let refused = lab.run(&["vm", "pause", "one"]);
    assert!(refused.code == 1 && refused.stderr.contains("VM one does not run"), "{}", refused.stderr);
    lab.run(&["vm", "pause", "late"]).good();
    lab.run(&["vm", "stop", "--force", "late"]).good();
    lab.run(&["vm", "rm", "one", "late", "fork"]).good();
    until("no QEMU is left", || lab.qemus().is_empty());
}

#[test]
fn a_frozen_workload_stays_frozen_whoever_captures_it() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    lab.said("one", COUNTS);
    lab.run(&["vm", "freeze", "one"]).good();
    let frozen = || {
        let refused = lab.run(&["exec", "one", "true"]);
        assert!(refused.code != 0 && refused.stderr.contains("the workload is frozen"), "{}", refused.stderr);
    };
    lab.run(&["fork", "one", "--name", "fork"]).good();
    let counted = count(&lab, "fork");
    until("the fork counts", || count(&lab, "fork") > counted);
    frozen();
    lab.run(&["vm", "pause", "one"]).good();
    lab.run(&["vm", "resume", "one"]).good();
    frozen();
    lab.run(&["vm", "park", "one"]).good();
    lab.run(&["vm", "start", "one"]).good();
    frozen();
    lab.run(&["vm", "thaw", "one"]).good();
    let counted = count(&lab, "one");
    until("it counts", || count(&lab, "one") > counted);
}

#[test]
fn idle_vms_are_parked_and_those_whose_time_is_over_are_removed() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&["vm", "create", "tiny", "-p", "tiny", "--name", "idle", "--idle-park", "2s"]).good();
    assert_eq!(lab.json(&["vm", "ls"])[0]["life"]["idle_park_s"], 2);
    // A command that runs keeps it.
    lab.said("idle", "echo here > /tmp/word; sleep 9");
    let starts = || lab.json(&["vm", "show", "idle"])["on_host"]["starts"].as_u64().unwrap();
    let before = starts();
    until("it is parked", || state(&lab, "idle") == "parked");
    assert_eq!(lab.said("idle", "cat /tmp/word"), "here");
    assert!(starts() > before);
    // What was asked for outlives the server.
    kill(lab.pid("control"), "KILL");
    until("it is parked again", || state(&lab, "idle") == "parked");

    let refused = lab.run(&["vm", "set", "idle"]);
    assert!(refused.code != 0 && refused.stderr.contains("nothing is to be set"), "{}", refused.stderr);
    let refused = lab.run(&["vm", "set", "nobody", "--ttl", "1s"]);
    assert!(refused.code == 1 && refused.stderr.contains("there is no VM \"nobody\""), "{}", refused.stderr);
    lab.run(&["vm", "set", "idle", "--ttl", "1h", "--idle-park", "0"]).good();
    let life = lab.json(&["vm", "show", "idle"])["life"].clone();
    assert!(life["expires_s"].is_u64() && life["idle_park_s"].is_null(), "{life}");
    lab.run(&["vm", "set", "idle", "--ttl", "1s"]).good();
    until("it is removed", || lab.json(&["vm", "ls"]) == serde_json::json!([]));
    let said = std::fs::read_to_string(lab.data().join("serve.log")).unwrap();
    assert!(said.contains("its time to live is over"), "{said}");
}
