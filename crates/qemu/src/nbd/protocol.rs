//! The NBD protocol's numbers and messages, without any I/O. Source: doc/proto.md of the NBD project: fixed newstyle
//! negotiation, structured replies, and the context `base:allocation`. All numbers are big-endian.

use std::fmt;

pub(crate) const GREETING: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, of both sides: fixed newstyle, and no padding after the export's size.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

/// The one context that is served, and the number that replies name it by.
pub(crate) const ALLOCATION: &str = "base:allocation";
pub(crate) const ALLOCATION_ID: u32 = 1;

/// The longest data of an option that is taken; names of exports are at most 4,096 bytes.
pub(crate) const MOST_OPTION: u32 = 64 << 10;
/// The longest read or write; what QEMU and the protocol assume where nothing is agreed.
pub(crate) const MOST_LENGTH: u32 = 32 << 20;

/// Transmission flags.
pub(crate) mod flag {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const FUA: u16 = 1 << 3;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const MULTIPLE_CONNECTIONS: u16 = 1 << 8;
    pub(crate) const CACHE: u16 = 1 << 10;
}

/// Options that a client may ask for.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_CONTEXTS: u32 = 9;
    pub(crate) const SET_CONTEXTS: u32 = 10;
}

/// Types of replies to options.
pub(crate) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const CONTEXT: u32 = 4;
    pub(crate) const UNSUPPORTED: u32 = (1 << 31) + 1;
    pub(crate) const INVALID: u32 = (1 << 31) + 3;
    pub(crate) const UNKNOWN: u32 = (1 << 31) + 6;
}

/// Errors of replies to requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Fault {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Unsupported = 95,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    Other(u16),
}

/// A request of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: Command,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

/// Bytes that are no message of the protocol; the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

impl Request {
    pub(crate) const BYTES: usize = 28;
    /// Flags: forced unit access; a single extent; zeros only if that is fast.
    pub(crate) const FUA: u16 = 1;
    pub(crate) const ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;

    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Request, Malformed> {
        let (magic, rest) = split::<4>(bytes);
        if u32::from_be_bytes(magic) != REQUEST_MAGIC {
            return Err(Malformed("a request does not begin with its magic number"));
        }
        let (flags, rest) = split::<2>(rest);
        let (command, rest) = split::<2>(rest);
        let (cookie, rest) = split::<8>(rest);
        let (offset, rest) = split::<8>(rest);
        let (length, _) = split::<4>(rest);
        let command = match u16::from_be_bytes(command) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Other(other),
        };
        Ok(Request {
            flags: u16::from_be_bytes(flags),
            command,
            cookie: u64::from_be_bytes(cookie),
            offset: u64::from_be_bytes(offset),
            length: u32::from_be_bytes(length),
        })
    }
}

/// The first `N` bytes and the rest; zeros stand for bytes that are not there.
fn split<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    bytes.split_first_chunk::<N>().map_or(([0; N], &[]), |(first, rest)| (*first, rest))
}

/// A reply to an option, appended to `out`.
pub(crate) fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend(data);
}

/// A reply without structure: an error or success; the data of a read follows it.
pub(crate) fn simple_reply(cookie: u64, fault: Option<Fault>) -> [u8; 16] {
    let mut reply = [0; 16];
    reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply[4..8].copy_from_slice(&fault.map_or(0, |fault| fault as u32).to_be_bytes());
    reply[8..].copy_from_slice(&cookie.to_be_bytes());
    reply
}

/// What a structured reply's chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Chunk {
    None = 0,
    OffsetData = 1,
    BlockStatus = 5,
    Error = 0x8001,
}

/// The head of a chunk of a structured reply; `length` bytes follow it.
pub(crate) fn chunk(cookie: u64, kind: Chunk, last: bool, length: u32) -> [u8; 20] {
    let mut head = [0; 20];
    head[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&u16::from(last).to_be_bytes());
    head[6..8].copy_from_slice(&(kind as u16).to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..].copy_from_slice(&length.to_be_bytes());
    head
}

/// An error as the last chunk of a structured reply.
pub(crate) fn error_chunk(cookie: u64, fault: Fault, message: &str) -> Vec<u8> {
    let message = &message.as_bytes()[..message.len().min(1000)];
    let length = u16::try_from(message.len()).unwrap_or(0);
    let mut bytes = chunk(cookie, Chunk::Error, true, 6 + u32::from(length)).to_vec();
    bytes.extend((fault as u32).to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    bytes
}

/// What INFO and GO ask for: the export's name. The list of wanted facts behind it only says what may be left out.
pub(crate) fn read_info(data: &[u8]) -> Result<&[u8], Malformed> {
    let wrong = Malformed("the option's lengths do not add up");
    let Some((length, rest)) = data.split_first_chunk::<4>() else { return Err(wrong) };
    let Ok(length) = usize::try_from(u32::from_be_bytes(*length)) else { return Err(wrong) };
    let Some((name, rest)) = rest.split_at_checked(length) else { return Err(wrong) };
    let Some((count, rest)) = rest.split_first_chunk::<2>() else { return Err(wrong) };
    if rest.len() == usize::from(u16::from_be_bytes(*count)) * 2 { Ok(name) } else { Err(wrong) }
}

/// What LIST and SET of contexts ask for: the export's name, and the queries.
pub(crate) fn read_contexts(data: &[u8]) -> Result<(&[u8], Vec<&[u8]>), Malformed> {
    let wrong = || Malformed("the option's lengths do not add up");
    fn text(data: &[u8]) -> Option<(&[u8], &[u8])> {
        let (length, rest) = data.split_first_chunk::<4>()?;
        rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)
    }
    let (name, rest) = text(data).ok_or_else(wrong)?;
    let (count, mut rest) = rest.split_first_chunk::<4>().ok_or_else(wrong)?;
    let mut queries = Vec::new();
    // The data's own length bounds the count: a query takes four bytes at least.
    for _ in 0..u32::from_be_bytes(*count) {
        let (query, behind) = text(rest).ok_or_else(wrong)?;
        queries.push(query);
        rest = behind;
    }
    if rest.is_empty() { Ok((name, queries)) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_pinned_bytes() {
        let bytes = [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x10, 0];
        let request = Request::decode(&bytes).unwrap();
        let wanted = Request {
            flags: Request::FUA,
            command: Command::Write,
            cookie: 0x0102_0304_0506_0708,
            offset: 65_536,
            length: 4096,
        };
        assert_eq!(request, wanted);
        let mut wrong = bytes;
        wrong[0] = 0;
        assert!(Request::decode(&wrong).is_err());
        assert_eq!(
            simple_reply(0x0102, Some(Fault::NoSpace)),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 1, 2]
        );
        assert_eq!(
            chunk(3, Chunk::OffsetData, true, 12),
            [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 12]
        );
        let mut out = Vec::new();
        option_reply(&mut out, option::GO, answer::ACK, &[]);
        assert_eq!(out, [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn options_that_lie_about_their_lengths_are_refused() {
        assert_eq!(read_info(&[0, 0, 0, 1, b'x', 0, 0]).unwrap(), b"x");
        for bad in [&[][..], &[0, 0, 0, 9, b'x', 0, 0], &[0, 0, 0, 0, 0, 1], &[0xff; 6]] {
            assert!(read_info(bad).is_err(), "{bad:?}");
        }
        let good = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, b'a', b':'];
        assert_eq!(read_contexts(&good).unwrap(), (&b""[..], vec![&b"a:"[..]]));
        for length in 0..good.len() {
            assert!(read_contexts(&good[..length]).is_err());
        }
        assert!(read_contexts(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).is_err(), "a count without queries");
    }
}
