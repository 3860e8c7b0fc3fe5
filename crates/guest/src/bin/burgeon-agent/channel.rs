//! The agent's end of the channel: an open port or socket, the decoder, and what waits to be written.
//!
//! A virtio port whose host is away says "hung up" all the time, so it cannot be polled itself then: an epoll
//! set in edge-triggered mode tells when the host comes back. A socket is dialled again instead.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
};

use burgeon_guest::protocol::{Decoder, GuestMessage, HEADER_BYTES, Header, MOST_PAYLOAD, Sequence, encode_control};
use rustix::event::{PollFlags, epoll};

/// Data frames fill one write up to this length. Only a control message may need the buffer's whole size.
const OUT_BYTES: usize = 65_536;
/// Less room than this is not worth a data frame.
const LEAST_ROOM: usize = 4096;
/// While this much control waits to be written, nothing more is read: a host that only asks is slowed down.
const CONTROL_LIMIT: usize = 1 << 20;

enum Link {
    Port { fd: OwnedFd, edge: OwnedFd },
    Socket { path: PathBuf, stream: Option<UnixStream> },
}

pub(crate) struct Channel {
    link: Link,
    control: VecDeque<Vec<u8>>,
    control_bytes: usize,
    control_sequence: Sequence,
    pub(crate) control_received: Sequence,
    /// Holds `loaded` bytes of whole frames, of which `written` are gone.
    out: Box<[u8]>,
    loaded: usize,
    written: usize,
    /// The port's host is away.
    absent: bool,
    blocked: bool,
}

/// What a read brought.
pub(crate) enum Input {
    Bytes,
    Nothing,
    /// The host is gone for now.
    Lost,
}

