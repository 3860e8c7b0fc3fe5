//! `report.html`: one self-contained page, no script needed to read it.

use std::fmt::Write;

use burgeon_api::{
    path_text::printable,
    pipeline::{FileEntry, Report},
};

/// Rows of the file table that a page shows; `report.json` has them all.
const MOST_ROWS: usize = 2000;
/// Bars of one count.
const MOST_BARS: usize = 25;

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f24}
h1{margin:0}h2{margin:2rem 0 .5rem}.sub{color:#57606a}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #d8dee4;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.cards{display:flex;gap:1rem;flex-wrap:wrap;margin:1rem 0}.card{border:1px solid #d8dee4;border-radius:8px;padding:.6rem 1rem}
.card b{display:block;font-size:1.6rem}
.bar{display:grid;grid-template-columns:14rem 1fr 4rem;gap:.6rem;align-items:center;margin:.15rem 0}
.bar i{display:block;height:.9rem;background:#2f81f7;border-radius:3px;min-width:1px}
.bad{color:#b42318}code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th,td,.card{border-color:#30363d}.sub{color:#9198a1}.bad{color:#ff7b72}}
";

pub(super) fn render(report: &Report) -> String {
    let mut page = String::with_capacity(64 << 10);
    match write_page(&mut page, report) {
        Ok(()) => page,
        // Writing to a string does not fail.
        Err(std::fmt::Error) => String::new(),
    }
}

fn write_page(out: &mut String, report: &Report) -> std::fmt::Result {
    let title = escape(&report.pipeline);
    write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style><h1>{title}</h1>\
         <p class=\"sub\">{} files of <code>{}</code>, run {}</p>",
        report.files.len(),
        escape(&report.input),
        report.run
    )?;
    out.push_str("<div class=\"cards\">");
    for (outcome, count) in &report.outcomes {
        let class = if outcome == "failed" { " bad" } else { "" };
        write!(out, "<div class=\"card{class}\"><b>{count}</b>{}</div>", escape(outcome))?;
    }
    let seconds = |milliseconds: u64| format!("{}.{:01} s", milliseconds / 1000, milliseconds % 1000 / 100);
    write!(out, "<div class=\"card\"><b>{}</b>in all</div></div>", seconds(report.times.total_ms))?;

    out.push_str("<h2>Where the time went</h2><table><tr><th>part<th class=\"n\">time<th>what it is</tr>");
    for (part, time, what) in [
        ("image", report.times.image_ms, "finding and checking images (wall time)"),
        ("start", report.times.start_ms, "first VM's start to last VM's readiness (wall time)"),
        ("transfer", report.times.transfer_ms, "items on their way and waiting inside VMs (sum over items)"),
        ("work", report.times.work_ms, "the steps' own work, as the VMs tell it (sum over items)"),
    ] {
        write!(out, "<tr><td>{part}<td class=\"n\">{}<td class=\"sub\">{what}</tr>", seconds(time))?;
    }
    out.push_str(
        "</table><h2>Steps</h2><table><tr><th>step<th class=\"n\">items<th class=\"n\">done<th class=\"n\">failed\
                  <th class=\"n\">retried<th class=\"n\">VMs<th class=\"n\">VMs lost</tr>",
    );
    for step in &report.steps {
        write!(
            out,
            "<tr><td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}</tr>",
            escape(&step.name),
            step.items_in,
            step.done,
            step.failed,
            step.retried,
            step.vms_wanted,
            step.vms_lost
        )?;
    }
    out.push_str("</table>");
    for (key, values) in &report.counts {
        write_bars(out, key, values)?;
    }
    write_files(out, &report.files)
}

fn write_bars(out: &mut String, key: &str, values: &std::collections::BTreeMap<String, u64>) -> std::fmt::Result {
    let mut sorted: Vec<(&String, &u64)> = values.iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    let most = sorted.first().map_or(1, |(_, count)| **count).max(1);
    write!(out, "<h2>{}</h2>", escape(key))?;
    for (value, count) in sorted.iter().take(MOST_BARS) {
        let width = **count * 100 / most;
        write!(
            out,
            "<div class=\"bar\"><span>{}</span><i style=\"width:{width}%\"></i><span>{count}</span></div>",
            escape(value)
        )?;
    }
    if sorted.len() > MOST_BARS {
        write!(out, "<p class=\"sub\">and {} more in report.json</p>", sorted.len() - MOST_BARS)?;
    }
    Ok(())
}

fn write_files(out: &mut String, files: &[FileEntry]) -> std::fmt::Result {
    // What needs a person's eyes comes first.
    let mut order: Vec<&FileEntry> = files.iter().collect();
    order.sort_by_key(|entry| (entry.outcome != "failed", entry.reason.is_none(), &entry.path));
    out.push_str("<h2>Files</h2><table><tr><th>file<th>outcome<th>what was found<th>done by</tr>");
    for entry in order.iter().take(MOST_ROWS) {
        let class = if entry.outcome == "failed" { " class=\"bad\"" } else { "" };
        let mut found: Vec<String> = entry.reason.iter().cloned().collect();
        for (key, value) in &entry.attrs {
            let text = match value {
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Array(values) => values
                    .iter()
                    .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_string))
                    .collect::<Vec<_>>()
                    .join(", "),
                other => other.to_string(),
            };
            if !text.is_empty() {
                found.push(format!("{key}: {text}"));
            }
        }
        let by: Vec<&str> = entry.vms.iter().map(|by| by.vm.as_str()).collect();
        write!(
            out,
            "<tr><td><code>{}</code><td{class}>{}<td>{}<td class=\"sub\">{}</tr>",
            escape(&entry.path),
            escape(&entry.outcome),
            escape(&found.join("; ")),
            escape(&by.join(", "))
        )?;
    }
    out.push_str("</table>");
    if files.len() > MOST_ROWS {
        write!(out, "<p class=\"sub\">and {} more in report.json</p>", files.len() - MOST_ROWS)?;
    }
    Ok(())
}

/// File names and what guests say are not to be trusted with markup.
fn escape(text: &str) -> String {
    printable(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    #[test]
    fn markup_of_guests_stays_text() {
        assert_eq!(super::escape("<b a=\"1\">&\n"), "&lt;b a=&quot;1&quot;&gt;&amp;\\n");
    }
}
