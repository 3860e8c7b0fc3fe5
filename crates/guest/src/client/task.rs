//! The task that owns a channel. It decides without waiting: each event of the stream, of a user or of the
//! clock changes its state and appends to its output; only the loop in [`run`] waits.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use burgeon_api::{Error, Result, exec::Exit};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Semaphore, broadcast, mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use super::{AgentEvent, ExecEvent, Options, handle::refusal};
use crate::protocol::{
    About, Answer, Decoder, ExitStatus, FLUSH_BYTES, Frame, GuestMessage, Hello, HostMessage, Kind, Received, Request,
    Sequence, VERSION, WINDOW, cost, decode_control, encode_control, encode_frame,
};

/// New requests and data wait while more than this is to be written.
const OUT_LIMIT: usize = 256 << 10;
const NOISE_SPAN: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub(super) enum State {
    Connecting,
    Attached(Arc<About>),
    Ended(Error),
}

/// A request on its way to the guest. Stream numbers in it are filled in by the task.
pub(super) struct Ask {
    pub(super) request: Request,
    pub(super) sink: Option<Sink>,
    pub(super) credit: Arc<Semaphore>,
    pub(super) reply: oneshot::Sender<Result<Answer>>,
    /// Told the stream when the request is on its way.
    pub(super) opened: oneshot::Sender<u32>,
}

/// Where a stream's events go.
pub(super) enum Sink {
    Exec(mpsc::UnboundedSender<ExecEvent>),
    Get(mpsc::UnboundedSender<FileEvent>),
    Put,
}

#[derive(Debug)]
pub(super) enum FileEvent {
    Data(Bytes),
    End,
    Failed(Error),
}

/// What users tell without waiting. There is at most one for each event that they took.
#[derive(Clone, Copy, Debug)]
pub(super) enum Note {
    Consumed { stream: u32, amount: u32 },
    InputEnd { stream: u32, frames: u64 },
    Close { stream: u32 },
    Quit,
}

pub(super) struct Inlets {
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) data: mpsc::Receiver<(u32, Bytes)>,
    pub(super) notes: mpsc::UnboundedReceiver<Note>,
}

/// One direction of a stream that comes from the guest.
#[derive(Default)]
struct Incoming {
    received: Sequence,
    /// Of the windows that we send.
    sequence: Sequence,
    /// Credit spent by the guest and not given back.
    held: u32,
    ended: bool,
}

struct Stream {
    sink: Sink,
    credit: Arc<Semaphore>,
    /// Of the data that we send, and of the windows for it.
    sequence: Sequence,
    received: Sequence,
    frames: u64,
    input_end: Option<u64>,
    /// Exec: output and errors. Get: the content.
    incoming: [Incoming; 2],
    /// Nobody listens any more; the agent's answer to Close removes it.
    closing: bool,
}

struct Task {
    options: Options,
    state: watch::Sender<State>,
    events: broadcast::Sender<AgentEvent>,
    attached: bool,
    session: [u8; 16],
    out: Vec<u8>,
    written: usize,
    control_sequence: Sequence,
    control_received: Sequence,
    next_id: u32,
    next_stream: u32,
    replies: BTreeMap<u32, (oneshot::Sender<Result<Answer>>, Option<u32>)>,
    /// Ids of Close requests and their streams.
    closes: BTreeMap<u32, u32>,
    /// By base stream.
    streams: BTreeMap<u32, Stream>,
    /// Asked before the session began.
    early: Vec<Ask>,
    noise: u64,
    noise_told: u64,
    noise_span: (Instant, u64),
}

