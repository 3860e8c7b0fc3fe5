//! From a pipeline file to a [`Graph`]: everything that can be refused without touching a machine.
//! Every refusal says the file, the line and what to write instead.

use std::{collections::BTreeMap, time::Duration};

use burgeon_api::{
    ByteSize, Error, Result, TimeSpan,
    document::{Document, Part},
    name, path_text,
    pipeline::{PipelineSpec, StepSpec},
    profile::Profile,
    recipe,
};

use super::graph::{FAILED, Graph, GuestFile, Next, Step};

/// Steps of one pipeline: sets of steps are bits of a `u64`.
pub const MOST_STEPS: usize = 64;
/// Characters of a step's name, so that the names of its VMs stay within the 63 of a host name.
pub const MOST_STEP_NAME: usize = 32;
/// VMs of one step.
pub const MOST_VMS: u32 = 64;
/// Items in one VM at a time.
pub const MOST_WINDOW: u32 = 1024;
/// Tries of an item at one step.
pub const MOST_ATTEMPTS: u32 = 20;
/// Payload of one item: it is held in memory while it is passed on.
pub const MOST_PAYLOAD: ByteSize = ByteSize::gib(1);
/// What a run may hold of payloads at the least.
pub(super) const LEAST_BUDGET: ByteSize = ByteSize::mib(1);
/// Time for one item.
pub const MOST_TIME: TimeSpan = TimeSpan(Duration::from_secs(30 * 86_400));

/// Keys that every entry of the report has of itself.
const REPORT_KEYS: [&str; 6] = ["path", "path_escaped", "outcome", "reason", "attempt", "vms"];

/// Reads a pipeline file and checks it.
///
/// # Errors
/// `Invalid`, with file and line.
pub fn read(document: &Document) -> Result<(PipelineSpec, Graph)> {
    let spec: PipelineSpec = document.parse()?;
    let graph = compile(&spec, document)?;
    Ok((spec, graph))
}

/// Checks a pipeline, and turns names into indices. `document` is the text that `spec` was read from.
///
/// # Errors
/// `Invalid` (or what the profile's look-up says), with file and line.
pub fn compile(spec: &PipelineSpec, document: &Document) -> Result<Graph> {
    if spec.format != PipelineSpec::FORMAT {
        let message =
            format!("format {} is not known; this Burgeon reads format {}", spec.format, PipelineSpec::FORMAT);
        return Err(document.error_at(&["format".into()], message));
    }
    name::check("pipeline", &spec.name).map_err(|error| document.locate(&["name".into()], error))?;
    if spec.payload_budget < LEAST_BUDGET {
        let message = format!("payload_budget {:#} is less than {LEAST_BUDGET:#}", spec.payload_budget);
        return Err(document.error_at(&["payload_budget".into()], message));
    }
    if spec.steps.is_empty() || spec.steps.len() > MOST_STEPS {
        let message = format!("a pipeline has 1 to {MOST_STEPS} steps, not {}", spec.steps.len());
        return Err(document.error_at(&["step".into()], message));
    }
    let mut indices = BTreeMap::new();
    for (index, step) in spec.steps.iter().enumerate() {
        let at = At { document, index };
        name::check("step", &step.name).map_err(|error| document.locate(&at.path(&["name".into()]), error))?;
        if step.name.len() > MOST_STEP_NAME {
            let message = format!("step name \"{}\" is longer than {MOST_STEP_NAME} characters", step.name);
            return Err(at
                .error(&["name".into()], message)
                .with_hint("VMs are named after their step; choose a shorter name"));
        }
        if indices.insert(step.name.as_str(), index).is_some() {
            return Err(at.error(&["name".into()], format!("there are two steps \"{}\"", step.name)));
        }
    }
    let mut steps = Vec::with_capacity(spec.steps.len());
    for (index, step) in spec.steps.iter().enumerate() {
        steps.push(check_step(spec, step, &indices, At { document, index })?);
    }
    let order = order(spec, &steps, document)?;
    check_report(spec, document)?;
    Ok(Graph::new(spec, steps, &order))
}

/// Where a step stands in the file.
#[derive(Clone, Copy)]
struct At<'a> {
    document: &'a Document,
    index: usize,
}

impl At<'_> {
    fn path<'p>(&self, rest: &[Part<'p>]) -> Vec<Part<'p>> {
        [&[Part::Key("step"), Part::Index(self.index)], rest].concat()
    }

    fn error(&self, rest: &[Part<'_>], message: impl Into<String>) -> Error {
        self.document.error_at(&self.path(rest), message)
    }

    fn between(&self, key: &str, value: u32, most: u32) -> Result<()> {
        if (1..=most).contains(&value) {
            return Ok(());
        }
        Err(self.error(&[key.into()], format!("{key} {value} is not between 1 and {most}")))
    }
}

