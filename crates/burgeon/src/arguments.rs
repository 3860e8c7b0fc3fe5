//! What the command line takes. The comments are the help.

use std::path::PathBuf;

use burgeon_api::{ByteSize, TimeSpan};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// A private cloud of forkable virtual machines on Linux machines that you own.
#[derive(Debug, Parser)]
#[command(name = "burgeon", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Where everything is kept; $XDG_DATA_HOME/burgeon when absent
    #[arg(long, global = true, env = "BURGEON_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    #[arg(skip)]
    pub data_set_by: Option<&'static str>,
    /// How results are shown
    #[arg(long, short = 'o', global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline over the files of a directory
    Run(RunArguments),
    /// List VMs
    Ps(ListArguments),
    /// Run a command in a VM
    Exec(ExecArguments),
    /// Open a shell in a VM
    Shell(ShellArguments),
    /// Show what a VM wrote to its console
    Logs(VmName),
    /// Make other VMs of a running one, as it is at this instant
    Fork(ForkArguments),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// VMs that were booted and warmed up once, and wait in memory for others to go on from them
    #[command(subcommand)]
    Substrate(SubstrateCommand),
    /// Images that VMs are made from
    #[command(subcommand)]
    Image(ImageCommand),
    /// Runs of pipelines
    #[command(subcommand)]
    Pipeline(PipelineCommand),
    /// The store that images' disks are kept in
    #[command(subcommand)]
    Store(StoreCommand),
    /// Check what this machine lacks, and say how to mend it
    Doctor,
    /// Show every setting and where it comes from
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Run the host and the control process of this machine
    Serve(ServeArguments),
    /// Run the host process alone
    #[command(hide = true)]
    Host,
    /// Run the control process alone
    #[command(hide = true)]
    Control(ServeArguments),
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
    /// Write manual pages to a directory
    Man { directory: PathBuf },
    /// Print the JSON Schema of a file that users write, or the OpenAPI document
    Schema {
        #[arg(value_enum)]
        what: SchemaName,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum SchemaName {
    Recipe,
    Pipeline,
    Profile,
    Report,
    Openapi,
}

#[derive(Debug, Args)]
pub struct RunArguments {
    /// The pipeline file (TOML)
    pub file: PathBuf,
    /// Directory with the files to work on
    #[arg(long, short)]
    pub input: PathBuf,
    /// Directory for the report; <pipeline>-out when absent
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ListArguments {
    /// Names only
    #[arg(long, short)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct VmName {
    /// Name or id
    pub vm: String,
}

#[derive(Debug, Args)]
pub struct ExecArguments {
    /// Name or id
    pub vm: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    /// Set a variable of the environment
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(long, short = 'w', value_name = "DIR")]
    pub cwd: Option<String>,
    /// User name or number; root when absent
    #[arg(long, short)]
    pub user: Option<String>,
    /// Give the command a terminal
    #[arg(long, short)]
    pub tty: bool,
    /// Kill the command after this time (exit code 124)
    #[arg(long, value_name = "TIME")]
    pub time_limit: Option<TimeSpan>,
}

#[derive(Debug, Args)]
pub struct ShellArguments {
    /// Name or id
    pub vm: String,
    /// User name or number; root when absent
    #[arg(long, short)]
    pub user: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Create a VM from an image and start it, or VMs that go on from a substrate
    Create {
        #[arg(required_unless_present_any = ["substrate", "snapshot"], conflicts_with_all = ["substrate", "snapshot"])]
        image: Option<String>,
        /// Go on from this substrate instead of booting an image
        #[arg(long, short, value_name = "SUBSTRATE", conflicts_with_all = ["profile", "ssh_key"])]
        substrate: Option<String>,
        /// Go on from this snapshot of a VM instead of booting an image
        #[arg(long, value_name = "VM/NAME", conflicts_with_all = ["substrate", "profile", "ssh_key"])]
        snapshot: Option<String>,
        /// How many VMs, of a substrate or snapshot; with --name they are called NAME-1, NAME-2, ...
        #[arg(long, short, default_value_t = 1, conflicts_with = "image")]
        count: u32,
        /// Its name, and host name; made from the image's name when absent
        #[arg(long, short)]
        name: Option<String>,
        /// A built-in profile (default, tiny, worker, desktop) or a TOML file
        #[arg(long, short, default_value = "default")]
        profile: String,
        /// A public SSH key that may log in; for foreign images that run cloud-init. May be repeated
        #[arg(long, value_name = "FILE")]
        ssh_key: Vec<PathBuf>,
        /// The user who may log in with the keys; the image's own without it
        #[arg(long, value_name = "NAME", requires = "ssh_key")]
        user: Option<String>,
        /// Leave TCP connections that the substrate has to other machines open, instead of ending them
        #[arg(long, requires = "substrate")]
        keep_connections: bool,
        #[command(flatten)]
        size: SizeArguments,
        #[command(flatten)]
        provide: ProvideArguments,
        #[command(flatten)]
        life: LifeArguments,
        /// Do not wait until it runs
        #[arg(long)]
        no_wait: bool,
    },
    /// Set how much memory and how many CPUs VMs have, and when they are removed or parked by themselves
    Set {
        #[arg(required = true)]
        vms: Vec<String>,
        #[command(flatten)]
        size: SizeArguments,
        #[command(flatten)]
        life: LifeArguments,
    },
    /// List VMs
    Ls(ListArguments),
    /// Show everything about a VM
    Show {
        vm: String,
        /// Show where the time of its start went
        #[arg(long)]
        timing: bool,
    },
    /// Run a command in a VM
    Exec(ExecArguments),
    /// Open a shell in a VM
    Shell(ShellArguments),
    /// Join a VM's serial console; Ctrl-] leaves
    Console(VmName),
    /// Offer a VM's screen by VNC on a unix socket
    Display {
        vm: String,
        /// The socket to make; in the data directory when absent
        #[arg(long)]
        socket: Option<PathBuf>,
    },
    /// Log in with ssh, through the agent's channel; the image needs an OpenSSH server
    Ssh {
        vm: String,
        /// Arguments for ssh
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Copy files to or from a VM: one side is VM:PATH
    Cp {
        from: String,
        to: String,
        /// Copy directories with all they hold
        #[arg(long, short)]
        recursive: bool,
    },
    /// Start VMs that have stopped again, with their disks; those that were parked go on where they were
    Start {
        #[arg(required = true)]
        vms: Vec<String>,
        /// Do not wait until they run
        #[arg(long)]
        no_wait: bool,
    },
    /// Ask a VM to power off
    Stop {
        #[arg(required = true)]
        vms: Vec<String>,
        /// End it at once
        #[arg(long, short)]
        force: bool,
    },
    /// End VMs and remove all of them
    Rm {
        #[arg(required = true)]
        vms: Vec<String>,
        /// No complaint about VMs that are not there
        #[arg(long, short)]
        force: bool,
    },
    /// Make another VM whose disk holds what this one's holds; no data is copied
    Clone {
        vm: String,
        /// Its name, and host name; made from the first one's when absent
        #[arg(long, short)]
        name: Option<String>,
        /// Start from this snapshot of the root disk
        #[arg(long, value_name = "SNAPSHOT")]
        snapshot: Option<String>,
        /// Do not wait until it runs
        #[arg(long)]
        no_wait: bool,
    },
    /// Make other VMs of a running one, as it is at this instant
    Fork(ForkArguments),
    /// Keep the state of VMs and free their memory; vm start lets them go on where they were
    Park {
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Have VMs stand still, with all that they have in memory
    Pause {
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Let paused VMs go on, with the right time
    Resume {
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Keep a VM's memory and disks as they are at this instant, while it goes on
    Snapshot {
        vm: String,
        /// Its name; s1, s2, ... when absent
        name: Option<String>,
    },
    /// List a VM's snapshots, or remove some
    Snapshots {
        vm: String,
        /// Remove this one; may be repeated
        #[arg(long, value_name = "NAME")]
        rm: Vec<String>,
    },
    /// Return a VM to a snapshot of it, memory and disks; all snapshots stay
    Rollback {
        vm: String,
        /// The snapshot; the latest when absent
        snapshot: Option<String>,
    },
    /// Show what a VM that goes on from a substrate, or was forked, has proved of its identity
    Receipt {
        /// Name or id
        vm: String,
        /// List all that it has shown, each time it went on; also of a VM that was removed
        #[arg(long)]
        all: bool,
    },
    /// A VM's disks: plug in, grow, snapshot
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Show what a VM wrote to its console
    Logs(VmName),
    /// Freeze everything in the guest but its agent
    Freeze(VmName),
    /// Let a frozen guest go on
    Thaw(VmName),
}

#[derive(Clone, Copy, Debug, Args)]
pub struct SizeArguments {
    /// So much memory, from what the VM began with to its profile's max_memory
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// So many CPUs, up to its profile's max_cpus
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
}

#[derive(Clone, Copy, Debug, Args)]
pub struct LifeArguments {
    /// Remove it this long from now; 0 takes that away
    #[arg(long, value_name = "TIME")]
    pub ttl: Option<TimeSpan>,
    /// Park it once nobody has used it for so long; 0 takes that away
    #[arg(long, value_name = "TIME")]
    pub idle_park: Option<TimeSpan>,
}

#[derive(Debug, Args)]
pub struct ProvideArguments {
    /// Set a variable for all commands in the VM; {n} in the value is the VM's number among those of this command
    #[arg(long, short, value_name = "KEY=VALUE")]
    pub env: Vec<String>,
    /// Set the variables of a file: KEY=VALUE lines as they are; empty ones and those that begin with # are skipped
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Put a file of this machine into the VM before its programs run; 1 MiB in all
    #[arg(long, value_name = "GUEST_PATH=HOST_FILE[:MODE]")]
    pub file: Vec<String>,
    /// Put a secret into /run/burgeon/secrets before its programs run; - is standard input
    #[arg(long, value_name = "NAME=FILE")]
    pub secret: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ForkArguments {
    /// Name or id
    pub vm: String,
    /// How many
    #[arg(long, short, default_value_t = 1)]
    pub count: u32,
    /// Their name, and host name; with --count they are called NAME-1, NAME-2, ...
    #[arg(long, short)]
    pub name: Option<String>,
    /// Keep none of them when one cannot be made
    #[arg(long)]
    pub all_or_nothing: bool,
    /// Leave TCP connections to other machines open, instead of ending them
    #[arg(long)]
    pub keep_connections: bool,
    /// Leave what is in /run/burgeon/secrets, instead of removing it
    #[arg(long)]
    pub keep_secrets: bool,
    #[command(flatten)]
    pub provide: ProvideArguments,
}

#[derive(Debug, Subcommand)]
pub enum SubstrateCommand {
    /// Boot a VM, warm it up, and make a substrate of it
    Create {
        name: String,
        #[arg(long, short)]
        image: String,
        /// A built-in profile (default, tiny, worker) or a TOML file
        #[arg(long, short, default_value = "default")]
        profile: String,
        /// A command that starts the application and fills its caches; run by sh -c
        #[arg(long, value_name = "COMMAND")]
        warm: Option<String>,
        /// A command that succeeds when the guest is ready; run by sh -c until it does
        #[arg(long, value_name = "COMMAND")]
        ready: Option<String>,
        /// Do not wait until it is docked
        #[arg(long)]
        no_wait: bool,
    },
    /// List substrates
    Ls(ListArguments),
    /// Show what a substrate is, what it holds, and what it needs
    Show { substrate: String },
    /// Show what a substrate holds in the store beside its image, and in memory; and what its VMs have written
    Stat { substrate: String },
    /// Have QEMUs wait for VMs of a substrate, so that those begin at once
    Dock {
        substrate: String,
        /// How many, whatever the demand; "auto": as many as VMs were made in the last minute
        #[arg(value_parser = standbys)]
        count: Standbys,
        /// Do not wait until they are there
        #[arg(long)]
        no_wait: bool,
    },
    /// Write a substrate to one file, for another machine with the same QEMU
    ///
    /// It holds all that the substrate needs, and its image: whatever was in the memory of the VM that it was made of.
    Export {
        substrate: String,
        /// The file; "-": standard output
        file: PathBuf,
        /// Replace a file that is there
        #[arg(long, short)]
        force: bool,
    },
    /// Make a substrate of a file that substrate export has written; its image too, where there is none of its name
    Import {
        /// The file; "-": standard input
        file: PathBuf,
        /// Its name here; the one it had when absent
        name: Option<String>,
    },
    /// Remove substrates that no VM goes on from
    Rm {
        #[arg(required = true)]
        substrates: Vec<String>,
    },
}

/// How many QEMUs wait; none: as demand has it.
#[derive(Clone, Copy, Debug)]
pub struct Standbys(pub Option<u32>);

fn standbys(text: &str) -> Result<Standbys, String> {
    match text {
        "auto" => Ok(Standbys(None)),
        _ => text.parse().map(|count| Standbys(Some(count))).map_err(|_| "a number, or \"auto\"".to_string()),
    }
}

#[derive(Debug, Args)]
pub struct OfDisk {
    /// Name or id
    pub vm: String,
    /// The disk; "root" is the one of its image
    #[arg(long, short, default_value = "root")]
    pub disk: String,
}

#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List a VM's disks
    Ls(VmName),
    /// Plug a disk into a VM: a new one, or one that was detached
    Attach {
        vm: String,
        /// Its name; the guest finds it as /dev/disk/by-id/virtio-NAME
        disk: String,
        /// Make an empty one
        #[arg(long, short, value_name = "SIZE")]
        size: Option<ByteSize>,
        /// Make one that holds what this image's disk holds; with --size a longer one
        #[arg(long, short)]
        image: Option<String>,
    },
    /// Unplug a disk; what it holds stays, and it can be attached again
    Detach {
        vm: String,
        disk: String,
        /// Also while the guest has a file system of it mounted
        #[arg(long, short)]
        force: bool,
    },
    /// Remove a detached disk with all that it holds
    Rm { vm: String, disk: String },
    /// Make a disk longer, also while the VM runs
    Resize {
        #[command(flatten)]
        of: OfDisk,
        size: ByteSize,
    },
    /// Keep what a disk holds now under a name; no data is copied
    Snapshot {
        #[command(flatten)]
        of: OfDisk,
        name: String,
    },
    /// List the snapshots of a VM's disks
    Snapshots(VmName),
    /// Make the disk of a stopped VM hold again what it held at a snapshot
    Rollback {
        #[command(flatten)]
        of: OfDisk,
        snapshot: String,
    },
    /// Let snapshots go
    RmSnapshot {
        #[command(flatten)]
        of: OfDisk,
        #[arg(required = true)]
        snapshots: Vec<String>,
    },
    /// Tell how much of a disk was written since a snapshot, or between two, and where
    Diff {
        #[command(flatten)]
        of: OfDisk,
        from: String,
        /// Another snapshot; what the disk holds now when absent
        to: Option<String>,
        /// List the stretches
        #[arg(long)]
        extents: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build an image from a recipe
    Build {
        /// The recipe (TOML)
        recipe: PathBuf,
        /// Fail rather than change the lock file
        #[arg(long)]
        locked: bool,
        /// Build even if an image of the same recipe is there
        #[arg(long)]
        force: bool,
    },
    /// Make an image of a raw, qcow2 or tar file, or of an OCI image layout
    Import {
        /// A file; for an OCI image layout, its directory or a tar of it
        file: PathBuf,
        name: String,
        /// The largest disk that may come of it
        #[arg(long, value_name = "SIZE", default_value = "256G")]
        max_size: ByteSize,
        /// Which image of an OCI layout; linux/amd64 unless it is given
        #[arg(long, value_name = "OS/ARCH")]
        platform: Option<String>,
    },
    /// Make an image of a VM's root disk; the VM goes on, be it running or not
    ///
    /// VMs of the new image get a machine id and SSH host keys of their own on their first boot.
    Commit {
        vm: String,
        name: String,
        /// What the image is; shown by image ls
        #[arg(long, short, value_name = "TEXT", default_value = "")]
        message: String,
        /// Take what this snapshot of the disk holds, instead of what the disk holds now
        #[arg(long, value_name = "NAME")]
        snapshot: Option<String>,
    },
    /// Write an image's disk to a raw file with holes
    Export {
        image: String,
        file: PathBuf,
        /// Replace a file that is there
        #[arg(long, short)]
        force: bool,
    },
    /// Serve an image's disk, read-only, to NBD clients on a unix socket, until Ctrl-C
    Serve {
        image: String,
        /// Path of the socket to make
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
    },
    /// Copy an image to a remote; only what is not there is sent
    ///
    /// A remote is /DIRECTORY, file:///DIRECTORY or s3://BUCKET/PREFIX. For s3, AWS_ACCESS_KEY_ID and
    /// AWS_SECRET_ACCESS_KEY hold the keys, AWS_REGION the region, AWS_ENDPOINT_URL the address of a server that is not
    /// Amazon's, and AWS_CA_BUNDLE a file of certificates to trust.
    Push { image: String, remote: String },
    /// Copy an image from a remote; only what is not here is read, and all of it verified
    ///
    /// Remotes are named as for push.
    Pull {
        remote: String,
        image: String,
        /// The version to copy, by its digest; without it, the latest
        #[arg(long)]
        digest: Option<String>,
    },
    /// List the images of a remote
    ///
    /// Remotes are named as for push.
    Remote {
        remote: String,
        /// Print names only
        #[arg(long, short)]
        quiet: bool,
    },
    /// Read all of an image and compare it with its names
    Verify { image: String },
    /// List images
    Ls(ListArguments),
    /// Show everything about an image
    Show { image: String },
    /// Show what differs between two images
    Diff {
        a: String,
        b: String,
        /// List the stretches of the disks that differ
        #[arg(long)]
        extents: bool,
    },
    /// Show what made an image, oldest first
    History { image: String },
    /// Remove images; VMs made from them go on
    Rm {
        #[arg(required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show what is stored, and how much room it takes
    Stat,
    /// Delete what nothing keeps any more
    Gc,
    /// Read everything and compare it with its names; exit code 1 for damage
    Scrub {
        /// Bytes to read in a second, at most
        #[arg(long, value_name = "SIZE")]
        rate: Option<ByteSize>,
        /// Let go of damaged copies, so that building, importing or pulling again stores them anew
        #[arg(long)]
        repair: bool,
    },
    /// Check that all that is kept can be found; exit code 1 for damage
    Fsck {
        /// Make a new catalog of the packs, in place of a lost or damaged one; without a server
        #[arg(long)]
        rebuild: bool,
    },
    /// Move packs and databases out of the data directory, to where BURGEON_OBJECTS and BURGEON_DATABASE say; without a server
    Move,
}

#[derive(Debug, Subcommand)]
pub enum PipelineCommand {
    /// List runs
    Ls(ListArguments),
    /// Show a run
    Show { run: String },
    /// End a run and remove its VMs
    Cancel { run: String },
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show every setting and where it comes from
    Show,
}

#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Leave after this time without any use
    #[arg(long, value_name = "TIME")]
    pub idle_exit: Option<TimeSpan>,
}
