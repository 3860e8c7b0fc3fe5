//! Substrates, what goes on from them, and forks.

use std::time::{Duration, Instant};

use burgeon_api::{
    Error, Result, VmId,
    image::ImageView,
    profile::Init,
    receipt::{KeptReceipt, Receipt},
    substrate::{ActivateVms, CreateSubstrate, ForkVm, Forked, Keep, KeepStandbys, Recipe, SubstrateView},
    vm::{Observed, VmView},
};

use super::{
    Context,
    vm::{now_s, path, read_profile, wait_until_up},
};
use crate::{
    arguments::{ForkArguments, SubstrateCommand},
    client::escape,
    output,
};

pub(super) async fn run(context: &Context, command: SubstrateCommand) -> Result<u8> {
    match command {
        SubstrateCommand::Create { name, image, profile, warm, ready, no_wait } => {
            create(context, name, image, &profile, Recipe { warm, ready }, !no_wait).await
        }
        SubstrateCommand::Ls(arguments) => list(context, arguments.quiet).await,
        SubstrateCommand::Show { substrate } => show(context, &substrate).await,
        SubstrateCommand::Stat { substrate } => super::substrate_stat::stat(context, &substrate).await,
        SubstrateCommand::Export { substrate, file, force } => {
            super::substrate_file::export(context, &substrate, &file, force).await
        }
        SubstrateCommand::Import { file, name } => super::substrate_file::import(context, &file, name).await,
        SubstrateCommand::Dock { substrate, count, no_wait } => dock(context, &substrate, count.0, !no_wait).await,
        SubstrateCommand::Rm { substrates } => {
            let client = context.client()?;
            let mut code = 0;
            for substrate in substrates {
                if let Err(error) = client.delete(&of(&substrate)).await {
                    output::fail(&error);
                    code = 1;
                }
            }
            Ok(code)
        }
    }
}

pub(super) fn of(substrate: &str) -> String {
    format!("/v1/substrates/{}", escape(substrate))
}

async fn create(
    context: &Context,
    name: String,
    image: String,
    profile: &str,
    recipe: Recipe,
    wait: bool,
) -> Result<u8> {
    let mut profile = read_profile(profile)?;
    let client = context.client()?;
    let about: ImageView = client.get(&format!("/v1/images/{}", escape(&image))).await?;
    if about.image.is_some_and(|image| image.disk.is_none()) {
        // An image without a disk has no init of its own to start.
        profile.init = Init::None;
    }
    let request = CreateSubstrate { id: VmId::generate(), name, image, profile, recipe };
    let mut view: SubstrateView = client.post("/v1/substrates", &request).await?;
    if wait {
        view = client.get(&format!("{}/wait", of(&view.id.to_string()))).await?;
        if let Observed::Failed { reason } | Observed::Stopped { reason } = &view.observed {
            let error = Error::unavailable(format!("substrate {} was not made: {reason}", view.name));
            // Nothing half-made stays behind.
            client.delete(&of(&view.id.to_string())).await?;
            return Err(error);
        }
    }
    if context.json {
        output::json(&view)?;
    } else {
        output::print(&format!("{}\n", view.name));
    }
    Ok(0)
}

async fn list(context: &Context, quiet: bool) -> Result<u8> {
    let substrates: Vec<SubstrateView> = context.client()?.get("/v1/substrates").await?;
    if context.json {
        output::json(&substrates)?;
    } else if quiet {
        output::print(&substrates.iter().map(|view| format!("{}\n", view.name)).collect::<String>());
    } else {
        let now = now_s();
        let size = |size: Option<burgeon_api::ByteSize>| size.map(|size| size.to_string()).unwrap_or_default();
        let rows = substrates
            .iter()
            .map(|view| {
                let docked = view.docked.as_ref();
                vec![
                    view.name.clone(),
                    view.observed.name().to_string(),
                    view.image.clone(),
                    format!("{:#}", view.profile.memory),
                    size(docked.map(|docked| docked.memory)),
                    size(docked.map(|docked| docked.stored)),
                    view.standbys.waiting.to_string(),
                    view.clones.to_string(),
                    output::age(now.saturating_sub(view.created_s)),
                    view.observed.detail().to_string(),
                ]
            })
            .collect();
        output::table(
            &["name", "state", "image", "memory", "held", "stored", "waiting", "clones", "age", "detail"],
            rows,
        );
    }
    Ok(0)
}

