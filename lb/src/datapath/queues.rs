//! What waits for a backend: the packets of flows that it has, and behind them those that open connections.
//!
//! A flow of which a SYN waits sends nothing else before the answer, so that no flow's order is changed; and those whose
//! connections live do not wait for the ones that came while handshakes were being finished.

use std::time::Instant;

use lb_core::Mode;

use super::HoldLimits;
use super::held::HeldFrame;
use super::queue::{HoldQueue, QueueCounts};
use super::segment::opens;

/// New connections have this part of a backend's bytes: whoever only sends SYNs takes no room of those who are there.
const PART_OF_NEW: usize = 8;

/// Both queues of a backend.
#[derive(Debug)]
pub struct HoldQueues {
    known: HoldQueue,
    new: HoldQueue,
    max_bytes: usize,
    /// New connections have come, and have their part.
    is_parted: bool,
}

impl HoldQueues {
    /// Empty ones, which have these limits together.
    pub fn new(limits: HoldLimits) -> Self {
        Self {
            known: HoldQueue::new(limits),
            new: HoldQueue::new(HoldLimits { max_bytes: 0, ..limits }),
            max_bytes: limits.max_bytes,
            is_parted: false,
        }
    }

    /// Gives new connections their part, or what is left of it.
    fn part(&mut self) {
        let new = (self.max_bytes / PART_OF_NEW).min(self.max_bytes - self.known.bytes());
        self.known.set_max_bytes(self.max_bytes - new);
        self.new.set_max_bytes(new);
        self.is_parted = true;
    }

    /// Puts a frame of a service of this mode in, or drops it or older ones as the limits say.
    pub fn push(&mut self, now: Instant, frame: &[u8], mode: Mode) {
        let is_new = opens(frame);
        if is_new && !self.is_parted {
            self.part();
        }
        let queue = if is_new { &mut self.new } else { &mut self.known };
        queue.push(now, frame, mode);
    }

    /// Drops what is older than the limit.
    pub fn expire(&mut self, now: Instant) {
        self.known.expire(now);
        self.new.expire(now);
    }

    /// At most `most` frames that are to be sent next.
    pub fn first(&mut self, most: usize) -> impl Iterator<Item = &mut HeldFrame> {
        self.next().first(most)
    }

    /// Forgets the first `sent` of those that are next.
    pub fn sent(&mut self, sent: usize) {
        self.next().sent(sent);
    }

    fn next(&mut self) -> &mut HoldQueue {
        if self.known.is_empty() { &mut self.new } else { &mut self.known }
    }

    /// Frames waiting.
    pub fn len(&self) -> usize {
        self.known.len() + self.new.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What both have taken and given up so far.
    pub fn counts(&self) -> QueueCounts {
        self.known.counts() + self.new.counts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::Overflow;
    use lb_core::host::{FrameBuilder, Segment};
    use std::time::Duration;

    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    fn frame(port: u16, flags: u8) -> Vec<u8> {
        let frame = FrameBuilder {
            link: ([0; 6], [0; 6]),
            source: std::net::SocketAddr::from(([10, 0, 0, 1], port)),
            destination: "10.0.0.100:80".parse().unwrap(),
            ttl: 64,
            segment: Segment::Tcp { flags },
            payload: Vec::new(),
        };
        frame.build().0
    }

    fn limits(max_bytes: usize) -> HoldLimits {
        HoldLimits { max_bytes, max_age: Duration::from_secs(1), overflow: Overflow::DropNewest }
    }

    #[test]
    fn new_connections_come_after_those_that_are_there() {
        let mut queues = HoldQueues::new(limits(1 << 16));
        let now = Instant::now();
        for (port, flags) in [(1, SYN), (2, SYN), (3, ACK), (4, ACK | SYN)] {
            queues.push(now, &frame(port, flags), Mode::Nat);
        }
        let mut ports = Vec::new();
        while !queues.is_empty() {
            let first: Vec<_> = queues.first(1).map(|held| held.frame()[34..36].to_vec()).collect();
            ports.extend(first.iter().map(|port| u16::from_be_bytes([port[0], port[1]])));
            queues.sent(1);
        }
        assert_eq!(ports, [3, 4, 1, 2]);
        assert_eq!(queues.counts().held_packets, 4);
    }

    #[test]
    fn where_nobody_is_new_all_the_room_is_for_those_that_are_there() {
        let (now, one) = (Instant::now(), frame(1, ACK));
        let mut queues = HoldQueues::new(limits(10 * one.len()));
        for port in 1..=10 {
            queues.push(now, &frame(port, ACK), Mode::Nat);
        }
        assert_eq!((queues.len(), queues.counts().overflow), (10, 0));
        // Nothing is left for who comes now.
        queues.push(now, &frame(11, SYN), Mode::Nat);
        assert_eq!((queues.len(), queues.counts().overflow), (10, 1));
    }

    #[test]
    fn a_flood_of_new_connections_takes_no_room_of_those_that_are_there() {
        let mut queues = HoldQueues::new(limits(1 << 16));
        let now = Instant::now();
        for port in 1..2000 {
            queues.push(now, &frame(port, SYN), Mode::Nat);
        }
        let dropped = queues.counts().overflow;
        assert!(dropped > 1000, "{dropped}");
        queues.push(now, &frame(1, ACK), Mode::Nat);
        assert_eq!(queues.counts().overflow, dropped);
    }
}
