//! Who an activated guest shall be, and whether it has become that.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use burgeon_api::{
    Error, Result, VmId,
    exec::{ExecSpec, Exit},
    host::Launch,
    profile::Network,
    provisions::Provisions,
    receipt::Receipt,
    vm::PhaseTime,
};
use burgeon_guest::{
    client::AgentClient,
    protocol::{self, Proof, Provision},
};
use burgeon_plan::receipt::{Wanted, check};

use crate::{provisions, ssh_key, start::clock_ns};

/// How long the guest may take to renew itself, its own programs for that included.
pub(crate) const IDENTITY_DEADLINE: Duration = Duration::from_secs(60);
/// Agents before it know no more than [`protocol::Identity`], and end no connections.
const REVISION: u16 = 2;

/// Receipts that are remembered for comparison.
const REMEMBERED: usize = 200_000;

/// What guests of this host have shown: nothing of it may come twice.
#[derive(Default)]
pub(crate) struct Siblings(Mutex<Shown>);

#[derive(Default)]
struct Shown {
    known: HashSet<String>,
    in_order: VecDeque<String>,
}

impl Siblings {
    /// Takes note of a receipt.
    ///
    /// # Errors
    /// `Damaged` where another VM has shown the same.
    pub(crate) fn admit(&self, receipt: &Receipt) -> Result<()> {
        let none = String::new();
        let own = [
            ("random bytes", &receipt.sample),
            ("generation", &receipt.generation),
            ("boot id", &receipt.boot_id),
            ("SSH host key", receipt.ssh_host_key.as_ref().unwrap_or(&none)),
        ];
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((what, value)) = own.iter().find(|(_, value)| !value.is_empty() && shown.known.contains(*value)) {
            return Err(Error::damaged(format!("the guest's receipt is not good: its {what} {value} is another VM's")));
        }
        for (_, value) in own.into_iter().filter(|(_, value)| !value.is_empty()) {
            if shown.known.insert(value.clone()) {
                shown.in_order.push_back(value.clone());
            }
        }
        while shown.in_order.len() > REMEMBERED {
            if let Some(oldest) = shown.in_order.pop_front() {
                shown.known.remove(&oldest);
            }
        }
        Ok(())
    }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::io("take random bytes", &error.into()))?;
    Ok(bytes)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hardware address of a VM's first card: of the kind that everybody may choose, and made of the end of its id, which
/// is random.
pub(crate) fn hardware_address(id: VmId) -> [u8; 6] {
    let id = id.uuid().into_bytes();
    [0x02, id[11], id[12], id[13], id[14], id[15]]
}

fn text(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

/// A new identity for a VM that goes on from a captured state. One that goes on from its own keeps what it is called by;
/// what must never come twice is new all the same.
///
/// # Errors
/// Where the system has no random numbers.
fn new(launch: &Launch, own: bool, now_ns: u64) -> Result<protocol::Identity> {
    let hardware_addresses = match launch.profile.network {
        Network::User if !own => vec![hardware_address(launch.id)],
        Network::User | Network::None => Vec::new(),
    };
    Ok(protocol::Identity {
        generation: random::<16>()?,
        entropy: random::<64>()?.to_vec(),
        time_ns: now_ns,
        host_name: launch.name.clone(),
        machine_id: (!own).then(|| launch.id.uuid().into_bytes()),
        hardware_addresses,
        end_connections: !own && !launch.keep.connections,
    })
}

/// What the guest has shown, in the words of the API. `now_ns` is the middle of the time in which its answer came.
fn receipt(shown: protocol::Receipt, more: &[Proof], origin: String, now_ns: u64) -> Receipt {
    let clock = i128::from(shown.time_ns) - i128::from(now_ns);
    let plain = |text: &str| burgeon_api::path_text::printable(text.get(..64).unwrap_or(text));
    let hooks = shown
        .hooks
        .iter()
        .take(64)
        .map(|(name, microseconds)| PhaseTime { phase: plain(name), microseconds: *microseconds });
    let kept_connections = more.iter().find_map(|proof| match proof {
        Proof::KeptConnections(count) => Some(*count),
        Proof::SshHostKey(_) => None,
    });
    let ssh_host_key = more.iter().find_map(|proof| match proof {
        // What is no key differs from the one that was given, too.
        Proof::SshHostKey(public) => Some(ssh_key::fingerprint(public).unwrap_or_else(|| "none".into())),
        Proof::KeptConnections(_) => None,
    });
    Receipt {
        generation: hexadecimal(&shown.generation),
        origin,
        host_name: plain(&shown.host_name),
        machine_id: plain(&shown.machine_id),
        boot_id: plain(&shown.boot_id),
        sample: hexadecimal(&shown.sample),
        clock_offset_us: i64::try_from(clock / 1000).unwrap_or(i64::MAX),
        hardware_addresses: shown.hardware_addresses.into_iter().take(64).map(text).collect(),
        ended_connections: shown.ended_connections,
        kept_connections: kept_connections.unwrap_or(0),
        ssh_host_key,
        hooks: hooks.collect(),
        given_s: now_ns / 1_000_000_000,
        given_us: now_ns / 1000,
    }
}

/// What a guest is given that goes on from a captured state.
pub(crate) struct Giving<'a> {
    pub(crate) launch: &'a Launch,
    /// The state was its own.
    pub(crate) own: bool,
    pub(crate) origin: &'a str,
    pub(crate) provisions: &'a Provisions,
}

