//! The disk of a VM: a qcow2 overlay that holds what the VM wrote, above the image's raw disk.

use std::{path::Path, time::Duration};

use burgeon_api::{ByteSize, Error, Result};
use tokio::process::Command;

use crate::facts::{INSTALL_HINT, find_program, run};

/// Makes an empty overlay of `size`. It names no backing file: the command line joins the two, so that
/// nothing a guest writes can choose a file of the host.
///
/// # Errors
/// `NotFound` where qemu-img is missing; its own words otherwise.
pub async fn create_overlay(path: &Path, size: ByteSize) -> Result<()> {
    let program = find_program("qemu-img")
        .ok_or_else(|| Error::not_found("qemu-img is not installed").with_hint(INSTALL_HINT))?;
    let mut command = Command::new(program);
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size.bytes().to_string());
    run(&mut command, Duration::from_secs(30)).await.map(drop)
}
