//! What VMs have shown of themselves outlasts them.

use serde_json::{Value, json};

use crate::lab::{Lab, kill, until};

fn all(lab: &Lab, vm: &str) -> Vec<Value> {
    lab.json(&["vm", "receipt", vm, "--all"]).as_array().unwrap().clone()
}

#[test]
fn receipts_are_kept_and_nobody_repeats_one_of_an_earlier_host_process() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    lab.run(&["vm", "create", "-s", "base", "--name", "c", "-c", "2"]).good();
    let first = lab.receipt("c-1");
    lab.run(&["vm", "park", "c-1"]).good();
    assert_eq!(lab.receipt("c-1"), first);
    lab.run(&["vm", "start", "c-1"]).good();
    let second = lab.receipt("c-1");
    assert!(second["generation"] != first["generation"] && second["origin"] == "its own parked state", "{second}");
    until("both are kept", || all(&lab, "c-1").len() == 2);
    let kept: Vec<Value> = all(&lab, "c-1").into_iter().map(|one| one["receipt"].clone()).collect();
    assert_eq!(kept, [first, second.clone()]);
    kill(lab.pid("host"), "KILL");
    until("it is found again", || lab.run(&["exec", "c-1", "true"]).code == 0);
    lab.run(&["vm", "stop", "--force", "c-1"]).good();
    assert_eq!(lab.receipt("c-1"), second);
    lab.run(&["vm", "start", "c-1"]).good();
    assert_eq!(lab.receipt("c-1"), second, "the last one that it has shown");
    let table = lab.run(&["vm", "receipt", "c-1", "--all"]).good().stdout;
    assert!(table.contains("substrate base") && table.contains("its own parked state"), "{table}");

    // Also of one that is gone. Another that shows the same is ended, though its host process knows nothing of that.
    lab.run(&["vm", "rm", "c-1"]).good();
    assert_eq!(all(&lab, "c-1").len(), 2);
    let refused = lab.run(&["vm", "receipt", "c-1"]);
    assert!(refused.code == 1 && refused.stderr.contains("there is no VM \"c-1\""), "{}", refused.stderr);
    let refused = lab.run(&["vm", "receipt", "nobody", "--all"]);
    assert!(refused.code == 1 && refused.stderr.contains("VM nobody has no receipt"), "{}", refused.stderr);
    until("that of the other is kept", || lab.run(&["vm", "receipt", "c-2", "--all"]).code == 0);
    let id = lab.json(&["vm", "show", "c-2"])["id"].as_str().unwrap().replace('-', "");
    for process in ["serve", "control", "host"] {
        kill(lab.pid(process), "KILL");
    }
    let path = lab.data().join("vms").join(&id[20..]).join("vm.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["receipt"]["generation"] = json!("f".repeat(32));
    record["receipt"]["sample"] = second["sample"].clone();
    std::fs::write(&path, record.to_string()).unwrap();
    until("it is ended by name", || {
        let view = lab.json(&["vm", "show", "c-2"]);
        view["state"] == "failed" && view["reason"].as_str().unwrap().contains("is what VM c-1")
    });
    until("no QEMU is left", || lab.qemus().is_empty());
    assert_eq!(all(&lab, "c-2").len(), 1);
}
