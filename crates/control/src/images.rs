//! Making images: long work, told line by line to the client that asked for it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use burgeon_api::{
    ByteSize, Error, ExecId, Result, VmId,
    document::Document,
    exec::{Attach, ExecSpec, Exit, Frame},
    host::{Launch, Request},
    http::{BuildImage, ImportImage, Progress},
    image::{Boot, Image},
    profile::{Init, Profile},
    recipe::Recipe,
    vm::Observed,
};
use burgeon_image::{BuildRequest, GuestJob, GuestOutput, GuestRunner, ImportRequest, Tools};
use burgeon_store::steps::{Step, reached};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use crate::{
    disks::{self, Keeper},
    exec_client::{FrameReader, FrameWriter},
    state::{Shared, now_s},
};

/// Progress on its way to a client. Dropping the receiver cancels the work.
pub(crate) fn build(state: &Shared, request: &BuildImage) -> Result<mpsc::Receiver<Progress>> {
    let document = Document::new(&request.recipe.file, &request.recipe.text);
    // What is wrong with the recipe is an answer, not progress.
    Recipe::read(&document)?;
    let directory = PathBuf::from(&request.recipe.directory);
    let stem = Path::new(&request.recipe.file).file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let lock_path = directory.join(format!("{stem}.lock"));
    let (locked, force) = (request.locked, request.force);
    Ok(run(state, move |state, progress, cancelled| {
        let runner = HostRunner { state: state.clone(), runtime: Handle::current() };
        let request = BuildRequest {
            document,
            recipe_directory: directory,
            lock_path,
            locked,
            force,
            archive: std::env::var("BURGEON_DEBIAN_ARCHIVE").ok(),
            data: state.data_paths(),
            now_s: now_s(),
        };
        let disks = Keeper { store: &state.store, data: &request.data, cancelled };
        let image = burgeon_image::build(&request, &tools(), &runner, &disks, progress, cancelled)?;
        reached(Step::ImagePublished);
        let_go(state);
        Ok(Progress::Image(Box::new(image)))
    }))
}

pub(crate) fn import(state: &Shared, request: ImportImage) -> mpsc::Receiver<Progress> {
    run(state, move |state, progress, cancelled| {
        let request = ImportRequest {
            file: PathBuf::from(request.file),
            name: request.name,
            description: String::new(),
            kernel_of: None,
            size: None,
            max_size: request.max_size,
            platform: request.platform,
            data: state.data_paths(),
            now_s: now_s(),
        };
        let disks = Keeper { store: &state.store, data: &request.data, cancelled };
        let image = burgeon_image::import(&request, &tools(), &disks, progress, cancelled)?;
        reached(Step::ImagePublished);
        let_go(state);
        Ok(Progress::Image(Box::new(image)))
    })
}

fn tools() -> Tools {
    Tools::find(&std::env::var_os("PATH").unwrap_or_default())
}

/// Lets go of disks that images had before. What stays is tried again before the next collection.
pub(crate) fn let_go(state: &Shared) {
    if let Err(error) = Handle::current().block_on(disks::let_go(&state.store, &state.data_paths())) {
        tracing::warn!(%error, "disks of former images are kept for now");
    }
}

type Work = dyn FnOnce(&Shared, &(dyn Fn(Progress) + Sync), &(dyn Fn() -> bool + Sync)) -> Result<Progress> + Send;

/// Runs long work off the runtime's threads, and tells what it does. Its result is the last line.
pub(crate) fn run(
    state: &Shared,
    work: impl FnOnce(&Shared, &(dyn Fn(Progress) + Sync), &(dyn Fn() -> bool + Sync)) -> Result<Progress> + Send + 'static,
) -> mpsc::Receiver<Progress> {
    let work: Box<Work> = Box::new(work);
    let (sender, receiver) = mpsc::channel(256);
    let state = Arc::clone(state);
    state.tasks.clone().spawn_blocking(move || {
        let tell = |progress| {
            // A client that is slow loses steps of a bar, and nothing else.
            drop(sender.try_send(progress));
        };
        let cancelled = || sender.is_closed() || state.shutdown.is_cancelled();
        let last = match work(&state, &tell, &cancelled) {
            Ok(last) => last,
            Err(error) => Progress::Failed(error),
        };
        drop(sender.blocking_send(last));
    });
    receiver
}

/// Runs the builder's scripts in VMs of the host process.
struct HostRunner {
    state: Shared,
    runtime: Handle,
}

impl GuestRunner for HostRunner {
    fn run(&self, job: GuestJob<'_>) -> Result<GuestOutput> {
        let deadline = job.deadline;
        self.runtime.block_on(async {
            timeout(deadline, self.run_job(job)).await.map_err(|_| {
                Error::deadline(format!("the VM that builds the image took longer than {} s", deadline.as_secs()))
            })?
        })
    }
}

/// A VM that meta does not know: it lives as long as this value.
struct TemporaryVm {
    state: Shared,
    id: VmId,
    directory: PathBuf,
}

impl Drop for TemporaryVm {
    fn drop(&mut self) {
        let (state, id, directory) = (self.state.clone(), self.id, self.directory.clone());
        self.state.tasks.spawn(async move {
            if let Err(error) = state.host.remove(id).await {
                tracing::warn!(vm = %id, %error, "the builder's VM is left to the reconcile loop");
            }
            if let Err(error) = std::fs::remove_dir_all(&directory) {
                tracing::debug!(%error, "the builder's directory stays");
            }
            state.temporary.send_modify(|ids| {
                ids.remove(&id);
            });
            state.kick.notify_one();
        });
    }
}

