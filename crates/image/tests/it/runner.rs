//! A [`GuestRunner`] for tests: QEMU with a busybox script as process 1, its streams on ports.

use std::{
    fs::{self, File},
    io,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use burgeon_api::{Error, ErrorKind, Result};
use burgeon_image::{GuestJob, GuestOutput, GuestRunner, compose_initramfs};

pub(crate) struct Qemu;

const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do $b insmod "/burgeon/$module"; done </burgeon/modules
port() {
  while :; do
    for name in /sys/class/virtio-ports/*/name; do
      [ -e "$name" ] && [ "$($b cat "$name")" = "$1" ] && name=${name%/name} && echo "/dev/${name##*/}" && return
    done
    $b sleep 0.05
  done
}
out=$(port stdout) err=$(port stderr) code=$(port code)
$b cat >/script <<'END OF THE SCRIPT'
@SCRIPT@
END OF THE SCRIPT
$b sh -c "$($b cat /script)" >$out 2>$err </dev/null
echo "$?" >$code
$b poweroff -f
"#;

/// The word that spares the kernel from measuring its clock on a busy machine.
pub(crate) fn clock_word() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = cpu.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(": ").nth(1)?.parse::<f64>().ok());
    mhz.map(|mhz| format!("tsc_early_khz={:.0}", mhz * 1000.0)).unwrap_or_default()
}

pub(crate) fn qemu(kernel: &Path, initramfs: &Path, words: &str, memory_mib: u64) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-no-reboot", "-m", &memory_mib.to_string()])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &format!("console=ttyS0 quiet panic=-1 {} {words}", clock_word())])
        .args(["-device", "virtio-rng-pci"]);
    command
}

impl GuestRunner for Qemu {
    fn run(&self, job: GuestJob<'_>) -> Result<GuestOutput> {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::os::unix::fs::symlink(job.initramfs, at("initramfs.cpio")).unwrap();
        compose_initramfs(directory.path(), INIT.replace("@SCRIPT@", job.script).as_bytes(), &at("initrd"))?;
        let mut command = qemu(job.kernel, &at("initrd"), &job.kernel_parameters.join(" "), job.memory.0 >> 20);
        command.arg("-drive").arg(format!("file={},if=virtio,format=raw,snapshot=on", job.disk.display()));
        command.args(["-serial", &format!("file:{}", at("console").display()), "-device", "virtio-serial-pci"]);
        for name in ["stdout", "stderr", "code"] {
            command.args(["-chardev", &format!("file,id={name},path={}", at(name).display())]);
            command.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        let mut told = 0;
        loop {
            let ended = child.try_wait().unwrap().is_some();
            let said = fs::read(at("stderr")).unwrap_or_default();
            (job.stderr)(&said[told.min(said.len())..]);
            told = said.len();
            if ended {
                break;
            }
            let kind = match () {
                () if (job.cancelled)() => Some(ErrorKind::Cancelled),
                () if start.elapsed() > job.deadline => Some(ErrorKind::Deadline),
                () => None,
            };
            if let Some(kind) = kind {
                child.kill().unwrap();
                child.wait().unwrap();
                return Err(Error::new(kind, "stopped"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let copied = io::copy(&mut File::open(at("stdout")).unwrap(), &mut { job.stdout });
        copied.map_err(|error| Error::io("cannot keep the output", &error))?;
        let code = fs::read_to_string(at("code")).unwrap_or_default();
        code.trim().parse().map(|code| GuestOutput { code }).map_err(|_| {
            let console = fs::read(at("console")).unwrap_or_default();
            Error::unavailable(format!("the VM died: {}", String::from_utf8_lossy(&console)))
        })
    }
}
