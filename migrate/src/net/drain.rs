//! Watching the queues that a checkpoint does not hold: connections that wait to be accepted (CRIU refuses
//! to dump them) and datagrams that wait to be read (CRIU loses them).
//!
//! Bytes in the receive queue of an accepted connection are in the checkpoint and need no draining.
//!
//! The workload's own sockets are asked, by way of duplicates: `/proc/net/tcp` would cost milliseconds, in
//! which clients wait, since the kernel walks its whole table of connections for it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use std::os::fd::AsRawFd;

use crate::workload::processes;

/// Between two looks; the server needs a moment of the processor to read.
const PAUSE: Duration = Duration::from_micros(100);
/// A server that does not read its queues for this long will not.
pub const LIMIT: Duration = Duration::from_millis(1000);

/// Why the queues are not empty.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// The sockets cannot be asked.
    #[error("the workload's sockets cannot be asked whether anything waits in them")]
    Poll(#[from] Errno),
    /// The server does not read.
    #[error(
        "the server left connections not accepted or datagrams unread on {sockets} of its sockets for \
         {LIMIT:?}: it is overloaded or stuck, try again later"
    )]
    Full {
        /// How many sockets.
        sockets: usize,
    },
}

/// Duplicates of the sockets in which something may wait. They keep the sockets alive, so they have to be
/// dropped before the workload is killed.
#[derive(Debug)]
pub struct Queues(Vec<OwnedFd>);

impl Queues {
    /// Of these processes.
    pub fn of(pids: &[i32]) -> Self {
        Self(pids.iter().flat_map(|pid| processes::sockets(*pid)).filter(can_wait).collect())
    }

    /// Waits for `settle` and then until nothing waits in any of them. Blocks the thread, since the
    /// runtime's timer is too coarse for times that clients feel.
    pub fn drain(&self, settle: Duration) -> Result<(), DrainError> {
        std::thread::sleep(settle);
        let until = Instant::now() + LIMIT;
        loop {
            let sockets = self.waiting()?;
            if sockets == 0 {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(DrainError::Full { sockets });
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// True if nothing waits in any of them now.
    pub fn are_empty(&self) -> bool {
        matches!(self.waiting(), Ok(0))
    }

    /// In how many sockets something waits.
    fn waiting(&self) -> Result<usize, Errno> {
        let mut fds: Vec<_> = self.0.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut fds, PollTimeout::ZERO)?;
        let readable =
            |fd: &&PollFd<'_>| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
        Ok(fds.iter().filter(readable).count())
    }
}

/// True for listening and datagram sockets of the internet families.
fn can_wait(socket: &OwnedFd) -> bool {
    let family = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok().and_then(|name| name.family());
    if !matches!(family, Some(AddressFamily::Inet | AddressFamily::Inet6)) {
        return false;
    }
    match getsockopt(socket, sockopt::SockType) {
        Ok(SockType::Stream) => getsockopt(socket, sockopt::AcceptConn).unwrap_or(false),
        Ok(SockType::Datagram) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mine() -> Queues {
        Queues::of(&[i32::try_from(std::process::id()).unwrap()])
    }

    /// Tests run in one process and see each other's sockets, so this one looks at its own only.
    fn only(queues: Queues, port: u16) -> Queues {
        let has_port = |fd: &OwnedFd| {
            let name = getsockname::<SockaddrStorage>(fd.as_raw_fd()).unwrap();
            name.as_sockaddr_in().is_some_and(|name| name.port() == port)
        };
        Queues(queues.0.into_iter().filter(has_port).collect())
    }

    #[test]
    fn a_datagram_that_nobody_reads_is_seen() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let queues = only(mine(), address.port());
        assert_eq!(queues.0.len(), 1);
        queues.drain(Duration::ZERO).unwrap();
        socket.send_to(b"", address).unwrap();
        let error = queues.drain(Duration::ZERO).unwrap_err();
        assert!(matches!(error, DrainError::Full { sockets: 1 }), "{error}");
        socket.recv(&mut [0; 9]).unwrap();
        queues.drain(Duration::ZERO).unwrap();
    }

    #[test]
    fn a_connection_that_nobody_accepts_is_seen_until_it_is_accepted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let queues = only(mine(), address.port());
        let mut client = std::net::TcpStream::connect(address).unwrap();
        assert_eq!(queues.waiting().unwrap(), 1);
        let _accepted = listener.accept().unwrap();
        // What waits in an accepted connection is in the checkpoint.
        std::io::Write::write_all(&mut client, b"x").unwrap();
        queues.drain(Duration::ZERO).unwrap();
        drop(queues);
        let accepted_too = only(mine(), address.port());
        assert_eq!(accepted_too.0.len(), 1, "an accepted connection needs no draining");
    }
}
