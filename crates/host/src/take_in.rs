//! Substrates on their way from and to other machines: what control cannot reach of one is put into a directory of its,
//! and of such a directory, and of what the store has, a substrate is made.

use std::{fs, path::Path};

use burgeon_api::{
    Error, Result, VmId,
    host::{LaidOut, TakeIn},
    vm::Observed,
};
use burgeon_qemu::command::file;
use burgeon_store::steps::{Step, reached};

use crate::{disks::Disks, frozen::DEVICES, kept, plug::blocking, record::Record, registry::Registry, start::Context};

/// Puts the devices' state, the kernel and the initramfs of a substrate into a directory.
///
/// # Errors
/// `Conflict` for a VM that is not docked; the file system's.
pub(crate) async fn lay_out(context: &Context, registry: &Registry, vm: VmId, to: String) -> Result<LaidOut> {
    let directory = registry.get(vm).await?.directory;
    let disks = context.disks.clone();
    blocking(move || {
        let record = Record::load(&directory)?;
        if record.docked.is_none() {
            return Err(Error::conflict(format!("{} is not docked", record.launch.name)));
        }
        let to = Path::new(&to);
        kept::share(&directory, to, &record.launch)?;
        let (from, to) = (directory.join(DEVICES), to.join(DEVICES));
        fs::copy(&from, to).map_err(|error| Error::io(format!("copy {}", from.display()), &error))?;
        let attached = disks.attached(vm)?;
        Ok(LaidOut { ports: attached.into_iter().map(|attached| (attached.disk, attached.port)).collect() })
    })
    .await
}

/// Makes a substrate. Asked twice, it makes one.
///
/// # Errors
/// Those of the store and of the file system. Then there is none.
pub(crate) async fn take_in(context: &Context, registry: &Registry, request: TakeIn) -> Result<()> {
    let id = request.launch.id;
    if registry.get(id).await.is_ok() {
        return Ok(());
    }
    let (layout, disks) = (context.layout.clone(), context.disks.clone());
    let made = blocking(move || {
        let directory = layout.vm(id);
        let made = make(&disks, &directory, &request);
        if made.is_err() {
            // The reason is worth more than that this fails too.
            drop(fs::remove_dir_all(&directory));
            disks.forget(id);
        }
        made
    })
    .await?;
    registry.resume(made, Observed::Docked).await
}

fn make(disks: &Disks, directory: &Path, request: &TakeIn) -> Result<Record> {
    let failed = |error: std::io::Error| Error::io("make the substrate's directory", &error);
    let from = Path::new(&request.directory);
    let id = request.launch.id;
    // A host process that finds no more than this has a VM that failed, and that nobody knows.
    let ended = Some(Observed::Failed { reason: "it was not taken in to the end".into() });
    let begun =
        Record { accelerator: request.docked.compatibility.accelerator, ended, ..Record::new(request.launch.clone()) };
    fs::create_dir(directory).map_err(failed)?;
    begun.store(directory)?;
    disks.take_in(id, &request.disks, request.docked.map.parse()?)?;
    let of_qemu = directory.join(file::QEMU_DIRECTORY);
    fs::create_dir(&of_qemu).map_err(failed)?;
    for (name, to) in [(file::KERNEL, of_qemu.as_path()), (file::INITRAMFS, of_qemu.as_path()), (DEVICES, directory)] {
        fs::rename(from.join(name), to.join(name)).map_err(failed)?;
    }
    for path in [&of_qemu, directory] {
        fs::File::open(path).and_then(|directory| directory.sync_all()).map_err(failed)?;
    }
    reached(Step::TakenIn);
    let record = Record { docked: Some(request.docked.clone()), ended: Some(Observed::Docked), ..begun };
    record.store(directory)?;
    Ok(record)
}
