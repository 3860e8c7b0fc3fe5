//! The figures: what is measured on both sides, and in which order.
//!
//! The two sides take turns, and take turns in going first, so that a change of the machine's load meets both.
//! The first turn of each is not counted.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use burgeon_api::{
    ByteSize,
    profile::{Init, Profile},
    vm::Accelerator,
};
use clap::ValueEnum;

use crate::{
    catalog, disk,
    material::millions,
    product::{self, Vm},
    report::{NO_VM, Result as Measured, Samples, Sense, talk},
    rival::{Machine, Running},
    store, substrates,
    workspace::{self, Workspace},
};

/// Commands in each run of `exec_roundtrip`: one takes milliseconds.
const COMMANDS: u32 = 20;
/// A transfer on a channel.
const TRANSFER: usize = 64 << 20;
const FILE: &str = "/tmp/file";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Figure {
    ColdBootTiny,
    ColdBootDebian,
    BootBytes,
    ExecRoundtrip,
    ChannelOut,
    ChannelIn,
    ImageBuild,
    Ingest,
    ColdRead,
    CacheRead,
    RebuildNewBytes,
    MetaInserts,
    DiskClone,
    NbdReadRatio,
    NbdWriteRatio,
    ActivateDocked,
    ActivateSpawned,
    FirstReply,
    ForkPause,
    ForkChild,
    ClonePss,
    SubstrateSize,
    Park,
    Unpark,
    ActivationsPerSecond,
    ActivationsDockedPerSecond,
}

