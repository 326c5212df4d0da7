//! The server: one thread, any number of TCP connections, and all that it does is flip bits.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use super::{LoadError, exchange};

/// Connections that may wait to be accepted; more than any client opens at once.
const BACKLOG: i32 = 4096;
const LISTENER: u64 = u64::MAX;

/// A server that listens and has not begun to answer.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    epoll: Epoll,
}

impl Server {
    /// Listens at `address`.
    pub fn bind(address: SocketAddr) -> Result<Server, LoadError> {
        let listener = listen(address).map_err(LoadError::io(format!("listen at {address}")))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(LoadError::io("make an epoll"))?;
        epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
            .map_err(LoadError::io("watch the listening socket"))?;
        Ok(Server { listener, epoll })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr, LoadError> {
        self.listener.local_addr().map_err(LoadError::io("ask for the listening socket's address"))
    }

    /// Answers until the process ends or something fails.
    pub fn run(&self) -> Result<(), LoadError> {
        // The index is the event's number; a closed connection's place is used again.
        let mut streams: Vec<Option<TcpStream>> = Vec::new();
        let mut free = Vec::new();
        let mut events = vec![EpollEvent::empty(); 256];
        let mut bytes = vec![0; 65536];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.map_err(LoadError::io("wait for events"))?,
            };
            for event in &events[..count] {
                if event.data() == LISTENER {
                    self.accept(&mut streams, &mut free)?;
                    continue;
                }
                let place = event.data() as usize;
                let Some(stream) = streams[place].as_mut() else { continue };
                if !serve(stream, &mut bytes) {
                    // Closing takes it out of the epoll.
                    streams[place] = None;
                    free.push(place);
                }
            }
        }
    }

    fn accept(&self, streams: &mut Vec<Option<TcpStream>>, free: &mut Vec<usize>) -> Result<(), LoadError> {
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
            let place = free.pop().unwrap_or_else(|| {
                streams.push(None);
                streams.len() - 1
            });
            self.epoll
                .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, place as u64))
                .map_err(LoadError::io("watch an accepted connection"))?;
            streams[place] = Some(stream);
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
fn serve(stream: &mut TcpStream, bytes: &mut [u8]) -> bool {
    match stream.read(bytes) {
        Ok(0) => false,
        Ok(count) => {
            exchange::answer(&mut bytes[..count]);
            // A client waits for its answers before it asks again, so they always fit the send buffer.
            stream.write_all(&bytes[..count]).is_ok()
        }
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}
