//! Whether a guest that goes on from a captured state has become the machine that it was made.
//!
//! The guest's word is all that there is, and a guest may lie: then it harms itself. What must not happen is that one
//! which was not renewed goes on unnoticed.

use burgeon_api::{Error, Result, receipt::Receipt};

/// How far a renewed guest's clock may be off, in microseconds.
pub const MOST_CLOCK_OFFSET_US: u64 = 100_000;

/// What a guest was told to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub generation: String,
    pub host_name: String,
    /// Absent: it keeps its own, whichever that is.
    pub machine_id: Option<String>,
    /// Absent: it keeps its own.
    pub hardware_addresses: Option<Vec<String>>,
    /// The fingerprint of the host key that it was given. A guest without an SSH server has none.
    pub ssh_host_key: Option<String>,
    /// Whether connections to other machines were to be ended.
    pub end_connections: bool,
}

/// # Errors
/// `Damaged`, with what differs.
pub fn check(receipt: &Receipt, wanted: &Wanted) -> Result<()> {
    let wrong = |what: String| Err(Error::damaged(format!("the guest's receipt is not good: {what}")));
    if receipt.generation != wanted.generation {
        return wrong(format!("its generation is {}, not {}", receipt.generation, wanted.generation));
    }
    if receipt.host_name != wanted.host_name {
        return wrong(format!("its host name is {}, not {}", receipt.host_name, wanted.host_name));
    }
    // An image without a machine id has none to be renewed.
    if let Some(id) = &wanted.machine_id
        && !receipt.machine_id.is_empty()
        && receipt.machine_id != *id
    {
        return wrong(format!("its machine id is {}, not {id}", receipt.machine_id));
    }
    if let Some(shall) = &wanted.hardware_addresses
        && receipt.hardware_addresses != *shall
    {
        let (has, shall) = (receipt.hardware_addresses.join(" "), shall.join(" "));
        return wrong(format!("its network cards have the addresses {has}, not {shall}"));
    }
    if let (Some(key), Some(shall)) = (&receipt.ssh_host_key, &wanted.ssh_host_key)
        && key != shall
    {
        return wrong(format!("its SSH host key is {key}, not {shall}"));
    }
    if wanted.end_connections && receipt.kept_connections > 0 {
        return wrong(format!("{} inherited TCP connections live on", receipt.kept_connections));
    }
    if receipt.clock_offset_us.unsigned_abs() > MOST_CLOCK_OFFSET_US {
        return wrong(format!("its clock is off by {} ms", receipt.clock_offset_us / 1000));
    }
    if receipt.sample.len() != 32 || receipt.sample.bytes().all(|byte| byte == b'0') {
        return wrong("its random bytes are none".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_named() {
        let wanted = Wanted {
            generation: "a".repeat(32),
            host_name: "web-1".into(),
            machine_id: Some("b".repeat(32)),
            hardware_addresses: Some(vec!["02:00:00:00:00:01".into()]),
            ssh_host_key: Some("SHA256:a".into()),
            end_connections: true,
        };
        let good = Receipt {
            generation: wanted.generation.clone(),
            host_name: wanted.host_name.clone(),
            machine_id: "b".repeat(32),
            hardware_addresses: vec!["02:00:00:00:00:01".into()],
            sample: "0123456789abcdef".repeat(2),
            clock_offset_us: -900,
            ..Receipt::default()
        };
        assert!(check(&good, &wanted).is_ok());
        assert!(check(&Receipt { machine_id: String::new(), ..good.clone() }, &wanted).is_ok());
        let told = |receipt: Receipt| check(&receipt, &wanted).unwrap_err().message;
        assert!(told(Receipt { generation: "c".into(), ..good.clone() }).contains("generation is c"));
        assert!(told(Receipt { host_name: "web".into(), ..good.clone() }).contains("host name is web"));
        assert!(told(Receipt { machine_id: "d".into(), ..good.clone() }).contains("machine id is d"));
        assert!(told(Receipt { hardware_addresses: vec![], ..good.clone() }).contains("network cards"));
        assert!(told(Receipt { ssh_host_key: Some("SHA256:b".into()), ..good.clone() }).contains("SSH host key"));
        assert!(told(Receipt { kept_connections: 2, ..good.clone() }).contains("2 inherited TCP connections"));
        assert!(told(Receipt { clock_offset_us: 100_001, ..good.clone() }).contains("off by 100 ms"));
        assert!(told(Receipt { sample: "0".repeat(32), ..good.clone() }).contains("random"));
        assert!(told(Receipt { sample: "1".repeat(31), ..good }).contains("random"));
    }
}