impl Figure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Figure::ColdBootTiny => "cold_boot_tiny",
            Figure::ColdBootDebian => "cold_boot_debian",
            Figure::BootBytes => "boot_bytes",
            Figure::ExecRoundtrip => "exec_roundtrip",
            Figure::ChannelOut => "channel_out",
            Figure::ChannelIn => "channel_in",
            Figure::ImageBuild => "image_build",
            Figure::Ingest => "ingest",
            Figure::ColdRead => "cold_read",
            Figure::CacheRead => "cache_read",
            Figure::RebuildNewBytes => "rebuild_new_bytes",
            Figure::MetaInserts => "meta_inserts",
            Figure::DiskClone => "disk_clone",
            Figure::NbdReadRatio => "nbd_read_ratio",
            Figure::NbdWriteRatio => "nbd_write_ratio",
            Figure::ActivateDocked => "activate_docked",
            Figure::ActivateSpawned => "activate_spawned",
            Figure::FirstReply => "first_reply",
            Figure::ForkPause => "fork_pause",
            Figure::ForkChild => "fork_child",
            Figure::ClonePss => "clone_pss",
            Figure::SubstrateSize => "substrate_size",
            Figure::Park => "park",
            Figure::Unpark => "unpark",
            Figure::ActivationsPerSecond => "activations_per_second",
            Figure::ActivationsDockedPerSecond => "activations_docked_per_second",
        }
    }

    /// What is timed, for people.
    pub(crate) fn what(self) -> &'static str {
        match self {
            Figure::ColdBootTiny => {
                "from POST /v1/vms to the answer that the VM runs; QEMU by hand: from its start to the agent's first byte"
            }
            Figure::ColdBootDebian => {
                "as cold_boot_tiny; what a boot reads of the disk is in memory for both after the turn that is not \
                 counted: ours in the store's cache, QEMU's in a raw file below an empty qcow2 overlay"
            }
            Figure::BootBytes => {
                "bytes in the store's cache, empty before, when the VM runs, as a share of the image's bytes that are not \
                 zeros: the least that was fetched, which see in fetched_after_30_s_mb beside cache_after_30_s_mb; \
                 QEMU by hand: bytes its guest has read of a raw file and overlay at that point"
            }
            Figure::ExecRoundtrip => {
                "an exec session of \"true\" by the HTTP API; raw port: a shell in the guest runs /bin/busybox true"
            }
            Figure::ChannelOut => "64 MiB of a tmpfs file in the guest to the host by GET; raw port: dd bs=64k",
            Figure::ChannelIn => "64 MiB from the host to a tmpfs file in the guest by PUT; raw port: dd bs=64k",
            Figure::ImageBuild => "burgeon image build --force images/debian-minimal.toml, packages in the cache",
            Figure::Ingest => {
                "256 MiB of /usr/lib from memory into an empty store, durable, by CPU time of all threads; \
                 raw: BLAKE3 and zstd -1 of pieces of 16 KiB, in memory"
            }
            Figure::ColdRead => {
                "the same bytes from a store opened anew, packs in the page cache, verified, by CPU time; \
                 raw: zstd and BLAKE3 of pieces of 16 KiB, in memory"
            }
            Figure::CacheRead => "the second read of the same bytes through a disk, in 64 KiB; pread: of a plain file",
            Figure::RebuildNewBytes => {
                "new plain bytes in the store, map included, for an ext4 image of 150 MiB of files built again with an \
                 insert into one file of twenty and 4 MB more; floor: its 4 KiB blocks that the old one has not"
            }
            Figure::MetaInserts => {
                "chunks added to the catalog by 16 callers, 250 each time, each durable before the next; \
                 SQLite alone: the same rows and groups"
            }
            Figure::DiskClone => {
                "a 10 GiB disk sealed under a new layer, durable, with 64 KiB written since the last time; \
                 qemu-img create -b: an overlay, not synced; sync_ms: one fdatasync of 64 KiB written"
            }
            Figure::NbdReadRatio => {
                "random reads of 4 KiB, 16 at a time, by fio, of a layer of 1 GiB; \
                 qemu-nbd: of a raw file, cache=writeback, aio=io_uring"
            }
            Figure::NbdWriteRatio => {
                "random writes of 4 KiB, 16 at a time, by fio, to a layer of 1 GiB; \
                 qemu-nbd: to a raw file, cache=writeback, aio=threads"
            }
            Figure::ActivateDocked => {
                "as activate_spawned, of a substrate for which a QEMU waits; QEMU by hand: with the start of its process"
            }
            Figure::ActivateSpawned => {
                "from POST /v1/substrates/S/vms to the end of a first command, receipt included, process started; \
                 QEMU by hand: the same machine with a shell on a raw port, no identity given, the same command"
            }
            Figure::FirstReply => {
                "from the claim of a QEMU that waits to the guest's first word; QEMU by hand: waiting for the state too, \
                 to the end of a shell's first command"
            }
            Figure::ForkPause => {
                "how long a running VM stands still while it is forked, from asking for its freeze to its thaw; \
                 allowed_ms: 5 and 0.25 for each MiB copied and 8 for each GiB of memory"
            }
            Figure::ForkChild => "from POST /v1/vms/VM/fork to the answer that the child runs, receipt included",
            Figure::ClonePss => {
                "memory of one of 25 VMs of a substrate after a command, by smaps_rollup's Pss; before_mib: before it"
            }
            Figure::SubstrateSize => "what a docked substrate of a guest of 128 MiB holds in memory",
            Figure::Park => "from POST park of a guest of 256 MiB to the answer: captured, stored durably, ended",
            Figure::Unpark => "from POST start of the parked VM to the answer that it runs, receipt included",
            Figure::ActivationsPerSecond => {
                "25 VMs of a substrate by one request, until all of them run; no QEMU waits"
            }
            Figure::ActivationsDockedPerSecond => "as activations_per_second, and 25 QEMUs wait",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Figure::ColdBootTiny
            | Figure::ColdBootDebian
            | Figure::ExecRoundtrip
            | Figure::DiskClone
            | Figure::ActivateDocked
            | Figure::ActivateSpawned
            | Figure::FirstReply
            | Figure::ForkPause
            | Figure::ForkChild
            | Figure::Park
            | Figure::Unpark => "ms",
            Figure::ClonePss | Figure::SubstrateSize => "MiB",
            Figure::ActivationsPerSecond | Figure::ActivationsDockedPerSecond => "1/s",
            Figure::ChannelOut | Figure::ChannelIn | Figure::CacheRead => "MB/s",
            Figure::Ingest | Figure::ColdRead => "MB/s of a core",
            Figure::ImageBuild => "s",
            Figure::BootBytes => "%",
            Figure::RebuildNewBytes => "MB",
            Figure::MetaInserts => "1/s",
            Figure::NbdReadRatio | Figure::NbdWriteRatio => "IOPS",
        }
    }

    fn sense(self) -> Sense {
        match self {
            Figure::ColdBootTiny
            | Figure::ColdBootDebian
            | Figure::BootBytes
            | Figure::ExecRoundtrip
            | Figure::ImageBuild
            | Figure::RebuildNewBytes
            | Figure::DiskClone
            | Figure::ActivateDocked
            | Figure::ActivateSpawned
            | Figure::FirstReply
            | Figure::ForkPause
            | Figure::ForkChild
            | Figure::ClonePss
            | Figure::SubstrateSize
            | Figure::Park
            | Figure::Unpark => Sense::LessIsBetter,
            _ => Sense::MoreIsBetter,
        }
    }

    fn rival(self) -> &'static str {
        match self {
            Figure::ColdBootTiny | Figure::ColdBootDebian | Figure::BootBytes => "qemu by hand",
            Figure::ExecRoundtrip | Figure::ChannelOut | Figure::ChannelIn => "raw virtio-serial",
            Figure::ImageBuild => "mmdebstrap",
            Figure::Ingest | Figure::ColdRead => "raw blake3, zstd",
            Figure::CacheRead => "pread",
            Figure::RebuildNewBytes => "new 4 KiB blocks",
            Figure::MetaInserts => "SQLite alone",
            Figure::DiskClone => "qemu-img create -b",
            Figure::NbdReadRatio | Figure::NbdWriteRatio => "qemu-nbd",
            Figure::ActivateDocked | Figure::ActivateSpawned | Figure::FirstReply => "qemu by hand",
            Figure::ForkPause
            | Figure::ForkChild
            | Figure::ClonePss
            | Figure::SubstrateSize
            | Figure::Park
            | Figure::Unpark
            | Figure::ActivationsPerSecond
            | Figure::ActivationsDockedPerSecond => "none",
        }
    }

    /// The target: its text, the ratio to the rival or the median that reaches it.
    fn target(self) -> (&'static str, Option<f64>, Option<f64>) {
        match self {
            Figure::ColdBootTiny | Figure::ColdBootDebian | Figure::RebuildNewBytes => {
                ("ratio at most 1.10", Some(1.10), None)
            }
            Figure::BootBytes => ("median at most 1 %", None, Some(1.0)),
            Figure::ExecRoundtrip => ("median at most 5 ms", None, Some(5.0)),
            Figure::ChannelOut | Figure::ChannelIn => ("ratio at least 0.85", Some(0.85), None),
            Figure::ImageBuild => ("median at most 30 s", None, Some(30.0)),
            Figure::Ingest => ("median at least 300 MB/s", None, Some(300.0)),
            Figure::ColdRead => ("median at least 750 MB/s", None, Some(750.0)),
            Figure::CacheRead => ("median at least 2000 MB/s", None, Some(2000.0)),
            Figure::MetaInserts => ("median at least 150,000/s", None, Some(150_000.0)),
            Figure::DiskClone => ("median at most 0.5 ms and sync_ms", None, None),
            Figure::NbdReadRatio | Figure::NbdWriteRatio => ("ratio at least 0.80", Some(0.80), None),
            Figure::ActivateDocked => ("median at most 45 ms", None, Some(45.0)),
            Figure::ActivateSpawned => ("median at most 70 ms", None, Some(70.0)),
            Figure::FirstReply => ("ratio at most 1.30", Some(1.30), None),
            Figure::ForkPause => ("median at most allowed_ms", None, None),
            Figure::ForkChild => ("median at most 80 ms", None, Some(80.0)),
            Figure::ClonePss => ("median at most 30 MiB", None, Some(30.0)),
            Figure::SubstrateSize => ("at most 55 MiB", None, Some(55.0)),
            Figure::Park => ("median at most 1 s", None, Some(1000.0)),
            Figure::Unpark => ("median at most 0.5 s", None, Some(500.0)),
            Figure::ActivationsPerSecond => ("median at least 16/s", None, Some(16.0)),
            Figure::ActivationsDockedPerSecond => ("median at least 25/s", None, Some(25.0)),
        }
    }
}

