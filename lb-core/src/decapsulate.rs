//! A site's end of the tunnels that mode `dsr` uses: takes the outer header off a packet, for sites without a tunnel
//! device.
//!
//! IPv4 in IPv4 (RFC 2003), IPv6 in IPv6 and IPv4 in IPv6 (RFC 2473). What is not meant for us is left to the site's
//! own stack as it is, so that other tunnels at the same site go on working; what a tunnel's end has to drop is
//! dropped. The congestion mark of the outer header is carried into the inner one (RFC 6040).
//!
//! ```text
//!   link | outer IP: lb -> endpoint | inner IP: client -> virtual address | ...
//!                                link | inner IP: client -> virtual address | ...
//! ```

use crate::checksum::{fold, update};
use crate::packet::{ETHER_TYPE_V4, ETHER_TYPE_V6, LINK_HEADER, Packet, ether_type, read16, read32, write16};

/// An address of either family; an IPv4 one is mapped into IPv6 (RFC 4291 section 2.5.5.2).
pub type Address = [u32; 4];

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
/// IP protocol number of an IPv4 packet inside of another packet.
pub const IPV4: u8 = 4;
/// IP protocol number of an IPv6 packet inside of another packet.
pub const IPV6: u8 = 41;

/// So many bytes at the front of a frame are looked at, at most.
pub const HEADERS: usize = LINK_HEADER + 2 * V6_HEADER;

/// What the tunnel's end knows, and where it counts.
pub trait Tunnels {
    /// Whether the address is one of the site's own, to which tunnels lead.
    fn is_endpoint(&self, address: &Address) -> bool;
    /// Whether the sender of an outer header may use the tunnels.
    fn may_send(&self, address: &Address) -> bool;
    /// Whether inner packets to the address are wanted here.
    fn is_destination(&self, address: &Address) -> bool;
    /// Counts a packet.
    fn count(&self, reason: Reason);
}

/// What is to be done with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Take the outer header off and leave the inner packet to the site's stack.
    Strip(Strip),
    /// Leave it to the site's stack as it is.
    Pass,
    /// Drop it.
    Drop,
}

/// How to strip a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strip {
    /// Which headers the packet has.
    pub encapsulation: Encapsulation,
    /// What a checksum over the inner packet has changed by, as a ones' complement sum of words as they lie in memory;
    /// zero where the packet is as it was sent.
    pub change: u16,
}

/// Which packet is in which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encapsulation {
    /// RFC 2003.
    V4InV4,
    /// RFC 2473.
    V6InV6,
    /// RFC 2473.
    V4InV6,
}

impl Encapsulation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V4InV4, Self::V6InV6, Self::V4InV6];

    /// Length of the outer header in bytes.
    #[inline(always)]
    pub const fn outer_header(self) -> usize {
        match self {
            Self::V4InV4 => V4_HEADER,
            Self::V6InV6 | Self::V4InV6 => V6_HEADER,
        }
    }

    /// EtherType of what is left.
    #[inline(always)]
    pub const fn inner_ether_type(self) -> u16 {
        match self {
            Self::V4InV4 | Self::V4InV6 => ETHER_TYPE_V4,
            Self::V6InV6 => ETHER_TYPE_V6,
        }
    }

    const fn reason(self) -> Reason {
        match self {
            Self::V4InV4 => Reason::V4InV4,
            Self::V6InV6 => Reason::V6InV6,
            Self::V4InV6 => Reason::V4InV6,
        }
    }
}

/// What a reason means for the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The outer header was taken off.
    Strip,
    /// Left to the site's own stack.
    Pass,
    /// Dropped.
    Drop,
}

macro_rules! reasons {
    ($($name:ident $class:ident $label:literal $text:literal)*) => {
        /// Why a packet was stripped, passed or dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason {
            $(#[doc = $text] $name,)*
        }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Reason] = &[$(Reason::$name),*];

            /// What it means for the packet.
            pub const fn class(self) -> Class {
                match self { $(Self::$name => Class::$class),* }
            }

            /// Its name in the agent's status.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),* }
            }

            /// One sentence for an operator.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }
        }
    };
}

reasons! {
    V4InV4         Strip "v4_in_v4"         "IPv4 taken out of IPv4"
    V6InV6         Strip "v6_in_v6"         "IPv6 taken out of IPv6"
    V4InV6         Strip "v4_in_v6"         "IPv4 taken out of IPv6"
    NotATunnel     Pass  "not_a_tunnel"     "no packet within a packet of a kind that is known here"
    Truncated      Pass  "truncated"        "shorter than its headers say"
    NotAnEndpoint  Pass  "not_an_endpoint"  "a tunnel that leads to none of the configured endpoints"
    SourceRefused  Pass  "source_refused"   "a tunnel from an address that may not use ours"
    IpOptions      Pass  "ip_options"       "outer IPv4 header with options"
    Fragment       Pass  "fragment"         "outer packet is a fragment: the path to this site has too small an MTU"
    NotAWorkload   Pass  "not_a_workload"   "inner packet is for no workload of this site"
    BadChecksum    Drop  "bad_checksum"     "outer IPv4 header with a wrong checksum"
    TtlExpired     Drop  "ttl_expired"      "outer TTL or hop limit is zero"
    Malformed      Drop  "malformed"        "inner packet is no IP packet or longer than the outer one"
    Congested      Drop  "congested"        "marked as congested on the way, and inner packet cannot say so (RFC 6040)"
    Refused        Drop  "refused"          "the kernel refused to take the outer header off"
}

