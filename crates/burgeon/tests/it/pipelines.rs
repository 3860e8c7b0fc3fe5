//! Pipelines on real VMs.

use std::{collections::BTreeMap, ffi::OsString, fs, os::unix::ffi::OsStringExt, time::Instant};

use serde_json::Value;

use crate::lab::{Lab, finish, is_running, kill, until};

const COUNT: &str = r#"
format = 1
name = "count"
image = "tiny"
[report]
defaults = { words = 0 }
[[step]]
name = "count"
vms = 2
command = ["/bin/busybox", "sh", "-c", '''
words=$(busybox wc -w)
if [ "$words" = 0 ]; then route=empty; else route=full; fi
printf '{"route":"%s","attrs":{"words":%d}}' $route $words >"$BURGEON_RESULT"
''']
routes = { full = "keep", empty = "look" }
[[step]]
name = "keep"
command = ["/bin/busybox", "true"]
outcome = "kept"
[[step]]
name = "look"
command = ["/bin/busybox", "sh", "-c", "printf '{\"reason\":\"nothing in it\"}' >$BURGEON_RESULT"]
outcome = "looked-at"
"#;

fn report(lab: &Lab) -> Value {
    serde_json::from_str(&fs::read_to_string(lab.path("out/report.json")).unwrap()).unwrap()
}

fn by_path(report: &Value) -> BTreeMap<String, Value> {
    let files = report["files"].as_array().unwrap();
    let all: BTreeMap<String, Value> =
        files.iter().map(|entry| (entry["path"].as_str().unwrap().to_string(), entry.clone())).collect();
    assert_eq!(all.len(), files.len(), "one entry for each file");
    all
}

#[test]
fn results_route_items_and_every_file_has_its_entry() {
    let lab = Lab::new(&["tiny"]);
    let pipeline = lab.file("count.toml", COUNT);
    for index in 0..40 {
        lab.file(&format!("in/d{}/f{index}", index % 3), &"word ".repeat(index));
    }
    lab.file("in/new\nline", "two words");
    fs::write(lab.path("in").join(OsString::from_vec(vec![b'r', 0xff])), "raw").unwrap();
    fs::write(lab.path("in/gone"), "").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", lab.path("in/link")).unwrap();
    let words = ["run", pipeline.to_str().unwrap(), "--input", "in", "--out", "out"];
    let done = lab.run(&words).good();
    assert!(done.stdout.contains("43 files"), "{done:?}");
    assert!(done.stdout.contains("transfer") && done.stdout.contains("work"), "{done:?}");

    let report = report(&lab);
    let files = by_path(&report);
    assert_eq!(files.len(), 43);
    assert_eq!(report["skipped"], 1);
    for index in 0..40_u64 {
        let entry = &files[&format!("d{}/f{index}", index % 3)];
        assert_eq!(entry["words"], index, "{entry}");
        let outcome = if index == 0 { "looked-at" } else { "kept" };
        assert_eq!(entry["outcome"], outcome, "{entry}");
        let steps: Vec<&str> = entry["vms"].as_array().unwrap().iter().map(|by| by["step"].as_str().unwrap()).collect();
        assert_eq!(steps, ["count", if index == 0 { "look" } else { "keep" }]);
        assert!(entry["vms"][0]["vm"].as_str().unwrap().starts_with("count-"), "{entry}");
    }
    assert_eq!(files["new\nline"]["words"], 2);
    assert_eq!(files["r%FF"]["path_escaped"], true);
    assert_eq!(files["gone"]["reason"], "nothing in it");
    assert!(fs::read_to_string(lab.path("out/report.html")).unwrap().contains("looked-at"));

    // Nothing is left running, and the run is on record.
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "");
    assert!(lab.qemus().is_empty());
    assert_eq!(lab.json(&["pipeline", "ls"])[0]["state"], "done");
}