/// What the two sides did.
pub(crate) struct Outcome {
    samples: Samples,
    /// Where a VM took part.
    accelerator: Option<Accelerator>,
    /// Where the target depends on what was measured.
    median_target: Option<f64>,
    more: BTreeMap<&'static str, f64>,
}

impl Outcome {
    pub(crate) fn of(samples: Samples) -> Outcome {
        Outcome { samples, accelerator: None, median_target: None, more: BTreeMap::new() }
    }

    /// Tells more of what was measured.
    pub(crate) fn with<const COUNT: usize>(mut self, more: [(&'static str, f64); COUNT]) -> Outcome {
        self.more.extend(more);
        self
    }

    /// Sets the median that reaches the target.
    pub(crate) fn at_most(mut self, median: f64) -> Outcome {
        self.median_target = Some(median);
        self
    }
}

impl From<(Samples, Accelerator)> for Outcome {
    fn from((samples, accelerator): (Samples, Accelerator)) -> Outcome {
        Outcome { accelerator: Some(accelerator), ..Outcome::of(samples) }
    }
}

/// Measures one figure on both sides.
pub(crate) fn measure(figure: Figure, workspace: &Workspace, runs: u32) -> Result<Measured> {
    let outcome = match figure {
        Figure::ColdBootTiny => cold_boot(workspace, runs, "tiny", &Profile::named("tiny")?)?.into(),
        Figure::ColdBootDebian => cold_boot(workspace, runs, "debian-minimal", &Profile::named("default")?)?.into(),
        Figure::BootBytes => boot_bytes(workspace, runs)?,
        Figure::ExecRoundtrip => exec_roundtrip(workspace, runs)?.into(),
        Figure::ChannelOut => channel_out(workspace, runs)?.into(),
        Figure::ChannelIn => channel_in(workspace, runs)?.into(),
        Figure::ImageBuild => image_build(workspace, runs)?.into(),
        Figure::Ingest => store::ingest(workspace, runs)?,
        Figure::ColdRead => store::cold_read(workspace, runs)?,
        Figure::CacheRead => store::cache_read(workspace, runs)?,
        Figure::RebuildNewBytes => store::rebuild(workspace)?,
        Figure::MetaInserts => catalog::meta_inserts(workspace, runs)?,
        Figure::DiskClone => disk::clone(workspace, runs)?,
        Figure::NbdReadRatio => disk::nbd(workspace, runs, "randread")?,
        Figure::NbdWriteRatio => disk::nbd(workspace, runs, "randwrite")?,
        Figure::ActivateDocked => substrates::activate(workspace, runs, substrates::From::Standby)?,
        Figure::ActivateSpawned => substrates::activate(workspace, runs, substrates::From::Nothing)?,
        Figure::FirstReply => substrates::first_reply(workspace, runs)?,
        Figure::ForkPause => substrates::fork_pause(workspace, runs)?,
        Figure::ForkChild => substrates::fork_child(workspace, runs)?,
        Figure::ClonePss => substrates::clone_pss(workspace)?,
        Figure::SubstrateSize => substrates::size(workspace)?,
        Figure::Park => substrates::park(workspace, runs, substrates::Half::Park)?,
        Figure::Unpark => substrates::park(workspace, runs, substrates::Half::Unpark)?,
        Figure::ActivationsPerSecond => substrates::per_second(workspace, runs, substrates::From::Nothing)?,
        Figure::ActivationsDockedPerSecond => substrates::per_second(workspace, runs, substrates::From::Standby)?,
    };
    let (target, ratio_target, median_target) = figure.target();
    let mut result = outcome.samples.result(
        figure.name(),
        figure.unit(),
        figure.rival(),
        outcome.accelerator.map_or(NO_VM, Accelerator::name),
        figure.sense(),
        (target, ratio_target, outcome.median_target.or(median_target)),
    );
    result.more = outcome.more;
    Ok(result)
}

/// Takes turns: one that is not counted, then `runs`. `of` makes the figure of what a turn tells.
pub(crate) fn take_turns<T>(
    runs: u32,
    of: impl Fn(T) -> f64,
    mut ours: impl FnMut() -> Result<T>,
    mut theirs: Option<&mut dyn FnMut() -> Result<T>>,
) -> Result<Samples> {
    let mut samples = Samples::default();
    for run in 0..=runs {
        let mut first = None;
        if let Some(theirs) = &mut theirs
            && run % 2 == 1
        {
            first = Some(theirs()?);
        }
        let our_turn = ours()?;
        let their_turn = match (first, &mut theirs) {
            (None, Some(theirs)) => Some(theirs()?),
            (first, _) => first,
        };
        if run > 0 {
            samples.ours.push(of(our_turn));
            samples.theirs.extend(their_turn.map(&of));
        }
    }
    Ok(samples)
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Millions of bytes in a second.
fn rate(time: Duration) -> f64 {
    // 64 MiB is far below the integers that a double holds exactly.
    f64::from(u32::try_from(TRANSFER).unwrap_or(u32::MAX)) / 1e6 / time.as_secs_f64()
}

fn cold_boot(workspace: &Workspace, runs: u32, image: &str, profile: &Profile) -> Result<(Samples, Accelerator)> {
    product::image(workspace, image)?;
    // This one shows the arguments, and has the KVM probe and the initramfs behind it.
    let (vm, _) = product::boot(workspace, image, profile)?;
    let machine = Machine::like(workspace, &vm, "by-hand")?;
    let accelerator = vm.accelerator;
    vm.remove()?;
    let mut theirs = || {
        machine.prepare(workspace)?;
        let (running, took) = machine.boot(workspace, "agent.sock")?;
        drop(running);
        Ok(took)
    };
    let ours = || {
        let (vm, took) = product::boot(workspace, image, profile)?;
        vm.remove()?;
        Ok(took)
    };
    Ok((take_turns(runs, milliseconds, ours, Some(&mut theirs))?, accelerator))
}

/// Bytes that the files in the store's cache take.
fn cached_bytes(workspace: &Workspace) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(workspace.data().join("store/cache")).context("look into the store's cache")? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "data") {
            sum += fs::metadata(&path)?.blocks() * 512;
        }
    }
    Ok(sum)
}

