//! Disks of VMs.

use burgeon_api::{
    ByteSize, Result,
    disk::{AttachDisk, DetachDisk, DiskChanged, DiskChanges, DiskView, NameSnapshot, ResizeDisk, SnapshotView},
};
use serde_json::json;

use super::{
    Context,
    vm::{now_s, path},
};
use crate::{
    arguments::{DiskCommand, OfDisk},
    client::escape,
    output,
};

pub(super) async fn run(context: &Context, command: DiskCommand) -> Result<u8> {
    match command {
        DiskCommand::Ls(name) => list(context, &name.vm).await,
        DiskCommand::Attach { vm, disk, size, image } => {
            let request = AttachDisk { name: disk, size, image };
            let changed: DiskChanged = context.client()?.post(&disks(&vm), &request).await?;
            let said = changed.device.as_ref().map(|device| format!("the guest has it as {device}"));
            tell(context, &changed, said.as_deref())
        }
        DiskCommand::Detach { vm, disk, force } => {
            let changed = context.client()?.post(&format!("{}/detach", one(&vm, &disk)), &DetachDisk { force }).await?;
            tell(context, &changed, None)
        }
        DiskCommand::Rm { vm, disk } => {
            context.client()?.delete(&one(&vm, &disk)).await?;
            Ok(0)
        }
        DiskCommand::Resize { of, size } => {
            let changed = context.client()?.post(&format!("{}/resize", at(&of)), &ResizeDisk { size }).await?;
            tell(context, &changed, None)
        }
        DiskCommand::Snapshot { of, name } => {
            let request = NameSnapshot { name };
            let changed = context.client()?.post(&format!("{}/snapshots", at(&of)), &request).await?;
            tell(context, &changed, None)
        }
        DiskCommand::Snapshots(name) => snapshots(context, &name.vm).await,
        DiskCommand::Rollback { of, snapshot } => {
            let path = format!("{}/snapshots/{}/rollback", at(&of), escape(&snapshot));
            let changed = context.client()?.post(&path, &json!({})).await?;
            tell(context, &changed, None)
        }
        DiskCommand::RmSnapshot { of, snapshots } => {
            let client = context.client()?;
            for snapshot in snapshots {
                client.delete(&format!("{}/snapshots/{}", at(&of), escape(&snapshot))).await?;
            }
            Ok(0)
        }
        DiskCommand::Diff { of, from, to, extents } => diff(context, &of, &from, to.as_deref(), extents).await,
    }
}

fn disks(vm: &str) -> String {
    format!("{}/disks", path(vm))
}

fn one(vm: &str, disk: &str) -> String {
    format!("{}/{}", disks(vm), escape(disk))
}

fn at(of: &OfDisk) -> String {
    one(&of.vm, &of.disk)
}

fn tell(context: &Context, changed: &DiskChanged, said: Option<&str>) -> Result<u8> {
    if context.json {
        output::json(changed)?;
        return Ok(0);
    }
    said.into_iter().chain(changed.notes.iter().map(String::as_str)).for_each(output::note);
    Ok(0)
}

async fn list(context: &Context, vm: &str) -> Result<u8> {
    let disks: Vec<DiskView> = context.client()?.get(&disks(vm)).await?;
    if context.json {
        output::json(&disks)?;
        return Ok(0);
    }
    let rows = disks.into_iter().map(|disk| {
        let state = if disk.attached { "attached" } else { "detached" };
        let storing = if disk.unstored_layers == 0 { String::new() } else { disk.unstored_layers.to_string() };
        let map = disk.map.map(|map| map.chars().take(12).collect()).unwrap_or_default();
        vec![
            disk.name,
            format!("{:#}", disk.size),
            state.into(),
            format!("{:#}", disk.own),
            storing,
            map,
            disk.snapshots.len().to_string(),
        ]
    });
    output::table(&["disk", "size", "state", "own", "storing", "map", "snapshots"], rows.collect());
    Ok(0)
}

async fn snapshots(context: &Context, vm: &str) -> Result<u8> {
    let disks: Vec<DiskView> = context.client()?.get(&disks(vm)).await?;
    if context.json {
        let all: Vec<_> = disks
            .iter()
            .flat_map(|disk| disk.snapshots.iter().map(|snapshot| json!({"disk": disk.name, "snapshot": snapshot})))
            .collect();
        output::json(&all)?;
        return Ok(0);
    }
    let now = now_s();
    let row = |disk: &str, snapshot: SnapshotView| {
        let map = snapshot.map.map(|map| map.chars().take(12).collect()).unwrap_or_default();
        let age = output::age(now.saturating_sub(snapshot.taken_s));
        let stored = if snapshot.stored { "yes" } else { "not yet" };
        vec![disk.to_string(), snapshot.name, age, format!("{:#}", snapshot.size), stored.into(), map]
    };
    let rows = disks.into_iter().flat_map(|disk| {
        let name = disk.name;
        disk.snapshots.into_iter().map(move |snapshot| row(&name, snapshot)).collect::<Vec<_>>()
    });
    output::table(&["disk", "snapshot", "age", "size", "stored", "map"], rows.collect());
    Ok(0)
}

async fn diff(context: &Context, of: &OfDisk, from: &str, to: Option<&str>, extents: bool) -> Result<u8> {
    let to = to.map(|to| format!("&to={}", escape(to))).unwrap_or_default();
    let changes: DiskChanges = context.client()?.get(&format!("{}/changes?from={}{to}", at(of), escape(from))).await?;
    if context.json {
        output::json(&changes)?;
    } else if extents {
        let rows = changes
            .stretches
            .iter()
            .map(|stretch| vec![stretch.offset.to_string(), format!("{:#}", ByteSize(stretch.length))]);
        output::table(&["offset", "length"], rows.collect());
    } else {
        output::print(&format!("{:#} written, in {} stretches\n", changes.bytes, changes.stretches.len()));
    }
    Ok(0)
}
