//! Figures of disks: a clone, and the server beside qemu-nbd, both under fio's client.

use std::{
    fs::{self, File},
    os::unix::{fs::FileExt, net::UnixStream},
    path::Path,
    process::{Child, Command},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use burgeon_qemu::nbd::Server;
use burgeon_store::{
    ChunkId,
    disk::{Base, Disk, Nothing, Stack},
};

use crate::{
    figures::{Outcome, milliseconds, take_turns},
    material::{Noise, cpu_seconds, millions},
    report::Samples,
    store::fresh,
    workspace::{self, Workspace},
};

const CLONED: u64 = 10 << 30;
/// Blocks of 4 KiB that were written since the last clone.
const WRITTEN: usize = 16;
/// Clones in each run: one takes milliseconds.
const CLONES: u32 = 4;
/// What a clone may take beside one sync.
const CLONE_ALONE_MS: f64 = 0.5;
/// Of the disk that is served.
const SERVED: u64 = 1 << 30;
const FIO_SECONDS: u32 = 3;
const START: Duration = Duration::from_secs(10);

fn nothing(_: Option<ChunkId>, _: Option<ChunkId>) -> burgeon_api::Result<Arc<dyn Base>> {
    Ok(Arc::new(Nothing))
}

/// A seal, an overlay by qemu-img, and one bare sync, each after the same writes to places not written before.
pub(crate) fn clone(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let directory = fresh(workspace, "clone")?;
    let disk = Disk::create(&directory, CLONED, Stack::default(), &nothing)?;
    let alone = File::create(directory.join("alone"))?;
    alone.set_len(CLONED)?;
    let qemu_img = |arguments: &[&str]| -> Result<Duration> {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(arguments).current_dir(&directory);
        let mut command = workspace.confine(command)?;
        let begun = Instant::now();
        workspace::run(&mut command)?;
        Ok(begun.elapsed())
    };
    qemu_img(&["below.qcow2", &CLONED.to_string()])?;
    let mut noise = Noise(5);
    let mut syncs = Vec::new();
    let ours = || {
        let block = noise.bytes(4096);
        let places: Vec<u64> = (0..WRITTEN).map(|_| noise.next() % (CLONED / 4096) * 4096).collect();
        places.iter().try_for_each(|at| alone.write_all_at(&block, *at))?;
        let begun = Instant::now();
        alone.sync_data()?;
        syncs.push(milliseconds(begun.elapsed()));
        places.iter().try_for_each(|at| disk.write(*at, &block))?;
        let begun = Instant::now();
        disk.seal()?;
        Ok(begun.elapsed())
    };
    let mut theirs = || qemu_img(&["-b", "below.qcow2", "-F", "qcow2", "above.qcow2"]);
    let samples = take_turns(runs * CLONES, milliseconds, ours, Some(&mut theirs))?;
    drop(disk);
    fs::remove_dir_all(&directory)?;
    let sync = Samples { ours: syncs, theirs: Vec::new() }.median();
    Ok(Outcome::of(samples).with([("sync_ms", sync)]).at_most(CLONE_ALONE_MS + sync))
}

/// A process that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, and is ours to reap in any case.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn qemu_nbd(workspace: &Workspace, directory: &Path, aio: &str) -> Result<Running> {
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--cache=writeback", "--shared=8", "--persistent", &format!("--aio={aio}")]);
    command.arg("--socket").arg(directory.join("theirs.sock")).arg("plain").current_dir(directory);
    // It tells of the connection that only looks whether it answers.
    command.stderr(File::create(directory.join("qemu-nbd.log"))?);
    let mut child = Running(workspace.confine(command)?.spawn().context("start qemu-nbd")?);
    let begun = Instant::now();
    while UnixStream::connect(directory.join("theirs.sock")).is_err() {
        if let Some(status) = child.0.try_wait()? {
            bail!("qemu-nbd ended: {status}");
        }
        if begun.elapsed() > START {
            bail!("qemu-nbd does not answer");
        }
        sleep(Duration::from_millis(10));
    }
    Ok(child)
}