/// What the outer header says of the inner packet.
struct Outer {
    /// The inner packet's length at most.
    payload: usize,
    ecn: u8,
    encapsulation: Encapsulation,
}

/// Decides about a packet and counts it. The inner header of one that is to be stripped has its congestion mark then;
/// the outer one is still there.
///
/// A packet that the kernel then refuses to strip has to be counted as [`Reason::Refused`] by the caller.
#[inline(always)]
pub fn decapsulate<P: Packet, T: Tunnels>(packet: &mut P, tunnels: &T) -> Verdict {
    match examine(packet, tunnels) {
        Ok(strip) => {
            tunnels.count(strip.encapsulation.reason());
            Verdict::Strip(strip)
        }
        Err(reason) => {
            tunnels.count(reason);
            match reason.class() {
                Class::Drop => Verdict::Drop,
                Class::Strip | Class::Pass => Verdict::Pass,
            }
        }
    }
}

#[inline(always)]
fn examine<P: Packet, T: Tunnels>(packet: &mut P, tunnels: &T) -> Result<Strip, Reason> {
    let outer = match ether_type(packet) {
        Some(ETHER_TYPE_V4) => outer_v4(packet, tunnels)?,
        Some(ETHER_TYPE_V6) => outer_v6(packet, tunnels)?,
        Some(_) => return Err(Reason::NotATunnel),
        None => return Err(Reason::Truncated),
    };
    let encapsulation = outer.encapsulation;
    let change = match encapsulation {
        Encapsulation::V4InV4 => inner_v4::<{ LINK_HEADER + V4_HEADER }, _, _>(packet, tunnels, &outer)?,
        Encapsulation::V4InV6 => inner_v4::<{ LINK_HEADER + V6_HEADER }, _, _>(packet, tunnels, &outer)?,
        Encapsulation::V6InV6 => inner_v6(packet, tunnels, &outer)?,
    };
    Ok(Strip { encapsulation, change })
}

#[inline(always)]
fn outer_v4<P: Packet, T: Tunnels>(packet: &mut P, tunnels: &T) -> Result<Outer, Reason> {
    let frame = packet.length();
    let header = packet.window::<V4_HEADER>(LINK_HEADER).ok_or(Reason::Truncated)?;
    if header[9] != IPV4 {
        return Err(Reason::NotATunnel);
    }
    if !tunnels.is_endpoint(&mapped(read32(header, 16))) {
        return Err(Reason::NotAnEndpoint);
    }
    if header[0] != 0x45 {
        return Err(Reason::IpOptions);
    }
    // More-fragments bit or a fragment offset.
    if read16(header, 6) & 0x3fff_u16.to_be() != 0 {
        return Err(Reason::Fragment);
    }
    if !tunnels.may_send(&mapped(read32(header, 12))) {
        return Err(Reason::SourceRefused);
    }
    let length = u16::from_be_bytes([header[2], header[3]]) as usize;
    if length < V4_HEADER || LINK_HEADER + length > frame {
        return Err(Reason::Truncated);
    }
    if !has_true_checksum(header) {
        return Err(Reason::BadChecksum);
    }
    if header[8] == 0 {
        return Err(Reason::TtlExpired);
    }
    Ok(Outer { payload: length - V4_HEADER, ecn: header[1] & ECN, encapsulation: Encapsulation::V4InV4 })
}

#[inline(always)]
fn outer_v6<P: Packet, T: Tunnels>(packet: &mut P, tunnels: &T) -> Result<Outer, Reason> {
    let frame = packet.length();
    let header = packet.window::<V6_HEADER>(LINK_HEADER).ok_or(Reason::Truncated)?;
    let encapsulation = match header[6] {
        IPV4 => Encapsulation::V4InV6,
        IPV6 => Encapsulation::V6InV6,
        _ => return Err(Reason::NotATunnel),
    };
    if !tunnels.is_endpoint(&address_v6(header, 24)) {
        return Err(Reason::NotAnEndpoint);
    }
    if !tunnels.may_send(&address_v6(header, 8)) {
        return Err(Reason::SourceRefused);
    }
    let payload = u16::from_be_bytes([header[4], header[5]]) as usize;
    if LINK_HEADER + V6_HEADER + payload > frame {
        return Err(Reason::Truncated);
    }
    if header[7] == 0 {
        return Err(Reason::TtlExpired);
    }
    Ok(Outer { payload, ecn: traffic_class(header) & ECN, encapsulation })
}

