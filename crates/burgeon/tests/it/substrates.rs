//! Substrates and forks, on real guests.

use std::collections::{BTreeMap, BTreeSet};

use burgeon_api::ByteSize;
use serde_json::Value;

use crate::lab::{Lab, is_running, kill, until};

impl Lab {
    #[track_caller]
    pub(crate) fn said(&self, vm: &str, script: &str) -> String {
        self.run(&["exec", vm, "sh", "-c", script]).good().stdout.trim().to_string()
    }

    #[track_caller]
    pub(crate) fn receipt(&self, vm: &str) -> Value {
        self.json(&["vm", "receipt", vm])
    }
}

/// A workload that draws random numbers all the time, and keeps what it has drawn in memory.
const DRAWS: &str = r#"echo nonce-$(cat /proc/sys/kernel/random/uuid) > /tmp/nonce
    (while :; do cat /proc/sys/kernel/random/uuid >> /tmp/drawn; head -c 16 /dev/urandom | od -A n -t x1 >> /tmp/drawn; usleep 5000 2>/dev/null || sleep 0.01; done) </dev/null >/dev/null 2>&1 &"#;

#[test]
fn clones_and_forks_go_on_from_memory_and_are_nobodys_twins() {
    let lab = Lab::new(&["tiny"]);
    let bad =
        lab.run(&["substrate", "create", "broken", "--image", "tiny", "-p", "tiny", "--warm", "echo no >&2; exit 3"]);
    assert!(bad.code == 1 && bad.stderr.contains("warm-up ended with code 3: no"), "{}", bad.stderr);
    assert_eq!(lab.json(&["substrate", "ls"]), serde_json::json!([]));
    lab.run(&[
        "substrate",
        "create",
        "base",
        "--image",
        "tiny",
        "-p",
        "tiny",
        "--warm",
        DRAWS,
        "--ready",
        "test -s /tmp/drawn",
    ])
    .good();
    let base = lab.json(&["substrate", "show", "base"]);
    assert_eq!(base["state"], "docked");
    // All that is left of it is its memory: no process, and less than the guest was given.
    assert!(lab.qemus().is_empty());
    let held: ByteSize = base["docked"]["memory"].as_str().unwrap().parse().unwrap();
    assert!(held < ByteSize::mib(100), "{base}");

    let made = lab.json(&["vm", "create", "-s", "base", "--name", "c", "--count", "3"]);
    assert_eq!(made.as_array().unwrap().len(), 3);
    let nonce = lab.said("c-1", "cat /tmp/nonce");
    assert!(nonce.starts_with("nonce-"));
    lab.run(&["fork", "c-1", "--name", "f", "--count", "2"]).good();
    // Of a fork, and again of the same source.
    lab.run(&["fork", "f-1", "--name", "g"]).good();
    lab.run(&["fork", "c-1", "--name", "h"]).good();
    let all = ["c-1", "c-2", "c-3", "f-1", "f-2", "g", "h"];
    for vm in all {
        assert_eq!(lab.said(vm, "cat /tmp/nonce; hostname"), format!("{nonce}\n{vm}"), "{vm}");
    }
    until("everybody has drawn", || {
        all.iter().all(|vm| lab.said(vm, "wc -l < /tmp/drawn").parse::<u32>().unwrap() > 50)
    });
    let drawn: Vec<Vec<String>> =
        all.iter().map(|vm| lab.said(vm, "cat /tmp/drawn").lines().map(str::to_string).collect()).collect();
    // What two have in common they had before they were two; from there on nothing is the same.
    for (index, one) in drawn.iter().enumerate() {
        for other in &drawn[index + 1..] {
            let common = one.iter().zip(other).take_while(|(one, other)| one == other).count();
            assert!(common > 0 && common < one.len().min(other.len()));
            let rest: BTreeSet<&String> = one[common..].iter().collect();
            assert!(other[common..].iter().all(|uuid| !rest.contains(uuid)));
        }
    }
    for key in ["generation", "sample", "boot_id", "host_name"] {
        let shown: BTreeSet<String> = all.iter().map(|vm| lab.receipt(vm)[key].to_string()).collect();
        assert_eq!(shown.len(), all.len(), "{key}");
    }
    assert_eq!(lab.receipt("g")["origin"], "fork of VM f-1");
    let clock = lab.receipt("g")["clock_offset_us"].as_i64().unwrap();
    assert!(clock.abs() < 100_000, "{clock}");

    // What one writes, nobody else sees.
    lab.said("f-1", "echo mine > /tmp/note");
    for vm in ["c-1", "g", "f-2"] {
        assert_eq!(lab.said(vm, "test -e /tmp/note || echo none"), "none");
    }

    let refused = lab.run(&["substrate", "rm", "base"]);
    assert!(
        refused.code == 1 && refused.stderr.contains("3 VMs go on from substrate base: c-1 c-2 c-3"),
        "{}",
        refused.stderr
    );
    let refused = lab.run(&["vm", "create", "-s", "nothing"]);
    assert!(refused.stderr.contains("there is no substrate \"nothing\""), "{}", refused.stderr);
    lab.run(&["vm", "rm", "c-1"]).good();
    assert_eq!(lab.said("f-2", "cat /tmp/nonce"), nonce);

    // Parked, one has no process; started, it goes on where it was, as nobody's twin either.
    let before = lab.receipt("f-2")["generation"].clone();
    let qemus = lab.qemus().len();
    lab.run(&["vm", "park", "f-2"]).good();
    assert_eq!((lab.qemus().len(), lab.json(&["vm", "show", "f-2"])["state"].as_str()), (qemus - 1, Some("parked")));
    let refused = lab.run(&["fork", "f-2"]);
    assert!(refused.stderr.contains("VM f-2 is parked"), "{}", refused.stderr);
    lab.run(&["vm", "start", "f-2"]).good();
    lab.run(&["vm", "park", "f-2"]).good();
    // The first command wakes it.
    assert_eq!(lab.said("f-2", "cat /tmp/nonce; hostname"), format!("{nonce}\nf-2"));
    assert_ne!(lab.receipt("f-2")["generation"], before);

    // So does one that was booted: from there on its memory stands above what was kept.
    lab.vm("tiny", "cold", "tiny");
    let sum = lab.said("cold", "head -c 9000000 /dev/urandom > /tmp/much; sha256sum < /tmp/much");
    lab.run(&["vm", "park", "cold"]).good();
    lab.run(&["vm", "start", "cold"]).good();

    // The next host process finds all of them, forks one whose base it does not hold, and docks the substrate again.
    let qemus: BTreeSet<u32> = lab.qemus().into_iter().collect();
    kill(lab.pid("host"), "KILL");
    until("c-2 is found again", || lab.run(&["exec", "c-2", "true"]).code == 0);
    lab.run(&["fork", "c-2", "--name", "k"]).good();
    lab.run(&["vm", "create", "-s", "base", "--name", "l"]).good();
    assert_eq!((lab.said("k", "cat /tmp/nonce"), lab.said("l", "cat /tmp/nonce")), (nonce.clone(), nonce));
    lab.run(&["fork", "cold", "--name", "warm"]).good();
    assert_eq!(lab.said("warm", "sha256sum < /tmp/much"), sum);
    assert!(qemus.iter().all(|pid| is_running(*pid)));
    lab.run(&["vm", "rm", "c-2", "c-3", "f-1", "f-2", "g", "h", "k", "l", "cold", "warm"]).good();
    lab.run(&["substrate", "rm", "base"]).good();
    until("no QEMU is left", || lab.qemus().is_empty() && lab.standbys().is_empty());
}