fn boot_bytes(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let image = "debian-minimal";
    let profile = Profile::named("default")?;
    product::image(workspace, image)?;
    let (vm, _) = product::boot(workspace, image, &profile)?;
    let machine = Machine::like(workspace, &vm, "by-hand")?;
    let accelerator = vm.accelerator;
    vm.remove()?;
    let (image_store, map) = store::image(workspace, image)?.context("the image's disk is not in the store")?;
    let stored = store::data_bytes(&image_store, &map)?;
    let share = |bytes: u64| bytes as f64 / stored as f64 * 100.0;
    let ours = || {
        workspace.stop_server()?;
        // With it goes the record of what the first boot has read: nothing is fetched ahead.
        fs::remove_dir_all(workspace.data().join("store/cache")).context("empty the store's cache")?;
        let (vm, _) = product::boot(workspace, image, &profile)?;
        let fetched = cached_bytes(workspace)?;
        vm.remove()?;
        Ok(fetched)
    };
    let mut theirs = || {
        machine.prepare(workspace)?;
        let (running, _) = machine.boot(workspace, "agent.sock")?;
        machine.bytes_read().inspect(|_| drop(running))
    };
    let samples = take_turns(runs, share, ours, Some(&mut theirs))?;
    let fetched = millions(stored) * samples.median() / 100.0;
    // What the host itself has counted some time later, beside what the cache then holds: parts of chunks that do not lie
    // beside what was asked for are fetched and not kept.
    workspace.stop_server()?;
    fs::remove_dir_all(workspace.data().join("store/cache")).context("empty the store's cache")?;
    let (vm, _) = product::boot(workspace, image, &profile)?;
    let counted = workspace.wait_for_log("the image was read", "fetched_bytes=")?;
    let cached = cached_bytes(workspace)?;
    vm.remove()?;
    Ok(Outcome { accelerator: Some(accelerator), ..Outcome::of(samples) }.with([
        ("image_mb", millions(stored)),
        ("cache_mb", fetched),
        ("cache_after_30_s_mb", millions(cached)),
        ("fetched_after_30_s_mb", millions(counted)),
    ]))
}

