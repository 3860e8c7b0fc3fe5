//! One small file for each noun.

mod about;
mod config;
mod copy;
mod disk;
mod doctor;
mod environment;
mod exec;
mod image;
mod image_remote;
mod image_serve;
mod pipeline;
mod provisions;
mod serve;
mod snapshot;
mod store;
mod substrate;
mod substrate_file;
mod substrate_stat;
mod vm;

use std::path::PathBuf;

use burgeon_api::Result;

use crate::{
    arguments::{Arguments, Command, Format, Global, PipelineCommand, VmCommand},
    client::{Client, default_data},
};

/// What every command may use.
pub(crate) struct Context {
    pub(crate) data: PathBuf,
    pub(crate) data_set_by: Option<&'static str>,
    pub(crate) json: bool,
}

impl Context {
    fn new(global: &Global) -> Result<Context> {
        let data = match &global.data {
            Some(data) => data.clone(),
            None => default_data()?,
        };
        Ok(Context { data, data_set_by: global.data_set_by, json: global.output == Format::Json })
    }

    pub(crate) fn client(&self) -> Result<Client> {
        Client::new(&self.data)
    }
}

/// Runs a command to its exit code.
pub(crate) async fn run(arguments: Arguments) -> Result<u8> {
    let context = Context::new(&arguments.global)?;
    match arguments.command {
        Command::Run(arguments) => pipeline::run(&context, arguments).await,
        Command::Ps(arguments) | Command::Vm(VmCommand::Ls(arguments)) => vm::list(&context, arguments.quiet).await,
        Command::Exec(arguments) | Command::Vm(VmCommand::Exec(arguments)) => exec::exec(&context, arguments).await,
        Command::Shell(arguments) | Command::Vm(VmCommand::Shell(arguments)) => exec::shell(&context, arguments).await,
        Command::Logs(name) | Command::Vm(VmCommand::Logs(name)) => vm::logs(&context, &name.vm).await,
        Command::Fork(arguments) | Command::Vm(VmCommand::Fork(arguments)) => {
            substrate::fork(&context, arguments).await
        }
        Command::Substrate(command) => substrate::run(&context, command).await,
        Command::Vm(VmCommand::Disk(command)) => disk::run(&context, command).await,
        Command::Vm(command) => vm::run(&context, command).await,
        Command::Image(command) => image::run(&context, command).await,
        Command::Pipeline(PipelineCommand::Ls(arguments)) => pipeline::list(&context, arguments.quiet).await,
        Command::Pipeline(PipelineCommand::Show { run }) => pipeline::show(&context, &run).await,
        Command::Pipeline(PipelineCommand::Cancel { run }) => pipeline::cancel(&context, &run).await,
        Command::Store(command) => store::run(&context, command).await,
        Command::Doctor => doctor::run(&context).await,
        Command::Config(_) => config::show(&context).await,
        Command::Serve(arguments) => serve::serve(&context, arguments).await,
        Command::Host => serve::host(&context).await,
        Command::Control(arguments) => serve::control(&context, arguments).await,
        Command::Completions { shell } => about::completions(shell),
        Command::Man { directory } => about::man(&directory),
        Command::Schema { what } => about::schema(what),
    }
}
