//! Results on standard output, talk on standard error.
#![expect(clippy::print_stderr, reason = "this is where the command line prints")]

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use burgeon_api::{Error, path_text::printable};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// Tells an error and its hint.
pub(crate) fn fail(error: &Error) -> ExitCode {
    let text = error.to_string();
    let lines: Vec<String> = text.lines().map(printable).collect();
    eprintln!("{} {}", paint("error:", "31;1"), lines.join("\n"));
    if let Some(hint) = &error.hint {
        eprintln!("{} {}", paint("hint:", "36"), printable(hint));
    }
    ExitCode::from(1)
}

/// A line for the user that is no result.
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

pub(crate) fn paint(text: &str, code: &str) -> String {
    if std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && std::io::stderr().is_terminal() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_string()
    }
}

/// Writes to standard output. A reader that has left is no error.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

pub(crate) fn json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::internal(error.to_string()))?;
    print(&format!("{text}\n"));
    Ok(())
}

/// A table with a heading, sized to the terminal; plain columns where there is none.
pub(crate) fn table(heading: &[&str], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
        if let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout()) {
            table.set_width(size.ws_col.max(60));
        }
    }
    table.set_header(heading.iter().map(|head| head.to_uppercase()).collect::<Vec<_>>());
    for row in rows {
        table.add_row(row.iter().map(|cell| printable(cell)).collect::<Vec<_>>());
    }
    let text: String = table
        .lines()
        .map(|line| format!("{}\n", line.trim_end().strip_prefix(' ').unwrap_or(&line).trim_end()))
        .collect();
    print(&text);
}

/// Pairs, aligned.
pub(crate) fn pairs(pairs: &[(&str, String)]) {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let text: String = pairs.iter().map(|(name, value)| format!("{name:width$}  {}\n", printable(value))).collect();
    print(&text);
}

/// `3 s`, `4 min`, `2 h`, `5 d`.
pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// `12.3 s`, `45 ms`.
pub(crate) fn time(milliseconds: u64) -> String {
    if milliseconds < 1000 {
        format!("{milliseconds} ms")
    } else {
        format!("{}.{} s", milliseconds / 1000, milliseconds % 1000 / 100)
    }
}
