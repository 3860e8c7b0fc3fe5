//! What must run as root in the new system, run in a temporary VM: maintainer scripts, then the
//! recipe's files and commands. The disk is read-only there; what changes comes back as a tar.

use std::{
    collections::VecDeque,
    io::{self, Write},
    path::Path,
    time::Duration,
};

use burgeon_api::{
    ByteSize, Error, ErrorKind, Result,
    document::{Document, Part},
    http::Progress,
    path_text,
    recipe::Recipe,
};

use crate::{
    dpkg::Preinst,
    files::{self, Added},
    guest::{GuestJob, GuestRunner},
    initramfs,
    kernel::{Kernel, Selection},
    newc::{Archive, Body},
    process::Limits,
};

/// Enough for the tmpfs that takes all changes. Commands that write more than that fail clearly.
const MEMORY: ByteSize = ByteSize::gib(2);
const DEADLINE: Duration = Duration::from_secs(3600);
/// Lines of output kept for a failure.
const KEPT: usize = 20;
/// Begins a line in which the script says how far it is.
const MARK: &str = "burgeon:";

pub(crate) struct Configure<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) document: &'a Document,
    pub(crate) files: &'a [Added],
    pub(crate) kernel: &'a Kernel,
    pub(crate) selection: &'a Selection,
    pub(crate) busybox: &'a [u8],
    pub(crate) preinsts: &'a [Preinst],
    pub(crate) packages: usize,
    /// The time that the VM's clock shows, and that SOURCE_DATE_EPOCH gives.
    pub(crate) epoch: u64,
    pub(crate) runner: &'a dyn GuestRunner,
    pub(crate) limits: Limits<'a>,
    pub(crate) progress: &'a (dyn Fn(Progress) + Sync),
}

