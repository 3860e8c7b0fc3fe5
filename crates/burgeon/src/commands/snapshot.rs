//! Snapshots of VMs, with memory.

use burgeon_api::{
    Error, RequestId, Result,
    snapshot::{RollBackVm, SnapshotVm, VmSnapshot},
    vm::VmView,
};

use super::{
    Context,
    vm::{now_s, path},
};
use crate::{client::escape, output};

fn all(vm: &str) -> String {
    format!("{}/snapshots", path(vm))
}

/// The path of a snapshot that is named as VM/NAME.
pub(super) fn named(text: &str) -> Result<String> {
    let unnamed = || {
        Error::invalid(format!("\"{text}\" names no snapshot"))
            .with_hint("write VM/NAME; burgeon vm snapshots VM lists the names")
    };
    let (vm, name) =
        text.split_once('/').filter(|(vm, name)| !vm.is_empty() && !name.is_empty()).ok_or_else(unnamed)?;
    Ok(format!("{}/{}", all(vm), escape(name)))
}

pub(super) async fn take(context: &Context, vm: &str, name: Option<String>) -> Result<u8> {
    let request = SnapshotVm { id: RequestId::generate(), name };
    let snapshot: VmSnapshot = context.client()?.post(&all(vm), &request).await?;
    if context.json {
        output::json(&snapshot)?;
        return Ok(0);
    }
    output::print(&format!("{}\n", snapshot.name));
    let (milliseconds, docked) = (snapshot.docked.captured_us / 1000, &snapshot.docked);
    output::note(&format!(
        "VM {vm} stood still for {milliseconds} ms; {} of memory, {} of it new in the store",
        docked.memory, docked.stored
    ));
    Ok(0)
}

pub(super) async fn list(context: &Context, vm: &str) -> Result<u8> {
    let snapshots: Vec<VmSnapshot> = context.client()?.get(&all(vm)).await?;
    if context.json {
        output::json(&snapshots)?;
        return Ok(0);
    }
    let now = now_s();
    let rows = snapshots
        .iter()
        .map(|snapshot| {
            vec![
                snapshot.name.clone(),
                output::age(now.saturating_sub(snapshot.taken_s)),
                snapshot.docked.memory.to_string(),
                snapshot.docked.stored.to_string(),
                format!("{} ms", snapshot.docked.captured_us / 1000),
                snapshot.disks.join(" "),
            ]
        })
        .collect();
    output::table(&["name", "age", "memory", "stored", "stood still", "disks"], rows);
    Ok(0)
}

pub(super) async fn remove(context: &Context, vm: &str, names: &[String]) -> Result<u8> {
    let client = context.client()?;
    for name in names {
        client.delete(&format!("{}/{}", all(vm), escape(name))).await?;
    }
    Ok(0)
}

pub(super) async fn roll_back(context: &Context, vm: &str, snapshot: Option<String>) -> Result<u8> {
    let request = RollBackVm { id: RequestId::generate(), snapshot };
    let view: VmView = context.client()?.post(&format!("{}/rollback", path(vm)), &request).await?;
    if context.json {
        output::json(&view)?;
    } else {
        output::note(&format!("VM {} has gone on from its snapshot", view.name));
    }
    Ok(0)
}
