//! The agent's one loop. It owns everything: the channel, the running commands, the files under way.
//!
//! A turn: poll; take ended children; read and handle what the host sent; feed inputs; write what is to be
//! told, control first and then one frame of each stream in turn. Nothing in it waits, except for disks.

mod requests;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use burgeon_guest::protocol::{
    Answer, Decoder, Failure, FailureKind, Frame, GuestMessage, Header, Hello, HostMessage, Kind, LEAST_COST,
    Provision, Received, Sequence, StopHow, VERSION, cost, decode_control,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    channel::{Channel, Input},
    exec::{Exec, Source},
    files::{Get, Put},
    generation,
    spawn::{self, Launch, failure},
    sys::{self, Stack},
    system,
};

/// Reads of the channel in one turn; a virtio port gives 4 KiB at a time.
const READS: usize = 64;
/// Writes of the channel in one turn.
const WRITES: usize = 16;
const REDIAL: Duration = Duration::from_millis(20);
const NOISE_PAUSE: Duration = Duration::from_secs(1);

/// What the agent was started for.
#[derive(Default)]
pub(crate) struct Setup {
    /// The guest is ours: host name, clock, cgroups and stopping are the agent's business.
    pub(crate) manages_system: bool,
    pub(crate) warnings: Vec<String>,
    /// Stage and reason.
    pub(crate) boot_failure: Option<(String, String)>,
    /// Closed when Ready is on its way.
    pub(crate) started: Option<OwnedFd>,
}

/// What a polled descriptor stands for; streams are those of the exec's input.
#[derive(Clone, Copy)]
enum Token {
    Channel,
    Children,
    Start(u32),
    Input(u32),
    Output(u32, usize),
}

struct Agent {
    channel: Channel,
    children: OwnedFd,
    setup: Setup,
    session: Option<[u8; 16]>,
    execs: BTreeMap<u32, Exec>,
    /// By process: what a child that is no program yet still uses.
    launches: BTreeMap<i32, Launch>,
    /// For the next command.
    spare_stack: Option<Stack>,
    puts: BTreeMap<u32, Put>,
    gets: BTreeMap<u32, Get>,
    /// The stream that sent last; the next one in order is served next.
    served: u32,
    frozen: bool,
    /// Frozen, and made ready for an identity that is to come.
    rehearses: bool,
    /// What it is given with its next identity.
    provided: Vec<Provision>,
    stopping: Option<(StopHow, Instant)>,
    noise_told: (u64, Instant),
    begun: Instant,
}

/// Serves the channel for ever.
pub(crate) fn run(channel: Channel, mut setup: Setup) -> io::Error {
    if setup.manages_system
        && let Err(error) = generation::offer()
    {
        setup.warnings.push(format!("programs are not told when they are in a clone: {error}"));
    }
    sys::reset_signals();
    sys::wake_politely();
    let children = match sys::child_signal() {
        Ok(children) => children,
        Err(error) => return error,
    };
    let mut agent = Agent {
        channel,
        children,
        setup,
        session: None,
        execs: BTreeMap::new(),
        launches: BTreeMap::new(),
        spare_stack: None,
        puts: BTreeMap::new(),
        gets: BTreeMap::new(),
        served: 0,
        frozen: false,
        rehearses: false,
        provided: Vec::new(),
        stopping: None,
        noise_told: (0, Instant::now()),
        begun: Instant::now(),
    };
    let mut decoder = Decoder::new();
    agent.announce();
    agent.pump();
    agent.setup.started = None;
    loop {
        if let Err(error) = agent.turn(&mut decoder) {
            return error;
        }
    }
}

impl Agent {
    fn announce(&mut self) {
        self.channel.say(&GuestMessage::Ready(system::about(&self.setup.warnings)));
        if let Some((stage, reason)) = self.setup.boot_failure.clone() {
            self.channel.say(&GuestMessage::BootFailed { stage, reason });
        }
    }

    fn turn(&mut self, decoder: &mut Decoder) -> io::Result<()> {
        let tokens = self.wait()?;
        let mut channel_woken = false;
        for token in tokens {
            match token {
                Token::Channel => channel_woken = true,
                Token::Children => self.reap(),
                Token::Start(stream) => self.started(stream),
                Token::Input(stream) => {
                    let window = self.execs.get_mut(&stream).and_then(Exec::drain_input);
                    self.give_back(window);
                }
                Token::Output(stream, which) => {
                    if let Some(source) = self.execs.get_mut(&stream).and_then(|exec| exec.sources[which].as_mut()) {
                        source.ready = true;
                    }
                }
            }
        }
        if channel_woken {
            self.channel.woken();
            self.read(decoder);
        } else if self.channel.is_lost() && self.channel.reconnect() {
            self.announce();
        }
        self.tell_noise(decoder.skipped());
        self.keep_time();
        self.pump();
        self.go_on_stopping();
        Ok(())
    }

