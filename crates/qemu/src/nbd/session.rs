//! One connection: negotiation, then requests until the client leaves.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    Export,
    helpers::Helpers,
    protocol::{
        ALLOCATION, ALLOCATION_ID, Chunk, Command, FIXED_NEWSTYLE, Fault, GREETING, MOST_LENGTH, MOST_OPTION,
        Malformed, NO_ZEROES, OPTION_MAGIC, Request, answer, chunk, error_chunk, flag, option, option_reply,
        read_contexts, read_info, simple_reply,
    },
};

/// A client that does not get on with the negotiation is cut off. Requests afterwards may come at any time.
const PATIENCE: Duration = Duration::from_secs(10);
/// A client that does not take its replies is cut off.
const REPLY_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes moved at a time; also the most memory that a connection's own thread needs for data.
const PIECE: usize = 256 << 10;
/// Zeroing and trimming more than this may take a while.
const QUICK_BYTES: u32 = 64 << 20;
/// Extents in one reply; the client asks again for what is behind them.
const MOST_EXTENTS: usize = 1024;

/// What was agreed on.
#[derive(Clone, Copy, Default)]
struct Agreed {
    structured: bool,
    allocation: bool,
}

/// What helpers need of a connection.
struct Line {
    stream: Mutex<UnixStream>,
    export: Arc<dyn Export>,
    agreed: Agreed,
}

fn broken(error: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.0)
}

/// Serves a connection to its end.
pub(super) fn serve(stream: UnixStream, export: &Arc<dyn Export>, helpers: &Helpers) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(REPLY_PATIENCE))?;
    let writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(64 << 10, stream);
    let Some(agreed) = negotiate(&mut reader, &writer, export)? else { return Ok(()) };
    reader.get_ref().set_read_timeout(None)?;
    let line = Arc::new(Line { stream: Mutex::new(writer), export: export.clone(), agreed });
    let mut connection = Connection { reader, line, helpers, out: Vec::new(), piece: Vec::new() };
    let outcome = connection.requests();
    // What was answered before is still told.
    outcome.and(connection.send())
}

fn read_array<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn transmission_flags(export: &Arc<dyn Export>) -> u16 {
    // Flushes are the disk's, not a connection's, so several connections are safe together.
    let always = flag::HAS_FLAGS | flag::FLUSH | flag::FUA | flag::MULTIPLE_CONNECTIONS | flag::CACHE;
    always | if export.is_read_only() { flag::READ_ONLY } else { flag::TRIM | flag::WRITE_ZEROES }
}