/// Requests in a second, and the seconds of CPU time of the server for a million of them.
fn fio(workspace: &Workspace, pattern: &str, socket: &Path, server: Option<u32>) -> Result<(f64, f64)> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--ioengine=nbd", "--bs=4k", "--iodepth=16", "--time_based", "--output-format=json"]);
    command.args([format!("--rw={pattern}"), format!("--runtime={FIO_SECONDS}")]);
    command.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
    let mut command = workspace.confine(command)?;
    let before = cpu_seconds(server)?;
    let text = workspace::run(&mut command).context("fio's client measures this (Debian: fio)")?;
    let cpu = cpu_seconds(server)? - before;
    // Warnings may stand before the object.
    let text = &text[text.find('{').context("fio tells nothing")?..];
    let result: serde_json::Value = serde_json::from_str(text).context("read what fio tells")?;
    let side = &result["jobs"][0][if pattern == "randread" { "read" } else { "write" }];
    let (iops, count) = side["iops"].as_f64().zip(side["total_ios"].as_u64()).context("fio tells no rate")?;
    Ok((iops, cpu / millions(count)))
}

/// `pattern` is fio's name for what is done: `randread` or `randwrite`.
pub(crate) fn nbd(workspace: &Workspace, runs: u32, pattern: &str) -> Result<Outcome> {
    let directory = fresh(workspace, "nbd")?;
    let disk = Disk::create(&directory, SERVED, Stack::default(), &nothing)?;
    let plain = File::create(directory.join("plain"))?;
    let mut noise = Noise(3);
    for at in (0..SERVED).step_by(1 << 20) {
        let bytes = noise.bytes(1 << 20);
        disk.write(at, &bytes)?;
        plain.write_all_at(&bytes, at)?;
    }
    disk.flush()?;
    plain.sync_all()?;
    let (our_socket, their_socket) = (directory.join("ours.sock"), directory.join("theirs.sock"));
    let server = Server::start(&our_socket, Arc::new(disk), None)?;
    // Each time the way that is faster with a file in the page cache; not every kernel allows the first.
    let rival = match pattern {
        "randread" => {
            qemu_nbd(workspace, &directory, "io_uring").or_else(|_| qemu_nbd(workspace, &directory, "threads"))
        }
        _ => qemu_nbd(workspace, &directory, "threads"),
    }?;
    // The same bytes on both sides, as a third client sees them.
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-q", "-f", "raw", "-F", "raw"]);
    compare.args([&our_socket, &their_socket].map(|socket| format!("nbd+unix:///?socket={}", socket.display())));
    workspace::run(&mut workspace.confine(compare)?).context("compare the two disks")?;
    let (mut our_cpu, mut their_cpu) = (Vec::new(), Vec::new());
    // This process does nothing else meanwhile, so its CPU time is the server's.
    let ours = || {
        let (rate, cpu) = fio(workspace, pattern, &our_socket, None)?;
        our_cpu.push(cpu);
        Ok(rate)
    };
    let mut theirs = || {
        let (rate, cpu) = fio(workspace, pattern, &their_socket, Some(rival.0.id()))?;
        their_cpu.push(cpu);
        Ok(rate)
    };
    let samples = take_turns(runs, |rate| rate, ours, Some(&mut theirs))?;
    // What is fast is also right: fio reads back what it wrote, and fails where it is anything else.
    let mut verify = Command::new("fio");
    verify.args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=64m"]);
    verify.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]);
    verify.arg(format!("--uri=nbd+unix:///?socket={}", our_socket.display()));
    workspace::run(&mut workspace.confine(verify)?).context("read back what was written to the layer")?;
    drop(server);
    drop(rival);
    fs::remove_dir_all(directory)?;
    let cpu = Samples { ours: our_cpu, theirs: Vec::new() }.median();
    let rival_cpu = Samples { ours: their_cpu, theirs: Vec::new() }.median();
    Ok(Outcome::of(samples).with([("cpu_s_per_million", cpu), ("rival_cpu_s_per_million", rival_cpu)]))
}