async fn show(context: &Context, substrate: &str) -> Result<u8> {
    let view: SubstrateView = context.client()?.get(&of(substrate)).await?;
    if context.json {
        output::json(&view)?;
        return Ok(0);
    }
    let mut lines = vec![
        ("name", view.name.clone()),
        ("id", view.id.to_string()),
        ("state", format!("{} {}", view.observed.name(), view.observed.detail()).trim_end().to_string()),
        ("image", view.image.clone()),
        ("memory", format!("{:#}", view.profile.memory)),
        ("cpus", view.profile.cpus.to_string()),
        ("warm", view.recipe.warm.clone().unwrap_or_default()),
        ("ready", view.recipe.ready.clone().unwrap_or_default()),
        ("clones", view.clones.to_string()),
        ("QEMUs waiting", standbys(&view)),
    ];
    if let Some(docked) = &view.docked {
        let needs = &docked.compatibility;
        lines.push(("held in memory", docked.memory.to_string()));
        lines.push(("added to the store", docked.stored.to_string()));
        lines.push(("devices", docked.devices.to_string()));
        lines.push(("memory's map", docked.map.clone()));
        lines.push(("captured in", format!("{} ms", docked.captured_us / 1000)));
        lines.push(("needs QEMU", needs.qemu.clone()));
        lines.push(("  program", needs.program.clone()));
        lines.push(("  firmware", needs.firmware.clone()));
        lines.push(("needs accelerator", needs.accelerator.name().to_string()));
        lines.push(("needs machine", needs.machine.clone()));
    }
    output::pairs(&lines);
    Ok(0)
}

fn standbys(view: &SubstrateView) -> String {
    let of = match view.standbys.asked {
        Some(asked) => format!("{} of {asked}", view.standbys.waiting),
        None => format!("{} (as demand has it)", view.standbys.waiting),
    };
    view.standbys.error.as_ref().map_or(of.clone(), |error| format!("{of}; the last one failed: {error}"))
}

/// How long QEMUs may take until they wait, each.
const DOCKED: Duration = Duration::from_secs(30);

