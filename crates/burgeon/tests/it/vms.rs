//! The life of a VM.

use std::{fs, os::unix::fs::PermissionsExt, process::Stdio};

use crate::lab::{Lab, finish, is_running, until};

#[test]
fn a_vm_from_creation_to_removal() {
    let lab = Lab::new(&["tiny"]);
    let vm = lab.vm("tiny", "one", "tiny");
    assert_eq!(vm["state"], "running");
    let pid = lab.pid_of_vm("one");

    // Codes, as env(1) and timeout(1) have them.
    for (words, code) in [
        (&["/bin/busybox", "true"][..], 0),
        (&["/bin/busybox", "sh", "-c", "exit 7"], 7),
        (&["/bin/busybox", "sh", "-c", "kill -9 $$"], 137),
        (&["no-such-program"], 127),
        (&["/"], 126),
    ] {
        let mut all = vec!["exec", "one", "--"];
        all.extend(words);
        assert_eq!(lab.run(&all).code, code, "{words:?}");
    }
    assert_eq!(lab.run(&["exec", "--time-limit", "200ms", "one", "--", "/bin/busybox", "sleep", "60"]).code, 124);
    assert_eq!(lab.run(&["exec", "nobody-here", "--", "true"]).code, 125);

    // Streams, environment, directory.
    let done = lab
        .run(&[
            "exec",
            "-e",
            "A=x y",
            "-w",
            "/tmp",
            "one",
            "--",
            "/bin/busybox",
            "sh",
            "-c",
            "echo $A; pwd; echo e >&2",
        ])
        .good();
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("x y\n/tmp\n", "e\n"));
    let input: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).take(3_000_000).collect();
    let sum = lab.run_with(&["exec", "one", "--", "/bin/busybox", "sh", "-c", "cat | wc -c"], &input).good();
    assert_eq!(sum.stdout.trim(), "3000000");

    // A terminal tells its size.
    let done = lab.run(&["exec", "--tty", "one", "--", "/bin/busybox", "stty", "size"]).good();
    assert_eq!(done.stdout.trim(), "24 80");

    // Files keep their bytes and modes.
    let file = lab.file("tool", "#!/bin/busybox sh\necho ran\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    lab.run(&["vm", "cp", "tool", "one:/tmp/tool"]).good();
    assert_eq!(lab.run(&["exec", "one", "--", "/tmp/tool"]).good().stdout, "ran\n");
    fs::create_dir_all(lab.path("tree/deep")).unwrap();
    lab.file("tree/deep/new\nline", "content");
    let raw = <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(vec![b'r', 0xff]);
    fs::write(lab.path("tree").join(&raw), "raw").unwrap();
    assert_eq!(lab.run(&["vm", "cp", "tree", "one:/tmp/tree"]).code, 1, "a directory needs --recursive");
    lab.run(&["vm", "cp", "-r", "tree", "one:/tmp/tree"]).good();
    lab.run(&["vm", "cp", "-r", "one:/tmp/tree", "back"]).good();
    assert_eq!(fs::read_to_string(lab.path("back/deep/new\nline")).unwrap(), "content");
    assert_eq!(fs::read_to_string(lab.path("back").join(&raw)).unwrap(), "raw");

    // What the machine does not enforce is said.
    let shown = lab.run(&["vm", "show", "one"]).good().stdout;
    assert!(shown.contains("sandbox") && shown.contains("enforced"), "{shown}");
    assert!(lab.run(&["vm", "show", "one", "--timing"]).good().stdout.contains("boot"));
    let names = lab.run(&["ps", "-q"]).good().stdout;
    assert_eq!(names, "one\n");

    // Frozen, it answers nothing new; thawed, it goes on.
    lab.run(&["vm", "freeze", "one"]).good();
    lab.run(&["vm", "thaw", "one"]).good();
    lab.run(&["exec", "one", "--", "/bin/busybox", "true"]).good();

    lab.run(&["vm", "stop", "one"]).good();
    assert!(!is_running(pid));
    let view = lab.json(&["vm", "show", "one"]);
    assert_eq!(view["state"], "stopped", "{view}");
    assert_eq!(lab.run(&["exec", "one", "--", "true"]).code, 125);
    lab.run(&["vm", "rm", "one"]).good();
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "");
    assert!(lab.qemus().is_empty());
    assert_eq!(fs::read_dir(lab.data().join("vms")).unwrap().count(), 0);
}

