//! Files made elsewhere become images, or are refused.

use std::{fs, path::Path};

use burgeon_api::{
    ByteSize, ErrorKind, Result,
    history::{Format, Origin},
    image::{Boot, Image},
};
use burgeon_image::{ImportRequest, import};

use crate::support::{Kept, Nothing, built, copied, data, is_empty, kept_disk, output, tools};

fn request(file: &Path, root: &Path) -> ImportRequest {
    ImportRequest {
        file: file.to_owned(),
        name: "imported".into(),
        description: String::new(),
        kernel_of: None,
        size: None,
        max_size: ByteSize::gib(256),
        platform: None,
        data: data(root),
        now_s: 5,
    }
}

fn imported(request: &ImportRequest) -> Result<Image> {
    import(request, &tools(), &Kept(&request.data), &|_| {}, &|| false)
}

#[test]
fn disks_are_taken_by_their_contents() {
    let root = tempfile::tempdir().unwrap();
    let mut disk = vec![0u8; 3 << 20];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk[2 << 20] = 7;
    let raw = root.path().join("disk.qcow2");
    fs::write(&raw, &disk).unwrap();
    let image = imported(&request(&raw, root.path())).unwrap();
    assert_eq!((image.boot, image.disk.unwrap().0, image.created_s), (Boot::Firmware, 3 << 20, 5));
    let kept = kept_disk(root.path(), "imported");
    assert!(fs::read(&kept).unwrap() == disk);
    let step = &image.history[0];
    let Origin::Imported { file, format: Format::Raw, sha256: Some(hash), kernel_of: None, .. } = &step.origin else {
        panic!("{step:?}");
    };
    let sum = output("sha256sum", &[raw.to_str().unwrap()]);
    assert!(sum.starts_with(hash.as_str()) && file == raw.to_str().unwrap());
    assert_eq!((step.when_s, step.bytes, step.new_bytes, &step.digest), (5, 7, 5, &image.digest));
    assert_eq!(image.history.len(), 1);
    // The same disk by another way has the same digest.
    let qcow2 = root.path().join("json:{odd name");
    let (from, to) = (raw.to_str().unwrap(), root.path().join("q"));
    output("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to.to_str().unwrap()]);
    fs::rename(to, &qcow2).unwrap();
    assert_eq!(imported(&request(&qcow2, root.path())).unwrap().digest, image.digest);
    let text = root.path().join("text");
    fs::write(&text, "hello").unwrap();
    assert_eq!(imported(&request(&text, root.path())).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(imported(&request(&root.path().join("no"), root.path())).unwrap_err().kind, ErrorKind::NotFound);
}

#[test]
fn disks_that_lead_to_other_files_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_string();
    output("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", "-u", &at("backed"), "1M"]);
    let external = format!("data_file={},data_file_raw=on", at("data"));
    output("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &external, &at("external"), "1M"]);
    for name in ["backed", "external"] {
        let error = imported(&request(&root.path().join(name), root.path())).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    }
    assert!(is_empty(&root.path().join("tmp")) && is_empty(&root.path().join("images")));
}

#[test]
fn what_becomes_too_large_is_refused_with_both_numbers_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let raw = root.path().join("raw");
    fs::write(&raw, [&[0; 510][..], b"\x55\xaa"].concat()).unwrap();
    fs::File::options().write(true).open(&raw).unwrap().set_len(300 << 30).unwrap();
    let qcow2 = root.path().join("qcow2");
    output("qemu-img", &["create", "-q", "-f", "qcow2", qcow2.to_str().unwrap(), "300G"]);
    for file in [&raw, &qcow2] {
        let error = imported(&request(file, root.path())).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
        assert!(error.message.contains("300 GiB") && error.message.contains("256 GiB"), "{error}");
        assert!(error.hint.unwrap().contains("--max-size 300G"));
    }
    // A sparse disk takes no space, whatever a guest sees.
    let small = root.path().join("small");
    output("qemu-img", &["create", "-q", "-f", "qcow2", small.to_str().unwrap(), "64M"]);
    let mut exact = request(&small, root.path());
    exact.max_size = ByteSize::mib(64);
    assert_eq!(imported(&exact).unwrap().disk, Some(ByteSize::mib(64)));
    exact.max_size = ByteSize::mib(63);
    assert!(imported(&exact).unwrap_err().message.contains("63.0 MiB"));

    // Archives: one file that says its size, many small ones, and zeros behind the end.
    built(&copied("tiny", root.path(), ""), &Nothing).unwrap();
    let tree = root.path().join("tree");
    fs::create_dir_all(tree.join("sbin")).unwrap();
    fs::write(tree.join("sbin/init"), "#!/bin/sh\n").unwrap();
    let pack = |name: &str| {
        let packed = root.path().join(name);
        let words = format!("tar -C {} -c . | zstd -q >{}", tree.display(), packed.display());
        output("sh", &["-c", &words]);
        packed
    };
    fs::File::create(tree.join("large")).unwrap().set_len(40 << 20).unwrap();
    let one = pack("one.tar.zst");
    fs::remove_file(tree.join("large")).unwrap();
    for number in 0..40 {
        fs::File::create(tree.join(format!("part-{number}"))).unwrap().set_len(1 << 20).unwrap();
    }
    let many = pack("many.tar.zst");
    for number in 0..40 {
        fs::remove_file(tree.join(format!("part-{number}"))).unwrap();
    }
    let tail = root.path().join("tail.tar.zst");
    let words =
        format!("{{ tar -C {} -c .; head -c 60000000 /dev/zero; }} | zstd -q >{}", tree.display(), tail.display());
    output("sh", &["-c", &words]);
    for file in [&one, &many, &tail] {
        let mut limited = request(file, root.path());
        limited.name = "inflated".into();
        limited.max_size = ByteSize::mib(32);
        let error = imported(&limited).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
        assert!(error.message.contains("32.0 MiB") && error.hint.unwrap().contains("--max-size"));
        assert!(!root.path().join("images/inflated").exists());
        limited.max_size = ByteSize::mib(256);
        imported(&limited).unwrap();
        fs::remove_dir_all(root.path().join("images/inflated")).unwrap();
    }
    assert!(is_empty(&root.path().join("tmp")));
}