fn check_step(spec: &PipelineSpec, step: &StepSpec, indices: &BTreeMap<&str, usize>, at: At<'_>) -> Result<Step> {
    let Some(image) = step.image.clone().or_else(|| spec.image.clone()) else {
        return Err(at
            .error(&["name".into()], format!("step \"{}\" has no image", step.name))
            .with_hint("give the step an image, or the pipeline one for all its steps"));
    };
    name::check("image", &image).map_err(|error| {
        let step_has_it = at.path(&["image".into()]);
        let path = if step.image.is_some() { step_has_it.as_slice() } else { &[Part::Key("image")] };
        at.document.locate(path, error)
    })?;
    if step.command.first().is_none_or(|program| program.trim().is_empty()) {
        return Err(at.error(&["command".into()], "the command is empty"));
    }
    if let Some(index) = step.command.iter().position(|word| word.contains('\0')) {
        return Err(at.error(&["command".into(), index.into()], "a word of the command holds a NUL byte"));
    }
    at.between("vms", step.vms, MOST_VMS)?;
    at.between("window", step.window, MOST_WINDOW)?;
    at.between("attempts", step.attempts, MOST_ATTEMPTS)?;
    if step.time_limit.0.is_zero() || step.time_limit > MOST_TIME {
        let message = format!("time_limit {} is not between 1ms and {MOST_TIME}", step.time_limit);
        return Err(at.error(&["time_limit".into()], message));
    }
    if step.payload_limit.0 == 0 || step.payload_limit > MOST_PAYLOAD {
        let message = format!("payload_limit {:#} is not between 1 byte and {MOST_PAYLOAD:#}", step.payload_limit);
        return Err(at.error(&["payload_limit".into()], message));
    }
    let profile =
        Profile::named(&step.profile).map_err(|error| at.document.locate(&at.path(&["profile".into()]), error))?;
    check_env(step, at)?;
    Ok(Step {
        name: step.name.clone(),
        image,
        command: step.command.clone(),
        mode: step.mode,
        vms: step.vms,
        window: step.window,
        profile,
        env: step.env.clone(),
        files: check_files(step, at)?,
        next: check_next(step, indices, at)?,
        attempts: step.attempts,
        time_limit: step.time_limit.0,
        payload_limit: step.payload_limit.0,
    })
}

fn check_env(step: &StepSpec, at: At<'_>) -> Result<()> {
    for (key, value) in &step.env {
        let error = |message: String| at.error(&["env".into(), key.as_str().into()], message);
        let shown = path_text::printable(key);
        let good = |c: char| c == '_' || c.is_ascii_alphanumeric();
        if key.is_empty() || !key.chars().all(good) || key.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(error(format!("\"{shown}\" is no name of an environment variable"))
                .with_hint("use letters, digits and \"_\", not beginning with a digit"));
        }
        if key.starts_with("BURGEON_") {
            return Err(error(format!("\"{shown}\" is reserved: Burgeon sets the variables BURGEON_...")));
        }
        if value.contains('\0') {
            return Err(error(format!("the value of \"{shown}\" holds a NUL byte")));
        }
    }
    Ok(())
}

fn check_files(step: &StepSpec, at: At<'_>) -> Result<Vec<GuestFile>> {
    let mut files: Vec<GuestFile> = Vec::with_capacity(step.files.len());
    for (index, file) in step.files.iter().enumerate() {
        let error = |key: &'static str, message: String| at.error(&["file".into(), index.into(), key.into()], message);
        if file.from.is_empty() || file.from.contains('\0') {
            return Err(error("from", "from is no path of a file".into()));
        }
        recipe::check_guest_path(&file.to).map_err(|message| error("to", message))?;
        if files.iter().any(|other| other.to == file.to) {
            return Err(error("to", format!("two files go to \"{}\"", path_text::printable(&file.to))));
        }
        let mode = match &file.mode {
            None => 0o755,
            Some(text) => recipe::octal_mode(text).map_err(|refused| error("mode", refused.message))?,
        };
        files.push(GuestFile { from: file.from.clone(), to: file.to.clone(), mode });
    }
    Ok(files)
}

