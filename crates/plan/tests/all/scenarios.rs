//! Golden scenarios: each file in `scenarios/` is a pipeline, `---`, and a play of it. A line
//! `@MILLISECONDS EVENT` is told to the run; the indented lines below it are what the run answered.
//!
//! `BLESS=1 cargo test -p burgeon-plan` writes the answers into the files; read the difference before you keep it.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use burgeon_api::document::Document;
use burgeon_plan::pipeline::{Action, Event, ItemResult, Run, StepVm, read};

#[test]
fn scenarios_play_as_written() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/all/scenarios");
    let mut played = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let now = play(&path.display().to_string(), &text);
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, now).unwrap();
        } else {
            assert_eq!(text, now, "{} plays otherwise", path.display());
        }
        played += 1;
    }
    assert!(played >= 9);
}

fn play(file: &str, text: &str) -> String {
    let (pipeline, script) = text.split_once("\n---\n").expect("a pipeline, ---, a script");
    let (_, graph) = read(&Document::new(file, pipeline)).unwrap();
    let mut run = Run::new(graph, "r", 1);
    let mut vms = BTreeMap::new();
    let mut out = format!("{pipeline}\n---\n");
    for line in script.lines().filter(|line| !line.starts_with("  ")) {
        writeln!(out, "{line}").unwrap();
        let Some((now_ms, event)) = line.strip_prefix('@').and_then(|line| line.split_once(' ')) else {
            assert!(line.is_empty() || line.starts_with('#'), "{line}");
            continue;
        };
        let mut actions = Vec::new();
        for event in events(event, &vms) {
            run.handle(now_ms.parse().unwrap(), event, &mut actions);
        }
        for action in &actions {
            if let Action::StartVm { vm, name } = action {
                vms.insert(name.clone(), *vm);
            }
            writeln!(out, "  {}", show(&run, action)).unwrap();
        }
        if event == "view" {
            for step in run.view() {
                writeln!(
                    out,
                    "  {}: in {} waiting {} running {} done {} failed {} retried {} vms {}/{} lost {}",
                    step.name,
                    step.items_in,
                    step.waiting,
                    step.running,
                    step.done,
                    step.failed,
                    step.retried,
                    step.vms_ready,
                    step.vms_wanted,
                    step.vms_lost
                )
                .unwrap();
            }
            let times = run.times();
            writeln!(
                out,
                "  {} files, outcomes {:?}, refused {}, wake {:?}, start {} transfer {} work {}, {}",
                run.files(),
                run.outcomes(),
                run.refused_results(),
                run.wake_at(),
                times.start_ms,
                times.transfer_ms,
                times.work_ms,
                run.state().name()
            )
            .unwrap();
        }
    }
    out
}

fn show(run: &Run, action: &Action) -> String {
    let step_name = |step: &usize| run.graph().steps[*step].name.clone();
    match action {
        Action::StartVm { name, .. } => format!("start {name}"),
        Action::StopVm { vm } => format!("stop {}", run.vm_name(*vm)),
        Action::Dispatch { vm, item, attempt, .. } => format!("dispatch {item}.{attempt} to {}", run.vm_name(*vm)),
        Action::Retry { item, step, attempt, charged, reason } => {
            let charged = if *charged { "charged" } else { "not charged" };
            format!("retry {item}.{attempt} at {} ({charged}): {reason}", step_name(step))
        }
        Action::Accept { item, step, next } => {
            format!("accept {item} of {} for {}", step_name(step), next.as_ref().map_or("the end".into(), step_name))
        }
        Action::Refuse { vm, item, attempt, refusal } => {
            format!("refuse {item}.{attempt} of {}: {refusal}", run.vm_name(*vm))
        }
        Action::Finish { item, outcome, reason, attempt, vms } => {
            let vms: Vec<String> = vms.iter().map(|by| format!("{}.{}", by.vm, by.attempt)).collect();
            let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
            format!("finish {item} {outcome} (attempt {attempt}, by [{}]){reason}", vms.join(" "))
        }
        Action::Done => "done".to_string(),
        Action::RunFailed { reason } => format!("run failed: {reason}"),
        Action::Cancelled => "cancelled".to_string(),
    }
}

fn events(text: &str, vms: &BTreeMap<String, StepVm>) -> Vec<Event> {
    let words: Vec<&str> = text.split(' ').collect();
    let rest = |from: usize| words[from..].join(" ");
    let vm = || *vms.get(words[1]).unwrap_or_else(|| panic!("no VM {}", words[1]));
    let number = |index: usize| words[index].parse::<u64>().unwrap();
    // "7.1" is attempt 1 of item 7.
    let marks = || {
        let (item, attempt) = words[2].split_once('.').unwrap();
        (item.parse::<u64>().unwrap(), attempt.parse::<u32>().unwrap())
    };
    let event = match words[0] {
        "found" => {
            let (first, last) = words[1].split_once("..").unwrap_or((words[1], words[1]));
            let size = words.get(2).map_or(1, |size| size.parse().unwrap());
            let range = first.parse::<u64>().unwrap()..=last.parse().unwrap();
            return range.map(|item| Event::ItemFound { item, size }).collect();
        }
        "refused" => Event::ItemRefused { item: number(1), reason: rest(2) },
        "restored" => Event::Restored { item: number(1), outcome: rest(2) },
        "listed" => Event::Listed,
        "ready" => Event::WorkerReady { vm: vm() },
        "no-start" => Event::WorkerFailedToStart { vm: vm(), reason: rest(2) },
        "lost" => Event::WorkerLost { vm: vm(), reason: rest(2) },
        "try-failed" => {
            let (item, attempt) = marks();
            Event::TryFailed { vm: vm(), item, attempt, reason: rest(3) }
        }
        "result" => {
            let (item, attempt) = marks();
            let value = |key: &str| words.iter().find_map(|word| word.strip_prefix(key)).map(str::to_string);
            Event::Result(ItemResult {
                vm: vm(),
                item,
                attempt,
                route: value("route="),
                reason: value("reason="),
                error: value("error="),
                size: value("size=").map_or(0, |size| size.parse().unwrap()),
                worked_us: value("worked=").map_or(0, |worked| worked.parse().unwrap()),
                told_vm: value("told=").unwrap_or_else(|| words[1].to_string()),
            })
        }
        "tick" => Event::Tick,
        "cancel" => Event::Cancel,
        "fail" => Event::Fail { reason: rest(1) },
        "view" => return Vec::new(),
        other => panic!("no event {other}"),
    };
    vec![event]
}