/// Checks the IPv4 header at `AT` and marks it; returns what a checksum over the packet has changed by.
#[inline(always)]
fn inner_v4<const AT: usize, P: Packet, T: Tunnels>(
    packet: &mut P,
    tunnels: &T,
    outer: &Outer,
) -> Result<u16, Reason> {
    let header = packet.window::<V4_HEADER>(AT).ok_or(Reason::Malformed)?;
    let length = u16::from_be_bytes([header[2], header[3]]) as usize;
    // Options of the inner packet are the receiver's business.
    if header[0] >> 4 != 4 || header[0] & 0xf < 5 || length < V4_HEADER || length > outer.payload {
        return Err(Reason::Malformed);
    }
    if !tunnels.is_destination(&mapped(read32(header, 16))) {
        return Err(Reason::NotAWorkload);
    }
    let service = header[1] & !ECN | combined(outer.ecn, header[1] & ECN)?;
    let before = read16(header, 0);
    header[1] = service;
    let delta = fold(!before as u64 + read16(header, 0) as u64);
    if before != read16(header, 0) {
        write16(header, 10, update(read16(header, 10), delta));
    }
    // The header's own checksum makes up for it.
    Ok(0)
}

/// Checks the inner IPv6 header and marks it; returns what a checksum over the packet has changed by.
#[inline(always)]
fn inner_v6<P: Packet, T: Tunnels>(packet: &mut P, tunnels: &T, outer: &Outer) -> Result<u16, Reason> {
    let header = packet.window::<V6_HEADER>(LINK_HEADER + V6_HEADER).ok_or(Reason::Malformed)?;
    let length = V6_HEADER + u16::from_be_bytes([header[4], header[5]]) as usize;
    if header[0] >> 4 != 6 || length > outer.payload {
        return Err(Reason::Malformed);
    }
    if !tunnels.is_destination(&address_v6(header, 24)) {
        return Err(Reason::NotAWorkload);
    }
    let ecn = traffic_class(header) & ECN;
    let marked = combined(outer.ecn, ecn)?;
    if marked == ecn {
        return Ok(0);
    }
    let before = read16(header, 0);
    // The traffic class is the eight bits after the version (RFC 8200 section 3): its mark lies in the second byte.
    header[1] = header[1] & !(ECN << 4) | marked << 4;
    Ok(fold(!before as u64 + read16(header, 0) as u64))
}

/// The bits of a traffic class that are the congestion mark (RFC 3168).
const ECN: u8 = 0b11;
const ECT1: u8 = 0b01;
const ECT0: u8 = 0b10;
const CE: u8 = 0b11;

/// The inner packet's mark after both were looked at (RFC 6040 section 4.2).
#[inline(always)]
fn combined(outer: u8, inner: u8) -> Result<u8, Reason> {
    match (outer, inner) {
        (CE, 0) => Err(Reason::Congested),
        (_, 0) => Ok(0),
        (CE, _) => Ok(CE),
        (ECT1, ECT0) => Ok(ECT1),
        (_, inner) => Ok(inner),
    }
}

#[inline(always)]
fn traffic_class(header: &[u8; V6_HEADER]) -> u8 {
    header[0] << 4 | header[1] >> 4
}

#[inline(always)]
fn has_true_checksum(header: &[u8; V4_HEADER]) -> bool {
    let mut sum = 0;
    let mut at = 0;
    while at < V4_HEADER {
        sum += read16(header, at) as u64;
        at += 2;
    }
    fold(sum) == 0xffff
}

/// An IPv4 address, as it lies on the wire, among IPv6's.
#[inline(always)]
pub const fn mapped(address: u32) -> Address {
    [0, 0, 0xffff_u32.to_be(), address]
}

#[inline(always)]
fn address_v6(header: &[u8; V6_HEADER], at: usize) -> Address {
    [read32(header, at), read32(header, at + 4), read32(header, at + 8), read32(header, at + 12)]
}

/// Writes the EtherType of the packet that is left once the outer header is gone, for a hook where the kernel keeps
/// the link header by itself.
#[inline(always)]
pub fn set_ether_type<P: Packet>(packet: &mut P, encapsulation: Encapsulation) -> Option<()> {
    let header = packet.window::<LINK_HEADER>(0)?;
    [header[12], header[13]] = encapsulation.inner_ether_type().to_be_bytes();
    Some(())
}

/// Writes the link header in front of the inner packet, over the end of the outer header; what is before it is to be
/// cut off.
#[inline(always)]
pub fn move_link_header<P: Packet>(packet: &mut P, encapsulation: Encapsulation) -> Option<()> {
    set_ether_type(packet, encapsulation)?;
    let header = *packet.window::<LINK_HEADER>(0)?;
    let place = match encapsulation {
        Encapsulation::V4InV4 => packet.window::<LINK_HEADER>(V4_HEADER)?,
        Encapsulation::V6InV6 | Encapsulation::V4InV6 => packet.window::<LINK_HEADER>(V6_HEADER)?,
    };
    *place = header;
    Some(())
}
