//! Starting a command: what is prepared beforehand, and what the child does until it is another program.
//!
//! The child shares the agent's memory until then (see [`sys::start_sharing`]), so all that it needs is made before, is
//! kept in a [`Launch`], and is only read by it: [`run_child`] and what it calls neither allocate nor drop anything.
//!
//! The child tells a failure through a pipe that closes by itself when the program starts, so the agent
//! never waits for a slow disk: the end of that pipe is one more thing it polls.

use std::{
    ffi::{CString, c_void},
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use burgeon_guest::protocol::{Exec, Failure, FailureKind, TerminalSize};
use rustix::{
    fs::{Access, Gid, OFlags, Uid},
    pipe::{PipeFlags, pipe_with},
    pty::OpenptFlags,
    termios::Winsize,
};

use crate::{
    freeze, provisions,
    sys::{self, Stack, Texts},
    users::{self, User},
};

const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Room in each pipe: as much as the credit of its stream.
const PIPE_BYTES: usize = 262_144;

/// A command that is being started; whether its program runs is told by `start`.
pub(crate) struct Spawned {
    pub(crate) pid: i32,
    pub(crate) start: File,
    pub(crate) input: OwnedFd,
    pub(crate) output: OwnedFd,
    /// Absent with a terminal.
    pub(crate) errors: Option<OwnedFd>,
}

/// What the child reads, and the stack it runs on: to be kept until the command's `start` has told, or it has ended.
pub(crate) struct Launch {
    _plan: Box<Plan>,
    pub(crate) stack: Stack,
}

/// What the child needs.
struct Plan {
    programs: Vec<CString>,
    argv: Texts,
    /// For a script without "#!", one for each program: as execvp(3) has it, the shell runs it.
    shell_argv: Vec<Texts>,
    env: Texts,
    cwd: CString,
    cwd_is_home: bool,
    user: User,
    groups: Vec<Gid>,
    change_user: bool,
    stdio: [RawFd; 3],
    report: RawFd,
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

/// Starts the command of `request`.
pub(crate) fn spawn(request: &Exec, cgroup: Option<&str>, stack: Stack) -> Result<(Spawned, Launch), Failure> {
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

    let report = start_child.as_raw_fd();
    let plan = Box::new(plan(request, stdio.each_ref().map(AsRawFd::as_raw_fd), report)?);
    let (pid, launch) = start_child_process(plan, stack, cgroup).map_err(|error| io_failure("cannot fork", &error))?;
    Ok((Spawned { pid, start: start.into(), input, output, errors }, launch))
}

/// Starts the child in the cgroup, or, where the kernel does not offer that, without it: the command runs all the same.
fn start_child_process(plan: Box<Plan>, mut stack: Stack, cgroup: Option<&str>) -> io::Result<(i32, Launch)> {
    let argument = (&raw const *plan).cast::<c_void>();
    let mut start = |cgroup: Option<&OwnedFd>| {
        // SAFETY: the plan and the stack stay in the launch, which the agent keeps until the child needs them no more.
        unsafe { sys::start_sharing(cgroup, &mut stack, run_child, argument) }
    };
    let into = cgroup.and_then(|cgroup| freeze::directory(cgroup).ok()).map(|directory| start(Some(&directory)));
    let pid = match into {
        Some(Ok(pid)) => pid,
        Some(Err(_)) | None => start(None)?,
    };
    Ok((pid, Launch { _plan: plan, stack }))
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

fn plan(request: &Exec, stdio: [RawFd; 3], report: RawFd) -> Result<Plan, Failure> {
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
    let given = provisions::environment();
    for (key, value) in given.iter().chain(&request.env) {
        if key.is_empty() || key.contains(&b'=') {
            let key = String::from_utf8_lossy(key);
            return Err(failure(FailureKind::Invalid, format!("\"{key}\" cannot be the name of a variable")));
        }
        env.retain(|(old, _)| old != key);
        env.push((key.clone(), value.clone()));
    }
    let path = env.iter().find(|(key, _)| key == b"PATH").map_or(PATH.to_vec(), |(_, value)| value.clone());

    let mut argv = request.argv.iter().map(|word| text(word, "the command")).collect::<Result<Vec<_>, _>>()?;
    let programs: Vec<CString> = match request.argv.first() {
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
        .collect::<Result<Vec<_>, _>>()?;
    let shell_argv = programs.iter().map(|program| {
        let rest = argv.iter().skip(1).cloned();
        Texts::new([c"sh".to_owned(), program.clone()].into_iter().chain(rest).collect())
    });
    Ok(Plan {
        shell_argv: shell_argv.collect(),
        programs,
        argv: Texts::new(argv),
        env: Texts::new(env),
        cwd: text(request.cwd.as_ref().unwrap_or(&user.home), "the working directory")?,
        cwd_is_home: request.cwd.is_none(),
        change_user: own == 0 && (user.uid != 0 || user.gid != 0),
        groups: user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect(),
        user,
        stdio,
        report,
        terminal: request.terminal.is_some(),
    })
}

/// The child: becomes the program, or reports why not.
extern "C" fn run_child(plan: *const c_void) -> ! {
    // SAFETY: `start_child_process` passes a plan, which lives until this process is another program or has ended.
    let plan = unsafe { &*plan.cast::<Plan>() };
    let (stage, error) = become_program(plan);
    let mut message = [stage as u8, 0, 0, 0, 0];
    message[1..].copy_from_slice(&error.to_le_bytes());
    // SAFETY: the child has its own copy of the agent's descriptors, and the report's is open in it.
    let _lost_with_the_parent = rustix::io::write(unsafe { BorrowedFd::borrow_raw(plan.report) }, &message);
    sys::exit_now(127)
}

/// Returns only what stopped it: the stage and the error's number.
fn become_program(plan: &Plan) -> (Stage, i32) {
    sys::unblock_signals();
    if let Err(error) = attach_stdio(plan) {
        return (Stage::Terminal, error);
    }
    sys::close_strangers();
    if plan.change_user
        && let Err(error) = change_user(plan)
    {
        return (Stage::User, error.raw_os_error());
    }
    if let Err(error) = rustix::process::chdir(plan.cwd.as_c_str()) {
        let rescued = plan.cwd_is_home && rustix::process::chdir(c"/").is_ok();
        if !rescued {
            return (Stage::Directory, error.raw_os_error());
        }
    }
    (Stage::Program, execute(plan))
}

/// Tries the programs in turn, as execvp(3) does.
fn execute(plan: &Plan) -> i32 {
    let mut denied = false;
    let mut last = libc::ENOENT;
    for (program, shell_argv) in plan.programs.iter().zip(&plan.shell_argv) {
        // An execve that fails costs an address space, so a search asks for the file first.
        let there = plan.programs.len() == 1 || rustix::fs::access(program.as_c_str(), Access::EXISTS).is_ok();
        last = if there { sys::execve(program, &plan.argv, &plan.env) } else { libc::ENOENT };
        match last {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => denied = true,
            libc::ENOEXEC => return sys::execve(c"/bin/sh", shell_argv, &plan.env),
            _ => break,
        }
    }
    if denied { libc::EACCES } else { last }
}

fn attach_stdio(plan: &Plan) -> Result<(), i32> {
    let number = |error: rustix::io::Errno| error.raw_os_error();
    rustix::process::setsid().map_err(number)?;
    let [input, ..] = plan.stdio;
    if plan.terminal {
        // SAFETY: the child has its own copy of the agent's descriptors, and this one is open in it.
        let input = unsafe { BorrowedFd::borrow_raw(input) };
        rustix::process::ioctl_tiocsctty(input).map_err(number)?;
        let _only_for_other_users = rustix::fs::fchown(input, Some(Uid::from_raw(plan.user.uid)), None);
    }
    for (from, to) in plan.stdio.into_iter().zip(0..) {
        sys::duplicate_onto(from, to)?;
    }
    Ok(())
}

/// Each of these changes the calling process alone.
fn change_user(plan: &Plan) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(plan.user.uid), Gid::from_raw(plan.user.gid));
    rustix::thread::set_thread_groups(&plan.groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

/// Reads what the child told: `None` while it is on its way, `Some(Ok)` when its program runs.
pub(crate) fn outcome(start: &mut File, request: &Exec) -> Option<Result<(), Failure>> {
    let mut message = [0; 5];
    match start.read(&mut message) {
        Ok(0) => Some(Ok(())),
        Ok(5) => {
            let error =
                io::Error::from_raw_os_error(i32::from_le_bytes([message[1], message[2], message[3], message[4]]));
            let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let what = match message[0] {
                1 => "cannot set up the command's streams".to_string(),
                2 => format!("cannot become user \"{}\"", show(request.user.as_deref().unwrap_or(b"root"))),
                3 => format!("cannot enter \"{}\"", show(request.cwd.as_deref().unwrap_or(b"/"))),
                _ => format!("cannot run \"{}\"", show(request.argv.first().map_or(b"the login shell", |word| word))),
            };
            Some(Err(io_failure(&what, &error)))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => None,
        _ => Some(Err(failure(FailureKind::Io, "the child's report is unreadable"))),
    }
}

/// Only so that the flag is named once: files given to others are opened without following a terminal.
pub(crate) const SAFE_OPEN: OFlags = OFlags::CLOEXEC.union(OFlags::NOCTTY).union(OFlags::NONBLOCK);
