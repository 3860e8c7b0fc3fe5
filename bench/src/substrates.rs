//! VMs that go on from memory: activations, forks, parking.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use burgeon_api::{
    ByteSize, VmId,
    profile::Profile,
    provisions::Provisions,
    substrate::{ActivateVms, CreateSubstrate, ForkVm, Forked, Keep, KeepStandbys, Recipe, SubstrateView},
    vm::{Accelerator, Observed, Resize, VmView},
};
use serde_json::json;

use crate::{
    figures::{Outcome, milliseconds, take_turns},
    http::Client,
    product::{self, Vm},
    report::Samples,
    rival::{Captured, Machine},
    workspace::Workspace,
};

const NAME: &str = "base";
const IMAGE: &str = "tiny";
/// Of which the machine's memory tells what each takes.
const MANY: usize = 25;
const TRUE: [&str; 2] = ["/bin/busybox", "true"];
/// What a guest writes before it is forked.
const WRITES: &str = "dd if=/dev/urandom of=/tmp/written bs=64k count=256 2>/dev/null";
const WRITTEN_MIB: f64 = 16.0;

/// The substrate, which is made unless it is there.
fn substrate(workspace: &Workspace) -> Result<(Client, SubstrateView)> {
    product::image(workspace, IMAGE)?;
    let client = workspace.server()?;
    let all: Vec<SubstrateView> = client.get("/v1/substrates")?;
    if all.iter().all(|view| view.name != NAME) {
        let request = CreateSubstrate {
            id: VmId::generate(),
            name: NAME.into(),
            image: IMAGE.into(),
            profile: Profile::named("tiny")?,
            recipe: Recipe::default(),
        };
        client.post::<SubstrateView>("/v1/substrates", &request)?;
    }
    let view: SubstrateView = client.get(&format!("/v1/substrates/{NAME}/wait"))?;
    ensure!(view.observed == Observed::Docked, "the substrate is {} {}", view.observed.name(), view.observed.detail());
    dock(&client, 0)?;
    Ok((client, view))
}

/// VMs that go on from it, by one request.
fn vms(workspace: &Workspace, client: &Client, count: usize) -> Result<Vec<Vm>> {
    let ids: Vec<VmId> = (0..count).map(|_| VmId::generate()).collect();
    let (life, keep) = (burgeon_api::life::SetLife::default(), Keep::default());
    let (names, provisions, resize) = (Vec::new(), Provisions::default(), Resize::default());
    let request = ActivateVms { ids: ids.clone(), names, life, keep, resize, provisions };
    client.post::<Vec<VmView>>(&format!("/v1/substrates/{NAME}/vms"), &request)?;
    let running = |id: &VmId| product::running(workspace, client.clone(), wait(client, *id)?);
    ids.iter().map(running).collect()
}

fn wait(client: &Client, id: VmId) -> Result<VmView> {
    client.get(&format!("/v1/vms/{id}/wait?for=running"))
}

fn one(workspace: &Workspace, client: &Client) -> Result<Vm> {
    vms(workspace, client, 1)?.pop().context("no VM")
}

/// From what VMs begin.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// A QEMU that waits.
    Standby,
    /// A QEMU of their own.
    Nothing,
}

/// Has so many QEMUs wait, and waits until they do.
fn dock(client: &Client, count: u32) -> Result<()> {
    let mut view: SubstrateView =
        client.post(&format!("/v1/substrates/{NAME}/standbys"), &KeepStandbys { count: Some(count) })?;
    let begun = Instant::now();
    while view.standbys.waiting != count {
        ensure!(begun.elapsed() < Duration::from_secs(120), "{:?}", view.standbys);
        std::thread::sleep(Duration::from_millis(20));
        view = client.get(&format!("/v1/substrates/{NAME}"))?;
    }
    // It has just stood still; its process is still busy with that.
    std::thread::sleep(Duration::from_millis(50));
    Ok(())
}

