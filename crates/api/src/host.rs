//! What the control process asks of a host process, over the host's unix socket.
//!
//! One connection carries one request: an [`Envelope`], answered by a [`Reply`]. A message is its
//! length (u32, little-endian) and then JSON. After the reply to `Exec`, `Console` and `Display` the
//! connection carries a stream: frames of [`crate::exec`], or raw bytes. After `Watch` it carries a
//! [`HostVm`] message for every change.

use serde::{Deserialize, Serialize};

use crate::{
    Error, RequestId, VmId,
    bundle::BundledDisk,
    disk::{DiskChanged, DiskChanges, DiskView},
    exec::Attach,
    http::Setting,
    image::Image,
    profile::Profile,
    provisions::Provisions,
    snapshot::VmSnapshot,
    substrate::{Docked, Forked, Keep, Recipe, Shares, Standbys},
    vm::{Figures, HostVm, Resize, Resized},
};

/// The version of this protocol. The host refuses any other by name.
pub const VERSION: u32 = 1;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Envelope {
    pub version: u32,
    pub request: Request,
}

/// A new VM. The id is chosen by the control process: asking twice starts one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub id: VmId,
    pub name: String,
    pub image: Image,
    /// The directory with the image's files. They are linked or copied before the VM starts.
    pub image_directory: String,
    pub profile: Profile,
    /// Another VM of this host, whose disk the root disk is a clone of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    #[serde(default)]
    pub begin: Begin,
    /// Where it goes on from another VM's memory.
    #[serde(default)]
    pub keep: Keep,
    /// And what it shall have then in place of what the other one has.
    #[serde(default)]
    pub resize: Resize,
}

/// How a VM begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Begin {
    /// Its kernel starts.
    #[default]
    Boot,
    /// It boots to become a substrate: its kernel leaves zeros in memory that it frees.
    BootForSubstrate,
    /// It goes on from the substrate that its source is.
    Substrate,
    /// It goes on from an instant of its running source.
    Fork,
    /// It goes on from a snapshot of its source, which has the name that the source tells.
    Snapshot,
}

impl Begin {
    /// Whether its memory was another VM's.
    pub fn is_activation(self) -> bool {
        matches!(self, Begin::Substrate | Begin::Fork | Begin::Snapshot)
    }
}

/// What a VM's root disk is cloned from; with [`Begin::Snapshot`] all that it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub vm: VmId,
    /// The name of a snapshot, of the disk or of the VM; none: what there is when the clone is made.
    pub snapshot: Option<String>,
}

/// Something about a VM's disks. Names are those of disks and of their snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskRequest {
    List,
    /// `size` in bytes; `map` is the block map of an image's disk. Without both, a disk that was detached.
    Attach {
        disk: String,
        size: Option<u64>,
        map: Option<String>,
    },
    Detach {
        disk: String,
        force: bool,
    },
    /// Removes a detached disk, with all that it holds.
    Remove {
        disk: String,
    },
    Grow {
        disk: String,
        size: u64,
    },
    Snapshot {
        disk: String,
        snapshot: String,
    },
    RemoveSnapshot {
        disk: String,
        snapshot: String,
    },
    RollBack {
        disk: String,
        snapshot: String,
    },
    /// Where the disk, or its snapshot `to`, may differ from its snapshot `from`.
    Changes {
        disk: String,
        from: String,
        to: Option<String>,
    },
    /// Has a running guest bring its files to its disks.
    Sync,
    /// Stores what the disk, or a snapshot of it, holds. The reply is a stream of [`Handover`] messages. At its end a root of
    /// kind `handover` and the name `root` keeps the map for a day, or until the asker removes it.
    HandOver {
        disk: String,
        snapshot: Option<String>,
        root: String,
    },
    /// The image that the VM was started from.
    Image,
}

/// What the host tells of a substrate that it has laid out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaidOut {
    /// The disks that are plugged in beside the root, and where.
    pub ports: Vec<(String, u8)>,
}

/// A substrate that was made elsewhere. Somebody keeps its maps until this is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeIn {
    pub launch: Launch,
    pub docked: Docked,
    pub disks: Vec<BundledDisk>,
    /// Where its files lie, as [`Request::LayOut`] puts them. They are taken away from there.
    pub directory: String,
}

/// A message of a handover. One comes every few seconds at least; `Stored` or `Failed` is the last. The work ends when its
/// asker is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Handover {
    /// Bytes; 0 of 0 while others are waited for.
    Step {
        done: u64,
        total: u64,
    },
    /// A line for the user.
    Note(String),
    Stored(StoredDisk),
    Failed(Error),
}

/// A disk in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDisk {
    /// Its block map.
    pub map: String,
    /// Bytes of the disk.
    pub size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// Ask the guest; end it by force when it takes longer than this.
    Graceful {
        deadline_ms: u64,
    },
    Kill,
}

