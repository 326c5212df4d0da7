//! The tunnel to a site: IP in IP (RFC 2003), IPv6 as the outer or the inner header (RFC 2473).

use crate::checksum::fold;
use crate::family::Family;
use crate::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, LINK_HEADER, Packet, write16, write32};
use crate::record::{Link, Location};

const V4_OUTER: usize = 20;
const V6_OUTER: usize = 40;
/// Hops that an outer header may take (RFC 2003, section 3.1: large enough for the way to the endpoint).
const OUTER_TTL: u8 = 64;
/// An outer header is never fragmented: senders are told to send less instead (RFC 2003, section 5.1).
const DO_NOT_FRAGMENT: u16 = 0x4000_u16.to_be();

impl Location {
    /// A site that is reached over a link, without a tunnel. `mtu` is in bytes, 0: any.
    pub fn plain(link: Link, mtu: u32) -> Self {
        Self { link, mtu, ..Self::default() }
    }

    /// A site at the other end of an IPv4 tunnel. Addresses are words as on the wire.
    pub fn tunnel4(link: Link, mtu: u32, source: u32, destination: u32) -> Self {
        let constant = u16::from_ne_bytes([0x45, 0]) as u64
            + DO_NOT_FRAGMENT as u64
            + u16::from_ne_bytes([OUTER_TTL, 0]) as u64
            + source as u64
            + destination as u64;
        Self {
            link,
            mtu,
            tunnel: 4,
            source: [0, 0, 0, source],
            destination: [0, 0, 0, destination],
            checksum: fold(constant) as u32,
            reserved: 0,
        }
    }

    /// A site at the other end of an IPv6 tunnel.
    pub fn tunnel6(link: Link, mtu: u32, source: [u32; 4], destination: [u32; 4]) -> Self {
        Self { link, mtu, tunnel: 6, source, destination, checksum: 0, reserved: 0 }
    }

    /// Bytes that the tunnel's outer header takes.
    #[inline(always)]
    pub const fn overhead(&self) -> usize {
        match self.tunnel {
            0 => 0,
            4 => V4_OUTER,
            _ => V6_OUTER,
        }
    }
}

/// Puts a packet into the site's tunnel and addresses the frame to its next hop. DSCP and ECN are copied (RFC 6040).
#[inline(always)]
pub fn encapsulate<const W: usize, F: Family<W>, P: Packet>(
    family: F,
    packet: &mut P,
    location: &Location,
) -> Option<()> {
    let (class, length) = family.outline(packet)?;
    if location.tunnel == 4 {
        packet.insert::<V4_OUTER>()?;
        link_header(packet, location, ETHER_TYPE_V4)?;
        let header = packet.window::<V4_OUTER>(LINK_HEADER)?;
        let words = [
            u16::from_ne_bytes([0, class]),
            length.wrapping_add(V4_OUTER as u16).to_be(),
            u16::from_ne_bytes([0, F::INNER_PROTOCOL]),
        ];
        let sum = location.checksum as u64 + words[0] as u64 + words[1] as u64 + words[2] as u64;
        header[0] = 0x45;
        header[1] = class;
        write16(header, 2, words[1]);
        write16(header, 4, 0);
        write16(header, 6, DO_NOT_FRAGMENT);
        header[8] = OUTER_TTL;
        header[9] = F::INNER_PROTOCOL;
        write16(header, 10, !fold(sum));
        write32(header, 12, location.source[3]);
        write32(header, 16, location.destination[3]);
    } else {
        packet.insert::<V6_OUTER>()?;
        link_header(packet, location, ETHER_TYPE_V6)?;
        let header = packet.window::<V6_OUTER>(LINK_HEADER)?;
        header[0] = 0x60 | class >> 4;
        header[1] = class << 4;
        write16(header, 2, 0);
        write16(header, 4, length.to_be());
        header[6] = F::INNER_PROTOCOL;
        header[7] = OUTER_TTL;
        let mut i = 0;
        while i < 4 {
            write32(header, 8 + 4 * i, location.source[i]);
            write32(header, 24 + 4 * i, location.destination[i]);
            i += 1;
        }
    }
    Some(())
}

#[inline(always)]
fn link_header<P: Packet>(packet: &mut P, location: &Location, ether_type: u16) -> Option<()> {
    let header = packet.window::<LINK_HEADER>(0)?;
    location.link.write(header);
    write16(header, 12, ether_type.to_be());
    Some(())
}
