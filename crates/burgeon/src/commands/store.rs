//! The store: what is in it, and whether it is sound.

use std::{path::Path, time::Duration};

use burgeon_api::{
    ByteSize, Error, Result,
    http::{Progress, ScrubStore},
    store::{Checked, Collected, Problem, StoreView},
};
use burgeon_store::places::Elsewhere;
use serde_json::json;

use super::{Context, environment};
use crate::{arguments::StoreCommand, client::Lines, output, progress::BuildProgress};

pub(super) async fn run(context: &Context, command: StoreCommand) -> Result<u8> {
    match command {
        StoreCommand::Stat => stat(context).await,
        StoreCommand::Gc => {
            let lines = context.client()?.lines("/v1/store/gc", Some(&json!({}))).await?;
            let (Progress::Collected(collected), took) = follow(lines).await? else { return Err(strange()) };
            collect(context, &collected, took)
        }
        StoreCommand::Scrub { rate, repair } => {
            let lines = context.client()?.lines("/v1/store/scrub", Some(&ScrubStore { rate, repair })).await?;
            checked(context, lines).await
        }
        StoreCommand::Move => relocate(context).await,
        StoreCommand::Fsck { rebuild: true } => rebuild(context).await,
        StoreCommand::Fsck { rebuild: false } => {
            let lines = context.client()?.lines("/v1/store/fsck", Some(&json!({}))).await?;
            checked(context, lines).await
        }
    }
}

fn strange() -> Error {
    Error::damaged("the server gave a strange answer")
}

/// Shows long work until its result.
pub(super) async fn follow(mut lines: Lines<Progress>) -> Result<(Progress, Duration)> {
    let mut progress = BuildProgress::new();
    loop {
        match lines.next().await? {
            Some(Progress::Failed(error)) => {
                progress.finish();
                return Err(error);
            }
            Some(step @ (Progress::Step { .. } | Progress::Note(_))) => progress.show(&step),
            Some(result) => return Ok((result, progress.finish())),
            None => {
                return Err(Error::unavailable("the server broke off").with_hint("ask again: what is done is kept"));
            }
        }
    }
}

/// Shows a check; the exit code tells whether it found damage.
pub(super) async fn checked(context: &Context, lines: Lines<Progress>) -> Result<u8> {
    let (Progress::Checked(checked), took) = follow(lines).await? else { return Err(strange()) };
    if context.json {
        output::json(&checked)?;
    } else {
        let mut said = Vec::new();
        for (count, what) in [(checked.roots, "roots"), (checked.packs, "packs"), (checked.chunks, "chunks")] {
            if count > 0 {
                said.push(format!("{count} {what}"));
            }
        }
        if checked.bytes > 0 {
            said.push(ByteSize(checked.bytes).to_string());
        }
        let said = if said.is_empty() { "nothing to check".into() } else { said.join(", ") };
        output::note(&format!("{said} ({:.1} s)", took.as_secs_f64()));
        tell(&checked.problems);
        if let Some(next) = next_step(&checked) {
            output::note(&burgeon_api::path_text::printable(&next));
        }
    }
    Ok(u8::from(!checked.problems.is_empty()))
}

fn tell(problems: &[Problem]) {
    for Problem { place, what } in problems {
        output::note(&burgeon_api::path_text::printable(&format!("damaged: {place}: {what}")));
    }
}

/// What to do about damage. A chunk that the catalog knows is not stored anew, however bad its copy is.
fn next_step(checked: &Checked) -> Option<String> {
    let needed_by = if checked.needed_by.is_empty() {
        "no image and no disk needs them".into()
    } else {
        format!("needed by {}", checked.needed_by.join(", "))
    };
    let count = |count: u64| format!("{count} damaged {}", if count == 1 { "copy" } else { "copies" });
    match checked {
        Checked { problems, .. } if problems.is_empty() => None,
        Checked { repaired: 1.., .. } => Some(format!(
            "{} let go of, {needed_by}: build, import or pull these images again, and what is missing is stored anew",
            count(checked.repaired)
        )),
        Checked { repairable: 1.., .. } => Some(format!(
            "{}, {needed_by}: burgeon store scrub --repair lets go of them, so that they can be stored anew",
            count(checked.repairable)
        )),
        _ => Some(
            "burgeon store scrub --repair lets go of damaged copies; build, import or pull the images again, and what is \
             missing is stored anew"
                .into(),
        ),
    }
}