/// Serves the channel until it ends or nobody needs it.
pub(super) async fn run<S: AsyncRead + AsyncWrite>(
    stream: S,
    options: Options,
    mut inlets: Inlets,
    state: watch::Sender<State>,
    events: broadcast::Sender<AgentEvent>,
) {
    let now = Instant::now();
    let interval = options.hello_interval;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut decoder = Decoder::new();
    let mut task = Task {
        session: options.session,
        options,
        state,
        events,
        attached: false,
        out: Vec::new(),
        written: 0,
        control_sequence: Sequence::default(),
        control_received: Sequence::default(),
        next_id: 1,
        next_stream: 4,
        replies: BTreeMap::new(),
        closes: BTreeMap::new(),
        streams: BTreeMap::new(),
        early: Vec::new(),
        noise: 0,
        noise_told: 0,
        noise_span: (now, 0),
    };
    if !task.options.at_rest {
        task.out.resize(FLUSH_BYTES, 0);
    }
    task.hello();
    let mut repeat = now + interval;
    let error = loop {
        let has_room = task.out.len() - task.written < OUT_LIMIT;
        let has_output = task.written < task.out.len();
        let outcome = tokio::select! {
            note = inlets.notes.recv() => match note {
                None | Some(Note::Quit) => Err(Error::unavailable("the channel was closed by its host")),
                Some(note) => { task.note(note); Ok(()) }
            },
            got = reader.read(decoder.space()) => match got {
                Ok(0) => Err(Error::unavailable("the channel to the guest was closed")),
                Ok(count) => {
                    decoder.filled(count);
                    task.receive(&mut decoder)
                }
                Err(error) => Err(Error::io("read the channel to the guest", &error)),
            },
            wrote = writer.write(&task.out[task.written..]), if has_output => match wrote {
                Ok(0) => Err(Error::unavailable("the channel to the guest takes nothing")),
                Ok(count) => { task.wrote(count); Ok(()) }
                Err(error) => Err(Error::io("write the channel to the guest", &error)),
            },
            Some(ask) = inlets.asks.recv(), if has_room => { task.ask(ask); Ok(()) },
            Some((stream, data)) = inlets.data.recv(), if has_room => { task.data(stream, &data); Ok(()) },
            () = sleep_until(repeat), if !task.attached => {
                repeat = Instant::now() + interval;
                // What the guest has not taken yet needs no repetition.
                if !has_output {
                    if std::mem::take(&mut task.options.at_rest) {
                        task.out.resize(FLUSH_BYTES, 0);
                    }
                    task.hello();
                }
                Ok(())
            },
        };
        if let Err(error) = outcome {
            break error;
        }
    };
    task.fail_all(&error);
    let _nobody_listens = task.events.send(AgentEvent::Ended { reason: error.message.clone() });
    task.state.send_replace(State::Ended(error));
}

