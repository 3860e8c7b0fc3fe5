//! Measures Burgeon and, run by run beside it, a rival: plain QEMU started by hand with the same kernel,
//! image, devices and accelerator. The product is driven as a user drives it: the `burgeon` program, its
//! HTTP API, a data directory of its own. Only the store and the server of disks are linked in as well: their
//! rivals are the raw mechanisms (hash and compress, pread, SQLite, qemu-img, qemu-nbd).
//!
//! [`workspace`] owns all that must vanish at the end; [`product`] and [`rival`] are the two sides of a VM;
//! [`figures`] says what is measured and how; [`substrates`] measures what goes on from memory;
//! [`store`], [`disk`] and [`catalog`] measure what is linked in;
//! [`report`] computes and prints.
#![forbid(unsafe_code)]

mod catalog;
mod disk;
mod figures;
mod http;
mod material;
mod product;
mod report;
mod rival;
mod store;
mod substrates;
mod workspace;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use crate::{figures::Figure, workspace::Workspace};

/// Measure Burgeon beside plain QEMU and raw mechanisms.
///
/// Figures go to standard output, talk to standard error. With BURGEON_TEST_CACHE set, packages are taken
/// from the data directory that it names, and kept there.
#[derive(Debug, Parser)]
#[command(name = "burgeon-bench", version, max_term_width = 100)]
struct Arguments {
    /// What to measure; everything when absent
    #[arg(value_enum)]
    names: Vec<Figure>,
    /// How often each side runs, after one run that is not counted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How results are shown
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// The program to measure; the one beside this program when absent
    #[arg(long, value_name = "PATH")]
    burgeon: Option<PathBuf>,
    /// Where tiny.toml and debian-minimal.toml are
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../images"))]
    images: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// A worker that was interrupted fails at its next step; longer than this it is not waited for.
const UNWIND: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments).await {
        Ok(code) => code,
        Err(error) => {
            report::talk(&format!("error: {error:#}"));
            ExitCode::from(1)
        }
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode> {
    let program = program(arguments.burgeon.as_deref())?;
    let cache = std::env::var_os("BURGEON_TEST_CACHE").filter(|value| !value.is_empty()).map(PathBuf::from);
    let workspace = Arc::new(Workspace::create(program, &arguments.images, cache)?);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;

    let mut worker = tokio::task::spawn_blocking({
        let workspace = workspace.clone();
        move || measure(&workspace, &arguments)
    });
    let stopped = tokio::select! {
        // A panic arrives here as a JoinError, after its message was printed.
        outcome = &mut worker => Some(outcome.map_err(|_| anyhow!("the bench itself failed")).flatten()),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        _ = hangup.recv() => None,
    };
    if stopped.is_none() {
        report::talk("interrupted: cleaning up");
        workspace.interrupt();
        // It may have been about to start something; what it says of its end is of no interest.
        drop(tokio::time::timeout(UNWIND, worker).await);
    }
    tokio::task::spawn_blocking(move || workspace.clean_up()).await?.context("clean up")?;
    match stopped {
        Some(outcome) => outcome.map(|()| ExitCode::SUCCESS),
        None => Ok(ExitCode::from(130)),
    }
}

fn program(given: Option<&Path>) -> Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_path_buf(),
        None => std::env::current_exe().context("find this program")?.with_file_name("burgeon"),
    };
    ensure!(
        path.is_file(),
        "{} is not there: build it (cargo build --release -p burgeon), or name another with --burgeon PATH",
        path.display()
    );
    Ok(std::path::absolute(path)?)
}

fn measure(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let mut names = arguments.names.clone();
    if names.is_empty() {
        names = Figure::value_variants().to_vec();
    }
    let load = report::load_average();
    let mut results = Vec::new();
    for figure in names {
        report::talk(&format!("{}: {}", figure.name(), figure.what()));
        let result = figures::measure(figure, workspace, arguments.runs)
            .with_context(|| format!("measure {}", figure.name()))?;
        if arguments.output == Format::Json {
            report::print_json(&result)?;
        }
        results.push(result);
    }
    if arguments.output == Format::Table {
        report::print_table(&results, load);
    }
    Ok(())
}
