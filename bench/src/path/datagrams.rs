//! UDP datagrams in one direction: one end sends them as fast as it can, the other counts those that arrive.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::processors::Busy;
use super::{LoadError, source};
use crate::clock::monotonic_ns;

/// In place of a number: the sender has ended.
const END: u64 = u64::MAX;
/// The end is said this often, since datagrams get lost.
const ENDS: u32 = 20;
const BETWEEN_ENDS: Duration = Duration::from_millis(10);
/// The clock is read once in so many datagrams.
const CLOCK_EVERY: u64 = 32;
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// What to send.
#[derive(Clone, Debug)]
pub struct Send {
    /// Where to.
    pub target: SocketAddr,
    /// Addresses to send from, in turn; none: the kernel chooses.
    pub sources: Vec<IpAddr>,
    /// Sockets, and so flows, that send in turn.
    pub flows: u32,
    /// Payload of a datagram, at least 8.
    pub bytes: usize,
    /// How long.
    pub duration: Duration,
}

/// What was sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// Datagrams that the kernel took.
    pub datagrams: u64,
    /// Datagrams that it refused (answered with "port unreachable", no buffers).
    pub refused: u64,
    /// Within this time.
    pub seconds: f64,
    /// What all processors together worked meanwhile, in seconds of one.
    pub busy_s: f64,
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Received {
    /// Datagrams with a number, each counted once.
    pub datagrams: u64,
    /// Numbers that came again.
    pub duplicates: u64,
    /// From the first to the last.
    pub seconds: f64,
}

impl Send {
    /// Sends, and tells the receiver that it was all.
    pub fn run(&self) -> Result<Sent, LoadError> {
        let sockets: Vec<_> =
            (0..self.flows.max(1)).map(|number| self.socket(number as usize)).collect::<Result<_, _>>()?;
        let mut bytes = vec![0x5a; self.bytes.max(8)];
        let (mut datagrams, mut refused) = (0, 0);
        let (busy, start) = (Busy::now()?, monotonic_ns());
        let limit = start + self.duration.as_nanos() as u64;
        let mut now = start;
        for number in 0u64.. {
            if number % CLOCK_EVERY == 0 {
                now = monotonic_ns();
                if now >= limit {
                    break;
                }
            }
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            match sockets[number as usize % sockets.len()].send(&bytes) {
                Ok(_) => datagrams += 1,
                Err(_) => refused += 1,
            }
        }
        let busy_s = Busy::now()?.seconds_since(busy);
        bytes[..8].copy_from_slice(&END.to_be_bytes());
        for _ in 0..ENDS {
            std::thread::sleep(BETWEEN_ENDS);
            // Those that are refused or lost are why there are several.
            let _ = sockets[0].send(&bytes);
        }
        Ok(Sent { datagrams, refused, seconds: (now - start) as f64 / 1e9, busy_s })
    }

    fn socket(&self, number: usize) -> Result<UdpSocket, LoadError> {
        let any: IpAddr = if self.target.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let from = source(&self.sources, number).unwrap_or(SocketAddr::new(any, 0));
        UdpSocket::bind(from)
            .and_then(|socket| socket.connect(self.target).map(|()| socket))
            .map_err(LoadError::io(format!("make a UDP socket from {from} to {}", self.target)))
    }
}

/// A socket that counts what arrives.
#[derive(Debug)]
pub struct Receiver(UdpSocket);

impl Receiver {
    /// Binds to `address`: from now on datagrams wait in the socket.
    pub fn bind(address: SocketAddr) -> Result<Receiver, LoadError> {
        let socket = UdpSocket::bind(address).map_err(LoadError::io(format!("bind to UDP {address}")))?;
        // Without the privilege the socket keeps the room that it has.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES);
        Ok(Receiver(socket))
    }

    /// Counts until the sender says that it has ended, or says nothing for `silence`.
    pub fn run(&self, silence: Duration) -> Result<Received, LoadError> {
        self.0.set_read_timeout(Some(silence)).map_err(LoadError::io("limit the wait for datagrams"))?;
        let mut numbers = Numbers::default();
        let mut bytes = [0; 65536];
        let (mut first, mut last) = (None, 0);
        loop {
            let count = match self.0.recv(&mut bytes) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(LoadError::io("receive a datagram")(error)),
            };
            let Some(number) = bytes[..count].first_chunk().map(|number| u64::from_be_bytes(*number)) else {
                continue;
            };
            if number == END {
                break;
            }
            if first.is_none() || numbers.count % CLOCK_EVERY == 0 {
                last = monotonic_ns();
                first.get_or_insert(last);
            }
            numbers.take(number);
        }
        let seconds = (last - first.unwrap_or(last)) as f64 / 1e9;
        Ok(Received { datagrams: numbers.count, duplicates: numbers.duplicates, seconds })
    }
}

/// Counts numbers in any order, each once: a bit for each.
#[derive(Debug, Default)]
struct Numbers {
    seen: Vec<u64>,
    count: u64,
    duplicates: u64,
}

/// Beyond it no number is believed: 128 MiB of bits, and an hour's datagrams.
const HIGHEST: u64 = 1 << 30;

impl Numbers {
    fn take(&mut self, number: u64) {
        if number > HIGHEST {
            return;
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.seen.len() {
            self.seen.resize((word + 1).next_power_of_two(), 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicates += 1;
            return;
        }
        self.seen[word] |= bit;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_counts_once_in_any_order() {
        let mut numbers = Numbers::default();
        [0, 1, 400, 2, 2, 3, 0, 9, HIGHEST + 1].into_iter().for_each(|number| numbers.take(number));
        assert_eq!((numbers.count, numbers.duplicates), (6, 2));
    }

    #[test]
    fn what_is_sent_is_received_over_loopback() {
        let receiver = Receiver::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let target = receiver.0.local_addr().unwrap();
        let (sources, duration) = (Vec::new(), Duration::from_millis(20));
        let sending =
            std::thread::spawn(move || Send { target, sources, flows: 3, bytes: 64, duration }.run());
        let received = receiver.run(Duration::from_secs(5)).unwrap();
        let sent = sending.join().unwrap().unwrap();
        assert!(received.datagrams > 0 && received.datagrams <= sent.datagrams, "{received:?} of {sent:?}");
        assert_eq!((received.duplicates, sent.refused), (0, 0));
    }
}
