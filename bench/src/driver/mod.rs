//! The open-loop client driver: many connections kept busy at a set total rate by one thread.
//!
//! Open loop: messages are sent when they are due, whatever became of those before, as real users do.
//! A slow reply therefore delays nothing, and a stall cannot hide behind clients that politely wait.
//!
//! ```text
//! connect(load)  opens the sockets, in the network namespace of the calling thread
//!   -> Clients::start()  a thread sends and receives (event_loop), until
//!   -> Running::stop()   no more messages; replies are awaited for a bounded time; -> Timeline
//! ```
//!
//! Sockets stay in the namespace where they were made, so only `connect` has to be called inside it.

mod connection;
mod event_loop;
mod priority;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};

use crate::protocol::{Protocol, Transport};
use crate::timeline::Timeline;
use connection::Connection;
use event_loop::EventLoop;
pub(crate) use priority::ahead_of_others;

/// What the clients do.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where they connect.
    pub target: SocketAddr,
    /// Where they come from.
    pub source: Source,
    /// How many there are.
    pub clients: u32,
    /// Messages a second, all clients together.
    pub rate_per_s: f64,
    /// How long to wait for a connection.
    pub connect_timeout: Duration,
    /// How long replies are awaited after the last message. What has not arrived then is lost.
    pub drain: Duration,
}

/// Which addresses clients have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// What the kernel picks: one address, a port each.
    Any,
    /// An address each out of 127.0.0.0/8, for a server on loopback that limits what an address may send.
    OwnLoopback,
}

impl Source {
    fn address(self, client: u32) -> Option<SocketAddr> {
        // Away from 127.0.0.0/16, where servers are.
        const FIRST: u32 = u32::from_be_bytes([127, 1, 0, 1]);
        match self {
            Self::Any => None,
            Self::OwnLoopback => Some(SocketAddr::from((Ipv4Addr::from(FIRST + client), 0))),
        }
    }
}

/// Why clients could not be run.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The load makes no sense.
    #[error(
        "cannot drive {clients} clients at {rate_per_s} messages/s: both must be positive, the rate at most 1,000,000"
    )]
    Load {
        /// As asked for.
        clients: u32,
        /// As asked for.
        rate_per_s: f64,
    },
    /// A client's connection could not be opened.
    #[error("client {client} of {clients} cannot connect to {target}: is the server running and reachable?")]
    Connect {
        /// Which one.
        client: u32,
        /// Of how many.
        clients: u32,
        /// Where to.
        target: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The machine allows too few open files.
    #[error(
        "{clients} clients need {needed} open files and this process may have {allowed}: raise `ulimit -n`"
    )]
    OpenFiles {
        /// How many clients.
        clients: u32,
        /// Descriptors they need.
        needed: u64,
        /// The hard limit.
        allowed: u64,
    },
    /// The event loop failed; nothing was measured.
    #[error("the client driver's event loop failed at {what}")]
    EventLoop {
        /// Which call.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The thread ended by itself.
    #[error("the client driver's thread panicked")]
    Panicked,
}

/// Counts of a run under way, for a progress display.
#[derive(Debug, Default)]
pub struct Progress {
    /// Messages that were due.
    pub due: AtomicU64,
    /// Messages that were answered.
    pub answered: AtomicU64,
}

/// Connected clients that have not sent anything.
pub struct Clients {
    load: Load,
    protocol: Arc<dyn Protocol>,
    connections: Vec<Connection>,
}

/// Descriptors beside the sockets: standard streams, epoll, timer, and what the rest of the process has open.
const OTHER_FILES: u64 = 256;

/// Connection attempts under way at once: below the accept queue of every server we know.
const CONNECTING_AT_ONCE: usize = 128;

/// Opens all connections, in the network namespace of the calling thread.
pub fn connect(load: Load, protocol: Arc<dyn Protocol>) -> Result<Clients, DriverError> {
    if load.clients == 0 || !(load.rate_per_s > 0.0 && load.rate_per_s <= 1e6) {
        return Err(DriverError::Load { clients: load.clients, rate_per_s: load.rate_per_s });
    }
    let sockets = open(load.target, load.source, load.clients, protocol.transport(), load.connect_timeout)?;
    let connections = sockets
        .into_iter()
        .zip(0..)
        .map(|(socket, client)| Connection::new(socket, protocol.decoder(client)))
        .collect();
    Ok(Clients { load, protocol, connections })
}

