//! Memory and CPUs of real guests that change while they run.

use std::path::PathBuf;

use burgeon_store::steps::Step;
use serde_json::Value;

use crate::lab::{Lab, kill, until};

/// Fills 100 MiB, most of which the guest has only after it has grown, and tells the sum.
const FILL: &str =
    "mount -t tmpfs -o size=160m none /mnt && head -c 104857600 /dev/urandom > /mnt/much && sha256sum < /mnt/much";
const SUM: &str = "sha256sum < /mnt/much";

fn profile(lab: &Lab) -> PathBuf {
    let text = "memory = \"128M\"\nmax_memory = \"512M\"\nmax_cpus = 3\ninit = \"none\"\n";
    lab.file("growing.toml", text)
}

impl Lab {
    #[track_caller]
    fn size(&self, vm: &str) -> Value {
        self.json(&["vm", "show", vm])["on_host"]["size"].clone()
    }

    /// MiB that the guest's kernel counts.
    #[track_caller]
    fn total_mib(&self, vm: &str) -> u64 {
        let kib = self.said(vm, "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
        kib.parse::<u64>().unwrap() >> 10
    }
}

fn size(memory: &str, cpus: u32) -> Value {
    serde_json::json!({"memory": memory, "cpus": cpus})
}

#[test]
fn a_vm_grows_and_its_forks_have_what_it_has() {
    let lab = Lab::new(&["tiny"]);
    let growing = profile(&lab);
    lab.vm("tiny", "fixed", "tiny");
    lab.vm("tiny", "a", growing.to_str().unwrap());
    assert_eq!(lab.size("a"), size("128M", 1));
    let before = lab.total_mib("a");

    // What its profile does not allow is refused by name, and nothing has changed.
    let refused = |words: &[&str], reason: &str| {
        let refused = lab.run(&[&["vm", "set"], words].concat());
        assert!(refused.code == 1 && refused.stderr.contains(reason), "{}", refused.stderr);
    };
    refused(&["fixed", "--memory", "256M"], "VM fixed was started with a fixed memory of 128M");
    refused(&["fixed", "--cpus", "2"], "VM fixed was started with a fixed number of CPUs: 1 CPU");
    refused(
        &["a", "--memory", "514M", "--cpus", "2"],
        "VM a can have 512M of memory at most: its profile's max_memory",
    );
    refused(&["a", "--memory", "64M"], "VM a cannot have less memory than the 128M that it began with");
    refused(&["a", "--memory", "256M", "--cpus", "4"], "VM a can have 1 to 3 CPUs: its profile's max_cpus");
    assert_eq!(lab.size("a"), size("128M", 1));

    let done = lab.run(&["vm", "set", "a", "--memory", "299M", "--cpus", "3"]).good();
    assert!(done.stderr.contains("rounded up to 300M"), "{}", done.stderr);
    assert_eq!((lab.size("a"), lab.said("a", "nproc").as_str()), (size("300M", 3), "3"));
    until("the guest uses it", || lab.total_mib("a") >= before + 160);
    let sum = lab.said("a", FILL);

    // A fork, and one of that; then what one writes no other sees.
    lab.run(&["fork", "a", "--name", "b"]).good();
    lab.run(&["fork", "b", "--name", "c"]).good();
    for vm in ["b", "c"] {
        assert_eq!((lab.said(vm, SUM), lab.said(vm, "nproc")), (sum.clone(), "3".into()));
        assert_eq!(lab.size(vm), size("300M", 3));
    }
    lab.said("b", "head -c 65536 /dev/zero | dd of=/mnt/much bs=65536 seek=1500 conv=notrunc 2>/dev/null");
    lab.said("a", "head -c 65536 /dev/zero | dd of=/mnt/much bs=65536 seek=10 conv=notrunc 2>/dev/null");
    let (of_a, of_b) = (lab.said("a", SUM), lab.said("b", SUM));
    assert!(of_a != of_b && of_a != sum && of_b != sum);
    assert_eq!(lab.said("c", SUM), sum);

    // Parked and started it is as it was, and so it is for the next host process.
    lab.run(&["vm", "park", "b"]).good();
    lab.run(&["vm", "start", "b"]).good();
    assert_eq!((lab.said("b", SUM), lab.size("b")), (of_b.clone(), size("300M", 3)));
    lab.run(&["vm", "snapshot", "b", "large"]).good();
    kill(lab.pid("host"), "KILL");
    until("a is found again", || lab.run(&["exec", "a", "true"]).code == 0);
    until("b is found again", || lab.run(&["exec", "b", "true"]).code == 0);
    assert_eq!((lab.size("a"), lab.size("b")), (size("300M", 3), size("300M", 3)));
    lab.run(&["fork", "b", "--name", "d"]).good();
    assert_eq!((lab.said("d", SUM), lab.size("d")), (of_b.clone(), size("300M", 3)));

    // What was written down is done, though the host process dies before it asks for it.
    lab.die_at(Step::SizeWritten);
    let done = lab.run(&["vm", "set", "c", "--memory", "320M", "--cpus", "2"]);
    assert!(!lab.has_yet_to_die() && done.code == 1, "{done:?}");
    until("c has that", || lab.size("c") == size("320M", 2));
    until("c answers", || lab.run(&["exec", "c", "true"]).code == 0);
    assert_eq!((lab.said("c", SUM), lab.said("c", "nproc")), (sum, "2".into()));

    // It gives back what it does not use. A snapshot has the size that the VM had.
    lab.said("b", "rm /mnt/much");
    let done = lab.run(&["vm", "set", "b", "--memory", "128M", "--cpus", "1"]).good();
    let shrunk = lab.json(&["vm", "show", "b"])["on_host"]["size"].clone();
    assert!(shrunk == size("128M", 1) || done.stderr.contains("the guest keeps"), "{shrunk} {}", done.stderr);
    assert!(lab.total_mib("b") < before + 100 && lab.said("b", "nproc") == "1");
    lab.run(&["vm", "rollback", "b", "large"]).good();
    until("it has returned", || lab.run(&["exec", "b", "true"]).code == 0);
    assert_eq!((lab.said("b", SUM), lab.size("b")), (of_b, size("300M", 3)));

    // It boots with what it had when it was stopped, and with what it was given since.
    lab.run(&["vm", "stop", "a"]).good();
    let done = lab.run(&["vm", "set", "a", "--cpus", "2"]).good();
    assert!(done.stderr.contains("its next start gives it that"), "{}", done.stderr);
    assert_eq!(lab.size("a"), size("300M", 2));
    lab.run(&["vm", "start", "a"]).good();
    until("it has its memory", || lab.size("a") == size("300M", 2) && lab.total_mib("a") >= before + 160);
    assert_eq!(lab.said("a", "nproc"), "2");
}

#[test]
fn vms_of_one_substrate_differ_in_size() {
    let lab = Lab::new(&["tiny"]);
    let growing = profile(&lab);
    lab.run(&[
        "substrate",
        "create",
        "base",
        "--image",
        "tiny",
        "-p",
        growing.to_str().unwrap(),
        "--warm",
        "echo warm > /tmp/note",
    ])
    .good();
    let create = |name: &str, more: &[&str]| lab.run(&[&["vm", "create", "-s", "base", "--name", name], more].concat());
    let refused = create("no", &["--memory", "1G"]);
    assert!(refused.code == 1 && refused.stderr.contains("can have 512M of memory at most"), "{}", refused.stderr);
    let refused = lab.run(&["vm", "set", "base", "--memory", "256M"]);
    assert!(refused.code == 1 && refused.stderr.contains("base is a substrate"), "{}", refused.stderr);
    // By a QEMU of its own, and by one that waits.
    lab.run(&["substrate", "dock", "base", "0"]).good();
    create("small", &[]).good();
    create("large", &["--memory", "384M", "--cpus", "2"]).good();
    lab.run(&["substrate", "dock", "base", "1"]).good();
    until("one waits", || lab.standbys().len() == 1);
    create("other", &["--memory", "256M"]).good();
    assert_eq!(lab.json(&["vm", "show", "other"])["on_host"]["start_times"][1]["phase"], "claim");
    assert_eq!((lab.size("small"), lab.size("large")), (size("128M", 1), size("384M", 2)));
    assert_eq!((lab.size("other"), lab.said("large", "nproc").as_str()), (size("256M", 1), "2"));
    until("they use it", || lab.total_mib("large") > lab.total_mib("other") && lab.total_mib("other") > 190);
    let sum = lab.said("large", FILL);
    lab.run(&["fork", "large", "--name", "copy", "-c", "2"]).good();
    for vm in ["copy-1", "copy-2"] {
        assert_eq!((lab.said(vm, "cat /tmp/note"), lab.said(vm, SUM)), ("warm".into(), sum.clone()));
    }

    // QEMUs that wait for forks of one that has grown get what it has then.
    lab.run(&["vm", "set", "small", "--memory", "160M"]).good();
    lab.said("small", "mount -t tmpfs none /mnt && head -c 3000000 /dev/urandom > /mnt/much");
    lab.run(&["fork", "small", "--name", "first"]).good();
    lab.said("small", "head -c 3000000 /dev/urandom > /mnt/much");
    let sum = lab.said("small", SUM);
    until("a fork takes one that waits", || {
        lab.run(&["fork", "small", "--name", "second"]).good();
        let claimed = lab.json(&["vm", "show", "second"])["on_host"]["start_times"][1]["phase"] == "claim";
        claimed || lab.run(&["vm", "rm", "second"]).code != 0
    });
    assert_eq!((lab.said("second", SUM), lab.size("second")), (sum.clone(), size("160M", 1)));
    assert!(lab.said("first", SUM) != sum);
    lab.run(&["vm", "rm", "copy-1", "copy-2", "small", "large", "other", "first", "second"]).good();
    lab.run(&["substrate", "rm", "base"]).good();
    until("no QEMU is left", || lab.qemus().is_empty() && lab.standbys().is_empty());
}
