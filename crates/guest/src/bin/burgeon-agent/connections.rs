//! TCP connections that a captured state holds. Their other ends belong to the machine that was captured: a clone that
//! went on with one would speak in its name.
//!
//! Connections of the agent's network namespace are seen: those of containers with one of their own are not.

use std::{collections::HashSet, fs, io, net::IpAddr, os::unix::fs::FileExt};

use burgeon_guest::protocol::{Failure, FailureKind};
use rustix::{
    fd::{AsFd, OwnedFd},
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink},
};

use crate::{
    files::Kept,
    spawn::{failure, io_failure},
};

/// States of linux/tcp_states.h in which there is nobody at the other end.
const TIME_WAIT: u8 = 6;
const CLOSED: u8 = 7;
const LISTEN: u8 = 10;

// linux/sock_diag.h and linux/inet_diag.h.
const SOCK_DESTROY: u16 = 21;
const REQUEST_BYTES: usize = 72;

type End = (IpAddr, u16);

/// The kernel's account of sockets. Without any in use its tables, which are large, need not be walked.
static FOUR: Kept = Kept::new("/proc/net/sockstat");
static SIX: Kept = Kept::new("/proc/net/sockstat6");

impl Kept {
    fn has_none(&self, line: &str) -> bool {
        let mut about = [0; 1024];
        let length = self.file().and_then(|file| file.read_at(&mut about, 0)).unwrap_or_default();
        String::from_utf8_lossy(&about[..length]).lines().any(|known| known.starts_with(line))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    local: End,
    remote: End,
    state: u8,
    /// Of a socket of IPv6, which may speak IPv4.
    six: bool,
}

/// Ends connections to other machines, if that is wanted: how many were ended, and how many live on.
pub(crate) fn end_inherited(wanted: bool) -> Result<(u32, u32), Failure> {
    let known = list().map_err(|error| io_failure("cannot list TCP connections", &error))?;
    let outside = outside(&known);
    let count = u32::try_from(outside.len()).unwrap_or(u32::MAX);
    if outside.is_empty() || !wanted {
        return Ok((0, count));
    }
    let cannot = |error: io::Error| {
        let message = format!("{count} inherited TCP connections cannot be ended: {error}");
        failure(FailureKind::Unsupported, message)
    };
    let socket = netlink().map_err(cannot)?;
    for connection in &outside {
        destroy(&socket, connection).map_err(cannot)?;
    }
    Ok((count, 0))
}

fn list() -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    if !FOUR.has_none("TCP: inuse 0 ") {
        found.extend(parse(&fs::read_to_string("/proc/net/tcp")?));
    }
    if !SIX.has_none("TCP6: inuse 0") {
        match fs::read_to_string("/proc/net/tcp6") {
            Ok(text) => found.extend(parse(&text)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Lines of /proc/net/tcp and tcp6.
fn parse(text: &str) -> impl Iterator<Item = Connection> + '_ {
    text.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, six) = end(words.next()?)?;
        let (remote, _) = end(words.next()?)?;
        Some(Connection { local, remote, state: u8::from_str_radix(words.next()?, 16).ok()?, six })
    })
}

/// An address in words as the machine has them in memory, and a port.
fn end(text: &str) -> Option<(End, bool)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    if let Ok(four) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some(((IpAddr::from(four), port), false));
    }
    let address = IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?);
    Some(((address.to_canonical(), port), true))
}

/// Connections to other machines. Of one within the guest both ends went over, and still fit.
fn outside(known: &[Connection]) -> Vec<Connection> {
    let ends: HashSet<(End, End)> = known.iter().map(|one| (one.local, one.remote)).collect();
    let is_outside = |one: &&Connection| {
        !matches!(one.state, TIME_WAIT | CLOSED | LISTEN)
            && !one.remote.0.is_loopback()
            && !ends.contains(&(one.remote, one.local))
    };
    known.iter().filter(is_outside).copied().collect()
}

fn netlink() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?)
}

