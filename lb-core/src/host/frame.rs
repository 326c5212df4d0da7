//! Ethernet frames in vectors: building them with true checksums, and checking them again.

use std::net::{IpAddr, SocketAddr};
use std::vec::Vec;

use crate::checksum::fold;
use crate::decide::{TCP, UDP};
use crate::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, LINK_HEADER, Packet};

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(pub Vec<u8>);

impl Packet for Frame {
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]> {
        self.0.get_mut(offset..offset + N)?.try_into().ok()
    }

    fn length(&self) -> usize {
        self.0.len()
    }

    fn insert<const N: usize>(&mut self) -> Option<()> {
        self.0.splice(0..0, [0; N]);
        Some(())
    }

    fn truncate(&mut self, length: usize) -> Option<()> {
        self.0.truncate(length);
        Some(())
    }
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// A TCP segment with these flags.
    Tcp {
        /// RFC 9293's control bits, FIN lowest.
        flags: u8,
    },
    /// A UDP datagram.
    Udp {
        /// Without a checksum where false.
        checksum: bool,
    },
}

/// A frame to be built.
#[derive(Clone, Debug)]
pub struct FrameBuilder {
    /// Destination and source hardware address.
    pub link: ([u8; 6], [u8; 6]),
    /// Sender.
    pub source: SocketAddr,
    /// Receiver, of the same family.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Transport.
    pub segment: Segment,
    /// Payload.
    pub payload: Vec<u8>,
}

impl FrameBuilder {
    /// The frame, with its checksums.
    ///
    /// # Panics
    /// If the addresses are of different families.
    pub fn build(&self) -> Frame {
        let transport = self.transport();
        let protocol = match self.segment {
            Segment::Tcp { .. } => TCP,
            Segment::Udp { .. } => UDP,
        };
        let mut bytes = [self.link.0, self.link.1].concat();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = 20 + transport.len() as u16;
                let mut header = Vec::from([0x45, 0]);
                header.extend(total.to_be_bytes());
                header.extend([0, 1, 0x40, 0, self.ttl, protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                let checksum = sum(&[&header]);
                header[10..12].copy_from_slice(&checksum);
                bytes.extend(ETHER_TYPE_V4.to_be_bytes());
                bytes.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend(ETHER_TYPE_V6.to_be_bytes());
                bytes.extend([0x60, 0, 0, 0]);
                bytes.extend((transport.len() as u16).to_be_bytes());
                bytes.extend([protocol, self.ttl]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            families => panic!("no frame goes from one family to another: {families:?}"),
        }
        bytes.extend(transport);
        Frame(bytes)
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        let (protocol, at) = match self.segment {
            Segment::Tcp { flags } => {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
                (TCP, Some(16))
            }
            Segment::Udp { checksum } => {
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                (UDP, checksum.then_some(6))
            }
        };
        bytes.extend(&self.payload);
        if let Some(at) = at {
            let addresses = [octets(self.source.ip()), octets(self.destination.ip())].concat();
            let length = (bytes.len() as u16).to_be_bytes();
            let mut checksum = sum(&[&addresses, &length, &[0, protocol], &bytes]);
            if protocol == UDP && checksum == [0, 0] {
                checksum = [0xff, 0xff];
            }
            bytes[at..at + 2].copy_from_slice(&checksum);
        }
        bytes
    }
}

impl Frame {
    /// Whether every checksum of a well-formed frame of ours is right (a UDP one may be absent).
    pub fn has_true_checksums(&self) -> bool {
        let bytes = &self.0;
        let v4 = bytes[12..14] == ETHER_TYPE_V4.to_be_bytes();
        let (protocol, addresses, transport) =
            if v4 { (bytes[23], &bytes[26..34], 34) } else { (bytes[20], &bytes[22..54], 54) };
        if v4 && sum(&[&bytes[LINK_HEADER..34]]) != [0, 0] {
            return false;
        }
        let transport = &bytes[transport..];
        if protocol == UDP && transport[6..8] == [0, 0] {
            return true;
        }
        let length = (transport.len() as u16).to_be_bytes();
        sum(&[addresses, &length, &[0, protocol], transport]) == [0, 0]
    }

    /// Sender, receiver and TTL of a well-formed frame of ours.
    pub fn ends(&self) -> (SocketAddr, SocketAddr, u8) {
        let bytes = &self.0;
        let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        if bytes[12..14] == ETHER_TYPE_V4.to_be_bytes() {
            let address =
                |at: usize| IpAddr::from(<[u8; 4]>::try_from(&bytes[at..at + 4]).expect("four bytes"));
            ((address(26), port(34)).into(), (address(30), port(36)).into(), bytes[22])
        } else {
            let address =
                |at: usize| IpAddr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).expect("sixteen bytes"));
            ((address(22), port(54)).into(), (address(38), port(56)).into(), bytes[21])
        }
    }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

/// The Internet checksum (RFC 1071) over parts of which only the last may have an odd length.
pub(super) fn sum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let total = words.map(|word| u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]) as u64).sum();
    (!fold(total)).to_be_bytes()
}