impl Configure<'_> {
    /// Runs everything; the changes go to `changes`.
    pub(crate) fn run(&self, kernel: &Path, disk: &Path, work: &Path, changes: &mut (dyn Write + Send)) -> Result<()> {
        let mut archive = Archive::default();
        initramfs::put_busybox(&mut archive, self.busybox);
        initramfs::put_modules(&mut archive, self.kernel, self.selection);
        archive.put("burgeon/files.tar", 0o644, Body::File(files::archive(self.files)?));
        archive.put("burgeon/configure", 0o755, Body::File(self.inner_script().into_bytes()));
        for (index, command) in self.recipe.commands.iter().enumerate() {
            archive.put(format!("burgeon/command.{index}"), 0o644, Body::File(command.command.clone().into_bytes()));
        }
        let initramfs = work.join("configure.cpio");
        initramfs::write(&archive, &initramfs)?;
        let script = self.outer_script();
        // The VM runs nothing that it must be guarded against, and is thrown away.
        let mut kernel_parameters = self.recipe.kernel_parameters.clone();
        kernel_parameters.extend(["mitigations=off", "norandmaps"].map(str::to_string));
        let mut report = Report::new(self.packages as u64, self.progress);
        let mut limited = Limited { out: changes, left: self.recipe.size.unwrap_or(MEMORY).0, full: false };
        let job = GuestJob {
            kernel,
            initramfs: &initramfs,
            kernel_parameters: &kernel_parameters,
            disk,
            memory: MEMORY,
            cpus: 2,
            script: &script,
            stdout: &mut limited,
            stderr: &mut |bytes| report.take(bytes),
            deadline: DEADLINE,
            cancelled: self.limits.cancelled,
        };
        let outcome = self.runner.run(job);
        if limited.full {
            return Err(Error::refused("the commands of the recipe write more than the image's size")
                .with_hint("give the recipe a larger size"));
        }
        let output = outcome.map_err(|error| match error.kind {
            ErrorKind::Cancelled => error,
            _ => report.explain(error.context("the VM that configures the image")),
        })?;
        if output.code == 0 { Ok(()) } else { Err(self.failure(output.code, &report)) }
    }

    fn failure(&self, code: i32, report: &Report<'_>) -> Error {
        let (stage, argument) = report.stage.split_once(' ').unwrap_or((&report.stage, ""));
        let error = match stage {
            "command" => {
                let index: usize = argument.parse().unwrap_or(0);
                let at = [Part::Key("run"), Part::Index(index), Part::Key("command")];
                self.document.error_at(&at, format!("the command failed with status {code}"))
            }
            "preinst" => Error::invalid(format!("the script preinst of package {argument} failed with status {code}")),
            "configure" => Error::invalid(format!("dpkg --configure failed with status {code}")),
            "files" => self.document.error_at(&[Part::Key("file")], "the recipe's files could not be added"),
            _ => Error::internal(format!("configuring the image failed with status {code} at stage \"{stage}\"")),
        };
        report.explain(error)
    }

    /// Runs in the initramfs: joins the disk and a tmpfs, hands over to the inner script, packs the changes.
    fn outer_script(&self) -> String {
        let commands = self.recipe.commands.len();
        let epoch = self.epoch;
        format!(
            r#"exec 3>&1 1>&2
b=/bin/busybox
say() {{ echo "{MARK}$*"; }}
say stage start
[ -e /proc/self ] || $b mount -t proc proc /proc
[ -e /sys/kernel ] || $b mount -t sysfs sysfs /sys
[ -e /dev/null ] || $b mount -t devtmpfs devtmpfs /dev
for list in /burgeon/modules /burgeon/modules.root; do
  while read -r module; do $b insmod "/burgeon/$module" 2>/dev/null; done <$list
done
for try in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; $b sleep 0.2; done
set -e
$b date -u -s @{epoch} >/dev/null
# One place for each program makes an emulated processor translate it once, not at each start.
echo 0 >/proc/sys/kernel/randomize_va_space
$b mkdir -p /lower /upper /new
$b mount -t ext4 -o ro,noload /dev/vda /lower
$b mount -t tmpfs -o size=95%,mode=0755 tmpfs /upper
$b mkdir /upper/changes /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work overlay /new
$b mount -t proc proc /new/proc
$b mount -t sysfs sysfs /new/sys
$b mount -o bind /dev /new/dev
$b mkdir -p /dev/pts /dev/shm
[ -e /dev/pts/ptmx ] || $b mount -t devpts devpts /dev/pts || true
$b mount -t tmpfs -o mode=0755 tmpfs /new/run
$b mount -t tmpfs -o mode=1777 tmpfs /new/tmp
$b mkdir -p /new/run/lock /new/run/burgeon/changes
$b mount -o bind /upper/changes /new/run/burgeon/changes
$b cp /burgeon/configure /new/run/burgeon/configure
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true SOURCE_DATE_EPOCH={epoch}
$b chroot /new /bin/sh /run/burgeon/configure </dev/null
say stage files
$b tar -x -f /burgeon/files.tar -C /new
index=0
while [ $index -lt {commands} ]; do
  say stage command $index
  $b chroot /new /bin/sh -c "$($b cat /burgeon/command.$index)" </dev/null
  index=$((index + 1))
done
say stage pack
$b rm -f /new/usr/sbin/policy-rc.d
# By its full path: busybox would run its own tar, which knows no attributes.
$b chroot /new /usr/bin/tar --create --format=posix --numeric-owner --sort=name --one-file-system \
  --xattrs --xattrs-include=security.capability --xattrs-include=trusted.overlay.opaque \
  --warning=no-file-ignored --directory=/run/burgeon/changes . >&3
"#
        )
    }

    /// Runs with the new system as its root.
    fn inner_script(&self) -> String {
        let release = &self.kernel.release;
        let mut script = format!(
            r#"set -e
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
depmod=
if [ -x /usr/sbin/depmod ] && [ -d /lib/modules/{release} ]; then
  # Beside dpkg, on the second processor.
  /usr/sbin/depmod {release} & depmod=$!
fi
"#
        );
        for preinst in self.preinsts {
            let Preinst { package, architecture, path } = preinst;
            script.push_str(&format!(
                "echo '{MARK}stage preinst {package}'\nDPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_PACKAGE={package} \
                 DPKG_MAINTSCRIPT_ARCH={architecture} DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 DPKG_ADMINDIR=/var/lib/dpkg \
                 DPKG_ROOT= {path} install\n"
            ));
        }
        script.push_str(&format!(
            "echo '{MARK}stage configure'\ndpkg --force-unsafe-io --configure --pending\n\
             if [ -n \"$depmod\" ]; then echo '{MARK}stage depmod'; wait $depmod; fi\n"
        ));
        script
    }
}

