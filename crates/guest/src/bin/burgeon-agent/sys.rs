//! The system calls that no safe wrapper offers; all of the agent's unsafe code is here.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Which side of a fork this is.
pub(crate) enum Fork {
    Child,
    Parent,
}

/// Splits the process in two.
pub(crate) fn fork() -> io::Result<Fork> {
    // SAFETY: the agent has one thread, so no lock can be held by another one, and the child may do all that
    // the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        _ => Ok(Fork::Parent),
    }
}

/// The memory that [`start_sharing`]'s child runs on. Kept for as long as the child may still use it.
pub(crate) struct Stack(Box<[MaybeUninit<u128>]>);

impl Stack {
    /// Untouched memory costs nothing, and the child needs a few frames.
    const BYTES: usize = 65_536;

    pub(crate) fn new() -> Stack {
        Stack(Box::new_uninit_slice(Self::BYTES / size_of::<u128>()))
    }
}

/// Starts a process that runs `child` in this process's memory, beside it, on a stack of its own; files, signals and
/// everything else are its own copies. In a cgroup from its beginning, where one is given: moving it there afterwards
/// would wait for a grace period of the whole kernel, several milliseconds. A fork would copy the page tables, which
/// costs an emulated guest more than the start of a small program.
///
/// # Safety
/// `argument` and `stack` stay valid and unchanged until the process has run another program or has ended. `child`
/// neither allocates nor frees, takes no lock, does not unwind, and leaves `errno` alone: the agent is at work meanwhile.
pub(crate) unsafe fn start_sharing(
    cgroup: Option<&OwnedFd>,
    stack: &mut Stack,
    child: extern "C" fn(*const c_void) -> !,
    argument: *const c_void,
) -> io::Result<i32> {
    // SAFETY: clone_args is plain numbers, for which zeros are valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(libc::CLONE_VM.unsigned_abs());
    arguments.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    arguments.stack = stack.0.as_mut_ptr() as u64;
    arguments.stack_size = Stack::BYTES as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd().unsigned_abs().into();
    }
    let result: isize;
    // SAFETY: the parent goes on behind the call as after any system call. The child begins with its stack pointer at
    // the end of `stack`, which is aligned as the ABI asks before a call, with the parent's other registers, and never
    // returns. The caller vouches for what both then do with the same memory.
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
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw mut arguments,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") argument,
            in("r13") child,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Ok(pid),
        Ok(error) => Err(io::Error::from_raw_os_error(-error)),
        Err(_) => Err(io::Error::from_raw_os_error(libc::EIO)),
    }
}

/// From linux/sched.h; wider than the C library's type for flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A system call that leaves `errno` alone, for a process that shares it with another.
///
/// # Safety
/// As the call itself asks.
unsafe fn call(number: libc::c_long, arguments: [usize; 4]) -> Result<usize, i32> {
    let result: isize;
    // SAFETY: the convention of system calls on x86-64; what the call does is the caller's matter.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    usize::try_from(result).map_err(|_| i32::try_from(-result).unwrap_or(libc::EIO))
}

/// Ends the process at once, without running what the parent meant to run at its own end.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// Texts for [`execve`], with the null pointer behind them.
pub(crate) struct Texts {
    pointers: Vec<*const c_char>,
    _owned: Vec<CString>,
}

impl Texts {
    pub(crate) fn new(texts: Vec<CString>) -> Texts {
        // The texts' bytes lie on the heap and stay where they are when the vector moves.
        let pointers = texts.iter().map(|text| text.as_ptr()).chain(std::iter::once(std::ptr::null())).collect();
        Texts { pointers, _owned: texts }
    }
}

/// Replaces the program. Returns only the error's number. Neither allocates nor touches `errno`.
pub(crate) fn execve(path: &CStr, argv: &Texts, env: &Texts) -> i32 {
    let address = |pointer: *const *const c_char| pointer as usize;
    let arguments = [path.as_ptr() as usize, address(argv.pointers.as_ptr()), address(env.pointers.as_ptr()), 0];
    // SAFETY: both arrays end with a null pointer, and all strings outlive the call.
    unsafe { call(libc::SYS_execve, arguments) }.err().unwrap_or(libc::EIO)
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

/// Whether a read would bring something now: bytes, or the end.
pub(crate) fn is_readable(fd: &impl AsFd) -> bool {
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut asked = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut asked, Some(&none)).is_ok_and(|ready| ready > 0)
}

