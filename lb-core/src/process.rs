//! A packet's whole way: decide, rewrite, count.

use crate::checksum::update;
use crate::decide::{Arrival, TCP, Tables, Verdict, decide};
use crate::family::Family;
use crate::packet::{LINK_HEADER, Packet, read16, write16, write32};
use crate::reason::Reason;
use crate::record::{Direction, Flow, Link};

/// What the hook does with the packet as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leave it to this machine's own network stack.
    Pass,
    /// Drop it.
    Drop,
    /// Send it out of an interface.
    Transmit {
        /// Output interface.
        interface: u32,
    },
    /// Copy it to the backend's hold queue, then drop it.
    Capture {
        /// Whose queue.
        backend: u32,
    },
}

/// Decides about a packet, rewrites it and counts it.
///
/// A captured packet is translated already, so that replay only has to address it to the new location.
#[inline(always)]
pub fn process<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    arrival: Arrival,
) -> Action {
    let (action, reason) = match decide(family, packet, tables, arrival) {
        Verdict::Forward { flow, link, direction, protocol } => {
            if translate(family, packet, flow, protocol).is_none() || address(packet, link).is_none() {
                (Action::Drop, Reason::Truncated)
            } else {
                let reason = match direction {
                    Direction::ToBackend => Reason::ToBackend,
                    Direction::ToClient => Reason::ToClient,
                };
                (Action::Transmit { interface: link.interface }, reason)
            }
        }
        Verdict::Hold { flow, protocol } => {
            if translate(family, packet, flow, protocol).is_none() {
                (Action::Drop, Reason::Truncated)
            } else {
                (Action::Capture { backend: flow.backend }, Reason::Held)
            }
        }
        Verdict::Pass(reason) => (Action::Pass, reason),
        Verdict::Drop(reason) => (Action::Drop, reason),
    };
    tables.count(reason);
    action
}

/// Writes the link header of a frame to the neighbour at the other end of a link.
#[inline(always)]
pub fn address<P: Packet>(packet: &mut P, link: &Link) -> Option<()> {
    link.write(packet.window::<LINK_HEADER>(0)?);
    Some(())
}

/// Writes addresses and ports and mends the checksums.
#[inline(always)]
fn translate<const W: usize, F: Family<W>, P: Packet>(
    family: F,
    packet: &mut P,
    flow: &Flow<W>,
    protocol: u8,
) -> Option<()> {
    family.rewrite(packet, flow)?;
    if protocol == TCP {
        let header = packet.window::<20>(F::TRANSPORT)?;
        write32(header, 0, flow.ports);
        write16(header, 16, update(read16(header, 16), flow.transport_delta));
    } else {
        let header = packet.window::<8>(F::TRANSPORT)?;
        write32(header, 0, flow.ports);
        // Zero says that there is none (RFC 768), and a sum that comes out as zero is sent as all ones.
        let checksum = read16(header, 6);
        if checksum != 0 {
            let checksum = update(checksum, flow.transport_delta);
            write16(header, 6, if checksum == 0 { 0xffff } else { checksum });
        }
    }
    Some(())
}
