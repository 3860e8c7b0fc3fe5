//! One running command: its pipes, its credit, its end.
//!
//! States: starting (the child's report is awaited) -> running -> exited (output is drained) -> told.

use std::{
    collections::VecDeque,
    fs::File,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use burgeon_guest::protocol::{CREDIT_BATCH, Exec as Request, ExitStatus, Kind, Sequence, WINDOW, cost, encode_frame};

use crate::{spawn::Spawned, sys};

/// How long a command's output may be silent after its first process has ended, while something still holds the pipe.
pub(crate) const SILENCE: Duration = Duration::from_millis(200);

/// Bytes on their way to the host.
pub(crate) struct Source {
    pub(crate) fd: OwnedFd,
    pub(crate) stream: u32,
    pub(crate) credit: u32,
    pub(crate) sequence: Sequence,
    pub(crate) received: Sequence,
    /// Poll said so, and no read has said otherwise since.
    pub(crate) ready: bool,
}

impl Source {
    pub(crate) fn new(fd: OwnedFd, stream: u32) -> Self {
        let (sequence, received) = (Sequence::default(), Sequence::default());
        Self { fd, stream, credit: WINDOW, sequence, received, ready: false }
    }
}

/// Credit to give back for a stream that comes from the host.
#[derive(Default)]
pub(crate) struct Returns {
    gathered: u32,
    sequence: Sequence,
}

impl Returns {
    /// Counts consumed credit; gives the window frame when enough has gathered.
    #[must_use]
    pub(crate) fn consumed(&mut self, stream: u32, amount: u32) -> Option<Vec<u8>> {
        self.gathered += amount;
        (self.gathered >= CREDIT_BATCH).then(|| {
            let mut frame = Vec::new();
            encode_frame(&mut frame, Kind::Window, self.sequence.take(), stream, &self.gathered.to_le_bytes());
            self.gathered = 0;
            frame
        })
    }
}

/// The command's input.
pub(crate) struct Sink {
    pub(crate) fd: OwnedFd,
    waiting: VecDeque<Vec<u8>>,
    /// Bytes of the first waiting piece that are written.
    offset: usize,
    /// Credit that the host has spent and not got back.
    held: u32,
    ended: bool,
    terminal: bool,
}

impl Sink {
    /// Whether the pipe is to be polled for room.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

pub(crate) struct Exec {
    pub(crate) id: u32,
    pub(crate) request: Request,
    pub(crate) pid: i32,
    pub(crate) start: Option<File>,
    pub(crate) sink: Option<Sink>,
    pub(crate) received: Sequence,
    pub(crate) returns: Returns,
    pub(crate) sources: [Option<Source>; 2],
    /// A copy of the terminal's master, for resizing.
    pub(crate) terminal: Option<OwnedFd>,
    pub(crate) exited: Option<(ExitStatus, u64)>,
    pub(crate) quiet_since: Instant,
    pub(crate) deadline: Option<Instant>,
    timed_out: bool,
}

impl Exec {
    pub(crate) fn new(id: u32, mut request: Request, spawned: Spawned, now: Instant) -> Self {
        let stream = request.stream;
        // Nothing needs the environment any more, and it may be large.
        request.env = Vec::new();
        let terminal = request.terminal.and_then(|_| spawned.output.try_clone().ok());
        let sink = Sink {
            fd: spawned.input,
            waiting: VecDeque::new(),
            offset: 0,
            held: 0,
            ended: false,
            terminal: request.terminal.is_some(),
        };
        Self {
            id,
            deadline: request.time_limit_ms.and_then(|limit| now.checked_add(Duration::from_millis(limit))),
            request,
            pid: spawned.pid,
            start: Some(spawned.start),
            sink: Some(sink),
            received: Sequence::default(),
            returns: Returns::default(),
            sources: [
                Some(Source::new(spawned.output, stream.wrapping_add(1))),
                spawned.errors.map(|fd| Source::new(fd, stream.wrapping_add(2))),
            ],
            terminal,
            exited: None,
            quiet_since: now,
            timed_out: false,
        }
    }

    /// Sends a signal to all of the command's process group.
    pub(crate) fn signal(&self, signal: i32) -> std::io::Result<()> {
        // Before setsid in the child there is no group; then the child alone is meant.
        sys::kill(-self.pid, signal)
            .or_else(|error| if self.exited.is_none() { sys::kill(self.pid, signal) } else { Err(error) })
    }

    pub(crate) fn kill(&self) {
        let _gone_already = self.signal(libc::SIGKILL);
    }

    pub(crate) fn time_is_up(&mut self) {
        self.deadline = None;
        if self.exited.is_none() {
            self.timed_out = true;
            self.kill();
        }
    }

    /// The first process has ended.
    pub(crate) fn ended(&mut self, status: Result<i32, i32>, cpu_us: u64, now: Instant) {
        let status = match status {
            _ if self.timed_out => ExitStatus::TimeLimit,
            Ok(code) => ExitStatus::Code(code),
            Err(signal) => ExitStatus::Signal(signal),
        };
        self.exited = Some((status, cpu_us));
        self.quiet_since = now;
        self.deadline = None;
    }

    /// Takes input from the host. `false` when the host spent credit that it did not have.
    #[must_use]
    pub(crate) fn input(&mut self, data: &[u8]) -> (bool, Option<Vec<u8>>) {
        let Some(sink) = &mut self.sink else {
            // The command closed its input: the bytes are consumed by nobody, so the host is not stopped.
            return (true, self.returns.consumed(self.request.stream, cost(data.len())));
        };
        if sink.held.saturating_add(cost(data.len())) > WINDOW {
            return (false, None);
        }
        sink.held += cost(data.len());
        // What the pipe takes at once need not be copied.
        let direct = if sink.waiting.is_empty() { rustix::io::write(&sink.fd, data).unwrap_or(0) } else { 0 };
        if direct == data.len() {
            sink.held -= cost(data.len());
            return (true, self.returns.consumed(self.request.stream, cost(data.len())));
        }
        if sink.waiting.is_empty() {
            sink.offset = direct;
        }
        sink.waiting.push_back(data.to_vec());
        (true, None)
    }

    pub(crate) fn input_end(&mut self) {
        if let Some(sink) = &mut self.sink
            && !sink.ended
        {
            sink.ended = true;
            if sink.terminal {
                // A terminal cannot be closed in one direction; its end-of-file character says the same.
                sink.waiting.push_back(vec![4]);
            }
            let _no_window_after_the_end = self.drain_input();
        }
    }

    /// Writes what waits for the command's input; gives the window frame that is due.
    #[must_use]
    pub(crate) fn drain_input(&mut self) -> Option<Vec<u8>> {
        let sink = self.sink.as_mut()?;
        let mut freed = 0;
        let mut closed = false;
        while let Some(piece) = sink.waiting.front() {
            match rustix::io::write(&sink.fd, piece.get(sink.offset..).unwrap_or_default()) {
                Ok(count) => {
                    sink.offset += count;
                    if sink.offset >= piece.len() {
                        freed += cost(piece.len());
                        sink.offset = 0;
                        sink.waiting.pop_front();
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    closed = true;
                    break;
                }
            }
        }
        sink.held = sink.held.saturating_sub(freed);
        if closed {
            freed += sink.held;
        }
        // After its end nobody waits for credit, and the terminal's end-of-file character never cost any. A window
        // that were counted here and not sent would be a gap, and the host would end the stream for it.
        if sink.ended {
            freed = 0;
        }
        if closed || (sink.ended && sink.waiting.is_empty() && !sink.terminal) {
            self.sink = None;
        }
        self.returns.consumed(self.request.stream, freed)
    }

    /// Whether time matters to it.
    pub(crate) fn has_timer(&self) -> bool {
        self.deadline.is_some() || self.exited.is_some()
    }

    /// Whether all output has been sent, so that the end can be told.
    pub(crate) fn is_drained(&self) -> bool {
        self.start.is_none() && self.exited.is_some() && self.sources.iter().all(Option::is_none)
    }

    /// Gives up the output that nobody writes any more though somebody could. A guest that stood still (its
    /// processor was taken away, it was forked) finds its time of silence over with bytes yet in the pipe, so the
    /// pipe has the last word.
    pub(crate) fn give_up_silent_output(&mut self, now: Instant) {
        let mut silent = true;
        for source in self.sources.iter_mut().flatten() {
            source.ready |= sys::is_readable(&source.fd);
            silent &= !source.ready;
        }
        if silent {
            self.sources = [None, None];
        } else {
            self.quiet_since = now;
        }
    }

    /// Keeps the time of silence after the exit: it runs only while the agent could read. Gives the moment at
    /// which the output is to be given up.
    pub(crate) fn silence_ends(&mut self, channel_blocked: bool, now: Instant) -> Option<Instant> {
        self.exited.as_ref()?;
        let starved = self.sources.iter().flatten().any(|source| source.credit < burgeon_guest::protocol::LEAST_COST);
        if channel_blocked || starved {
            self.quiet_since = now;
        }
        Some(self.quiet_since + SILENCE)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn request() -> Request {
        Request {
            stream: 4,
            argv: Vec::new(),
            env: Vec::new(),
            cwd: None,
            user: None,
            terminal: None,
            time_limit_ms: None,
        }
    }

    /// Found on a loaded machine: a window that was due when the input ended was counted and never sent, so that the
    /// next one showed a gap and the command was ended with its output half told.
    #[test]
    fn no_window_is_lost_when_the_input_ends() {
        let (mut reader, input) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&input, true).unwrap();
        let start = File::open("/dev/null").unwrap();
        let (output, _its_writer) = std::io::pipe().unwrap();
        let spawned = Spawned { pid: 1, start, input: input.into(), output: output.into(), errors: None };
        let mut exec = Exec::new(4, request(), spawned, Instant::now());
        let piece = vec![7; 1 << 16];
        let (mut windows, mut sent, mut read) = (Vec::new(), 0, 0);
        let mut space = vec![0; 1 << 16];
        while sent < 12 {
            let (good, window) = exec.input(&piece);
            assert!(good);
            windows.extend(window);
            sent += 1;
        }
        while exec.returns.gathered + cost(piece.len()) < CREDIT_BATCH {
            read += reader.read(&mut space).unwrap();
            windows.extend(exec.drain_input());
        }
        // The piece that makes a batch whole goes into the pipe at the very moment of the end.
        read += reader.read(&mut space).unwrap();
        exec.input_end();
        while exec.sink.is_some() {
            read += reader.read(&mut space).unwrap();
            windows.extend(exec.drain_input());
        }
        while read < sent * piece.len() {
            read += reader.read(&mut space).unwrap();
        }
        let sequences = windows.iter().map(|frame| u16::from_le_bytes([frame[6], frame[7]]));
        assert!(sequences.eq(0..u16::try_from(windows.len()).unwrap()), "{windows:?}");
    }

    /// Found on a loaded machine: a guest whose processor was away for the time of silence lost output.
    #[test]
    fn output_that_lies_in_the_pipe_is_never_given_up() {
        let (input, _its_reader) = std::io::pipe().unwrap();
        let (mut output, mut held) = std::io::pipe().unwrap();
        let begun = Instant::now();
        let copy = output.try_clone().unwrap();
        let start = File::open("/dev/null").unwrap();
        let spawned = Spawned { pid: 1, start, input: input.into(), output: copy.into(), errors: None };
        let mut exec = Exec::new(4, request(), spawned, begun);
        exec.exited = Some((ExitStatus::Code(0), 0));
        held.write_all(b"late").unwrap();

        let stood_still = begun + SILENCE * 10;
        assert!(exec.silence_ends(false, stood_still).unwrap() < stood_still);
        exec.give_up_silent_output(stood_still);
        assert!(exec.sources[0].as_ref().unwrap().ready, "it is to be read");
        assert!(exec.silence_ends(false, stood_still).unwrap() > stood_still, "and the time begins anew");

        output.read_exact(&mut [0; 4]).unwrap();
        exec.sources[0].as_mut().unwrap().ready = false;
        exec.give_up_silent_output(stood_still + SILENCE);
        assert!(exec.sources[0].is_none(), "somebody could write, but nobody does");
    }
}
