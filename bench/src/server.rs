//! A server of one thread with any number of TCP connections. What it answers is an [`Answers`]: [`Flip`] for the path
//! benchmark, `moves::server::Workload` for the one of migrations.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use crate::path::{LoadError, exchange};

/// Connections that may wait to be accepted; more than any client opens at once.
const BACKLOG: i32 = 4096;
const LISTENER: u64 = u64::MAX;

/// What a server answers.
pub trait Answers {
    /// What is kept of each connection.
    type Connection: Default;

    /// The answer to what a connection has brought, which may be a part of a request, or several of them.
    fn answer<'a>(&'a mut self, connection: &mut Self::Connection, received: &'a mut [u8]) -> &'a [u8];
}

/// Sends back what it receives, with every bit flipped.
#[derive(Clone, Copy, Debug)]
pub struct Flip;

impl Answers for Flip {
    type Connection = ();

    fn answer<'a>(&'a mut self, (): &mut (), received: &'a mut [u8]) -> &'a [u8] {
        exchange::answer(received);
        received
    }
}

/// A server that listens.
pub struct Server<A: Answers> {
    listener: TcpListener,
    epoll: Epoll,
    answers: A,
    /// The index is the event's number; a closed connection's place is used again.
    streams: Vec<Option<(TcpStream, A::Connection)>>,
    free: Vec<usize>,
    events: Vec<EpollEvent>,
    bytes: Vec<u8>,
}

impl<A: Answers> Server<A> {
    /// Listens at `address`.
    pub fn bind(address: SocketAddr, answers: A) -> Result<Self, LoadError> {
        let listener = listen(address).map_err(LoadError::io(format!("listen at {address}")))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(LoadError::io("make an epoll"))?;
        epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
            .map_err(LoadError::io("watch the listening socket"))?;
        let (streams, free) = (Vec::new(), Vec::new());
        let (events, bytes) = (vec![EpollEvent::empty(); 256], vec![0; 65536]);
        Ok(Server { listener, epoll, answers, streams, free, events, bytes })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr, LoadError> {
        self.listener.local_addr().map_err(LoadError::io("ask for the listening socket's address"))
    }

    /// What answers.
    pub fn answers(&mut self) -> &mut A {
        &mut self.answers
    }

    /// Answers until the process ends or something fails.
    pub fn run(&mut self) -> Result<(), LoadError> {
        loop {
            self.turn(EpollTimeout::NONE)?;
        }
    }

    /// Answers what is there; waits for it no longer than `timeout`.
    pub fn turn(&mut self, timeout: EpollTimeout) -> Result<(), LoadError> {
        let count = match self.epoll.wait(&mut self.events, timeout) {
            Err(nix::errno::Errno::EINTR) => 0,
            other => other.map_err(LoadError::io("wait for events"))?,
        };
        for index in 0..count {
            let place = self.events[index].data();
            if place == LISTENER {
                self.accept()?;
                continue;
            }
            let place = place as usize;
            let Some((stream, connection)) = self.streams[place].as_mut() else { continue };
            if !serve(stream, connection, &mut self.answers, &mut self.bytes) {
                // Closing takes it out of the epoll.
                self.streams[place] = None;
                self.free.push(place);
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> Result<(), LoadError> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // A client that gave up while it waited.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(LoadError::io("accept a connection")(error)),
            };
            stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true))
                .map_err(LoadError::io("set up an accepted connection"))?;
            let place = self.free.pop().unwrap_or_else(|| {
                self.streams.push(None);
                self.streams.len() - 1
            });
            self.epoll
                .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, place as u64))
                .map_err(LoadError::io("watch an accepted connection"))?;
            self.streams[place] = Some((stream, A::Connection::default()));
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Answers what is there; whether the connection is still up.
fn serve<A: Answers>(
    stream: &mut TcpStream,
    connection: &mut A::Connection,
    answers: &mut A,
    bytes: &mut [u8],
) -> bool {
    match stream.read(bytes) {
        Ok(0) => false,
        // A client waits for its answers before it asks again, so they always fit the send buffer.
        Ok(count) => stream.write_all(answers.answer(connection, &mut bytes[..count])).is_ok(),
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}