#[test]
fn vms_begin_at_once_where_qemus_wait() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    let docked = |count: u32| {
        let view = lab.json(&["substrate", "dock", "base", &count.to_string()]);
        assert_eq!(view["standbys"]["waiting"], count, "{view}");
        let mut waiting = lab.standbys();
        waiting.sort_unstable();
        waiting
    };
    let refused = lab.run(&["substrate", "dock", "base", "65"]);
    assert!(refused.code == 1 && refused.stderr.contains("at most 64"), "{}", refused.stderr);
    assert_eq!(lab.run(&["substrate", "dock", "base", "many"]).code, 2);
    lab.vm("tiny", "vm", "tiny");
    let refused = lab.run(&["substrate", "dock", "vm", "1"]);
    assert!(refused.stderr.contains("there is no substrate \"vm\""), "{}", refused.stderr);

    // VMs take those that wait, each its own, and are as different as others.
    let waiting = docked(2);
    lab.run(&["vm", "create", "-s", "base", "--name", "c", "-c", "2"]).good();
    let mut taken = vec![lab.pid_of_vm("c-1"), lab.pid_of_vm("c-2")];
    taken.sort_unstable();
    assert_eq!(taken, waiting);
    let (one, other) = (lab.receipt("c-1"), lab.receipt("c-2"));
    for key in ["generation", "sample", "boot_id", "host_name", "hardware_addresses"] {
        assert!(!one[key].is_null() && (one[key] != other[key] || key == "hardware_addresses"), "{key}: {one} {other}");
    }
    assert_eq!((lab.said("c-1", "hostname"), lab.said("c-2", "hostname")), ("c-1".into(), "c-2".into()));
    assert!(one["clock_offset_us"].as_i64().unwrap().abs() < 100_000, "{one}");
    let phases = lab.json(&["vm", "show", "c-1"])["on_host"]["start_times"].clone();
    assert_eq!(phases[1]["phase"], "claim", "{phases}");

    // One that has died meanwhile is not taken.
    let waiting = docked(2);
    waiting.iter().for_each(|pid| kill(*pid, "KILL"));
    lab.run(&["vm", "create", "-s", "base", "--name", "d"]).good();
    assert!(!waiting.contains(&lab.pid_of_vm("d")) && lab.said("d", "hostname") == "d");

    // The next host process ends those that it finds, has others wait, and takes up the VMs as any others.
    let waiting = docked(2);
    kill(lab.pid("host"), "KILL");
    until("c-1 is found again", || lab.run(&["exec", "c-1", "true"]).code == 0);
    until("the old ones have ended", || waiting.iter().all(|pid| !is_running(*pid)));
    until("others wait", || lab.standbys().len() == 2);
    lab.run(&["fork", "c-1", "--name", "f"]).good();
    assert_eq!(lab.said("f", "hostname"), "f");
    docked(0);
    until("none waits", || lab.standbys().is_empty());

    lab.run(&["vm", "rm", "vm", "c-1", "c-2", "d", "f"]).good();
    docked(1);
    lab.run(&["substrate", "rm", "base"]).good();
    until("no QEMU is left", || lab.qemus().is_empty() && lab.standbys().is_empty());
    until("no directory is left", || std::fs::read_dir(lab.data().join("vms")).unwrap().next().is_none());
}

