//! QEMU's command line, computed from what the VM shall be. Pure: the same machine, the same words.
//!
//! QEMU is started inside a directory of its own and every path is relative to it, so that an
//! unprivileged QEMU needs no right to any directory above. The host process writes nothing there once
//! QEMU runs: whoever took QEMU over could lead such a write elsewhere by a link.

use burgeon_api::{
    ByteSize,
    disk::ROOT,
    image::Boot,
    profile::{Init, MEMORY_STEP, Network, Profile},
    vm::{Accelerator, Size},
};

/// Names of the files in a VM's directory.
pub mod file {
    /// Beside these three, which belong to the host process, QEMU's own directory.
    pub const RECORD: &str = "vm.json";
    pub const QEMU_LOG: &str = "qemu.log";
    pub const CONSOLE_LOG: &str = "console.log";
    pub const QEMU_DIRECTORY: &str = "q";
    pub const MONITOR: &str = "qmp.sock";
    pub const AGENT: &str = "agent.sock";
    pub const CONSOLE: &str = "console.sock";
    pub const KERNEL: &str = "vmlinuz";
    pub const INITRAMFS: &str = "initramfs";
    pub const BASE: &str = "base.raw";
    pub const OVERLAY: &str = "disk.qcow2";
    /// Where the host process serves the disk.
    pub const DISK: &str = "disk.sock";
    /// The directory that a foreign image sees as a NoCloud seed.
    pub const SEED: &str = "seed";
}

/// How long QEMU holds a guest's requests back while the disk's socket does not answer, in seconds.
const RECONNECT_S: u32 = 30 * 24 * 3600;

/// The name under which the guest finds the agent's channel.
pub const AGENT_PORT: &str = "burgeon.agent.0";

/// The socket, in QEMU's directory, on which a disk is served.
#[must_use]
pub fn socket_name(disk: &str) -> String {
    if disk == ROOT { file::DISK.into() } else { format!("disk-{disk}.sock") }
}

/// QEMU's name for a disk: of its block node and, beside the root, of its device.
#[must_use]
pub fn node_name(disk: &str) -> String {
    if disk == ROOT { "disk".into() } else { format!("disk-{disk}") }
}

/// QEMU's name for a hot-plug port.
#[must_use]
pub fn port_name(port: u8) -> String {
    format!("port-{port}")
}

/// The block node of a served disk. While no host process serves it, requests wait instead of failing in the guest.
#[must_use]
pub fn disk_node(disk: &str) -> serde_json::Value {
    serde_json::json!({
        "driver": "nbd", "node-name": node_name(disk), "server": {"type": "unix", "path": socket_name(disk)},
        "reconnect-delay": RECONNECT_S, "open-timeout": 10, "discard": "unmap",
    })
}

/// The device of a disk beside the root.
#[must_use]
pub fn disk_device(disk: &str, port: u8) -> serde_json::Value {
    let node = node_name(disk);
    serde_json::json!({"driver": "virtio-blk-pci", "drive": node, "id": node, "bus": port_name(port), "serial": disk})
}

/// QEMU's name for the device by which a guest's memory grows, and for that memory.
pub const GROWTH: &str = "growth";
/// Guests take memory up in sections of so much: a block that ends within one would lose its end.
const SECTION: u64 = 128 << 20;

/// How large the block is that a guest's memory grows into; 0 where it does not grow.
#[must_use]
pub fn growth_length(profile: &Profile) -> u64 {
    (profile.most_memory().bytes() - profile.memory.bytes()).next_multiple_of(SECTION)
}

/// How much memory there is to be captured: all that the guest may ever have.
#[must_use]
pub fn memory_length(profile: &Profile) -> u64 {
    profile.memory.bytes() + growth_length(profile)
}

/// Where QEMU finds the VM's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFrom {
    /// In two files: an overlay above a raw base.
    Files,
    /// Served by the host process at [`file::DISK`].
    Socket,
}

