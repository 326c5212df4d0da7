//! Watching the queues that a checkpoint does not hold: connections that wait to be accepted (CRIU refuses
//! to dump them) and datagrams that wait to be read (CRIU loses them).
//!
//! Bytes in the receive queue of an accepted connection are in the checkpoint and need no draining.

use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::protocol::Protocol;

/// Between two looks; the server needs a moment of the processor to read.
const PAUSE: Duration = Duration::from_micros(200);
/// A server that does not read its queues for this long will not.
pub const LIMIT: Duration = Duration::from_millis(1000);

/// Why the queues are not empty.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// `/proc/net` cannot be read.
    #[error("the site's sockets cannot be read from {0}")]
    Read(&'static str, #[source] io::Error),
    /// The server does not read.
    #[error(
        "the server left {datagrams} bytes of datagrams unread and {connections} connections not accepted \
         for {LIMIT:?}: it is overloaded or stuck, try again later"
    )]
    Full {
        /// Bytes in UDP receive queues.
        datagrams: u64,
        /// Connections in accept queues.
        connections: u64,
    },
}

/// What still waits for a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Bytes in UDP receive queues.
    pub datagrams: u64,
    /// Connections in accept queues.
    pub connections: u64,
}

/// Waits until nothing has been waiting for the backend since `settle` has passed.
pub async fn drain(address: SocketAddr, protocol: Protocol, settle: Duration) -> Result<(), DrainError> {
    // tokio's timer counts in milliseconds and rounds up; a short settling time deserves better.
    let settle = tokio::task::spawn_blocking(move || std::thread::sleep(settle));
    // A sleeping thread cannot fail.
    let _ = settle.await;
    let until = std::time::Instant::now() + LIMIT;
    loop {
        let waiting = look(address, protocol)?;
        if waiting == Waiting::default() {
            return Ok(());
        }
        if std::time::Instant::now() >= until {
            return Err(DrainError::Full { datagrams: waiting.datagrams, connections: waiting.connections });
        }
        let _ = tokio::task::spawn_blocking(|| std::thread::sleep(PAUSE)).await;
    }
}

/// Looks once. Both families are read, since a v6 socket may serve v4.
pub fn look(address: SocketAddr, protocol: Protocol) -> Result<Waiting, DrainError> {
    let tables = match protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
    };
    let mut waiting = Waiting::default();
    for table in tables {
        let file = match std::fs::File::open(table) {
            Ok(file) => file,
            // No IPv6 here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(DrainError::Read(table, error)),
        };
        let lines = BufReader::new(file).lines().skip(1);
        count(lines, address, protocol, &mut waiting).map_err(|error| DrainError::Read(table, error))?;
    }
    Ok(waiting)
}

fn count(
    lines: impl Iterator<Item = io::Result<String>>,
    address: SocketAddr,
    protocol: Protocol,
    waiting: &mut Waiting,
) -> io::Result<()> {
    const LISTEN: u8 = 0x0a;
    for line in lines {
        let Some(socket) = Socket::parse(&line?) else { continue };
        if protocol == Protocol::Tcp && socket.state != LISTEN {
            // Listening sockets come first in the kernel's table; there may be thousands of others.
            return Ok(());
        }
        if socket.serves(address) {
            match protocol {
                Protocol::Tcp => waiting.connections += socket.unread,
                Protocol::Udp => waiting.datagrams += socket.unread,
            }
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    ip: IpAddr,
    port: u16,
    state: u8,
    /// Of a listening socket: connections that wait to be accepted.
    unread: u64,
}

impl Socket {
    /// A line of `/proc/net/{tcp,udp}{,6}`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace().skip(1);
        let (ip, port) = fields.next()?.split_once(':')?;
        let state = u8::from_str_radix(fields.nth(1)?, 16).ok()?;
        let (_, unread) = fields.next()?.split_once(':')?;
        Some(Self {
            ip: parse_ip(ip)?,
            port: u16::from_str_radix(port, 16).ok()?,
            state,
            unread: u64::from_str_radix(unread, 16).ok()?,
        })
    }

    /// True if packets for the address may end up here.
    fn serves(&self, address: SocketAddr) -> bool {
        let bound = match self.ip {
            IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(self.ip, IpAddr::V4),
            IpAddr::V4(_) => self.ip,
        };
        self.port == address.port() && (bound.is_unspecified() || bound == address.ip())
    }
}

/// The kernel prints addresses as words of the host's byte order.
fn parse_ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for (place, at) in octets.chunks_exact_mut(4).zip((0..32).step_by(8)) {
                place.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> impl Iterator<Item = io::Result<String>> {
        text.lines().map(|line| Ok(line.to_owned()))
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn only_the_backends_queues_count() {
        let address = "10.1.0.1:6379".parse().unwrap();
        let tcp = "\
   0: 0100010A:18EB 00000000:0000 0A 00000000:00000003 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0200010A:18EB 00000000:0000 0A 00000000:00000005 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 00000000:18EB 00000000:0000 0A 00000000:00000002 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   3: 0100010A:18EB 0100000A:9999 01 00000000:00000040 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   4: 0100010A:18EB 00000000:0000 0A 00000000:00000009 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
";
        let mut waiting = Waiting::default();
        count(lines(tcp), address, Protocol::Tcp, &mut waiting).unwrap();
        assert_eq!(waiting, Waiting { datagrams: 0, connections: 5 });

        let udp6 = "\
   0: 0000000000000000FFFF00000100010A:18EB 00000000000000000000000000000000:0000 07 00000000:00000300 00:00000000 00000000 0 0 1 2 0 0
   1: 000000FD000000000000000001000000:18EB 00000000000000000000000000000000:0000 07 00000000:00000500 00:00000000 00000000 0 0 1 2 0 0
";
        let mut waiting = Waiting::default();
        count(lines(udp6), address, Protocol::Udp, &mut waiting).unwrap();
        assert_eq!(waiting, Waiting { datagrams: 0x300, connections: 0 });
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn addresses_are_read_in_the_hosts_order() {
        assert_eq!(parse_ip("0100007F"), Some("127.0.0.1".parse().unwrap()));
        let v6 = parse_ip("000000FD000000000000000001000000");
        assert_eq!(v6, Some("fd00::1".parse().unwrap()));
        assert_eq!(parse_ip("12"), None);
    }

    #[tokio::test]
    async fn a_datagram_that_nobody_reads_is_seen() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        drain(address, Protocol::Udp, Duration::ZERO).await.unwrap();
        socket.send_to(b"hello", address).unwrap();
        assert!(look(address, Protocol::Udp).unwrap().datagrams > 0);
        let error = drain(address, Protocol::Udp, Duration::ZERO).await.unwrap_err();
        assert!(error.to_string().contains("unread"), "{error}");
    }

    #[tokio::test]
    async fn a_connection_that_nobody_accepts_is_seen_until_it_is_accepted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _client = std::net::TcpStream::connect(address).unwrap();
        assert_eq!(look(address, Protocol::Tcp).unwrap().connections, 1);
        let _accepted = listener.accept().unwrap();
        drain(address, Protocol::Tcp, Duration::ZERO).await.unwrap();
    }
}
