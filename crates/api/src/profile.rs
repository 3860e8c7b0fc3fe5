//! A VM's shape.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, Error, Result, login::Login, vm::Size};

/// What a VM's own init does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// The image's own init runs as process 1, beside the agent.
    #[default]
    Image,
    /// The agent stays process 1, and nothing of the image is started: quickest for workers.
    None,
}

/// How a VM reaches other machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// No network card.
    #[default]
    None,
    /// User-mode network: outgoing connections only, addresses by DHCP (10.0.2.0/24).
    User,
}

/// The shape of a VM: memory, CPUs, disk, network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    /// Memory of the guest.
    pub memory: ByteSize,
    /// What its memory may grow to while it runs. Absent: as `memory`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<ByteSize>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// How many of them it may have while it runs. Absent: as `cpus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpus: Option<u32>,
    /// Size of the root disk, where the image has one. Absent: as large as the image says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<ByteSize>,
    pub network: Network,
    /// A graphics card, so that `vm display` has something to show.
    pub display: bool,
    pub init: Init,
    /// Upper limit of host CPU time, in percent of one CPU. Absent: as many as the VM has CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    /// Who may log in to a VM of a foreign image. Absent: what the image itself allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login: Option<Login>,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            memory: ByteSize::mib(512),
            max_memory: None,
            cpus: 1,
            max_cpus: None,
            disk: None,
            network: Network::None,
            display: false,
            init: Init::Image,
            cpu_percent: None,
            login: None,
        }
    }
}

/// What the machine can give; a profile is checked against it.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    pub memory: ByteSize,
    pub cpus: u32,
}

/// The smallest memory with which a Debian cloud kernel starts.
pub const LEAST_MEMORY: ByteSize = ByteSize::mib(96);
/// What QEMU's q35 machine takes.
pub const MOST_CPUS: u32 = 255;
/// A guest takes memory up, and gives it back, in multiples of this.
pub const MEMORY_STEP: ByteSize = ByteSize::mib(2);
/// What emulated machines have addresses for, beside their devices.
pub const MOST_MEMORY: ByteSize = ByteSize::gib(512);
pub const MOST_DISK: ByteSize = ByteSize::gib(16 << 10);

impl Profile {
    /// The profiles that come with Burgeon, with a line on each.
    pub fn built_in() -> [(&'static str, &'static str, Profile); 4] {
        let base = Profile::default();
        [
            ("default", "512 MiB, 1 CPU, user-mode network", Profile { network: Network::User, ..base.clone() }),
            (
                "tiny",
                "128 MiB, 1 CPU, no network, no init",
                Profile { memory: ByteSize::mib(128), init: Init::None, ..base.clone() },
            ),
            (
                "worker",
                "256 MiB, 1 CPU, no network, no init: for steps of pipelines",
                Profile { memory: ByteSize::mib(256), init: Init::None, ..base.clone() },
            ),
            (
                "desktop",
                "1 GiB, 2 CPUs, user-mode network, a graphics card",
                Profile { memory: ByteSize::gib(1), cpus: 2, network: Network::User, display: true, ..base },
            ),
        ]
    }

    /// A built-in profile by name.
    ///
    /// # Errors
    /// `NotFound`, with the names there are.
    pub fn named(name: &str) -> Result<Profile> {
        let all = Self::built_in();
        let names = all.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ");
        all.into_iter().find(|(known, ..)| *known == name).map(|(.., profile)| profile).ok_or_else(|| {
            Error::not_found(format!("there is no profile \"{}\"", crate::path_text::printable(name)))
                .with_hint(format!("profiles: {names}; or give a TOML file: --profile ./my.toml"))
        })
    }

    /// The most memory that a VM of it has.
    pub fn most_memory(&self) -> ByteSize {
        self.max_memory.unwrap_or(self.memory)
    }

    /// The most CPUs that a VM of it has.
    pub fn most_cpus(&self) -> u32 {
        self.max_cpus.unwrap_or(self.cpus)
    }

    /// What a VM of it begins with.
    pub fn size(&self) -> Size {
        Size { memory: self.memory, cpus: self.cpus }
    }

