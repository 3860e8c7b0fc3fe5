//! Starting a command: what is prepared before the fork, and what the child does until it is another program.
//!
//! The child tells a failure through a pipe that closes by itself when the program starts, so the agent
//! never waits for a slow disk: the end of that pipe is one more thing it polls.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
};

use burgeon_guest::protocol::{Exec, Failure, FailureKind, TerminalSize};
use rustix::{
    fs::{Gid, OFlags, Uid},
    pipe::{PipeFlags, pipe_with},
    pty::OpenptFlags,
    termios::Winsize,
};

use crate::{
    freeze,
    sys::{self, Fork},
    users::{self, User},
};

const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Room in each pipe: as much as the credit of its stream.
const PIPE_BYTES: usize = 262_144;

/// A command that has been forked; whether its program runs is told by `start`.
pub(crate) struct Spawned {
    pub(crate) pid: i32,
    pub(crate) start: File,
    pub(crate) input: OwnedFd,
    pub(crate) output: OwnedFd,
    /// Absent with a terminal.
    pub(crate) errors: Option<OwnedFd>,
}

/// What the child needs; made before the fork.
struct Plan {
    programs: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    cwd_is_home: bool,
    user: User,
    change_user: bool,
    stdio: [OwnedFd; 3],
    terminal: bool,
}

#[derive(Clone, Copy)]
enum Stage {
    Terminal = 1,
    User,
    Directory,
    Program,
}

pub(crate) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into() }
}

/// The failure that an error of the system means.
pub(crate) fn io_failure(action: &str, error: &io::Error) -> Failure {
    let kind = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => FailureKind::NotFound,
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => FailureKind::PermissionDenied,
        Some(libc::EEXIST | libc::EISDIR) => FailureKind::Exists,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => {
            FailureKind::Limit
        }
        _ => FailureKind::Io,
    };
    failure(kind, format!("{action}: {error}"))
}

/// Forks the command of `request`.
pub(crate) fn spawn(request: &Exec, cgroup: Option<&str>) -> Result<Spawned, Failure> {
    let system = |error: rustix::io::Errno| io_failure("cannot make pipes", &error.into());
    let pipe = || -> Result<(OwnedFd, OwnedFd), Failure> { pipe_with(PipeFlags::CLOEXEC).map_err(system) };
    let (start, start_child) = pipe()?;
    let nonblocking = |fd: &OwnedFd| rustix::io::ioctl_fionbio(fd, true).map_err(system);
    nonblocking(&start)?;

    let (input, output, errors, stdio) = if let Some(size) = request.terminal {
        let (master, slave) = terminal(size).map_err(|error| io_failure("cannot make a terminal", &error))?;
        nonblocking(&master)?;
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|error| io_failure("cannot make a terminal", &error));
        (copy(&master)?, master, None, [copy(&slave)?, copy(&slave)?, slave])
    } else {
        let (input_child, input) = pipe()?;
        let (output, output_child) = pipe()?;
        let (errors, errors_child) = pipe()?;
        for fd in [&input, &output, &errors] {
            nonblocking(fd)?;
        }
        // Only a matter of speed; an unprivileged user may have no right to it.
        for fd in [&input, &output] {
            let _size = rustix::pipe::fcntl_setpipe_size(fd, PIPE_BYTES);
        }
        (input, output, Some(errors), [input_child, output_child, errors_child])
    };

    let plan = plan(request, stdio)?;
    match fork(cgroup).map_err(|error| io_failure("cannot fork", &error))? {
        Fork::Parent(pid) => Ok(Spawned { pid, start: start.into(), input, output, errors }),
        Fork::Child => {
            let (stage, error) = become_program(&plan);
            let mut message = [stage as u8, 0, 0, 0, 0];
            message[1..].copy_from_slice(&error.raw_os_error().unwrap_or(libc::EIO).to_le_bytes());
            let _lost_with_the_parent = File::from(start_child).write_all(&message);
            sys::exit_now(127)
        }
    }
}

/// Forks into the cgroup, or, where the kernel does not offer that, without it: the command then runs all the same.
fn fork(cgroup: Option<&str>) -> io::Result<Fork> {
    let into = cgroup.and_then(|cgroup| freeze::directory(cgroup).ok()).map(|directory| sys::fork_into(&directory));
    match into {
        Some(Ok(fork)) => Ok(fork),
        Some(Err(_)) | None => sys::fork(),
    }
}

fn terminal(size: TerminalSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&master)?;
    let slave =
        rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    resize(&master, size)?;
    Ok((master, slave))
}

/// Sets a terminal's size.
pub(crate) fn resize(master: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}