fn check_next(step: &StepSpec, indices: &BTreeMap<&str, usize>, at: At<'_>) -> Result<Next> {
    let find = |target: &str, path: &[Part<'_>]| {
        indices.get(target).copied().ok_or_else(|| {
            let known = indices.keys().copied().collect::<Vec<_>>().join(", ");
            at.error(path, format!("there is no step \"{}\"", path_text::printable(target)))
                .with_hint(format!("steps: {known}"))
        })
    };
    match (&step.to, step.routes.is_empty(), &step.outcome) {
        (Some(target), true, None) => Ok(Next::Step(find(target, &["to".into()])?)),
        (None, false, None) => {
            let mut routes = BTreeMap::new();
            for (route, target) in &step.routes {
                let path = ["routes".into(), route.as_str().into()];
                if route.is_empty() {
                    return Err(at.error(&path, "a route has no name"));
                }
                routes.insert(route.clone(), find(target, &path)?);
            }
            Ok(Next::Routes(routes))
        }
        (None, true, Some(outcome)) => {
            name::check("outcome", outcome)
                .map_err(|error| at.document.locate(&at.path(&["outcome".into()]), error))?;
            if outcome == FAILED {
                return Err(at
                    .error(&["outcome".into()], format!("outcome \"{FAILED}\" is reserved"))
                    .with_hint("it is for items that did not come through; choose another word"));
            }
            Ok(Next::Outcome(outcome.clone()))
        }
        _ => Err(at
            .error(&["name".into()], format!("step \"{}\" needs exactly one of to, routes and outcome", step.name))
            .with_hint("to = \"STEP\", routes = { WORD = \"STEP\" }, or outcome = \"WORD\"")),
    }
}

/// The steps, each after all that lead to it; the first is the one that nothing leads to.
fn order(spec: &PipelineSpec, steps: &[Step], document: &Document) -> Result<Vec<usize>> {
    // Depth first. `path` is the way from a root to where the search is, with the edges still to follow.
    let mut seen = vec![false; steps.len()];
    let mut leaving = Vec::with_capacity(steps.len());
    for root in 0..steps.len() {
        if seen[root] {
            continue;
        }
        seen[root] = true;
        let mut path: Vec<(usize, Vec<usize>)> = vec![(root, steps[root].next.steps().collect())];
        while let Some((step, edges)) = path.last_mut() {
            let step = *step;
            let Some(next) = edges.pop() else {
                leaving.push(step);
                path.pop();
                continue;
            };
            if let Some(start) = path.iter().position(|(on_path, _)| *on_path == next) {
                let round: Vec<usize> = path[start..].iter().map(|(on_path, _)| *on_path).collect();
                return Err(cycle(spec, steps, &round, document));
            }
            if !seen[next] {
                seen[next] = true;
                path.push((next, steps[next].next.steps().collect()));
            }
        }
    }
    leaving.reverse();
    let mut led_to = vec![false; steps.len()];
    steps.iter().flat_map(|step| step.next.steps()).for_each(|next| led_to[next] = true);
    // Without a cycle there is a step that nothing leads to, and every other step is reached from such a one.
    let mut roots = (0..steps.len()).filter(|&step| !led_to[step]);
    let first = roots.next().unwrap_or(0);
    if let Some(other) = roots.next() {
        let message = format!(
            "no step leads to \"{}\", nor to \"{}\": files can go to one first step only",
            steps[other].name, steps[first].name
        );
        return Err(At { document, index: other }
            .error(&["name".into()], message)
            .with_hint("lead to it with to or routes, or leave it out"));
    }
    Ok(leaving)
}

/// The error for a circle of steps; it points to the edge that goes back to the circle's earliest step.
fn cycle(spec: &PipelineSpec, steps: &[Step], round: &[usize], document: &Document) -> Error {
    let earliest = round.iter().enumerate().min_by_key(|(_, step)| **step).map_or(0, |(position, _)| position);
    let round: Vec<usize> = round[earliest..].iter().chain(&round[..earliest]).copied().collect();
    let (start, last) = (round[0], round[round.len() - 1]);
    let names: Vec<&str> = round.iter().chain([&start]).map(|&step| steps[step].name.as_str()).collect();
    let at = At { document, index: last };
    let message = format!("the steps go round in a circle: {}", names.join(" -> "));
    let route = spec.steps[last].routes.iter().find(|(_, target)| **target == steps[start].name);
    match route {
        Some((route, _)) => at.error(&["routes".into(), route.as_str().into()], message),
        None => at.error(&["to".into()], message),
    }
}

fn check_report(spec: &PipelineSpec, document: &Document) -> Result<()> {
    let reserved = |key: &str| format!("\"{key}\" is a key that every entry of the report has of itself");
    for key in spec.report.defaults.keys() {
        let path = ["report".into(), "defaults".into(), key.as_str().into()];
        if REPORT_KEYS.contains(&key.as_str()) {
            return Err(document.error_at(&path, reserved(key)));
        }
        if key.is_empty() {
            return Err(document.error_at(&path, "an attribute has no name"));
        }
    }
    for (index, key) in spec.report.count.iter().enumerate() {
        let path = ["report".into(), "count".into(), index.into()];
        if key.is_empty() {
            return Err(document.error_at(&path, "an attribute has no name"));
        }
        if REPORT_KEYS.contains(&key.as_str()) {
            return Err(document.error_at(&path, reserved(key)).with_hint("outcomes are counted anyway"));
        }
        if spec.report.count[..index].contains(key) {
            return Err(document.error_at(&path, format!("\"{}\" is counted twice", path_text::printable(key))));
        }
    }
    Ok(())
}
