//! What the host may ask of the agent.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use burgeon_guest::protocol::{Answer, Failure, FailureKind, Provision, Request, StopHow};

use super::Agent;
use crate::{
    cpus, disk,
    exec::Exec,
    files::{self, Get, Put},
    freeze, identity, provisions,
    spawn::{self, failure},
    sys::{self, Stack},
    system,
};

/// How long processes may take to end when the agent is process 1 and the guest stops.
const GRACE: Duration = Duration::from_secs(2);
const MOST_STREAMS: usize = 1024;

impl Agent {
    /// Does what is asked; `None` when the reply comes later.
    pub(super) fn request(&mut self, id: u32, request: Request) -> Option<Result<Answer, Failure>> {
        let missing = || failure(FailureKind::NotFound, "no such command is running");
        Some(match request {
            Request::Exec(request) => return self.exec(id, request),
            Request::Signal { stream, signal } => match self.execs.get(&stream) {
                Some(exec) => exec
                    .signal(signal)
                    .map(|()| Answer::Done)
                    .map_err(|error| spawn::io_failure("cannot send the signal", &error)),
                None => Err(missing()),
            },
            Request::Resize { stream, size } => match self.execs.get(&stream).and_then(|exec| exec.terminal.as_ref()) {
                Some(terminal) => spawn::resize(terminal, size)
                    .map(|()| Answer::Done)
                    .map_err(|error| spawn::io_failure("cannot resize the terminal", &error)),
                None => Err(missing()),
            },
            Request::Close { stream } => {
                if let Some(exec) = self.execs.remove(&stream) {
                    exec.kill();
                }
                self.puts.remove(&stream);
                self.gets.remove(&stream);
                Ok(Answer::Done)
            }
            Request::Put { stream, path, mode, size } => match self.admit(stream, 1) {
                Ok(()) => match Put::new(id, &path, mode, size, system::nonce()) {
                    Ok(put) => {
                        self.puts.insert(stream, put);
                        return None;
                    }
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            },
            Request::Get { stream, path } => self.admit(stream, 1).and_then(|()| {
                let (get, answer) = Get::new(stream, &path)?;
                self.gets.insert(stream, get);
                Ok(answer)
            }),
            Request::List { path, after } => files::list(&path, &after),
            Request::MakeDirectory { path, mode } => files::make_directory(&path, mode),
            Request::Figures => Ok(system::figures()),
            _ if !self.setup.manages_system => {
                Err(failure(FailureKind::Unsupported, "this agent does not manage its machine"))
            }
            Request::Clock { time_ns } => system::set_clock(time_ns),
            Request::Freeze => {
                let result = freeze::freeze();
                self.frozen |= result.is_ok();
                result.map(|()| Answer::Done)
            }
            Request::Thaw => {
                (self.frozen, self.rehearses) = (false, false);
                self.provided.clear();
                freeze::thaw().map(|()| Answer::Done)
            }
            Request::Stop { how } => self.stop(how),
            Request::Grow => disk::grow_all(),
            Request::Cpus { online } => cpus::set(Path::new(cpus::DIRECTORY), online).map(Answer::Cpus),
            Request::Settle { .. } | Request::Renew(_) | Request::RenewWith { .. } if !self.frozen => {
                Err(failure(FailureKind::Unsupported, "the workload is not frozen"))
            }
            Request::Settle { generalise } => identity::settle(generalise),
            Request::Renew(wanted) => identity::renew(&wanted, &[]).map(|(receipt, _)| Answer::Receipt(receipt)),
            Request::RenewWith { identity, mut more } => {
                more.append(&mut self.provided);
                self.rehearses = more.contains(&Provision::Rehearsal);
                identity::renew(&identity, &more).map(|(receipt, more)| Answer::Renewed { receipt, more })
            }
            // Secrets of the machine that it was go first.
            Request::Provide { more } if self.frozen => {
                self.provided = more;
                Ok(Answer::Done)
            }
            Request::Provide { more } => provisions::take(&more).map(|()| Answer::Done),
            Request::Identity { host_name } => system::set_host_name(&host_name),
        })
    }

    /// Whether streams from `stream` on may be used anew.
    fn admit(&self, stream: u32, count: u32) -> Result<(), Failure> {
        let in_use = self.execs.len() + self.puts.len() + self.gets.len();
        if in_use >= MOST_STREAMS {
            return Err(failure(FailureKind::Limit, format!("{MOST_STREAMS} commands and files are under way")));
        }
        let last = stream.checked_add(count - 1).filter(|_| stream > 0);
        let taken = |last: u32| {
            let first = stream.saturating_sub(2);
            self.execs.range(first..=last).next().is_some()
                || self.puts.range(stream..=last).next().is_some()
                || self.gets.range(stream..=last).next().is_some()
        };
        match last {
            Some(last) if !taken(last) => Ok(()),
            _ => Err(failure(FailureKind::Invalid, format!("stream {stream} is in use, or no stream number"))),
        }
    }

    fn exec(&mut self, id: u32, request: burgeon_guest::protocol::Exec) -> Option<Result<Answer, Failure>> {
        if let Err(error) = self.admit(request.stream, 3) {
            return Some(Err(error));
        }
        if self.frozen && !self.rehearses {
            return Some(Err(failure(FailureKind::Unsupported, "the workload is frozen")));
        }
        // One of a rehearsal is the agent's own: the commands' cgroup is frozen.
        let cgroup = (self.setup.manages_system && !self.rehearses).then_some(freeze::COMMANDS);
        match spawn::spawn(&request, cgroup, self.spare_stack.take().unwrap_or_else(Stack::new)) {
            Ok((spawned, launch)) => {
                self.launches.insert(spawned.pid, launch);
                self.execs.insert(request.stream, Exec::new(id, request, spawned, Instant::now()));
                None
            }
            Err(error) => Some(Err(error)),
        }
    }

    fn stop(&mut self, how: StopHow) -> Result<Answer, Failure> {
        if self.frozen {
            self.frozen = false;
            freeze::thaw()?;
        }
        if !system::is_init() {
            return system::ask_init(how).map(|()| Answer::Done);
        }
        let _none_left = sys::kill(-1, libc::SIGTERM);
        self.stopping = Some((how, Instant::now() + GRACE));
        Ok(Answer::Done)
    }

    pub(super) fn go_on_stopping(&mut self) {
        if let Some((how, deadline)) = self.stopping {
            let alone = sys::wait_any().is_err();
            if alone || deadline <= Instant::now() {
                self.channel.flush();
                system::finish(how);
            }
        }
    }
}
