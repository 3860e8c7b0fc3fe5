//! What substrates hold, and how they get to other machines.

use burgeon_api::ByteSize;
use serde_json::Value;

use crate::lab::Lab;

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
    assert!(bytes(&busy["own"]) > bytes(&idle["own"]) + 15_000_000, "{stat}");
    assert!(bytes(&idle["own"]) < held && bytes(&idle["proportional"]) < held + 200_000_000, "{stat}");
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