/// All that decides a command line.
#[derive(Clone, Debug)]
pub struct Machine {
    pub name: String,
    pub uuid: String,
    pub profile: Profile,
    pub boot: Boot,
    pub accelerator: Accelerator,
    pub disk: Option<DiskFrom>,
    /// Whether the disk is a clone of another VM's: then the guest makes anew what it must not share.
    pub is_clone: bool,
    /// Whether a seed directory stands beside the disk.
    pub seed: bool,
    pub init: String,
    pub kernel_parameters: Vec<String>,
    /// The host's time stamp counter. Under TCG the guest kernel is told it, because calibrating
    /// against the timer chip fails on a busy host and such a kernel then hangs for ever.
    pub tsc_khz: Option<u64>,
    /// QEMU's translation cache under TCG.
    pub translation_cache: ByteSize,
    /// Hot-plug ports for disks.
    pub ports: u8,
    /// Disks served by the host process beside the root, and their ports.
    pub attached: Vec<(String, u8)>,
    /// Raw block devices given to the guest beside its disk, read-only with a throw-away overlay.
    pub extra_disks: Vec<String>,
    /// What the guest has from the first moment on, where it boots.
    pub size: Size,
    /// The descriptor that QEMU inherits with the guest's memory. Then it starts nothing: it waits for the devices' state.
    pub memory: Option<i32>,
}

/// The arguments after the program's name.
pub fn arguments(machine: &Machine) -> Vec<String> {
    let mut out: Vec<String> = Vec::with_capacity(64);
    let mut add = |words: &[&str]| out.extend(words.iter().map(ToString::to_string));
    let profile = &machine.profile;

    add(&["-name", &format!("guest={}", machine.name), "-uuid", &machine.uuid]);
    add(&["-nodefaults", "-no-user-config", "-display", "none"]);
    let board = "q35,vmport=off,smbus=off,hpet=on";
    match machine.memory {
        None => add(&["-machine", board]),
        Some(descriptor) => {
            let size = profile.memory.bytes();
            // Private: what the guest writes goes to pages of its own.
            let memory =
                format!("memory-backend-file,id=memory,size={size},mem-path=/proc/self/fd/{descriptor},share=off");
            add(&["-object", &memory, "-machine", &format!("{board},memory-backend=memory")]);
            // The state of devices is saved without the section that names the machine.
            add(&["-S", "-incoming", "defer", "-global", "migration.send-configuration=off"]);
        }
    }
    match machine.accelerator {
        Accelerator::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => {
            let cache = machine.translation_cache.bytes() >> 20;
            // Without "enhanced rep movsb" the guest kernel copies by words: two to three times faster when emulated.
            add(&["-accel", &format!("tcg,thread=multi,tb-size={cache}"), "-cpu", "max,-erms"]);
        }
    }
    let growth = growth_length(profile);
    let most = if growth > 0 { format!(",maxmem={}M", memory_length(profile) >> 20) } else { String::new() };
    add(&["-m", &format!("{}M{most}", profile.memory.bytes() >> 20), "-smp", &profile.most_cpus().to_string()]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);

    let socket = |id: &str, path: &str| format!("socket,id={id},path={path},server=on,wait=off");
    add(&["-chardev", &socket("monitor", file::MONITOR), "-mon", "chardev=monitor,mode=control"]);
    add(&["-chardev", &socket("console", file::CONSOLE), "-serial", "chardev:console"]);
    add(&["-object", "rng-random,id=entropy,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=entropy"]);
    if machine.boot == Boot::Agent {
        add(&["-device", "virtio-serial-pci,id=channel,max_ports=4"]);
        add(&["-chardev", &socket("agent", file::AGENT)]);
        add(&["-device", &format!("virtserialport,bus=channel.0,nr=1,chardev=agent,name={AGENT_PORT}")]);
        if machine.memory.is_none() {
            add(&["-kernel", file::KERNEL, "-initrd", file::INITRAMFS, "-append", &kernel_command_line(machine)]);
        }
    }
    match machine.disk {
        Some(DiskFrom::Files) => {
            let base =
                format!("driver=file,node-name=base-file,filename={},read-only=on,auto-read-only=off", file::BASE);
            let overlay = format!("driver=file,node-name=disk-file,filename={},discard=unmap", file::OVERLAY);
            add(&["-blockdev", &base, "-blockdev", "driver=raw,node-name=base,file=base-file,read-only=on"]);
            add(&["-blockdev", &overlay]);
            add(&["-blockdev", "driver=qcow2,node-name=disk,file=disk-file,backing=base,discard=unmap"]);
        }
        Some(DiskFrom::Socket) => {
            add(&["-blockdev", &disk_node(ROOT).to_string()]);
        }
        None => {}
    }
    if machine.disk.is_some() {
        // With a kernel given, the firmware starts that and has no use for the disk.
        let order = if machine.boot == Boot::Firmware { ",bootindex=0" } else { "" };
        add(&["-device", &format!("virtio-blk-pci,drive=disk{order}")]);
    }
    for (index, path) in machine.extra_disks.iter().enumerate() {
        let node = format!("extra-{index}");
        add(&["-blockdev", &format!("driver=file,node-name={node}-file,filename={path},read-only=on")]);
        add(&["-blockdev", &format!("driver=raw,node-name={node},file={node}-file,read-only=on")]);
        add(&["-device", &format!("virtio-blk-pci,drive={node}")]);
    }
    if machine.seed {
        // cloud-init finds the seed by the file system's label; QEMU makes the file system from a directory.
        let seed = format!("driver=vvfat,node-name=seed,dir={},label=CIDATA,read-only=on", file::SEED);
        add(&["-blockdev", &seed, "-device", "virtio-blk-pci,drive=seed"]);
    }
    // Behind all others, so that their places do not move.
    for port in 1..=machine.ports {
        add(&["-device", &format!("pcie-root-port,id={},chassis={port}", port_name(port))]);
    }
    for (disk, port) in &machine.attached {
        add(&["-blockdev", &disk_node(disk).to_string(), "-device", &disk_device(disk, *port).to_string()]);
    }
    match profile.network {
        Network::None => {}
        Network::User => {
            add(&["-netdev", "user,id=outside,ipv6=off", "-device", "virtio-net-pci,netdev=outside,romfile="]);
        }
    }
    if growth > 0 {
        // No file: the device makes holes in it.
        add(&["-object", &format!("memory-backend-ram,id={GROWTH}-memory,size={growth},reserve=off")]);
        // What the state of a captured one says comes with that.
        let wanted = if machine.memory.is_some() { 0 } else { machine.size.memory.bytes() - profile.memory.bytes() };
        let (memory, step) = (format!("memdev={GROWTH}-memory"), MEMORY_STEP.bytes());
        let device = format!("virtio-mem-pci,id={GROWTH},{memory},block-size={step},requested-size={wanted}");
        add(&["-device", &device]);
    }
    if profile.display {
        // No listener of QEMU's own: the host process hands over each client's socket.
        add(&["-device", "VGA,vgamem_mb=16", "-vnc", "none", "-device", "qemu-xhci", "-device", "usb-tablet"]);
        add(&["-device", "usb-kbd"]);
    }
    out
}

