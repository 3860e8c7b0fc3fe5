//! Frames: header, checksums, and a decoder that finds its way back after garbage.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

pub const MAGIC: [u8; 4] = *b"BgnF";
/// The one version that this code speaks.
pub const VERSION: u8 = 1;
pub const HEADER_BYTES: usize = 20;
/// The largest payload of a frame.
pub const MOST_PAYLOAD: usize = 65_536;
/// The payload that makes a frame of 64 KiB: two writes of 32 KiB, the most that Linux' virtio-console takes at once.
pub const BEST_PAYLOAD: usize = MOST_PAYLOAD - HEADER_BYTES;
/// Zero bytes that complete any half frame, and then some.
pub const FLUSH_BYTES: usize = 65_600;
/// Credit of each direction of a stream at its start, in bytes.
pub const WINDOW: u32 = 1 << 20;
/// What a data frame costs at least.
pub const LEAST_COST: u32 = 256;
/// Consumed credit is given back when this much has gathered.
pub const CREDIT_BATCH: u32 = WINDOW / 4;

/// The credit that a data frame with a payload of `length` bytes costs.
pub fn cost(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX).max(LEAST_COST)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Control = 1,
    Data = 2,
    DataEnd = 3,
    Window = 4,
}

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub sequence: u16,
    pub stream: u32,
    pub length: u32,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[5] = self.kind as u8;
        out[6..8].copy_from_slice(&self.sequence.to_le_bytes());
        out[8..12].copy_from_slice(&self.stream.to_le_bytes());
        out[12..16].copy_from_slice(&self.length.to_le_bytes());
        let sum = crc32fast::hash(&out[..16]);
        out[16..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderFault> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != MAGIC || word(16) != crc32fast::hash(&bytes[..16]) {
            return Err(HeaderFault::Noise);
        }
        if bytes[4] != VERSION {
            return Err(HeaderFault::OtherVersion(bytes[4]));
        }
        let kind = match bytes[5] {
            1 => Kind::Control,
            2 => Kind::Data,
            3 => Kind::DataEnd,
            4 => Kind::Window,
            _ => return Err(HeaderFault::Noise),
        };
        let length = word(12);
        let fits = match kind {
            Kind::Control | Kind::Data => length as usize <= MOST_PAYLOAD,
            Kind::DataEnd => length == 0,
            Kind::Window => length == 4,
        };
        if !fits {
            return Err(HeaderFault::Noise);
        }
        Ok(Self { kind, sequence: u16::from_le_bytes([bytes[6], bytes[7]]), stream: word(8), length })
    }
}

enum HeaderFault {
    Noise,
    OtherVersion(u8),
}

/// Appends a whole frame to `out`. `payload` holds at most [`MOST_PAYLOAD`] bytes.
pub fn encode_frame(out: &mut Vec<u8>, kind: Kind, sequence: u16, stream: u32, payload: &[u8]) {
    debug_assert!(payload.len() <= MOST_PAYLOAD);
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend(Header { kind, sequence, stream, length }.encode());
    out.extend(payload);
}

/// Why a control message could not be made or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlFault {
    /// It is larger than a frame.
    TooLarge,
    /// Its checksum is wrong, or it is cut short.
    Checksum,
    /// No message of this version has this shape.
    Shape,
}

impl fmt::Display for ControlFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ControlFault::TooLarge => "the message is larger than a frame (64 KiB)",
            ControlFault::Checksum => "the message is damaged",
            ControlFault::Shape => "the message is not one of protocol version 1",
        })
    }
}

impl std::error::Error for ControlFault {}

/// Appends a control frame to `out`.
///
/// # Errors
/// `TooLarge` when the message does not fit a frame; `out` is unchanged then.
pub fn encode_control<T: Serialize>(out: &mut Vec<u8>, sequence: u16, message: &T) -> Result<(), ControlFault> {
    let mut payload = postcard::to_stdvec(message).map_err(|_| ControlFault::Shape)?;
    payload.extend(crc32fast::hash(&payload).to_le_bytes());
    if payload.len() > MOST_PAYLOAD {
        return Err(ControlFault::TooLarge);
    }
    encode_frame(out, Kind::Control, sequence, 0, &payload);
    Ok(())
}