#[test]
fn a_burst_that_the_memory_does_not_hold_is_refused_one_by_one() {
    let mut lab = Lab::new(&["tiny"]);
    lab.environment.push(("BURGEON_RESERVE".into(), "1T".into()));
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    let refused = lab.run(&["vm", "create", "-s", "base", "--name", "c", "-c", "24"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("no capacity"), "{}", refused.stderr);
    // None of them is left half-made.
    assert_eq!(lab.json(&["vm", "ls"]), serde_json::json!([]));
    assert!(lab.qemus().is_empty() && lab.standbys().is_empty());
    let wrong = lab.command_in(&lab.path("other"), &["serve"]).env("BURGEON_RESERVE", "much").spawn().unwrap();
    let wrong = crate::lab::finish(wrong);
    assert!(wrong.code == 1 && wrong.stderr.contains("BURGEON_RESERVE"), "{}", wrong.stderr);
}

#[test]
fn forks_take_the_qemus_that_wait_for_them() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny"]).good();
    lab.run(&["substrate", "dock", "base", "0"]).good();
    lab.run(&["vm", "create", "-s", "base", "--name", "a"]).good();
    lab.said("a", "echo one > /tmp/x; dd if=/dev/urandom of=/tmp/much bs=64k count=64 2>/dev/null");
    // The first fork shows that there may be more.
    assert!(lab.standbys().is_empty());
    lab.run(&["fork", "a", "--name", "b"]).good();
    lab.said("a", "echo two > /tmp/x; rm /tmp/much");
    // One that is there may not wait yet.
    until("a fork takes one that waits", || {
        let waiting = lab.standbys();
        lab.run(&["fork", "a", "--name", "c"]).good();
        let phases = lab.json(&["vm", "show", "c"])["on_host"]["start_times"].clone();
        let claimed = phases[1]["phase"] == "claim";
        assert_eq!(claimed, waiting.contains(&lab.pid_of_vm("c")), "{phases}");
        claimed || lab.run(&["vm", "rm", "c"]).code != 0
    });
    assert_eq!(lab.said("b", "cat /tmp/x; test -e /tmp/much; echo $?; hostname"), "one\n0\nb");
    assert_eq!(lab.said("c", "cat /tmp/x; test -e /tmp/much; echo $?; hostname"), "two\n1\nc");
    assert_ne!(lab.receipt("b")["sample"], lab.receipt("c")["sample"]);
    // Another machine than those that wait: with one disk more.
    until("others wait", || !lab.standbys().is_empty());
    let waiting = lab.standbys();
    lab.run(&["vm", "disk", "attach", "a", "data", "--size", "16M"]).good();
    lab.run(&["fork", "a", "--name", "d"]).good();
    assert!(!waiting.contains(&lab.pid_of_vm("d")));
    assert_eq!(lab.said("d", "cat /tmp/x"), "two");
    // They end with whom they were to be forks of, and with the host process.
    until("others wait", || !lab.standbys().is_empty());
    let waiting = lab.standbys();
    kill(lab.pid("host"), "KILL");
    until("a is found again", || lab.run(&["exec", "a", "true"]).code == 0);
    until("the old ones have ended", || waiting.iter().all(|pid| !is_running(*pid)));
    lab.run(&["fork", "c", "--name", "e"]).good();
    lab.run(&["vm", "rm", "a", "b", "c", "d", "e"]).good();
    until("no QEMU is left", || lab.qemus().is_empty() && lab.standbys().is_empty());
}

