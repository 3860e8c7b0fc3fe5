//! The rival: QEMU started by hand, with the arguments, kernel, initramfs and disk of a VM that Burgeon has
//! just started. What can be prepared before (links, an empty overlay) is not counted against it.
//!
//! For the raw channel the same machine gets one more port, and an archive behind its initramfs replaces
//! the agent by a shell script that serves that port: no agent, no frames, no credit.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use burgeon_qemu::{
    memory::{Base, Block, Guest, Scope},
    process::identity_of,
    qmp::Qmp,
    state::{self, Devices},
};
use tokio::runtime::Handle;

use crate::{
    product::Vm,
    store,
    workspace::{self, Workspace, link},
};

const BOOT_DEADLINE: Duration = Duration::from_secs(120);
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
const PORT: &str = "bench.raw";
/// Answers to a one-letter command each: a command run, a file from the host, the same file to the host.
const SCRIPT: &str = r#"#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp
mount -t tmpfs -o size=80% tmp /tmp
while read -r module; do insmod "/burgeon/$module"; done </burgeon/modules
while [ -z "$port" ]; do
    for entry in /sys/class/virtio-ports/*; do
        if [ "$(cat "$entry/name")" = bench.raw ]; then port=/dev/${entry##*/}; fi
    done
done
exec 3<>"$port"
printf . >&3
while read -r word <&3; do
    case $word in
    run) /bin/busybox true && printf . >&3 ;;
    take) dd bs=64k count=COUNT iflag=fullblock of=/tmp/file <&3 2>/dev/null && printf . >&3 ;;
    give) dd bs=64k if=/tmp/file >&3 2>/dev/null ;;
    esac
done
"#;

/// How the argument of a disk begins that the host process serves, and what stands in its place for a disk in two
/// files: an empty overlay above a raw base.
const SERVED_DISK: &str = "driver=nbd,node-name=disk,";
const DISK_IN_FILES: [&str; 4] = [
    "driver=file,node-name=base-file,filename=base.raw,read-only=on,auto-read-only=off",
    "driver=raw,node-name=base,file=base-file,read-only=on",
    "driver=file,node-name=disk-file,filename=disk.qcow2,discard=unmap",
    "driver=qcow2,node-name=disk,file=disk-file,backing=base,discard=unmap",
];

/// How to start a VM by hand.
pub(crate) struct Machine {
    directory: PathBuf,
    program: String,
    arguments: Vec<String>,
    /// Bytes of the disk, where there is one.
    disk: Option<u64>,
}

impl Machine {
    /// The same machine as `vm`, in a directory of its own.
    pub(crate) fn like(workspace: &Workspace, vm: &Vm, name: &str) -> Result<Machine> {
        let directory = workspace.path(name);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir(&directory)?;
        for file in ["vmlinuz", "initramfs", "base.raw"] {
            if vm.directory.join(file).exists() {
                link(&vm.directory.join(file), &directory.join(file))?;
            }
        }
        let (program, arguments) = vm.command_line.split_first().context("the VM has no command line")?;
        let mut arguments = arguments.to_vec();
        let mut disk = fs::metadata(directory.join("base.raw")).ok().map(|base| base.len());
        if let Some(place) = arguments.iter().position(|word| word.starts_with(SERVED_DISK)) {
            let (store, map) = store::image(workspace, &vm.image)?.context("a served disk without an image of it")?;
            store::export(&store, map, &directory.join("base.raw"))?;
            // As large as the VM's own: its layer has the size of the disk.
            let layer = vm.directory.with_file_name("disk").join("layer-0.data");
            disk = Some(fs::metadata(layer).context("look at the VM's disk")?.len());
            let files = DISK_IN_FILES.join(" -blockdev ");
            arguments.splice(place..=place, files.split(' ').map(str::to_string));
        }
        Ok(Machine { directory, program: program.clone(), arguments, disk })
    }

    /// Gives the machine a second port, and the script instead of the agent.
    pub(crate) fn with_raw_port(mut self, transfer: usize) -> Result<Machine> {
        let script = SCRIPT.replace("COUNT", &(transfer >> 16).to_string());
        let path = self.directory.join("initramfs");
        let mut archive = fs::read(&path)?;
        archive.resize(archive.len().next_multiple_of(512), 0);
        append_program(&mut archive, "init", script.as_bytes())?;
        fs::remove_file(&path)?;
        fs::write(&path, archive)?;
        self.arguments.extend([
            "-chardev".into(),
            "socket,id=raw,path=raw.sock,server=on,wait=off".into(),
            "-device".into(),
            format!("virtserialport,bus=channel.0,nr=2,chardev=raw,name={PORT}"),
        ]);
        Ok(self)
    }

