//! Captured VMs: memory and devices at one instant, for others to go on from.
//!
//! A substrate's lie in memory for as long as this process lives, and in the store and the VM's directory for longer:
//! the memory as a map, the devices as the file `devices`. A fork's instant lives only until its children have it.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use burgeon_api::{
    ByteSize, Error, Result, VmId,
    host::Launch,
    substrate::{Compatibility, Docked},
    vm::Accelerator,
};
use burgeon_qemu::{
    command::{Machine, arguments, memory_length},
    facts::Qemu,
    memory::{Base, Written},
    state::Devices,
};
use burgeon_store::{
    ChunkId,
    catalog::NewRoot,
    chunk_store::{ChunkStore, Writer, ingest},
    cut::Cutter,
    map::Map,
};
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use crate::{
    disks::{Attached, Disks},
    layout::Layout,
    prepare,
    record::Record,
};

/// The format of what is kept; see docs/formats.md.
const FORMAT: u32 = 1;
/// In the VM's directory.
pub(crate) const DEVICES: &str = "devices";
/// One read of a memory in the store.
const STEP: u64 = 1 << 20;

/// A VM at one instant.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) base: Arc<Base>,
    /// What stands above the base.
    pub(crate) written: Option<Written>,
    pub(crate) devices: Devices,
}

/// The substrates that are in memory. Each is brought there once for all who ask at the same time.
#[derive(Default)]
pub(crate) struct Substrates {
    docked: Mutex<HashMap<VmId, Arc<OnceCell<Arc<Frozen>>>>>,
    firmware: OnceLock<(String, String)>,
}

impl Substrates {
    fn cell(&self, id: VmId) -> Arc<OnceCell<Arc<Frozen>>> {
        self.docked.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default().clone()
    }

    pub(crate) fn put(&self, id: VmId, frozen: Arc<Frozen>) {
        let cell = OnceCell::from(frozen);
        self.docked.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(cell));
    }

    /// A substrate, if it is in memory.
    pub(crate) fn at_hand(&self, id: VmId) -> Option<Arc<Frozen>> {
        self.docked.lock().unwrap_or_else(PoisonError::into_inner).get(&id)?.get().cloned()
    }

    pub(crate) fn forget(&self, id: VmId) {
        self.docked.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// A substrate, from memory or out of the store.
    ///
    /// # Errors
    /// `NotFound`; `Refused` where this machine cannot let it go on, with what differs; `Damaged`.
    pub(crate) async fn get(
        &self,
        layout: &Layout,
        qemu: &Qemu,
        disks: &Arc<Disks>,
        id: VmId,
    ) -> Result<(Record, Arc<Frozen>)> {
        let record = Record::load(&layout.vm(id)).map_err(|error| error.context("find the substrate"))?;
        self.check(qemu, disks, &record)?;
        let cell = self.cell(id);
        let load = || async { self.load(qemu, disks, layout, &record).await.map(Arc::new) };
        let frozen = cell.get_or_try_init(load).await?.clone();
        Ok((record, frozen))
    }

    /// What is kept of a captured VM, where this machine can let it go on.
    fn check(&self, qemu: &Qemu, disks: &Disks, record: &Record) -> Result<Docked> {
        let name = &record.launch.name;
        let docked = record.docked.clone().ok_or_else(|| Error::unavailable(format!("{name} is not docked")))?;
        let attached = disks.attached(record.launch.id)?;
        let now = self.compatibility(qemu, &record.launch, record.accelerator, attached)?;
        compare(name, &docked.compatibility, &now)?;
        Ok(docked)
    }

    /// Brings a captured VM back into memory.
    ///
    /// # Errors
    /// As [`Substrates::get`].
    pub(crate) async fn load(
        &self,
        qemu: &Qemu,
        disks: &Arc<Disks>,
        layout: &Layout,
        record: &Record,
    ) -> Result<Frozen> {
        let docked = self.check(qemu, disks, record)?;
        self.bring(disks, layout.vm(record.launch.id), &docked, &record.launch).await
    }

    /// Brings what a directory and the store hold of a VM into memory.
    ///
    /// # Errors
    /// `Damaged`; those of the store.
    pub(crate) async fn bring(
        &self,
        disks: &Arc<Disks>,
        directory: PathBuf,
        docked: &Docked,
        launch: &Launch,
    ) -> Result<Frozen> {
        let (disks, docked, length) = (disks.clone(), docked.clone(), memory_length(&launch.profile));
        crate::plug::blocking(move || load(&disks, &directory, &docked, length)).await
    }

    /// What a captured VM needs to be the same when it goes on.
    pub(crate) fn compatibility(
        &self,
        qemu: &Qemu,
        launch: &Launch,
        accelerator: Accelerator,
        attached: Vec<Attached>,
    ) -> Result<Compatibility> {
        let (program, firmware) = match self.firmware.get() {
            Some(known) => known.clone(),
            None => {
                let known = (hash_of(&qemu.program)?, firmware().map_or(Ok(String::new()), |path| hash_of(&path))?);
                self.firmware.get_or_init(|| known).clone()
            }
        };
        // Of the one VM and of this machine's clock, neither of which the state holds.
        let machine = Machine {
            name: String::new(),
            uuid: String::new(),
            tsc_khz: None,
            memory: Some(0),
            ..prepare::machine(launch, accelerator, attached)
        };
        let machine = hash(arguments(&machine).join("\n").as_bytes());
        Ok(Compatibility { format: FORMAT, qemu: qemu.version.clone(), program, firmware, accelerator, machine })
    }
}