/// kill(2): `pid` may be a process, a group as its negative, or -1 for all.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers and checks them.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the kernel not interrupt others when this process wakes up. What the agent starts is not bound by it.
///
/// The agent wakes at each step of a command's life; on a guest's only CPU it would take turns with the command, at the
/// price of a switch each time, to tell what can as well be told together.
pub(crate) fn wake_politely() {
    // SAFETY: sched_param is plain numbers, for which zeros are valid; priority 0 is what the policy asks for.
    let parameter: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the parameter lives across the call, which changes how this process is scheduled and nothing else.
    unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0,
            libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK,
            &raw const parameter,
        );
    }
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

/// Has every program that the agent starts begin with no signal ignored. A closed pipe still does not end the agent: its
/// signal gets a handler that does nothing, which another program does not inherit.
pub(crate) fn reset_signals() {
    extern "C" fn nothing(_: i32) {}
    let handler: extern "C" fn(i32) = nothing;
    // SAFETY: SIG_DFL is a valid disposition and the handler does nothing. Numbers without a signal fail harmlessly.
    unsafe {
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::signal(libc::SIGPIPE, handler as libc::sighandler_t);
    }
}

/// Lets through the signals that the agent blocks. For the child, before it runs another program.
pub(crate) fn unblock_signals() {
    let none = 0_u64;
    // SAFETY: the kernel's own signal set has eight bytes, and none of them is written.
    let _cannot_fail = unsafe {
        call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK.unsigned_abs() as usize, &raw const none as usize, 0, 8])
    };
}

/// Makes `from` the descriptor `to`, open across exec. For the child: nothing that Rust owns has the numbers 0, 1 and 2.
pub(crate) fn duplicate_onto(from: RawFd, to: RawFd) -> Result<(), i32> {
    let number = |fd: RawFd| fd.unsigned_abs() as usize;
    // SAFETY: dup2 checks both numbers; `from` is never 0, 1 or 2, so it is not `to`.
    unsafe { call(libc::SYS_dup2, [number(from), number(to), 0, 0]) }.map(drop)
}

/// Has every descriptor but 0, 1 and 2 closed when the next program starts: the agent's own are marked so anyway, those
/// that whoever started it left open are not.
pub(crate) fn close_strangers() {
    // SAFETY: this only sets flags, and closes nothing that Rust owns before exec.
    let _an_old_kernel =
        unsafe { call(libc::SYS_close_range, [3, u32::MAX as usize, libc::CLOSE_RANGE_CLOEXEC as usize, 0]) };
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

/// Makes a mounted ext4 so many blocks large; one that has them stays as it is.
pub(crate) fn grow_ext4(directory: &impl AsFd, blocks: u64) -> io::Result<()> {
    // EXT4_IOC_RESIZE_FS of the kernel's uapi/linux/ext4.h: _IOW('f', 16, __u64).
    const RESIZE: u32 = 0x4008_6610;
    // SAFETY: the call reads eight bytes at the address, which is that of a live u64.
    let outcome = unsafe { libc::ioctl(directory.as_fd().as_raw_fd(), RESIZE as _, &raw const blocks) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the kernel's generator bytes that it takes as full entropy, and has it begin anew with them.
pub(crate) fn add_entropy(generator: &impl AsFd, entropy: &[u8; 64]) -> io::Result<()> {
    // linux/random.h: RNDADDENTROPY is _IOW('R', 3, int[2]), RNDRESEEDCRNG is _IO('R', 7).
    const ADD: u32 = 0x4008_5203;
    const BEGIN_ANEW: u32 = 0x5207;
    #[repr(C)]
    struct Pool {
        bits: i32,
        bytes: i32,
        content: [u8; 64],
    }
    let pool = Pool { bits: 512, bytes: 64, content: *entropy };
    let generator = generator.as_fd().as_raw_fd();
    // SAFETY: the call reads a header of two ints and as many bytes behind it as that says, all of them in `pool`.
    if unsafe { libc::ioctl(generator, ADD as _, &raw const pool) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call takes no argument.
    if unsafe { libc::ioctl(generator, BEGIN_ANEW as _, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives a network card another hardware address. A card of virtio takes it while it is up.
pub(crate) fn set_hardware_address(socket: &impl AsFd, name: &str, address: [u8; 6]) -> io::Result<()> {
    // SAFETY: ifreq is plain numbers and a union of such, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(address) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    // SAFETY: the request lives across the call, and its name ends with a zero.
    let outcome = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFHWADDR as _, &raw const request) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
