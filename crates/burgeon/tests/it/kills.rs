//! Processes killed with -9 while work goes on.

use std::{
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
};

use crate::lab::{Lab, finish, is_running, kill, send, until};

#[test]
fn a_killed_control_process_stops_no_command_and_loses_no_byte() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    let qemu = lab.pid_of_vm("one");
    let mut cat = lab.command(&["exec", "one", "--", "/bin/busybox", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
    let mut half = [0; 6];
    stdin.write_all(b"before").unwrap();
    stdout.read_exact(&mut half).unwrap();
    let control = lab.pid("control");
    kill(control, "KILL");
    stdin.write_all(b" after").unwrap();
    stdout.read_exact(&mut half).unwrap();
    assert_eq!(&half, b" after");
    drop(stdin);
    assert_eq!(finish(cat).good().stdout, "");
    assert_ne!(lab.pid("control"), control);
    assert_eq!(lab.pid_of_vm("one"), qemu, "no VM was touched");
    assert_eq!(lab.json(&["vm", "show", "one"])["on_host"]["adoptions"], 0);
}

#[test]
fn a_killed_host_process_is_followed_by_one_that_adopts() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "stays", "tiny");
    lab.vm("tiny", "dies", "tiny");
    let (stays, dies) = (lab.pid_of_vm("stays"), lab.pid_of_vm("dies"));
    let mut running =
        lab.command(&["exec", "stays", "--", "/bin/busybox", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let stdin = running.stdin.take();
    let host = lab.pid("host");
    kill(host, "KILL");
    kill(dies, "KILL");
    until("another host process serves", || lab.pid("host") != host);
    until("the VM is adopted", || lab.json(&["vm", "show", "stays"])["state"] == "running");
    assert_eq!(lab.pid_of_vm("stays"), stays);
    assert_eq!(lab.json(&["vm", "show", "stays"])["on_host"]["adoptions"], 1);
    assert_eq!(lab.run(&["exec", "stays", "--", "/bin/busybox", "echo", "still here"]).good().stdout, "still here\n");
    // The command that ran through the dead process is over, and says so.
    let over = finish(running);
    drop(stdin);
    assert_eq!(over.code, 125, "{over:?}");
    // What is really lost is reported with its reason.
    let lost = lab.json(&["vm", "show", "dies"]);
    assert_eq!(lost["state"], "failed", "{lost}");
    assert!(lost["reason"].as_str().unwrap().contains("host process was away"), "{lost}");
    lab.run(&["vm", "rm", "stays", "dies"]).good();
    assert!(!is_running(stays));
}

/// The host process serves the disk. While there is none the guest waits, and what it was told is written stays.
#[test]
fn a_guest_does_not_notice_that_the_server_of_its_disk_was_killed() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "writer", "worker");
    let run = |script: &str| lab.run(&["exec", "writer", "--", "/bin/sh", "-c", script]);
    run("nohup sh -c 'i=0; while [ $i -lt 400 ]; do dd if=/dev/urandom of=/root/$i bs=64k count=1 conv=fsync; \
         sha256sum /root/$i >>/root/sums; i=$((i+1)); done; sync; echo >/root/done' >/dev/null 2>&1 &")
    .good();
    for _ in 0..3 {
        let host = lab.pid("host");
        kill(host, "KILL");
        until("another host process serves", || lab.pid("host") != host);
        until("the VM is adopted", || lab.json(&["vm", "show", "writer"])["state"] == "running");
    }
    until("all is written", || run("test -e /root/done").code == 0);
    // From the disk, not from the guest's memory.
    run("echo 3 >/proc/sys/vm/drop_caches; sha256sum --quiet -c /root/sums && test $(wc -l </root/sums) = 400").good();
    let said = run("dmesg | grep -iE 'i/o error|blk_update|EXT4-fs error'");
    assert_eq!((said.code, said.stdout.as_str()), (1, ""));
    // A disk that is stopped and started is the same.
    lab.run(&["vm", "stop", "writer"]).good();
    lab.run(&["vm", "start", "writer"]).good();
    run("sha256sum --quiet -c /root/sums").good();
}

