//! Images: built, imported, and those that are not ours.

use std::{fs, process::Command};

use crate::lab::{Lab, until};

#[test]
fn debian_runs_its_own_init_beside_the_agent() {
    let lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "deb", "default");
    let done = lab.run(&["exec", "deb", "--", "cat", "/etc/os-release"]).good();
    assert!(done.stdout.contains("bookworm"), "{done:?}");
    assert_eq!(lab.run(&["exec", "deb", "--", "hostname"]).good().stdout, "deb\n");
    let first = lab.run(&["exec", "deb", "--", "readlink", "/proc/1/exe"]).good();
    assert!(first.stdout.trim().ends_with("/systemd"), "{first:?}");
    // systemd comes up beside the agent, and leaves it alone.
    until("systemd is up", || {
        let state = lab.run(&["exec", "deb", "--", "systemctl", "is-system-running"]);
        matches!(state.stdout.trim(), "running" | "degraded")
    });
    let failed = lab.run(&["exec", "deb", "--", "systemctl", "--failed", "--no-legend"]).good();
    assert_eq!(failed.stdout.trim(), "", "no unit failed");
    let user = lab.run(&["exec", "--user", "nobody", "deb", "--", "id", "-un"]).good();
    assert_eq!(user.stdout, "nobody\n");
    lab.run(&["vm", "stop", "deb"]).good();
    let view = lab.json(&["vm", "show", "deb"]);
    assert!(view["reason"].as_str().unwrap().contains("powered off"), "{view}");
}

#[test]
fn ssh_logs_in_through_the_agent_and_passes_on_the_code() {
    let lab = Lab::new(&["debian-minimal"]);
    // No network, and no server that listens in the guest.
    lab.vm("debian-minimal", "deb", "worker");
    fs::create_dir(lab.path(".ssh")).unwrap();
    let ssh = |words: &[&str]| {
        let child = lab.command(&[&["vm", "ssh", "deb", "--"], words].concat()).env("HOME", lab.path("")).spawn();
        crate::lab::finish(child.unwrap())
    };
    let keyless = ssh(&["true"]);
    assert!(keyless.code == 1 && keyless.stderr.contains("ssh-keygen -t ed25519"), "{keyless:?}");
    let key = lab.path(".ssh/id_ed25519");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().unwrap();
    assert!(made.success());
    assert_eq!(ssh(&["echo", "hello"]).good().stdout, "hello\n");
    assert_eq!(ssh(&["exit", "7"]).code, 7);
    assert_eq!(ssh(&["id", "-un;", "uname", "-n"]).good().stdout, "root\ndeb\n");
}

/// A boot sector that prints a line on the first serial port and halts: somebody else's system.
fn foreign_disk() -> Vec<u8> {
    let mut sector = vec![
        0xfa, // cli
        0x31, 0xc0, 0x8e, 0xd8, // xor ax,ax; mov ds,ax
        0xbe, 0x1a, 0x7c, // mov si, message
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, // next: lodsb
        0x84, 0xc0, // test al,al
        0x74, 0x03, // jz end
        0xee, // out dx,al
        0xeb, 0xf8, // jmp next
        0xf4, // end: hlt
        0xeb, 0xfd, // jmp end
    ];
    sector.resize(0x1a, 0x90);
    sector.extend(b"a foreign system is up\r\n\0");
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

#[test]
fn foreign_images_boot_with_a_console_a_seed_and_no_agent() {
    let lab = Lab::new(&[]);
    let raw = lab.path("foreign.img");
    fs::write(&raw, foreign_disk()).unwrap();
    let qcow = lab.path("foreign.qcow2");
    let status = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(&raw).arg(&qcow).status().unwrap();
    assert!(status.success());
    let too_large = lab.run(&["image", "import", "--max-size", "512K", raw.to_str().unwrap(), "too-large"]);
    assert!(too_large.code == 1 && too_large.stderr.contains("512 KiB"), "{too_large:?}");
    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g me@desk";
    lab.file("key.pub", &format!("{KEY}\n"));
    lab.file("two.pub", &format!("{KEY}\n{KEY}\n"));
    for (file, name) in [(&raw, "from-raw"), (&qcow, "from-qcow")] {
        lab.run(&["image", "import", file.to_str().unwrap(), name]).good();
        let create = ["vm", "create", name, "--name", name];
        let login: &[&str] = if name == "from-raw" { &[] } else { &["--ssh-key", "key.pub", "--user", "me"] };
        let made = lab.run(&[&create[..], login].concat()).good();
        assert!(made.stderr.contains("burgeon vm console from-"), "{made:?}");
        assert_eq!(made.stderr.contains("the seed names no user"), login.is_empty(), "{made:?}");
        until("its words are on the console", || {
            lab.run(&["logs", name]).good().stdout.contains("a foreign system is up")
        });
        let refused = lab.run(&["exec", name, "--", "true"]);
        assert!(
            refused.code == 125 && refused.stderr.contains("no agent") && refused.stderr.contains("console"),
            "{refused:?}"
        );
    }
    let seed =
        fs::read_dir(lab.data().join("vms")).unwrap().flatten().map(|entry| entry.path().join("q/seed/meta-data"));
    for meta in seed {
        let text = fs::read_to_string(&meta).unwrap();
        assert!(text.contains("local-hostname: from-"), "{text}");
        let user = fs::read_to_string(meta.with_file_name("user-data")).unwrap();
        assert_eq!(user.contains(KEY) && user.contains("name: \"me\""), text.contains("from-qcow"), "{user}");
    }
    for (words, told) in [
        (&["--ssh-key", "two.pub", "--user", "me"][..], "two.pub: the key holds more than one line"),
        (&["--ssh-key", "key.pub", "--user", "me:x"], "\"me:x\" is no name of a user"),
        (&["--ssh-key", "missing.pub"], "missing.pub"),
    ] {
        let refused = lab.run(&[&["vm", "create", "from-raw"], words].concat());
        assert!(refused.code == 1 && refused.stderr.contains(told), "{refused:?}");
    }
    lab.run(&["image", "rm", "from-raw"]).good();
    assert_eq!(lab.run(&["image", "ls", "-q"]).good().stdout, "from-qcow\n");
    lab.run(&["vm", "rm", "from-raw", "from-qcow"]).good();

    // A qcow2 that names a file of this machine as its backing must not show it to a guest.
    let evil = lab.path("evil.qcow2");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd"])
        .arg(&evil)
        .args(["1M"])
        .status()
        .unwrap();
    assert!(status.success());
    let done = lab.run(&["image", "import", evil.to_str().unwrap(), "evil"]);
    assert!(done.code == 1 && done.stderr.contains("backing"), "{done:?}");
    assert_eq!(lab.run(&["image", "ls", "-q"]).good().stdout, "from-qcow\n");
}