fn firmware() -> Option<PathBuf> {
    let known = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"];
    known.into_iter().map(PathBuf::from).find(|path| path.exists())
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash_of(path: &Path) -> Result<String> {
    fs::read(path).map(|bytes| hash(&bytes)).map_err(|error| Error::io(format!("read {}", path.display()), &error))
}

/// # Errors
/// `Refused`, with all that differs.
pub(crate) fn compare(name: &str, was: &Compatibility, is: &Compatibility) -> Result<()> {
    let short = |hash: &str| hash.get(..12).unwrap_or(hash).to_string();
    let pairs = [
        ("the format", was.format.to_string(), is.format.to_string()),
        ("QEMU", was.qemu.clone(), is.qemu.clone()),
        ("QEMU's program", short(&was.program), short(&is.program)),
        ("QEMU's firmware", short(&was.firmware), short(&is.firmware)),
        ("the accelerator", was.accelerator.name().into(), is.accelerator.name().into()),
        ("the machine", short(&was.machine), short(&is.machine)),
    ];
    let different: Vec<String> = pairs
        .into_iter()
        .filter(|(_, was, is)| was != is)
        .map(|(what, was, is)| format!("{what} was {was} and is {is}"))
        .collect();
    if different.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!("{name} cannot go on here: {}", different.join("; ")))
        .with_hint("make a substrate anew: burgeon substrate rm, then burgeon substrate create; a parked VM or a snapshot waits for the QEMU that it was made with"))
}

/// Keeps a captured VM in the store and in a directory. `root` keeps its memory.
///
/// # Errors
/// Those of the store and of the file system. Then nothing names what was stored.
pub(crate) fn keep(
    disks: &Disks,
    directory: &Path,
    root: impl FnOnce(ChunkId) -> NewRoot,
    frozen: &Frozen,
    compatibility: Compatibility,
    captured_us: u64,
) -> Result<Docked> {
    let store = disks.store()?;
    let devices = frozen.devices.bytes()?;
    let mut writer = Writer::new(store);
    let reader = ReadAt { base: &frozen.base, at: 0 };
    let map = ingest(store, &mut writer, reader, Cutter::Fixed64K, None, &mut |_| {})?.map.root();
    let written = writer.finish(root(map))?;
    let path = directory.join(DEVICES);
    let write = || -> io::Result<()> {
        let new = path.with_extension("new");
        let mut out = fs::File::create(&new)?;
        io::Write::write_all(&mut out, &devices)?;
        out.sync_all()?;
        fs::rename(&new, &path)?;
        fs::File::open(directory)?.sync_all()
    };
    write().map_err(|error| Error::io(format!("write {}", path.display()), &error))?;
    Ok(Docked {
        map: map.to_string(),
        memory: ByteSize(frozen.base.held()),
        stored: ByteSize(written.new_stored),
        devices: ByteSize(devices.len() as u64),
        compatibility,
        captured_us,
    })
}

/// Lets go of what was kept of a VM that goes on.
pub(crate) fn forget(disks: &Disks, directory: &Path, id: VmId) -> Result<()> {
    match fs::remove_file(directory.join(DEVICES)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove a kept state", &error)),
        _ => {}
    }
    disks.forget_memory(id)
}

fn load(disks: &Disks, directory: &Path, docked: &Docked, length: u64) -> Result<Frozen> {
    let path = directory.join(DEVICES);
    let devices = fs::read(&path).map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    if devices.len() as u64 != docked.devices.bytes() {
        let shown = path.display();
        return Err(Error::damaged(format!("{shown} has {} bytes, not {}", devices.len(), docked.devices.bytes())));
    }
    let store: &ChunkStore = disks.store()?;
    let map: ChunkId = docked.map.parse()?;
    let map = Map::open(store, map)?;
    if map.length() != length {
        return Err(Error::damaged(format!("the kept memory has {} bytes, not {length}", map.length())));
    }
    let base = Base::empty(length)?;
    let mut buffer = Vec::new();
    for at in (0..length).step_by(usize::try_from(STEP).unwrap_or(usize::MAX)) {
        let end = (at + STEP).min(length);
        for piece in map.lookup(store, at..end)? {
            if piece.source.is_none() {
                continue;
            }
            buffer.resize(usize::try_from(piece.range.end - piece.range.start).unwrap_or(0), 0);
            store.read_map(&map, piece.range.start, &mut buffer)?;
            base.fill(piece.range.start, &buffer)?;
        }
    }
    base.seal()?;
    Ok(Frozen { base: Arc::new(base), written: None, devices: Devices::from_bytes(&devices)? })
}

struct ReadAt<'a> {
    base: &'a Base,
    at: u64,
}

impl io::Read for ReadAt<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.base.file().read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_substrate_of_another_machine_is_refused_by_what_differs() {
        let here = Compatibility {
            format: 1,
            qemu: "7.2.22".into(),
            program: "a".repeat(64),
            firmware: "b".repeat(64),
            accelerator: Accelerator::Tcg,
            machine: "c".repeat(64),
        };
        assert!(compare("web", &here, &here).is_ok());
        let newer = Compatibility { qemu: "10.0.2".into(), program: "d".repeat(64), ..here.clone() };
        let error = compare("web", &here, &newer).unwrap_err();
        assert!(error.message.contains("QEMU was 7.2.22 and is 10.0.2"), "{error}");
        assert!(error.message.contains("QEMU's program was aaaaaaaaaaaa and is dddddddddddd"), "{error}");
        assert!(!error.message.contains("accelerator"), "{error}");
    }
}