fn text(bytes: &[u8], what: &str) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| failure(FailureKind::Invalid, format!("{what} holds a NUL byte")))
}

fn plan(request: &Exec, stdio: &[OwnedFd; 3], tell: &OwnedFd) -> Result<Plan, Failure> {
    let user = users::find(request.user.as_deref())?;
    let own = rustix::process::geteuid().as_raw();

    let mut env: Vec<(Vec<u8>, Vec<u8>)> = vec![
        (b"PATH".to_vec(), PATH.to_vec()),
        (b"HOME".to_vec(), user.home.clone()),
        (b"USER".to_vec(), user.name.clone()),
        (b"LOGNAME".to_vec(), user.name.clone()),
        (b"SHELL".to_vec(), user.shell.clone()),
    ];
    if request.terminal.is_some() {
        env.push((b"TERM".to_vec(), b"xterm-256color".to_vec()));
    }
    for (key, value) in &request.env {
        if key.is_empty() || key.contains(&b'=') {
            let key = String::from_utf8_lossy(key);
            return Err(failure(FailureKind::Invalid, format!("\"{key}\" cannot be the name of a variable")));
        }
        env.retain(|(old, _)| old != key);
        env.push((key.clone(), value.clone()));
    }
    let path = env.iter().find(|(key, _)| key == b"PATH").map_or(PATH.to_vec(), |(_, value)| value.clone());

    let mut argv = request.argv.iter().map(|word| text(word, "the command")).collect::<Result<Vec<_>, _>>()?;
    let programs = match request.argv.first() {
        None => {
            let name = user.shell.rsplit(|byte| *byte == b'/').next().unwrap_or(b"sh");
            argv.push(text(&[b"-", name].concat(), "the shell's name")?);
            vec![text(&user.shell, "the shell's name")?]
        }
        Some(program) if program.is_empty() => return Err(failure(FailureKind::NotFound, "the command is empty")),
        Some(program) if program.contains(&b'/') => vec![text(program, "the command")?],
        Some(program) => path
            .split(|byte| *byte == b':')
            .map(|directory| {
                let directory = if directory.is_empty() { b"." } else { directory };
                text(&[directory, b"/", program].concat(), "PATH")
            })
            .collect::<Result<_, _>>()?,
    };
    let env = env
        .iter()
        .map(|(key, value)| text(&[&key[..], b"=", value].concat(), "the environment"))
        .collect::<Result<_, _>>()?;
    let script = [c"sh".to_owned(), c"".to_owned()].into_iter().chain(argv.iter().skip(1).cloned()).collect();
    Ok(Plan {
        programs,
        argv: Words::new(argv),
        script: Words::new(script),
        env: Words::new(env),
        cwd: text(request.cwd.as_ref().unwrap_or(&user.home), "the working directory")?,
        cwd_is_home: request.cwd.is_none(),
        change_user: own == 0 && (user.uid != 0 || user.gid != 0),
        user,
        stdio: [stdio[0].as_raw_fd(), stdio[1].as_raw_fd(), stdio[2].as_raw_fd()],
        terminal: request.terminal.is_some(),
        signals: sys::changed_signals(),
        tell: tell.as_raw_fd(),
    })
}

/// The child's way, in the agent's memory: raw system calls only, no allocation, no panic.
extern "C" fn child(plan: *const c_void) -> ! {
    // SAFETY: `spawn` passes its plan and keeps it while this runs; nobody else changes it.
    let plan = unsafe { &*plan.cast::<Plan>() };
    let (stage, error) = become_program(plan);
    let mut message = [stage as u8, 0, 0, 0, 0];
    message[1..].copy_from_slice(&error.to_le_bytes());
    let _lost_with_the_parent = call(libc::SYS_write, [number(plan.tell), address(&message), TOLD_BYTES, 0]);
    loop {
        let _does_not_return = call(libc::SYS_exit_group, [127, 0, 0, 0]);
    }
}

/// A system call of the child; an error is its number.
fn call(number: libc::c_long, arguments: [usize; 4]) -> Result<(), i32> {
    // SAFETY: every call below passes numbers, or pointers into the plan and to the child's own variables, which live
    // and have the kernel's layout.
    match unsafe { sys::call(number, arguments) } {
        error if error < 0 => Err(i32::try_from(-error).unwrap_or(libc::EIO)),
        _ => Ok(()),
    }
}

