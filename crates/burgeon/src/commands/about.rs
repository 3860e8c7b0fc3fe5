//! What Burgeon tells of itself: settings, completions, manual pages, schemas.

use std::path::Path;

use burgeon_api::{Error, Result, pipeline, profile::Profile, recipe::Recipe};
use clap::CommandFactory;

use super::Context;
use crate::{
    arguments::{Arguments, SchemaName},
    output,
};

pub(super) fn config(context: &Context) -> Result<u8> {
    let from = |name: &str| if std::env::var_os(name).is_some() { name.to_string() } else { "default".to_string() };
    let data_from =
        if std::env::args().any(|word| word.starts_with("--data")) { "--data".into() } else { from("BURGEON_DATA") };
    let wish = std::env::var("BURGEON_ACCEL").unwrap_or_else(|_| "auto".into());
    let archive = std::env::var("BURGEON_DEBIAN_ARCHIVE").unwrap_or_else(|_| "from this machine's apt".into());
    let log = std::env::var("BURGEON_LOG").unwrap_or_else(|_| "info".into());
    let settings = [
        ("data", context.data.display().to_string(), data_from),
        ("accelerator", wish, from("BURGEON_ACCEL")),
        ("debian archive", archive, from("BURGEON_DEBIAN_ARCHIVE")),
        ("log", log, from("BURGEON_LOG")),
    ];
    if context.json {
        let all: Vec<_> = settings
            .iter()
            .map(|(name, value, from)| serde_json::json!({"name": name, "value": value, "from": from}))
            .collect();
        output::json(&all)?;
    } else {
        output::table(
            &["setting", "value", "from"],
            settings.map(|(name, value, from)| vec![name.to_string(), value, from]).to_vec(),
        );
    }
    Ok(0)
}

pub(super) fn completions(shell: clap_complete::Shell) -> Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "burgeon", &mut text);
    output::print(&String::from_utf8_lossy(&text));
    Ok(0)
}

pub(super) fn man(directory: &Path) -> Result<u8> {
    let failed = |error: std::io::Error| Error::io(format!("write manual pages to {}", directory.display()), &error);
    std::fs::create_dir_all(directory).map_err(failed)?;
    clap_mangen::generate_to(Arguments::command(), directory).map_err(failed)?;
    Ok(0)
}

pub(super) fn schema(what: SchemaName) -> Result<u8> {
    let schema = match what {
        SchemaName::Recipe => schemars::schema_for!(Recipe),
        SchemaName::Pipeline => schemars::schema_for!(pipeline::PipelineSpec),
        SchemaName::Profile => schemars::schema_for!(Profile),
        SchemaName::Report => schemars::schema_for!(pipeline::Report),
        SchemaName::Openapi => {
            output::print(&burgeon_control::openapi());
            return Ok(0);
        }
    };
    output::json(&schema)?;
    Ok(0)
}