/// A message of netlink that destroys a socket: `nlmsghdr` and `inet_diag_req_v2`.
fn request(connection: &Connection) -> [u8; REQUEST_BYTES] {
    // NLM_F_REQUEST and NLM_F_ACK.
    const FLAGS: u16 = 1 | 4;
    let mut message = [0; REQUEST_BYTES];
    let mut put = |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &72_u32.to_ne_bytes());
    put(4, &SOCK_DESTROY.to_ne_bytes());
    put(6, &FLAGS.to_ne_bytes());
    let family = if connection.six { AddressFamily::INET6 } else { AddressFamily::INET };
    put(16, &[u8::try_from(family.as_raw()).unwrap_or(0), 6]);
    put(20, &u32::MAX.to_ne_bytes());
    for (port_at, address_at, (address, port)) in [(24, 28, connection.local), (26, 44, connection.remote)] {
        put(port_at, &port.to_be_bytes());
        match address {
            IpAddr::V4(four) if connection.six => put(address_at, &four.to_ipv6_mapped().octets()),
            IpAddr::V4(four) => put(address_at, &four.octets()),
            IpAddr::V6(six) => put(address_at, &six.octets()),
        }
    }
    // INET_DIAG_NOCOOKIE: whichever has these ends.
    put(64, &[0xff; 8]);
    message
}

fn destroy(socket: &impl AsFd, connection: &Connection) -> io::Result<()> {
    rustix::net::send(socket, &request(connection), SendFlags::empty())?;
    let mut answer = [0; 256];
    // The kernel has answered when the send returns.
    let (_, length) = rustix::net::recv(socket, &mut answer, RecvFlags::DONTWAIT)?;
    // `nlmsgerr`: an error's number, negative, behind the header.
    let number = answer.get(16..20).filter(|_| length >= 20).and_then(|bytes| bytes.first_chunk::<4>());
    match number.map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(error) => match Errno::from_raw_os_error(-error) {
            // It ended by itself.
            Errno::NOENT => Ok(()),
            error => Err(error.into()),
        },
        None => Err(io::Error::other("the kernel gave no answer")),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    fn connection(local: &str, remote: &str, state: u8) -> Connection {
        let end = |text: &str| -> End {
            let end: std::net::SocketAddr = text.parse().unwrap();
            (end.ip(), end.port())
        };
        Connection { local: end(local), remote: end(remote), state, six: false }
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        let four =
            "  sl  local_address rem_address   st tx_queue\n   0: 0F02000A:C350 0202000A:01BB 01 0:0 00 0 0 0 7\n";
        let known: Vec<Connection> = parse(four).collect();
        assert_eq!(known, [connection("10.0.2.15:50000", "10.0.2.2:443", 1)]);
        let six = "head\n 0: 0000000000000000FFFF00000F02000A:0016 0000000000000000FFFF00000202000A:9C40 08 0:0\n \
                   1: B80D0120000000000000000001000000:0016 B80D0120000000000000000002000000:9C40 01 0:0\n";
        let known: Vec<Connection> = parse(six).collect();
        assert_eq!(known[0], Connection { six: true, ..connection("10.0.2.15:22", "10.0.2.2:40000", 8) });
        assert_eq!(known[1], Connection { six: true, ..connection("[2001:db8::1]:22", "[2001:db8::2]:40000", 1) });
    }

    #[test]
    fn those_within_the_guest_live_on() {
        let away = connection("10.0.2.15:50000", "10.0.2.2:443", 1);
        let closing = connection("[2001:db8::1]:22", "[2001:db8::2]:1", 8);
        let known = [
            away,
            closing,
            connection("10.0.2.15:50001", "10.0.2.2:443", TIME_WAIT),
            connection("0.0.0.0:22", "0.0.0.0:0", LISTEN),
            connection("127.0.0.1:5000", "127.0.0.1:6000", 1),
            // The guest talks to an address of its own.
            connection("10.0.2.15:7000", "10.0.2.15:80", 1),
            connection("10.0.2.15:80", "10.0.2.15:7000", 1),
        ];
        assert_eq!(outside(&known), [away, closing]);
    }

    #[test]
    fn the_kernel_takes_the_request() {
        // Where this machine may not end connections, the kernel says so, and by nothing worse.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        let (local, remote) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
        let found: Vec<Connection> = list().unwrap();
        let own = found.iter().find(|one| one.local == (local.ip(), local.port())).unwrap();
        assert_eq!(own.remote, (remote.ip(), remote.port()));
        match netlink().and_then(|socket| destroy(&socket, own)) {
            Ok(()) => assert_eq!(near.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted),
            Err(error) => assert!(
                matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOENT | Errno::PROTONOSUPPORT | Errno::INVAL)
                ),
                "{error}"
            ),
        }
        drop(far);
    }
}
