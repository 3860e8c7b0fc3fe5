//! Runs of pipelines.

use std::path::PathBuf;

use burgeon_api::{
    Error, ErrorKind, PipelineId, Result,
    http::{RunPipeline, ServerView},
    pipeline::{PipelineView, RunState},
    vm::Accelerator,
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Duration, Instant, sleep},
};

use super::{Context, image::source, vm::now_s};
use crate::{
    arguments::RunArguments,
    client::{Client, escape},
    output,
    progress::RunProgress,
};

/// How long a run whose server has gone is looked for.
const RECONNECT: Duration = Duration::from_secs(60);

pub(super) async fn run(context: &Context, arguments: RunArguments) -> Result<u8> {
    if arguments.file.is_dir() {
        return Err(Error::invalid(format!("{} is a directory; run takes a pipeline file", arguments.file.display())));
    }
    let pipeline = source(&arguments.file)?;
    let input = std::fs::canonicalize(&arguments.input)
        .map_err(|error| Error::io(format!("read the input {}", arguments.input.display()), &error))?;
    let stem = arguments.file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let out = arguments.out.unwrap_or_else(|| PathBuf::from(format!("{stem}-out")));
    let output = std::path::absolute(&out).map_err(|error| Error::io(format!("find {}", out.display()), &error))?;
    let text = |path: &PathBuf| {
        path.to_str().map(ToString::to_string).ok_or_else(|| Error::invalid(format!("{} is not UTF-8", path.display())))
    };
    let id = PipelineId::generate();
    let request = RunPipeline { id, pipeline, input: text(&input)?, output: text(&output)? };
    let client = context.client()?;
    drop::<PipelineView>(client.post("/v1/pipelines", &request).await?);
    let view = match follow(&client, id).await {
        Err(error) if error.kind == ErrorKind::Cancelled => {
            output::fail(&error);
            return Ok(130);
        }
        view => view?,
    };
    finish(context, &client, &view).await
}

/// While the server is away nobody can be asked to cancel.
fn left_alone(id: PipelineId) -> Error {
    Error::new(ErrorKind::Cancelled, "interrupted while the server was away; the run goes on when it is back")
        .with_hint(format!("burgeon pipeline cancel {}", id.short()))
}

