use std::{collections::BTreeMap, time::Duration};

use burgeon_api::{
    ErrorKind,
    exec::{ExecSpec, Exit, TerminalSize},
};
use burgeon_guest::{
    client::{ExecEvent, ExecHandle},
    protocol::Exec,
};
use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::harness::{output, sh, soon, spec, started};

const CODE_0: Exit = Exit::Code { code: 0 };

#[tokio::test]
async fn exit_codes_signals_and_both_streams() {
    let (_guest, client) = started().await;
    assert_eq!(output(&client, spec(&["true"])).await, (String::new(), String::new(), CODE_0));
    let (out, errors, exit) = output(&client, sh("echo out; echo err >&2; exit 37")).await;
    assert_eq!((out.as_str(), errors.as_str(), exit), ("out\n", "err\n", Exit::Code { code: 37 }));
    assert_eq!(output(&client, sh("kill -11 $$")).await.2, Exit::Signal { signal: 11 });
    assert_eq!(output(&client, sh("kill -9 $$")).await.2, Exit::Signal { signal: 9 });
}

#[tokio::test]
async fn environment_and_directory() {
    let (guest, client) = started().await;
    let mut wanted = sh("echo $A; pwd; echo $PATH");
    wanted.env = BTreeMap::from([("A".to_string(), "x y".to_string())]);
    let directory = guest.directory.path().canonicalize().unwrap().to_str().unwrap().to_string();
    wanted.cwd = Some(directory.clone());
    let (out, ..) = output(&client, wanted).await;
    assert_eq!(out, format!("x y\n{directory}\n/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"));
    // Nothing of the agent's own environment goes to a command, and no signal is blocked or ignored.
    let (out, ..) = output(&client, spec(&["env"])).await;
    let mut names: Vec<&str> = out.lines().filter_map(|line| line.split('=').next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["HOME", "LOGNAME", "PATH", "SHELL", "USER"]);
    let (out, ..) = output(&client, sh("grep -E 'Sig(Blk|Ign)' /proc/self/status")).await;
    // Signals from 32 on belong to the C library, which does not let them be changed.
    let classic = |line: &str| u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap() & 0x7fff_ffff;
    assert!(out.lines().count() == 2 && out.lines().all(|line| classic(line) == 0), "{out}");
    let (out, ..) = output(&client, sh("ls /proc/self/fd | wc -l")).await;
    assert_eq!(out.trim(), "4", "0, 1, 2 and the directory itself");
}

#[tokio::test]
async fn refusals_have_their_kind() {
    let (guest, client) = started().await;
    let kind = async |spec: ExecSpec| {
        let error = soon(client.exec(spec)).await.map(|_| ()).unwrap_err();
        (error.kind, error.message)
    };
    let (missing, message) = kind(spec(&["no-such-program"])).await;
    assert_eq!(missing, ErrorKind::NotFound, "{message}");
    assert!(message.contains("no-such-program"), "{message}");
    std::fs::write(guest.path("plain"), "text").unwrap();
    let plain = guest.path("plain").to_str().unwrap().to_string();
    assert_eq!(kind(spec(&[&plain])).await.0, ErrorKind::Refused);
    let (lost, message) = kind(ExecSpec { cwd: Some("/no/such/place".into()), ..spec(&["true"]) }).await;
    assert!(lost == ErrorKind::NotFound && message.contains("/no/such/place"), "{message}");
    let (unknown, message) = kind(ExecSpec { user: Some("nobody-here".into()), ..spec(&["true"]) }).await;
    assert!(unknown == ErrorKind::Invalid && message.contains("nobody-here"), "{message}");
    let long = "x".repeat(70_000);
    assert_eq!(kind(spec(&["echo", &long])).await.0, ErrorKind::Invalid);
    assert_eq!(output(&client, spec(&["true"])).await.2, CODE_0, "the channel goes on");
}