#[test]
fn a_stopped_vm_starts_again_with_its_disk_and_only_when_asked() {
    let lab = Lab::new(&["debian-minimal"]);
    let vm = lab.vm("debian-minimal", "one", "worker");
    let run = |script: &str| lab.run(&["exec", "one", "--", "/bin/sh", "-c", script]);
    run("echo kept >/root/note && sync").good();
    let told = lab.run(&["vm", "start", "one"]).good();
    assert!(told.stderr.contains("VM one runs already"), "{told:?}");
    assert_eq!(lab.json(&["vm", "show", "one"])["version"], vm["version"], "nothing was changed");

    // The disk does not depend on the image any more.
    lab.run(&["vm", "stop", "one"]).good();
    lab.run(&["image", "rm", "debian-minimal"]).good();
    lab.run(&["vm", "start", "one"]).good();
    assert_eq!(run("cat /root/note; uname -n").good().stdout, "kept\none\n");
    let view = lab.json(&["vm", "show", "one"]);
    assert_eq!((&view["id"], &view["starts"], &view["state"]), (&vm["id"], &1.into(), &"running".into()), "{view}");

    // The guest powers off by itself: it stays off through new processes, until it is asked for again.
    run("echo o >/proc/sysrq-trigger; sleep 60");
    until("its end is seen", || lab.json(&["vm", "ls"])[0]["state"] == "stopped");
    for kind in ["serve", "control", "host"] {
        crate::lab::kill(lab.pid(kind), "KILL");
    }
    assert_eq!(lab.json(&["vm", "show", "one"])["state"], "stopped");
    lab.run(&["vm", "start", "one"]).good();
    assert_eq!(run("cat /root/note").good().stdout, "kept\n");

    // What failed is not started.
    crate::lab::kill(lab.pid_of_vm("one"), "KILL");
    until("its end is seen", || lab.json(&["vm", "show", "one"])["state"] == "failed");
    let refused = lab.run(&["vm", "start", "one"]);
    assert!(refused.code == 1 && refused.stderr.contains("VM one has failed"), "{refused:?}");
    assert!(refused.stderr.contains("hint: remove it") && refused.stderr.contains("burgeon vm rm one"), "{refused:?}");
    lab.run(&["vm", "rm", "one"]).good();
    let gone = lab.run(&["vm", "start", "one"]);
    assert!(gone.code == 1 && gone.stderr.contains("there is no VM \"one\""), "{gone:?}");
}

#[test]
fn a_flood_in_one_stream_starves_nobody() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "noisy", "tiny");
    // Nobody reads this output: back-pressure holds the command in the guest.
    let flood = lab.command(&["exec", "noisy", "--", "/bin/busybox", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    let console = lab.run(&[
        "exec",
        "--time-limit",
        "1500ms",
        "noisy",
        "--",
        "/bin/busybox",
        "sh",
        "-c",
        "yes flood >/dev/console",
    ]);
    assert_eq!(console.code, 124);
    assert_eq!(lab.run(&["exec", "noisy", "--", "/bin/busybox", "echo", "quick"]).good().stdout, "quick\n");
    let logs = lab.run(&["logs", "noisy"]).good().stdout;
    assert!(logs.contains("flood") && logs.len() < 3 << 20, "{} bytes", logs.len());
    // When its client goes, the command goes.
    let pid = flood.id();
    crate::lab::kill(pid, "KILL");
    finish(flood);
    until("the flood's command ends with its client", || {
        let list = lab.run(&["exec", "noisy", "--", "/bin/busybox", "pidof", "yes"]);
        list.code == 1
    });
}

#[test]
fn a_desktop_shows_its_screen_by_vnc() {
    use std::io::Read;
    let lab = Lab::new(&["tiny"]);
    let profile = lab.file("screen.toml", "memory = \"160M\"\ndisplay = true\n");
    lab.vm("tiny", "plain", "tiny");
    let refused = lab.run(&["vm", "display", "plain"]);
    assert!(refused.code == 1 && refused.stderr.contains("graphics card"), "{refused:?}");
    lab.vm("tiny", "screen", profile.to_str().unwrap());
    let socket = lab.path("screen.vnc");
    let mut display = lab.command(&["vm", "display", "screen", "--socket", socket.to_str().unwrap()]).spawn().unwrap();
    until("the socket is there", || socket.exists());
    let mut viewer = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    viewer.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    let mut greeting = [0; 12];
    viewer.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..4], b"RFB ");
    crate::lab::kill(display.id(), "INT");
    assert!(display.wait().unwrap().success());
    assert!(!socket.exists());
}

#[test]
fn every_command_runs_once() {
    let lab = Lab::new(&["tiny"]);
    lab.vm("tiny", "one", "tiny");
    for _ in 0..6 {
        // Several at once, with their input at its end before they begin.
        let running: Vec<_> = (0..10)
            .map(|_| {
                lab.command(&["exec", "one", "--", "/bin/busybox", "sh", "-c", "echo x >>/tmp/n"]).spawn().unwrap()
            })
            .collect();
        for command in running {
            finish(command).good();
        }
    }
    let lines = lab.run(&["exec", "one", "--", "/bin/busybox", "wc", "-l", "/tmp/n"]).good().stdout;
    assert!(lines.starts_with("60 "), "{lines}");
}
