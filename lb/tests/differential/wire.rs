//! Packets as bytes, with true checksums, written without the core's help.

use std::net::{IpAddr, SocketAddr};

pub const ICMP4: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP6: u8 = 58;

/// Destination and source hardware address.
pub type LinkAddresses = [u8; 12];

/// What an IP header has beside the usual.
#[derive(Clone, Copy, Debug)]
pub enum Extra {
    None,
    /// IPv4 options of so many words; IPv6: an extension header of this kind.
    Options {
        words: u8,
        kind: u8,
    },
    /// A part of a datagram.
    Fragment {
        offset: u16,
        more: bool,
    },
}

/// An IP packet to be built around its payload.
#[derive(Clone, Debug)]
pub struct Ip {
    pub link: LinkAddresses,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ttl: u8,
    pub class: u8,
    pub id: u32,
    pub may_fragment: bool,
    pub extra: Extra,
    pub protocol: u8,
}

impl Ip {
    /// The frame.
    pub fn build(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = self.link.to_vec();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let options = if let Extra::Options { words, .. } = self.extra { words } else { 0 };
                let fragment = match self.extra {
                    Extra::Fragment { offset, more } => (offset / 8) | (u16::from(more) << 13),
                    _ => u16::from(!self.may_fragment) << 14,
                };
                let length = 20 + 4 * u16::from(options) + payload.len() as u16;
                let mut header = vec![0x45 + options, self.class];
                header.extend(length.to_be_bytes());
                header.extend((self.id as u16).to_be_bytes());
                header.extend(fragment.to_be_bytes());
                header.extend([self.ttl, self.protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(vec![1; 4 * usize::from(options)]);
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum);
                bytes.extend([8, 0]);
                bytes.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let (next, extension) = self.extension();
                bytes.extend([0x86, 0xdd, 0x60 | self.class >> 4, self.class << 4, 0, 0]);
                bytes.extend(((extension.len() + payload.len()) as u16).to_be_bytes());
                bytes.extend([next, self.ttl]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(extension);
            }
            families => panic!("no packet goes from one family to another: {families:?}"),
        }
        bytes.extend(payload);
        bytes
    }

    fn extension(&self) -> (u8, Vec<u8>) {
        match self.extra {
            Extra::None => (self.protocol, Vec::new()),
            Extra::Options { words, kind } => {
                let mut header = vec![0; 8 * (1 + usize::from(words / 2))];
                header[0] = self.protocol;
                header[1] = words / 2;
                (kind, header)
            }
            Extra::Fragment { offset, more } => {
                let mut header = vec![self.protocol, 0];
                header.extend((offset & !7 | u16::from(more)).to_be_bytes());
                header.extend(self.id.to_be_bytes());
                (44, header)
            }
        }
    }
}

/// A TCP segment.
pub fn tcp(
    ends: (SocketAddr, SocketAddr),
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = ports(ends);
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledgement.to_be_bytes());
    bytes.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(payload);
    let sum = transport_checksum(ends, TCP, &bytes);
    bytes[16..18].copy_from_slice(&sum);
    bytes
}

/// A UDP datagram, with a checksum or without.
pub fn udp(ends: (SocketAddr, SocketAddr), with_checksum: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = ports(ends);
    bytes.extend((8 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    if with_checksum {
        let sum = transport_checksum(ends, UDP, &bytes);
        bytes[6..8].copy_from_slice(&if sum == [0, 0] { [0xff, 0xff] } else { sum });
    }
    bytes
}

/// An ICMP message.
pub fn icmp(source: IpAddr, destination: IpAddr, kind: [u8; 2], rest: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind[0], kind[1], 0, 0];
    bytes.extend(rest.to_be_bytes());
    bytes.extend(body);
    let sum = if source.is_ipv4() {
        checksum(&[&bytes])
    } else {
        transport_checksum(((source, 0).into(), (destination, 0).into()), ICMP6, &bytes)
    };
    bytes[2..4].copy_from_slice(&sum);
    bytes
}

fn ports((source, destination): (SocketAddr, SocketAddr)) -> Vec<u8> {
    [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat()
}

fn transport_checksum(
    (source, destination): (SocketAddr, SocketAddr),
    protocol: u8,
    bytes: &[u8],
) -> [u8; 2] {
    let addresses = [octets(source.ip()), octets(destination.ip())].concat();
    checksum(&[&addresses, &(bytes.len() as u16).to_be_bytes(), &[0, protocol], bytes])
}

/// An address's bytes.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

/// The Internet checksum (RFC 1071) over parts of which only the last may have an odd length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u64 =
        words.map(|word| u64::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
