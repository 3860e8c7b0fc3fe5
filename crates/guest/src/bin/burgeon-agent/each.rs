//! `burgeon-agent each`: runs a command once per item of a pipeline (mode `each`).
//!
//! Items come on standard input and results go to standard output as `burgeon_api::pipeline` has them: a line of
//! JSON, then `size` bytes. The command gets the payload on its input; what it prints is the result's
//! payload; the JSON object that it may write to the file `$BURGEON_RESULT` gives `route`, `reason`, `error` and `attrs`.
//! An exit code other than 0 is an error with the last line of what the command wrote to its standard error.

use std::{
    ffi::OsString,
    fs,
    io::{self, BufRead, Read, Write},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus, Stdio},
    time::Instant,
};

use serde_json::{Map, Value};

use crate::system::console;

/// An item's line, without its payload.
const MOST_LINE: u64 = 16 << 20;
/// An item's payload, or a result's.
const MOST_PAYLOAD: u64 = 1 << 30;
const MOST_ERROR: usize = 500;

struct Item {
    item: Value,
    attempt: Value,
    name: String,
    attrs: Value,
    payload: Vec<u8>,
}

/// Works until the input ends.
pub(crate) fn run(command: &[OsString]) -> ExitCode {
    let result_file = PathBuf::from(format!("/tmp/.burgeon-result-{}", std::process::id()));
    let mut input = io::BufReader::with_capacity(65_536, io::stdin().lock());
    let mut output = io::stdout().lock();
    loop {
        let item = match read_item(&mut input) {
            Ok(Some(item)) => item,
            Ok(None) => return ExitCode::SUCCESS,
            Err(error) => {
                console(&format!("each: {error}"));
                return ExitCode::FAILURE;
            }
        };
        let _none_there = fs::remove_file(&result_file);
        let begun = Instant::now();
        let mut outcome = work(command, &item, &result_file);
        let work_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut line = Map::new();
        line.insert("item".into(), item.item);
        line.insert("attempt".into(), item.attempt);
        // Read anew each time: a clone gets its own name while this runs.
        line.insert("vm".into(), rustix::system::uname().nodename().to_string_lossy().into());
        line.insert("work_us".into(), work_us.into());
        let mut payload = Vec::new();
        match outcome.as_mut().map_err(|error| error.clone()).and_then(|printed| {
            payload = std::mem::take(printed);
            merge(&mut line, fs::read(&result_file))
        }) {
            Ok(()) => {}
            Err(error) => {
                line.insert("error".into(), error.into());
                payload.clear();
            }
        }
        line.insert("size".into(), payload.len().into());
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        let written =
            output.write_all(text.as_bytes()).and_then(|()| output.write_all(&payload)).and_then(|()| output.flush());
        if written.is_err() {
            return ExitCode::FAILURE;
        }
        let _none_there = fs::remove_file(&result_file);
    }
}

fn read_item(input: &mut impl BufRead) -> Result<Option<Item>, String> {
    let mut line = Vec::new();
    input.take(MOST_LINE).read_until(b'\n', &mut line).map_err(|error| format!("cannot read an item: {error}"))?;
    if line.is_empty() {
        return Ok(None);
    }
    let mut header: Map<String, Value> =
        serde_json::from_slice(&line).map_err(|error| format!("an item's line is no JSON object: {error}"))?;
    let size = header.get("size").and_then(Value::as_u64).ok_or("an item's line has no size")?;
    if size > MOST_PAYLOAD {
        return Err(format!("an item has {size} bytes; {MOST_PAYLOAD} is the most"));
    }
    let mut payload = Vec::new();
    let got = input.take(size).read_to_end(&mut payload).map_err(|error| format!("cannot read an item: {error}"))?;
    if got as u64 != size {
        return Err(format!("an item of {size} bytes ended after {got}"));
    }
    let mut take = |key: &str| header.remove(key).unwrap_or(Value::Null);
    Ok(Some(Item {
        item: take("item"),
        attempt: take("attempt"),
        name: take("name").as_str().unwrap_or_default().to_string(),
        attrs: take("attrs"),
        payload,
    }))
}

/// Runs the command; gives what it printed, or why it failed.
fn work(command: &[OsString], item: &Item, result_file: &PathBuf) -> Result<Vec<u8>, String> {
    let (program, arguments) = command.split_first().ok_or("no command")?;
    // A variable cannot hold a NUL byte; in a file name there is none.
    let attrs = item.attrs.to_string();
    let mut child = Command::new(program)
        .args(arguments)
        .env("BURGEON_ITEM", item.item.to_string())
        .env("BURGEON_NAME", item.name.replace('\0', ""))
        .env("BURGEON_ATTEMPT", item.attempt.to_string())
        .env("BURGEON_ATTRS", attrs)
        .env("BURGEON_RESULT", result_file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", program.to_string_lossy()))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (printed, complaint) = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A command that does not read all of its input is no failure.
            stdin.map(|mut stdin| stdin.write_all(&item.payload))
        });
        let complaint = scope.spawn(move || stderr.map(pass_errors).unwrap_or_default());
        let mut printed = Vec::new();
        let read = stdout.map_or(Ok(0), |stdout| stdout.take(MOST_PAYLOAD).read_to_end(&mut printed));
        (read.map(|_| printed), complaint.join().unwrap_or_default())
    });
    let status = child.wait().map_err(|error| format!("cannot wait for the command: {error}"))?;
    let printed = printed.map_err(|error| format!("cannot read the command's output: {error}"))?;
    if status.success() { Ok(printed) } else { Err(describe(status, &complaint)) }
}

/// Passes on what the command says on its standard error, and keeps the last line of it.
fn pass_errors(stderr: impl Read) -> String {
    let mut last = String::new();
    let mut reader = io::BufReader::new(stderr);
    let mut line = Vec::new();
    while matches!((&mut reader).take(65_536).read_until(b'\n', &mut line), Ok(count) if count > 0) {
        let _nobody_to_tell = io::stderr().write_all(&line);
        let text = String::from_utf8_lossy(&line);
        if !text.trim().is_empty() {
            last = text.trim().chars().take(MOST_ERROR).collect();
        }
        line.clear();
    }
    last
}

fn describe(status: ExitStatus, complaint: &str) -> String {
    match (complaint, status.code(), status.signal()) {
        ("", Some(code), _) => format!("the command ended with code {code}"),
        ("", None, signal) => format!("the command was killed by signal {}", signal.unwrap_or(0)),
        (complaint, ..) => complaint.to_string(),
    }
}

/// Adds what the command put into its result file, if it made one.
fn merge(line: &mut Map<String, Value>, file: io::Result<Vec<u8>>) -> Result<(), String> {
    let text = match file {
        Ok(text) if !text.trim_ascii().is_empty() => text,
        _ => return Ok(()),
    };
    let mut given: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|error| format!("$BURGEON_RESULT holds no JSON object: {error}"))?;
    for key in ["route", "reason", "error"] {
        match given.remove(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => {
                line.insert(key.into(), text.into());
            }
            Some(_) => return Err(format!("$BURGEON_RESULT: {key} is no text")),
        }
    }
    match given.remove("attrs") {
        None | Some(Value::Null) => Ok(()),
        Some(attrs @ Value::Object(_)) => {
            line.insert("attrs".into(), attrs);
            Ok(())
        }
        Some(_) => Err("$BURGEON_RESULT: attrs is no object".to_string()),
    }
}