/// As execvp(3) has it.
#[tokio::test]
async fn programs_are_searched_for() {
    use std::os::unix::fs::PermissionsExt;
    let (guest, client) = started().await;
    for (directory, name, text, mode) in [
        ("first", "both", "echo not this one", 0o644),
        ("second", "both", "#!/bin/sh\necho found $1", 0o755),
        ("second", "bare", "echo a script without its first line: $0 $1", 0o755),
        ("first", "plain", "text", 0o644),
    ] {
        std::fs::create_dir_all(guest.path(directory)).unwrap();
        let path = guest.path(directory).join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let (first, second) = (guest.path("first"), guest.path("second"));
    let path = format!("{}:{}:/nowhere:/bin", first.display(), second.display());
    let searched = |words: &[&str]| ExecSpec { env: [("PATH".into(), path.clone())].into(), ..spec(words) };
    assert_eq!(output(&client, searched(&["both", "it"])).await.0, "found it\n");
    let bare = format!("a script without its first line: {}/bare it\n", second.display());
    assert_eq!(output(&client, searched(&["bare", "it"])).await.0, bare);
    let denied = soon(client.exec(searched(&["plain"]))).await.map(|_| ()).unwrap_err();
    assert_eq!(denied.kind, ErrorKind::Refused, "{denied}");
}

#[tokio::test]
async fn another_user() {
    let (_guest, client) = started().await;
    if output(&client, spec(&["id", "-u"])).await.0 != "0\n" {
        eprintln!("skipped: only root can become another user");
        return;
    }
    for user in ["daemon", "1"] {
        let wanted = ExecSpec { user: Some(user.into()), ..sh("id -u; id -g; id -G; echo $HOME $USER") };
        assert_eq!(output(&client, wanted).await.0, "1\n1\n1\n/usr/sbin daemon\n");
    }
    let wanted = ExecSpec { user: Some("54321".into()), ..spec(&["id", "-u"]) };
    assert_eq!(output(&client, wanted).await.0, "54321\n");
}

#[tokio::test]
async fn a_time_limit_kills_the_group() {
    let (_guest, client) = started().await;
    let limited = ExecSpec { time_limit_ms: Some(100), ..sh("sleep 1000 & sleep 1000") };
    let (.., exit) = output(&client, limited).await;
    assert_eq!(exit, Exit::TimeLimit);
    let easy = ExecSpec { time_limit_ms: Some(20_000), ..spec(&["true"]) };
    assert_eq!(output(&client, easy).await.2, CODE_0);
}

#[tokio::test]
async fn a_background_process_does_not_hold_the_end() {
    let (_guest, client) = started().await;
    let (out, _, exit) = output(&client, sh("echo before; sleep 1000 & exit 4")).await;
    assert_eq!((out.as_str(), exit), ("before\n", Exit::Code { code: 4 }));
}

async fn read_until(exec: &mut ExecHandle, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        match soon(exec.output.next()).await {
            Some(ExecEvent::Stdout(data)) => text.push_str(&String::from_utf8_lossy(&data)),
            other => panic!("{other:?} after {text:?}, before {wanted:?}"),
        }
    }
    text
}

#[tokio::test]
async fn a_terminal_with_its_size_and_signals() {
    let (_guest, client) = started().await;
    // A signal ends the shell's `read` as the end of input does; only the trap tells them apart.
    let script = "trap 'resized=1; stty size' WINCH; stty size; echo $TERM; \
                  while :; do resized=; if read line; then echo got $line; elif [ -z \"$resized\" ]; then exit 0; fi; done";
    let mut wanted = sh(script);
    wanted.terminal = Some(TerminalSize { rows: 31, columns: 99 });
    let mut exec = soon(client.exec(wanted)).await.unwrap();
    read_until(&mut exec, "31 99\r\nxterm-256color\r\n").await;
    soon(exec.resize(TerminalSize { rows: 12, columns: 34 })).await.unwrap();
    read_until(&mut exec, "12 34\r\n").await;
    soon(exec.stdin.send(Bytes::from_static(b"word\n"))).await.unwrap();
    read_until(&mut exec, "got word\r\n").await;
    let (stdin, mut output, _control) = exec.split();
    stdin.finish();
    assert_eq!(soon(output.collect(1000)).await.2, CODE_0, "the end of input ends `read`");
}

