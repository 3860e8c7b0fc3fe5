//! Environment, files and secrets that VMs are given, on real guests.

use std::{fs, io::Read, path::Path};

use burgeon_api::provisions::Content;

use crate::lab::{Lab, kill, until};

/// Whether the bytes are in a file below the directory.
fn is_below(directory: &Path, bytes: &[u8]) -> bool {
    fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => is_below(&path, bytes),
            Ok(kind) if kind.is_file() => {
                fs::read(&path).is_ok_and(|content| content.windows(bytes.len()).any(|part| part == bytes))
            }
            _ => false,
        }
    })
}

#[track_caller]
fn is_on_no_disk(lab: &Lab, secret: &str) {
    assert!(!is_below(&lab.data(), secret.as_bytes()));
    let in_json = serde_json::to_string(&Content(secret.into())).unwrap();
    assert!(!is_below(&lab.data(), in_json.as_bytes()));
}

#[test]
fn a_vm_that_boots_has_its_environment_files_and_secrets() {
    let lab = Lab::new(&["tiny"]);
    lab.file("conf", "port = 1\n");
    lab.file("vars", "# of the file\nFIRST=one\nSECOND=of the file\n");
    for (words, named) in [
        (&["--env", "1A=b"][..], "env \"1A\""),
        (&["--env", "A"], "--env A"),
        (&["--file", "conf=conf"], "file \"conf\""),
        (&["--file", "/etc/conf=nothing"], "--file nothing"),
        (&["--secret", "../key=conf"], "secret \"../key\""),
        (&["--secret", "hunter2"], "--secret: it is not NAME=FILE"),
        (&["--env-file", "conf"], "env \"port \""),
    ] {
        let refused = lab.run(&[&["vm", "create", "tiny", "--name", "bad", "-p", "tiny"], words].concat());
        assert!(refused.code == 1 && refused.stderr.contains(named), "{words:?}: {}", refused.stderr);
    }
    assert_eq!(lab.json(&["vm", "ls"]), serde_json::json!([]));

    let secret = "hunter2-and-no-other";
    let create = [
        &["vm", "create", "tiny", "--name", "web", "-p", "tiny", "--env-file", "vars", "--env", "SECOND=it's second"][..],
        &["--file", "/opt/deep/app.conf=conf:0640", "--secret", "key=-"],
    ];
    lab.run_with(&create.concat(), secret.as_bytes()).good();
    assert_eq!(lab.said("web", "echo $FIRST; echo \"$SECOND\""), "one\nit's second");
    assert_eq!(lab.said("web", "unset SECOND; . /run/burgeon/environment; echo $SECOND"), "it's second");
    assert_eq!(lab.run(&["exec", "-e", "FIRST=1", "web", "sh", "-c", "echo $FIRST"]).good().stdout, "1\n");
    let shape = "ls -ln /opt/deep/app.conf /run/burgeon/secrets/key | cut -c1-10; cat /opt/deep/app.conf; cat /run/burgeon/secrets/key";
    assert_eq!(lab.said("web", shape), format!("-rw-r-----\n-r--------\nport = 1\n{secret}"));
    is_on_no_disk(&lab, secret);

    // Started again, it has all of it but the secrets.
    lab.run(&["vm", "stop", "--force", "web"]).good();
    lab.run(&["vm", "start", "web"]).good();
    let left = "echo $FIRST; cat /opt/deep/app.conf; test -e /run/burgeon/secrets || echo none";
    assert_eq!(lab.said("web", left), "one\nport = 1\nnone");
}

#[test]
fn a_host_process_that_dies_loses_secrets_and_nothing_else() {
    let lab = Lab::new(&["tiny"]);
    lab.file("key", "hunter2-and-no-other");
    let create = |name: &str, words: &[&str]| {
        lab.run(
            &[&["vm", "create", "tiny", "--name", name, "-p", "tiny", "--no-wait", "--env", "A=1"], words].concat(),
        )
        .good();
        until("it boots", || !lab.json(&["vm", "show", name])["on_host"]["pid"].is_null());
    };
    create("plain", &[]);
    create("secret", &["--secret", "key=key"]);
    kill(lab.pid("host"), "KILL");
    until("it has failed by name", || {
        let view = lab.json(&["vm", "show", "secret"]);
        view["state"] == "failed"
            && view["reason"].as_str().unwrap().contains("secrets were lost with the host process")
    });
    until("the other one runs", || lab.run(&["exec", "plain", "true"]).code == 0);
    assert_eq!(lab.said("plain", "echo $A"), "1");
    until("one QEMU is left", || lab.qemus().len() == 1);
}