/// A machine with the same devices, captured by hand.
fn by_hand(workspace: &Workspace) -> Result<(Captured, Accelerator)> {
    // A VM that boots shows the arguments.
    let (booted, _) = product::boot(workspace, IMAGE, &Profile::named("tiny")?)?;
    let accelerator = booted.accelerator;
    let machine = Machine::like(workspace, &booted, "captured-by-hand")?.with_raw_port(1 << 16)?;
    booted.remove()?;
    Ok((machine.capture(workspace)?, accelerator))
}

pub(crate) fn activate(workspace: &Workspace, runs: u32, from: From) -> Result<Outcome> {
    let (client, _) = substrate(workspace)?;
    let waiting = u32::from(from == From::Standby);
    let (captured, accelerator) = by_hand(workspace)?;
    let ours = || {
        dock(&client, waiting)?;
        let begun = Instant::now();
        let vm = one(workspace, &client)?;
        vm.exec(&TRUE)?;
        let took = begun.elapsed();
        vm.remove()?;
        Ok(took)
    };
    let mut theirs = || captured.activate(workspace).map(|(_, [from_start, _])| from_start);
    let samples = take_turns(runs, milliseconds, ours, Some(&mut theirs))?;
    let mut sorted = samples.ours.clone();
    sorted.sort_by(f64::total_cmp);
    let p99 = sorted.get((sorted.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(f64::NAN);
    Ok(Outcome::from((samples, accelerator)).with([("p99_ms", p99)]))
}

/// Up to the first word of a guest for which a QEMU waits, on either side.
pub(crate) fn first_reply(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let (client, _) = substrate(workspace)?;
    let (captured, accelerator) = by_hand(workspace)?;
    let ours = || {
        dock(&client, 1)?;
        let vm = one(workspace, &client)?;
        let view: VmView = client.get(&format!("/v1/vms/{}", vm.id))?;
        vm.remove()?;
        let phases = view.on_host.context("the VM is not on the host")?.start_times;
        let until = phases.iter().take_while(|time| time.phase != "identify");
        Ok(Duration::from_micros(until.map(|time| time.microseconds).sum()))
    };
    let mut theirs = || captured.activate(workspace).map(|(_, [_, from_waiting])| from_waiting);
    let samples = take_turns(runs, milliseconds, ours, Some(&mut theirs))?;
    Ok((samples, accelerator).into())
}

/// Until QEMUs wait for the next fork: what was begun by the last one takes less.
const DOCKED: Duration = Duration::from_millis(500);

fn fork(client: &Client, vm: &Vm) -> Result<(Forked, Duration)> {
    std::thread::sleep(DOCKED);
    let request = ForkVm {
        ids: vec![VmId::generate()],
        names: Vec::new(),
        all_or_nothing: true,
        keep: Keep::default(),
        provisions: Provisions::default(),
    };
    let begun = Instant::now();
    let forked: Forked = client.post(&format!("/v1/vms/{}/fork", vm.id), &request)?;
    let took = begun.elapsed();
    for child in &forked.children {
        client.delete(&format!("/v1/vms/{}", child.id))?;
    }
    Ok((forked, took))
}

pub(crate) fn fork_pause(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let (client, view) = substrate(workspace)?;
    let vm = one(workspace, &client)?;
    vm.exec(&["/bin/busybox", "sh", "-c", WRITES])?;
    let mut copied = 0.0;
    let ours = || {
        let (forked, _) = fork(&client, &vm)?;
        copied = forked.copied.bytes() as f64 / f64::from(1 << 20);
        Ok(Duration::from_micros(forked.paused_us))
    };
    let samples = take_turns(runs, milliseconds, ours, None)?;
    let gib = view.profile.memory.bytes() as f64 / f64::from(1 << 30);
    let allowed = 5.0 + 0.25 * copied + 8.0 * gib;
    let accelerator = vm.accelerator;
    vm.remove()?;
    Ok(Outcome::from((samples, accelerator)).with([("allowed_ms", allowed), ("copied_mib", copied)]).at_most(allowed))
}

pub(crate) fn fork_child(workspace: &Workspace, runs: u32) -> Result<Outcome> {
    let (client, _) = substrate(workspace)?;
    let vm = one(workspace, &client)?;
    vm.exec(&["/bin/busybox", "sh", "-c", WRITES])?;
    let samples = take_turns(runs, milliseconds, || fork(&client, &vm).map(|(_, took)| took), None)?;
    let accelerator = vm.accelerator;
    vm.remove()?;
    Ok(Outcome::from((samples, accelerator)).with([("written_mib", WRITTEN_MIB)]))
}

/// What a process takes of the machine's memory, with its share of what it has in common with others, in MiB.
fn pss(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

pub(crate) fn clone_pss(workspace: &Workspace) -> Result<Outcome> {
    let (client, _) = substrate(workspace)?;
    let vms = vms(workspace, &client, MANY)?;
    let all = || vms.iter().map(|vm| pss(vm.pid)).collect::<Result<Vec<f64>>>();
    let mut before = all()?;
    before.sort_by(f64::total_cmp);
    for vm in &vms {
        vm.exec(&TRUE)?;
    }
    let samples = Samples { ours: all()?, theirs: Vec::new() };
    let accelerator = vms.first().context("no VM")?.accelerator;
    vms.iter().try_for_each(Vm::remove)?;
    Ok(Outcome::from((samples, accelerator)).with([("before_mib", before[MANY / 2])]))
}

pub(crate) fn size(workspace: &Workspace) -> Result<Outcome> {
    let (_, view) = substrate(workspace)?;
    let docked = view.docked.context("it is not docked")?;
    let mib = |size: ByteSize| size.bytes() as f64 / f64::from(1 << 20);
    let samples = Samples { ours: vec![mib(docked.memory)], theirs: Vec::new() };
    let more = [("stored_mib", mib(docked.stored)), ("devices_kib", docked.devices.bytes() as f64 / 1024.0)];
    Ok(Outcome::from((samples, docked.compatibility.accelerator)).with(more))
}

/// Which half of parking is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Park,
    Unpark,
}

pub(crate) fn park(workspace: &Workspace, runs: u32, half: Half) -> Result<Outcome> {
    product::image(workspace, IMAGE)?;
    let client = workspace.server()?;
    let (vm, _) = product::boot(workspace, IMAGE, &Profile::named("worker")?)?;
    let ours = || {
        let begun = Instant::now();
        client.post::<VmView>(&format!("/v1/vms/{}/park", vm.id), &json!({}))?;
        let parked = begun.elapsed();
        let begun = Instant::now();
        client.post::<VmView>(&format!("/v1/vms/{}/start", vm.id), &json!({}))?;
        let view = wait(&client, vm.id)?;
        ensure!(view.observed == Observed::Running, "the VM is {}", view.observed.name());
        Ok(if half == Half::Park { parked } else { begun.elapsed() })
    };
    let samples = take_turns(runs, milliseconds, ours, None)?;
    let accelerator = vm.accelerator;
    vm.remove()?;
    Ok((samples, accelerator).into())
}

pub(crate) fn per_second(workspace: &Workspace, runs: u32, from: From) -> Result<Outcome> {
    let (client, _) = substrate(workspace)?;
    let mut accelerator = None;
    let waiting = if from == From::Standby { u32::try_from(MANY)? } else { 0 };
    let ours = || {
        dock(&client, waiting)?;
        let begun = Instant::now();
        let vms = vms(workspace, &client, MANY)?;
        let took = begun.elapsed();
        accelerator = vms.first().map(|vm| vm.accelerator);
        vms.iter().try_for_each(Vm::remove)?;
        Ok(took)
    };
    let rate = |took: Duration| MANY as f64 / took.as_secs_f64();
    let samples = take_turns(runs, rate, ours, None)?;
    Ok((samples, accelerator.context("no VM")?).into())
}
