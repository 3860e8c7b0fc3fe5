//! Steps of work after which a process may die, for the tests that have it die there.
//!
//! Whatever changes lasting things in several steps says which step it has done. With debug assertions, and with
//! `BURGEON_TEST_DIE_AT` in its environment, which names a file that holds the name of a step, a process kills itself there,
//! as kill -9 does. The file is removed first: one process dies, once. Other builds do nothing at all.

/// A step that is done, where the next one is not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An object's bytes are written beside its name.
    ObjectBeside,
    /// A pack is an object, and in no catalog.
    PackWritten,
    /// A pack's chunks are in the catalog, and no root needs them.
    PackKnown,
    /// A writer's root is set.
    RootSet,
    /// A disk is sealed for its image.
    DiskSealed,
    /// A disk's record names a map in place of a layer.
    LayerStored,
    /// A stored disk has a root for whoever makes its image.
    HandedOver,
    /// That one knows.
    HandoverReceived,
    /// The new image's own root is set, and there is no image.
    ImageKept,
    /// An image is in its place, and nobody was told.
    ImagePublished,
    /// A page of chunks is deleted.
    ChunksSwept,
    /// A VM is captured, and its CPUs still stand.
    Captured,
    /// A captured state is kept, and the VM's record does not say so.
    StateKept,
    /// The record says so, and the VM's process is still there.
    StateRecorded,
    /// A QEMU is started for a VM that goes on from a captured state, and is written down.
    Spawned,
    /// A VM's record names a QEMU that waited, whose directory is its own yet.
    Claimed,
    /// That directory is the VM's.
    Handed,
    /// A QEMU has taken the state up, and its CPUs stand.
    Loaded,
    /// A guest has shown a good receipt, and its workload stands.
    Identified,
    /// A guest's workload goes on, and nobody was told.
    Thawed,
    /// A VM's record says what size it shall have, and neither QEMU nor the guest knows.
    SizeWritten,
    /// A VM's instant is captured, it goes on, and nothing names what was captured.
    SnapshotCaptured,
    /// All of a snapshot is kept, and it is not in its place.
    SnapshotKept,
    /// A VM's row says that it is to return to a snapshot, and its host knows nothing of that.
    RollbackWanted,
    /// A VM is to return to a snapshot, and its process still runs.
    RollbackRecorded,
    /// Its disks have returned, and nothing goes on from them.
    DisksRolledBack,
    /// It has gone on from the snapshot, and nobody was told.
    RolledBack,
    /// A pack is given up, and is still an object.
    PackDropping,
    /// A dropped pack is no object any more, and still in the catalog.
    PackDeleted,
    /// A new pack with chunks of others is an object, and in no catalog.
    PackJoined,
    /// The chunks' places are in the new pack.
    ChunksMoved,
    /// A pack that no catalog was told of is given up.
    PackCondemned,
    /// All that a substrate's file leads to is stored and held, and there is no substrate.
    BundleStored,
    /// All of a substrate that was made elsewhere is in its directory, and its record does not say so.
    TakenIn,
    /// The host has it, and meta does not.
    TakenInByHost,
    /// A cache that no root needs is removed.
    CacheRemoved,
}

impl Step {
    pub const ALL: [Step; 36] = [
        Step::ObjectBeside,
        Step::PackWritten,
        Step::PackKnown,
        Step::RootSet,
        Step::DiskSealed,
        Step::LayerStored,
        Step::HandedOver,
        Step::HandoverReceived,
        Step::ImageKept,
        Step::ImagePublished,
        Step::ChunksSwept,
        Step::Captured,
        Step::StateKept,
        Step::StateRecorded,
        Step::Spawned,
        Step::Claimed,
        Step::Handed,
        Step::Loaded,
        Step::Identified,
        Step::Thawed,
        Step::SizeWritten,
        Step::SnapshotCaptured,
        Step::SnapshotKept,
        Step::RollbackWanted,
        Step::RollbackRecorded,
        Step::DisksRolledBack,
        Step::RolledBack,
        Step::PackDropping,
        Step::PackDeleted,
        Step::PackJoined,
        Step::ChunksMoved,
        Step::PackCondemned,
        Step::BundleStored,
        Step::TakenIn,
        Step::TakenInByHost,
        Step::CacheRemoved,
    ];
}

/// The variable that names the file.
pub const DIE_AT: &str = "BURGEON_TEST_DIE_AT";

/// Says that a step is done.
pub fn reached(step: Step) {
    if cfg!(debug_assertions) {
        die_where_told(step);
    }
}

fn die_where_told(step: Step) {
    let Some(file) = std::env::var_os(DIE_AT) else { return };
    let Ok(told) = std::fs::read_to_string(&file) else { return };
    // Who removes the file is the one that dies.
    if told.trim() == format!("{step:?}") && std::fs::remove_file(&file).is_ok() {
        let _nothing_follows = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
