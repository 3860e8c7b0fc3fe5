//! The command line of Burgeon, a client of its HTTP API, and the entry points of the host and control processes.
#![deny(unsafe_code)]

mod arguments;
mod client;
mod commands;
mod output;
mod progress;
mod terminal;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, parser::ValueSource};

pub use arguments::Arguments;

/// Runs the command line to its exit code: 0 done, 1 failed or refused, 2 wrong use; commands that run
/// something in a guest pass on its code.
pub fn main() -> ExitCode {
    let matches = Arguments::command().get_matches();
    let mut arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    arguments.global.data_set_by = match matches.value_source("data") {
        Some(ValueSource::CommandLine) => Some("--data"),
        Some(ValueSource::EnvVariable) => Some("BURGEON_DATA"),
        _ => None,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output::fail(&burgeon_api::Error::io("start", &error)),
    };
    let outcome = runtime.block_on(commands::run(arguments));
    // A read of standard input may still wait in a thread of its own; it must not keep us.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => output::fail(&error),
    }
}
