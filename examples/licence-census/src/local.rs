//! All four steps on a directory, in this process.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::step::{Item, Outcome};
use crate::{classify, extract, tally};

/// Runs the census on `directory` and writes one line per file, then the counts and times.
///
/// # Errors
/// A directory that cannot be listed, and output that fails. Files that cannot be read are told in their line.
pub(crate) fn run(directory: &Path, output: &mut impl Write) -> io::Result<()> {
    let mut files = Vec::new();
    list(directory, &mut files)?;
    files.sort();
    let mut census = Census::default();
    let mut extract = extract::Extract::new();
    let mut output = io::BufWriter::new(output);
    for path in files {
        let name = path.strip_prefix(directory).unwrap_or(&path).to_string_lossy().into_owned();
        let line = match fs::read(&path) {
            Ok(payload) => census.file(&mut extract, &name, &payload),
            Err(error) => format!("failed\t{error}"),
        };
        writeln!(output, "{name}\t{line}")?;
    }
    for (what, count) in &census.counts {
        writeln!(output, "{count:8}  {what}")?;
    }
    writeln!(output, "{:8}  bytes read, {} handed to classify", census.bytes_in, census.bytes_between)?;
    for (step, time) in &census.times {
        writeln!(output, "{:8.3} s  {step}", time.as_secs_f64())?;
    }
    output.flush()
}

fn list(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[derive(Default)]
struct Census {
    counts: BTreeMap<String, u64>,
    times: BTreeMap<&'static str, Duration>,
    bytes_in: usize,
    bytes_between: usize,
}

impl Census {
    fn file(&mut self, extract: &mut extract::Extract, name: &str, payload: &[u8]) -> String {
        self.bytes_in += payload.len();
        let mut attrs = Map::new();
        let extracted = self.timed("extract", &mut attrs, name, payload, |item| extract.step(item));
        if let Some(error) = extracted.error {
            return format!("failed\t{error}");
        }
        self.bytes_between += extracted.payload.len();
        let classified = self.timed("classify", &mut attrs, name, &extracted.payload, classify::step);
        let last = if classified.route == Some(classify::TALLY) { tally::tally } else { tally::review };
        let result = self.timed("tally, review", &mut attrs, name, &classified.payload, last);
        let licences = attrs.get("licences").cloned().unwrap_or_default();
        for licence in licences.as_array().into_iter().flatten().filter_map(Value::as_str) {
            *self.counts.entry(format!("licence {licence}")).or_default() += 1;
        }
        match (result.reason, attrs.get("family").and_then(Value::as_str)) {
            (Some(reason), _) => {
                let kind = reason.split(':').next().unwrap_or_default();
                *self.counts.entry(format!("review: {kind}")).or_default() += 1;
                format!("reviewed\t{reason}")
            }
            (None, family) => {
                let family = family.unwrap_or_default();
                *self.counts.entry(format!("family {family}")).or_default() += 1;
                format!("tallied\t{family}\t{licences}")
            }
        }
    }

    fn timed(
        &mut self,
        step: &'static str,
        attrs: &mut Map<String, Value>,
        name: &str,
        payload: &[u8],
        work: impl FnOnce(&Item) -> Outcome,
    ) -> Outcome {
        let start = Instant::now();
        let mut outcome = work(&Item { name, attrs, payload });
        *self.times.entry(step).or_default() += start.elapsed();
        attrs.append(&mut outcome.attrs);
        outcome
    }
}