impl HostRunner {
    async fn run_job(&self, job: GuestJob<'_>) -> Result<GuestOutput> {
        let state = &self.state;
        let id = VmId::generate();
        let directory = state.layout.temporary().join(format!("build-{}", id.short()));
        let vm = TemporaryVm { state: state.clone(), id, directory: directory.clone() };
        state.temporary.send_modify(|ids| {
            ids.insert(id);
        });
        std::fs::create_dir_all(&directory).map_err(|error| Error::io("prepare the builder's VM", &error))?;
        for (from, to) in [(job.kernel, Image::KERNEL), (job.initramfs, Image::INITRAMFS), (job.disk, Image::DISK)] {
            std::fs::hard_link(from, directory.join(to))
                .or_else(|_| std::fs::copy(from, directory.join(to)).map(drop))
                .map_err(|error| Error::io(format!("give {} to the builder's VM", from.display()), &error))?;
        }
        let length =
            std::fs::metadata(job.disk).map_err(|error| Error::io("look at the builder's disk", &error))?.len();
        let name = format!("image-build-{}", id.short());
        let mut kernel_parameters = job.kernel_parameters.to_vec();
        // The script works on the disk itself; the agent stays in the initramfs.
        kernel_parameters.push("burgeon.root=".into());
        let image = Image {
            format: Image::FORMAT,
            name: name.clone(),
            description: String::new(),
            boot: Boot::Agent,
            digest: id.uuid().simple().to_string(),
            recipe: String::new(),
            kernel_release: String::new(),
            disk: Some(ByteSize(length)),
            map: None,
            modules: Vec::new(),
            kernel_parameters,
            init: String::new(),
            created_s: now_s(),
            history: Vec::new(),
        };
        let profile = Profile { memory: job.memory, cpus: job.cpus, init: Init::None, ..Profile::default() };
        let launch = Launch {
            keep: burgeon_api::substrate::Keep::default(),
            resize: burgeon_api::vm::Resize::default(),
            id,
            name: name.clone(),
            image,
            image_directory: directory.display().to_string(),
            profile,
            source: None,
            begin: burgeon_api::host::Begin::Boot,
        };
        state.host.launch(launch).await?;
        state.kick.notify_one();
        state
            .when(|seen| match seen.vms.iter().find(|seen| seen.id == id).map(|vm| &vm.observed) {
                Some(Observed::Running) => Some(Ok(())),
                Some(Observed::Failed { reason } | Observed::Stopped { reason }) => {
                    Some(Err(Error::unavailable(format!("the VM that builds the image: {reason}"))))
                }
                _ => None,
            })
            .await?;
        let outcome = self.run_script(id, job).await;
        drop(vm);
        self.forget_initramfs(&name);
        outcome
    }

    /// What the host composed for this VM is of no use to another.
    fn forget_initramfs(&self, name: &str) {
        let Ok(entries) = std::fs::read_dir(self.state.layout.cache().join("initramfs")) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(name)
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                tracing::debug!(%error, "a builder's initramfs stays");
            }
        }
    }

    async fn run_script(&self, vm: VmId, job: GuestJob<'_>) -> Result<GuestOutput> {
        let argv = ["/bin/busybox", "sh", "-c", job.script].map(str::to_string).to_vec();
        let spec = ExecSpec { argv, cwd: Some("/".into()), ..ExecSpec::default() };
        let attach = Attach { exec: ExecId::generate(), spec, resume: false, stdout_received: 0, stderr_received: 0 };
        let stream = self.state.host.stream(Request::Exec { vm, attach: Box::new(attach) }).await?;
        let (read, write) = stream.into_split();
        let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
        writer.send(&Frame::StdinEnd).await?;
        let (mut stdout, mut stderr) = (0, 0);
        loop {
            if (job.cancelled)() {
                return Err(Error::new(burgeon_api::ErrorKind::Cancelled, "cancelled"));
            }
            let frame = match timeout(Duration::from_millis(200), reader.next()).await {
                Ok(frame) => frame?,
                Err(_) => continue,
            };
            match frame {
                Some(Frame::Stdout(data)) => {
                    stdout += data.len() as u64;
                    job.stdout
                        .write_all(&data)
                        .map_err(|error| Error::io("take in what the builder's VM changed", &error))?;
                }
                Some(Frame::Stderr(data)) => {
                    stderr += data.len() as u64;
                    (job.stderr)(&data);
                }
                Some(Frame::StdinReceived(_)) => continue,
                Some(Frame::Exit(exit @ (Exit::Code { .. } | Exit::Signal { .. }))) => {
                    return Ok(GuestOutput { code: exit.code() });
                }
                Some(Frame::Exit(exit)) => return Err(Error::unavailable(format!("the builder's script: {exit:?}"))),
                Some(Frame::Failed(error)) => return Err(error),
                Some(_) => return Err(Error::damaged("the host process sent a frame that only clients send")),
                None => return Err(Error::unavailable("the host process closed the builder's session")),
            }
            writer.send(&Frame::OutputReceived { stdout, stderr }).await?;
        }
    }
}

/// A temporary directory below `tmp` whose process is gone; removed when the server starts.
pub(crate) fn remove_left_over(temporary: &Path) {
    let Ok(entries) = std::fs::read_dir(temporary) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("build-")
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::debug!(%error, "a left-over directory stays");
        }
    }
}
