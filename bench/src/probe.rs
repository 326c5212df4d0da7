//! Waits until a service answers.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::protocol::{Protocol, Transport};

/// For one connection and one reply.
const ATTEMPT: Duration = Duration::from_millis(500);

/// Between attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// A number that no client of a run has.
const PROBING_CLIENT: u32 = u32::MAX;

/// The service did not answer.
#[derive(Debug, thiserror::Error)]
#[error("{target} has not answered within {} s: see the server's and the load balancer's logs", .limit.as_secs())]
pub struct NoAnswer {
    /// Which service.
    pub target: SocketAddr,
    /// How long was waited.
    pub limit: Duration,
    /// What the last attempt met.
    #[source]
    pub source: io::Error,
}

/// Sends one message again and again until it is answered, in the calling thread's network namespace.
pub fn wait_until_it_answers(
    target: SocketAddr,
    protocol: &dyn Protocol,
    limit: Duration,
) -> Result<(), NoAnswer> {
    let end = Instant::now() + limit;
    loop {
        match attempt(target, protocol) {
            Ok(()) => return Ok(()),
            Err(source) if Instant::now() >= end => return Err(NoAnswer { target, limit, source }),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn attempt(target: SocketAddr, protocol: &dyn Protocol) -> io::Result<()> {
    let mut message = Vec::new();
    protocol.encode(PROBING_CLIENT, 1, &mut message);
    let mut decoder = protocol.decoder(PROBING_CLIENT);
    let mut replies = Vec::new();
    let mut buffer = [0; 4096];
    let mut link = Link::open(target, protocol.transport())?;
    link.send(&message)?;
    while replies.is_empty() {
        let bytes = link.receive(&mut buffer)?;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        decoder.feed(&buffer[..bytes], &mut replies).map_err(io::Error::other)?;
    }
    Ok(())
}

enum Link {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Link {
    fn open(target: SocketAddr, transport: Transport) -> io::Result<Self> {
        match transport {
            Transport::Tcp => {
                let stream = TcpStream::connect_timeout(&target, ATTEMPT)?;
                stream.set_read_timeout(Some(ATTEMPT))?;
                Ok(Self::Tcp(stream))
            }
            Transport::Udp => {
                let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(target)?;
                socket.set_read_timeout(Some(ATTEMPT))?;
                Ok(Self::Udp(socket))
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes),
            Self::Udp(socket) => socket.send(bytes).map(drop),
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Udp(socket) => socket.recv(buffer),
        }
    }
}