#[test]
fn a_fork_of_a_debian_guest_has_its_own_disk_and_names() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "web", "default");
    lab.run(&["vm", "disk", "attach", "web", "data", "--size", "64M"]).good();
    lab.said("web", "echo before > /root/note; until test -b /dev/vdb; do sleep 0.1; done; echo begin | dd of=/dev/vdb conv=notrunc 2>/dev/null");
    let forked = lab.json(&["fork", "web", "--name", "copy"]);
    assert_eq!(forked["children"][0]["name"], "copy");
    // On both disks, in either direction, memory and all.
    assert_eq!(lab.said("copy", "cat /root/note; head -c 5 /dev/vdb"), "before\nbegin");
    lab.said("web", "echo of the source > /root/note; sync");
    lab.said("copy", "echo of the copy > /root/note; echo other | dd of=/dev/vdb conv=notrunc 2>/dev/null; sync");
    let drop = "echo 3 > /proc/sys/vm/drop_caches; cat /root/note; head -c 5 /dev/vdb";
    assert_eq!(lab.said("web", drop), "of the source\nbegin");
    assert_eq!(lab.said("copy", drop), "of the copy\nother");
    let identity = |vm: &str| {
        let words = "cat /etc/machine-id /proc/sys/kernel/random/boot_id /sys/class/net/e*/address; hostname";
        let mut all = Vec::new();
        // A guest that is still starting may be about to rename its network card.
        until("it shows all of its names", || {
            all = lab.said(vm, words).lines().map(str::to_string).collect::<Vec<_>>();
            all.len() == 4
        });
        all
    };
    let (source, copy) = (identity("web"), identity("copy"));
    assert_eq!(copy[3], "copy");
    assert!(source.iter().zip(&copy).all(|(one, other)| one != other), "{source:?} {copy:?}");
    assert_eq!(lab.receipt("copy")["machine_id"], copy[0].as_str());
    // It boots from its own disk, however it began.
    lab.run(&["vm", "stop", "copy"]).good();
    lab.run(&["vm", "rm", "web"]).good();
    lab.run(&["vm", "start", "copy"]).good();
    assert_eq!(lab.said("copy", "cat /root/note; hostname"), "of the copy\ncopy");
}

