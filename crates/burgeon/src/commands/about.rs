//! What Burgeon tells of itself: completions, manual pages, schemas.

use std::path::Path;

use burgeon_api::{Error, Result, pipeline, profile::Profile, recipe::Recipe};
use clap::CommandFactory;

use crate::{
    arguments::{Arguments, SchemaName},
    output,
};

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
