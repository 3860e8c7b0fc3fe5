//! A guest that goes on from a captured state: what it leaves behind before, and who it is afterwards.
//!
//! Between the two the workload is frozen. Whoever goes on without having been renewed would draw the random numbers of
//! its siblings, so every step that fails here fails the whole, and the host ends such a guest.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use burgeon_guest::protocol::{Answer, Failure, FailureKind, Identity, Proof, Provision, Receipt};
use rustix::{
    net::{AddressFamily, SocketType},
    rand::GetRandomFlags,
    time::{ClockId, Timespec},
};

use crate::{
    connections, disk,
    files::{Kept, names, write_over},
    generation, provisions, server_keys,
    spawn::{failure, io_failure},
    sys, system,
};

static GENERATOR: Kept = Kept::new("/dev/urandom");
/// Programs of the image that make it another machine, in the order of their names.
const HOOKS: &str = "/etc/burgeon/on-clone.d";
const HOOK_PATIENCE: Duration = Duration::from_secs(10);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const OWN_BOOT_ID: &str = "/run/burgeon/boot_id";
const COMMAND_LINE: &str = "/proc/cmdline";
const OWN_COMMAND_LINE: &str = "/run/burgeon/cmdline";
/// Words of it that name the machine. An init that is starting still reads them.
const NAMES: [&str; 2] = ["burgeon.name=", "systemd.hostname="];
/// Which clock the kernel reads. For a second after its start one that ends in "-early"; the change is work that each clone
/// would have to do.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
const CLOCK_PATIENCE: Duration = Duration::from_secs(3);
const MACHINE_ID: &str = "/etc/machine-id";
/// Where systemd's containers have their roots.
const CONTAINERS: &str = "/var/lib/machines";
/// Addresses that were given to another machine.
const LEASES: [&str; 4] =
    ["/var/lib/dhcp", "/var/lib/dhclient", "/var/lib/NetworkManager", "/run/systemd/netif/leases"];

/// Before the guest is captured.
pub(crate) fn settle(generalise: bool) -> Result<Answer, Failure> {
    if generalise {
        disk::replace_own(Path::new("/"), "")
            .map_err(|error| io_failure("cannot forget who this machine is", &error))?;
        provisions::forget_secrets()
            .map_err(|error| io_failure("cannot remove the secrets of this machine", &error))?;
        for directory in LEASES {
            for name in names(Path::new(directory)).unwrap_or_default() {
                if name.to_string_lossy().contains("lease") {
                    let _gone_already = fs::remove_file(Path::new(directory).join(name));
                }
            }
        }
    }
    rustix::fs::sync();
    if generalise {
        // Only what saves time and room: a kernel without these switches is captured larger. Clones share their memory
        // for as long as their kernels leave it where it is.
        let switches =
            [("compaction_proactiveness", "0"), ("stat_interval", "60"), ("drop_caches", "3"), ("compact_memory", "1")];
        for (switch, value) in switches {
            let _larger = fs::write(format!("/proc/sys/vm/{switch}"), value);
        }
        rehearse()?;
    }
    Ok(Answer::Done)
}

/// Does before the capture what each clone is going to do: what is made once then, such as mounts and the kernel's caches,
/// is in the state.
fn rehearse() -> Result<(), Failure> {
    let until = Instant::now() + CLOCK_PATIENCE;
    while read(CLOCK).ends_with("-early") && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut entropy = vec![0; 64];
    rustix::rand::getrandom(&mut entropy, GetRandomFlags::empty())
        .map_err(|error| io_failure("cannot draw random bytes", &error.into()))?;
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let own = Identity {
        entropy,
        time_ns: nanoseconds(&now),
        host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        ..Identity::default()
    };
    renew(&own, &[Provision::Rehearsal, Provision::KeepSecrets]).map(drop)
}

