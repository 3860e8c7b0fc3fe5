//! The system calls that no safe wrapper offers; all of the agent's unsafe code is here.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Which side of a fork this is.
pub(crate) enum Fork {
    Child,
    Parent(i32),
}

/// Splits the process in two.
pub(crate) fn fork() -> io::Result<Fork> {
    // SAFETY: the agent has one thread, so no lock can be held by another one, and the child may do all that
    // the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Splits the process in two, and puts the child into a cgroup from its beginning. Moving it there afterwards would
/// wait for a grace period of the whole kernel, several milliseconds.
pub(crate) fn fork_into(cgroup: &OwnedFd) -> io::Result<Fork> {
    // SAFETY: clone_args is plain numbers, for which zeros are valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP;
    arguments.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    arguments.cgroup = cgroup.as_raw_fd().unsigned_abs().into();
    // SAFETY: without a stack and without CLONE_VM this is fork(2): the child goes on here on a copy of all memory. The
    // C library is not told, which matters to its thread functions only, and the agent has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match i32::try_from(pid) {
        Ok(0) => Ok(Fork::Child),
        Ok(pid) if pid > 0 => Ok(Fork::Parent(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From linux/sched.h; wider than the C library's type for flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Ends the process at once, without running what the parent meant to run at its own end.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// Replaces the program. Returns only the error.
pub(crate) fn execve(path: &CString, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| {
        list.iter().map(|text| text.as_ptr()).chain(std::iter::once(std::ptr::null())).collect::<Vec<_>>()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end with a null pointer, and all strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// A child that has ended.
pub(crate) struct Ended {
    pub(crate) pid: i32,
    /// Its exit code, or the signal that killed it.
    pub(crate) status: Result<i32, i32>,
    /// User and system time of it and the children it waited for.
    pub(crate) cpu_us: u64,
}

/// Takes one ended child, if there is any. `Err` when there are no children at all.
pub(crate) fn wait_any() -> io::Result<Option<Ended>> {
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which all zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the right type.
    let pid = unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, &mut usage) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => {
            let time = |of: libc::timeval| {
                u64::try_from(of.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(of.tv_usec).unwrap_or(0)
            };
            let status =
                if libc::WIFSIGNALED(status) { Err(libc::WTERMSIG(status)) } else { Ok(libc::WEXITSTATUS(status)) };
            Ok(Some(Ended { pid, status, cpu_us: time(usage.ru_utime) + time(usage.ru_stime) }))
        }
    }
}

/// kill(2): `pid` may be a process, a group as its negative, or -1 for all.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers and checks them.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Blocks SIGCHLD and gives a descriptor that is readable when a child has ended.
pub(crate) fn child_signal() -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain memory that sigemptyset fills; every pointer is to that live value.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives a program that is about to be started the signal state it expects: nothing blocked, nothing ignored.
pub(crate) fn default_signals() {
    // SAFETY: the set is filled before use, and SIG_DFL is a valid disposition. Numbers without a signal fail harmlessly.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// Makes `from` the descriptor `to`, open across exec.
pub(crate) fn duplicate_onto(from: &OwnedFd, to: RawFd) -> io::Result<()> {
    // SAFETY: used in a forked child for 0, 1 and 2 only, which no Rust value owns.
    if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has every descriptor but 0, 1 and 2 closed when the next program starts: the agent's own are marked so anyway, those
/// that whoever started it left open are not.
pub(crate) fn close_strangers() {
    // SAFETY: this only sets flags, and closes nothing that Rust owns before exec.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// Takes over a descriptor that this process was given by number.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl checks the number.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::other(format!("descriptor {fd} was not inherited")));
    }
    // SAFETY: it is open, and by the contract of `--inherit` it belongs to nobody else in this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets a descriptor stay open across exec.
pub(crate) fn keep_across_exec(fd: &OwnedFd) {
    // SAFETY: the descriptor is open while it is borrowed.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
}
