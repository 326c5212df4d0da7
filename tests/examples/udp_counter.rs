//! A tiny UDP server for trying migrations: it answers each datagram with its first eight bytes and the number of
//! datagrams so far, so that a client sees every lost one, and whether the server is still the same.
//!
//!     udp_counter ADDRESS

use std::net::UdpSocket;

use nix::sys::socket::{setsockopt, sockopt};

/// For all that clients send while a migration takes its time: a replay is a burst.
const RECEIVE_BUFFER: usize = 4 << 20;

fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).ok_or(std::io::ErrorKind::InvalidInput)?;
    let socket = UdpSocket::bind(address)?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    let mut count = 0_u64;
    let mut buffer = [0; 16];
    loop {
        let (_, from) = socket.recv_from(&mut buffer)?;
        count += 1;
        buffer[8..].copy_from_slice(&count.to_be_bytes());
        // Who asked may have gone.
        let _ = socket.send_to(&buffer, from);
    }
}
