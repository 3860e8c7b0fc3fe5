//! Whether a process found after a restart of the host process is the VM that was recorded.
//!
//! "Could not reattach" is not "dead". Only three things prove that a VM's process is no more: another
//! boot of the machine, a process id that nothing has, a process id that something else has (its
//! start time differs; ids are used again, pairs of id and start time are not, see proc_pid_stat(5)). All
//! else leaves it `Unreachable`: it may well run, so nothing of it may be removed or started again.
//!
//! ```text
//! recorded --another boot, no such process, another start time--> Gone
//!          --same process, its socket answers as this VM--------> Adopt
//!          --anything else--------------------------------------> Unreachable (asked again later)
//! ```

/// What was written down when the VM's process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks since boot.
    pub start_time_ticks: u64,
    pub executable: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// What has the recorded process id now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing, or a zombie, which runs no code.
    Nothing,
    Process {
        start_time_ticks: u64,
        /// What `/proc/PID/exe` names, where it can be read.
        executable: Option<String>,
    },
    /// `/proc` could not be read.
    Unreadable { reason: String },
}

/// What the VM's control socket says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It answers, and says that it is this VM.
    ThisVm,
    /// It answers for another VM.
    OtherVm { name: String },
    /// It does not answer, or not as it should.
    None { reason: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Adopt,
    /// Its process is certainly no more.
    Gone {
        reason: String,
    },
    /// It may run. Keep what it has, and ask again.
    Unreachable {
        reason: String,
    },
}

/// Decides about one VM.
pub fn decide(recorded: &Recorded, seen: &Seen, boot_id: &str, answer: &Answer) -> Verdict {
    let pid = recorded.pid;
    let gone = |reason: String| Verdict::Gone { reason };
    let unreachable = |reason: String| Verdict::Unreachable { reason };
    if recorded.boot_id != boot_id {
        return gone("the machine was started again since".to_string());
    }
    let executable = match seen {
        Seen::Nothing => return gone(format!("process {pid} is no more")),
        Seen::Unreadable { reason } => return unreachable(format!("process {pid} cannot be looked at: {reason}")),
        Seen::Process { start_time_ticks, .. } if *start_time_ticks != recorded.start_time_ticks => {
            return gone(format!("process {pid} is no more; its number was used again"));
        }
        Seen::Process { executable, .. } => executable.as_deref(),
    };
    // An upgraded package leaves running programs with a deleted file, and the kernel says so behind the name.
    let name = executable.map(|path| path.strip_suffix(" (deleted)").unwrap_or(path));
    if let Some(name) = name
        && name != recorded.executable
    {
        let shown = burgeon_api::path_text::printable(name);
        return unreachable(format!("process {pid} now runs {shown} instead of {}", recorded.executable));
    }
    match answer {
        Answer::ThisVm => Verdict::Adopt,
        Answer::OtherVm { name } => {
            let shown = burgeon_api::path_text::printable(name);
            unreachable(format!("process {pid} runs, and its socket answers for VM \"{shown}\""))
        }
        Answer::None { reason } => unreachable(format!("process {pid} runs, and its socket does not answer: {reason}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_proof_means_gone() {
        let recorded =
            Recorded { pid: 7, start_time_ticks: 100, executable: "/usr/bin/qemu".into(), boot_id: "b1".into() };
        let process = |start_time_ticks, executable: Option<&str>| Seen::Process {
            start_time_ticks,
            executable: executable.map(str::to_string),
        };
        let same = process(100, Some("/usr/bin/qemu"));
        let silent = Answer::None { reason: "connection refused".into() };
        let unreadable = Seen::Unreadable { reason: "permission denied".into() };
        let cases = [
            (&same, "b1", &Answer::ThisVm, "adopt"),
            (&process(100, Some("/usr/bin/qemu (deleted)")), "b1", &Answer::ThisVm, "adopt"),
            (&process(100, None), "b1", &Answer::ThisVm, "adopt"),
            (&same, "b2", &Answer::ThisVm, "gone: the machine was started again"),
            (&Seen::Nothing, "b1", &silent, "gone: process 7 is no more"),
            (&Seen::Nothing, "b1", &Answer::ThisVm, "gone: process 7 is no more"),
            (&process(101, Some("/usr/bin/qemu")), "b1", &Answer::ThisVm, "gone: process 7 is no more; its number"),
            (&same, "b1", &silent, "unreachable: process 7 runs, and its socket does not answer: connection refused"),
            (&same, "b1", &Answer::OtherVm { name: "x".into() }, "unreachable: process 7 runs, and its socket answers"),
            (&process(100, Some("/bin/sh")), "b1", &Answer::ThisVm, "unreachable: process 7 now runs /bin/sh"),
            (&unreadable, "b1", &Answer::ThisVm, "unreachable: process 7 cannot be looked at"),
        ];
        for (seen, boot_id, answer, expected) in cases {
            let told = match decide(&recorded, seen, boot_id, answer) {
                Verdict::Adopt => "adopt".to_string(),
                Verdict::Gone { reason } => format!("gone: {reason}"),
                Verdict::Unreachable { reason } => format!("unreachable: {reason}"),
            };
            assert!(told.starts_with(expected), "{told:?} is not {expected:?}");
        }
    }
}
