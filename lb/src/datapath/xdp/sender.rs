//! Sends frames out of an interface, past its queueing discipline (packet(7)).
#![expect(unsafe_code, reason = "sendmmsg takes raw vectors; no safe wrapper sends without an address")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use socket2::{Domain, Protocol, Socket, Type};

/// Frames per system call. Each takes up to 15 us where its receiver is on this machine, and the kernel lets no other
/// thread run in between.
pub const BATCH: usize = 16;

/// Frames per system call while so many wait that these are a small part.
pub const LONG_BATCH: usize = 64;

/// A packet socket bound to an interface.
pub struct Sender {
    socket: OwnedFd,
}

impl Sender {
    /// Opens the socket on an interface by index.
    pub fn new(interface: u32) -> io::Result<Self> {
        // Protocol 0: nothing is received.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        let bypass: libc::c_int = 1;
        // SAFETY: the option is an int and the pointer is to one.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const bypass).cast(),
                size_of_val(&bypass) as libc::socklen_t,
            )
        })?;
        // A replay is a burst; with the default buffer most of it would be ENOBUFS. Best effort without
        // CAP_NET_ADMIN.
        let _ = socket.set_send_buffer_size(8 << 20);
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = interface as i32;
        // SAFETY: the address is a sockaddr_ll of this size.
        check(unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        })?;
        Ok(Self { socket: socket.into() })
    }

    /// Sends the first frames, [`LONG_BATCH`] at most, without waiting; how many went out.
    ///
    /// # Errors
    /// `WouldBlock` and `ENOBUFS` pass by themselves; try again soon.
    pub fn send<'f>(&self, frames: impl Iterator<Item = &'f mut [u8]>) -> io::Result<usize> {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; LONG_BATCH];
        let mut count = 0;
        for (vector, frame) in vectors.iter_mut().zip(frames) {
            *vector = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
            count += 1;
        }
        // SAFETY: all-zero is a valid mmsghdr.
        let mut messages: [libc::mmsghdr; LONG_BATCH] = unsafe { std::mem::zeroed() };
        for (message, vector) in messages.iter_mut().zip(&mut vectors[..count]) {
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: `count` headers, each with one vector over a frame that outlives the call.
        let sent = check(unsafe {
            libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), count as u32, libc::MSG_DONTWAIT)
        })?;
        Ok(sent as usize)
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
