//! Leads one run: tells [`burgeon_plan::pipeline::Run`] what happens and does what it answers.
//!
//! After a kill of the control process the next one leads the run again: finished items are in meta
//! and stay finished, the VMs of the run are used as they are, and items that were on their way begin anew.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use burgeon_api::{
    Error, PipelineId, Result, VmId,
    document::Document,
    exec::ExecSpec,
    host::FileRequest,
    path_text,
    pipeline::{FileEntry, ItemHeader, Mode, PipelineView, ReportSpec, RunState},
    vm::{Intent, Observed},
};
use burgeon_plan::pipeline::{Action, Event, ItemResult, Run, Step, StepVm};
use burgeon_store::meta::{PipelineRow, VmRow};
use bytes::Bytes;
use serde_json::{Map, Value};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    input::{self, Found},
    report,
    worker::{self, Answer, Work},
};
use crate::{
    state::{Shared, blocking, now_s},
    transport::{Direct, Transport},
};

/// How often progress is kept and shown.
const KEEP: Duration = Duration::from_millis(250);
/// Items in memory before the input is read further.
const MOST_ITEMS: usize = 50_000;
/// How long the VMs of a run may take to vanish at its end.
const VANISH: Duration = Duration::from_secs(20);

/// What happens, as tasks tell it.
enum Told {
    Ready(StepVm),
    StartFailed(StepVm, String),
    Lost(StepVm, String),
    Answer(StepVm, Answer),
    /// The content of an input file, or why it cannot be read.
    Content {
        vm: StepVm,
        item: u64,
        attempt: u32,
        content: Result<Bytes>,
    },
}

struct Item {
    path: Vec<u8>,
    name: String,
    escaped: bool,
    attrs: Map<String, Value>,
}

struct Worker {
    work: mpsc::Sender<Work>,
    id: watch::Receiver<Option<VmId>>,
    _stop: DropGuard,
}

struct Runner {
    state: Shared,
    row: PipelineRow,
    report: ReportSpec,
    run: Run,
    items: HashMap<u64, Item>,
    next_item: u64,
    workers: HashMap<StepVm, Worker>,
    transport: Box<dyn Transport>,
    tell: mpsc::Sender<Told>,
    finished: Vec<(Vec<u8>, FileEntry)>,
    restored: HashMap<Vec<u8>, String>,
    view: watch::Sender<PipelineView>,
    begun: Instant,
    over: Option<(RunState, Option<Error>)>,
}

/// Leads the run to its end.
pub(super) async fn lead(
    state: &Shared,
    row: PipelineRow,
    view: watch::Sender<PipelineView>,
    cancel: CancellationToken,
) {
    let id = row.view.id;
    let outcome = match Runner::prepare(state, row, view.clone()).await {
        Ok((runner, told)) => runner.lead(told, cancel).await,
        Err(error) => Err(error),
    };
    let mut last = view.borrow().clone();
    if let Err(error) = outcome {
        last.state = RunState::Failed;
        last.error = Some(error);
    }
    remove_vms(state, id).await;
    if let Err(error) = state.meta.keep_progress(last.clone(), Vec::new()).await {
        tracing::error!(run = %id, %error, "the end of the run could not be kept");
    }
    if let Err(error) = state.meta.drop_items(id).await {
        tracing::error!(run = %id, %error, "the run's items stay");
    }
    view.send_replace(last);
}

async fn remove_vms(state: &Shared, id: PipelineId) {
    if let Err(error) = state.meta.remove_vms_of(id).await {
        tracing::error!(run = %id, %error, "the run's VMs could not be marked for removal");
        return;
    }
    state.kick.notify_one();
    let vanished = async {
        loop {
            let looks = state.seen.borrow().looks;
            match state.meta.vms().await {
                Ok(rows) if rows.iter().all(|row| row.pipeline != Some(id)) => return,
                Ok(_) => {}
                Err(_) => return,
            }
            state.kick.notify_one();
            let looked = state.when(|seen| (seen.looks > looks).then_some(Ok(())));
            drop(timeout(Duration::from_millis(200), looked).await);
        }
    };
    if timeout(VANISH, vanished).await.is_err() {
        tracing::warn!(run = %id, "some VMs of the run are still being removed");
    }
}