fn collect(context: &Context, collected: &Collected, took: Duration) -> Result<u8> {
    if context.json {
        output::json(collected)?;
    } else {
        output::note(&format!(
            "{} of {} chunks deleted, {} packs dropped, {} written anew, {} joined, {} left-over files removed ({:.1} s)",
            collected.chunks_deleted,
            collected.chunks_seen,
            collected.packs_dropped,
            collected.packs_repacked,
            collected.packs_joined,
            collected.files_removed,
            took.as_secs_f64()
        ));
        if collected.roots_expired + collected.roots_let_go > 0 {
            output::note(&format!(
                "{} roots were over, {} disks belonged to no image any more",
                collected.roots_expired, collected.roots_let_go
            ));
        }
        if collected.caches_removed > 0 {
            output::note(&format!(
                "{} caches of what was read of former images removed, {}",
                collected.caches_removed,
                ByteSize(collected.cache_bytes_freed)
            ));
        }
        let freed = collected.bytes_freed + collected.cache_bytes_freed;
        output::print(&format!("{} freed\n", ByteSize(freed)));
        tell(&collected.problems);
        if !collected.problems.is_empty() {
            output::note("burgeon store scrub tells what needs it");
        }
    }
    Ok(u8::from(!collected.problems.is_empty()))
}

/// Done here, and not by a server: a server has the catalog open, or cannot start without it.
async fn without_server<T: Send + 'static>(
    context: &Context,
    work: impl FnOnce(&Path, &Elsewhere, &(dyn Fn(Progress) + Sync)) -> Result<T> + Send + 'static,
) -> Result<(T, Duration)> {
    let (steps, mut told) = tokio::sync::mpsc::channel(256);
    let data = context.data.clone();
    let elsewhere = environment::elsewhere(&environment::of_process)?;
    let work = tokio::task::spawn_blocking(move || {
        // A bar that is slow loses steps; and who ends this command ends the process, at whatever step it is.
        work(&data, &elsewhere, &|step| drop(steps.try_send(step)))
    });
    let mut progress = BuildProgress::new();
    while let Some(step) = told.recv().await {
        progress.show(&step);
    }
    let took = progress.finish();
    let done = work.await.map_err(|error| Error::internal(format!("work on the store: {error}")))??;
    Ok((done, took))
}

async fn rebuild(context: &Context) -> Result<u8> {
    let (rebuilt, took) =
        without_server(context, |data, elsewhere, tell| burgeon_control::rebuild(data, elsewhere, tell, &|| false))
            .await?;
    if context.json {
        output::json(&rebuilt)?;
    } else {
        output::note(&format!(
            "a new catalog of {} packs with {} chunks, and {} roots ({:.1} s); {} packs lost their index, {} are lost, {} \
             roots are lost",
            rebuilt.packs,
            rebuilt.chunks,
            rebuilt.roots,
            took.as_secs_f64(),
            rebuilt.packs_salvaged,
            rebuilt.packs_lost,
            rebuilt.roots_lost
        ));
        tell(&rebuilt.problems);
        output::note(
            "burgeon store fsck tells whether anything misses chunks; the old catalog is kept beside the new one",
        );
    }
    Ok(u8::from(!rebuilt.problems.is_empty()))
}

async fn relocate(context: &Context) -> Result<u8> {
    let (moved, took) =
        without_server(context, |data, elsewhere, tell| burgeon_control::relocate(data, elsewhere, tell, &|| false))
            .await?;
    if context.json {
        output::json(&moved)?;
    } else {
        output::note(&format!(
            "{} packs, {}, and {} rows ({:.1} s)",
            moved.packs,
            ByteSize(moved.pack_bytes),
            moved.rows,
            took.as_secs_f64()
        ));
        output::note(
            "start servers with the same settings from now on; databases that lay here are kept as *.db.moved",
        );
    }
    Ok(0)
}

async fn stat(context: &Context) -> Result<u8> {
    let view: StoreView = context.client()?.get("/v1/store").await?;
    if context.json {
        output::json(&view)?;
        return Ok(0);
    }
    let roots: Vec<String> = view.roots.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let live = view.live_permille;
    output::pairs(&[
        ("chunks", view.chunks.to_string()),
        ("plain", ByteSize(view.plain_bytes).to_string()),
        ("stored", ByteSize(view.stored_bytes).to_string()),
        ("packs", format!("{} ({} being dropped)", view.packs, view.packs_dropping)),
        ("in packs", ByteSize(view.pack_bytes).to_string()),
        ("in use", format!("{}.{} %", live / 10, live % 10)),
        ("roots", if roots.is_empty() { "none".into() } else { roots.join(", ") }),
        ("cache", ByteSize(view.cache_bytes).to_string()),
    ]);
    Ok(0)
}