#[test]
fn kills_in_the_middle_cost_retries_and_no_result() {
    let lab = Lab::new(&["tiny"]);
    // Each item waits for its VM's word: the run is sure to be in the middle.
    let slow = COUNT.replace("words=$(busybox wc -w)", "words=$(busybox wc -w); busybox usleep 100000");
    let pipeline = lab.file("slow.toml", &slow);
    for index in 0..60 {
        lab.file(&format!("in/f{index}"), &"word ".repeat(index));
    }
    let run = lab.command(&["run", pipeline.to_str().unwrap(), "--input", "in", "--out", "out"]).spawn().unwrap();
    let done_so_far = || {
        let view = lab.json(&["pipeline", "ls"]);
        view[0]["steps"][0]["done"].as_u64().unwrap_or(0)
    };
    until("some items are done", || done_so_far() >= 3);
    // A VM in the middle of its work.
    let victim = lab
        .json(&["vm", "ls"])
        .as_array()
        .unwrap()
        .iter()
        .find(|vm| vm["name"].as_str().unwrap().starts_with("count-") && vm["state"] == "running")
        .unwrap()
        .clone();
    kill(u32::try_from(victim["on_host"]["pid"].as_u64().unwrap()).unwrap(), "KILL");
    until("more items are done", || done_so_far() >= 10);
    // The control process: the next one goes on with the run, in the same VMs.
    let before = lab.qemus();
    kill(lab.pid("control"), "KILL");
    until("the run goes on", || done_so_far() >= 25);
    let kept = before.iter().filter(|pid| is_running(**pid)).count();
    assert!(kept >= 1, "no VM was touched for the control process's sake: {before:?} {:?}", lab.qemus());
    finish(run).good();

    let report = report(&lab);
    let files = by_path(&report);
    assert_eq!(files.len(), 60);
    for index in 0..60_u64 {
        assert_eq!(files[&format!("f{index}")]["words"], index);
        assert_ne!(files[&format!("f{index}")]["outcome"], "failed", "{}", files[&format!("f{index}")]);
    }
    assert!(lab.qemus().is_empty());
}

#[test]
fn an_interrupt_ends_the_run_and_nothing_else() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "bystander", "tiny");
    let pipeline = lab.file("slow.toml", &COUNT.replace("words=$(busybox wc -w)", "busybox sleep 1000"));
    lab.file("in/f", "x");
    let run = lab.command(&["run", pipeline.to_str().unwrap(), "--input", "in", "--out", "out"]).spawn().unwrap();
    until("the item is with a VM", || lab.json(&["pipeline", "ls"])[0]["steps"][0]["running"] == 1);
    let begun = Instant::now();
    kill(run.id(), "INT");
    let done = finish(run);
    let took = begun.elapsed();
    assert_eq!(done.code, 130, "{done:?}");
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "bystander\n");
    assert_eq!(lab.qemus().len(), 1);
    assert!(!lab.path("out").exists(), "nothing half-made");
    // Told, not asserted: a loaded machine proves nothing about time.
    eprintln!("cancelled in {} ms", took.as_millis());
}

#[test]
fn an_empty_input_and_a_step_that_cannot_start() {
    let lab = Lab::new(&["tiny"]);
    let pipeline = lab.file("count.toml", COUNT);
    fs::create_dir(lab.path("in")).unwrap();
    lab.run(&["run", pipeline.to_str().unwrap(), "--input", "in", "--out", "out"]).good();
    assert_eq!(report(&lab)["files"].as_array().unwrap().len(), 0);
    // A command that is not there, in mode stream: the run fails with the reason, and cleans up.
    lab.file("in/f", "x");
    let broken = "format = 1\nname = \"b\"\nimage = \"tiny\"\n[[step]]\nname = \"s\"\nmode = \"stream\"\ncommand = [\"/no/such\"]\noutcome = \"o\"\nattempts = 1\n";
    let pipeline = lab.file("broken.toml", broken);
    let done = lab.run(&["run", pipeline.to_str().unwrap(), "--input", "in", "--out", "out2"]);
    let told = format!("{}{}", done.stderr, fs::read_to_string(lab.path("out2/report.json")).unwrap_or_default());
    assert!(told.contains("/no/such"), "{done:?}");
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "");
}