/// Notes, as soon as it finds itself in another generation, what is there. It has opened the page before it was captured.
const NOTES: &str = "mkdir -p /run/burgeon/secrets; echo of the substrate > /run/burgeon/secrets/old
    (exec 3</run/burgeon/generation; while :; do
        now=$(cat /proc/self/fd/3)
        if [ \"$now\" != \"$old\" ]; then
            old=$now; cat /run/burgeon/environment /run/burgeon/secrets/* /etc/app.conf > /tmp/note-$now 2>&1
        fi
        usleep 5000 2>/dev/null || sleep 0.01
    done) </dev/null >/dev/null 2>&1 &";

#[test]
fn each_clone_has_its_own_before_its_programs_go_on() {
    let lab = Lab::new(&["tiny"]);
    lab.file("key", "hunter2-and-no-other");
    lab.file("conf", "port = 1");
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny", "--warm", NOTES]).good();
    let give = ["--env", "N=n-{n}", "--secret", "key=key", "--file", "/etc/app.conf=conf"];
    lab.run(&[&["vm", "create", "-s", "base", "--name", "c", "-c", "2"], &give[..]].concat()).good();
    for (vm, number) in [("c-1", 1), ("c-2", 2)] {
        until("it has noted", || {
            lab.said(vm, "test -s /tmp/note-$(cat /run/burgeon/generation) && echo yes || true") == "yes"
        });
        let all = format!("N='n-{number}'\nhunter2-and-no-other");
        assert_eq!(
            lab.said(
                vm,
                "head -n 2 /tmp/note-$(cat /run/burgeon/generation) | cut -c1-20; echo; ls /run/burgeon/secrets"
            )
            .replace("\n\n", "\n"),
            format!("{all}\nkey")
        );
        assert_eq!(
            lab.said(vm, "echo $N; tail -c 8 /tmp/note-$(cat /run/burgeon/generation)"),
            format!("n-{number}\nport = 1")
        );
    }
    is_on_no_disk(&lab, "hunter2-and-no-other");

    // A fork has the environment of its source, and its secrets where that is asked for.
    lab.run(&["fork", "c-1", "--name", "f", "--env", "B=2"]).good();
    lab.run(&["fork", "c-1", "--name", "k", "--keep-secrets"]).good();
    assert_eq!(lab.said("f", "echo $N $B; test -e /run/burgeon/secrets || echo none"), "n-1 2\nnone");
    assert_eq!(lab.said("k", "echo $N $B; cat /run/burgeon/secrets/key"), "n-1\nhunter2-and-no-other");
    // One that goes on from its own state has what it had.
    lab.run(&["vm", "park", "k"]).good();
    lab.run(&["vm", "start", "k"]).good();
    assert_eq!(lab.said("k", "echo $N; cat /run/burgeon/secrets/key"), "n-1\nhunter2-and-no-other");
    // It has them also when it boots. Of a fork that is not made nothing is left.
    lab.run(&["vm", "stop", "--force", "f"]).good();
    lab.run(&["vm", "start", "f"]).good();
    assert_eq!(lab.said("f", "echo $N $B"), "n-1 2");
    lab.run(&["vm", "stop", "--force", "f"]).good();
    let refused = lab.run(&[&["fork", "f", "--name", "g"], &give[..]].concat());
    assert!(refused.code == 1 && refused.stderr.contains("VM f does not run"), "{}", refused.stderr);
    assert!(!lab.data().join("provisions").read_dir().unwrap().any(|_| true));
}

/// Whether the bytes are in memory that a process shares with the VMs that begin with it.
fn is_in_shared_memory(pid: u32, bytes: &[u8]) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().map(|entry| entry.path());
    let shared = files.filter(|file| fs::read_link(file).is_ok_and(|to| to.to_string_lossy().contains("/memfd:")));
    shared.into_iter().any(|file| {
        let (mut from, mut window) = (fs::File::open(file).unwrap(), Vec::new());
        loop {
            let kept = window.len().min(bytes.len());
            window.drain(..window.len() - kept);
            if from.by_ref().take(8 << 20).read_to_end(&mut window).unwrap() == 0 {
                return false;
            }
            if holds(&window, bytes) {
                return true;
            }
        }
    })
}

/// Mostly zeros, which are passed over quickly.
fn holds(window: &[u8], bytes: &[u8]) -> bool {
    let mut rest = window;
    while let Some(at) = rest.iter().position(|byte| *byte == bytes[0]) {
        if rest[at..].starts_with(bytes) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[test]
fn secrets_of_a_substrate_are_gone_before_it_is_captured() {
    // Made inside, so that no command that was sent in holds them.
    const NOTE: &str = "19e9a74041cf4d59de9a7b90698b3103952196243fc57d9e65d4040c51697fe3";
    const SECRET: &str = "91efa9494020524c57c20e946a12f1599d57dc1648c5aaede0d471bf393089bb";
    let lab = Lab::new(&["tiny"]);
    let warm = "mkdir -p /run/burgeon/secrets; echo of the substrate | sha256sum > /run/burgeon/secrets/key
        echo of nobody | sha256sum > /tmp/note";
    lab.run(&["substrate", "create", "base", "--image", "tiny", "-p", "tiny", "--warm", warm]).good();
    let host = lab.pid("host");
    assert!(is_in_shared_memory(host, NOTE.as_bytes()), "what is no secret is found");
    assert!(!is_in_shared_memory(host, SECRET.as_bytes()));
    lab.run(&["vm", "create", "-s", "base", "--name", "c"]).good();
    assert_eq!(
        lab.said("c", "cut -c1-64 /tmp/note; test -e /run/burgeon/secrets || echo none"),
        format!("{NOTE}\nnone")
    );
}
