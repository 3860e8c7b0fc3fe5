//! Control messages. The order of variants and fields is the wire format: append, never reorder.
//! Paths, arguments and environment are bytes, as Linux has them.

use serde::{Deserialize, Serialize};

/// Counts what was added to the messages within one version of the protocol. An agent lives as long as the memory that
/// it is captured in, so a host meets older ones, and must not send them what they cannot read.
pub const REVISION: u16 = 4;

/// What a host sends on stream 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    Hello(Hello),
    Request { id: u32, request: Request },
}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The protocol version that the host speaks.
    pub version: u16,
    /// Chosen at random by the host. The agent ends what belongs to any other session.
    pub session: [u8; 16],
    /// Nanoseconds since 1970; sets the guest's clock when that is off by more than half a second.
    pub host_time_ns: u64,
    /// Becomes the guest's host name unless it is empty.
    pub vm_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    Exec(Exec),
    /// Sends a signal to an exec's process group.
    Signal {
        stream: u32,
        signal: i32,
    },
    Resize {
        stream: u32,
        size: TerminalSize,
    },
    /// The host wants no more of this stream: the exec is killed, the put undone, the get ended.
    Close {
        stream: u32,
    },
    Put {
        stream: u32,
        path: Vec<u8>,
        mode: u32,
        size: u64,
    },
    Get {
        stream: u32,
        path: Vec<u8>,
    },
    /// Entries of a directory in byte order of their names, from the first one after `after`.
    List {
        path: Vec<u8>,
        after: Vec<u8>,
    },
    /// Makes a directory and those above it; one that is there already is success.
    MakeDirectory {
        path: Vec<u8>,
        mode: u32,
    },
    /// Sets the clock; nanoseconds since 1970.
    Clock {
        time_ns: u64,
    },
    Figures,
    /// Stops every process but the agent, until Thaw.
    Freeze,
    Thaw,
    Stop {
        how: StopHow,
    },
    /// Sets the host name.
    Identity {
        host_name: String,
    },
    /// Makes mounted file systems as large as their disks.
    Grow,
    /// With the workload frozen, before the guest is captured: brings files to their disks, and gives back what memory
    /// only saves time.
    Settle {
        /// Removes what makes it a certain machine: its id, host keys, seeds, leases.
        generalise: bool,
    },
    /// Makes of a guest that goes on from a captured state the machine that it shall be. Its workload is frozen still.
    Renew(Identity),
    /// The same, with more; since [`REVISION`] 2.
    RenewWith {
        identity: Identity,
        more: Vec<Provision>,
    },
    /// Gives a guest its environment and its secrets: at once, or, while its workload is frozen, with the identity that
    /// follows; since [`REVISION`] 3.
    Provide {
        more: Vec<Provision>,
    },
    /// Uses so many of its CPUs, from the first one on; since [`REVISION`] 4. Without a number it tells how many it uses.
    Cpus {
        online: Option<u32>,
    },
}

/// What a guest gets beside its [`Identity`]. Of each kind but secrets one at most.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Provision {
    /// The host key of its SSH server, where it has one: the two files as OpenSSH writes them. Others are removed.
    SshHostKey { private: Vec<u8>, public: Vec<u8> },
    /// Secrets of the machine that it was stay. Without this they are removed.
    KeepSecrets,
    /// It is not to become this machine yet: another identity follows before its workload goes on. An emulated guest is
    /// slow at what it does for the first time, and so does it once before somebody waits. The image's own programs are
    /// not run, and until the next identity commands are started though the workload is frozen.
    Rehearsal,
    /// Variables for every command, beside those that it was given before; since [`REVISION`] 3.
    Environment(Vec<(Vec<u8>, Vec<u8>)>),
    /// For `/run/burgeon/secrets`; since [`REVISION`] 3.
    Secret { name: Vec<u8>, content: Vec<u8> },
}

// Keys are in no log.
impl std::fmt::Debug for Provision {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::SshHostKey { .. } => "SshHostKey",
            Self::KeepSecrets => "KeepSecrets",
            Self::Rehearsal => "Rehearsal",
            Self::Environment(_) => "Environment",
            Self::Secret { .. } => "Secret",
        })
    }
}