/// Agrees with the client on what follows; `None` when it only wanted to look.
fn negotiate(
    reader: &mut BufReader<UnixStream>,
    mut writer: &UnixStream,
    export: &Arc<dyn Export>,
) -> io::Result<Option<Agreed>> {
    let mut greeting = GREETING.to_be_bytes().to_vec();
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    writer.write_all(&greeting)?;
    let client_flags = u32::from_be_bytes(read_array(reader)?);
    if client_flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 || client_flags & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(broken(Malformed("the client does not speak the fixed newstyle negotiation")));
    }
    let mut agreed = Agreed::default();
    loop {
        if u64::from_be_bytes(read_array(reader)?) != OPTION_MAGIC {
            return Err(broken(Malformed("an option does not begin with its magic number")));
        }
        let number = u32::from_be_bytes(read_array(reader)?);
        let length = u32::from_be_bytes(read_array(reader)?);
        if length > MOST_OPTION {
            // Not worth reading through.
            return Err(broken(Malformed("an option is too long")));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        reader.read_exact(&mut data)?;
        let mut out = Vec::new();
        let mut reply = |kind: u32, data: &[u8]| option_reply(&mut out, number, kind, data);
        let mut go = false;
        match number {
            option::EXPORT_NAME => {
                // The old way, which knows no refusal but to hang up.
                if !data.is_empty() {
                    return Err(broken(Malformed("there is no export of that name")));
                }
                let mut about = export.size().to_be_bytes().to_vec();
                about.extend(transmission_flags(export).to_be_bytes());
                if client_flags & u32::from(NO_ZEROES) == 0 {
                    about.resize(about.len() + 124, 0);
                }
                writer.write_all(&about)?;
                return Ok(Some(agreed));
            }
            option::ABORT => {
                reply(answer::ACK, &[]);
                // It may have hung up without waiting.
                drop(writer.write_all(&out));
                return Ok(None);
            }
            option::LIST if data.is_empty() => {
                reply(answer::SERVER, &0_u32.to_be_bytes());
                reply(answer::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                reply(answer::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => reply(answer::INVALID, b"this option takes no data"),
            option::INFO | option::GO => match read_info(&data) {
                Ok(b"") => {
                    let mut about = 0_u16.to_be_bytes().to_vec();
                    about.extend(export.size().to_be_bytes());
                    about.extend(transmission_flags(export).to_be_bytes());
                    reply(answer::INFO, &about);
                    // Block sizes: the least, the best, the most.
                    let mut sizes = 3_u16.to_be_bytes().to_vec();
                    [1, 4096, MOST_LENGTH].iter().for_each(|size: &u32| sizes.extend(size.to_be_bytes()));
                    reply(answer::INFO, &sizes);
                    reply(answer::ACK, &[]);
                    go = number == option::GO;
                }
                Ok(_) => reply(answer::UNKNOWN, b"there is no export of that name: the one served here has none"),
                Err(error) => reply(answer::INVALID, error.0.as_bytes()),
            },
            option::LIST_CONTEXTS | option::SET_CONTEXTS => match read_contexts(&data) {
                Ok((name, _)) if !name.is_empty() => reply(answer::UNKNOWN, b"there is no export of that name"),
                Ok(_) if number == option::SET_CONTEXTS && !agreed.structured => {
                    reply(answer::INVALID, b"contexts need structured replies");
                }
                Ok((_, queries)) => {
                    let listing = number == option::LIST_CONTEXTS;
                    let wanted =
                        queries.iter().any(|query| *query == ALLOCATION.as_bytes() || listing && *query == b"base:");
                    if wanted || listing && queries.is_empty() {
                        let mut context = (if listing { 0 } else { ALLOCATION_ID }).to_be_bytes().to_vec();
                        context.extend(ALLOCATION.as_bytes());
                        reply(answer::CONTEXT, &context);
                    }
                    if !listing {
                        agreed.allocation = wanted;
                    }
                    reply(answer::ACK, &[]);
                }
                Err(error) => reply(answer::INVALID, error.0.as_bytes()),
            },
            _ => reply(answer::UNSUPPORTED, b"this server does not know the option"),
        }
        writer.write_all(&out)?;
        if go {
            return Ok(Some(agreed));
        }
    }
}

impl Line {
    fn writer(&self) -> MutexGuard<'_, UnixStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a whole reply. A client that does not take it is gone, and its thread notices.
    fn send(&self, bytes: &[u8]) {
        let mut writer = self.writer();
        if writer.write_all(bytes).is_err() {
            // A reply that is sent in part must not be followed by another.
            let _gone_already = writer.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The reply to anything but a read.
    fn verdict(&self, cookie: u64, outcome: &io::Result<()>) -> Vec<u8> {
        match outcome {
            Ok(()) => simple_reply(cookie, None).to_vec(),
            Err(error) => self.refusal(cookie, fault(error), &error.to_string()),
        }
    }

    fn refusal(&self, cookie: u64, fault: Fault, message: &str) -> Vec<u8> {
        if self.agreed.structured {
            error_chunk(cookie, fault, message)
        } else {
            simple_reply(cookie, Some(fault)).to_vec()
        }
    }

    /// Appends the reply to a read, up to [`PIECE`] bytes of it.
    fn read_piece(&self, cookie: u64, offset: u64, length: usize, last: bool, out: &mut Vec<u8>) -> io::Result<()> {
        let begin = out.len();
        if self.agreed.structured {
            let payload = u32::try_from(length + 8).unwrap_or(0);
            out.extend(chunk(cookie, Chunk::OffsetData, last, payload));
            out.extend(offset.to_be_bytes());
        }
        let data = out.len();
        out.resize(data + length, 0);
        let outcome = self.export.read(offset, &mut out[data..]);
        if outcome.is_err() {
            out.truncate(begin);
        }
        outcome
    }

    /// Reads and replies, in pieces. Without structure a reply says "good" before its data, so all of it is read first.
    fn read(&self, request: Request) {
        let length = usize::try_from(request.length).unwrap_or(0);
        let mut out = Vec::new();
        if !self.agreed.structured {
            out.extend(simple_reply(request.cookie, None));
            match self.read_piece(request.cookie, request.offset, length, true, &mut out) {
                Ok(()) => self.send(&out),
                Err(error) => self.send(&self.verdict(request.cookie, &Err(error))),
            }
            return;
        }
        let mut done = 0;
        // The pieces of one reply may be mixed with other replies.
        while done < length {
            let piece = (length - done).min(PIECE);
            out.clear();
            let offset = request.offset + done as u64;
            if let Err(error) = self.read_piece(request.cookie, offset, piece, done + piece == length, &mut out) {
                out.extend(self.verdict(request.cookie, &Err(error)));
                done = length;
            }
            self.send(&out);
            done += piece;
        }
    }

    fn status(&self, request: Request) -> io::Result<Vec<u8>> {
        let end = request.offset + u64::from(request.length);
        let most = if request.flags & Request::ONE == 0 { MOST_EXTENTS } else { 1 };
        let mut extents: Vec<(u32, bool)> = Vec::new();
        let mut at = request.offset;
        while at < end && extents.len() < most {
            let (hole, length) = self.export.hole(at, end)?;
            // It fits: the request's length does.
            let short = u32::try_from(length.min(end - at)).unwrap_or(u32::MAX);
            match extents.last_mut() {
                Some((sum, known)) if *known == hole => *sum += short,
                _ => extents.push((short, hole)),
            }
            at += u64::from(short);
        }
        let length = u32::try_from(4 + extents.len() * 8).unwrap_or(0);
        let mut out = chunk(request.cookie, Chunk::BlockStatus, true, length).to_vec();
        out.extend(ALLOCATION_ID.to_be_bytes());
        for (length, hole) in extents {
            out.extend(length.to_be_bytes());
            // Bits: takes no place; reads as zeros.
            out.extend((if hole { 3_u32 } else { 0 }).to_be_bytes());
        }
        Ok(out)
    }
}

fn fault(error: &io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Fault::NoSpace,
        io::ErrorKind::InvalidInput => Fault::Invalid,
        _ => Fault::Io,
    }
}

struct Connection<'a> {
    reader: BufReader<UnixStream>,
    line: Arc<Line>,
    helpers: &'a Helpers,
    /// Replies that wait to be sent together.
    out: Vec<u8>,
    piece: Vec<u8>,
}

impl Connection<'_> {
    fn send(&mut self) -> io::Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let outcome = self.line.writer().write_all(&self.out);
        self.out.clear();
        outcome
    }

    fn requests(&mut self) -> io::Result<()> {
        loop {
            // Nothing is held back while nothing more is to be read.
            if self.reader.buffer().len() < Request::BYTES || self.out.len() > PIECE {
                self.send()?;
            }
            if self.reader.fill_buf()?.is_empty() {
                return Ok(());
            }
            let request = Request::decode(&read_array(&mut self.reader)?).map_err(broken)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            self.request(request)?;
        }
    }

    /// Has a helper make the reply.
    fn later(&self, request: Request, work: impl FnOnce(&Line) -> io::Result<()> + Send + 'static) {
        let line = self.line.clone();
        self.helpers.run(Box::new(move || {
            let outcome = work(&line);
            line.send(&line.verdict(request.cookie, &outcome));
        }));
    }

    fn refuse(&mut self, request: Request, fault: Fault, message: &str) {
        self.out.extend(self.line.refusal(request.cookie, fault, message));
    }

    fn request(&mut self, request: Request) -> io::Result<()> {
        let size = self.line.export.size();
        let within = request.offset.checked_add(request.length.into()).is_some_and(|end| end <= size);
        let known = Request::FUA | Request::ONE | Request::FAST_ZERO | 2;
        let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
        let refusal = if changes && self.line.export.is_read_only() {
            Some((Fault::NotPermitted, "the export is read-only"))
        } else if request.flags & !known != 0 {
            Some((Fault::Invalid, "unknown flags"))
        } else if !within && request.command != Command::Flush {
            let fault = if changes { Fault::NoSpace } else { Fault::Invalid };
            Some((fault, "beyond the end of the export"))
        } else if request.length > MOST_LENGTH && matches!(request.command, Command::Read | Command::Write) {
            Some((Fault::Invalid, "more than 32 MiB at once"))
        } else if request.length == 0 && !matches!(request.command, Command::Flush | Command::Write | Command::Read) {
            Some((Fault::Invalid, "no bytes"))
        } else if request.flags & Request::FAST_ZERO != 0 && request.command == Command::WriteZeroes {
            Some((Fault::Unsupported, "no promise of speed is made"))
        } else {
            None
        };
        if request.command == Command::Write && (refusal.is_some() || request.length > MOST_LENGTH) {
            if request.length > MOST_LENGTH {
                return Err(broken(Malformed("a write of more than 32 MiB")));
            }
            io::copy(&mut (&mut self.reader).take(request.length.into()), &mut io::sink())?;
        }
        if let Some((fault, message)) = refusal {
            self.refuse(request, fault, message);
            return Ok(());
        }
        let (offset, length) = (request.offset, u64::from(request.length));
        match request.command {
            Command::Read => self.read(request),
            Command::Write => return self.write(request),
            Command::Flush => self.later(request, |line| line.export.flush()),
            Command::Trim if request.length > QUICK_BYTES || request.flags & Request::FUA != 0 => {
                self.later(request, move |line| {
                    line.export.trim(offset, length)?;
                    if request.flags & Request::FUA == 0 { Ok(()) } else { line.export.flush() }
                });
            }
            Command::Trim => {
                let outcome = self.line.export.trim(offset, length);
                self.out.extend(self.line.verdict(request.cookie, &outcome));
            }
            Command::WriteZeroes => self.later(request, move |line| {
                line.export.zero(offset, length)?;
                if request.flags & Request::FUA == 0 { Ok(()) } else { line.export.flush() }
            }),
            Command::Cache => self.later(request, move |line| {
                let mut piece = vec![0; PIECE];
                let mut at = offset;
                while at < offset + length {
                    let count = (offset + length - at).min(PIECE as u64);
                    line.export.read(at, &mut piece[..usize::try_from(count).unwrap_or(0)])?;
                    at += count;
                }
                Ok(())
            }),
            Command::BlockStatus if !self.line.agreed.allocation => {
                self.refuse(request, Fault::Invalid, "no context was agreed on");
            }
            Command::BlockStatus => {
                let line = self.line.clone();
                self.helpers.run(Box::new(move || match line.status(request) {
                    Ok(reply) => line.send(&reply),
                    Err(error) => line.send(&line.verdict(request.cookie, &Err(error))),
                }));
            }
            Command::Disconnect => {}
            Command::Other(_) => self.refuse(request, Fault::Invalid, "unknown command"),
        }
        Ok(())
    }

    fn read(&mut self, request: Request) {
        let length = usize::try_from(request.length).unwrap_or(0);
        if length > PIECE || !self.line.export.is_near(request.offset, request.length.into()) {
            let line = self.line.clone();
            return self.helpers.run(Box::new(move || line.read(request)));
        }
        let begin = self.out.len();
        if !self.line.agreed.structured {
            self.out.extend(simple_reply(request.cookie, None));
        }
        let outcome = if length == 0 && self.line.agreed.structured {
            self.out.extend(chunk(request.cookie, Chunk::None, true, 0));
            Ok(())
        } else {
            self.line.read_piece(request.cookie, request.offset, length, true, &mut self.out)
        };
        if let Err(error) = outcome {
            self.out.truncate(begin);
            self.out.extend(self.line.verdict(request.cookie, &Err(error)));
        }
    }

    /// Takes a write's data in pieces. All of it is taken even where an early piece fails.
    fn write(&mut self, request: Request) -> io::Result<()> {
        let mut left = usize::try_from(request.length).unwrap_or(0);
        let mut offset = request.offset;
        let mut outcome = Ok(());
        while left > 0 {
            let count = left.min(PIECE);
            let buffered = self.reader.buffer().len().min(count);
            let taken = if buffered == count {
                // As it lies.
                let written = self.line.export.write(offset, &self.reader.buffer()[..count]);
                self.reader.consume(count);
                written
            } else {
                self.piece.resize(PIECE, 0);
                self.reader.read_exact(&mut self.piece[..count])?;
                self.line.export.write(offset, &self.piece[..count])
            };
            if outcome.is_ok() {
                outcome = taken;
            }
            left -= count;
            offset += count as u64;
        }
        if outcome.is_ok() && request.flags & Request::FUA != 0 {
            self.later(request, |line| line.export.flush());
        } else {
            if let Err(error) = &outcome {
                tracing::warn!(%error, offset = request.offset, length = request.length, "a disk's write failed");
            }
            self.out.extend(self.line.verdict(request.cookie, &outcome));
        }
        Ok(())
    }
}