/// A VM of ours and one of the rival's, of the same shape, side by side; idle while the other is measured.
fn pair(workspace: &Workspace) -> Result<(Vm, Running)> {
    product::image(workspace, "tiny")?;
    let profile = Profile { memory: ByteSize::mib(512), init: Init::None, ..Profile::default() };
    let (vm, _) = product::boot(workspace, "tiny", &profile)?;
    let machine = Machine::like(workspace, &vm, "raw")?.with_raw_port(TRANSFER)?;
    let (running, _) = machine.boot(workspace, "raw.sock")?;
    Ok((vm, running))
}

fn exec_roundtrip(workspace: &Workspace, runs: u32) -> Result<(Samples, Accelerator)> {
    let (vm, mut raw) = pair(workspace)?;
    let mut parts: [Vec<f64>; 2] = Default::default();
    let mut samples = Samples::default();
    for run in 0..=runs {
        let ours = || {
            let times = vm.exec(&["true"])?;
            parts[0].push(milliseconds(times.upgraded));
            parts[1].push(milliseconds(times.started));
            Ok(times.ended)
        };
        let of_run = take_turns(COMMANDS, milliseconds, ours, Some(&mut || raw.run()))?;
        if run > 0 {
            samples.ours.extend(of_run.ours);
            samples.theirs.extend(of_run.theirs);
        }
    }
    let [upgraded, started] = parts.map(|part| Samples { ours: part, theirs: Vec::new() }.median());
    talk(&format!("  upgraded after {upgraded:.2} ms, started after {started:.2} ms (medians)"));
    vm.remove()?;
    Ok((samples, vm.accelerator))
}