/// Stops a stream that grows beyond what the image may hold.
struct Limited<'a> {
    out: &'a mut (dyn Write + Send),
    left: u64,
    full: bool,
}

impl Write for Limited<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self.left.checked_sub(buffer.len() as u64) {
            Some(left) => self.left = left,
            None => {
                self.full = true;
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "the changes exceed the image's size"));
            }
        }
        self.out.write_all(buffer)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Reads the script's standard error: stages, progress, and the last lines for a failure.
struct Report<'a> {
    partial: Vec<u8>,
    lines: VecDeque<String>,
    stage: String,
    done: u64,
    total: u64,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Report<'a> {
    fn new(total: u64, progress: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Self { partial: Vec::new(), lines: VecDeque::new(), stage: "boot".into(), done: 0, total, progress }
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line = std::mem::take(&mut self.partial);
                    self.line(&String::from_utf8_lossy(&line));
                }
                // A line without end must not fill the memory of this machine.
                _ if self.partial.len() < 4096 => self.partial.push(*byte),
                _ => {}
            }
        }
    }

    fn line(&mut self, line: &str) {
        if let Some(stage) = line.strip_prefix(MARK).and_then(|rest| rest.strip_prefix("stage ")) {
            self.stage = stage.to_string();
            self.lines.clear();
            return;
        }
        if line.starts_with("Setting up ") {
            self.done = (self.done + 1).min(self.total);
            (self.progress)(Progress::Step {
                phase: "configure".into(),
                done: self.done,
                total: self.total,
                bytes: false,
            });
        }
        if !line.trim().is_empty() {
            if self.lines.len() == KEPT {
                self.lines.pop_front();
            }
            self.lines.push_back(path_text::printable(line.trim_end()));
        }
    }

    /// Adds the last lines to an error.
    fn explain(&self, mut error: Error) -> Error {
        for line in &self.lines {
            error.message.push_str("\n  ");
            error.message.push_str(line);
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_keep_the_last_lines_of_the_stage() {
        let steps = std::sync::Mutex::new(Vec::new());
        let progress = |progress: Progress| steps.lock().unwrap().push(progress);
        let mut report = Report::new(2, &progress);
        report.take(b"old\nburgeon:stage configure\nSetting up a (1) ...\nSetting");
        report.take(b" up b (1) ...\nSetting up c ...\n\nburgeon:stage command 3\nwrong: \x1b[31mred\nunfinished");
        assert_eq!(report.stage, "command 3");
        let error = report.explain(Error::invalid("it failed"));
        assert_eq!(error.message, "it failed\n  wrong: \\u{1b}[31mred");
        assert!(matches!(steps.lock().unwrap().last(), Some(Progress::Step { done: 2, total: 2, .. })));
    }

    #[test]
    fn a_stream_without_end_is_stopped() {
        let mut out = Vec::new();
        let mut limited = Limited { out: &mut out, left: 10, full: false };
        limited.write_all(b"12345").unwrap();
        assert!(limited.write_all(b"123456").is_err() && limited.full);
        assert_eq!(out, b"12345");
    }
}