/// Reads the payload of a control frame.
///
/// # Errors
/// `Checksum` or `Shape`.
pub fn decode_control<T: DeserializeOwned>(payload: &[u8]) -> Result<T, ControlFault> {
    let (body, sum) = payload.split_last_chunk::<4>().ok_or(ControlFault::Checksum)?;
    if crc32fast::hash(body) != u32::from_le_bytes(*sum) {
        return Err(ControlFault::Checksum);
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(ControlFault::Shape),
    }
}

/// The sequence numbers of one direction of one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence(u16);

impl Sequence {
    /// The number of the next frame to send.
    pub fn take(&mut self) -> u16 {
        let number = self.0;
        self.0 = number.wrapping_add(1);
        number
    }

    /// Whether `number` is that of the next frame to receive. `false` means that frames were lost: fail the stream.
    #[must_use]
    pub fn accept(&mut self, number: u16) -> bool {
        let expected = number == self.0;
        self.0 = number.wrapping_add(1);
        expected
    }
}

/// A frame that lies in a decoder's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: Kind,
    pub sequence: u16,
    pub stream: u32,
    pub payload: &'a [u8],
}

/// What a decoder found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received<'a> {
    Frame(Frame<'a>),
    /// A header of this other version.
    OtherVersion(u8),
}

/// Finds frames in a stream of bytes. Its one buffer never grows.
pub struct Decoder {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    skipped: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// Four frames: a frame that straddles the end is moved to the front, which so happens to a fourth at most.
    const CAPACITY: usize = 4 * (HEADER_BYTES + MOST_PAYLOAD);
    const LEAST_SPACE: usize = 4096;

    pub fn new() -> Self {
        Self { buffer: vec![0; Self::CAPACITY].into_boxed_slice(), start: 0, end: 0, skipped: 0 }
    }

    /// Room to receive into, never empty once [`Self::next`] has returned `None`; then call [`Self::filled`].
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < Self::LEAST_SPACE {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// Tells that `count` bytes were put into [`Self::space`].
    pub fn filled(&mut self, count: usize) {
        self.end = self.buffer.len().min(self.end + count);
    }

    /// Takes as many bytes of `input` as there is room for, and says how many.
    pub fn feed(&mut self, input: &[u8]) -> usize {
        let space = self.space();
        let count = space.len().min(input.len());
        space[..count].copy_from_slice(&input[..count]);
        self.filled(count);
        count
    }

    /// The next whole frame, or `None` until more bytes come.
    #[expect(clippy::should_implement_trait, reason = "the frame borrows the decoder's buffer, as no Iterator may")]
    pub fn next(&mut self) -> Option<Received<'_>> {
        loop {
            self.skip_to_magic();
            let header = self.buffer[self.start..self.end].first_chunk::<HEADER_BYTES>()?;
            match Header::decode(header) {
                Ok(header) => {
                    let begin = self.start + HEADER_BYTES;
                    let end = begin + header.length as usize;
                    if end > self.end {
                        return None;
                    }
                    self.start = end;
                    let payload = &self.buffer[begin..end];
                    let Header { kind, sequence, stream, .. } = header;
                    return Some(Received::Frame(Frame { kind, sequence, stream, payload }));
                }
                Err(HeaderFault::Noise) => {
                    // The next magic may begin inside this false header.
                    self.skipped += 1;
                    self.start += 1;
                }
                Err(HeaderFault::OtherVersion(version)) => {
                    self.start += HEADER_BYTES;
                    return Some(Received::OtherVersion(version));
                }
            }
        }
    }

    /// Bytes skipped so far that were no frames and no zeros.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Whether the beginning of a frame waits for its rest.
    pub fn is_mid_frame(&self) -> bool {
        self.start < self.end
    }

    /// Forgets a half frame, because its sender is gone.
    pub fn reset(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Moves to the first place where the magic stands, or where its beginning does at the end of the buffer.
    fn skip_to_magic(&mut self) {
        while self.start < self.end {
            let waiting = &self.buffer[self.start..self.end];
            let known = waiting.len().min(MAGIC.len());
            if waiting[..known] == MAGIC[..known] {
                return;
            }
            let next = waiting.iter().skip(1).position(|byte| *byte == MAGIC[0]).map_or(waiting.len(), |at| at + 1);
            self.skipped += waiting[..next].iter().filter(|byte| **byte != 0).count() as u64;
            self.start += next;
        }
    }
}