/// Bytes that nothing compresses, the same in every run: a linear congruential generator (Knuth, MMIX).
fn pattern() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()[7]
    };
    (0..TRANSFER).map(|_| next()).collect()
}

fn channel_in(workspace: &Workspace, runs: u32) -> Result<(Samples, Accelerator)> {
    let (vm, mut raw) = pair(workspace)?;
    let content = pattern();
    let ours = || {
        // A put makes a new file beside the old one; dd writes into the old one.
        vm.exec(&["rm", "-f", FILE])?;
        vm.put(FILE, &content)
    };
    let samples = take_turns(runs, rate, ours, Some(&mut || raw.take(&content)))?;
    let mut received = vec![0; TRANSFER];
    vm.get(FILE, &mut received)?;
    check(&content, &mut received)?;
    raw.give(&mut received)?;
    check(&content, &mut received)?;
    vm.remove()?;
    Ok((samples, vm.accelerator))
}

fn channel_out(workspace: &Workspace, runs: u32) -> Result<(Samples, Accelerator)> {
    let (vm, mut raw) = pair(workspace)?;
    let content = pattern();
    vm.put(FILE, &content)?;
    raw.take(&content)?;
    // Pages of memory that were never used cost more than the transfer; each side has its own, used in the first turn.
    let (mut our_copy, mut their_copy) = (vec![0; TRANSFER], vec![0; TRANSFER]);
    let ours = || {
        let took = vm.get(FILE, &mut our_copy)?;
        check(&content, &mut our_copy).map(|()| took)
    };
    let mut theirs = || {
        let took = raw.give(&mut their_copy)?;
        check(&content, &mut their_copy).map(|()| took)
    };
    let samples = take_turns(runs, rate, ours, Some(&mut theirs))?;
    vm.remove()?;
    Ok((samples, vm.accelerator))
}

/// Compares what arrived, and makes it useless for the next comparison.
fn check(sent: &[u8], received: &mut [u8]) -> Result<()> {
    ensure!(sent == received, "a file arrived with other contents");
    received.fill(0);
    Ok(())
}

fn image_build(workspace: &Workspace, runs: u32) -> Result<(Samples, Accelerator)> {
    // Fills the cache and writes the lock file.
    product::image(workspace, "debian-minimal")?;
    let client = workspace.server()?;
    let ours = || {
        let begun = Instant::now();
        workspace.burgeon(&["image", "build", "--force", "debian-minimal.toml"])?;
        Ok(begun.elapsed())
    };
    let mut mmdebstrap = || mmdebstrap(workspace);
    let installed = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|directory| Path::new(&directory).join("mmdebstrap").is_file());
    let theirs: Option<&mut dyn FnMut() -> Result<Duration>> = if installed { Some(&mut mmdebstrap) } else { None };
    let samples = take_turns(runs, |time| time.as_secs_f64(), ours, theirs)?;
    let view: burgeon_api::http::ServerView = client.get("/v1/server")?;
    Ok((samples, view.accelerator.unwrap_or(Accelerator::Tcg)))
}

/// A tar file of the same system, packages kept between runs as mmdebstrap(1) advises. Its scripts run on the host's CPU.
fn mmdebstrap(workspace: &Workspace) -> Result<Duration> {
    let cache = workspace.path("mmdebstrap-cache");
    fs::create_dir_all(&cache)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--include=iproute2,kmod,systemd-sysv,udev,linux-image-cloud-amd64"]).args([
        "--skip=essential/unlink",
        "--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives",
        &format!("--setup-hook=sync-in {} /var/cache/apt/archives", cache.display()),
        &format!("--customize-hook=sync-out /var/cache/apt/archives {}", cache.display()),
        "bookworm",
        "mmdebstrap.tar",
    ]);
    let begun = Instant::now();
    workspace::run(&mut workspace.confine(command)?)?;
    Ok(begun.elapsed())
}