    /// Checks what holds on every machine. The first element of an error is the key at fault.
    ///
    /// # Errors
    /// The key and an `Invalid` error.
    pub fn check(&self) -> std::result::Result<(), (&'static str, Error)> {
        if self.memory < LEAST_MEMORY {
            return Err((
                "memory",
                Error::invalid(format!("memory {} is less than the {LEAST_MEMORY} a guest kernel needs", self.memory)),
            ));
        }
        if !self.memory.0.is_multiple_of(1 << 20) {
            return Err(("memory", Error::invalid(format!("memory {:#} is no whole number of MiB", self.memory))));
        }
        if let Some(most) = self.max_memory {
            if most < self.memory || most > MOST_MEMORY {
                let (least, last) = (self.memory, MOST_MEMORY);
                return Err((
                    "max_memory",
                    Error::invalid(format!("max_memory {most:#} is not between memory {least:#} and {last:#}")),
                ));
            }
            if !(most.0 - self.memory.0).is_multiple_of(MEMORY_STEP.0) {
                let what =
                    format!("max_memory {most:#} is not memory {:#} and a multiple of {MEMORY_STEP:#}", self.memory);
                return Err(("max_memory", Error::invalid(what)));
            }
        }
        if self.cpus == 0 || self.cpus > MOST_CPUS {
            return Err(("cpus", Error::invalid(format!("cpus {} is not between 1 and {MOST_CPUS}", self.cpus))));
        }
        if let Some(most) = self.max_cpus
            && !(self.cpus..=MOST_CPUS).contains(&most)
        {
            let cpus = self.cpus;
            let what = format!("max_cpus {most} is not between cpus {cpus} and {MOST_CPUS}");
            return Err(("max_cpus", Error::invalid(what)));
        }
        if let Some(disk) = self.disk
            && (disk.0 % 512 != 0 || disk.0 == 0 || disk > MOST_DISK)
        {
            return Err((
                "disk",
                Error::invalid(format!("disk {disk:#} is not a multiple of 512 bytes up to {MOST_DISK}")),
            ));
        }
        if self.cpu_percent.is_some_and(|percent| percent == 0 || percent > 100 * MOST_CPUS) {
            return Err(("cpu_percent", Error::invalid("cpu_percent is not between 1 and 25500")));
        }
        if let Some(login) = &self.login {
            login.check().map_err(|error| ("login", error))?;
        }
        Ok(())
    }

    /// Checks what this machine can give.
    ///
    /// # Errors
    /// The key and a `Refused` error that names both figures.
    pub fn check_against(&self, capacity: Capacity) -> std::result::Result<(), (&'static str, Error)> {
        if self.memory > capacity.memory {
            return Err((
                "memory",
                Error::refused(format!("memory {} is more than the {} this machine has", self.memory, capacity.memory)),
            ));
        }
        if self.most_memory() > capacity.memory {
            let most = self.most_memory();
            return Err((
                "max_memory",
                Error::refused(format!("max_memory {most} is more than the {} this machine has", capacity.memory)),
            ));
        }
        for (key, cpus) in [("cpus", self.cpus), ("max_cpus", self.most_cpus())] {
            if cpus > capacity.cpus.saturating_mul(8).max(8) {
                let has = capacity.cpus;
                let what = format!("{key} {cpus} is more than eight times the {has} this machine has");
                return Err((key, Error::refused(what)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_are_valid() {
        for (name, _, profile) in Profile::built_in() {
            assert!(profile.check().is_ok(), "{name}");
        }
        assert_eq!(Profile::named("huge").unwrap_err().kind, crate::ErrorKind::NotFound);
    }

    #[test]
    fn bad_values_are_named() {
        let bad = |profile: Profile| profile.check().unwrap_err().0;
        assert_eq!(bad(Profile { memory: ByteSize::mib(1), ..Profile::default() }), "memory");
        assert_eq!(bad(Profile { memory: ByteSize(ByteSize::gib(1).0 + 1), ..Profile::default() }), "memory");
        assert_eq!(bad(Profile { max_memory: Some(ByteSize::mib(256)), ..Profile::default() }), "max_memory");
        assert_eq!(bad(Profile { max_memory: Some(ByteSize::gib(1024)), ..Profile::default() }), "max_memory");
        assert_eq!(bad(Profile { cpus: 0, ..Profile::default() }), "cpus");
        assert_eq!(bad(Profile { disk: Some(ByteSize(100)), ..Profile::default() }), "disk");
        assert_eq!(bad(Profile { max_memory: Some(ByteSize::mib(513)), ..Profile::default() }), "max_memory");
        assert_eq!(bad(Profile { cpus: 2, max_cpus: Some(1), ..Profile::default() }), "max_cpus");
        let nobody = Login { user: None, keys: Vec::new() };
        assert_eq!(bad(Profile { login: Some(nobody), ..Profile::default() }), "login");
        let capacity = Capacity { memory: ByteSize::gib(1), cpus: 2 };
        let large = Profile { memory: ByteSize::gib(2), ..Profile::default() };
        assert_eq!(large.check_against(capacity).unwrap_err().0, "memory");
        let growing = Profile { max_memory: Some(ByteSize::gib(2)), ..Profile::default() };
        assert!(growing.check().is_ok());
        assert_eq!(growing.check_against(capacity).unwrap_err().0, "max_memory");
    }
}
