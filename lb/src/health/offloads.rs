//! What an interface leaves to hardware, by ethtool's system call.
#![expect(unsafe_code, reason = "ethtool's requests are a pointer in an ioctl")]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// A feature of an interface, as ethtool's request that sets it (linux/ethtool.h).
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub(super) enum Offload {
    /// Checksums of what is sent.
    TransmitChecksum = 0x17,
    /// Segmentation of what TCP sends.
    TcpSegmentation = 0x1f,
    /// Segmentation of the rest.
    Segmentation = 0x24,
    /// Joining of what is received.
    Receive = 0x2c,
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    request: u32,
    data: u32,
}

/// Switches an offload of an interface of the calling thread's network namespace.
pub(super) fn set(interface: &str, offload: Offload, on: bool) -> io::Result<()> {
    // Any socket will do: it says which namespace is meant.
    let socket = UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| UdpSocket::bind(("::1", 0)))?;
    let mut value = Value { request: offload as u32, data: u32::from(on) };
    // SAFETY: zeroes are a valid ifreq: a name of no letters and a null pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.as_bytes();
    // One zero stays behind the name.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request's pointer leads to a `struct ethtool_value`, which is what these requests take, and both
    // outlive the call.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
