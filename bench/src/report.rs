//! Medians, and how they are told: a table for people, a JSON object per line for machines.

use std::{collections::BTreeMap, io::Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// What both sides took in the runs that count.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    pub(crate) ours: Vec<f64>,
    pub(crate) theirs: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sense {
    LessIsBetter,
    MoreIsBetter,
}

/// The accelerator of figures without a VM.
pub(crate) const NO_VM: &str = "none";

/// One figure. The fields' names are what machines read.
#[derive(Debug, Serialize)]
pub(crate) struct Result {
    name: &'static str,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    runs: usize,
    /// Absent where the rival is not installed.
    rival: Option<&'static str>,
    rival_median: Option<f64>,
    ratio: Option<f64>,
    accelerator: &'static str,
    target: &'static str,
    reached: bool,
    /// The load average of the last minute, when the figure was done.
    load: f64,
    /// What else was measured with it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) more: BTreeMap<&'static str, f64>,
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let high = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { high } else { f64::midpoint(sorted[middle - 1], high) })
}

impl Samples {
    /// The median of our side; not a number without any run.
    pub(crate) fn median(&self) -> f64 {
        median(&self.ours).unwrap_or(f64::NAN)
    }

    pub(crate) fn result(
        &self,
        name: &'static str,
        unit: &'static str,
        rival: &'static str,
        accelerator: &'static str,
        sense: Sense,
        (target, ratio_target, median_target): (&'static str, Option<f64>, Option<f64>),
    ) -> Result {
        let ours = self.median();
        let rival_median = median(&self.theirs);
        let ratio = rival_median.map(|theirs| ours / theirs);
        let reaches = |value: f64, target: f64| match sense {
            Sense::LessIsBetter => value <= target,
            Sense::MoreIsBetter => value >= target,
        };
        let by_ratio = ratio_target.is_none_or(|target| ratio.is_some_and(|ratio| reaches(ratio, target)));
        Result {
            name,
            unit,
            median: ours,
            min: self.ours.iter().copied().fold(f64::INFINITY, f64::min),
            max: self.ours.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs: self.ours.len(),
            rival: rival_median.map(|_| rival),
            rival_median,
            ratio,
            accelerator,
            target,
            reached: by_ratio && median_target.is_none_or(|target| reaches(ours, target)),
            load: load_average(),
            more: BTreeMap::new(),
        }
    }
}

/// The load average of the last minute.
pub(crate) fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

/// A line for the user that is no result. Nobody may be listening.
pub(crate) fn talk(text: &str) {
    drop(writeln!(std::io::stderr(), "{text}"));
}

pub(crate) fn print_json(result: &Result) -> anyhow::Result<()> {
    print(&serde_json::to_string(result)?)
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{text}").and_then(|()| out.flush())?)
}

pub(crate) fn print_table(results: &[Result], load_before: f64) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header([
        "figure", "unit", "median", "min", "max", "runs", "rival", "rival's", "ratio", "load", "target", "",
    ]);
    for column in [2, 3, 4, 5, 7, 8, 9] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for result in results {
        table.add_row([
            result.name.to_string(),
            result.unit.to_string(),
            number(result.median),
            number(result.min),
            number(result.max),
            result.runs.to_string(),
            result.rival.unwrap_or("not installed").to_string(),
            result.rival_median.map(number).unwrap_or_default(),
            result.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            format!("{:.1}", result.load),
            result.target.to_string(),
            if result.reached { "reached" } else { "missed" }.to_string(),
        ]);
    }
    let accelerator = results.iter().map(|result| result.accelerator).find(|name| *name != NO_VM).unwrap_or(NO_VM);
    let more: String = results
        .iter()
        .filter(|result| !result.more.is_empty())
        .map(|result| {
            let words: Vec<String> =
                result.more.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
            format!("\n{}: {}", result.name, words.join(", "))
        })
        .collect();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let load_after = load_average();
    // A reader that has left is no error.
    drop(print(&format!(
        "{table}\n{more}\naccelerator {accelerator}, {cpus} CPUs, load average {load_before:.2} before, {load_after:.2} after"
    )));
}

/// About four digits.
fn number(value: f64) -> String {
    match value.abs() {
        small if small < 10.0 => format!("{value:.2}"),
        middle if middle < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(ours: &[f64], theirs: &[f64], sense: Sense, target: (&'static str, Option<f64>, Option<f64>)) -> Result {
        let samples = Samples { ours: ours.to_vec(), theirs: theirs.to_vec() };
        samples.result("figure", "ms", "rival", "tcg", sense, target)
    }

    #[test]
    fn medians_and_targets() {
        let slow = result(&[3.0, 1.0, 2.0], &[1.0, 2.0], Sense::LessIsBetter, ("", Some(1.1), None));
        assert_eq!((slow.median, slow.min, slow.max, slow.runs), (2.0, 1.0, 3.0, 3));
        assert_eq!((slow.rival_median, slow.reached), (Some(1.5), false));
        assert!(result(&[1.6], &[1.5], Sense::LessIsBetter, ("", Some(1.1), None)).reached);
        assert!(result(&[86.0], &[100.0], Sense::MoreIsBetter, ("", Some(0.85), None)).reached);
        assert!(!result(&[84.0], &[100.0], Sense::MoreIsBetter, ("", Some(0.85), None)).reached);
        let alone = result(&[29.0], &[], Sense::LessIsBetter, ("", None, Some(30.0)));
        assert!(alone.reached && alone.rival.is_none() && alone.ratio.is_none());
    }

    #[test]
    fn the_json_has_pinned_names() {
        let mut result = result(&[2.0], &[1.0], Sense::LessIsBetter, ("ratio at most 1.10", Some(1.1), None));
        result.load = 0.5;
        assert_eq!(
            serde_json::to_string(&result).unwrap(),
            "{\"name\":\"figure\",\"unit\":\"ms\",\"median\":2.0,\"min\":2.0,\"max\":2.0,\"runs\":1,\
             \"rival\":\"rival\",\"rival_median\":1.0,\"ratio\":2.0,\"accelerator\":\"tcg\",\
             \"target\":\"ratio at most 1.10\",\"reached\":false,\"load\":0.5}"
        );
    }
}
