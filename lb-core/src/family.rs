//! What differs between IPv4 (RFC 791) and IPv6 (RFC 8200): where things lie. Zero-sized types, so that the
//! compiler makes one straight path for each from the same source.

use crate::checksum::{fold, sum, update};
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
    /// ICMP type of an echo request.
    const ECHO_REQUEST: u8;
    /// ICMP type of its answer.
    const ECHO_REPLY: u8;
    /// ICMP types that quote the packet that they are about.
    const ICMP_ERRORS: &[u8];
    /// ICMP type and code of "packet too big".
    const TOO_BIG: [u8; 2];
    /// Whether ICMP's checksum covers the IP addresses, and no checksum of the IP header outweighs them.
    const ICMP_COVERS_ADDRESSES: bool;

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

    /// Sender, receiver and protocol of the packet that is quoted at an offset, if it has a transport header.
    fn quoted<P: Packet>(self, packet: &mut P, at: usize) -> Option<([[u32; W]; 2], u8)>;

    /// Writes the addresses of the quoted packet and mends its header's checksum.
    fn requote<P: Packet>(
        self,
        packet: &mut P,
        at: usize,
        source: &[u32; W],
        destination: &[u32; W],
        delta: u16,
    ) -> Option<()>;

    /// Whether a packet's sender wants to know that it is too big, rather than have it fragmented.
    fn wants_to_know<P: Packet>(self, packet: &mut P) -> bool;

    /// Writes a whole IP header before `length` bytes of `protocol`; the sum of the pseudo header for its checksum.
    fn compose<P: Packet>(
        self,
        packet: &mut P,
        source: &[u32; W],
        destination: &[u32; W],
        protocol: u8,
        length: u16,
    ) -> Option<u64>;

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

/// Hops of packets of our own making.
const OWN_TTL: u8 = 64;
const DO_NOT_FRAGMENT: u16 = 0x4000_u16.to_be();

/// What one hop less adds to an IPv4 header's checksum: TTL is the high byte of its word.
const ONE_HOP_LESS: u16 = !u16::from_ne_bytes([1, 0]);

impl Family<1> for V4 {
    const VERSION: u32 = 4;
    const ETHER_TYPE: u16 = crate::packet::ETHER_TYPE_V4;
    const HEADER: usize = V4_HEADER;
    const ADDRESSES: usize = 12;
    const INNER_PROTOCOL: u8 = 4;
    const ICMP: u8 = 1;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    // Destination unreachable, time exceeded, parameter problem.
    const ICMP_ERRORS: &[u8] = &[3, 11, 12];
    const TOO_BIG: [u8; 2] = [3, 4];
    const ICMP_COVERS_ADDRESSES: bool = false;

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
    fn quoted<P: Packet>(self, packet: &mut P, at: usize) -> Option<([[u32; 1]; 2], u8)> {
        let header = packet.window::<V4_HEADER>(at)?;
        let has_transport = header[0] == 0x45 && read16(header, 6) & 0x1fff_u16.to_be() == 0;
        has_transport.then(|| ([[read32(header, 12)], [read32(header, 16)]], header[9]))
    }

    #[inline(always)]
    fn requote<P: Packet>(
        self,
        packet: &mut P,
        at: usize,
        source: &[u32; 1],
        destination: &[u32; 1],
        delta: u16,
    ) -> Option<()> {
        let header = packet.window::<V4_HEADER>(at)?;
        write16(header, 10, update(read16(header, 10), delta));
        write32(header, 12, source[0]);
        write32(header, 16, destination[0]);
        Some(())
    }

    #[inline(always)]
    fn wants_to_know<P: Packet>(self, packet: &mut P) -> bool {
        let Some(header) = packet.window::<V4_HEADER>(LINK_HEADER) else { return false };
        read16(header, 6) & DO_NOT_FRAGMENT != 0
    }

    #[inline(always)]
    fn compose<P: Packet>(
        self,
        packet: &mut P,
        source: &[u32; 1],
        destination: &[u32; 1],
        protocol: u8,
        length: u16,
    ) -> Option<u64> {
        let header = packet.window::<V4_HEADER>(LINK_HEADER)?;
        let words = [
            u32::from_ne_bytes([0x45, 0, 0, 0]) | ((V4_HEADER as u16 + length).to_be() as u32) << 16,
            (DO_NOT_FRAGMENT as u32) << 16,
            u32::from_ne_bytes([OWN_TTL, protocol, 0, 0]),
            source[0],
            destination[0],
        ];
        let mut i = 0;
        let mut total = 0;
        while i < words.len() {
            total += words[i] as u64;
            write32(header, 4 * i, words[i]);
            i += 1;
        }
        write16(header, 10, !fold(total));
        // ICMP over IPv4 has no pseudo header.
        Some(0)
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
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    // Destination unreachable, packet too big, time exceeded, parameter problem.
    const ICMP_ERRORS: &[u8] = &[1, 2, 3, 4];
    const TOO_BIG: [u8; 2] = [2, 0];
    const ICMP_COVERS_ADDRESSES: bool = true;

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
        write_addresses(header, source, destination);
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
    fn quoted<P: Packet>(self, packet: &mut P, at: usize) -> Option<([[u32; 4]; 2], u8)> {
        let header = packet.window::<V6_HEADER>(at)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let ends = [
            [read32(header, 8), read32(header, 12), read32(header, 16), read32(header, 20)],
            [read32(header, 24), read32(header, 28), read32(header, 32), read32(header, 36)],
        ];
        Some((ends, header[6]))
    }

    #[inline(always)]
    fn requote<P: Packet>(
        self,
        packet: &mut P,
        at: usize,
        source: &[u32; 4],
        destination: &[u32; 4],
        _: u16,
    ) -> Option<()> {
        let header = packet.window::<V6_HEADER>(at)?;
        write_addresses(header, source, destination);
        Some(())
    }

    #[inline(always)]
    fn wants_to_know<P: Packet>(self, _: &mut P) -> bool {
        true
    }

    #[inline(always)]
    fn compose<P: Packet>(
        self,
        packet: &mut P,
        source: &[u32; 4],
        destination: &[u32; 4],
        protocol: u8,
        length: u16,
    ) -> Option<u64> {
        let header = packet.window::<V6_HEADER>(LINK_HEADER)?;
        write32(header, 0, u32::from_ne_bytes([0x60, 0, 0, 0]));
        write16(header, 4, length.to_be());
        header[6] = protocol;
        header[7] = OWN_TTL;
        write_addresses(header, source, destination);
        let rest = length.to_be() as u64 + u16::from_ne_bytes([0, protocol]) as u64;
        Some(sum(source) + sum(destination) + rest)
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

#[inline(always)]
fn write_addresses(header: &mut [u8; V6_HEADER], source: &[u32; 4], destination: &[u32; 4]) {
    let mut i = 0;
    while i < 4 {
        write32(header, 8 + 4 * i, source[i]);
        write32(header, 24 + 4 * i, destination[i]);
        i += 1;
    }
}