/// Builds the program that writes to a disk in a guest and verifies it; for any guest, since it needs no library.
fn verifier(lab: &Lab) -> String {
    let program = lab.path("verifier");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/verifier/main.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let built = Command::new(rustc)
        .args(["--edition", "2024", "--target", "x86_64-unknown-linux-musl", "-O", "-C", "strip=symbols", "-o"])
        .args([&program, &source])
        .status();
    assert!(built.unwrap().success());
    program.to_str().unwrap().to_string()
}

/// As fio does with `--verify`: many writers and readers at a time, past the guest's page cache.
#[test]
fn a_disk_holds_what_was_written_while_its_server_is_killed_again_and_again() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "writer", "worker");
    let shell = |script: &str| lab.run(&["exec", "writer", "--", "/bin/sh", "-c", script]);
    let device = lab.json(&["vm", "disk", "attach", "writer", "data", "--size", "32M"])["device"].clone();
    let device = device.as_str().unwrap().to_string();
    lab.run(&["vm", "cp", &verifier(&lab), "writer:/root/verifier"]).good();
    shell(&format!("mkdir /run/v; nohup /root/verifier {device} /run/v >/run/v/said 2>&1 &")).good();
    let rounds = || shell("cat /run/v/rounds").stdout.trim().parse::<u64>().unwrap_or(0);
    for kill_number in 0..3 {
        let before = rounds();
        until("it goes on", || rounds() > before + 100);
        // Snapshots move what is being overwritten into the store meanwhile.
        lab.run(&["vm", "disk", "snapshot", "writer", "--disk", "data", &format!("at-{kill_number}")]).good();
        let host = lab.pid("host");
        kill(host, "KILL");
        until("another host process serves", || lab.pid("host") != host);
        until("the VM is adopted", || lab.json(&["vm", "show", "writer"])["state"] == "running");
    }
    let before = rounds();
    until("it goes on", || rounds() > before + 100);
    shell("touch /run/v/stop").good();
    until("all is verified", || shell("test -e /run/v/result").code == 0);
    assert_eq!(shell("cat /run/v/result /run/v/said").good().stdout, "good\n");
    let checked = lab.json(&["store", "fsck"]);
    assert!(checked["problems"].as_array().unwrap().is_empty(), "{checked}");
}

#[test]
fn a_killed_vm_is_told_with_its_reason() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "victim", "tiny");
    kill(lab.pid_of_vm("victim"), "KILL");
    until("its end is seen", || lab.json(&["vm", "show", "victim"])["state"] == "failed");
    let view = lab.json(&["vm", "show", "victim"]);
    assert!(view["reason"].as_str().unwrap().contains("signal 9"), "{view}");
    // Both processes killed: the whole server comes back for the next command, and knows it.
    for kind in ["serve", "control", "host"] {
        kill(lab.pid(kind), "KILL");
    }
    assert_eq!(lab.json(&["vm", "show", "victim"])["state"], "failed");
}

#[test]
fn an_interrupt_while_the_server_is_away_ends_the_command_at_once() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    let mut exec = lab
        .command(&["exec", "one", "--", "/bin/busybox", "sh", "-c", "echo begun; sleep 600"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut begun = [0; 6];
    exec.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    lab.file("in/file", "text");
    let pipeline = lab.file(
        "slow.toml",
        "format = 1\nname = \"slow\"\nimage = \"tiny\"\n[[step]]\nname = \"a\"\ncommand = [\"sleep\", \"600\"]\noutcome = \"o\"\n",
    );
    let run = lab.command(&["run", pipeline.to_str().unwrap(), "--input", "in"]).spawn().unwrap();
    until("the run is led", || lab.json(&["pipeline", "ls"])[0]["state"] == "running");
    // Its keeper cannot start it again, and a command's own server is refused by the keeper's lock.
    kill(lab.pid("serve"), "STOP");
    kill(lab.pid("control"), "KILL");
    for (child, told) in [(exec, "what the command did is not known"), (run, "pipeline cancel")] {
        let id = child.id();
        let waiting = std::thread::spawn(move || finish(child));
        // Until it has met the loss, an interrupt is for the guest; one after that must do.
        until("the command ends", || {
            // It may just have ended.
            send(id, "INT").is_err() || waiting.is_finished()
        });
        let done = waiting.join().unwrap();
        assert!(done.code == 130 && done.stderr.contains(told), "{done:?}");
    }
}
