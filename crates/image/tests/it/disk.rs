//! A Debian disk, made with a runner that plays the VM: unpacking, merging and writing for real.

use std::{fs, path::Path};

use burgeon_api::{Error, ErrorKind, Result};
use burgeon_image::{GuestJob, GuestOutput, GuestRunner, build, list};

use crate::support::{Kept, built, copied, is_empty, kept_disk, output, tools};

/// Gives back a fixed tar of changes.
struct Canned;

fn changes() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, gid: u64, data: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(gid);
        header.set_mtime(u64::from(u32::MAX));
        header.set_size(data.len() as u64);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        builder.append_data(&mut header, path, data).unwrap();
    };
    add("etc", tar::EntryType::Directory, 0o755, 0, b"");
    add("etc/debian_version", tar::EntryType::Char, 0, 0, b"");
    add("etc/shadow", tar::EntryType::Regular, 0o640, 42, b"root:*:::::::\n");
    add("etc/a \"quoted\" name", tar::EntryType::Regular, 0o600, 70000, b"x");
    add("etc/null", tar::EntryType::Char, 0o666, 0, b"");
    builder
        .append_pax_extensions([(
            "SCHILY.xattr.security.capability",
            &b"\x01\0\0\x02\0 \0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..],
        )])
        .unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(1);
    builder.append_data(&mut header, "etc/capable", &b"x"[..]).unwrap();
    builder.into_inner().unwrap()
}

impl GuestRunner for Canned {
    fn run(&self, job: GuestJob<'_>) -> Result<GuestOutput> {
        assert!(job.kernel.is_file() && job.initramfs.is_file() && job.disk.is_file());
        output("e2fsck", &["-fn", job.disk.to_str().unwrap()]);
        job.stdout.write_all(&changes()).unwrap();
        Ok(GuestOutput { code: 0 })
    }
}

fn stat(disk: &Path, path: &str) -> String {
    output("debugfs", &["-R", &format!("stat \"{path}\""), disk.to_str().unwrap()])
}

#[test]
fn a_disk_is_clean_reproducible_and_has_its_owners() {
    let mut digests = Vec::new();
    for _ in 0..2 {
        let root = tempfile::tempdir().unwrap();
        let mut request = copied("debian-minimal", root.path(), "");
        request.locked = true;
        let image = built(&request, &Canned).unwrap();
        let disk = kept_disk(root.path(), "debian-minimal");
        if digests.is_empty() {
            output("e2fsck", &["-fn", disk.to_str().unwrap()]);
            let (shadow, quoted) = (stat(&disk, "/etc/shadow"), stat(&disk, "/etc/a \"\"quoted\"\" name"));
            assert!(shadow.contains("Mode:  0640") && shadow.contains("Group:    42"), "{shadow}");
            assert!(quoted.contains("Group: 70000"), "{quoted}");
            assert!(stat(&disk, "/usr/bin/su").contains("Mode:  04755"));
            assert!(!stat(&disk, "/etc/debian_version").contains("Inode:"));
            assert!(!stat(&disk, "/etc/null").contains("Inode:"));
            let attribute = output("debugfs", &["-R", "ea_list /etc/capable", disk.to_str().unwrap()]);
            assert!(attribute.contains("security.capability (20)"), "{attribute}");
            assert_eq!(fs::metadata(&disk).unwrap().len(), 2 << 30);
            assert_eq!(image.disk.unwrap().0, 2 << 30);
        }
        assert!(is_empty(&root.path().join("tmp")));
        digests.push(image.digest);
    }
    assert_eq!(digests[0], digests[1]);
}

/// Plays a VM in which a command fails, or that is cancelled.
struct Failing(Result<GuestOutput>);

impl GuestRunner for Failing {
    fn run(&self, job: GuestJob<'_>) -> Result<GuestOutput> {
        (job.stderr)(b"Setting up a (1) ...\nburgeon:stage command 1\nno such thing: \x07bell\n");
        self.0.clone()
    }
}

#[test]
fn failures_point_at_the_command_and_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    let request = copied("debian-minimal", root.path(), "[[run]]\ncommand = \"false\"\n");
    let line = request.document.text.lines().count();
    let error = built(&request, &Failing(Ok(GuestOutput { code: 3 }))).unwrap_err();
    assert_eq!(error.location.as_ref().map(|at| at.line as usize), Some(line), "{error}");
    assert_eq!(error.message, "the command failed with status 3\n  no such thing: \\u{7}bell");
    let error = built(&request, &Failing(Err(Error::unavailable("it died")))).unwrap_err();
    assert!(error.message.starts_with("the VM that configures the image: it died\n  no such"), "{error}");
    assert!(is_empty(&root.path().join("tmp")) && list(&request.data).unwrap().is_empty());
    let mut small = request.clone();
    small.document.text = small.document.text.replace("\"2G\"", "\"64M\"");
    let error = built(&small, &Canned).unwrap_err();
    assert_eq!((error.kind, error.message.as_str()), (ErrorKind::Refused, "the system does not fit into 64M"));
    // Cancelled in the middle of unpacking.
    let calls = std::sync::atomic::AtomicU32::new(0);
    let cancelled = || calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 150;
    let error = build(&request, &tools(), &Canned, &Kept(&request.data), &|_| {}, &cancelled).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled, "{error}");
    assert!(is_empty(&root.path().join("tmp")));
}