/// Gives a guest that goes on from a captured state its identity, and takes its receipt. Whoever gets an error must end
/// the guest.
///
/// # Errors
/// `Refused` for an agent that is too old for a clone; `Deadline` where no receipt comes; `Damaged` for one that is not
/// good, with what differs; the guest's own.
pub(crate) async fn give(agent: &AgentClient, giving: Giving<'_>, siblings: &Siblings) -> Result<Receipt> {
    let Giving { launch, own, origin, provisions } = giving;
    let revision = agent.hello().map_or(1, |about| about.revision());
    if revision < REVISION && !own {
        return Err(Error::refused("the guest's agent is older than this Burgeon, and cannot be made another machine")
            .with_hint("make the substrate again, or stop the VM, start it and fork it then"));
    }
    provisions::give(agent, provisions).await?;
    // Behind what may be large and take its time: with it goes the time of now.
    let wanted = new(launch, own, clock_ns())?;
    let key = if own { None } else { Some(ssh_key::files(&random()?, random()?, &launch.name)?) };
    let fingerprint = key.as_ref().and_then(|key| ssh_key::fingerprint(&key.public));
    let asked = clock_ns();
    let patient = agent.clone().with_deadline(IDENTITY_DEADLINE);
    let shown = if revision < REVISION {
        patient.renew(wanted.clone()).await.map(|receipt| (receipt, Vec::new()))
    } else {
        let key = key.map(|key| Provision::SshHostKey { private: key.private, public: key.public });
        let kept = (launch.keep.secrets && !own).then_some(Provision::KeepSecrets);
        patient.renew_with(wanted.clone(), key.into_iter().chain(kept).collect()).await
    };
    let (shown, more) = shown.map_err(|error| error.context("give the guest its identity"))?;
    // The guest told its time somewhere between the question and the answer.
    let told = clock_ns().min(asked.max(shown.time_ns)).max(asked);
    let receipt = receipt(shown, &more, origin.into(), told);
    let wanted = Wanted {
        generation: hexadecimal(&wanted.generation),
        host_name: wanted.host_name,
        machine_id: wanted.machine_id.as_ref().map(|id| hexadecimal(id)),
        hardware_addresses: (!own).then(|| wanted.hardware_addresses.iter().copied().map(text).collect()),
        ssh_host_key: fingerprint,
        end_connections: wanted.end_connections,
    };
    check(&receipt, &wanted)?;
    siblings.admit(&receipt)?;
    Ok(receipt)
}

/// Has a guest that waits for its VM do once what is going to be asked of it then: a renewal, and a command.
///
/// # Errors
/// The guest's own.
pub(crate) async fn rehearse(agent: &AgentClient, launch: &Launch) -> Result<()> {
    if agent.hello().map_or(1, |about| about.revision()) < REVISION {
        return Ok(());
    }
    // What the state holds of connections and secrets is for the VM to lose or to keep.
    let identity = protocol::Identity { end_connections: false, ..new(launch, false, clock_ns())? };
    let patient = agent.clone().with_deadline(IDENTITY_DEADLINE);
    patient.renew_with(identity, vec![Provision::Rehearsal, Provision::KeepSecrets]).await?;
    let argv = ["/proc/self/exe", "rehearse"].map(String::from).to_vec();
    let spec = ExecSpec { argv, time_limit_ms: Some(10_000), ..ExecSpec::default() };
    let (stdin, mut output, _control) = agent.exec(spec).await?.split();
    stdin.finish();
    match output.collect(1024).await {
        (.., Exit::Code { code: 0 }) => agent.freeze().await,
        (_, said, exit) => Err(Error::damaged(format!(
            "a command in the guest ended with {exit:?}: {}",
            String::from_utf8_lossy(&said)
        ))),
    }
}

#[cfg(test)]
mod lies;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_shows_what_another_has_shown() {
        let siblings = Siblings::default();
        let first = Receipt { sample: "a".into(), generation: "b".into(), boot_id: "c".into(), ..Receipt::default() };
        siblings.admit(&first).unwrap();
        let second = |sample: &str, generation: &str| Receipt {
            sample: sample.into(),
            generation: generation.into(),
            ..Receipt::default()
        };
        assert!(siblings.admit(&second("a", "d")).unwrap_err().message.contains("random bytes a is another VM's"));
        assert!(siblings.admit(&second("e", "b")).unwrap_err().message.contains("generation b"));
        siblings.admit(&second("e", "f")).unwrap();
    }
}