async fn follow(client: &Client, id: PipelineId) -> Result<PipelineView> {
    let watch = |kind| signal(kind).map_err(|error| Error::io("wait for signals", &error));
    let (mut interrupt, mut terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
    let mut progress = RunProgress::new();
    let path = format!("/v1/pipelines/{id}");
    let mut lost_since: Option<Instant> = None;
    let mut cancelled = false;
    loop {
        let watched = format!("{path}/watch");
        let opened = tokio::select! {
            opened = client.lines::<PipelineView>(&watched, None::<&()>) => opened,
            _ = interrupt.recv() => Err(left_alone(id)),
            _ = terminate.recv() => Err(left_alone(id)),
        };
        let mut lines = match opened {
            Ok(lines) => lines,
            Err(error)
                if lost_since.is_none_or(|since| since.elapsed() < RECONNECT)
                    && error.kind == ErrorKind::Unavailable =>
            {
                lost_since.get_or_insert_with(Instant::now);
                sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        loop {
            let met = tokio::select! {
                line = lines.next() => Some(line),
                _ = interrupt.recv() => None,
                _ = terminate.recv() => None,
            };
            match met {
                Some(Ok(Some(view))) => {
                    lost_since = None;
                    progress.show(&view);
                    if view.state.is_over() {
                        progress.finish();
                        return Ok(view);
                    }
                }
                Some(_) => {
                    // The control process is gone; the next one goes on with the run.
                    lost_since.get_or_insert_with(Instant::now);
                    break;
                }
                None if cancelled => {
                    progress.finish();
                    return Err(Error::new(ErrorKind::Cancelled, "interrupted again; the server removes what is left"));
                }
                None => {
                    cancelled = true;
                    output::note("cancelling; interrupt again to leave at once");
                    let (cancel, nothing) = (format!("{path}/cancel"), json!({}));
                    let asked = tokio::select! {
                        asked = client.post::<()>(&cancel, &nothing) => asked,
                        _ = interrupt.recv() => Err(left_alone(id)),
                        _ = terminate.recv() => Err(left_alone(id)),
                    };
                    match asked {
                        Ok(()) => {}
                        // It has just ended; the next line tells how.
                        Err(error) if error.kind == ErrorKind::Conflict => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn finish(context: &Context, client: &Client, view: &PipelineView) -> Result<u8> {
    if context.json {
        output::json(view)?;
    }
    match view.state {
        RunState::Done => {}
        RunState::Cancelled => {
            output::note("cancelled; its VMs are removed, and no report was written");
            return Ok(130);
        }
        _ => {
            return Err(view.error.clone().unwrap_or_else(|| Error::internal("the run failed without a reason")));
        }
    }
    if context.json {
        return Ok(0);
    }
    let outcomes: Vec<String> = view.outcomes.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
    let times = &view.times;
    output::note("");
    output::print(&format!(
        "{} files: {}\n",
        view.files,
        if outcomes.is_empty() { "nothing to do".to_string() } else { outcomes.join(", ") }
    ));
    output::print(&format!(
        "time: {} in all; image {}, start {}; over all items: transfer {}, work {}\n",
        output::time(times.total_ms),
        output::time(times.image_ms),
        output::time(times.start_ms),
        output::time(times.transfer_ms),
        output::time(times.work_ms)
    ));
    let server: ServerView = client.get("/v1/server").await?;
    if server.accelerator == Some(Accelerator::Tcg) {
        output::print(&format!("VMs ran emulated, without KVM: {}\n", server.accelerator_reason));
    }
    let out = std::path::Path::new(&view.output);
    output::print(&format!(
        "report: {}\n        {}\n",
        out.join("report.html").display(),
        out.join("report.json").display()
    ));
    Ok(0)
}

pub(super) async fn list(context: &Context, quiet: bool) -> Result<u8> {
    let runs: Vec<PipelineView> = context.client()?.get("/v1/pipelines").await?;
    if context.json {
        output::json(&runs)?;
    } else if quiet {
        output::print(&runs.iter().map(|view| format!("{}\n", view.id.short())).collect::<String>());
    } else {
        let now = now_s();
        let rows = runs
            .iter()
            .map(|view| {
                let finished: u64 = view.outcomes.values().sum();
                vec![
                    view.id.short(),
                    view.name.clone(),
                    view.state.name().to_string(),
                    format!("{finished}/{}", view.files),
                    output::time(view.times.total_ms),
                    output::age(now.saturating_sub(view.created_s)),
                    view.error.as_ref().map(ToString::to_string).unwrap_or_default(),
                ]
            })
            .collect();
        output::table(&["run", "pipeline", "state", "files", "time", "age", "detail"], rows);
    }
    Ok(0)
}

pub(super) async fn show(context: &Context, run: &str) -> Result<u8> {
    let view: PipelineView = context.client()?.get(&format!("/v1/pipelines/{}", escape(run))).await?;
    if context.json {
        output::json(&view)?;
        return Ok(0);
    }
    output::pairs(&[
        ("run", view.id.to_string()),
        ("pipeline", view.name.clone()),
        ("state", view.state.name().to_string()),
        ("error", view.error.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("input", view.input.clone()),
        ("output", view.output.clone()),
        ("time", output::time(view.times.total_ms)),
    ]);
    output::print("\n");
    let rows = view
        .steps
        .iter()
        .map(|step| {
            let mut row = vec![step.name.clone()];
            row.extend(
                [step.items_in, step.waiting, step.running, step.done, step.failed, step.retried]
                    .map(|n| n.to_string()),
            );
            row.push(format!("{}/{}", step.vms_ready, step.vms_wanted));
            row.push(step.vms_lost.to_string());
            row
        })
        .collect();
    output::table(&["step", "in", "waiting", "running", "done", "failed", "retried", "VMs", "lost"], rows);
    Ok(0)
}

pub(super) async fn cancel(context: &Context, run: &str) -> Result<u8> {
    context.client()?.post::<()>(&format!("/v1/pipelines/{}/cancel", escape(run)), &json!({})).await?;
    Ok(0)
}
