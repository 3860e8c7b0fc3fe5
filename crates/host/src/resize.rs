//! How much memory and how many CPUs a VM has, and changing that while it runs.
//!
//! ```text
//! checked -> written down -> memory asked for -> [the guest takes it, or gives it back] -> CPUs -> told
//! ```
//! What its record says the VM shall have: a host process that finds it asks for that again, and it boots with that.
//! One that goes on from a captured state has what that says.

use std::{future::Future, time::Duration};

use burgeon_api::{
    ByteSize, Error, Result,
    host::Launch,
    profile::Profile,
    vm::{Resize, Resized, Size},
};
use burgeon_guest::client::AgentClient;
use burgeon_plan::size::wanted;
use burgeon_qemu::{
    command::growth_length,
    growth::{self, Growth},
    qmp::Qmp,
};
use burgeon_store::steps::{Step, reached};
use tokio::time::{Instant, sleep};

use crate::{plug::Gate, record::Record, start::Context, vm::is_paused};

/// The agents from this revision on change which CPUs they use.
const REVISION: u16 = 4;
/// How long a guest may take to its next piece of memory, until it is left with what it has.
const NEARER: Duration = Duration::from_secs(5);
/// And for all of it.
const ALL: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// For many CPUs: an emulated one takes a quarter of a second.
const CPUS: Duration = Duration::from_secs(120);

/// What a VM has, and what it shall have. The memory is on its way from the one to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Measure {
    pub(crate) has: Size,
    pub(crate) shall: Size,
}

/// A change of a VM's size, for its owner.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// To be written down.
    Shall(Size),
    /// What has come of it.
    Has(Size),
}

impl Measure {
    pub(crate) fn of(size: Size) -> Measure {
        Measure { has: size, shall: size }
    }

    /// What QEMU and the guest tell.
    ///
    /// # Errors
    /// Those of both.
    pub(crate) async fn take(qmp: &Qmp, agent: Option<&AgentClient>, launch: &Launch) -> Result<Measure> {
        let profile = &launch.profile;
        let cpus = match agent.filter(|agent| profile.max_cpus.is_some() && knows_cpus(agent)) {
            Some(agent) => agent.cpus(None).await?,
            None => profile.cpus,
        };
        memory(qmp, profile, cpus).await
    }

    /// Of a guest that cannot be asked now.
    pub(crate) async fn of_paused(qmp: &Qmp, record: &Record) -> Result<Measure> {
        memory(qmp, &record.launch.profile, record.size().cpus).await
    }
}

async fn memory(qmp: &Qmp, profile: &Profile, cpus: u32) -> Result<Measure> {
    let mut measure = Measure::of(Size { memory: profile.memory, cpus });
    if growth_length(profile) > 0 {
        let Growth { has, shall } = growth::look(qmp).await?;
        measure.has.memory.0 += has.0;
        measure.shall.memory.0 += shall.0;
    }
    Ok(measure)
}

fn knows_cpus(agent: &AgentClient) -> bool {
    agent.hello().is_some_and(|about| about.revision() >= REVISION)
}

/// Asks for what the record says: it may have been written down and not asked for. A guest that does not do it stays as it is.
pub(crate) async fn ask_again(qmp: &Qmp, agent: Option<&AgentClient>, record: &Record) {
    let Some(size) = record.size else { return };
    let profile = &record.launch.profile;
    let asked = async {
        if growth_length(profile) > 0 {
            growth::ask(qmp, beyond(profile, size)).await?;
        }
        if let Some(agent) = agent.filter(|agent| profile.max_cpus.is_some() && knows_cpus(agent)) {
            agent.clone().with_deadline(CPUS).cpus(Some(size.cpus)).await?;
        }
        Ok::<_, Error>(())
    };
    if let Err(error) = asked.await {
        tracing::warn!(vm = %record.launch.name, %error, "it does not get the size that it shall have");
    }
}

/// Has a guest that has just become somebody have what was wanted for it.
///
/// # Errors
/// `Refused` where it does not get there.
pub(crate) async fn begin_with(qmp: &Qmp, agent: &AgentClient, launch: &Launch) -> Result<()> {
    let (name, profile) = (&launch.name, &launch.profile);
    let measure = Measure::take(qmp, Some(agent), launch).await?;
    let (shall, _) = wanted(name, profile, measure.has, launch.resize)?;
    check_agent(name, agent, launch.resize)?;
    let has = change(qmp, Some(agent), launch, shall, launch.resize).await?;
    if launch.resize.memory.is_some() && has.memory < shall.memory {
        return Err(Error::refused(not_taken(shall.memory, has.memory)));
    }
    Ok(())
}

