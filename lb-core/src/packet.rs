//! The one way to touch a packet: a checked window of fixed size at an offset.
//!
//! A single bounds check gives an array whose constant indexes need no further one. That is the shape
//! that the kernel's verifier follows, and on the host it is an ordinary slice conversion.

use crate::reason::Reason;

/// An Ethernet frame.
pub trait Packet {
    /// Whether transport checksums may be partial, to be completed by the kernel or the network card later. They are
    /// then changed through [`Packet::mend_transport_checksum`] only.
    const PARTIAL_CHECKSUMS: bool = false;

    /// The `N` bytes from `offset` on, or `None` where the frame is shorter.
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]>;

    /// Length of the frame in bytes, with its link header.
    fn length(&self) -> usize;

    /// Payload bytes of each segment where the frame stands for many; 0 where it is one packet.
    fn segment(&self) -> usize {
        0
    }

    /// Makes room for an outer IP header of `N` bytes before the inner one. Everything before the inner header, the
    /// link header too, is to be written anew.
    fn insert<const N: usize>(&mut self) -> Option<()>;

    /// Cuts the frame to a length that it has at least.
    fn truncate(&mut self, length: usize) -> Option<()>;

    /// Mends the transport checksum at an offset after addresses and ports have changed by these differences.
    fn mend_transport_checksum(&mut self, _at: usize, _addresses: u16, _all: u16, _udp: bool) -> Option<()> {
        None
    }

    /// Copies one in `every` packets to the samples, with the reason for what happens to it.
    fn sample(&mut self, _every: u32, _reason: Reason) {}
}

/// Length of an Ethernet header without VLAN tags.
pub const LINK_HEADER: usize = 14;

/// EtherType of IPv4, as read by [`ether_type`].
pub const ETHER_TYPE_V4: u16 = 0x0800;
/// EtherType of IPv6, as read by [`ether_type`].
pub const ETHER_TYPE_V6: u16 = 0x86dd;

/// The frame's EtherType in host order.
#[inline(always)]
pub fn ether_type<P: Packet>(packet: &mut P) -> Option<u16> {
    let header = packet.window::<LINK_HEADER>(0)?;
    Some(u16::from_be_bytes([header[12], header[13]]))
}

/// Reads 16 bits as they lie on the wire.
#[inline(always)]
pub(crate) fn read16<const N: usize>(window: &[u8; N], at: usize) -> u16 {
    u16::from_ne_bytes([window[at], window[at + 1]])
}

/// Reads 32 bits as they lie on the wire.
#[inline(always)]
pub(crate) fn read32<const N: usize>(window: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([window[at], window[at + 1], window[at + 2], window[at + 3]])
}

/// Writes 16 bits as they shall lie on the wire.
#[inline(always)]
pub(crate) fn write16<const N: usize>(window: &mut [u8; N], at: usize, value: u16) {
    window[at..at + 2].copy_from_slice(&value.to_ne_bytes());
}

/// Writes 32 bits as they shall lie on the wire.
#[inline(always)]
pub(crate) fn write32<const N: usize>(window: &mut [u8; N], at: usize, value: u32) {
    window[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}
