//! The packets: a template, and from it each client's packet, byte by byte as the wrapper makes it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_core::checksum::{fold, update};
use lb_core::host::{Frame, FrameBuilder, Segment};

use super::case::{Family, Protocol};

/// TCP's control bits (RFC 9293, section 3.1).
pub const SYN: u8 = 0x02;
/// A SYN's answer.
pub const SYN_ACK: u8 = 0x12;
/// A segment of an established connection.
pub const ACK: u8 = 0x10;

/// Bytes of every frame: all headers, room for one more, and a little payload.
const LENGTH: usize = 96;

/// Hardware addresses of the load balancer and of the clients' router.
const LB: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Where clients connect to.
pub fn service(family: Family) -> SocketAddr {
    match family {
        Family::V4 => (Ipv4Addr::new(10, 200, 0, 1), 80).into(),
        Family::V6 => (Ipv6Addr::new(0xfd00, 200, 0, 0, 0, 0, 0, 1), 80).into(),
    }
}

/// Which clients: those of established flows, or others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Whose flows are established.
    Known = 1,
    /// Who have no flow.
    Strangers = 2,
}

/// The address of a client.
pub fn client(family: Family, clients: Clients, number: u32) -> SocketAddr {
    let address = match family {
        Family::V4 => IpAddr::from([10, 64, clients as u8, (number >> 14) as u8]),
        Family::V6 => {
            let low = (clients as u16) << 8 | (number >> 14) as u16;
            Ipv6Addr::new(0xfd00, 64, 0, 0, 0, 0, 0, low).into()
        }
    };
    (address, 0x4000 | number as u16 & 0x3fff).into()
}

/// A packet of client 0, of which each other client's is made.
#[derive(Clone, Debug)]
pub struct Template {
    frame: Frame,
    layout: Layout,
}

/// Where the bytes lie that tell clients apart, and those that keep the checksums true (as in the wrapper).
#[derive(Clone, Copy, Debug)]
struct Layout {
    address: usize,
    port: usize,
    spare: usize,
    identification: Option<usize>,
    /// The transport checksum.
    checksum: usize,
}

fn layout(family: Family, protocol: Protocol) -> Layout {
    let (address, transport, identification) = match family {
        Family::V4 => (28, 34, Some(18)),
        Family::V6 => (36, 54, None),
    };
    // TCP: the sequence number; UDP: the first bytes of the payload.
    let (spare, checksum) = match protocol {
        Protocol::Tcp => (transport + 4, transport + 16),
        Protocol::Udp => (transport + 8, transport + 6),
    };
    Layout { address, port: transport, spare, identification, checksum }
}

impl Template {
    /// Packets of these clients to the service; `flags` are for TCP.
    pub fn new(family: Family, protocol: Protocol, clients: Clients, flags: u8) -> Self {
        let headers = match (family, protocol) {
            (Family::V4, Protocol::Tcp) => 54,
            (Family::V4, Protocol::Udp) => 42,
            (Family::V6, Protocol::Tcp) => 74,
            (Family::V6, Protocol::Udp) => 62,
        };
        let frame = FrameBuilder {
            link: (LB, ROUTER),
            source: client(family, clients, 0),
            destination: service(family),
            ttl: 64,
            segment: segment(protocol, flags),
            payload: vec![0; LENGTH - headers],
        };
        let mut template = Self { frame: frame.build(), layout: layout(family, protocol) };
        template.spare_words();
        template
    }

    /// Writes the words that every client's packet changes together with its address and port, and mends the
    /// checksums for once and all.
    fn spare_words(&mut self) {
        let Layout { address, port, spare, identification, checksum } = self.layout;
        let (address, port) = (self.word(address), self.word(port));
        self.replace(spare, !port, checksum);
        self.replace(spare + 2, !address, checksum);
        if let Some(identification) = identification {
            let header_checksum = identification + 6;
            self.replace(identification, !address, header_checksum);
        }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.frame.0[at], self.frame.0[at + 1]])
    }

    fn put(&mut self, at: usize, word: u16) {
        self.frame.0[at..at + 2].copy_from_slice(&word.to_be_bytes());
    }

    fn replace(&mut self, at: usize, word: u16, checksum: usize) {
        let delta = fold(u64::from(!self.word(at)) + u64::from(word));
        let mended = update(self.word(checksum), delta);
        self.put(at, word);
        self.put(checksum, mended);
    }

    /// The packet of client 0.
    pub fn bytes(&self) -> &[u8] {
        &self.frame.0
    }

    /// Makes it the packet of a client.
    pub fn of(&mut self, number: u32) -> &[u8] {
        let Layout { address, port, spare, identification, .. } = self.layout;
        let client_port = 0x4000 | number as u16 & 0x3fff;
        let low = u16::from_be_bytes([self.frame.0[address], (number >> 14) as u8]);
        self.put(port, client_port);
        self.put(spare, !client_port);
        self.put(address, low);
        self.put(spare + 2, !low);
        if let Some(identification) = identification {
            self.put(identification, !low);
        }
        &self.frame.0
    }
}

/// A packet from one end to the other, with the least payload.
pub fn packet(
    link: ([u8; 6], [u8; 6]),
    ends: (SocketAddr, SocketAddr),
    protocol: Protocol,
    flags: u8,
) -> Frame {
    let (source, destination) = ends;
    let segment = segment(protocol, flags);
    FrameBuilder { link, source, destination, ttl: 64, segment, payload: vec![0; 32] }.build()
}

fn segment(protocol: Protocol, flags: u8) -> Segment {
    match protocol {
        Protocol::Tcp => Segment::Tcp { flags },
        Protocol::Udp => Segment::Udp { checksum: true },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_clients_packet_has_its_address_and_true_checksums() {
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                let mut template = Template::new(family, protocol, Clients::Strangers, ACK);
                for number in [0, 1, 0x3fff, 0x4000, 0x12345, 0xfffff] {
                    let frame = Frame(template.of(number).to_vec());
                    assert!(frame.has_true_checksums(), "{family:?} {protocol:?} {number}");
                    assert_eq!(frame.0.len(), LENGTH);
                    let (source, destination, _) = frame.ends();
                    assert_eq!(source, client(family, Clients::Strangers, number));
                    assert_eq!(destination, service(family));
                }
            }
        }
    }
}
