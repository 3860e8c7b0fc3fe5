//! Whether KVM really runs a guest here.
//!
//! Opening /dev/kvm proves nothing: inside some virtual machines it opens, creates VMs, and runs no
//! ordinary kernel. So a kernel and initramfs that Burgeon is going to use anyway are booted under KVM
//! once, and KVM is used only if the agent inside says a word on its channel in time.

use std::{path::Path, time::Duration};

use burgeon_api::{
    ByteSize, Error, Result,
    image::Boot,
    profile::{Init, Profile},
    vm::Accelerator,
};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::UnixStream, time::Instant};

use crate::{
    command::{Machine, arguments, file},
    facts::Qemu,
    process::{Process, give_directory, host_boot_id, log_tail, run_as, start},
};

/// A guest on working KVM answers in well under a second.
const DEADLINE: Duration = Duration::from_secs(8);

/// What the user asks for: `BURGEON_ACCEL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Auto,
    Kvm,
    Tcg,
}

impl std::str::FromStr for Wish {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" | "" => Ok(Wish::Auto),
            "kvm" => Ok(Wish::Kvm),
            "tcg" => Ok(Wish::Tcg),
            _ => Err(Error::invalid(format!(
                "BURGEON_ACCEL=\"{}\" is not auto, kvm or tcg",
                burgeon_api::path_text::printable(text)
            ))),
        }
    }
}

/// What was found out, kept in a file: it holds for this boot of the host and this QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub host_boot_id: String,
    pub qemu_version: String,
    pub kvm_works: bool,
    /// One plain line for people.
    pub reason: String,
}

impl Verdict {
    /// The verdict kept in `file`, if it is about this boot and this QEMU.
    pub fn load(file: &Path, qemu: &Qemu) -> Option<Verdict> {
        let verdict: Verdict = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        (verdict.host_boot_id == host_boot_id() && verdict.qemu_version == qemu.version).then_some(verdict)
    }

    /// Keeps the verdict; a failure only means that the next start probes again.
    pub fn store(&self, file: &Path) {
        if let Ok(bytes) = serde_json::to_vec_pretty(self)
            && let Err(error) = std::fs::write(file, bytes)
        {
            tracing::debug!(%error, "the KVM verdict could not be kept");
        }
    }

    pub fn accelerator(&self) -> Accelerator {
        if self.kvm_works { Accelerator::Kvm } else { Accelerator::Tcg }
    }
}

/// Whether /dev/kvm can be opened at all; the reason where it cannot.
///
/// # Errors
/// One plain line.
pub fn device() -> std::result::Result<(), String> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err("there is no /dev/kvm on this machine".to_string())
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err("/dev/kvm may not be opened by this user (join the group kvm)".to_string())
        }
        Err(error) => Err(format!("/dev/kvm does not open: {error}")),
    }
}

/// Boots the kernel and initramfs that lie in the directory `q` below `directory` under KVM. The
/// directory belongs to the probe; the caller removes it.
pub async fn probe(qemu: &Qemu, directory: &Path) -> Verdict {
    let verdict = |kvm_works, reason: String| Verdict {
        host_boot_id: host_boot_id(),
        qemu_version: qemu.version.clone(),
        kvm_works,
        reason,
    };
    if let Err(reason) = device() {
        return verdict(false, reason);
    }
    match guest_speaks(qemu, directory).await {
        Ok(time) => verdict(true, format!("a probe guest ran under KVM in {} ms", time.as_millis())),
        Err(error) => verdict(
            false,
            format!(
                "/dev/kvm opens, and a probe guest did not run under it ({}); guests run emulated (TCG)",
                error.message
            ),
        ),
    }
}

async fn guest_speaks(qemu: &Qemu, directory: &Path) -> Result<Duration> {
    let profile = Profile { memory: ByteSize::mib(256), init: Init::None, ..Profile::default() };
    let machine = Machine {
        name: "kvm-probe".into(),
        uuid: "00000000-0000-0000-0000-000000000000".into(),
        size: profile.size(),
        profile,
        boot: Boot::Agent,
        accelerator: Accelerator::Kvm,
        disk: None,
        seed: false,
        init: String::new(),
        kernel_parameters: vec![],
        tsc_khz: None,
        translation_cache: ByteSize::mib(32),
        is_clone: false,
        ports: 0,
        attached: vec![],
        extra_disks: vec![],
        memory: None,
    };
    let begun = Instant::now();
    // The same user as the VMs will have, so that the probe proves what will be done.
    let run_as = run_as(0, Accelerator::Kvm);
    let inside = directory.join(file::QEMU_DIRECTORY);
    give_directory(&inside, run_as)?;
    let identity = start(&qemu.program, &arguments(&machine), &inside, &directory.join(file::QEMU_LOG), run_as, None)?;
    let process = Process::hold(&identity)?;
    let spoken = async {
        let mut agent = loop {
            match UnixStream::connect(inside.join(file::AGENT)).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let mut byte = [0];
        agent.read_exact(&mut byte).await.map_err(|error| Error::io("hear from the guest", &error))
    };
    let outcome = tokio::select! {
        spoken = tokio::time::timeout(DEADLINE, spoken) => match spoken {
            Ok(Ok(_)) => Ok(begun.elapsed()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::deadline(format!("no word from it within {} s", DEADLINE.as_secs()))),
        },
        () = process.ended() => Err(Error::internal(format!("QEMU ended: {}", log_tail(&directory.join(file::QEMU_LOG), 400)))),
    };
    process.kill();
    process.ended().await;
    let _how = process.reap();
    outcome
}