#[test]
fn two_hundred_clones_draw_nothing_twice() {
    let lab = Lab::new(&["tiny"]);
    lab.run(&[
        "substrate",
        "create",
        "base",
        "--image",
        "tiny",
        "-p",
        "tiny",
        "--warm",
        &DRAWS.replace("5000", "100000"),
        "--ready",
        "test -s /tmp/drawn",
    ])
    .good();
    let mut drawn: BTreeMap<String, u32> = BTreeMap::new();
    let mut shown: BTreeSet<String> = BTreeSet::new();
    for _ in 0..20 {
        let vms = lab.json(&["vm", "create", "-s", "base", "-c", "10"]);
        let names: Vec<&str> = vms.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
        for vm in &names {
            let known = lab.said(vm, "cat /tmp/drawn");
            assert!(known.lines().count() > 1);
            known.lines().for_each(|uuid| *drawn.entry(uuid.to_string()).or_default() += 1);
        }
        for vm in vms.as_array().unwrap() {
            let receipt = &vm["on_host"]["receipt"];
            shown.extend(["generation", "sample", "boot_id"].map(|key| receipt[key].to_string()));
        }
        lab.run(&[&["vm", "rm"], names.as_slice()].concat()).good();
    }
    // What the substrate had drawn, all of them have; what one has drawn from its first instruction on, no other has.
    let common = drawn.values().filter(|count| **count == 200).count();
    assert!(common > 0 && drawn.len() > common + 200);
    assert!(drawn.values().all(|count| matches!(count, 1 | 200)), "{:?}", drawn.values().max());
    assert_eq!(shown.len(), 600);
}