fn kernel_command_line(machine: &Machine) -> String {
    let mut words = vec!["console=ttyS0".to_string(), "quiet".into(), "panic=-1".into(), "reboot=t".into()];
    if machine.accelerator == Accelerator::Tcg
        && let Some(khz) = machine.tsc_khz
    {
        words.push(format!("tsc_early_khz={khz}"));
    }
    if machine.accelerator == Accelerator::Tcg {
        // Emulated code does not speculate; the mitigations would only cost.
        words.push("mitigations=off".into());
        // On a busy host the timer's first ticks come late, and the kernel would take that for a broken board and panic.
        words.push("no_timer_check".into());
        // The emulated counters are one clock, so that no kernel thread need compare them for ever.
        words.push("tsc=reliable".into());
        // Programs at the same addresses let QEMU use its translations again: a start of a program takes
        // half the time. Only for throw-away workers; a guest with services of its own keeps its defence.
        if machine.profile.init == Init::None {
            words.push("norandmaps".into());
            // What only costs where nobody has set it up: accounting of pressure, and security modules that have no policy.
            words.extend(["psi=0", "lsm=landlock,yama"].map(str::to_string));
        }
    }
    if growth_length(&machine.profile) > 0 {
        // Memory may come beyond 4 GiB, and the kernel would set 64 MiB aside for devices that do not reach it. Ours do.
        words.push("swiotlb=512".into());
        // What it is given it uses; mostly for what can be moved, as long as the kernel has enough for the rest, because
        // only that can be given back.
        words.extend(["memhp_default_state=online", "memory_hotplug.online_policy=auto-movable"].map(str::to_string));
    }
    if machine.profile.most_cpus() > machine.size.cpus {
        // The others are there, and the guest begins to use them when it is told to.
        words.push(format!("maxcpus={}", machine.size.cpus));
    }
    words.push(format!("burgeon.name={}", machine.name));
    // systemd would else take the name in the image's /etc/hostname.
    words.push(format!("systemd.hostname={}", machine.name));
    let own_root = machine.kernel_parameters.iter().any(|word| word.starts_with("burgeon.root="));
    if machine.disk.is_some() && !own_root {
        words.push("burgeon.root=/dev/vda".into());
    }
    if machine.is_clone {
        words.push(format!("burgeon.instance={}", machine.uuid));
    }
    if machine.profile.init == Init::Image && !machine.init.is_empty() && machine.disk.is_some() {
        words.push(format!("burgeon.init={}", machine.init));
    }
    words.extend(machine.kernel_parameters.iter().cloned());
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            name: "web-1".into(),
            uuid: "0".into(),
            profile: Profile::default(),
            boot: Boot::Agent,
            accelerator: Accelerator::Tcg,
            disk: Some(DiskFrom::Files),
            is_clone: false,
            seed: false,
            init: "/sbin/init".into(),
            kernel_parameters: vec![],
            tsc_khz: Some(2_596_118),
            translation_cache: ByteSize::mib(64),
            ports: 4,
            attached: vec![("data".into(), 2)],
            extra_disks: vec![],
            size: Profile::default().size(),
            memory: None,
        }
    }

    #[test]
    fn memory_grows_where_the_profile_says_so() {
        assert!(!arguments(&machine()).join(" ").contains("virtio-mem"));
        let (memory, max_memory) = (ByteSize::mib(128), Some(ByteSize::mib(300)));
        let profile = Profile { memory, max_memory, ..Profile::default() };
        let size = Size { memory: ByteSize::mib(192), cpus: 1 };
        let growing = Machine { profile, size, ..machine() };
        let words = arguments(&growing).join(" ");
        // The guest cannot use a part of a section.
        assert!(words.contains("-m 128M,maxmem=384M") && words.contains("swiotlb=512"), "{words}");
        assert!(words.contains("memdev=growth-memory,block-size=2097152,requested-size=67108864"), "{words}");
        let words = arguments(&Machine { memory: Some(7), ..growing }).join(" ");
        assert!(words.contains("requested-size=0") && words.contains("size=134217728,mem-path="), "{words}");
    }

    #[test]
    fn a_machine_with_its_memory_starts_nothing() {
        let words = arguments(&Machine { memory: Some(7), ..machine() }).join(" ");
        assert!(
            words.contains("mem-path=/proc/self/fd/7,share=off") && words.contains("-S -incoming defer"),
            "{words}"
        );
        assert!(!words.contains("-kernel") && words.contains("memory-backend=memory"), "{words}");
    }

    #[test]
    fn cpus_that_may_be_used_later_are_there() {
        assert!(!arguments(&machine()).join(" ").contains("maxcpus"));
        let profile = Profile { max_cpus: Some(4), ..Profile::default() };
        let size = Size { cpus: 2, ..profile.size() };
        let words = arguments(&Machine { profile, size, ..machine() }).join(" ");
        assert!(words.contains("-smp 4") && words.contains("maxcpus=2"), "{words}");
    }

    #[test]
    fn nothing_leaves_the_directory_and_the_sandbox_is_on() {
        let words = arguments(&machine());
        assert!(
            words
                .iter()
                .all(|word| !word.contains("=/") || word.contains("/dev/urandom") || word.starts_with("console"))
        );
        assert!(words.iter().any(|word| word.starts_with("on,obsolete=deny")));
        assert!(words.iter().any(|word| word.contains("tsc_early_khz=2596118")));
        assert!(words.iter().any(|word| word.contains("burgeon.root=/dev/vda burgeon.init=/sbin/init")));
    }

    #[test]
    fn disks_are_plugged_into_their_ports() {
        let words = arguments(&machine());
        let device =
            words.iter().find(|word| word.contains("\"disk-data\"") && word.contains("virtio-blk-pci")).unwrap();
        assert!(device.contains("\"bus\":\"port-2\"") && device.contains("\"serial\":\"data\""), "{device}");
        assert!(words.iter().any(|word| word.contains("disk-data.sock")));
        assert!(words.iter().any(|word| word == "pcie-root-port,id=port-4,chassis=4"));
    }

    #[test]
    fn a_worker_starts_no_init_and_has_no_network() {
        let mut worker = machine();
        worker.profile = Profile::named("worker").unwrap();
        let words = arguments(&worker).join(" ");
        assert!(!words.contains("burgeon.init"), "{words}");
        assert!(!words.contains("netdev"), "{words}");
    }

    #[test]
    fn a_foreign_image_gets_firmware_seed_and_network_but_no_kernel() {
        let mut foreign = machine();
        foreign.boot = Boot::Firmware;
        foreign.seed = true;
        foreign.profile = Profile::named("default").unwrap();
        let words = arguments(&foreign).join(" ");
        assert!(!words.contains("-kernel") && !words.contains("virtserialport"), "{words}");
        assert!(words.contains("vvfat") && words.contains("label=CIDATA") && words.contains("virtio-net-pci"));
    }
}
