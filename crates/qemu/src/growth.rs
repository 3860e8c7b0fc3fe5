//! Memory that a guest is given, or gives back, while it runs.
//!
//! The device tells the guest how much it shall have, and the guest takes or gives it back as it can; see
//! <https://docs.kernel.org/admin-guide/mm/memory-hotplug.html>.

use burgeon_api::{ByteSize, Error, Result};
use serde_json::{Value, json};

use crate::{command::GROWTH, qmp::Qmp};

/// What QEMU says when a guest has taken memory, or given it back; [`size_in_event`] reads how much it has.
pub const CHANGED: &str = "MEMORY_DEVICE_SIZE_CHANGE";

/// How much a guest has beside the memory that it began with, and how much it shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    pub has: ByteSize,
    pub shall: ByteSize,
}

async fn get(qmp: &Qmp, property: &str) -> Result<u64> {
    let path = format!("/machine/peripheral/{GROWTH}");
    let answer = qmp.execute("qom-get", json!({"path": path, "property": property})).await?;
    answer.as_u64().ok_or_else(|| Error::damaged(format!("QEMU tells no {property} of memory: {answer}")))
}

/// The guest's address of the memory that it may be given.
pub(crate) async fn begins_at(qmp: &Qmp) -> Result<u64> {
    get(qmp, "memaddr").await
}

/// # Errors
/// QEMU's, where the machine has no such device.
pub async fn look(qmp: &Qmp) -> Result<Growth> {
    let has = ByteSize(get(qmp, "size").await?);
    Ok(Growth { has, shall: ByteSize(get(qmp, "requested-size").await?) })
}

/// Asks the guest to have so much. What it does then, [`look`] tells.
///
/// # Errors
/// QEMU's.
pub async fn ask(qmp: &Qmp, size: ByteSize) -> Result<()> {
    let path = format!("/machine/peripheral/{GROWTH}");
    let wish = json!({"path": path, "property": "requested-size", "value": size.bytes()});
    qmp.execute("qom-set", wish).await.map(drop)
}

/// How much a guest has, by QEMU's event.
#[must_use]
pub fn size_in_event(data: &Value) -> Option<ByteSize> {
    data["size"].as_u64().map(ByteSize)
}