impl Channel {
    /// Takes an open virtio port.
    pub(crate) fn port(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let edge = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let events = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&edge, &fd, epoll::EventData::new_u64(0), events)?;
        Ok(Self::new(Link::Port { fd, edge }))
    }

    /// Opens a virtio port or, for any other file, connects to a unix socket.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let is_port = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device());
        if is_port {
            return Self::port(open_port(path)?.into());
        }
        let mut link = Link::Socket { path: path.to_path_buf(), stream: None };
        redial(&mut link)?;
        Ok(Self::new(link))
    }

    fn new(link: Link) -> Self {
        Self {
            link,
            control: VecDeque::new(),
            control_bytes: 0,
            control_sequence: Sequence::default(),
            control_received: Sequence::default(),
            out: vec![0; HEADER_BYTES + MOST_PAYLOAD].into_boxed_slice(),
            loaded: 0,
            written: 0,
            absent: false,
            blocked: false,
        }
    }

    pub(crate) fn is_port(&self) -> bool {
        matches!(self.link, Link::Port { .. })
    }

    /// Dials a lost socket again. Says whether there is a new connection.
    pub(crate) fn reconnect(&mut self) -> bool {
        let lost = matches!(self.link, Link::Socket { stream: None, .. });
        if !lost || redial(&mut self.link).is_err() {
            return false;
        }
        self.forget_output();
        true
    }

    pub(crate) fn is_lost(&self) -> bool {
        matches!(self.link, Link::Socket { stream: None, .. })
    }

    /// What to poll, and for what; `None` while there is nothing.
    pub(crate) fn poll_on(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::empty();
        if self.control_bytes < CONTROL_LIMIT {
            flags |= PollFlags::IN;
        }
        if self.blocked {
            flags |= PollFlags::OUT;
        }
        match &self.link {
            Link::Port { edge, .. } if self.absent => Some((edge.as_fd(), PollFlags::IN)),
            Link::Port { fd, .. } => Some((fd.as_fd(), flags)),
            Link::Socket { stream, .. } => stream.as_ref().map(|stream| (stream.as_fd(), flags)),
        }
    }

    /// Poll reported something: what was blocked or absent may be tried again.
    pub(crate) fn woken(&mut self) {
        if let (true, Link::Port { edge, .. }) = (self.absent, &self.link) {
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 1];
            let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let _nothing_to_learn = epoll::wait(edge, &mut events, Some(&none));
        }
        self.absent = false;
        self.blocked = false;
    }

    /// Whether output is stuck behind a host that does not read.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked || self.absent || self.is_lost()
    }

    pub(crate) fn wants_input(&self) -> bool {
        self.control_bytes < CONTROL_LIMIT && !self.absent
    }

    /// Reads once into the decoder.
    pub(crate) fn read(&mut self, decoder: &mut Decoder) -> Input {
        let space = decoder.space();
        let got = match &self.link {
            Link::Port { fd, .. } => rustix::io::read(fd, space),
            Link::Socket { stream: Some(stream), .. } => rustix::io::read(stream, space),
            Link::Socket { stream: None, .. } => return Input::Nothing,
        };
        match got {
            Ok(count) if count > 0 => {
                decoder.filled(count);
                Input::Bytes
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Input::Nothing,
            Ok(_) | Err(_) => {
                decoder.reset();
                self.lose();
                Input::Lost
            }
        }
    }

    fn lose(&mut self) {
        match &mut self.link {
            Link::Port { .. } => self.absent = true,
            Link::Socket { stream, .. } => *stream = None,
        }
    }

    /// Queues a message. One that does not fit a frame is a fault of ours, and is dropped.
    pub(crate) fn say(&mut self, message: &GuestMessage) {
        let mut frame = Vec::new();
        if matches!(message, GuestMessage::Welcome { .. }) {
            self.control_sequence = Sequence::default();
        }
        if encode_control(&mut frame, self.control_sequence.take(), message).is_ok() {
            self.control_bytes += frame.len();
            self.control.push_back(frame);
        }
    }

    /// Queues a whole frame of a stream that goes before data: a window.
    pub(crate) fn push(&mut self, frame: Vec<u8>) {
        self.control_bytes += frame.len();
        self.control.push_back(frame);
    }

    /// Moves waiting control into the write buffer.
    pub(crate) fn load_control(&mut self) {
        while let Some(frame) = self.control.front() {
            if self.loaded > 0 && self.loaded + frame.len() > OUT_BYTES {
                return;
            }
            self.out[self.loaded..self.loaded + frame.len()].copy_from_slice(frame);
            self.loaded += frame.len();
            self.control_bytes -= frame.len();
            self.control.pop_front();
        }
    }

    /// Where the payload of the next data frame may be read to, straight from its source; at most `most` bytes.
    /// `None` when the buffer is to be written first.
    pub(crate) fn data_space(&mut self, most: u32) -> Option<&mut [u8]> {
        let begin = self.loaded + HEADER_BYTES;
        if begin + LEAST_ROOM > OUT_BYTES {
            return None;
        }
        let most = usize::try_from(most).unwrap_or(OUT_BYTES).min(OUT_BYTES - begin);
        Some(&mut self.out[begin..begin + most])
    }

    /// Makes a frame of the payload that was put into [`Self::data_space`].
    pub(crate) fn commit(&mut self, header: Header) {
        self.out[self.loaded..self.loaded + HEADER_BYTES].copy_from_slice(&header.encode());
        self.loaded += HEADER_BYTES + header.length as usize;
    }

    /// Writes what is in the buffer. `true` when it is empty again.
    pub(crate) fn flush(&mut self) -> bool {
        while self.written < self.loaded {
            let rest = &self.out[self.written..self.loaded];
            let done = match &self.link {
                Link::Port { fd, .. } => rustix::io::write(fd, rest),
                Link::Socket { stream: Some(stream), .. } => rustix::io::write(stream, rest),
                Link::Socket { stream: None, .. } => return false,
            };
            match done {
                Ok(count) => self.written += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.blocked = true;
                    return false;
                }
                Err(_) => {
                    self.lose();
                    return false;
                }
            }
        }
        self.loaded = 0;
        self.written = 0;
        true
    }

    pub(crate) fn has_control(&self) -> bool {
        !self.control.is_empty() || self.loaded > 0
    }

    /// Drops what an earlier session was to get. A frame that is partly written is finished, so that the next one
    /// begins at a frame's edge.
    pub(crate) fn forget_output(&mut self) {
        self.control.clear();
        self.control_bytes = 0;
        if self.written == 0 || self.is_lost() {
            self.loaded = 0;
            self.written = 0;
        }
    }
}

pub(crate) fn open_port(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

fn redial(link: &mut Link) -> io::Result<()> {
    if let Link::Socket { path, stream } = link {
        let new = UnixStream::connect(path)?;
        new.set_nonblocking(true)?;
        *stream = Some(new);
    }
    Ok(())
}