fn nanoseconds(time: &Timespec) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Makes this guest the one that is wanted, and shows it.
pub(crate) fn renew(wanted: &Identity, more: &[Provision]) -> Result<(Receipt, Vec<Proof>), Failure> {
    let step = |what: &'static str| move |error: io::Error| io_failure(what, &error);
    // First of all, so that nothing after it draws what a sibling draws.
    let entropy = wanted.entropy.first_chunk::<64>().filter(|_| wanted.entropy.len() == 64);
    let entropy = entropy.ok_or_else(|| failure(FailureKind::Invalid, "the entropy is not 64 bytes"))?;
    GENERATOR
        .file()
        .and_then(|generator| sys::add_entropy(generator, entropy))
        .map_err(step("cannot renew the kernel's generator"))?;
    // While the addresses are still those that the other ends know.
    let (ended_connections, kept_connections) = connections::end_inherited(wanted.end_connections)?;
    system::set_clock(wanted.time_ns)?;
    system::set_host_name(&wanted.host_name)?;
    if Path::new("/etc/hostname").is_file() {
        write_over("/etc/hostname", &format!("{}\n", wanted.host_name)).map_err(step("cannot write /etc/hostname"))?;
    }
    let has_ssh_server = server_keys::is_there(Path::new("/"));
    if let Some(id) = wanted.machine_id {
        let id = format!("{}\n", hexadecimal(&id));
        disk::replace_own(Path::new("/"), &id).map_err(step("cannot forget who this machine was"))?;
        new_container_ids(Path::new(CONTAINERS)).map_err(step("cannot write a container's machine id"))?;
    }
    let mut shown = Vec::new();
    if kept_connections > 0 {
        shown.push(Proof::KeptConnections(kept_connections));
    }
    for provision in more {
        match provision {
            Provision::SshHostKey { private, public } if has_ssh_server => {
                let public = server_keys::replace(Path::new("/"), private, public)
                    .map_err(step("cannot write the SSH server's key"))?;
                server_keys::have_read_anew();
                shown.push(Proof::SshHostKey(public));
            }
            Provision::SshHostKey { .. }
            | Provision::KeepSecrets
            | Provision::Rehearsal
            | Provision::Environment(_)
            | Provision::Secret { .. } => {}
        }
    }
    if wanted.machine_id.is_some() && !more.contains(&Provision::KeepSecrets) {
        provisions::forget_secrets().map_err(step("cannot remove the secrets of another machine"))?;
    }
    provisions::take(more)?;
    new_boot_id().map_err(step("cannot renew the boot id"))?;
    let command_line = renamed(&read(COMMAND_LINE), &wanted.host_name);
    lay_over(COMMAND_LINE, OWN_COMMAND_LINE, &command_line).map_err(step("cannot renew the kernel's command line"))?;
    let cards = cards();
    if cards.len() < wanted.hardware_addresses.len() {
        let message = format!("there are {} network cards, not {}", cards.len(), wanted.hardware_addresses.len());
        return Err(failure(FailureKind::Unsupported, message));
    }
    for (card, address) in cards.iter().zip(&wanted.hardware_addresses) {
        readdress(card, *address).map_err(step("cannot give a network card its address"))?;
    }
    let generation = hexadecimal(&wanted.generation);
    generation::renew(&generation).map_err(step("cannot write the generation"))?;
    let is_rehearsal = more.contains(&Provision::Rehearsal);
    let hooks = if is_rehearsal { Vec::new() } else { run_hooks(&generation)? };
    let mut sample = [0; 16];
    rustix::rand::getrandom(&mut sample, GetRandomFlags::empty())
        .map_err(|error| io_failure("cannot draw random bytes", &error.into()))?;
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let uname = rustix::system::uname();
    let receipt = Receipt {
        generation: wanted.generation,
        sample,
        time_ns: nanoseconds(&now),
        host_name: uname.nodename().to_string_lossy().into_owned(),
        machine_id: read(MACHINE_ID),
        boot_id: read(BOOT_ID),
        hardware_addresses: cards.iter().filter_map(|card| address(card)).collect(),
        ended_connections,
        hooks,
    };
    Ok((receipt, shown))
}

