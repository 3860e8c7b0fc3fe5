//! Burgeon's side: images by the command line, VMs by the HTTP API.

use std::{
    fs,
    io::{Read, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use burgeon_api::{
    ExecId, VmId,
    exec::{Attach, ExecSpec, Exit, Frame},
    http::CreateVm,
    profile::Profile,
    vm::{Accelerator, Observed, VmView},
};

use crate::{http::Client, report::talk, workspace::Workspace};

/// A VM of Burgeon's. [`Vm::remove`] ends it; what is forgotten is ended with the workspace.
pub(crate) struct Vm {
    client: Client,
    pub(crate) id: VmId,
    pub(crate) pid: u32,
    pub(crate) accelerator: Accelerator,
    pub(crate) directory: PathBuf,
    pub(crate) image: String,
    /// QEMU's program and arguments, as /proc tells them.
    pub(crate) command_line: Vec<String>,
}

/// Where the time of an exec session went, each since its beginning.
pub(crate) struct ExecTimes {
    /// The connection was upgraded.
    pub(crate) upgraded: Duration,
    /// The first frame: the guest had started the command.
    pub(crate) started: Duration,
    /// The exit status was there.
    pub(crate) ended: Duration,
}

/// Builds an image unless it is there.
pub(crate) fn image(workspace: &Workspace, name: &str) -> Result<()> {
    workspace.server()?;
    if !workspace.data().join("images").join(name).is_dir() {
        talk(&format!("  building the image {name}"));
        workspace.burgeon(&["image", "build", &format!("{name}.toml")])?;
        workspace.keep_packages()?;
    }
    Ok(())
}

/// Creates a VM, and tells the time from the first request to the answer that it runs.
pub(crate) fn boot(workspace: &Workspace, image: &str, profile: &Profile) -> Result<(Vm, Duration)> {
    let client = workspace.server()?;
    let id = VmId::generate();
    let request = CreateVm {
        id,
        name: Some("bench".into()),
        image: image.into(),
        profile: profile.clone(),
        life: burgeon_api::life::SetLife::default(),
        provisions: burgeon_api::provisions::Provisions::default(),
    };
    let begun = Instant::now();
    client.post::<VmView>("/v1/vms", &request)?;
    let view: VmView = client.get(&format!("/v1/vms/{id}/wait?for=running"))?;
    let took = begun.elapsed();
    Ok((running(workspace, client, view)?, took))
}

/// A VM that runs, as its view tells.
pub(crate) fn running(workspace: &Workspace, client: Client, view: VmView) -> Result<Vm> {
    let (id, image) = (view.id, view.image);
    ensure!(view.observed == Observed::Running, "the VM is {} {}", view.observed.name(), view.observed.detail());
    let on_host = view.on_host.context("the VM is on no host")?;
    let pid = on_host.pid.context("the VM has no process")?;
    // Arguments may hold anything but NUL, which ends each of them.
    let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).context("read the VM's command line")?;
    let command_line = words.split_terminator('\0').map(str::to_string).collect();
    let text = id.uuid().simple().to_string();
    let directory = workspace.data().join("vms").join(&text[20..]).join("q");
    Ok(Vm { client, id, pid, accelerator: on_host.accelerator, directory, image, command_line })
}

impl Vm {
    pub(crate) fn remove(&self) -> Result<()> {
        self.client.delete(&format!("/v1/vms/{}", self.id))
    }

    /// Runs a command to its end, without input.
    pub(crate) fn exec(&self, argv: &[&str]) -> Result<ExecTimes> {
        let begun = Instant::now();
        let mut connection = self.client.upgrade(&format!("/v1/vms/{}/exec", self.id))?;
        let upgraded = begun.elapsed();
        let spec = ExecSpec { argv: argv.iter().map(ToString::to_string).collect(), ..ExecSpec::default() };
        let attach = Attach { exec: ExecId::generate(), spec, resume: false, stdout_received: 0, stderr_received: 0 };
        let attach = serde_json::to_vec(&attach)?;
        let mut message = u32::try_from(attach.len())?.to_le_bytes().to_vec();
        message.extend(attach);
        Frame::StdinEnd.encode(&mut message);
        connection.get_mut().write_all(&message)?;

        let mut started = None;
        let mut buffer = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let count = connection.read(&mut piece).context("read the session")?;
            ensure!(count > 0, "the session broke off");
            buffer.extend_from_slice(&piece[..count]);
            let started = *started.get_or_insert_with(|| begun.elapsed());
            while let Some((frame, used)) = Frame::decode(&buffer)? {
                buffer.drain(..used);
                match frame {
                    Frame::Exit(Exit::Code { code: 0 }) => {
                        return Ok(ExecTimes { upgraded, started, ended: begun.elapsed() });
                    }
                    Frame::Exit(exit) => bail!("{argv:?}: {exit:?}"),
                    Frame::Failed(error) => return Err(error.into()),
                    _ => {}
                }
            }
        }
    }

    fn file(&self, path: &str) -> String {
        format!("/v1/vms/{}/files?path={path}", self.id)
    }

    /// Writes a file; `path` needs no escaping.
    pub(crate) fn put(&self, path: &str, content: &[u8]) -> Result<Duration> {
        let begun = Instant::now();
        self.client.put(&self.file(path), content)?;
        Ok(begun.elapsed())
    }

    /// Reads a file of the size of `content`; `path` needs no escaping.
    pub(crate) fn get(&self, path: &str, content: &mut [u8]) -> Result<Duration> {
        let begun = Instant::now();
        self.client.get_into(&self.file(path), content)?;
        Ok(begun.elapsed())
    }
}
