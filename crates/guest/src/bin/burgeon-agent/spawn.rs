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

fn plan(request: &Exec, stdio: [OwnedFd; 3]) -> Result<Plan, Failure> {
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
    Ok(Plan {
        programs,
        argv,
        env,
        cwd: text(request.cwd.as_ref().unwrap_or(&user.home), "the working directory")?,
        cwd_is_home: request.cwd.is_none(),
        change_user: own == 0 && (user.uid != 0 || user.gid != 0),
        user,
        stdio,
        terminal: request.terminal.is_some(),
    })
}

/// The child's way. Returns only what stopped it.
fn become_program(plan: &Plan) -> (Stage, io::Error) {
    sys::default_signals();
    if let Err(error) = attach_stdio(plan) {
        return (Stage::Terminal, error);
    }
    sys::close_strangers();
    if plan.change_user
        && let Err(error) = change_user(&plan.user)
    {
        return (Stage::User, error);
    }
    if let Err(error) = rustix::process::chdir(&plan.cwd) {
        let rescued = plan.cwd_is_home && rustix::process::chdir("/").is_ok();
        if !rescued {
            return (Stage::Directory, error.into());
        }
    }
    let mut denied = None;
    let mut last = io::Error::from_raw_os_error(libc::ENOENT);
    for program in &plan.programs {
        last = sys::execve(program, &plan.argv, &plan.env);
        match last.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            Some(libc::EACCES) => denied = Some(io::Error::from_raw_os_error(libc::EACCES)),
            // A script without "#!" is the shell's, as execvp(3) has it.
            Some(libc::ENOEXEC) => {
                let mut argv = vec![c"sh".to_owned(), program.clone()];
                argv.extend(plan.argv.iter().skip(1).cloned());
                last = sys::execve(&c"/bin/sh".to_owned(), &argv, &plan.env);
                break;
            }
            _ => break,
        }
    }
    (Stage::Program, denied.unwrap_or(last))
}

fn attach_stdio(plan: &Plan) -> io::Result<()> {
    rustix::process::setsid()?;
    if plan.terminal {
        rustix::process::ioctl_tiocsctty(&plan.stdio[0])?;
        let _only_for_other_users = rustix::fs::fchown(&plan.stdio[0], Some(Uid::from_raw(plan.user.uid)), None);
    }
    for (to, from) in plan.stdio.iter().enumerate() {
        sys::duplicate_onto(from, i32::try_from(to).unwrap_or(0))?;
    }
    Ok(())
}

fn change_user(user: &User) -> io::Result<()> {
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
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
