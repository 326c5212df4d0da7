//! What differs between IPv4 (RFC 791) and IPv6 (RFC 8200): where things lie. Zero-sized types, so that the
//! compiler makes one straight path for each from the same source.

use crate::checksum::update;
use crate::packet::{LINK_HEADER, Packet, read16, read32, write16, write32};
use crate::reason::Reason;

/// What the data path needs to know from an IP header.
#[derive(Clone, Copy, Debug)]
pub struct IpHeader<const W: usize> {
    /// Source address.
    pub source: [u32; W],
    /// Destination address.
    pub destination: [u32; W],
    /// IP protocol number of the header that follows.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether it is a part of a datagram, which is for [`Family::fragment`] to say more about.
    pub is_fragment: bool,
}

/// Which part of a fragmented datagram a packet is.
#[derive(Clone, Copy, Debug)]
pub struct Fragment {
    /// What the datagram's fragments have in common beside addresses and protocol.
    pub id: u32,
    /// IP protocol number of the datagram's transport.
    pub protocol: u8,
    /// Whether it is the first, with the transport header.
    pub is_first: bool,
    /// Where the datagram's part starts in the frame.
    pub at: usize,
}

/// An address family with addresses of `W` words.
pub trait Family<const W: usize>: Copy {
    /// IP version.
    const VERSION: u32;
    /// EtherType.
    const ETHER_TYPE: u16;
    /// Length of the IP header.
    const HEADER: usize;
    /// Where the transport header starts in the frame.
    const TRANSPORT: usize = LINK_HEADER + Self::HEADER;
    /// Where the source address starts in the IP header; the destination follows.
    const ADDRESSES: usize;
    /// IP protocol number of such a packet inside another one.
    const INNER_PROTOCOL: u8;
    /// IP protocol number of the family's ICMP.
    const ICMP: u8;

    /// Reads the IP header, or says why the packet is none of ours.
    fn parse<P: Packet>(self, packet: &mut P) -> Result<IpHeader<W>, Reason>;

    /// Of a packet whose header says that it is a fragment: which.
    fn fragment<P: Packet>(self, packet: &mut P) -> Option<Fragment>;

    /// Writes addresses, counts the TTL down and mends the header's checksum; `delta` is what the new addresses add to it.
    fn rewrite<P: Packet>(
        self,
        packet: &mut P,
        source: &[u32; W],
        destination: &[u32; W],
        delta: u16,
    ) -> Option<()>;

    /// Counts the TTL down.
    fn pass_hop<P: Packet>(self, packet: &mut P) -> Option<()>;

    /// DSCP and ECN (the old type of service), and the packet's length with its header as the header says it.
    fn outline<P: Packet>(self, packet: &mut P) -> Option<(u8, u16)>;

    /// A backend's address in this family.
    fn narrow(self, address: &[u32; 4]) -> [u32; W];

    /// The network that an address is counted with: /24 or /56.
    fn network(self, address: &[u32; W]) -> u64;
}

/// IPv4 without options.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IPv6 without extension headers other than the fragment header.
#[derive(Clone, Copy, Debug)]
pub struct V6;

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
/// Next-header number of IPv6's fragment header (RFC 8200, section 4.5).
const V6_FRAGMENT: u8 = 44;
const V6_FRAGMENT_HEADER: usize = 8;

/// What one hop less adds to an IPv4 header's checksum: TTL is the high byte of its word.
const ONE_HOP_LESS: u16 = !u16::from_ne_bytes([1, 0]);

impl Family<1> for V4 {
    const VERSION: u32 = 4;
    const ETHER_TYPE: u16 = crate::packet::ETHER_TYPE_V4;
    const HEADER: usize = V4_HEADER;
    const ADDRESSES: usize = 12;
    const INNER_PROTOCOL: u8 = 4;
    const ICMP: u8 = 1;