impl Runner {
    async fn prepare(
        state: &Shared,
        row: PipelineRow,
        view: watch::Sender<PipelineView>,
    ) -> Result<(Runner, mpsc::Receiver<Told>)> {
        let source = &row.request.pipeline;
        let (spec, graph) = burgeon_plan::pipeline::read(&Document::new(&source.file, &source.text))?;
        let begun = Instant::now();
        for step in &graph.steps {
            state.image(step.image.clone()).await?;
        }
        let image_ms = milliseconds(begun.elapsed());
        let restored = state.meta.items(row.view.id).await?;
        let (tell, told) = mpsc::channel(256);
        let mut runner = Runner {
            state: state.clone(),
            report: spec.report,
            // One life for as long as the run lasts: its VMs keep their names across control processes.
            run: Run::new(graph, row.view.id.short(), 1),
            row,
            items: HashMap::new(),
            next_item: 0,
            workers: HashMap::new(),
            transport: Box::new(Direct::default()),
            tell,
            finished: Vec::new(),
            restored: restored.into_iter().map(|(path, entry)| (path, entry.outcome)).collect(),
            view,
            begun,
            over: None,
        };
        runner.row.view.times.image_ms = image_ms;
        runner.row.view.state = RunState::Running;
        // The input is walked anew, by this process.
        runner.row.view.skipped = 0;
        Ok((runner, told))
    }

    async fn lead(mut self, mut told: mpsc::Receiver<Told>, cancel: CancellationToken) -> Result<()> {
        let (found_sender, mut found) = mpsc::channel::<Found>(1024);
        let input = PathBuf::from(&self.row.request.input);
        let mut listing = tokio::task::spawn_blocking(move || {
            input::walk(&input, &mut |entry| found_sender.blocking_send(entry).is_ok())
        });
        let mut listed = false;
        let mut keep_at = Instant::now();
        while self.over.is_none() {
            let wake = self.run.wake_at().map(|ms| self.begun + Duration::from_millis(ms));
            let room = self.items.len() < MOST_ITEMS;
            let mut actions = Vec::new();
            let now = |runner: &Runner| milliseconds(runner.begun.elapsed());
            tokio::select! {
                biased;
                () = cancel.cancelled() => self.run.handle(now(&self), Event::Cancel, &mut actions),
                message = told.recv() => if let Some(message) = message { self.hear(message, &mut actions) },
                entry = found.recv(), if room && !listed => match entry {
                    Some(entry) => self.find(entry, &mut actions),
                    None => {
                        listed = true;
                        let event = match (&mut listing).await {
                            Ok(Ok(())) => Event::Listed,
                            Ok(Err(error)) => Event::Fail { reason: error.to_string() },
                            Err(error) => Event::Fail { reason: format!("list the input: {error}") },
                        };
                        self.run.handle(now(&self), event, &mut actions);
                    }
                },
                () = sleep_until(wake.unwrap_or(keep_at + KEEP).min(keep_at + KEEP)) => {
                    self.run.handle(now(&self), Event::Tick, &mut actions);
                }
            }
            self.carry_out(actions, None);
            if keep_at.elapsed() >= KEEP {
                keep_at = Instant::now();
                self.keep().await?;
            }
        }
        self.workers.clear();
        let (outcome, error) = self.over.take().unwrap_or((RunState::Failed, None));
        let times = self.current_view();
        self.row.view = times;
        if outcome == RunState::Done {
            self.keep().await?;
            let items = self.state.meta.items(self.row.view.id).await?;
            let view = PipelineView { state: RunState::Done, ..self.current_view() };
            let (spec, run_view) = (self.report.clone(), view.clone());
            blocking("write the report", move || report::write(&run_view, &spec, items)).await?;
            self.view.send_modify(|shown| *shown = PipelineView { state: shown.state, ..view.clone() });
            self.row.view = view;
        } else {
            self.keep().await?;
        }
        remove_vms(&self.state, self.row.view.id).await;
        let last = PipelineView { state: outcome, error, ..self.current_view() };
        self.view.send_replace(last);
        Ok(())
    }

