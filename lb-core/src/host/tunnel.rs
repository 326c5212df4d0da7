//! Both ends of a tunnel on the host: putting a frame into another packet, and taking it out again.

use core::cell::Cell;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::vec::Vec;

use super::frame::{Frame, octets, sum};
use crate::decapsulate::{Address, IPV4, IPV6, Reason, Tunnels, Verdict, decapsulate, move_link_header};
use crate::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, LINK_HEADER};

/// The outer header of a frame to be encapsulated.
#[derive(Clone, Debug)]
pub struct Outer {
    /// The sender's end.
    pub source: IpAddr,
    /// The receiver's end, of the same family.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP and congestion mark.
    pub traffic_class: u8,
}

impl Outer {
    /// An outer header as it is on most packets.
    pub fn new(source: IpAddr, destination: IpAddr) -> Self {
        Self { source, destination, ttl: 64, traffic_class: 0 }
    }

    /// The frame with this header before its IP packet, its checksum true.
    ///
    /// # Panics
    /// If the frame is no IP packet, or the addresses are of different families.
    pub fn encapsulate(&self, frame: &Frame) -> Frame {
        let (link, inner) = frame.0.split_at(LINK_HEADER);
        let protocol = match u16::from_be_bytes([link[12], link[13]]) {
            ETHER_TYPE_V4 => IPV4,
            ETHER_TYPE_V6 => IPV6,
            other => panic!("EtherType {other:#x} is no IP packet"),
        };
        let length = inner.len() as u16;
        let (ether_type, header) = match (self.source, self.destination) {
            (IpAddr::V4(_), IpAddr::V4(_)) => (ETHER_TYPE_V4, self.v4(protocol, length)),
            (IpAddr::V6(_), IpAddr::V6(_)) => (ETHER_TYPE_V6, self.v6(protocol, length)),
            families => panic!("no tunnel leads from one family to another: {families:?}"),
        };
        Frame([&link[..12], &ether_type.to_be_bytes(), &header, inner].concat())
    }

    fn v4(&self, protocol: u8, payload: u16) -> Vec<u8> {
        let mut header = Vec::from([0x45, self.traffic_class]);
        header.extend((20 + payload).to_be_bytes());
        header.extend([0, 0, 0x40, 0, self.ttl, protocol, 0, 0]);
        header.extend(octets(self.source));
        header.extend(octets(self.destination));
        let checksum = sum(&[&header]);
        header[10..12].copy_from_slice(&checksum);
        header
    }

    fn v6(&self, protocol: u8, payload: u16) -> Vec<u8> {
        let mut header = Vec::from([0x60 | self.traffic_class >> 4, self.traffic_class << 4, 0, 0]);
        header.extend(payload.to_be_bytes());
        header.extend([protocol, self.ttl]);
        header.extend(octets(self.source));
        header.extend(octets(self.destination));
        header
    }
}

/// A tunnel's end in ordinary memory.
#[derive(Debug, Default)]
pub struct HostTunnels {
    /// See [`Tunnels::is_endpoint`].
    pub endpoints: BTreeSet<IpAddr>,
    /// See [`Tunnels::may_send`].
    pub sources: BTreeSet<IpAddr>,
    /// See [`Tunnels::is_destination`].
    pub destinations: BTreeSet<IpAddr>,
    counters: [Cell<u64>; Reason::ALL.len()],
}

impl HostTunnels {
    /// How often a reason was counted.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.counters[reason as usize].get()
    }

    /// What the kernel's program does to a frame.
    pub fn process(&self, frame: &mut Frame) -> Verdict {
        let verdict = decapsulate(frame, self);
        if let Verdict::Strip(strip) = verdict {
            move_link_header(frame, strip.encapsulation).expect("the inner header is behind both places");
            frame.0.drain(..strip.encapsulation.outer_header());
        }
        verdict
    }
}

impl Tunnels for HostTunnels {
    fn is_endpoint(&self, address: &Address) -> bool {
        self.endpoints.contains(&readable(address))
    }

    fn may_send(&self, address: &Address) -> bool {
        self.sources.contains(&readable(address))
    }

    fn is_destination(&self, address: &Address) -> bool {
        self.destinations.contains(&readable(address))
    }

    fn count(&self, reason: Reason) {
        let counter = &self.counters[reason as usize];
        counter.set(counter.get() + 1);
    }
}

/// An address of the tables.
fn readable(address: &Address) -> IpAddr {
    let mut octets = [0; 16];
    for (i, word) in address.iter().enumerate() {
        octets[4 * i..4 * i + 4].copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(octets).to_canonical()
}
