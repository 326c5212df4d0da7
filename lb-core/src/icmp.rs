//! ICMP (RFC 792, RFC 4443): errors about flows, echo to virtual addresses, and telling senders what does not fit.

use crate::decide::Arrival;
use crate::family::Family;
use crate::packet::Packet;
use crate::process::Step;
use crate::reason::Reason;
use crate::tables::Tables;

/// Handles an ICMP packet.
#[inline(always)]
pub(crate) fn handle<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    _family: F,
    _packet: &mut P,
    _tables: &T,
    _arrival: Arrival,
) -> Step {
    Step::Refuse(Reason::OtherProtocol)
}

/// Tells a packet's sender that it is too big.
#[inline(always)]
pub(crate) fn too_big<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    _family: F,
    _packet: &mut P,
    _tables: &T,
    _arrival: Arrival,
    _mtu: u32,
) -> Step {
    Step::Refuse(Reason::TooBig)
}