impl Task {
    fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.written >= self.out.len() {
            self.out.clear();
            self.written = 0;
        } else if self.written >= OUT_LIMIT {
            self.out.drain(..self.written);
            self.written = 0;
        }
    }

    fn say(&mut self, message: &HostMessage) -> Result<(), crate::protocol::ControlFault> {
        let sequence = self.control_sequence;
        let number = self.control_sequence.take();
        encode_control(&mut self.out, number, message).inspect_err(|_| self.control_sequence = sequence)
    }

    fn hello(&mut self) {
        self.control_sequence = Sequence::default();
        let hello = Hello {
            version: u16::from(VERSION),
            session: self.session,
            host_time_ns: (self.options.clock)(),
            vm_name: self.options.vm_name.chars().take(256).collect(),
        };
        // A name of 256 characters fits.
        let _always_fits = self.say(&HostMessage::Hello(hello));
    }

    /// Everything under way fails, and a new session is opened.
    fn attach_again(&mut self, reason: &str) {
        self.fail_all(&Error::unavailable(format!("the session with the guest was lost: {reason}")));
        let _nobody_listens = self.events.send(AgentEvent::SessionLost { reason: reason.to_string() });
        self.attached = false;
        // Another session for the agent, and still this client's.
        let counter = u32::from_le_bytes([self.session[12], self.session[13], self.session[14], self.session[15]]);
        self.session[12..].copy_from_slice(&counter.wrapping_add(1).to_le_bytes());
        self.state.send_replace(State::Connecting);
        self.hello();
    }

    fn fail_all(&mut self, error: &Error) {
        for (reply, _) in std::mem::take(&mut self.replies).into_values() {
            let _asker_is_gone = reply.send(Err(error.clone()));
        }
        for ask in std::mem::take(&mut self.early) {
            let _asker_is_gone = ask.reply.send(Err(error.clone()));
        }
        self.closes.clear();
        for stream in std::mem::take(&mut self.streams).into_values() {
            stream.fail(error);
        }
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Consumed { stream, amount } => {
                let Some((stream_state, which)) = find(&mut self.streams, stream) else { return };
                let incoming = &mut stream_state.incoming[which];
                incoming.held = incoming.held.saturating_sub(amount);
                if !incoming.ended && !stream_state.closing {
                    let sequence = incoming.sequence.take();
                    encode_frame(&mut self.out, Kind::Window, sequence, stream, &amount.to_le_bytes());
                }
            }
            Note::InputEnd { stream, frames } => {
                if let Some(state) = self.streams.get_mut(&stream) {
                    state.input_end = Some(frames);
                    state.end_input(stream, &mut self.out);
                }
            }
            Note::Close { stream } => {
                let Some(state) = self.streams.get_mut(&stream).filter(|state| !state.closing) else { return };
                state.closing = true;
                state.credit.close();
                let id = self.take_id();
                self.closes.insert(id, stream);
                let _always_fits = self.say(&HostMessage::Request { id, request: Request::Close { stream } });
            }
            Note::Quit => {}
        }
    }

    fn take_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        id
    }

    fn ask(&mut self, mut ask: Ask) {
        if ask.reply.is_closed() {
            return;
        }
        if !self.attached {
            // Bounded by those who wait: each asker has one request.
            self.early.retain(|ask| !ask.reply.is_closed());
            return self.early.push(ask);
        }
        let base = self.next_stream;
        match &mut ask.request {
            Request::Exec(exec) => exec.stream = base,
            Request::Put { stream, .. } | Request::Get { stream, .. } => *stream = base,
            _ => {}
        }
        let id = self.take_id();
        if let Err(fault) = self.say(&HostMessage::Request { id, request: ask.request }) {
            let _asker_is_gone = ask.reply.send(Err(Error::invalid(format!("cannot ask the guest: {fault}"))));
            return;
        }
        let stream = ask.sink.is_some().then_some(base);
        if let Some(sink) = ask.sink {
            self.next_stream = base.checked_add(4).unwrap_or(4);
            self.streams.insert(base, Stream::new(sink, ask.credit));
        }
        self.replies.insert(id, (ask.reply, stream));
        if ask.opened.send(stream.unwrap_or(0)).is_err()
            && let Some(stream) = stream
        {
            self.note(Note::Close { stream });
        }
    }

    fn data(&mut self, stream: u32, data: &[u8]) {
        if let Some(state) = self.streams.get_mut(&stream).filter(|state| !state.closing) {
            encode_frame(&mut self.out, Kind::Data, state.sequence.take(), stream, data);
            state.frames += 1;
            state.end_input(stream, &mut self.out);
        }
    }

    fn receive(&mut self, decoder: &mut Decoder) -> Result<()> {
        let before = decoder.skipped();
        while let Some(received) = decoder.next() {
            match received {
                Received::Frame(frame) => self.frame(frame)?,
                Received::OtherVersion(version) => return Err(other_version(u16::from(version))),
            }
        }
        self.count_noise(decoder.skipped() - before)
    }

    /// Counts bytes that mean nothing; too many of them end the channel.
    fn count_noise(&mut self, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.noise += bytes;
        let now = Instant::now();
        if now.duration_since(self.noise_span.0) > NOISE_SPAN {
            self.noise_span = (now, 0);
        }
        self.noise_span.1 += bytes;
        if self.noise_span.1 > self.options.noise_limit {
            let limit = self.options.noise_limit;
            return Err(Error::damaged(format!(
                "the guest sent more than {limit} bytes within 10 s that are no part of the protocol"
            )));
        }
        // A told count each time it doubles keeps the telling itself bounded.
        if self.noise_told == 0 || self.noise >= self.noise_told * 2 {
            self.noise_told = self.noise;
            let _nobody_listens = self.events.send(AgentEvent::HostNoise { skipped: self.noise });
        }
        Ok(())
    }

    fn frame(&mut self, frame: Frame<'_>) -> Result<()> {
        let whole = (frame.payload.len() + crate::protocol::HEADER_BYTES) as u64;
        match frame.kind {
            Kind::Control => return self.control(frame),
            // Frames of an earlier session may still arrive; they end before the Welcome.
            _ if !self.attached => return Ok(()),
            Kind::Window => {
                let Some(state) = self.streams.get_mut(&frame.stream) else { return self.count_noise(whole) };
                let good = state.received.accept(frame.sequence);
                let amount = frame.payload.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)) as usize;
                if good && state.credit.available_permits() + amount <= WINDOW as usize {
                    state.credit.add_permits(amount);
                } else if !state.closing {
                    self.break_stream(frame.stream, "the guest gave credit that it did not have");
                }
            }
            Kind::Data | Kind::DataEnd => {
                let Some((state, which)) = find(&mut self.streams, frame.stream) else {
                    return self.count_noise(whole);
                };
                let incoming = &mut state.incoming[which];
                let spent = if frame.kind == Kind::Data { cost(frame.payload.len()) } else { 0 };
                let good = incoming.received.accept(frame.sequence)
                    && !incoming.ended
                    && incoming.held.saturating_add(spent) <= WINDOW;
                if state.closing {
                    return if good { Ok(()) } else { self.count_noise(whole) };
                }
                if !good {
                    let base = base_of(&self.streams, frame.stream);
                    self.break_stream(base, "the guest's frames were lost, or came without credit");
                    return Ok(());
                }
                incoming.held += spent;
                incoming.ended = frame.kind == Kind::DataEnd;
                let data = Bytes::copy_from_slice(frame.payload);
                match (&state.sink, which, incoming.ended) {
                    (Sink::Exec(events), 0, false) => drop(events.send(ExecEvent::Stdout(data))),
                    (Sink::Exec(events), _, false) => drop(events.send(ExecEvent::Stderr(data))),
                    (Sink::Get(events), _, false) => drop(events.send(FileEvent::Data(data))),
                    (Sink::Get(events), _, true) => {
                        drop(events.send(FileEvent::End));
                        self.streams.remove(&frame.stream);
                    }
                    (Sink::Exec(_), _, true) | (Sink::Put, ..) => {}
                }
            }
        }
        Ok(())
    }

    /// A stream that cannot go on: its user is told, and the agent is asked to end it.
    fn break_stream(&mut self, stream: u32, reason: &str) {
        if let Some(state) = self.streams.get(&stream) {
            state.tell_failure(&Error::damaged(reason));
            self.note(Note::Close { stream });
        }
    }

    fn control(&mut self, frame: Frame<'_>) -> Result<()> {
        let Ok(message) = decode_control::<GuestMessage>(frame.payload) else {
            return self.count_noise(frame.payload.len() as u64);
        };
        match &message {
            GuestMessage::Ready(_) | GuestMessage::Refused { .. } => {}
            GuestMessage::Welcome { .. } => {
                self.control_received = Sequence::default();
                let _restarts_the_count = self.control_received.accept(frame.sequence);
            }
            _ if !self.attached => return Ok(()),
            _ => {
                if !self.control_received.accept(frame.sequence) {
                    self.attach_again("control messages were lost");
                    return Ok(());
                }
            }
        }
        match message {
            GuestMessage::Ready(about) => {
                check_version(&about)?;
                let _nobody_listens = self.events.send(AgentEvent::Ready(Arc::new(about)));
                if self.attached {
                    self.attach_again("the agent started anew");
                } else if self.written >= self.out.len() {
                    self.hello();
                }
            }
            GuestMessage::Welcome { session, about } if session == self.session => {
                check_version(&about)?;
                self.attached = true;
                let about = Arc::new(about);
                let _nobody_listens = self.events.send(AgentEvent::Attached(about.clone()));
                self.state.send_replace(State::Attached(about));
                for ask in std::mem::take(&mut self.early) {
                    self.ask(ask);
                }
            }
            GuestMessage::Welcome { .. } => {}
            GuestMessage::Refused { reason, .. } => {
                return Err(Error::refused(format!("the guest's agent refuses: {}", printable(&reason))));
            }
            GuestMessage::Reply { id, result } => return self.reply(id, result.map_err(refusal), frame.payload.len()),
            GuestMessage::Exited { stream, status, cpu_us } => {
                if let Some(state) = self.streams.remove(&stream)
                    && let Sink::Exec(events) = &state.sink
                {
                    state.credit.close();
                    let exit = match status {
                        ExitStatus::Code(code) => Exit::Code { code },
                        ExitStatus::Signal(signal) => Exit::Signal { signal },
                        ExitStatus::TimeLimit => Exit::TimeLimit,
                    };
                    drop(events.send(ExecEvent::Exited { exit, cpu_us }));
                }
            }
            GuestMessage::StreamFailed { stream: 0, reason } => self.attach_again(&printable(&reason)),
            GuestMessage::StreamFailed { stream, reason } => {
                if let Some(state) = self.streams.remove(&stream) {
                    state.fail(&Error::damaged(format!("the guest's agent: {}", printable(&reason))));
                }
            }
            GuestMessage::BootFailed { stage, reason } => {
                let event = AgentEvent::BootFailed { stage: printable(&stage), reason: printable(&reason) };
                let _nobody_listens = self.events.send(event);
            }
            GuestMessage::Noise { skipped } => {
                let _nobody_listens = self.events.send(AgentEvent::GuestNoise { skipped });
            }
        }
        Ok(())
    }

    fn reply(&mut self, id: u32, result: Result<Answer>, length: usize) -> Result<()> {
        if let Some(stream) = self.closes.remove(&id) {
            if let Some(state) = self.streams.remove(&stream) {
                state.fail(&Error::unavailable("the stream was closed"));
            }
            return Ok(());
        }
        let Some((reply, stream)) = self.replies.remove(&id) else { return self.count_noise(length as u64) };
        if let Some(stream) = stream {
            let over = result.is_err() || matches!(self.streams.get(&stream), Some(Stream { sink: Sink::Put, .. }));
            if over && let Some(state) = self.streams.remove(&stream) {
                state.credit.close();
            }
        }
        let _asker_is_gone = reply.send(result);
        Ok(())
    }
}