/// Gives containers below `machines` other machine ids: each that has one.
fn new_container_ids(machines: &Path) -> io::Result<()> {
    for name in names(machines).unwrap_or_default() {
        let path = machines.join(name).join("etc/machine-id");
        // A container's own root may point anywhere: only a file of its own is written.
        let own = |path: &Path| fs::symlink_metadata(path).is_ok_and(|about| about.is_file() && about.len() > 1);
        let straight = fs::canonicalize(&path).is_ok_and(|real| real == path);
        if own(&path) && straight {
            let mut id = [0; 16];
            rustix::rand::getrandom(&mut id, GetRandomFlags::empty())?;
            fs::write(&path, format!("{}\n", hexadecimal(&id)))?;
        }
    }
    Ok(())
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_string()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The kernel's own number stays what it was in the captured state, so another one is laid over it.
fn new_boot_id() -> io::Result<()> {
    let mut bytes = [0_u8; 16];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    // RFC 9562: version 4, variant 10.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = hexadecimal(&bytes);
    let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
    lay_over(BOOT_ID, OWN_BOOT_ID, &parts.join("-"))
}

/// Gives a file of the kernel's, which cannot be written, another content for all who read it from now on.
fn lay_over(path: &str, own: &str, content: &str) -> io::Result<()> {
    // A fork of a fork has it already.
    let is_there = Path::new(own).exists();
    write_over(own, &format!("{content}\n"))?;
    if !is_there {
        fs::set_permissions(own, fs::Permissions::from_mode(0o444))?;
        rustix::mount::mount_bind(own, path)?;
    }
    Ok(())
}

fn renamed(command_line: &str, name: &str) -> String {
    let word = |word: &str| match NAMES.iter().find(|key| word.starts_with(**key)) {
        Some(key) => format!("{key}{name}"),
        None => word.to_string(),
    };
    command_line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

/// Ethernet cards, in the order of their indexes.
fn cards() -> Vec<String> {
    let all = Path::new("/sys/class/net");
    let mut cards: Vec<(u32, String)> = names(all)
        .unwrap_or_default()
        .into_iter()
        .filter(|name| all.join(name).join("device").exists())
        .filter_map(|name| {
            let index = fs::read_to_string(all.join(&name).join("ifindex")).ok()?.trim().parse().ok()?;
            Some((index, name.to_string_lossy().into_owned()))
        })
        .collect();
    cards.sort_unstable();
    cards.into_iter().map(|(_, name)| name).collect()
}

fn readdress(card: &str, address: [u8; 6]) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    sys::set_hardware_address(&socket, card, address)
}

fn address(card: &str) -> Option<[u8; 6]> {
    let text = fs::read_to_string(format!("/sys/class/net/{card}/address")).ok()?;
    let bytes: Vec<u8> =
        text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

/// Runs the image's own programs. One that fails, or takes too long, fails the renewal.
fn run_hooks(generation: &str) -> Result<Vec<(String, u64)>, Failure> {
    let mut programs: Vec<PathBuf> =
        names(Path::new(HOOKS)).unwrap_or_default().into_iter().map(|name| Path::new(HOOKS).join(name)).collect();
    programs.sort_unstable();
    let mut told = Vec::new();
    for program in programs {
        let is_program =
            fs::metadata(&program).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0);
        if !is_program {
            continue;
        }
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let wrong = |what: String| failure(FailureKind::Unsupported, format!("{HOOKS}/{name} {what}"));
        let begun = Instant::now();
        let mut child = Command::new(&program)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("BURGEON_GENERATION", generation)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| wrong(format!("cannot be run: {error}")))?;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if begun.elapsed() < HOOK_PATIENCE => std::thread::sleep(Duration::from_millis(1)),
                _ => {
                    let _ended_already = child.kill();
                    let _its_end_is_what_matters = child.wait();
                    return Err(wrong(format!("has not ended within {} s", HOOK_PATIENCE.as_secs())));
                }
            }
        };
        if !status.success() {
            return Err(wrong(format!("failed: {status}")));
        }
        told.push((name, u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)));
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_the_clone() {
        let was = "quiet burgeon.name=web systemd.hostname=web burgeon.root=/dev/vda";
        assert_eq!(renamed(was, "c-1"), "quiet burgeon.name=c-1 systemd.hostname=c-1 burgeon.root=/dev/vda");
    }

    #[test]
    fn containers_get_machine_ids_of_their_own() {
        let machines = fs::canonicalize(std::env::temp_dir()).unwrap();
        let machines = machines.join(format!("burgeon-machines-{}", std::process::id()));
        let file = |name: &str| machines.join(name).join("etc/machine-id");
        let old = "0123456789abcdef0123456789abcdef\n";
        for name in ["one", "two", "first-boot", "linked"] {
            fs::create_dir_all(file(name).parent().unwrap()).unwrap();
            fs::write(file(name), if name == "first-boot" { "" } else { old }).unwrap();
        }
        fs::rename(file("linked"), machines.join("outside")).unwrap();
        std::os::unix::fs::symlink(machines.join("outside"), file("linked")).unwrap();
        new_container_ids(&machines).unwrap();
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        let (one, two) = (read(file("one")), read(file("two")));
        assert!(one != old && two != old && one != two && one.len() == old.len());
        assert_eq!((read(file("first-boot")), read(machines.join("outside"))), (String::new(), old.to_string()));
        fs::remove_dir_all(&machines).unwrap();
    }

    #[test]
    fn entropy_of_another_length_renews_nothing() {
        let error = renew(&Identity { entropy: vec![1; 63], ..Identity::default() }, &[]).unwrap_err();
        assert_eq!(error.kind, FailureKind::Invalid);
    }
}