/// A descriptor or a small constant.
fn number(value: i32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn address<T: ?Sized>(value: &T) -> usize {
    ptr::from_ref(value).cast::<()>() as usize
}

/// Returns only what stopped it.
fn become_program(plan: &Plan) -> (Stage, i32) {
    sys::reset_signals(plan.signals);
    sys::unblock_signals();
    if let Err(error) = attach_stdio(plan) {
        return (Stage::Terminal, error);
    }
    // The agent's own descriptors are marked so anyway, those that whoever started it left open are not.
    let cloexec = usize::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or(0);
    let _kernel_too_old = call(libc::SYS_close_range, [3, u32::MAX as usize, cloexec, 0]);
    if plan.change_user
        && let Err(error) = change_user(&plan.user)
    {
        return (Stage::User, error);
    }
    let enter = |directory: *const c_char| call(libc::SYS_chdir, [directory as usize, 0, 0, 0]);
    if let Err(error) = enter(plan.cwd.as_ptr()) {
        let rescued = plan.cwd_is_home && enter(c"/".as_ptr()).is_ok();
        if !rescued {
            return (Stage::Directory, error);
        }
    }
    let execute = |program: *const c_char, words: &Words| {
        let pointers = |words: &Words| words.pointers.as_ptr() as usize;
        call(libc::SYS_execve, [program as usize, pointers(words), pointers(&plan.env), 0]).err().unwrap_or(libc::EIO)
    };
    let mut denied = None;
    let mut last = libc::ENOENT;
    let searched = plan.programs.len() > 1;
    for program in &plan.programs {
        // To look first is cheaper: execve makes a new address space before it looks.
        let here = libc::AT_FDCWD as usize;
        let found = call(libc::SYS_faccessat, [here, program.as_ptr() as usize, number(libc::F_OK), 0]);
        last = match found {
            Err(error @ (libc::ENOENT | libc::ENOTDIR)) if searched => error,
            _ => execute(program.as_ptr(), &plan.argv),
        };
        match last {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => denied = Some(libc::EACCES),
            // A script without "#!" is the shell's, as execvp(3) has it.
            libc::ENOEXEC => {
                if let Some(place) = plan.script.pointers.get(1) {
                    place.set(program.as_ptr());
                }
                last = execute(c"/bin/sh".as_ptr(), &plan.script);
                break;
            }
            _ => break,
        }
    }
    (Stage::Program, denied.unwrap_or(last))
}

fn attach_stdio(plan: &Plan) -> Result<(), i32> {
    call(libc::SYS_setsid, [0; 4])?;
    let [input, ..] = plan.stdio;
    if plan.terminal {
        call(libc::SYS_ioctl, [number(input), libc::TIOCSCTTY as usize, 0, 0])?;
        let owner = [number(input), plan.user.uid as usize, u32::MAX as usize, 0];
        let _only_for_other_users = call(libc::SYS_fchown, owner);
    }
    for (to, from) in plan.stdio.iter().enumerate() {
        // Never the same descriptor: 0, 1 and 2 are the agent's, and open.
        call(libc::SYS_dup3, [number(*from), to, 0, 0])?;
    }
    Ok(())
}

fn change_user(user: &User) -> Result<(), i32> {
    let (uid, gid) = (user.uid as usize, user.gid as usize);
    call(libc::SYS_setgroups, [user.groups.len(), user.groups.as_ptr() as usize, 0, 0])?;
    call(libc::SYS_setresgid, [gid, gid, gid, 0])?;
    call(libc::SYS_setresuid, [uid, uid, uid, 0])
}

/// Reads what the child told: `None` while it is on its way, `Some(Ok)` when its program runs.
pub(crate) fn outcome(start: &mut Start, request: &Exec) -> Option<Result<(), Failure>> {
    let mut message = [0; TOLD_BYTES];
    loop {
        match start.pipe.read(&mut message) {
            Ok(0) => break,
            // The child is on its way out; the end of the pipe says that it is.
            Ok(TOLD_BYTES) => start.told = Some(message),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            _ => return Some(Err(failure(FailureKind::Io, "the child's report is unreadable"))),
        }
    }
    start.launch = None;
    let Some([stage, number @ ..]) = start.told else { return Some(Ok(())) };
    let error = io::Error::from_raw_os_error(i32::from_le_bytes(number));
    let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let what = match stage {
        1 => "cannot set up the command's streams".to_string(),
        2 => format!("cannot become user \"{}\"", show(request.user.as_deref().unwrap_or(b"root"))),
        3 => format!("cannot enter \"{}\"", show(request.cwd.as_deref().unwrap_or(b"/"))),
        _ => format!("cannot run \"{}\"", show(request.argv.first().map_or(b"the login shell", |word| word))),
    };
    Some(Err(io_failure(&what, &error)))
}

/// Only so that the flag is named once: files given to others are opened without following a terminal.
pub(crate) const SAFE_OPEN: OFlags = OFlags::CLOEXEC.union(OFlags::NOCTTY).union(OFlags::NONBLOCK);