    /// Makes the disk empty again.
    pub(crate) fn prepare(&self, workspace: &Workspace) -> Result<()> {
        let Some(size) = self.disk else { return Ok(()) };
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "disk.qcow2", &size.to_string()]).current_dir(&self.directory);
        workspace::run(&mut workspace.confine(command)?).map(drop)
    }

    /// Starts QEMU, and tells the time until the first byte on a socket.
    pub(crate) fn boot(&self, workspace: &Workspace, socket: &str) -> Result<(Running, Duration)> {
        let mut command = Command::new(&self.program);
        let log = fs::File::create(self.directory.join("qemu.log"))?;
        command.args(&self.arguments).current_dir(&self.directory).stdout(log.try_clone()?).stderr(log);
        let mut command = workspace.confine(command)?;
        let path = self.directory.join(socket);
        if path.exists() {
            fs::remove_file(&path)?;
        }
        let begun = Instant::now();
        let mut child = command.spawn().with_context(|| format!("start {}", self.program))?;
        let first = first_byte(&path, &mut child, begun).map(|stream| (stream, begun.elapsed()));
        match first {
            Ok((stream, took)) => Ok((Running { child, stream }, took)),
            Err(error) => {
                end(&mut child);
                let log = fs::read_to_string(self.directory.join("qemu.log")).unwrap_or_default();
                Err(error.context(format!("QEMU by hand in {}: {}", self.directory.display(), log.trim())))
            }
        }
    }
}

/// A machine that was booted and captured by hand, to be gone on from.
pub(crate) struct Captured {
    machine: Machine,
    // Mapped by each that goes on.
    _base: Base,
    devices: Devices,
}

impl Machine {
    /// Boots it once with its raw port, and captures it.
    pub(crate) fn capture(mut self, workspace: &Workspace) -> Result<Captured> {
        let (running, _) = self.boot(workspace, "raw.sock")?;
        let wait = Handle::current();
        let length = self.memory().context("the machine's memory is not told")?;
        let qmp = wait.block_on(Qmp::connect(&self.directory.join("qmp.sock"), deadline()))?;
        let devices = wait.block_on(async {
            let saving = Devices::prepare(&qmp).await?;
            state::pause(&qmp).await?;
            saving.save(&qmp).await?;
            saving.end(&qmp).await
        })?;
        let process = identity_of(running.child.id()).context("QEMU has ended")?;
        let address = wait.block_on(state::memory_address(&qmp, 0))?;
        let guest = Guest::open(&process, Block { address, length }, None)?;
        let base = Base::empty(length)?;
        guest.fill(&guest.pages(Scope::Written)?, &base)?;
        base.seal()?;
        drop(running);
        // Inherited by what is started from here.
        rustix::io::fcntl_setfd(base.file(), rustix::io::FdFlags::empty())?;
        let mut words = Vec::new();
        let mut arguments = std::mem::take(&mut self.arguments).into_iter();
        while let Some(word) = arguments.next() {
            match word.as_str() {
                "-kernel" | "-initrd" | "-append" => drop(arguments.next()),
                "-machine" => {
                    let board = arguments.next().context("-machine without a value")?;
                    words.extend([word, format!("{board},memory-backend=memory")]);
                }
                _ => words.push(word),
            }
        }
        let memory = format!(
            "memory-backend-file,id=memory,size={length},mem-path=/proc/self/fd/{},share=off",
            base.file().as_raw_fd()
        );
        words.extend(["-object", &memory, "-S", "-incoming", "defer"].map(String::from));
        words.extend(["-global", "migration.send-configuration=off"].map(String::from));
        Ok(Captured { machine: Machine { arguments: words, ..self }, _base: base, devices })
    }

    /// Of the guest, in bytes.
    fn memory(&self) -> Option<u64> {
        let place = self.arguments.iter().position(|word| word == "-m")?;
        let mebibytes: u64 = self.arguments.get(place + 1)?.strip_suffix('M')?.parse().ok()?;
        Some(mebibytes << 20)
    }
}

fn deadline() -> tokio::time::Instant {
    tokio::time::Instant::now() + BOOT_DEADLINE
}

impl Captured {
    /// Lets one go on, and tells the time until the guest's shell has run a command: from the start of QEMU, and from when
    /// that waits for the state. No identity is given: the guest is its siblings' twin.
    pub(crate) fn activate(&self, workspace: &Workspace) -> Result<(Running, [Duration; 2])> {
        let Machine { directory, program, arguments, .. } = &self.machine;
        for socket in ["raw.sock", "qmp.sock"] {
            if directory.join(socket).exists() {
                fs::remove_file(directory.join(socket))?;
            }
        }
        let mut command = Command::new(program);
        let log = fs::File::create(directory.join("qemu.log"))?;
        command.args(arguments).current_dir(directory).stdout(log.try_clone()?).stderr(log);
        let mut command = workspace.confine(command)?;
        let begun = Instant::now();
        let mut child = command.spawn().with_context(|| format!("start {program}"))?;
        let stream = connect(&directory.join("raw.sock"), &mut child, begun)?;
        let mut running = Running { child, stream };
        let wait = Handle::current();
        let qmp = wait.block_on(async {
            loop {
                match Qmp::connect(&directory.join("qmp.sock"), deadline()).await {
                    Err(_) if begun.elapsed() < BOOT_DEADLINE => tokio::time::sleep(Duration::from_millis(1)).await,
                    connected => return connected,
                }
            }
        })?;
        wait.block_on(state::tell_when_loaded(&qmp))?;
        let waits = Instant::now();
        wait.block_on(async {
            self.devices.load(&qmp).await?;
            state::go_on(&qmp).await
        })?;
        running.run()?;
        Ok((running, [begun.elapsed(), waits.elapsed()]))
    }
}

