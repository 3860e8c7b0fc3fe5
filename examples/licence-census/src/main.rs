//! The four steps of the licence census, in one program.
//!
//! `licence-census extract|classify|tally|review` serves the step protocol on standard input and output.
//! `licence-census local DIR` does all four steps on a directory, without any VM, and prints what it found and how
//! long each step took: for trying out rules, and to compare with the pipeline.

#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "a command line program says there what went wrong")]

mod classify;
mod extract;
mod gnu;
mod local;
mod names;
mod passages;
mod step;
mod tally;
mod tokens;

use std::io;
use std::process::ExitCode;

use step::{Item, Outcome};

const USAGE: &str = "usage: licence-census extract|classify|tally|review\n       licence-census local DIR\n";

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap_or("")).collect();
    let done = match words[..] {
        ["extract"] => {
            let mut extract = extract::Extract::new();
            serve(|item| extract.step(item))
        }
        ["classify"] => serve(classify::step),
        ["tally"] => serve(tally::tally),
        ["review"] => serve(tally::review),
        ["local", _] => local::run(args[1].as_ref(), &mut io::stdout().lock()),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("licence-census: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(step: impl FnMut(&Item) -> Outcome) -> io::Result<()> {
    step::serve(io::stdin().lock(), io::stdout().lock(), &step::vm_name(), step)
}