#[test]
fn a_root_file_system_boots_with_the_kernel_of_another_image() {
    let root = tempfile::tempdir().unwrap();
    let tree = root.path().join("tree");
    for directory in ["sbin", "etc"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::write(tree.join("sbin/init"), "#!/bin/sh\n").unwrap();
    let tar = root.path().join("root.tar");
    output("tar", &["-C", tree.to_str().unwrap(), "--owner=7", "--group=8", "-cf", tar.to_str().unwrap(), "."]);
    let error = imported(&request(&tar, root.path())).unwrap_err();
    assert!(error.hint.unwrap().contains("tiny.toml"));
    let tiny = built(&copied("tiny", root.path(), ""), &Nothing).unwrap();
    let mut digests = Vec::new();
    for tool in ["cat", "gzip", "xz", "zstd"] {
        let packed = root.path().join(tool);
        output("sh", &["-c", &format!("{tool} <{} >{}", tar.display(), packed.display())]);
        let image = imported(&request(&packed, root.path())).unwrap();
        assert_eq!((&image.kernel_release, image.init.as_str()), (&tiny.kernel_release, "/sbin/init"));
        assert!(
            matches!(&image.history[0].origin, Origin::Imported { kernel_of: Some(kernel), .. } if kernel == "tiny")
        );
        digests.push(image.digest);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1);
    let disk = kept_disk(root.path(), "imported");
    output("e2fsck", &["-fn", disk.to_str().unwrap()]);
    let init = output("debugfs", &["-R", "stat /sbin/init", disk.to_str().unwrap()]);
    assert!(init.contains("User:     7   Group:     8"), "{init}");
}
