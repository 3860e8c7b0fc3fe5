//! Progress: bars on a terminal, a plain line now and then elsewhere. Always on standard error.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use burgeon_api::{
    http::Progress,
    path_text::printable,
    pipeline::{PipelineView, StepView},
};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::note;

/// How often a line is printed where there is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

/// The building of an image.
pub(crate) struct BuildProgress {
    bar: ProgressBar,
    phase: String,
    plain: bool,
    begun: Instant,
    phase_begun: Instant,
}

impl BuildProgress {
    pub(crate) fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() },
        );
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar, phase: String::new(), plain, begun: Instant::now(), phase_begun: Instant::now() }
    }

    pub(crate) fn show(&mut self, progress: &Progress) {
        match progress {
            Progress::Step { phase, done, total, bytes } => {
                if *phase != self.phase {
                    self.end_phase();
                    self.phase.clone_from(phase);
                    self.phase_begun = Instant::now();
                    let template = match (*total > 0, *bytes) {
                        (true, true) => "{msg:>10} [{bar:30}] {bytes}/{total_bytes} {elapsed}",
                        (true, false) => "{msg:>10} [{bar:30}] {pos}/{len} {elapsed}",
                        (false, _) => "{msg:>10} {spinner} {elapsed}",
                    };
                    self.bar.set_style(style(template));
                    self.bar.reset();
                    self.bar.set_message(phase.clone());
                }
                if *total > 0 {
                    self.bar.set_length(*total);
                    self.bar.set_position(*done);
                }
            }
            Progress::Note(text) => {
                let text = printable(text);
                if self.plain { note(&text) } else { self.bar.println(text) }
            }
            Progress::Image(_)
            | Progress::Exported(_)
            | Progress::Pushed(_)
            | Progress::Pulled(_)
            | Progress::Differences(_)
            | Progress::Collected(_)
            | Progress::Checked(_)
            | Progress::Failed(_) => {}
        }
    }

    fn end_phase(&mut self) {
        if !self.phase.is_empty() {
            let line = format!("{:>10} {:.1} s", self.phase, self.phase_begun.elapsed().as_secs_f64());
            if self.plain { note(&line) } else { self.bar.println(line) }
        }
    }

    pub(crate) fn finish(mut self) -> Duration {
        self.end_phase();
        self.bar.finish_and_clear();
        self.begun.elapsed()
    }
}

/// A run of a pipeline: a line for each step.
pub(crate) struct RunProgress {
    lines: MultiProgress,
    bars: Vec<ProgressBar>,
    plain: bool,
    last: Option<Instant>,
    begun: Instant,
}

impl RunProgress {
    pub(crate) fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(10) };
        Self {
            lines: MultiProgress::with_draw_target(target),
            bars: Vec::new(),
            plain,
            last: None,
            begun: Instant::now(),
        }
    }

    pub(crate) fn show(&mut self, view: &PipelineView) {
        if self.plain {
            if self.last.is_none_or(|last| last.elapsed() >= PLAIN_EVERY) {
                self.last = Some(Instant::now());
                let steps: Vec<String> = view.steps.iter().map(plain_step).collect();
                note(&format!("{:>4} s  {}", self.begun.elapsed().as_secs(), steps.join("  ")));
            }
            return;
        }
        let width = view.steps.iter().map(|step| step.name.len()).max().unwrap_or(0);
        if self.bars.is_empty() {
            for _ in &view.steps {
                let bar = self.lines.add(ProgressBar::new(1));
                bar.set_style(style("{prefix} [{bar:24}] {msg}"));
                self.bars.push(bar);
            }
        }
        let seconds = self.begun.elapsed().as_secs_f64().max(0.1);
        for (bar, step) in self.bars.iter().zip(&view.steps) {
            bar.set_prefix(format!("{:width$}", step.name));
            bar.set_length(step.items_in.max(1));
            bar.set_position(step.done + step.failed);
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let rate = (step.done + step.failed) as f64 / seconds;
            bar.set_message(format!(
                "in {:>5}  running {:>3}  done {:>5}  failed {}  {:>4.0}/s  VMs {}/{}{}",
                step.items_in,
                step.running,
                step.done,
                step.failed,
                rate,
                step.vms_ready,
                step.vms_wanted,
                if step.vms_lost > 0 { format!(" ({} lost)", step.vms_lost) } else { String::new() }
            ));
        }
    }

    pub(crate) fn finish(self) {
        for bar in &self.bars {
            bar.abandon();
        }
    }
}

fn plain_step(step: &StepView) -> String {
    format!(
        "{}: in {}, running {}, done {}, failed {}, VMs {}/{}",
        step.name, step.items_in, step.running, step.done, step.failed, step.vms_ready, step.vms_wanted
    )
}
