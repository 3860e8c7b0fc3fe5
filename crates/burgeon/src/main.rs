//! The one binary of Burgeon: the command line, and the entry points of its processes.

use std::process::ExitCode;

fn main() -> ExitCode {
    burgeon::main()
}
