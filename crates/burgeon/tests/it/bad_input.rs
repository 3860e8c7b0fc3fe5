//! Bad input gets a clear error that names the file and line or the VM, and leaves nothing half-made.

use std::fs;

use crate::lab::{Lab, kill, until};

#[test]
fn every_refusal_says_what_and_where() {
    let lab = Lab::new(&["tiny"]);
    let pipeline = "format = 1\nname = \"p\"\nimage = \"tiny\"\n[[step]]\nname = \"a\"\ncommand = [\"x\"]\n";
    fs::create_dir(lab.path("in")).unwrap();
    let cases: &[(&str, String, &[&str])] = &[
        ("unknown.toml", format!("{pipeline}outcome = \"o\"\nwindw = 3\n"), &["unknown.toml:8", "windw", "window"]),
        ("syntax.toml", "format = \n".into(), &["syntax.toml:1"]),
        (
            "cycle.toml",
            format!("{pipeline}to = \"b\"\n[[step]]\nname = \"b\"\ncommand = [\"x\"]\nto = \"a\"\n"),
            &["cycle.toml:"],
        ),
        ("nowhere.toml", format!("{pipeline}to = \"b\"\n"), &["nowhere.toml:7", "\"b\""]),
        ("size.toml", format!("{pipeline}outcome = \"o\"\npayload_limit = \"1X\"\n"), &["size.toml:8", "1X"]),
        ("image.toml", format!("{pipeline}outcome = \"o\"\nimage = \"ghost\"\n"), &["ghost"]),
        ("file.toml", format!("{pipeline}outcome = \"o\"\nfile = [{{ from = \"nope\", to = \"/x\" }}]\n"), &["nope"]),
    ];
    for (name, text, words) in cases {
        let file = lab.file(name, text);
        let relative = file.file_name().unwrap().to_str().unwrap();
        let done = lab.run(&["run", relative, "--input", "in", "--out", "out"]);
        assert_eq!(done.code, 1, "{name}: {done:?}");
        for word in *words {
            assert!(done.stderr.contains(word), "{name} lacks {word}: {}", done.stderr);
        }
        assert!(!lab.path("out").exists(), "{name}");
    }
    let good = lab.file("good.toml", &format!("{pipeline}outcome = \"o\"\n"));
    let good = good.to_str().unwrap();
    for (words, told) in [
        (&["run", good, "--input", "missing"][..], "missing"),
        (&["run", good, "--input", "in", "--out", "in/out"], "inside the input"),
        (&["run", "missing.toml", "--input", "in"], "missing.toml"),
        (&["run", good, "--input", "in", "--out", "good.toml/out"], "good.toml/out"),
        (&["vm", "create", "ghost"], "ghost"),
        (&["vm", "create", "tiny", "--name", "Bad Name"], "Bad Name"),
        (&["vm", "create", "tiny", "--profile", "gigantic"], "gigantic"),
        (&["vm", "show", "ghost"], "ghost"),
        (&["image", "show", "ghost"], "ghost"),
        (&["image", "show", "../../etc"], "etc"),
        (&["image", "build", "missing.toml"], "missing.toml"),
        (&["vm", "cp", "a", "b"], "VM:PATH"),
        (&["pipeline", "show", "ghost"], "ghost"),
    ] {
        let done = lab.run(words);
        assert_eq!(done.code, 1, "{words:?}: {done:?}");
        assert!(done.stderr.contains(told) && done.stderr.starts_with("error:"), "{words:?}: {done:?}");
    }
    for (text, word) in [
        ("memory = \"1M\"", "memory"),
        ("cpus = 0", "cpus"),
        ("cpus = 9999", "cpus"),
        ("memory = \"900T\"", "memory"),
        ("disk = \"5G\"", "disk"),
        ("colour = 1", "colour"),
    ] {
        lab.file("p.toml", &format!("{text}\n"));
        let done = lab.run(&["vm", "create", "tiny", "--profile", "./p.toml"]);
        assert!(done.code == 1 && done.stderr.contains(word), "{text}: {done:?}");
    }
    assert_eq!(lab.run(&["no-such-verb"]).code, 2);
    // Somebody else's directory is not taken, nor are its permissions.
    let output = lab.command_in(lab.path("in").parent().unwrap(), &["ps"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no data directory"), "{output:?}");
    // Nothing came of any of it.
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "");
    assert_eq!(lab.json(&["pipeline", "ls"]).as_array().unwrap().len(), 0);
    assert_eq!(fs::read_dir(lab.data().join("vms")).unwrap().count(), 0);
}

#[test]
fn a_guest_that_cannot_boot_is_told_with_its_last_words() {
    let lab = Lab::new(&["tiny"]);
    let image = lab.data().join("images/tiny");
    // Links into the shared cache must not be written through.
    let initramfs = fs::read(image.join("initramfs.cpio")).unwrap();
    let without_modules = replace(&initramfs, b"burgeon/modules", b"burgeon/nothing");
    fs::remove_file(image.join("initramfs.cpio")).unwrap();
    fs::write(image.join("initramfs.cpio"), without_modules).unwrap();
    let about = fs::read_to_string(image.join("image.json")).unwrap();
    fs::remove_file(image.join("image.json")).unwrap();
    let digest = serde_json::from_str::<serde_json::Value>(&about).unwrap()["digest"].as_str().unwrap().to_string();
    fs::write(image.join("image.json"), about.replace(&digest, &"0".repeat(digest.len()))).unwrap();
    let create = lab.command(&["vm", "create", "tiny", "--name", "mute", "--profile", "tiny"]).spawn().unwrap();
    // The guest never speaks. Its user need not wait for the deadline.
    until("it boots", || {
        let vms = lab.json(&["vm", "ls"]);
        vms[0]["state"] == "starting" && vms[0]["phase"] == "boot"
    });
    assert!(lab.run(&["exec", "mute", "--", "true"]).stderr.contains("starting"));
    lab.run(&["vm", "stop", "--force", "mute"]).good();
    let done = crate::lab::finish(create);
    assert!(done.code == 1 && done.stderr.contains("mute"), "{done:?}");
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "", "nothing half-made");

    // A kernel that is none: seen before anything is started.
    fs::remove_file(image.join("vmlinuz")).unwrap();
    fs::write(image.join("vmlinuz"), "this is no kernel").unwrap();
    let done = lab.run(&["vm", "create", "tiny", "--name", "headless", "--profile", "tiny"]);
    assert!(done.code == 1 && done.stderr.contains("image tiny is broken: vmlinuz"), "{done:?}");
    // A part of it missing: the image is named as broken, and others are not hidden.
    fs::remove_file(image.join("vmlinuz")).unwrap();
    let done = lab.run(&["vm", "create", "tiny", "--profile", "tiny"]);
    assert!(done.code == 1 && done.stderr.contains("tiny"), "{done:?}");
    assert!(lab.run(&["image", "ls"]).good().stdout.contains("broken"));
    assert!(lab.qemus().is_empty());
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let mut at = 0;
    while let Some(found) = out[at..].windows(from.len()).position(|window| window == from) {
        out[at + found..at + found + to.len()].copy_from_slice(to);
        at += found + to.len();
    }
    assert_ne!(out, bytes);
    out
}

#[test]
fn a_second_server_and_a_newer_meta_are_refused_by_name() {
    let lab = Lab::new(&[]);
    assert_eq!(lab.run(&["ps", "-q"]).good().stdout, "");
    let second = lab.run(&["serve"]);
    assert!(second.code == 1 && second.stderr.contains(&lab.pid("serve").to_string()), "{second:?}");
    for kind in ["serve", "control", "host"] {
        kill(lab.pid(kind), "KILL");
    }
    fs::write(lab.data().join("meta.db"), vec![7; 8192]).unwrap();
    drop(fs::remove_file(lab.data().join("meta.db-wal")));
    let damaged = lab.run(&["ps"]);
    assert!(damaged.code == 1 && damaged.stderr.contains("meta.db"), "{damaged:?}");
}
