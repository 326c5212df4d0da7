//! The one way to touch a packet: a checked window of fixed size at an offset.
//!
//! A single bounds check gives an array whose constant indexes need no further one. That is the shape
//! that the kernel's verifier follows, and on the host it is an ordinary slice conversion.

/// An Ethernet frame.
pub trait Packet {
    /// The `N` bytes from `offset` on, or `None` where the frame is shorter.
    fn window<const N: usize>(&mut self, offset: usize) -> Option<&mut [u8; N]>;

    /// Length of the frame in bytes, with its link header.
    fn length(&self) -> usize;
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