    /// Polls everything that matters now, for as long as no timer is due.
    fn wait(&mut self) -> io::Result<Vec<Token>> {
        // Emulated guests may have a slow clock: it is not read when no timer runs.
        let timers = self.channel.is_lost() || self.stopping.is_some() || self.execs.values().any(Exec::has_timer);
        let now = if timers { Instant::now() } else { self.begun };
        let blocked = self.channel.is_blocked();
        let mut until: Option<Instant> = None;
        let mut at = |moment: Instant| until = Some(until.map_or(moment, |until: Instant| until.min(moment)));
        let mut at_once =
            !blocked && (self.channel.has_control() || self.gets.values().any(|get| may_send(&get.source)));
        if self.channel.is_lost() {
            at(now + REDIAL);
        }
        if let Some((_, deadline)) = self.stopping {
            at(deadline);
        }
        for exec in self.execs.values_mut() {
            if let Some(deadline) = exec.deadline {
                at(deadline);
            }
            if let Some(end) = exec.silence_ends(blocked, now) {
                at(end);
            }
        }

        let mut fds: Vec<(Token, BorrowedFd<'_>, PollFlags)> =
            vec![(Token::Children, self.children.as_fd(), PollFlags::IN)];
        if let Some((fd, flags)) = self.channel.poll_on() {
            fds.push((Token::Channel, fd, flags));
        }
        for (stream, exec) in &self.execs {
            if let Some(start) = &exec.start {
                fds.push((Token::Start(*stream), start.as_fd(), PollFlags::IN));
                continue;
            }
            if let Some(sink) = exec.sink.as_ref().filter(|sink| sink.is_waiting()) {
                fds.push((Token::Input(*stream), sink.fd.as_fd(), PollFlags::OUT));
            }
            for (which, source) in exec.sources.iter().enumerate() {
                let Some(source) = source.as_ref().filter(|source| !blocked && source.credit >= LEAST_COST) else {
                    continue;
                };
                if source.ready {
                    at_once = true;
                } else {
                    fds.push((Token::Output(*stream, which), source.fd.as_fd(), PollFlags::IN));
                }
            }
        }
        let wait = if at_once { Some(Duration::ZERO) } else { until.map(|until| until.saturating_duration_since(now)) };
        let timeout = wait.map(|wait| Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        let mut polled: Vec<PollFd<'_>> =
            fds.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let woken = polled.iter().zip(&fds).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(woken.map(|(_, (token, ..))| *token).collect())
    }

    fn read(&mut self, decoder: &mut Decoder) {
        for _ in 0..READS {
            if !self.channel.wants_input() {
                return;
            }
            match self.channel.read(decoder) {
                Input::Bytes => {}
                Input::Nothing | Input::Lost => return,
            }
            while let Some(received) = decoder.next() {
                match received {
                    Received::Frame(frame) => self.frame(frame),
                    Received::OtherVersion(version) => self.refuse_version(u16::from(version)),
                }
            }
        }
    }

    fn frame(&mut self, frame: Frame<'_>) {
        if frame.kind == Kind::Control {
            return self.control(frame);
        }
        if self.session.is_none() {
            return;
        }
        if let Some(put) = self.puts.get_mut(&frame.stream) {
            if !put.received.accept(frame.sequence) {
                return self.end_put(frame.stream, Err(failure(FailureKind::Io, "frames of the put were lost")));
            }
            match frame.kind {
                Kind::Data => match put.data(frame.payload) {
                    Ok(()) => {
                        let window = put.returns.consumed(frame.stream, cost(frame.payload.len()));
                        self.give_back(window);
                    }
                    Err(error) => self.end_put(frame.stream, Err(error)),
                },
                Kind::DataEnd => {
                    let result = put.finish();
                    self.end_put(frame.stream, result);
                }
                Kind::Control | Kind::Window => {}
            }
            return;
        }
        if let Some(exec) = self.execs.get_mut(&frame.stream) {
            let mut good = exec.received.accept(frame.sequence);
            let mut window = None;
            match frame.kind {
                Kind::Data if good => (good, window) = exec.input(frame.payload),
                Kind::DataEnd if good => exec.input_end(),
                _ => {}
            }
            self.give_back(window);
            if !good {
                self.fail_exec(frame.stream, "frames of its input were lost, or came without credit");
            }
            return;
        }
        if frame.kind == Kind::Window {
            self.window(frame);
        }
    }

    /// Credit for a stream that goes to the host.
    fn window(&mut self, frame: Frame<'_>) {
        let Some(amount) = frame.payload.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) else { return };
        let mut lost = None;
        let exec_sources = self
            .execs
            .iter_mut()
            .flat_map(|(stream, exec)| exec.sources.iter_mut().flatten().map(move |source| (*stream, source)));
        let get_sources = self.gets.iter_mut().map(|(stream, get)| (*stream, &mut get.source));
        for (owner, source) in exec_sources.chain(get_sources).filter(|(_, source)| source.stream == frame.stream) {
            if source.received.accept(frame.sequence) {
                source.credit = source.credit.saturating_add(amount);
            } else {
                lost = Some(owner);
            }
        }
        if let Some(owner) = lost {
            self.fail_exec(owner, "credit frames were lost");
            if self.gets.remove(&owner).is_some() {
                self.stream_failed(owner, "credit frames were lost");
            }
        }
    }

    fn fail_exec(&mut self, stream: u32, reason: &str) {
        if let Some(exec) = self.execs.remove(&stream) {
            exec.kill();
            self.stream_failed(stream, reason);
        }
    }

    fn stream_failed(&mut self, stream: u32, reason: &str) {
        self.channel.say(&GuestMessage::StreamFailed { stream, reason: reason.to_string() });
    }

    fn give_back(&mut self, window: Option<Vec<u8>>) {
        if let Some(frame) = window {
            self.channel.push(frame);
        }
    }

    fn control(&mut self, frame: Frame<'_>) {
        let message = match decode_control::<HostMessage>(frame.payload) {
            Ok(message) => message,
            Err(fault) => {
                // Its sequence number is left unused, so the next message shows the gap.
                return self.stream_failed(0, &fault.to_string());
            }
        };
        match message {
            HostMessage::Hello(hello) => {
                self.channel.control_received = Sequence::default();
                let _restarts_the_count = self.channel.control_received.accept(frame.sequence);
                self.hello(&hello);
            }
            HostMessage::Request { id, request } => {
                if self.session.is_none() {
                    let error = failure(FailureKind::Unsupported, "there is no session: send Hello first");
                    return self.reply(id, Err(error));
                }
                if !self.channel.control_received.accept(frame.sequence) {
                    self.end_all();
                    self.session = None;
                    return self.stream_failed(0, "control messages were lost: the session is over");
                }
                if let Some(result) = self.request(id, request) {
                    self.reply(id, result);
                }
            }
        }
    }

    fn refuse_version(&mut self, version: u16) {
        let reason = format!("the host speaks protocol version {version}; this agent speaks version {VERSION}");
        self.channel.say(&GuestMessage::Refused { version: u16::from(VERSION), reason });
    }

    fn hello(&mut self, hello: &Hello) {
        if hello.version != u16::from(VERSION) {
            return self.refuse_version(hello.version);
        }
        if self.session != Some(hello.session) {
            self.end_all();
            self.channel.forget_output();
            self.session = Some(hello.session);
            if self.setup.manages_system {
                system::correct_clock(hello.host_time_ns);
                if !hello.vm_name.is_empty() {
                    let _an_unfit_name_changes_nothing = system::set_host_name(&hello.vm_name);
                }
            }
        }
        let about = system::about(&self.setup.warnings);
        self.channel.say(&GuestMessage::Welcome { session: hello.session, about });
        if let Some((stage, reason)) = self.setup.boot_failure.clone() {
            self.channel.say(&GuestMessage::BootFailed { stage, reason });
        }
    }

    fn end_all(&mut self) {
        for exec in std::mem::take(&mut self.execs).into_values() {
            exec.kill();
        }
        self.puts.clear();
        self.gets.clear();
    }

    fn reply(&mut self, id: u32, result: Result<Answer, Failure>) {
        self.channel.say(&GuestMessage::Reply { id, result });
    }

    fn end_put(&mut self, stream: u32, result: Result<Answer, Failure>) {
        if let Some(put) = self.puts.remove(&stream) {
            self.reply(put.id, result);
        }
    }

    /// The child's report is there.
    fn started(&mut self, stream: u32) {
        let Some(exec) = self.execs.get_mut(&stream) else { return };
        let Some(start) = &mut exec.start else { return };
        let Some(outcome) = spawn::outcome(start, &exec.request) else { return };
        exec.start = None;
        self.spare_stack = self.launches.remove(&exec.pid).map(|launch| launch.stack).or(self.spare_stack.take());
        let (id, pid) = (exec.id, u32::try_from(exec.pid).unwrap_or(0));
        if outcome.is_err() {
            self.execs.remove(&stream);
        }
        self.reply(id, outcome.map(|()| Answer::Started { pid }));
    }

    /// Takes all ended children; as process 1 that means everybody's orphans too.
    fn reap(&mut self) {
        let mut signal = [0; 128];
        while rustix::io::read(&self.children, &mut signal).is_ok_and(|count| count > 0) {}
        while let Ok(Some(ended)) = sys::wait_any() {
            self.launches.remove(&ended.pid);
            let Some(stream) = self.execs.values().find(|exec| exec.pid == ended.pid).map(|exec| exec.request.stream)
            else {
                continue;
            };
            self.started(stream);
            if let Some(exec) = self.execs.get_mut(&stream).filter(|exec| exec.exited.is_none()) {
                exec.ended(ended.status, ended.cpu_us, Instant::now());
            }
        }
    }

    /// Time limits, and the end of waiting for output after an exit.
    fn keep_time(&mut self) {
        if !self.execs.values().any(Exec::has_timer) {
            return;
        }
        let now = Instant::now();
        let blocked = self.channel.is_blocked();
        for exec in self.execs.values_mut() {
            if exec.deadline.is_some_and(|deadline| deadline <= now) {
                exec.time_is_up();
            }
            if exec.silence_ends(blocked, now).is_some_and(|end| end <= now) {
                exec.give_up_silent_output(now);
            }
        }
    }

    /// Writes as much as the channel takes: control, then data in turns.
    fn pump(&mut self) {
        for _ in 0..WRITES {
            if self.channel.is_blocked() || !self.channel.flush() {
                return;
            }
            self.channel.load_control();
            while self.load_data() {}
            self.tell_exits();
            self.channel.load_control();
            if !self.channel.has_control() {
                return;
            }
        }
    }

    /// Adds one frame of the stream whose turn it is. `false` when there is none, or no room.
    fn load_data(&mut self) -> bool {
        let exec_streams = self
            .execs
            .values()
            .filter(|exec| exec.start.is_none())
            .flat_map(|exec| exec.sources.iter().flatten().map(|source| (source, exec.request.stream)));
        let get_streams = self.gets.iter().map(|(stream, get)| (&get.source, *stream));
        let next = exec_streams
            .chain(get_streams)
            .filter(|(source, _)| may_send(source))
            .map(|(source, owner)| (source.stream <= self.served, source.stream, owner))
            .min();
        let Some((_, stream, owner)) = next else { return false };
        let mut exec = self.execs.get_mut(&owner);
        let is_exec = exec.is_some();
        let slot = match &mut exec {
            Some(exec) => exec.sources.iter_mut().find(|slot| slot.as_ref().is_some_and(|slot| slot.stream == stream)),
            None => None,
        };
        let source = match slot {
            Some(Some(source)) => source,
            _ => match self.gets.get_mut(&owner) {
                Some(get) => &mut get.source,
                None => return false,
            },
        };
        let Some(space) = self.channel.data_space(source.credit) else { return false };
        self.served = stream;
        match rustix::io::read(&source.fd, space) {
            Ok(count) if count > 0 => {
                source.credit = source.credit.saturating_sub(cost(count));
                let length = u32::try_from(count).unwrap_or(0);
                let sequence = source.sequence.take();
                self.channel.commit(Header { kind: Kind::Data, sequence, stream, length });
                if let Some(exec) = exec.filter(|exec| exec.exited.is_some()) {
                    exec.quiet_since = Instant::now();
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => source.ready = false,
            // A terminal whose last user is gone says EIO; that is its end.
            // The end needs no word of its own: `Exited` comes after all output.
            Ok(_) | Err(_) if is_exec => {
                if let Some(exec) = exec {
                    exec.sources.iter_mut().for_each(|slot| {
                        slot.take_if(|slot| slot.stream == stream);
                    });
                }
            }
            Ok(_) => {
                let sequence = source.sequence.take();
                self.channel.commit(Header { kind: Kind::DataEnd, sequence, stream, length: 0 });
                self.gets.remove(&owner);
            }
            Err(error) => {
                self.gets.remove(&owner);
                self.stream_failed(stream, &format!("cannot read on: {error}"));
            }
        }
        true
    }

    fn tell_exits(&mut self) {
        while let Some(stream) = self.execs.values().find(|exec| exec.is_drained()).map(|exec| exec.request.stream) {
            let Some(Exec { exited: Some((status, cpu_us)), .. }) = self.execs.remove(&stream) else { return };
            self.channel.say(&GuestMessage::Exited { stream, status, cpu_us });
        }
    }

    fn tell_noise(&mut self, skipped: u64) {
        let (told, when) = self.noise_told;
        if skipped != told && (told == 0 || when.elapsed() > NOISE_PAUSE) {
            self.noise_told = (skipped, Instant::now());
            self.channel.say(&GuestMessage::Noise { skipped });
        }
    }
}

fn may_send(source: &Source) -> bool {
    source.ready && source.credit >= LEAST_COST
}