/// A file or directory inside a VM. Paths are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRequest {
    /// The client sends the content after the reply; the connection's end is the file's end.
    Put {
        path: Vec<u8>,
        mode: u32,
        size: u64,
    },
    /// The content follows the reply.
    Get {
        path: Vec<u8>,
    },
    List {
        path: Vec<u8>,
    },
    MakeDirectory {
        path: Vec<u8>,
        mode: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    File,
    Directory,
    Link,
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: Vec<u8>,
    pub kind: FileKind,
    pub mode: u32,
    pub size: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Who are you?
    Hello,
    List,
    /// Returns once the launch is recorded; `Watch` tells how it goes.
    Launch(Box<Launch>),
    /// What a VM that will be launched is given before its workload runs; nothing takes back what was given before. Ignored
    /// for one that is there.
    Provide {
        vm: VmId,
        provisions: Provisions,
    },
    /// Starts a VM that has stopped, with its disk. `starts` counts what was asked for: a number that the
    /// host has begun already changes nothing.
    Start {
        vm: VmId,
        starts: u32,
    },
    Stop {
        vm: VmId,
        mode: StopMode,
    },
    /// Ends the VM if it runs, and removes what it left.
    Remove {
        vm: VmId,
    },
    Exec {
        vm: VmId,
        attach: Box<Attach>,
    },
    Console {
        vm: VmId,
    },
    Display {
        vm: VmId,
    },
    File {
        vm: VmId,
        request: FileRequest,
    },
    Disk {
        vm: VmId,
        request: DiskRequest,
    },
    Figures {
        vm: VmId,
    },
    Freeze {
        vm: VmId,
    },
    Thaw {
        vm: VmId,
    },
    /// Has a running VM stand still, with all that it has in memory. One that does already stays as it is.
    Pause {
        vm: VmId,
    },
    /// Lets a paused VM go on, with the right time.
    Resume {
        vm: VmId,
    },
    /// Changes how much memory and how many CPUs a VM has; of one that has stopped, from its next start on.
    Resize {
        vm: VmId,
        resize: Resize,
    },
    /// Makes a substrate of a running VM: warms it up, captures it, keeps that in the store and in memory, and ends its
    /// process.
    Dock {
        vm: VmId,
        recipe: Recipe,
    },
    /// How many QEMUs wait for VMs of a substrate from now on; absent: as demand has it.
    KeepStandbys {
        vm: VmId,
        count: Option<u32>,
    },
    /// How many wait, for each substrate.
    Standbys,
    /// What a substrate, VMs that go on from it, and QEMUs that wait for it take of this machine's memory.
    Shares {
        substrate: VmId,
        vms: Vec<VmId>,
    },
    /// Puts what the store has not of a docked substrate into a directory of the asker's: `devices`, kernel and initramfs,
    /// as the VM's directory has them.
    LayOut {
        vm: VmId,
        directory: String,
    },
    /// Makes a substrate that was made elsewhere. Asking twice makes one.
    TakeIn(Box<TakeIn>),
    /// Captures a running VM, keeps that in the store, and ends its process. A start lets it go on.
    Park {
        vm: VmId,
    },
    /// Keeps a VM's instant under a name, in the store and beside its disks, while it goes on as before. The same request
    /// keeps one.
    Snapshot {
        vm: VmId,
        request: RequestId,
        name: Option<String>,
    },
    /// The snapshots of a VM, the oldest first.
    Snapshots {
        vm: VmId,
    },
    RemoveSnapshot {
        vm: VmId,
        snapshot: String,
    },
    /// Ends a VM's process and has it go on from a snapshot of it. `starts` as for `Start`.
    RollBack {
        vm: VmId,
        starts: u32,
        snapshot: String,
    },
    /// Ends a VM that could not be made what it should become: it has failed, for this reason.
    GiveUp {
        vm: VmId,
        reason: String,
    },
    /// Forks a running VM: one instant of it for all children. Those that could not be made are told one by one.
    Fork {
        vm: VmId,
        children: Vec<Launch>,
        all_or_nothing: bool,
    },
    /// Ends every command that runs in the VM through a session.
    EndSessions {
        vm: VmId,
    },
    /// The console's text so far.
    Log {
        vm: VmId,
    },
    Watch,
    /// Leave, if no VM is left.
    Exit,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    Hello {
        version: u32,
        pid: u32,
        build: String,
        accelerator: crate::vm::Accelerator,
        accelerator_reason: String,
        #[serde(default)]
        settings: Vec<Setting>,
    },
    Done,
    Vms(Vec<HostVm>),
    /// The stream begins.
    Stream,
    Content {
        mode: u32,
        size: u64,
    },
    Entries(Vec<FileEntry>),
    Figures(Figures),
    Disks(Vec<DiskView>),
    DiskChanged(DiskChanged),
    DiskChanges(DiskChanges),
    Image(Box<Image>),
    Forked(Forked),
    Standbys(Vec<(VmId, Standbys)>),
    Shares(Shares),
    LaidOut(LaidOut),
    Resized(Resized),
    Snapshot(Box<VmSnapshot>),
    Snapshots(Vec<VmSnapshot>),
    Log {
        text: Vec<u8>,
    },
    Refused(Error),
}
