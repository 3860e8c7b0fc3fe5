//! The figures: what is measured on both sides, and in which order.
//!
//! The two sides take turns, and take turns in going first, so that a change of the machine's load meets both.
//! The first turn of each is not counted.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use burgeon_api::{
    ByteSize,
    profile::{Init, Profile},
    vm::Accelerator,
};
use clap::ValueEnum;

use crate::{
    product::{self, Vm},
    report::{Result as Measured, Samples, Sense, talk},
    rival::{Machine, Running},
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
    ExecRoundtrip,
    ChannelOut,
    ChannelIn,
    ImageBuild,
}

impl Figure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Figure::ColdBootTiny => "cold_boot_tiny",
            Figure::ColdBootDebian => "cold_boot_debian",
            Figure::ExecRoundtrip => "exec_roundtrip",
            Figure::ChannelOut => "channel_out",
            Figure::ChannelIn => "channel_in",
            Figure::ImageBuild => "image_build",
        }
    }

    /// What is timed, for people.
    pub(crate) fn what(self) -> &'static str {
        match self {
            Figure::ColdBootTiny | Figure::ColdBootDebian => {
                "from POST /v1/vms to the answer that the VM runs; QEMU by hand: from its start to the agent's first byte"
            }
            Figure::ExecRoundtrip => {
                "an exec session of \"true\" by the HTTP API; raw port: a shell in the guest runs /bin/busybox true"
            }
            Figure::ChannelOut => "64 MiB of a tmpfs file in the guest to the host by GET; raw port: dd bs=64k",
            Figure::ChannelIn => "64 MiB from the host to a tmpfs file in the guest by PUT; raw port: dd bs=64k",
            Figure::ImageBuild => "burgeon image build --force images/debian-minimal.toml, packages in the cache",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Figure::ColdBootTiny | Figure::ColdBootDebian | Figure::ExecRoundtrip => "ms",
            Figure::ChannelOut | Figure::ChannelIn => "MB/s",
            Figure::ImageBuild => "s",
        }
    }

    fn sense(self) -> Sense {
        match self {
            Figure::ChannelOut | Figure::ChannelIn => Sense::MoreIsBetter,
            _ => Sense::LessIsBetter,
        }
    }

    fn rival(self) -> &'static str {
        match self {
            Figure::ColdBootTiny | Figure::ColdBootDebian => "qemu by hand",
            Figure::ExecRoundtrip | Figure::ChannelOut | Figure::ChannelIn => "raw virtio-serial",
            Figure::ImageBuild => "mmdebstrap",
        }
    }

    /// The target: its text, the ratio to the rival or the median that reaches it.
    fn target(self) -> (&'static str, Option<f64>, Option<f64>) {
        match self {
            Figure::ColdBootTiny | Figure::ColdBootDebian => ("ratio at most 1.10", Some(1.10), None),
            Figure::ExecRoundtrip => ("median at most 5 ms", None, Some(5.0)),
            Figure::ChannelOut | Figure::ChannelIn => ("ratio at least 0.85", Some(0.85), None),
            Figure::ImageBuild => ("median at most 30 s", None, Some(30.0)),
        }
    }
}

/// Measures one figure on both sides.
pub(crate) fn measure(figure: Figure, workspace: &Workspace, runs: u32) -> Result<Measured> {
    let (samples, accelerator) = match figure {
        Figure::ColdBootTiny => cold_boot(workspace, runs, "tiny", &Profile::named("tiny")?)?,
        Figure::ColdBootDebian => cold_boot(workspace, runs, "debian-minimal", &Profile::named("default")?)?,
        Figure::ExecRoundtrip => exec_roundtrip(workspace, runs)?,
        Figure::ChannelOut => channel_out(workspace, runs)?,
        Figure::ChannelIn => channel_in(workspace, runs)?,
        Figure::ImageBuild => image_build(workspace, runs)?,
    };
    Ok(samples.result(
        figure.name(),
        figure.unit(),
        figure.rival(),
        accelerator.name(),
        figure.sense(),
        figure.target(),
    ))
}

/// Takes turns: one that is not counted, then `runs`. `of` makes the figure of a time.
fn take_turns(
    runs: u32,
    of: impl Fn(Duration) -> f64,
    mut ours: impl FnMut() -> Result<Duration>,
    mut theirs: Option<&mut dyn FnMut() -> Result<Duration>>,
) -> Result<Samples> {
    let mut samples = Samples::default();
    for run in 0..=runs {
        let mut first = None;
        if let Some(theirs) = &mut theirs
            && run % 2 == 1
        {
            first = Some(theirs()?);
        }
        let our_time = ours()?;
        let their_time = match (first, &mut theirs) {
            (None, Some(theirs)) => Some(theirs()?),
            (first, _) => first,
        };
        if run > 0 {
            samples.ours.push(of(our_time));
            samples.theirs.extend(their_time.map(&of));
        }
    }
    Ok(samples)
}

fn milliseconds(time: Duration) -> f64 {
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
    std::fs::create_dir_all(&cache)?;
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