#[tokio::test]
async fn signals_reach_the_group() {
    let (_guest, client) = started().await;
    let mut exec =
        soon(client.exec(sh("trap 'echo caught; exit 9' USR1; echo up; while :; do sleep 0.01; done"))).await.unwrap();
    read_until(&mut exec, "up\n").await;
    soon(exec.signal(10)).await.unwrap();
    let (out, _, exit) = soon(exec.output.collect(1000)).await;
    assert_eq!((&out[..], exit), (&b"caught\n"[..], Exit::Code { code: 9 }));
    assert_eq!(soon(exec.signal(10)).await.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn megabytes_both_ways() {
    const PIECES: usize = 512;
    let (_guest, client) = started().await;
    let (mut stdin, mut output, _control) = soon(client.exec(spec(&["cat"]))).await.unwrap().split();
    let piece = |number: usize| -> Bytes {
        (0..65_536usize).map(|at| u8::try_from((at * 31 + number * 7 + (at >> 8)) & 0xff).unwrap()).collect()
    };
    let sender = tokio::spawn(async move {
        for number in 0..PIECES {
            stdin.send(piece(number)).await.unwrap();
        }
    });
    let mut seen = Sha256::new();
    let mut expected = Sha256::new();
    (0..PIECES).for_each(|number| expected.update(piece(number)));
    let exit = loop {
        match soon(output.next()).await {
            Some(ExecEvent::Stdout(data)) => seen.update(&data),
            Some(ExecEvent::Exited { exit, .. }) => break exit,
            other => panic!("{other:?}"),
        }
    };
    sender.await.unwrap();
    assert_eq!((seen.finalize(), exit), (expected.finalize(), CODE_0));
}

#[tokio::test]
async fn input_larger_than_any_buffer_to_a_command_that_does_not_read() {
    let (_guest, client) = started().await;
    let (mut stdin, mut output, _control) = soon(client.exec(sh("sleep 0.1; exit 5"))).await.unwrap().split();
    let sent = async { while stdin.send(Bytes::from(vec![1; 65_536])).await.is_ok() {} };
    let (_, (.., exit)) = soon(async { tokio::join!(sent, output.collect(10)) }).await;
    assert_eq!(exit, Exit::Code { code: 5 });
}

#[tokio::test]
async fn a_flooder_starves_nobody() {
    let (_guest, client) = started().await;
    // Nobody reads the first flood, so it stops; the second is read as fast as it comes.
    let _stuck = soon(client.exec(spec(&["yes"]))).await.unwrap();
    let mut flood = soon(client.exec(spec(&["yes", "loud"]))).await.unwrap();
    // The flood goes on until both have had their share, however slow the machine is.
    let flooded = std::cell::Cell::new(0);
    let reader = async {
        while let Some(event) = flood.output.next().await {
            if let ExecEvent::Stdout(data) = event {
                flooded.set(flooded.get() + data.len());
            }
        }
    };
    tokio::select! {
        () = reader => panic!("the flood ended"),
        () = soon(async {
            let mut echoed = 0;
            while echoed < 20 || flooded.get() < 1 << 20 {
                assert_eq!(output(&client, spec(&["echo", "quick"])).await.0, "quick\n");
                echoed += 1;
            }
        }) => {}
    }
}

#[tokio::test]
async fn a_hundred_at_once() {
    let (_guest, client) = started().await;
    let all = (0..100).map(|number| {
        let client = client.clone();
        tokio::spawn(async move { output(&client, sh(&format!("echo {number}; exit {number}"))).await })
    });
    for (number, task) in all.collect::<Vec<_>>().into_iter().enumerate() {
        let (out, _, exit) = soon(task).await.unwrap();
        assert_eq!((out, exit), (format!("{number}\n"), Exit::Code { code: i32::try_from(number).unwrap() }));
    }
}

#[tokio::test]
async fn words_that_are_not_text() {
    let (_guest, client) = started().await;
    let exec = Exec {
        argv: vec![b"printf".to_vec(), b"%s".to_vec(), b"a\xff\xfe".to_vec()],
        cwd: Some(b"/".to_vec()),
        ..Exec::default()
    };
    let mut exec = soon(client.exec_raw(exec)).await.unwrap();
    assert_eq!(soon(exec.output.collect(100)).await.0, b"a\xff\xfe");
}

#[tokio::test]
async fn a_dropped_command_is_killed() {
    let (_guest, client) = started().await;
    let exec = soon(client.exec(spec(&["sleep", "1000"]))).await.unwrap();
    let pid = exec.pid;
    drop(exec);
    let gone = format!("while kill -0 {pid} 2>/dev/null; do sleep 0.01; done");
    assert_eq!(output(&client, sh(&gone)).await.2, CODE_0);
}

#[tokio::test]
async fn the_cpu_time_is_told() {
    let (_guest, client) = started().await;
    let mut exec = soon(client.exec(sh("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"))).await.unwrap();
    let told = async {
        loop {
            if let Some(ExecEvent::Exited { cpu_us, .. }) = exec.output.next().await {
                return Duration::from_micros(cpu_us);
            }
        }
    };
    assert!(soon(told).await > Duration::from_millis(1));
}