#[test]
fn a_guest_that_cannot_be_renewed_does_not_go_on() {
    let lab = Lab::new(&["tiny"]);
    // A generator that takes no entropy; a program of the image that fails, once it is told to.
    let hook = r##"mkdir -p /etc/burgeon/on-clone.d
        printf '#!/bin/busybox sh\necho $BURGEON_GENERATION > /tmp/told; test ! -e /tmp/fail\n' > /etc/burgeon/on-clone.d/10-tell
        chmod +x /etc/burgeon/on-clone.d/10-tell"##;
    let broken = "rm /dev/urandom && touch /dev/urandom";
    let create = |name, warm| lab.run(&["substrate", "create", name, "--image", "tiny", "-p", "tiny", "--warm", warm]);
    // What its clones could not do is found when it is made.
    let refused = create("deaf", broken);
    assert!(refused.code == 1 && refused.stderr.contains("cannot renew the kernel's generator"), "{}", refused.stderr);
    assert_eq!((lab.json(&["vm", "ls"]), lab.qemus().len()), (serde_json::json!([]), 0));
    create("hooked", hook).good();
    lab.run(&["substrate", "dock", "hooked", "0"]).good();

    lab.run(&["vm", "create", "-s", "hooked", "--name", "one"]).good();
    let receipt = lab.receipt("one");
    assert_eq!(receipt["hooks"][0]["phase"], "10-tell");
    assert_eq!(receipt["generation"], lab.said("one", "cat /tmp/told").as_str());
    // One result for each child: none of these, and the source goes on.
    lab.said("one", "touch /tmp/fail");
    let refused = lab.run(&["fork", "one", "--name", "two", "-c", "2"]);
    assert!(refused.code == 1 && refused.stderr.contains("on-clone.d/10-tell failed"), "{}", refused.stderr);
    assert!(refused.stdout.is_empty());
    lab.said("one", "rm /tmp/fail");
    lab.run(&["fork", "one", "--name", "two"]).good();
    assert_eq!(lab.receipt("two")["generation"], lab.said("two", "cat /tmp/told").as_str());

    // Memory that the machine cannot read any more is told as that, and the next one has it from the store.
    lab.run(&["vm", "create", "-s", "hooked", "--name", "three"]).good();
    kill(lab.pid_of_vm("three"), "BUS");
    until("its end is told", || lab.run(&["vm", "show", "three"]).stdout.contains("substrate damaged"));
    lab.run(&["vm", "create", "-s", "hooked", "--name", "four"]).good();
    lab.run(&["vm", "rm", "three", "four"]).good();

    // A state that was damaged or cut short is refused before anything starts.
    let substrate = std::fs::read_dir(lab.data().join("vms"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("devices"))
        .filter(|path| path.exists())
        .collect::<Vec<_>>();
    assert_eq!(substrate.len(), 1);
    for devices in substrate {
        std::fs::write(devices, "short").unwrap();
    }
    lab.run(&["vm", "rm", "one", "two"]).good();
    kill(lab.pid("host"), "KILL");
    until("the host process is back", || lab.run(&["substrate", "show", "hooked"]).stdout.contains("docked"));
    until("it is refused", || {
        let refused = lab.run(&["vm", "create", "-s", "hooked"]);
        assert_eq!(refused.code, 1);
        refused.stderr.contains("devices has 5 bytes")
    });
    assert!(lab.qemus().is_empty());
}

#[test]
fn a_fork_has_no_connections_of_its_source_and_an_ssh_host_key_of_its_own() {
    let lab = Lab::new(&["debian-minimal"]);
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    lab.vm("debian-minimal", "web", "default");
    let holds = format!(
        "until ip -4 addr | grep -q 10.0.2; do sleep 0.1; done
         setsid bash -c 'exec 3<>/dev/tcp/10.0.2.2/{port}; echo > /tmp/up; read -u 3 line; echo \"heard $line\" > /tmp/end' \
             </dev/null >/dev/null 2>&1 &
         until test -e /tmp/up; do sleep 0.1; done"
    );
    lab.said("web", &holds);
    let (mut connection, _) = server.accept().unwrap();
    lab.run(&["fork", "web", "--name", "copy"]).good();
    let receipt = lab.receipt("copy");
    assert_eq!((&receipt["ended_connections"], &receipt["kept_connections"]), (&1.into(), &0.into()), "{receipt}");
    // One that is to keep it, does.
    lab.run(&["fork", "web", "--name", "heir", "--keep-connections"]).good();
    let kept = lab.receipt("heir");
    assert_eq!((&kept["ended_connections"], &kept["kept_connections"]), (&0.into(), &1.into()), "{kept}");
    assert!(lab.run(&["vm", "receipt", "heir"]).stdout.contains("connections kept"));
    assert_eq!(lab.said("heir", "test -e /tmp/end || echo holds"), "holds");
    // The copy's program is told; the source's goes on with the one connection that there is.
    assert_eq!(lab.said("copy", "until test -s /tmp/end; do sleep 0.1; done; cat /tmp/end"), "heard");
    assert_eq!(lab.said("web", "test -e /tmp/end || echo holds"), "holds");
    std::io::Write::write_all(&mut connection, b"hello\n").unwrap();
    assert_eq!(lab.said("web", "until test -s /tmp/end; do sleep 0.1; done; cat /tmp/end"), "heard hello");

    let keys = "cd /etc/ssh && ls ssh_host_* && ssh-keygen -lf ssh_host_ed25519_key | cut -d' ' -f2 && \
                ssh-keygen -y -f ssh_host_ed25519_key | diff - ssh_host_ed25519_key.pub && stat -c %a ssh_host_ed25519_key";
    let key = receipt["ssh_host_key"].as_str().unwrap();
    let shall = format!("ssh_host_ed25519_key\nssh_host_ed25519_key.pub\n{key}\n600");
    assert_eq!(lab.said("copy", keys), shall);
    lab.run(&["fork", "copy", "--name", "other"]).good();
    assert_ne!(lab.receipt("other")["ssh_host_key"], *key);
}
