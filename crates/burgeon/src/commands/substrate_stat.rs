//! `substrate stat`: what a substrate holds, and who shares it.

use burgeon_api::{
    ByteSize, Result,
    substrate::{Part, Share, SubstrateStat, SubstrateUser},
};

use super::{Context, substrate::of};
use crate::output;

pub(super) async fn stat(context: &Context, substrate: &str) -> Result<u8> {
    let stat: SubstrateStat = context.client()?.get(&format!("{}/stat", of(substrate))).await?;
    if context.json {
        output::json(&stat)?;
        return Ok(0);
    }
    output::pairs(&[
        ("in memory", in_memory(&stat)),
        ("in the store", format!("{} beside the image's {}", stat.beside_image, stat.image_stored)),
    ]);
    output::print("\n");
    let mut rows = vec![row("memory", &stat.memory)];
    rows.extend(stat.disks.iter().map(|(name, part)| row(&format!("disk {name}"), part)));
    let devices = stat.devices;
    let whole = Part { size: devices, plain: devices, stored: devices, new: devices, unstored: ByteSize::default() };
    rows.push(row("devices", &whole));
    output::table(&["part", "size", "held", "stored", "new", "not stored yet"], rows);
    if !stat.users.is_empty() {
        output::print("\n");
        let user = |user: &SubstrateUser| {
            let of_share = |tell: fn(&Share) -> String| user.share.as_ref().map(tell).unwrap_or_default();
            vec![
                user.name.clone().unwrap_or_default(),
                user.state.clone(),
                of_share(|share| share.proportional.to_string()),
                of_share(|share| share.own.to_string()),
                of_share(|share| if share.of_held { "yes".into() } else { "no".into() }),
            ]
        };
        output::table(&["vm", "state", "pss", "written", "shares"], stat.users.iter().map(user).collect());
    }
    Ok(0)
}

fn in_memory(stat: &SubstrateStat) -> String {
    let Some(held) = stat.held else { return "not until a VM goes on from it".into() };
    let sharers = || stat.users.iter().filter(|user| user.share.as_ref().is_some_and(|share| share.of_held));
    let waiting = sharers().filter(|user| user.name.is_none()).count();
    format!(
        "{held} of {}, shared by {} VMs and {waiting} QEMUs that wait",
        stat.memory.size,
        sharers().count() - waiting
    )
}

fn row(name: &str, part: &Part) -> Vec<String> {
    let unstored = if part.unstored.bytes() == 0 { String::new() } else { part.unstored.to_string() };
    let Part { size, plain, stored, new, .. } = part;
    vec![name.into(), size.to_string(), plain.to_string(), stored.to_string(), new.to_string(), unstored]
}
