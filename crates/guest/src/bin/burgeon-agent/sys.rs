//! The system calls that no safe wrapper offers; all of the agent's unsafe code is here.

use std::{
    ffi::{CString, c_void},
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::OnceLock,
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

/// From linux/sched.h; wider than the C library's type for flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// A child's way until it is another program takes far less.
const STACK_BYTES: usize = 16_384;

/// The stack of a child that shares the agent's memory; aligned as the processor's rules for calls want it.
pub(crate) struct Stack(Box<[MaybeUninit<u128>]>);

impl Stack {
    pub(crate) fn new() -> Self {
        Self(Box::new_uninit_slice(STACK_BYTES / size_of::<u128>()))
    }
}

/// Starts a process that runs `entry(data)` in this process' own memory, on a stack of its own and beside the agent:
/// page tables are not copied, which costs milliseconds in emulated guests. With a cgroup, it is in that from its
/// beginning: moving it there afterwards would wait for a grace period of the whole kernel, several milliseconds. A
/// kernel that does not offer that starts it all the same. Descriptors, signal dispositions and everything else but
/// memory are the child's own copies.
///
/// # Safety
/// Until the child has ended or become another program, `stack` and what `data` points to must live and not be touched.
/// `entry` must make raw system calls only ([`call`]) and must not unwind: the child shares the agent's thread-local
/// variables (`errno`), its heap and all locks, and the agent goes on meanwhile.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn spawn_sharing(
    stack: &mut Stack,
    cgroup: Option<&OwnedFd>,
    entry: extern "C" fn(*const c_void) -> !,
    data: *const c_void,
) -> io::Result<i32> {
    let base = stack.0.as_mut_ptr().cast::<u8>();
    // A handler of the agent's must not run in the child: all signals wait until it has reset its dispositions.
    let (all, mut before) = (u64::MAX, 0_u64);
    let how = |how: i32| usize::try_from(how).unwrap_or(0);
    // SAFETY: both pointers are to live values of the size that is told.
    unsafe {
        call(libc::SYS_rt_sigprocmask, [how(libc::SIG_SETMASK), &raw const all as usize, &raw mut before as usize, 8]);
    };
    // SAFETY: clone_args is plain numbers, for which zeros are valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let mut result = -libc::c_long::from(libc::ENOSYS);
    if let Some(cgroup) = cgroup {
        arguments.flags = CLONE_INTO_CGROUP | SHARING;
        arguments.exit_signal = libc::SIGCHLD.unsigned_abs().into();
        arguments.cgroup = cgroup.as_raw_fd().unsigned_abs().into();
        arguments.stack = base as u64;
        arguments.stack_size = STACK_BYTES as u64;
        let first = &raw const arguments as usize;
        // SAFETY: the arguments live, and the stack is the caller's, who keeps it and `data` for the child.
        result = unsafe { clone_to(libc::SYS_clone3, first, size_of::<libc::clone_args>(), entry, data) };
    }
    if result < 0 {
        let flags = SHARING | u64::from(libc::SIGCHLD.unsigned_abs());
        let flags = usize::try_from(flags).unwrap_or(0);
        // SAFETY: as above; this older call takes the stack's upper end.
        result = unsafe { clone_to(libc::SYS_clone, flags, base as usize + STACK_BYTES, entry, data) };
    }
    // SAFETY: the pointer is to a live value of the size that is told.
    unsafe { call(libc::SYS_rt_sigprocmask, [how(libc::SIG_SETMASK), &raw const before as usize, 0, 8]) };
    i32::try_from(result).ok().filter(|pid| *pid > 0).ok_or_else(|| error_of(result))
}

const SHARING: u64 = 0x100; // CLONE_VM

/// clone(2) or clone3(2) with a stack: the child calls `entry(data)` there and never leaves this block.
///
/// # Safety
/// As [`spawn_sharing`]; `first` and `second` are valid for `number` and name a stack whose upper end is aligned to 16.
#[cfg(target_arch = "x86_64")]
unsafe fn clone_to(
    number: libc::c_long,
    first: usize,
    second: usize,
    entry: extern "C" fn(*const c_void) -> !,
    data: *const c_void,
) -> libc::c_long {
    let result;
    // SAFETY: the parent sees a system call that changes rax, rcx and r11. The child has the same registers but another
    // stack pointer, and goes only into `entry`, which does not return.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") number => result,
            in("rdi") first, in("rsi") second, in("rdx") 0, in("r10") 0, in("r8") 0,
            in("r12") data, in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    result
}

/// On other processors the child is a plain fork.
///
/// # Safety
/// None is needed here.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn spawn_sharing(
    _stack: &mut Stack,
    _cgroup: Option<&OwnedFd>,
    entry: extern "C" fn(*const c_void) -> !,
    data: *const c_void,
) -> io::Result<i32> {
    match fork()? {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => entry(data),
    }
}

/// A raw system call: what it returns, errors as negative numbers. It touches no variable of the C library.
///
/// # Safety
/// That of the system call.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn call(number: libc::c_long, arguments: [usize; 4]) -> libc::c_long {
    let result;
    let [first, second, third, fourth] = arguments;
    // SAFETY: the kernel changes rax, rcx and r11 only; what it does with memory is the caller's to answer for.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") first, in("rsi") second, in("rdx") third, in("r10") fourth, in("r8") 0, in("r9") 0,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// # Safety
/// That of the system call.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn call(number: libc::c_long, arguments: [usize; 4]) -> libc::c_long {
    let [first, second, third, fourth] = arguments;
    // SAFETY: what it does with memory is the caller's to answer for; `errno` is this process' own.
    match unsafe { libc::syscall(number, first, second, third, fourth) } {
        -1 => -libc::c_long::from(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
        result => result,
    }
}

/// The error that a raw system call's negative result means.
fn error_of(result: libc::c_long) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO))
}

/// The kernel's own sigaction of x86-64 and aarch64: handler, flags, (restorer,) mask; all zeros is the default.
type Disposition = [u64; 4];

/// The signals that this process does not leave at their defaults; it never changes that while it serves.
pub(crate) fn changed_signals() -> &'static [usize] {
    static CHANGED: OnceLock<Vec<usize>> = OnceLock::new();
    CHANGED.get_or_init(|| {
        (1..=64)
            .filter(|signal| {
                let mut now: Disposition = [0; 4];
                // SAFETY: this only asks, and the pointer is to a live value of the kernel's layout.
                unsafe { call(libc::SYS_rt_sigaction, [*signal, 0, &raw mut now as usize, 8]) };
                now[0] != 0
            })
            .collect()
    })
}

/// In a child of [`spawn_sharing`]: gives `signals` their defaults.
pub(crate) fn reset_signals(signals: &[usize]) {
    let default: Disposition = [0; 4];
    for signal in signals {
        // SAFETY: the pointer is to a live value; without CLONE_SIGHAND dispositions are the child's own.
        unsafe { call(libc::SYS_rt_sigaction, [*signal, &raw const default as usize, 0, 8]) };
    }
}

/// In a child of [`spawn_sharing`]: lets all signals come.
pub(crate) fn unblock_signals() {
    let none = 0_u64;
    let how = usize::try_from(libc::SIG_SETMASK).unwrap_or(0);
    // SAFETY: the pointer is to a live value of the size that is told.
    unsafe { call(libc::SYS_rt_sigprocmask, [how, &raw const none as usize, 0, 8]) };
}

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
