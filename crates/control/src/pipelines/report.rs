//! The report of a run: `report.json` for programs, `report.html` for people.

use std::{collections::BTreeMap, fs, io::Write, path::Path};

use burgeon_api::{
    Error, Result,
    pipeline::{FileEntry, PipelineView, Report, ReportSpec},
};
use serde_json::Value;

use super::report_page;

/// Writes both files, each as a whole: a reader sees the old one or the new one.
///
/// # Errors
/// The system's reason, with the file's name.
pub(super) fn write(view: &PipelineView, spec: &ReportSpec, items: Vec<(Vec<u8>, FileEntry)>) -> Result<()> {
    let files: Vec<FileEntry> = items.into_iter().map(|(_, entry)| entry).collect();
    let report = Report {
        format: 1,
        pipeline: view.name.clone(),
        run: view.id,
        input: view.input.clone(),
        outcomes: outcomes(&files),
        counts: counts(spec, &files),
        skipped: view.skipped,
        times: view.times.clone(),
        steps: view.steps.clone(),
        files,
    };
    let output = Path::new(&view.output);
    fs::create_dir_all(output).map_err(|error| Error::io(format!("create {}", output.display()), &error))?;
    let json = serde_json::to_vec_pretty(&report).map_err(|error| Error::internal(error.to_string()))?;
    replace(&output.join("report.json"), &json)?;
    replace(&output.join("report.html"), report_page::render(&report).as_bytes())
}

fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut out = fs::File::create(&new)?;
        out.write_all(content)?;
        out.sync_data()?;
        fs::rename(&new, path)
    };
    write().map_err(|error| {
        drop(fs::remove_file(&new));
        Error::io(format!("write {}", path.display()), &error)
    })
}

fn outcomes(files: &[FileEntry]) -> BTreeMap<String, u64> {
    let mut outcomes = BTreeMap::new();
    for entry in files {
        *outcomes.entry(entry.outcome.clone()).or_default() += 1;
    }
    outcomes
}

/// How often each value of the named attributes occurs; the elements of a list count one by one.
fn counts(spec: &ReportSpec, files: &[FileEntry]) -> BTreeMap<String, BTreeMap<String, u64>> {
    let mut counts: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    for key in &spec.count {
        let of_key = counts.entry(key.clone()).or_default();
        for value in files.iter().filter_map(|entry| entry.attrs.get(key)) {
            let values = match value {
                Value::Array(values) => values.as_slice(),
                Value::Null => &[],
                one => std::slice::from_ref(one),
            };
            for value in values {
                let text = value.as_str().map_or_else(|| value.to_string(), ToString::to_string);
                *of_key.entry(text).or_default() += 1;
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_count_by_element() {
        let entry = |licences: Value| FileEntry {
            path: "p".into(),
            path_escaped: false,
            outcome: "tallied".into(),
            reason: None,
            attempt: 1,
            vms: vec![],
            attrs: serde_json::Map::from_iter([("licences".to_string(), licences)]),
        };
        let files = [entry(json!(["MIT", "GPL-2"])), entry(json!(["MIT"])), entry(json!(null)), entry(json!("MIT"))];
        let spec = ReportSpec { count: vec!["licences".into()], ..ReportSpec::default() };
        let counts = counts(&spec, &files);
        assert_eq!(counts["licences"], BTreeMap::from([("MIT".to_string(), 3), ("GPL-2".to_string(), 1)]));
        assert_eq!(outcomes(&files), BTreeMap::from([("tallied".to_string(), 4)]));
    }
}