    fn current_view(&self) -> PipelineView {
        let shown = &self.row.view;
        let mut times = self.run.times();
        times.image_ms = shown.times.image_ms;
        times.total_ms = milliseconds(self.begun.elapsed());
        PipelineView {
            steps: self.run.view(),
            files: self.run.files(),
            listed: self.run.is_listed(),
            outcomes: self.run.outcomes().clone(),
            times,
            ..shown.clone()
        }
    }

    async fn keep(&mut self) -> Result<()> {
        let view = self.current_view();
        self.view.send_replace(view.clone());
        self.state.meta.keep_progress(view, std::mem::take(&mut self.finished)).await
    }

    fn find(&mut self, entry: Found, actions: &mut Vec<Action>) {
        let (path, event) = match entry {
            Found::Skipped => {
                self.row.view.skipped += 1;
                return;
            }
            Found::File { path, size } => (path, Event::ItemFound { item: self.next_item, size }),
            Found::Unreadable { path, reason } => (path, Event::ItemRefused { item: self.next_item, reason }),
        };
        let item = self.next_item;
        self.next_item += 1;
        let event = match self.restored.remove(&path) {
            Some(outcome) => Event::Restored { item, outcome },
            None => {
                let (name, escaped) = path_text::encode(&path);
                self.items.insert(item, Item { path, name, escaped, attrs: Map::new() });
                event
            }
        };
        self.run.handle(milliseconds(self.begun.elapsed()), event, actions);
    }

