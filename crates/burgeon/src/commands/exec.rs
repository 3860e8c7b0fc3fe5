//! Commands in VMs. The session outlives a restart of the control process: the client connects again
//! and goes on at the byte where it was.

use std::{
    collections::{BTreeMap, VecDeque},
    io::Write,
    time::Duration,
};

use burgeon_api::{
    Error, ErrorKind, ExecId, Result,
    exec::{Attach, ExecSpec, Frame},
};
use burgeon_control::exec_client::{FrameReader, FrameWriter, InputWindow};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::Instant,
};

use super::Context;
use crate::{
    arguments::{ExecArguments, ShellArguments},
    client::{Client, Upgraded, escape},
    output, terminal,
};

/// How long a session that has lost its connection is tried again.
const RECONNECT: Duration = Duration::from_secs(30);

pub(super) async fn exec(context: &Context, arguments: ExecArguments) -> Result<u8> {
    let mut env = BTreeMap::new();
    for pair in &arguments.env {
        let (name, value) = pair
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| Error::invalid(format!("--env {pair} is not NAME=VALUE")))?;
        env.insert(name.to_string(), value.to_string());
    }
    let mut spec = ExecSpec {
        argv: arguments.command,
        env,
        cwd: arguments.cwd,
        user: arguments.user,
        terminal: None,
        time_limit_ms: arguments.time_limit.map(|span| u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX)),
    };
    if arguments.tty {
        use_terminal(&mut spec);
    }
    pass_on(run(&context.client()?, &arguments.vm, spec).await)
}

pub(super) async fn shell(context: &Context, arguments: ShellArguments) -> Result<u8> {
    let mut spec = ExecSpec { user: arguments.user, ..ExecSpec::default() };
    use_terminal(&mut spec);
    pass_on(run(&context.client()?, &arguments.vm, spec).await)
}

fn use_terminal(spec: &mut ExecSpec) {
    spec.terminal = Some(terminal::size());
    if let Ok(term) = std::env::var("TERM") {
        spec.env.entry("TERM".to_string()).or_insert(term);
    }
}

/// As env(1) and docker do: 125 says that the failure is ours, not the command's.
fn pass_on(outcome: Result<u8>) -> Result<u8> {
    outcome.or_else(|error| {
        output::fail(&error);
        Ok(125)
    })
}

/// Runs a command with this process's own input and output.
async fn run(client: &Client, vm: &str, spec: ExecSpec) -> Result<u8> {
    let raw = if spec.terminal.is_some() && terminal::is_interactive() { terminal::Raw::enter() } else { None };
    let outcome = Session::new(client, vm, spec, raw.is_some())?.run().await;
    drop(raw);
    outcome
}

struct Session<'a> {
    client: &'a Client,
    path: String,
    attach: Attach,
    interactive: bool,
    input: mpsc::Receiver<Option<Vec<u8>>>,
    /// Input that was sent and not yet taken: to be sent again after a reconnect.
    unacknowledged: VecDeque<u8>,
    window: InputWindow,
    /// Input read and not sent.
    waiting: VecDeque<u8>,
    input_ended: bool,
    end_sent: bool,
    interrupts: u32,
    /// Since when there is no session; attached again, it starts anew.
    lost_since: Option<Instant>,
}

/// The signals by which users end this program.
struct Ending {
    interrupt: Signal,
    terminate: Signal,
}

impl Ending {
    fn watch() -> Result<Ending> {
        let watch = |kind| signal(kind).map_err(|error| Error::io("wait for signals", &error));
        Ok(Ending { interrupt: watch(SignalKind::interrupt())?, terminate: watch(SignalKind::terminate())? })
    }

    /// The number of the next one. Safe to cancel.
    async fn signal(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
        }
    }
}

enum Met {
    Frame(Result<Option<Frame>>),
    Input(Option<Option<Vec<u8>>>),
    Signal(i32),
    Resized,
}

type Reader = FrameReader<ReadHalf<Upgraded>>;
type Writer = FrameWriter<WriteHalf<Upgraded>>;

