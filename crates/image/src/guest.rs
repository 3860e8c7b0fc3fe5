//! What this crate asks of a temporary VM. The host provides the VM; nothing here knows how.

use std::{io::Write, path::Path, time::Duration};

use burgeon_api::{ByteSize, Result};

/// One run of a script in a temporary VM.
///
/// The VM has no network and nothing that outlives it. Its initramfs holds busybox, the modules
/// and their lists, `/burgeon/modules` and `/burgeon/modules.root`; whoever runs the job puts its
/// own process 1 in front (an archive with `/init`). Before the script starts, process 1 has
/// mounted `/proc`, `/sys` and `/dev`; modules may be loaded or not, the script loads what is
/// missing. The script runs as `/bin/busybox sh -c SCRIPT` in the initramfs, with the disk at
/// `/dev/vda`.
pub struct GuestJob<'a> {
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    /// More words for the kernel's command line.
    pub kernel_parameters: &'a [String],
    /// A raw disk, attached so that it cannot be written.
    pub disk: &'a Path,
    pub memory: ByteSize,
    pub cpus: u32,
    pub script: &'a str,
    /// Receives the script's standard output. An error from it ends the run.
    pub stdout: &'a mut (dyn Write + Send),
    /// Receives the script's standard error, in pieces as they come.
    pub stderr: &'a mut (dyn FnMut(&[u8]) + Send),
    /// How long the script may take, start of the VM included.
    pub deadline: Duration,
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestOutput {
    /// The script's exit status; 128 and the signal's number where a signal ended it.
    pub code: i32,
}

/// Runs scripts in temporary VMs.
pub trait GuestRunner {
    /// Boots a VM, runs the script to its end and removes the VM.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` where the VM does not start or dies, `Deadline` when time is
    /// up, `Cancelled` when `job.cancelled` says so. A script that fails is no error; see the code.
    fn run(&self, job: GuestJob<'_>) -> Result<GuestOutput>;
}