    fn hear(&mut self, told: Told, actions: &mut Vec<Action>) {
        let now = milliseconds(self.begun.elapsed());
        match told {
            Told::Ready(vm) => self.run.handle(now, Event::WorkerReady { vm }, actions),
            Told::StartFailed(vm, reason) => self.run.handle(now, Event::WorkerFailedToStart { vm, reason }, actions),
            Told::Lost(vm, reason) => self.run.handle(now, Event::WorkerLost { vm, reason }, actions),
            Told::Content { vm, item, attempt, content } => match content {
                Ok(content) => self.send(vm, item, attempt, content),
                Err(error) => {
                    let event = Event::TryFailed { vm, item, attempt, reason: error.to_string() };
                    self.run.handle(now, event, actions);
                }
            },
            Told::Answer(vm, answer) => {
                let header = &answer.header;
                let result = ItemResult {
                    vm,
                    item: header.item,
                    attempt: header.attempt,
                    route: header.route.clone(),
                    reason: header.reason.clone(),
                    error: header.error.clone(),
                    size: header.size,
                    worked_us: header.work_us,
                    told_vm: header.vm.clone(),
                };
                self.run.handle(now, Event::Result(result), actions);
                let taken = std::mem::take(actions);
                self.carry_out(taken, Some(answer));
            }
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>, mut answer: Option<Answer>) {
        for action in actions {
            match action {
                Action::StartVm { vm, name } => self.start_vm(vm, name),
                Action::StopVm { vm } => self.stop_vm(vm),
                Action::Dispatch { vm, item, step: _, attempt } => self.dispatch(vm, item, attempt),
                Action::Retry { item, step, attempt, charged: _, reason } => {
                    let name = self.items.get(&item).map_or("", |item| item.name.as_str());
                    tracing::info!(item = %path_text::printable(name), step, attempt, %reason, "tried again");
                }
                Action::Accept { item, step: _, next } => {
                    let Some(answer) = answer.take() else { continue };
                    if let Some(about) = self.items.get_mut(&item) {
                        about.attrs.extend(answer.header.attrs);
                    }
                    if next.is_some()
                        && let Err(error) = self.transport.put(item, answer.payload)
                    {
                        tracing::error!(item, %error, "the payload is lost; the item will fail");
                    }
                }
                Action::Refuse { vm, item, attempt, refusal } => {
                    tracing::warn!(vm = %self.run.vm_name(vm), item, attempt, %refusal, "a result does not count");
                }
                Action::Finish { item, outcome, reason, attempt, vms } => {
                    self.transport.forget(item);
                    let Some(about) = self.items.remove(&item) else { continue };
                    let mut attrs = self.report.defaults.clone();
                    attrs.extend(about.attrs);
                    // Keys of the entry itself cannot be taken by a step.
                    for key in ["path", "path_escaped", "outcome", "reason", "attempt", "vms"] {
                        attrs.remove(key);
                    }
                    let entry = FileEntry {
                        path: about.name,
                        path_escaped: about.escaped,
                        outcome,
                        reason,
                        attempt,
                        vms,
                        attrs,
                    };
                    self.finished.push((about.path, entry));
                }
                Action::Done => self.over = Some((RunState::Done, None)),
                Action::RunFailed { reason } => {
                    self.over = Some((RunState::Failed, Some(Error::refused(reason))));
                }
                Action::Cancelled => self.over = Some((RunState::Cancelled, None)),
            }
        }
    }

    fn dispatch(&mut self, vm: StepVm, item: u64, attempt: u32) {
        match self.transport.get(item) {
            Ok(Some(payload)) => self.send(vm, item, attempt, payload),
            Ok(None) => {
                let Some(about) = self.items.get(&item) else { return };
                let (input, path) = (PathBuf::from(&self.row.request.input), about.path.clone());
                let limit = self.run.graph().steps[vm.step].payload_limit;
                let tell = self.tell.clone();
                tokio::spawn(async move {
                    let content =
                        blocking("read the input", move || input::read(&input, &path, limit).map(Bytes::from)).await;
                    // The run may be over.
                    drop(tell.send(Told::Content { vm, item, attempt, content }).await);
                });
            }
            Err(error) => {
                let tell = self.tell.clone();
                tokio::spawn(
                    async move { drop(tell.send(Told::Content { vm, item, attempt, content: Err(error) }).await) },
                );
            }
        }
    }

    fn send(&mut self, vm: StepVm, item: u64, attempt: u32, payload: Bytes) {
        let (Some(worker), Some(about)) = (self.workers.get(&vm), self.items.get(&item)) else { return };
        let header = ItemHeader {
            item,
            attempt,
            name: about.name.clone(),
            attrs: about.attrs.clone(),
            size: payload.len() as u64,
        };
        // The channel has room for the whole window. A VM that is gone is told of by its own task.
        drop(worker.work.try_send(Work { header, payload }));
    }

    fn stop_vm(&mut self, vm: StepVm) {
        let Some(worker) = self.workers.remove(&vm) else { return };
        let id = *worker.id.borrow();
        drop(worker);
        let (state, run) = (self.state.clone(), self.row.view.id);
        tokio::spawn(async move {
            if let Some(id) = id
                && let Err(error) = state.intend(id, Intent::Removed, None).await
            {
                tracing::warn!(%run, vm = %id, %error, "it will be removed at the end of the run");
            }
        });
    }

    fn start_vm(&mut self, vm: StepVm, name: String) {
        let step = self.run.graph().steps[vm.step].clone();
        let (work, receiver) = mpsc::channel(step.window as usize + 1);
        let (id_sender, id) = watch::channel(None);
        let stop = CancellationToken::new();
        self.workers.insert(vm, Worker { work, id, _stop: stop.clone().drop_guard() });
        let start = VmStart {
            state: self.state.clone(),
            run: self.row.view.id,
            directory: PathBuf::from(&self.row.request.pipeline.directory),
            vm,
            name,
            step,
            id: id_sender,
        };
        let tell = self.tell.clone();
        self.state.tasks.spawn(async move {
            tokio::select! {
                () = start.work(receiver, tell) => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// A VM on its way to being a worker.
struct VmStart {
    state: Shared,
    run: PipelineId,
    directory: PathBuf,
    vm: StepVm,
    name: String,
    step: Step,
    id: watch::Sender<Option<VmId>>,
}

impl VmStart {
    async fn work(self, receiver: mpsc::Receiver<Work>, tell: mpsc::Sender<Told>) {
        let id = match self.come_up().await {
            Ok(id) => id,
            Err(error) => {
                drop(tell.send(Told::StartFailed(self.vm, error.to_string())).await);
                return;
            }
        };
        drop(tell.send(Told::Ready(self.vm)).await);
        let (answers, mut answered) = mpsc::channel(64);
        let (vm, forward) = (self.vm, tell.clone());
        let forwarding = async move {
            while let Some(answer) = answered.recv().await {
                if forward.send(Told::Answer(vm, answer)).await.is_err() {
                    return;
                }
            }
        };
        let working = async {
            let outcome =
                worker::run(&self.state.host, id, self.exec(), self.step.payload_limit, receiver, &answers).await;
            drop(answers);
            outcome
        };
        let (outcome, ()) = tokio::join!(working, forwarding);
        if let Err(error) = outcome {
            let reason = self.why(id, &error).await;
            drop(tell.send(Told::Lost(self.vm, reason)).await);
        }
    }

    fn exec(&self) -> ExecSpec {
        let mut argv = self.step.command.clone();
        if self.step.mode == Mode::Each {
            let adapter = ["/run/burgeon/agent", "each", "--"].map(str::to_string);
            argv = adapter.into_iter().chain(argv).collect();
        }
        ExecSpec { argv, env: self.step.env.clone(), cwd: Some("/".into()), ..ExecSpec::default() }
    }

    /// What became of the VM says more than "the session broke off".
    async fn why(&self, id: VmId, error: &Error) -> String {
        for _ in 0..10 {
            match self.state.host.list().await {
                Ok(vms) => match vms.iter().find(|vm| vm.id == id).map(|vm| &vm.observed) {
                    Some(Observed::Stopped { reason } | Observed::Failed { reason }) => return reason.clone(),
                    Some(_) => {}
                    None => return "its VM is gone".to_string(),
                },
                Err(error) => return error.to_string(),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        error.to_string()
    }

    /// The VM of this name, up and with its files: the one that an earlier control process made, or a new one.
    async fn come_up(&self) -> Result<VmId> {
        let (image, profile) = (self.step.image.clone(), self.step.profile.clone());
        let row = VmRow {
            pipeline: Some(self.run),
            ..VmRow::new(VmId::generate(), self.name.clone(), image, profile, now_s())
        };
        let id = match self.state.meta.vm(&self.name).await {
            Ok(left) if left.pipeline == Some(self.run) && left.intent == Intent::Running => left.id,
            _ => self.state.create_vm(row).await?.id,
        };
        self.id.send_replace(Some(id));
        loop {
            let looks = self.state.seen.borrow().looks;
            let view = self.state.view(self.state.meta.vm(&id.to_string()).await?);
            match view.observed {
                Observed::Running => break,
                Observed::Failed { reason } | Observed::Stopped { reason } => {
                    return Err(Error::unavailable(format!("VM {}: {reason}", self.name)));
                }
                _ => {}
            }
            self.state.when(|seen| (seen.looks > looks).then_some(Ok(()))).await?;
        }
        // What an earlier control process had running in it.
        self.state.host.end_sessions(id).await?;
        for file in &self.step.files {
            let path = self.directory.join(&file.from);
            let content =
                tokio::fs::read(&path).await.map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
            if let Some((parent, _)) = file.to.rsplit_once('/').filter(|(parent, _)| !parent.is_empty()) {
                let request = FileRequest::MakeDirectory { path: parent.as_bytes().to_vec(), mode: 0o755 };
                self.state.host.file(id, request).await?;
            }
            self.state
                .host
                .put(id, file.to.clone().into_bytes(), file.mode, &content)
                .await
                .map_err(|error| error.context(format!("put {} into VM {}", file.to, self.name)))?;
        }
        Ok(id)
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
