//! A packet's whole way: decide, rewrite, count.

use crate::admit::{open, search};
use crate::checksum::update;
use crate::decide::{Arrival, TCP, Verdict, decide};
use crate::encapsulate::encapsulate;
use crate::family::Family;
use crate::flow::{Direction, Flow, Mode};
use crate::icmp;
use crate::name::{Part, name};
use crate::packet::{LINK_HEADER, Packet, read16, write16, write32};
use crate::reason::{Class, Reason};
use crate::record::{Link, Location};
use crate::tables::Tables;

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
        /// How it gets to the backend from there.
        mode: Mode,
    },
}

/// A step of a packet's way. In the kernel each is a function with a stack of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Forwards the packet if it is of an established flow.
    Forward,
    /// Looks closely: newcomers, fragments.
    Search,
    /// Opens a flow; a search then finds it.
    Open,
    /// Handles ICMP.
    Icmp,
    /// Tells the sender that its packets are too big.
    TooBig {
        /// Largest packet that would fit, in bytes.
        mtu: u32,
    },
    /// Drops the packet, or leaves it to this machine's own stack, as the reason says.
    Refuse(Reason),
    /// None: its way has ended.
    Done(Action),
}

/// Decides about a packet, rewrites it and counts it.
///
/// A captured packet is translated already, so that replay only has to address (or encapsulate) it to the new
/// location.
pub fn process<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    arrival: Arrival,
) -> Action {
    let next = take(family, packet, tables, arrival, Step::Forward);
    walk(next, |step| take(family, packet, tables, arrival, step))
}

/// Takes a packet the rest of its way, given what takes one step and answers with the next.
#[inline(always)]
pub fn walk(mut next: Step, mut take: impl FnMut(Step) -> Step) -> Action {
    if next == Step::Search {
        next = take(Step::Search);
    }
    if next == Step::Open {
        next = take(Step::Open);
        if next == Step::Search {
            next = take(Step::Search);
        }
    }
    next = match next {
        Step::Icmp => take(Step::Icmp),
        Step::TooBig { mtu } => take(Step::TooBig { mtu }),
        // Opened, and at the same moment pushed out again by other newcomers.
        Step::Open => Step::Refuse(Reason::NoRoom),
        next => next,
    };
    if let Step::Refuse(reason) = next {
        next = take(Step::Refuse(reason));
    }
    match next {
        Step::Done(action) => action,
        _ => Action::Drop,
    }
}

/// Takes one step; the answer is the next.
#[inline(always)]
pub fn take<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    arrival: Arrival,
    step: Step,
) -> Step {
    match step {
        Step::Forward => match decide(family, packet, tables, arrival) {
            Some((verdict, protocol)) => {
                perform(family, packet, tables, verdict, Part::Transport { protocol, at: F::TRANSPORT })
            }
            None => Step::Search,
        },
        Step::Search => match name(family, packet, tables) {
            Ok(named) => match search(packet, tables, &named, arrival) {
                Some(verdict) => perform(family, packet, tables, verdict, named.part),
                None => Step::Open,
            },
            Err(step) => step,
        },
        Step::Open => match name(family, packet, tables) {
            Ok(named) => match open(family, packet, tables, &named, arrival) {
                Ok(()) => Step::Search,
                Err(reason) => Step::Refuse(reason),
            },
            Err(step) => step,
        },
        Step::Icmp => icmp::handle(family, packet, tables, arrival),
        Step::TooBig { mtu } => icmp::too_big(family, packet, tables, arrival, mtu),
        Step::Refuse(reason) => {
            sample(packet, tables, reason);
            tables.count(reason);
            let passes = matches!(reason.class(), Class::Pass);
            Step::Done(if passes { Action::Pass } else { Action::Drop })
        }
        Step::Done(action) => Step::Done(action),
    }
}

/// Does what a verdict says.
#[inline(always)]
fn perform<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    verdict: Verdict<'_, W>,
    part: Part,
) -> Step {
    let (flow, location, reason) = match verdict {
        Verdict::Forward { flow, location } => match flow.kind.direction() {
            Direction::ToBackend => (flow, Some(location), Reason::ToBackend),
            Direction::ToClient => (flow, None, Reason::ToClient),
        },
        Verdict::Hold { flow } => (flow, None, Reason::Held),
        Verdict::TooBig { mtu } => return Step::TooBig { mtu },
        Verdict::Refuse(reason) => return Step::Refuse(reason),
    };
    sample(packet, tables, reason);
    tables.count(reason);
    let action = if reason == Reason::Held {
        translate(family, packet, flow, part)
            .map(|()| Action::Capture { backend: flow.backend, mode: flow.kind.mode() })
    } else {
        forward(family, packet, flow, location, part)
    };
    Step::Done(action.unwrap_or(Action::Drop))
}

/// Makes a packet what its next hop gets: at a location, or without one the client.
#[inline(always)]
fn forward<const W: usize, F: Family<W>, P: Packet>(
    family: F,
    packet: &mut P,
    flow: &Flow<W>,
    location: Option<&Location>,
    part: Part,
) -> Option<Action> {
    translate(family, packet, flow, part)?;
    let link = location.map_or(&flow.link, |location| &location.link);
    match location {
        Some(location) if flow.kind.mode() == Mode::Dsr => encapsulate(family, packet, location)?,
        _ => address(packet, link)?,
    }
    Some(Action::Transmit { interface: link.interface })
}

/// Copies one in so many packets to the samples, as it came in.
#[inline(always)]
pub(crate) fn sample<const W: usize, P: Packet, T: Tables<W>>(packet: &mut P, tables: &T, reason: Reason) {
    if let Some(settings) = tables.settings()
        && settings.sample != 0
    {
        packet.sample(settings.sample, reason);
    }
}

/// Writes the link header of a frame to the neighbour at the other end of a link.
#[inline(always)]
pub fn address<P: Packet>(packet: &mut P, link: &Link) -> Option<()> {
    link.write(packet.window::<LINK_HEADER>(0)?);
    Some(())
}

/// Does what the flow's mode changes of a packet: one hop less, and where it is rewritten, addresses, ports and
/// checksums.
#[inline(always)]
fn translate<const W: usize, F: Family<W>, P: Packet>(
    family: F,
    packet: &mut P,
    flow: &Flow<W>,
    part: Part,
) -> Option<()> {
    if flow.kind.mode() == Mode::Dsr {
        return family.pass_hop(packet);
    }
    family.rewrite(packet, &flow.source, &flow.destination, flow.address_delta)?;
    let Part::Transport { protocol, at } = part else { return Some(()) };
    if protocol == TCP {
        let header = packet.window::<20>(at)?;
        write32(header, 0, flow.ports);
        if P::PARTIAL_CHECKSUMS {
            return packet.mend_transport_checksum(at + 16, flow.address_delta, flow.transport_delta, false);
        }
        write16(header, 16, update(read16(header, 16), flow.transport_delta));
    } else {
        let header = packet.window::<8>(at)?;
        write32(header, 0, flow.ports);
        if P::PARTIAL_CHECKSUMS {
            return packet.mend_transport_checksum(at + 6, flow.address_delta, flow.transport_delta, true);
        }
        // Zero says that there is none (RFC 768), and a sum that comes out as zero is sent as all ones.
        let checksum = read16(header, 6);
        if checksum != 0 {
            let checksum = update(checksum, flow.transport_delta);
            write16(header, 6, if checksum == 0 { 0xffff } else { checksum });
        }
    }
    Some(())
}