impl Stream {
    fn new(sink: Sink, credit: Arc<Semaphore>) -> Self {
        let (sequence, received) = (Sequence::default(), Sequence::default());
        let incoming = Default::default();
        Self { sink, credit, sequence, received, frames: 0, input_end: None, incoming, closing: false }
    }

    /// Sends the end of the input once all data before it is on its way.
    fn end_input(&mut self, stream: u32, out: &mut Vec<u8>) {
        if self.input_end == Some(self.frames) && !self.closing {
            self.input_end = None;
            encode_frame(out, Kind::DataEnd, self.sequence.take(), stream, &[]);
        }
    }

    fn tell_failure(&self, error: &Error) {
        self.credit.close();
        match &self.sink {
            Sink::Exec(events) => {
                let exit = Exit::Lost { reason: error.message.clone() };
                drop(events.send(ExecEvent::Exited { exit, cpu_us: 0 }));
            }
            Sink::Get(events) => drop(events.send(FileEvent::Failed(error.clone()))),
            Sink::Put => {}
        }
    }

    fn fail(self, error: &Error) {
        if !self.closing {
            self.tell_failure(error);
        }
        self.credit.close();
    }
}

/// The base of the stream that `number` belongs to: bases are multiples of four.
fn base_of(streams: &BTreeMap<u32, Stream>, number: u32) -> u32 {
    streams.range(..=number).next_back().map_or(number, |(base, _)| *base)
}

/// The stream whose data comes under `number`, and which of its directions that is.
fn find(streams: &mut BTreeMap<u32, Stream>, number: u32) -> Option<(&mut Stream, usize)> {
    let (base, stream) = streams.range_mut(..=number).next_back()?;
    match (&stream.sink, number - base) {
        (Sink::Exec(_), 1) | (Sink::Get(_), 0) => Some((stream, 0)),
        (Sink::Exec(_), 2) => Some((stream, 1)),
        _ => None,
    }
}

fn check_version(about: &About) -> Result<()> {
    if about.protocol_version == u16::from(VERSION) { Ok(()) } else { Err(other_version(about.protocol_version)) }
}

fn other_version(version: u16) -> Error {
    Error::refused(format!("the guest's agent speaks protocol version {version}; this host speaks version {VERSION}"))
        .with_hint("build the image anew, so that it gets the agent of this version")
}

/// Text of a guest, without what could drive a terminal.
fn printable(text: &str) -> String {
    let short: String = text.chars().take(1000).collect();
    burgeon_api::path_text::printable(&short)
}