impl<'a> Session<'a> {
    fn new(client: &'a Client, vm: &str, spec: ExecSpec, interactive: bool) -> Result<Self> {
        let (sender, input) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut stdin = tokio::io::stdin();
            loop {
                let mut buffer = vec![0; 32 << 10];
                let read = stdin.read(&mut buffer).await;
                let piece = match read {
                    Ok(count) if count > 0 => {
                        buffer.truncate(count);
                        Some(buffer)
                    }
                    _ => None,
                };
                let ended = piece.is_none();
                if sender.send(piece).await.is_err() || ended {
                    return;
                }
            }
        });
        Ok(Self {
            client,
            path: format!("/v1/vms/{}/exec", escape(vm)),
            attach: Attach { exec: ExecId::generate(), spec, resume: false, stdout_received: 0, stderr_received: 0 },
            interactive,
            input,
            unacknowledged: VecDeque::new(),
            window: InputWindow::default(),
            waiting: VecDeque::new(),
            input_ended: false,
            end_sent: false,
            interrupts: 0,
            lost_since: None,
        })
    }

    async fn run(mut self) -> Result<u8> {
        let mut asked_to_end = Ending::watch()?;
        loop {
            // Nobody passes a signal on to the command now: it ends us.
            let connected = tokio::select! {
                connected = self.connect() => connected,
                number = asked_to_end.signal() => {
                    output::note("interrupted while the server was away; what the command did is not known");
                    return Ok(128 + number);
                }
            };
            let outcome = match connected {
                Ok((reader, writer)) => self.drive(reader, writer, &mut asked_to_end).await,
                Err(error) => Err(error),
            };
            let error = match outcome {
                Ok(Some(code)) => return Ok(code),
                Ok(None) => Error::unavailable("the server broke the session off"),
                Err(error) if error.kind == ErrorKind::Unavailable && self.attach.resume => error,
                Err(error) => return Err(error),
            };
            // Whether the command was begun is not known; it must not be begun again.
            self.attach.resume = true;
            if self.lost_since.get_or_insert_with(Instant::now).elapsed() > RECONNECT {
                return Err(error);
            }
            // A signal in this moment is met by the next round.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn connect(&mut self) -> Result<(Reader, Writer)> {
        let mut stream = self.client.upgrade(&self.path).await?;
        let attach = serde_json::to_vec(&self.attach).map_err(|error| Error::internal(error.to_string()))?;
        let length = u32::try_from(attach.len()).map_err(|_| Error::invalid("the command is too long"))?;
        let broke = |error: std::io::Error| Error::unavailable(format!("the server broke off: {error}"));
        stream.write_all(&length.to_le_bytes()).await.map_err(broke)?;
        stream.write_all(&attach).await.map_err(broke)?;
        let (read, write) = tokio::io::split(stream);
        Ok((FrameReader::new(read), FrameWriter::new(write)))
    }

    /// Drives the session over one connection: the exit code, or `None` when the connection is lost.
    async fn drive(&mut self, mut reader: Reader, mut writer: Writer, asked_to_end: &mut Ending) -> Result<Option<u8>> {
        let mut resized = signal(SignalKind::window_change()).map_err(|error| Error::io("wait for signals", &error))?;
        // The first frame tells where the other side stands.
        let mut attached = false;
        loop {
            if attached && !self.send_input(&mut writer).await {
                return Ok(None);
            }
            let wants_input = !self.input_ended && self.waiting.is_empty();
            let met = tokio::select! {
                frame = reader.next() => Met::Frame(frame),
                piece = self.input.recv(), if wants_input => Met::Input(piece),
                number = asked_to_end.signal() => Met::Signal(number.into()),
                _ = resized.recv() => Met::Resized,
            };
            let frame = match met {
                Met::Frame(Ok(Some(frame))) => frame,
                Met::Frame(_) => return Ok(None),
                Met::Input(Some(Some(piece))) => {
                    self.waiting.extend(piece);
                    continue;
                }
                Met::Input(_) => {
                    self.input_ended = true;
                    continue;
                }
                Met::Signal(number) => {
                    self.interrupts += 1;
                    if self.interrupts > 2 {
                        // The guest had its chance; the session ends with this process.
                        return Err(Error::new(ErrorKind::Cancelled, "interrupted"));
                    }
                    let number = if self.interrupts == 2 { 9 } else { number };
                    if writer.send(&Frame::Signal(number)).await.is_err() {
                        return Ok(None);
                    }
                    continue;
                }
                Met::Resized => {
                    if self.interactive && writer.send(&Frame::Resize(terminal::size())).await.is_err() {
                        return Ok(None);
                    }
                    continue;
                }
            };
            match frame {
                Frame::StdinReceived(total) => {
                    if attached {
                        self.taken(total);
                    } else {
                        attached = true;
                        self.lost_since = None;
                        self.resend(total);
                    }
                }
                Frame::Stdout(data) => {
                    self.attach.stdout_received += data.len() as u64;
                    if !self.write(&data, false, &mut writer).await {
                        return Ok(Some(0));
                    }
                }
                Frame::Stderr(data) => {
                    self.attach.stderr_received += data.len() as u64;
                    self.write(&data, true, &mut writer).await;
                }
                Frame::Exit(exit) => return Ok(Some(tell_exit(&exit))),
                Frame::Failed(error) => return Err(error),
                _ => return Err(Error::damaged("the server sent a frame that only clients send")),
            }
        }
    }

    /// Whether there is still somebody to write for. A reader of our output that has left ends the command.
    async fn write(&mut self, data: &[u8], to_stderr: bool, writer: &mut Writer) -> bool {
        let written = if to_stderr {
            std::io::stderr().write_all(data)
        } else {
            let mut out = std::io::stdout().lock();
            out.write_all(data).and_then(|()| out.flush())
        };
        if written.is_err() && !to_stderr {
            // Either way the session is over for us.
            drop(writer.send(&Frame::Hangup).await);
            return false;
        }
        let received =
            Frame::OutputReceived { stdout: self.attach.stdout_received, stderr: self.attach.stderr_received };
        // A lost connection is met by the next read.
        drop(writer.send(&received).await);
        true
    }

    async fn send_input(&mut self, writer: &mut Writer) -> bool {
        loop {
            let count = self.window.room().min(self.waiting.len());
            if count == 0 {
                break;
            }
            let piece: Vec<u8> = self.waiting.drain(..count).collect();
            self.unacknowledged.extend(&piece);
            self.window.sent += count as u64;
            if writer.send(&Frame::Stdin(piece)).await.is_err() {
                return false;
            }
        }
        if self.input_ended && self.waiting.is_empty() && !self.end_sent {
            self.end_sent = true;
            return writer.send(&Frame::StdinEnd).await.is_ok();
        }
        true
    }

    fn taken(&mut self, total: u64) {
        let count = usize::try_from(total.saturating_sub(self.window.taken)).unwrap_or(0);
        self.unacknowledged.drain(..count.min(self.unacknowledged.len()));
        self.window.taken = self.window.taken.max(total);
    }

    /// After a reconnect: what the host has not got goes back in front of what waits.
    fn resend(&mut self, total: u64) {
        self.taken(total);
        for byte in std::mem::take(&mut self.unacknowledged).into_iter().rev() {
            self.waiting.push_front(byte);
        }
        self.window.sent = self.window.taken;
        self.end_sent = false;
    }
}

fn tell_exit(exit: &burgeon_api::exec::Exit) -> u8 {
    use burgeon_api::exec::Exit;
    match exit {
        Exit::NotStarted { reason, .. } | Exit::Lost { reason } => {
            output::fail(&Error::unavailable(reason.clone()));
        }
        Exit::TimeLimit => output::note("the command was killed: its time was up"),
        Exit::Code { .. } | Exit::Signal { .. } => {}
    }
    u8::try_from(exit.code() & 0xff).unwrap_or(1)
}