fn beyond(profile: &Profile, size: Size) -> ByteSize {
    ByteSize(size.memory.0.saturating_sub(profile.memory.0))
}

fn not_taken(shall: ByteSize, has: ByteSize) -> String {
    match has < shall {
        true => format!("the guest has taken {has:#} of {shall:#}; it needs the driver virtio_mem"),
        false => {
            format!("the guest keeps {has:#}, because what is there cannot be moved; it gives back more when it can")
        }
    }
}

fn check_agent(name: &str, agent: &AgentClient, resize: Resize) -> Result<()> {
    if resize.cpus.is_none() || knows_cpus(agent) {
        return Ok(());
    }
    Err(Error::refused(format!("the agent in VM {name} is older than this Burgeon, and cannot change its CPUs"))
        .with_hint("start the VM anew, or make its substrate anew"))
}

/// Has QEMU and the guest do it; what the guest has then.
async fn change(qmp: &Qmp, agent: Option<&AgentClient>, launch: &Launch, shall: Size, resize: Resize) -> Result<Size> {
    let profile = &launch.profile;
    if resize.memory.is_some() && growth_length(profile) > 0 {
        let wish = beyond(profile, shall);
        growth::ask(qmp, wish).await?;
        settle(qmp, wish).await?;
    }
    if let (Some(agent), Some(cpus)) = (agent, resize.cpus.filter(|_| profile.max_cpus.is_some())) {
        agent.clone().with_deadline(CPUS).cpus(Some(cpus)).await?;
    }
    Ok(Measure::take(qmp, agent, launch).await?.has)
}

/// Waits until the guest has so much, or has not come nearer for a while.
async fn settle(qmp: &Qmp, wish: ByteSize) -> Result<()> {
    let all = Instant::now() + ALL;
    let (mut seen, mut until) = (None, Instant::now() + NEARER);
    loop {
        let has = growth::look(qmp).await?.has;
        let now = Instant::now();
        if has == wish || now >= until.min(all) {
            return Ok(());
        }
        if seen != Some(has) {
            (seen, until) = (Some(has), now + NEARER);
        }
        sleep(LOOK_AGAIN).await;
    }
}

impl Gate {
    /// Changes what the VM has; of one that has stopped, what its next start gives it. `tell` has its owner keep that.
    ///
    /// # Errors
    /// `Refused` for what its profile or its agent does not allow, `Unavailable` where the machine has no room: then
    /// nothing has changed. Those of guest and QEMU.
    pub(crate) async fn resize<F: Future<Output = Result<()>>>(
        &self,
        context: &Context,
        resize: Resize,
        tell: impl Fn(Change) -> F,
    ) -> Result<Resized> {
        let launch = &self.record.launch;
        if self.record.paused {
            return Err(is_paused(&launch.name));
        }
        let (shall, note) = wanted(&launch.name, &launch.profile, self.record.size(), resize)?;
        let mut notes: Vec<String> = note.into_iter().collect();
        let Some(monitor) = &self.monitor else {
            tell(Change::Shall(shall)).await?;
            notes.push("the VM has stopped; its next start gives it that".into());
            return Ok(Resized { size: shall, notes });
        };
        match &self.agent {
            Some(agent) => check_agent(&launch.name, agent, resize)?,
            None if resize.cpus.is_some_and(|cpus| cpus != self.record.size().cpus) => {
                let what = format!("VM {} has no agent, which alone could change its CPUs", launch.name);
                return Err(Error::refused(what));
            }
            None => {}
        }
        let more = shall.memory.0.saturating_sub(self.record.size().memory.0);
        let _room = if more > 0 { Some(context.room.take(ByteSize(more))?) } else { None };
        tell(Change::Shall(shall)).await?;
        reached(Step::SizeWritten);
        let has = change(monitor, self.agent.as_ref(), launch, shall, resize).await?;
        tell(Change::Has(has)).await?;
        if has.memory != shall.memory {
            notes.push(not_taken(shall.memory, has.memory));
        }
        Ok(Resized { size: has, notes })
    }
}