    #[inline(always)]
    fn parse<P: Packet>(self, packet: &mut P) -> Result<IpHeader<1>, Reason> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER).ok_or(Reason::Truncated)?;
        if header[0] != 0x45 {
            return Err(Reason::IpOptions);
        }
        Ok(IpHeader {
            source: [read32(header, 12)],
            destination: [read32(header, 16)],
            protocol: header[9],
            ttl: header[8],
            // More-fragments bit or a fragment offset.
            is_fragment: read16(header, 6) & 0x3fff_u16.to_be() != 0,
        })
    }

    #[inline(always)]
    fn fragment<P: Packet>(self, packet: &mut P) -> Option<Fragment> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER)?;
        Some(Fragment {
            id: read16(header, 4) as u32,
            protocol: header[9],
            is_first: read16(header, 6) & 0x1fff_u16.to_be() == 0,
            at: Self::TRANSPORT,
        })
    }

    #[inline(always)]
    fn rewrite<P: Packet>(
        self,
        packet: &mut P,
        source: &[u32; 1],
        destination: &[u32; 1],
        delta: u16,
    ) -> Option<()> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER)?;
        header[8] = header[8].wrapping_sub(1);
        let checksum = update(update(read16(header, 10), delta), ONE_HOP_LESS);
        write16(header, 10, checksum);
        write32(header, 12, source[0]);
        write32(header, 16, destination[0]);
        Some(())
    }

    #[inline(always)]
    fn pass_hop<P: Packet>(self, packet: &mut P) -> Option<()> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER)?;
        header[8] = header[8].wrapping_sub(1);
        write16(header, 10, update(read16(header, 10), ONE_HOP_LESS));
        Some(())
    }

    #[inline(always)]
    fn outline<P: Packet>(self, packet: &mut P) -> Option<(u8, u16)> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER)?;
        Some((header[1], u16::from_be_bytes([header[2], header[3]])))
    }

    #[inline(always)]
    fn narrow(self, address: &[u32; 4]) -> [u32; 1] {
        [address[3]]
    }

    #[inline(always)]
    fn network(self, address: &[u32; 1]) -> u64 {
        (address[0] & 0xffff_ff00_u32.to_be()) as u64
    }
}

impl Family<4> for V6 {
    const VERSION: u32 = 6;
    const ETHER_TYPE: u16 = crate::packet::ETHER_TYPE_V6;
    const HEADER: usize = V6_HEADER;
    const ADDRESSES: usize = 8;
    const INNER_PROTOCOL: u8 = 41;
    const ICMP: u8 = 58;

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
            is_fragment: header[6] == V6_FRAGMENT,
        })
    }

    #[inline(always)]
    fn fragment<P: Packet>(self, packet: &mut P) -> Option<Fragment> {
        let header = packet.window::<V6_FRAGMENT_HEADER>(Self::TRANSPORT)?;
        Some(Fragment {
            id: read32(header, 4),
            protocol: header[0],
            is_first: read16(header, 2) & 0xfff8_u16.to_be() == 0,
            at: Self::TRANSPORT + V6_FRAGMENT_HEADER,
        })
    }

    #[inline(always)]
    fn rewrite<P: Packet>(
        self,
        packet: &mut P,
        source: &[u32; 4],
        destination: &[u32; 4],
        _: u16,
    ) -> Option<()> {
        let header = packet.window::<V6_HEADER>(LINK_HEADER)?;
        header[7] = header[7].wrapping_sub(1);
        let mut i = 0;
        while i < 4 {
            write32(header, 8 + 4 * i, source[i]);
            write32(header, 24 + 4 * i, destination[i]);
            i += 1;
        }
        Some(())
    }

    #[inline(always)]
    fn pass_hop<P: Packet>(self, packet: &mut P) -> Option<()> {
        let header = packet.window::<V6_HEADER>(LINK_HEADER)?;
        header[7] = header[7].wrapping_sub(1);
        Some(())
    }

    #[inline(always)]
    fn outline<P: Packet>(self, packet: &mut P) -> Option<(u8, u16)> {
        let header = packet.window::<V6_HEADER>(LINK_HEADER)?;
        let payload = u16::from_be_bytes([header[4], header[5]]);
        Some((header[0] << 4 | header[1] >> 4, payload.wrapping_add(V6_HEADER as u16)))
    }

    #[inline(always)]
    fn narrow(self, address: &[u32; 4]) -> [u32; 4] {
        *address
    }

    #[inline(always)]
    fn network(self, address: &[u32; 4]) -> u64 {
        (address[0] as u64) << 32 | (address[1] & 0xffff_ff00_u32.to_be()) as u64
    }
}
