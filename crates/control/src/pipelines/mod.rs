//! Runs of pipelines: those going on in this process, and those of earlier ones.

mod input;
mod report;
mod report_page;
mod runner;
mod worker;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use burgeon_api::{
    Error, PipelineId, Result,
    document::Document,
    http::RunPipeline,
    pipeline::{PipelineView, RunState, StepView, Times},
};
use burgeon_store::meta::{Damaged, PipelineRow};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, now_s};

/// The runs that this process leads. The table is only looked into, never held across a wait.
#[derive(Default)]
pub(crate) struct Pipelines {
    live: Mutex<HashMap<PipelineId, Live>>,
}

struct Live {
    view: watch::Receiver<PipelineView>,
    cancel: CancellationToken,
}

impl Pipelines {
    fn live(&self) -> MutexGuard<'_, HashMap<PipelineId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs that are not over.
    pub(crate) fn active(&self) -> usize {
        self.live().len()
    }

    /// The running view of a run led by this process.
    pub(crate) fn watch(&self, id: PipelineId) -> Option<watch::Receiver<PipelineView>> {
        self.live().get(&id).map(|live| live.view.clone())
    }

    /// Asks a run to end. `false`: it is not going on.
    pub(crate) fn cancel(&self, id: PipelineId) -> bool {
        self.live().get(&id).inspect(|live| live.cancel.cancel()).is_some()
    }
}

/// Checks a new run, records it and begins.
///
/// # Errors
/// The pipeline file's faults with file and line; the input's or the output's.
pub(crate) async fn start(state: &Shared, request: RunPipeline) -> Result<PipelineView> {
    if let Some(view) = find(state, request.id).await? {
        return Ok(view);
    }
    let document = Document::new(&request.pipeline.file, &request.pipeline.text);
    let (_, graph) = burgeon_plan::pipeline::read(&document)?;
    for step in &graph.steps {
        state.image(step.image.clone()).await.map_err(|error| {
            error.context(format!("step \"{}\"", step.name)).with_hint(format!(
                "burgeon image ls shows the images there are; a recipe makes one: burgeon image build images/{}.toml",
                step.image
            ))
        })?;
        crate::state::check_profile(&step.profile).map_err(|error| error.context(format!("step \"{}\"", step.name)))?;
        for file in &step.files {
            let path = Path::new(&request.pipeline.directory).join(&file.from);
            if !path.is_file() {
                return Err(Error::not_found(format!("step \"{}\": there is no file {}", step.name, path.display()))
                    .with_hint(
                        "files are looked for beside the pipeline file; ./x build makes those of the examples",
                    ));
            }
        }
    }
    let (input, output) = (Path::new(&request.input), Path::new(&request.output));
    if !input.is_absolute() || !output.is_absolute() {
        return Err(Error::invalid("input and output are given as absolute paths"));
    }
    let there = std::fs::canonicalize(input)
        .map_err(|error| Error::io(format!("read the input {}", input.display()), &error))?;
    if std::path::absolute(output).is_ok_and(|output| output.starts_with(&there)) {
        return Err(Error::invalid("the output lies inside the input: its files would be work of the next run")
            .with_hint("give another directory with --out"));
    }
    // Better now than after all the work.
    let near = output.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !near.is_dir() || rustix::fs::access(near, rustix::fs::Access::WRITE_OK).is_err() {
        return Err(Error::refused(format!("the output {} cannot be written", output.display()))
            .with_hint("give another directory with --out"));
    }
    let steps = graph
        .steps
        .iter()
        .map(|step| StepView { name: step.name.clone(), vms_wanted: step.vms, ..StepView::default() })
        .collect();
    let view = PipelineView {
        id: request.id,
        name: graph.name.clone(),
        state: RunState::Preparing,
        error: None,
        input: request.input.clone(),
        output: request.output.clone(),
        steps,
        files: 0,
        listed: false,
        skipped: 0,
        outcomes: std::collections::BTreeMap::new(),
        times: Times::default(),
        created_s: now_s(),
    };
    let row = PipelineRow { request, view: view.clone() };
    state.meta.create_pipeline(row.clone()).await?;
    lead(state, row);
    Ok(view)
}

/// Takes up the runs that an earlier control process has left.
///
/// # Errors
/// Meta's.
pub(crate) async fn resume(state: &Shared) -> Result<()> {
    let (rows, damaged) = state.meta.pipelines().await?;
    for row in damaged {
        tracing::error!(run = %row.id, name = %row.name, reason = %row.reason, "a run's row does not read; nobody leads it, and its VMs stay");
    }
    for row in rows {
        if !row.view.state.is_over() {
            tracing::info!(run = %row.view.id, name = %row.view.name, "resumed");
            lead(state, row);
        }
    }
    Ok(())
}

fn lead(state: &Shared, row: PipelineRow) {
    let id = row.view.id;
    let (sender, view) = watch::channel(row.view.clone());
    let cancel = CancellationToken::new();
    let mut live = state.pipelines.live();
    if live.contains_key(&id) {
        return;
    }
    live.insert(id, Live { view, cancel: cancel.clone() });
    drop(live);
    let state = state.clone();
    state.tasks.clone().spawn(async move {
        tokio::select! {
            () = runner::lead(&state, row, sender, cancel) => {}
            // The process leaves: meta says how far the run is, the next process goes on.
            () = state.shutdown.cancelled() => {}
        }
        state.pipelines.live().remove(&id);
    });
}

/// A run by id, from this process or from meta.
///
/// # Errors
/// Meta's.
pub(crate) async fn find(state: &Shared, id: PipelineId) -> Result<Option<PipelineView>> {
    if let Some(view) = state.pipelines.watch(id) {
        return Ok(Some(view.borrow().clone()));
    }
    Ok(all(state).await?.into_iter().find(|view| view.id == id))
}

/// All runs, oldest first.
///
/// # Errors
/// Meta's.
pub(crate) async fn all(state: &Shared) -> Result<Vec<PipelineView>> {
    let (rows, damaged) = state.meta.pipelines().await?;
    let good =
        rows.into_iter().map(|row| state.pipelines.watch(row.view.id).map_or(row.view, |view| view.borrow().clone()));
    Ok(good.chain(damaged.into_iter().map(damaged_view)).collect())
}

/// A run whose row does not read is over: nobody can lead it.
fn damaged_view(row: Damaged) -> PipelineView {
    let reason = format!("the run's row, id {}, does not read: {}", row.id, row.reason);
    PipelineView {
        id: row.id.parse().unwrap_or(PipelineId::NONE),
        name: row.name,
        state: RunState::Failed,
        error: Some(Error::damaged(reason)),
        input: String::new(),
        output: String::new(),
        steps: Vec::new(),
        files: 0,
        listed: false,
        skipped: 0,
        outcomes: std::collections::BTreeMap::new(),
        times: Times::default(),
        created_s: 0,
    }
}
