//! What images tell of themselves, and how they leave: history, differences, and the server for other programs.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::Command,
};

use serde_json::Value;

use crate::lab::{Lab, finish, send, until};

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// A foreign disk of 8 MiB: noise, zeros, noise.
pub(crate) fn disk() -> Vec<u8> {
    let mut bytes = noise(2 << 20, 1);
    bytes.resize(6 << 20, 0);
    bytes.extend(noise(2 << 20, 2));
    bytes[510..512].copy_from_slice(b"\x55\xaa");
    bytes
}

#[track_caller]
pub(crate) fn import(lab: &Lab, name: &str, bytes: &[u8]) -> Value {
    let file = lab.path(&format!("{name}.img"));
    fs::write(&file, bytes).unwrap();
    lab.json(&["image", "import", file.to_str().unwrap(), name])
}

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn images_tell_what_made_them_and_what_differs() {
    let lab = Lab::new(&[]);
    let mut bytes = disk();
    let a = import(&lab, "a", &bytes);
    let steps = lab.json(&["image", "history", "a"]);
    let step = &steps[0];
    assert_eq!(steps.as_array().unwrap().len(), 1);
    assert_eq!((&step["digest"], &step["map"]), (&a["digest"], &a["map"]));
    // A chunk at the border holds some zeros.
    let held = step["bytes"].as_u64().unwrap();
    assert!((4 << 20..(4 << 20) + (64 << 10)).contains(&held), "{step}");
    assert!(step["new_bytes"].as_u64().unwrap() >= 4 << 20, "{step}");
    let sum = run("sha256sum", &[lab.path("a.img").to_str().unwrap()]);
    assert!(sum.starts_with(step["origin"]["imported"]["sha256"].as_str().unwrap()), "{step}");
    let told = lab.run(&["image", "history", "a"]).good().stdout;
    assert!(told.contains("imported from") && told.contains("a.img, raw"), "{told}");

    // A block in the middle, and more at the end.
    bytes[1 << 20] ^= 1;
    bytes.extend(noise(1 << 20, 3));
    import(&lab, "b", &bytes);
    let found = lab.json(&["image", "diff", "a", "b", "--extents"]);
    let extents = serde_json::json!([{"offset": 1 << 20, "length": 4096}, {"offset": 8 << 20, "length": 1 << 20}]);
    assert_eq!(found["extents"], extents, "{found}");
    assert_eq!(found["different_bytes"], 4096 + (1 << 20));
    let shared = found["shared_permille"].as_u64().unwrap();
    assert!((700..1000).contains(&shared), "{found}");
    assert!(found["b"]["only_here"]["bytes"].as_u64().unwrap() >= 1 << 20, "{found}");
    let facts: Vec<&str> =
        found["facts"].as_array().unwrap().iter().map(|fact| fact["what"].as_str().unwrap()).collect();
    assert_eq!(facts, ["disk"]);
    let table = lab.run(&["image", "diff", "a", "b"]).good().stdout;
    assert!(table.contains("different bytes") && table.contains("% of b") && !table.contains("OFFSET"), "{table}");
    let same = lab.json(&["image", "diff", "b", "b", "--extents"]);
    assert_eq!((&same["different_bytes"], &same["shared_permille"]), (&0.into(), &1000.into()));
    assert!(same["facts"].as_array().unwrap().is_empty() && same["extents"].as_array().unwrap().is_empty());
    let missing = lab.run(&["image", "diff", "a", "c"]);
    assert!(
        missing.code == 1 && missing.stderr.contains("no image c") && missing.stderr.contains("hint"),
        "{missing:?}"
    );
}

fn roots(lab: &Lab, kind: &str) -> u64 {
    lab.json(&["store", "stat"])["roots"][kind].as_u64().unwrap_or(0)
}