/// Who a guest shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// New for every machine that ever goes on from a captured state.
    pub generation: [u8; 16],
    /// For the kernel's generator, which takes it as full entropy: 64 bytes.
    pub entropy: Vec<u8>,
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    pub host_name: String,
    /// Absent: it keeps the one it has.
    pub machine_id: Option<[u8; 16]>,
    /// For its network cards, in the order of their indexes.
    pub hardware_addresses: Vec<[u8; 6]>,
    /// Whether TCP connections that the captured state holds are ended.
    pub end_connections: bool,
}

/// What a guest shows beside its [`Receipt`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proof {
    /// TCP connections to other machines that the captured state holds and that live on.
    KeptConnections(u32),
    /// The public host key of its SSH server, as it is in its file.
    SshHostKey(Vec<u8>),
}

/// What a guest shows of its new identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    pub generation: [u8; 16],
    /// From its generator, drawn for this and nothing else.
    pub sample: [u8; 16],
    /// Nanoseconds since 1970, by its clock.
    pub time_ns: u64,
    pub host_name: String,
    pub machine_id: String,
    pub boot_id: String,
    pub hardware_addresses: Vec<[u8; 6]>,
    pub ended_connections: u32,
    /// The image's programs in `/etc/burgeon/on-clone.d` that have run, and their microseconds.
    pub hooks: Vec<(String, u64)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Input is this stream, output the next, errors the one after.
    pub stream: u32,
    /// Empty: the user's login shell.
    pub argv: Vec<Vec<u8>>,
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The user's home when absent.
    pub cwd: Option<Vec<u8>>,
    /// Name or number; root when absent.
    pub user: Option<Vec<u8>>,
    pub terminal: Option<TerminalSize>,
    pub time_limit_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopHow {
    PowerOff,
    Reboot,
}

/// What an agent sends on stream 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The agent has started, or met its channel anew.
    Ready(About),
    Welcome {
        session: [u8; 16],
        about: About,
    },
    /// The agent does not speak the host's version; it speaks this one.
    Refused {
        version: u16,
        reason: String,
    },
    Reply {
        id: u32,
        result: Result<Answer, Failure>,
    },
    /// The last word of an exec.
    Exited {
        stream: u32,
        status: ExitStatus,
        cpu_us: u64,
    },
    /// The last word of a stream that broke, and why.
    StreamFailed {
        stream: u32,
        reason: String,
    },
    /// A stage of the guest's start failed; the agent answers from its initramfs.
    BootFailed {
        stage: String,
        reason: String,
    },
    /// Bytes that the agent has skipped so far.
    Noise {
        skipped: u64,
    },
}

/// An agent's account of itself and its guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// With the [`REVISION`] behind a plus sign, where that is not 1.
    pub agent_version: String,
    pub protocol_version: u16,
    pub boot_id: String,
    pub kernel: String,
    pub host_name: String,
    /// Whether the agent is process 1.
    pub is_init: bool,
    pub uptime_ms: u64,
    /// Random for each message, from the guest's own generator: equal nonces show clones that were not reseeded.
    pub nonce: u64,
    /// What went wrong at the start without stopping it.
    pub warnings: Vec<String>,
}

impl About {
    /// The revision of the messages that the agent reads.
    pub fn revision(&self) -> u16 {
        self.agent_version.rsplit_once('+').and_then(|(_, revision)| revision.parse().ok()).unwrap_or(1)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Started {
        pid: u32,
    },
    File {
        mode: u32,
        size: u64,
    },
    Entries {
        entries: Vec<FileEntry>,
        more: bool,
    },
    Figures(Figures),
    Receipt(Receipt),
    /// To [`Request::RenewWith`].
    Renewed {
        receipt: Receipt,
        more: Vec<Proof>,
    },
    /// How many the guest uses; to [`Request::Cpus`].
    Cpus(u32),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: Vec<u8>,
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    pub size: u64,
    /// Seconds since 1970.
    pub modified_s: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    File,
    Directory,
    Link,
    Other,
}

/// Figures of a running guest; `burgeon_api::vm::Figures` on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    pub uptime_ms: u64,
    pub load_hundredths: u32,
    pub memory_total: u64,
    pub memory_available: u64,
    pub processes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    Code(i32),
    Signal(i32),
    TimeLimit,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    Invalid,
    NotFound,
    PermissionDenied,
    Exists,
    /// Not in this guest, or not in its present state.
    Unsupported,
    /// Too many at once, or no space.
    Limit,
    Io,
}