impl Machine {
    /// What the guest that runs has read of its disk, as QEMU's monitor tells.
    pub(crate) fn bytes_read(&self) -> Result<u64> {
        let stream = UnixStream::connect(self.directory.join("qmp.sock")).context("connect to the monitor")?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        let mut lines = BufReader::new(&stream).lines();
        let mut answer = |request: &str| -> Result<serde_json::Value> {
            (&stream).write_all(request.as_bytes())?;
            loop {
                let line = lines.next().context("the monitor has closed")??;
                let answer: serde_json::Value = serde_json::from_str(&line)?;
                if let Some(answer) = answer.get("return") {
                    return Ok(answer.clone());
                }
                ensure!(answer.get("error").is_none(), "the monitor says {line}");
            }
        };
        answer("{\"execute\":\"qmp_capabilities\"}\n")?;
        let disks = answer("{\"execute\":\"query-blockstats\"}\n")?;
        let read = |disk: &serde_json::Value| disk["stats"]["rd_bytes"].as_u64();
        disks.as_array().into_iter().flatten().filter_map(read).max().context("the monitor tells of no disk")
    }
}

fn connect(path: &Path, child: &mut Child, begun: Instant) -> Result<UnixStream> {
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(_) if begun.elapsed() < BOOT_DEADLINE => {
                if let Some(status) = child.try_wait()? {
                    bail!("it ended: {status}");
                }
                sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn first_byte(path: &Path, child: &mut Child, begun: Instant) -> Result<UnixStream> {
    let mut stream = connect(path, child, begun)?;
    stream.set_read_timeout(Some(BOOT_DEADLINE))?;
    stream.read_exact(&mut [0]).context("wait for the guest's first word")?;
    Ok(stream)
}

fn end(child: &mut Child) {
    // It may have ended by itself, and is ours to reap in any case.
    drop(child.kill());
    drop(child.wait());
}

/// A VM of the rival's; ended when dropped.
pub(crate) struct Running {
    child: Child,
    stream: UnixStream,
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

impl Running {
    fn say(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        self.stream.set_write_timeout(Some(ANSWER_DEADLINE))?;
        self.stream.write_all(bytes).context("write to the raw port")
    }

    fn hear(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.stream.read_exact(bytes).context("read from the raw port")
    }

    fn hear_end(&mut self) -> Result<()> {
        let mut answer = [0];
        self.hear(&mut answer)?;
        ensure!(answer == *b".", "the guest answered {answer:?}");
        Ok(())
    }

    /// `/bin/busybox true` by the shell in the guest.
    pub(crate) fn run(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.say(b"run\n")?;
        self.hear_end()?;
        Ok(begun.elapsed())
    }

    /// A file from the host, by dd. Its size is the one that the machine was made for.
    pub(crate) fn take(&mut self, content: &[u8]) -> Result<Duration> {
        let begun = Instant::now();
        self.say(b"take\n")?;
        self.say(content)?;
        self.hear_end()?;
        Ok(begun.elapsed())
    }

    /// The file that was taken last, by dd.
    pub(crate) fn give(&mut self, content: &mut [u8]) -> Result<Duration> {
        let begun = Instant::now();
        self.say(b"give\n")?;
        self.hear(content)?;
        Ok(begun.elapsed())
    }
}

/// Appends an archive with one program, in the "new ASCII" cpio format (cpio(5)). The kernel unpacks archives
/// one after the other, so this one's file replaces an earlier one of the same name.
fn append_program(archive: &mut Vec<u8>, name: &str, content: &[u8]) -> Result<()> {
    for (inode, name, mode, content) in [(1, name, 0o100_755_u32, content), (0, "TRAILER!!!", 0, &[][..])] {
        // inode, mode, uid, gid, links, mtime, size, device (4 numbers), length of the name with its NUL, check
        let numbers =
            [inode, mode, 0, 0, 1, 0, u32::try_from(content.len())?, 0, 0, 0, 0, u32::try_from(name.len() + 1)?, 0];
        archive.extend(b"070701");
        numbers.iter().for_each(|number| archive.extend(format!("{number:08x}").into_bytes()));
        archive.extend(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_has_pinned_bytes() {
        let mut archive = Vec::new();
        append_program(&mut archive, "init", b"hello").unwrap();
        let zero = "00000000";
        let header = |words: &[&str]| format!("070701{}", words.concat());
        let first = header(&[
            "00000001", "000081ed", zero, zero, "00000001", zero, "00000005", zero, zero, zero, zero, "00000005", zero,
        ]);
        let last = header(&[zero, zero, zero, zero, "00000001", zero, zero, zero, zero, zero, zero, "0000000b", zero]);
        let expected = format!("{first}init\0\0hello\0\0\0{last}TRAILER!!!\0\0\0\0");
        assert_eq!(String::from_utf8(archive).unwrap(), expected);
    }
}