/// Opens so many sockets that do not block, in the network namespace of the calling thread, and waits until all are
/// connected, some at a time for at most `limit`.
pub(crate) fn open(
    target: SocketAddr,
    source: Source,
    count: u32,
    transport: Transport,
    limit: Duration,
) -> Result<Vec<Socket>, DriverError> {
    allow_open_files(count)?;
    let failed = |client, source| DriverError::Connect { client, clients: count, target, source };
    let mut sockets = Vec::with_capacity(count as usize);
    let clients: Vec<u32> = (0..count).collect();
    for batch in clients.chunks(CONNECTING_AT_ONCE) {
        let mut begun = Vec::with_capacity(batch.len());
        for &client in batch {
            let socket =
                begin(target, source.address(client), transport).map_err(|source| failed(client, source))?;
            begun.push((client, socket));
        }
        let deadline = Instant::now() + limit;
        for (client, socket) in begun {
            await_connected(&socket, deadline).map_err(|source| failed(client, source))?;
            sockets.push(socket);
        }
    }
    Ok(sockets)
}

/// Raises this process's limit of open files so that so many sockets fit.
pub(crate) fn allow_open_files(clients: u32) -> Result<(), DriverError> {
    let limits = |what| move |error: nix::Error| DriverError::EventLoop { what, source: error.into() };
    let needed = u64::from(clients) + OTHER_FILES;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(limits("getrlimit"))?;
    if soft >= needed {
        return Ok(());
    }
    if hard < needed {
        return Err(DriverError::OpenFiles { clients, needed, allowed: hard });
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard).map_err(limits("setrlimit"))
}

fn begin(target: SocketAddr, source: Option<SocketAddr>, transport: Transport) -> io::Result<Socket> {
    let (kind, protocol) = match transport {
        Transport::Tcp => (Type::STREAM, IpProtocol::TCP),
        Transport::Udp => (Type::DGRAM, IpProtocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(target), kind.nonblocking(), Some(protocol))?;
    if transport == Transport::Tcp {
        socket.set_tcp_nodelay(true)?;
    }
    if let Some(source) = source {
        socket.bind(&source.into())?;
    }
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

fn await_connected(socket: &Socket, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut descriptors = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut descriptors, timeout)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer to the connection attempt in time"));
    }
    match socket.take_error()? {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Clients {
    /// Starts to send, on a thread of its own.
    pub fn start(self) -> Result<Running, DriverError> {
        let failed = |what| move |source: io::Error| DriverError::EventLoop { what, source };
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(io::Error::from)
            .map_err(failed("eventfd"))?;
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), wake, progress: Progress::default() });
        let event_loop = EventLoop::new(self.load, self.protocol, self.connections, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new()
            .name("clients".to_owned())
            .spawn(move || event_loop.run())
            .map_err(failed("starting a thread"))?;
        Ok(Running { shared, thread: Some(thread) })
    }
}

/// What the driver's thread and its owner have in common.
struct Shared {
    stop: AtomicBool,
    wake: EventFd,
    progress: Progress,
}

/// Clients at work. Dropping it stops them without waiting for replies to be counted.
pub struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Timeline, DriverError>>>,
}

impl Running {
    /// Counts so far.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Whether the driver's thread has ended by itself, which only an error makes it do.
    pub fn has_failed(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Sends no further message, waits for replies at most [`Load::drain`], and returns what was seen.
    pub fn stop(mut self) -> Result<Timeline, DriverError> {
        self.signal();
        let thread = self.thread.take().expect("only `stop` and `drop` take the thread");
        thread.join().map_err(|_| DriverError::Panicked)?
    }

    fn signal(&self) {
        self.shared.stop.store(true, Ordering::Release);
        // It can only fail when the counter is full, and then the thread is woken anyway.
        let _ = self.shared.wake.write(1);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal();
    }
}