async fn dock(context: &Context, substrate: &str, count: Option<u32>, wait: bool) -> Result<u8> {
    let client = context.client()?;
    let mut view: SubstrateView = client.post(&format!("{}/standbys", of(substrate)), &KeepStandbys { count }).await?;
    let wanted = count.filter(|_| wait);
    let mut last = (view.standbys.waiting, Instant::now());
    while let Some(wanted) = wanted.filter(|wanted| *wanted != view.standbys.waiting) {
        if let Some(error) = view.standbys.error {
            let waiting = view.standbys.waiting;
            return Err(error.context(format!("{waiting} of {wanted} QEMUs wait")));
        }
        if view.standbys.waiting != last.0 {
            last = (view.standbys.waiting, Instant::now());
        }
        if last.1.elapsed() > DOCKED {
            return Err(Error::deadline(format!("{} of {wanted} QEMUs wait", last.0)));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        view = client.get(&of(substrate)).await?;
    }
    if context.json {
        output::json(&view)?;
    } else {
        output::note(&format!("{}: {} QEMUs wait", view.name, standbys(&view)));
    }
    Ok(0)
}

/// Ids and names of new VMs.
pub(super) fn new_vms(name: Option<String>, count: u32) -> (Vec<VmId>, Vec<String>) {
    let ids = (0..count).map(|_| VmId::generate()).collect();
    let names = match (name, count) {
        (None, _) => Vec::new(),
        (Some(name), 1) => vec![name],
        (Some(name), count) => (1..=count).map(|number| format!("{name}-{number}")).collect(),
    };
    (ids, names)
}

/// `source`: the path of what they go on from.
pub(super) async fn activate(context: &Context, source: &str, request: ActivateVms, wait: bool) -> Result<u8> {
    let client = context.client()?;
    let mut vms: Vec<VmView> = client.post(&format!("{source}/vms"), &request).await?;
    let mut failed = None;
    if wait {
        for vm in &mut vms {
            match wait_until_up(&client, vm).await {
                Ok(up) => *vm = up,
                Err(error) => failed = Some(error),
            }
        }
    }
    // One result for each; those that came up stay.
    vms.retain(|vm| !wait || vm.observed == Observed::Running);
    if context.json {
        output::json(&vms)?;
    } else {
        output::print(&vms.iter().map(|vm| format!("{}\n", vm.name)).collect::<String>());
    }
    failed.map_or(Ok(0), Err)
}

pub(super) async fn fork(context: &Context, arguments: ForkArguments) -> Result<u8> {
    let ForkArguments { vm, count, name, all_or_nothing, keep_connections, keep_secrets, provide } = arguments;
    let provisions = super::provisions::read(provide)?;
    let (ids, names) = new_vms(name, count);
    let keep = Keep { connections: keep_connections, secrets: keep_secrets };
    let request = ForkVm { ids, names, all_or_nothing, keep, provisions };
    let forked: Forked = context.client()?.post(&format!("{}/fork", path(&vm)), &request).await?;
    if context.json {
        output::json(&forked)?;
    } else {
        let made = forked.children.iter().filter(|child| child.error.is_none());
        output::print(&made.map(|child| format!("{}\n", child.name)).collect::<String>());
        let milliseconds = forked.paused_us / 1000;
        output::note(&format!("VM {vm} stood still for {milliseconds} ms; {} were copied", forked.copied));
    }
    let mut code = 0;
    for error in forked.children.into_iter().filter_map(|child| child.error.map(|error| error.context(child.name))) {
        output::fail(&error);
        code = 1;
    }
    Ok(code)
}

pub(super) async fn receipts(context: &Context, vm: &str) -> Result<u8> {
    let kept: Vec<KeptReceipt> = context.client()?.get(&format!("{}/receipts", path(vm))).await?;
    if context.json {
        output::json(&kept)?;
        return Ok(0);
    }
    let now = now_s();
    let rows = kept
        .into_iter()
        .map(|KeptReceipt { vm, name, receipt }| {
            let age = output::age(now.saturating_sub(receipt.given_s));
            vec![name, vm.short().to_string(), age, receipt.origin, receipt.generation, receipt.boot_id, receipt.sample]
        })
        .collect();
    output::table(&["name", "id", "age", "goes on from", "generation", "boot id", "random bytes"], rows);
    Ok(0)
}

pub(super) async fn receipt(context: &Context, vm: &str) -> Result<u8> {
    let receipt: Receipt = context.client()?.get(&format!("{}/receipt", path(vm))).await?;
    if context.json {
        output::json(&receipt)?;
        return Ok(0);
    }
    let hooks: Vec<String> =
        receipt.hooks.iter().map(|hook| format!("{} ({} ms)", hook.phase, hook.microseconds / 1000)).collect();
    output::pairs(&[
        ("generation", receipt.generation),
        ("goes on from", receipt.origin),
        ("host name", receipt.host_name),
        ("machine id", receipt.machine_id),
        ("boot id", receipt.boot_id),
        ("random bytes", receipt.sample),
        ("clock off by", format!("{} us", receipt.clock_offset_us)),
        ("hardware addresses", receipt.hardware_addresses.join(" ")),
        ("connections ended", receipt.ended_connections.to_string()),
        ("connections kept", receipt.kept_connections.to_string()),
        ("SSH host key", receipt.ssh_host_key.unwrap_or_default()),
        ("hooks", hooks.join(" ")),
    ]);
    Ok(0)
}
