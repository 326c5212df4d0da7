//! What differs between IPv4 (RFC 791) and IPv6 (RFC 8200): where things lie. Zero-sized types, so that the
//! compiler makes one straight path for each from the same source.

use crate::checksum::update;
use crate::packet::{LINK_HEADER, Packet, read16, read32, write16, write32};
use crate::reason::Reason;
use crate::record::Flow;

/// What the data path needs to know from an IP header.
pub struct IpHeader<const W: usize> {
    /// Source address.
    pub source: [u32; W],
    /// Destination address.
    pub destination: [u32; W],
    /// IP protocol number of the transport header that follows.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
}

/// An address family with addresses of `W` words.
pub trait Family<const W: usize>: Copy {
    /// Where the transport header starts in the frame.
    const TRANSPORT: usize;

    /// Reads the IP header, or says why the packet is none of ours.
    fn parse<P: Packet>(self, packet: &mut P) -> Result<IpHeader<W>, Reason>;

    /// Writes the flow's addresses, counts the TTL down and mends the header's checksum.
    fn rewrite<P: Packet>(self, packet: &mut P, flow: &Flow<W>) -> Option<()>;

    /// A backend's address in this family.
    fn narrow(self, address: &[u32; 4]) -> [u32; W];
}

/// IPv4 without options.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IPv6 without extension headers.
#[derive(Clone, Copy, Debug)]
pub struct V6;

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;

impl Family<1> for V4 {
    const TRANSPORT: usize = LINK_HEADER + V4_HEADER;

    #[inline(always)]
    fn parse<P: Packet>(self, packet: &mut P) -> Result<IpHeader<1>, Reason> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER).ok_or(Reason::Truncated)?;
        if header[0] != 0x45 {
            return Err(Reason::IpOptions);
        }
        // More-fragments bit or a fragment offset.
        if read16(header, 6) & 0x3fff_u16.to_be() != 0 {
            return Err(Reason::Fragment);
        }
        Ok(IpHeader {
            source: [read32(header, 12)],
            destination: [read32(header, 16)],
            protocol: header[9],
            ttl: header[8],
        })
    }

    #[inline(always)]
    fn rewrite<P: Packet>(self, packet: &mut P, flow: &Flow<1>) -> Option<()> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER)?;
        header[8] = header[8].wrapping_sub(1);
        let one_hop = u16::from_ne_bytes([1, 0]);
        let checksum = update(update(read16(header, 10), flow.address_delta), !one_hop);
        write16(header, 10, checksum);
        write32(header, 12, flow.source[0]);
        write32(header, 16, flow.destination[0]);
        Some(())
    }

    #[inline(always)]
    fn narrow(self, address: &[u32; 4]) -> [u32; 1] {
        [address[3]]
    }
}

impl Family<4> for V6 {
    const TRANSPORT: usize = LINK_HEADER + V6_HEADER;

    #[inline(always)]
    fn parse<P: Packet>(self, packet: &mut P) -> Result<IpHeader<4>, Reason> {
        let header = packet.window::<V6_HEADER>(LINK_HEADER).ok_or(Reason::Truncated)?;
        if header[0] >> 4 != 6 {
            return Err(Reason::NotIp);
        }
        Ok(IpHeader {
            source: [read32(header, 8), read32(header, 12), read32(header, 16), read32(header, 20)],
            destination: [read32(header, 24), read32(header, 28), read32(header, 32), read32(header, 36)],
            protocol: header[6],
            ttl: header[7],
        })
    }

    #[inline(always)]
    fn rewrite<P: Packet>(self, packet: &mut P, flow: &Flow<4>) -> Option<()> {
        let header = packet.window::<V6_HEADER>(LINK_HEADER)?;
        header[7] = header[7].wrapping_sub(1);
        let mut i = 0;
        while i < 4 {
            write32(header, 8 + 4 * i, flow.source[i]);
            write32(header, 24 + 4 * i, flow.destination[i]);
            i += 1;
        }
        Some(())
    }

    #[inline(always)]
    fn narrow(self, address: &[u32; 4]) -> [u32; 4] {
        *address
    }
}