#[test]
fn an_image_is_served_to_other_programs_and_kept_meanwhile() {
    let lab = Lab::new(&[]);
    import(&lab, "a", &disk());
    lab.run(&["image", "export", "a", lab.path("exported.raw").to_str().unwrap()]).good();
    let socket = lab.path("a b.sock");
    let words = ["-o", "json", "image", "serve", "a", "--socket", socket.to_str().unwrap()];
    // One that was left behind is replaced.
    drop(UnixListener::bind(&socket).unwrap());
    let mut child = lab.command(&words).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut about = String::new();
    while !about.ends_with("}\n") {
        assert_ne!(reader.read_line(&mut about).unwrap(), 0, "{about}");
    }
    let about: Value = serde_json::from_str(&about).unwrap();
    assert_eq!((&about["size"], &about["read_only"]), (&(8 << 20).into(), &true.into()), "{about}");
    let uri = about["uri"].as_str().unwrap();
    let seen: Value = serde_json::from_str(&run("nbdinfo", &["--json", uri])).unwrap();
    assert_eq!(
        (&seen["exports"][0]["export-size"], &seen["exports"][0]["is_read_only"]),
        (&(8 << 20).into(), &true.into())
    );
    let map = run("nbdinfo", &["--map", uri]);
    assert!(map.contains("hole,zero"), "{map}");
    let copied = lab.path("copied.raw");
    run("nbdcopy", &[uri, copied.to_str().unwrap()]);
    assert!(fs::read(&copied).unwrap() == fs::read(lab.path("exported.raw")).unwrap());
    let compared = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", uri, copied.to_str().unwrap()]);
    assert!(compared.contains("identical"), "{compared}");
    let written = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4096", uri]).output().unwrap();
    assert!(!written.status.success(), "{written:?}");

    let second = lab.run(&words);
    assert!(second.code == 1 && second.stderr.contains("somebody listens"), "{second:?}");
    let file = lab.file("taken", "");
    let taken = lab.run(&["image", "serve", "a", "--socket", file.to_str().unwrap()]);
    assert!(taken.code == 1 && taken.stderr.contains("is no socket") && file.exists(), "{taken:?}");
    let long = lab.run(&["image", "serve", "a", "--socket", &"x".repeat(120)]);
    assert!(long.code == 1 && long.stderr.contains("too long"), "{long:?}");

    // The image may go: what is served stays.
    assert_eq!(roots(&lab, "served"), 1);
    lab.run(&["image", "rm", "a"]).good();
    lab.run(&["store", "gc"]).good();
    run("nbdcopy", &[uri, copied.to_str().unwrap()]);
    assert!(UnixStream::connect(&socket).is_ok());
    send(child.id(), "INT").unwrap();
    assert_eq!(finish(child).code, 0);
    assert!(!Path::new(&socket).exists());
    until("the chunks are let go of", || roots(&lab, "served") == 0);
}

#[test]
fn images_are_pushed_and_pulled() {
    let (here, there) = (Lab::new(&["tiny"]), Lab::new(&[]));
    import(&here, "a", &disk());
    let remote = here.path("remote");
    let remote = remote.to_str().unwrap();
    let first = here.json(&["image", "push", "a", remote]);
    assert_eq!(first["new_chunks"], first["chunks"], "{first}");
    let again = here.run(&["image", "push", "a", &format!("file://{remote}")]).good();
    assert!(again.stderr.contains("; 0 new, 0 B, 0 B sent"), "{again:?}");
    here.json(&["image", "push", "tiny", remote]);

    let listed = there.json(&["image", "remote", remote]);
    assert_eq!((listed[0]["name"].as_str(), listed[1]["name"].as_str()), (Some("a"), Some("tiny")), "{listed}");
    assert_eq!(there.run(&["image", "remote", "-q", remote]).good().stdout, "a\ntiny\n");
    let pulled = there.json(&["image", "pull", remote, "a"]);
    assert_eq!((&pulled["new_chunks"], &pulled["image"]["digest"]), (&first["chunks"], &listed[0]["digest"]));
    let steps = there.json(&["image", "history", "a"]);
    assert_eq!(steps.as_array().unwrap().len(), 2, "{steps}");
    assert_eq!(steps[1]["origin"]["pulled"]["remote"], remote);
    there.run(&["image", "verify", "a"]).good();
    for (lab, file) in [(&here, "here.raw"), (&there, "there.raw")] {
        lab.run(&["image", "export", "a", here.path(file).to_str().unwrap()]).good();
    }
    assert!(fs::read(here.path("here.raw")).unwrap() == fs::read(here.path("there.raw")).unwrap());
    let once = there.run(&["image", "pull", remote, "a"]).good();
    assert!(once.stderr.contains("is here already"), "{once:?}");

    // Files beside the disk arrive as they were, and a VM starts from them.
    there.run(&["image", "pull", remote, "tiny"]).good();
    for file in ["vmlinuz", "initramfs.cpio"] {
        let of = |lab: &Lab| fs::read(lab.data().join("images/tiny").join(file)).unwrap();
        assert!(of(&here) == of(&there), "{file}");
    }
    there.vm("tiny", "t", "tiny");
    assert_eq!(there.run(&["exec", "t", "--", "echo", "up"]).good().stdout, "up\n");

    for (words, told) in [
        (["pull", remote, "b"], "there is no image b"),
        (["pull", "s3://bucket/x", "a"], "AWS_ACCESS_KEY_ID"),
        (["pull", "ftp://x", "a"], "s3://BUCKET/PREFIX"),
        (["push", "a", "/proc/self"], "error"),
    ] {
        let mut command = there.command(&[&["image"], &words[..]].concat());
        let refused = finish(command.env_remove("AWS_ACCESS_KEY_ID").spawn().unwrap());
        assert!(
            refused.code == 1 && refused.stderr.contains(told) && !refused.stderr.contains("panicked"),
            "{refused:?}"
        );
    }
    let no_layout = there.run(&["image", "import", ".", "x"]);
    assert!(no_layout.code == 1 && no_layout.stderr.contains("oci-layout"), "{no_layout:?}");
    let roots = there.json(&["store", "stat"])["roots"].clone();
    assert_eq!(roots, serde_json::json!({"image": 1}), "nothing is left of what failed");
}
