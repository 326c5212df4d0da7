//! ICMP (RFC 792, RFC 4443): errors about flows in both directions, echo to virtual addresses, and telling senders what
//! does not fit a tunnel.
//!
//! An error quotes the packet that it is about as we had sent it on. The flow of that packet's answers travels the way
//! that the error travels, and its translation, turned around, is what the quoted packet needs (RFC 5508, section 4).

use core::sync::atomic::Ordering::Relaxed;

use crate::admit::spend;
use crate::checksum::{fold, sum, sum_complement, update};
use crate::decide::{Arrival, TCP, Transport, UDP, Verdict, follow};
use crate::encapsulate::encapsulate;
use crate::family::{Family, IpHeader};
use crate::flow::{Direction, FlowKey, Mode};
use crate::gate::{Gate, GateWord};
use crate::packet::{LINK_HEADER, Packet, read16, read32, write16, write32};
use crate::process::{Action, Step, address, sample};
use crate::reason::Reason;
use crate::record::{Link, ServiceKey};
use crate::tables::Tables;

/// Type, code, checksum and four bytes of which types make different use.
const ICMP_HEADER: usize = 8;
/// Ports, and four bytes more: what an error quotes of a transport header at least.
const QUOTED: usize = 8;
/// Words that an error of ours quotes: the larger IP header, ports, and what else has room.
const QUOTE: usize = 12;

/// Handles an ICMP packet.
#[inline(always)]
pub(crate) fn handle<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    arrival: Arrival,
) -> Step {
    let header = match family.parse(packet) {
        Ok(header) => header,
        Err(reason) => return Step::Refuse(reason),
    };
    let Some(icmp) = packet.window::<ICMP_HEADER>(F::TRANSPORT) else {
        return Step::Refuse(Reason::Truncated);
    };
    let kind = icmp[0];
    if kind == F::ECHO_REQUEST {
        return echo(family, packet, tables, &header, arrival);
    }
    if !F::ICMP_ERRORS.contains(&kind) {
        return Step::Refuse(Reason::OtherProtocol);
    }
    translate(family, packet, tables, &header, arrival)
}

/// Answers an echo request to a virtual address.
#[inline(always)]
fn echo<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    header: &IpHeader<W>,
    arrival: Arrival,
) -> Step {
    let key = ServiceKey { address: header.destination, port: 0, protocol: F::ICMP as u16 };
    if tables.service(&key).is_none() {
        return Step::Refuse(Reason::OtherProtocol);
    }
    sample(packet, tables, Reason::EchoAnswered);
    let answered = (|| {
        let icmp = packet.window::<ICMP_HEADER>(F::TRANSPORT)?;
        let request = read16(icmp, 0);
        icmp[0] = F::ECHO_REPLY;
        let delta = fold(!request as u64 + read16(icmp, 0) as u64);
        write16(icmp, 2, update(read16(icmp, 2), delta));
        // The addresses change places, which no checksum minds.
        family.rewrite(packet, &header.destination, &header.source, 0)?;
        turn_back(packet, arrival)
    })();
    tables.count(Reason::EchoAnswered);
    sent(answered, arrival.interface)
}

/// Translates an error about a flow and sends it the flow's way.
#[inline(always)]
fn translate<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    header: &IpHeader<W>,
    arrival: Arrival,
) -> Step {
    let Some((quoted, protocol)) = family.quoted(packet, F::TRANSPORT + ICMP_HEADER) else {
        return Step::Refuse(Reason::OtherProtocol);
    };
    if protocol != TCP && protocol != UDP {
        return Step::Refuse(Reason::OtherProtocol);
    }
    let Some(ports) = packet.window::<QUOTED>(F::TRANSPORT + ICMP_HEADER + F::HEADER) else {
        return Step::Refuse(Reason::Truncated);
    };
    let [sender, receiver] = quoted;
    // Named as the quoted packet's answers are.
    let key = FlowKey {
        source: receiver,
        destination: sender,
        ports: read32(ports, 0).rotate_left(16),
        protocol: protocol as u32,
    };
    let Some(flow) = tables.flow(&key).or_else(|| tables.newcomer(&key)) else {
        return Step::Refuse(Reason::OtherProtocol);
    };
    let transport = Transport { protocol, ttl: header.ttl, flags: 0 };
    let (location, reason) = match follow(packet, tables, flow, &transport, arrival) {
        Some(Verdict::Forward { location, .. }) => match flow.kind.direction() {
            Direction::ToBackend => (Some(location), Reason::ErrorToBackend),
            Direction::ToClient => (None, Reason::ErrorToClient),
        },
        Some(Verdict::Refuse(reason)) => return Step::Refuse(reason),
        // An error does not wait in a hold queue: whoever is held sends again.
        _ => return Step::Refuse(Reason::GateClosed),
    };
    let link = match location {
        Some(location) => &location.link,
        None => {
            // What the site has to say of a server that is just being moved would end the connection.
            let word = tables.backend(flow.backend).map_or(0, |backend| backend.word.load(Relaxed));
            if !matches!(GateWord::from_bits(word).gate_of_known(), Gate::Forward) {
                return Step::Refuse(Reason::ResetWhileHeld);
            }
            &flow.link
        }
    };
    sample(packet, tables, reason);
    tables.count(reason);
    if flow.kind.mode() == Mode::Dsr {
        let done = location.and_then(|location| {
            family.pass_hop(packet)?;
            encapsulate(family, packet, location)
        });
        return sent(done, link.interface);
    }
    // Who reports is named anew if it is the end of the flow itself; a router in between keeps its name.
    let source = if header.source == key.source { flow.source } else { header.source };
    let outer = sum(&source)
        + sum(&flow.destination)
        + sum_complement(&header.source)
        + sum_complement(&header.destination);
    let ports_delta = flow.transport_delta as u64 + !flow.address_delta as u64;
    let done = (|| {
        family.requote(
            packet,
            F::TRANSPORT + ICMP_HEADER,
            &flow.destination,
            &flow.source,
            flow.address_delta,
        )?;
        let ports = packet.window::<QUOTED>(F::TRANSPORT + ICMP_HEADER + F::HEADER)?;
        write32(ports, 0, flow.ports.rotate_left(16));
        // The quoted transport's checksum stays as it was: it need not be quoted, and nobody verifies it.
        let icmp = packet.window::<ICMP_HEADER>(F::TRANSPORT)?;
        let delta = match F::ICMP_COVERS_ADDRESSES {
            true => fold(ports_delta + flow.address_delta as u64 + fold(outer) as u64),
            false => fold(ports_delta),
        };
        write16(icmp, 2, update(read16(icmp, 2), delta));
        family.rewrite(packet, &source, &flow.destination, fold(outer))?;
        address(packet, link)
    })();
    sent(done, link.interface)
}

/// Tells a packet's sender that it is too big (RFC 1191, RFC 8201), within the bounds that new flows have.
#[inline(always)]
pub(crate) fn too_big<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    arrival: Arrival,
    mtu: u32,
) -> Step {
    let header = match family.parse(packet) {
        Ok(header) => header,
        Err(reason) => return Step::Refuse(reason),
    };
    if !family.wants_to_know(packet) || spend(family, tables, &header.source, arrival.now).is_err() {
        return Step::Refuse(Reason::TooBig);
    }
    sample(packet, tables, Reason::TooBigAnswered);
    let answered = (|| {
        let mut quote = [0_u32; QUOTE];
        let original = packet.window::<{ 4 * QUOTE }>(LINK_HEADER)?;
        let mut i = 0;
        while i < QUOTE {
            quote[i] = read32(original, 4 * i);
            i += 1;
        }
        let length = ICMP_HEADER + 4 * QUOTE;
        packet.truncate(F::TRANSPORT + length)?;
        let pseudo_header =
            family.compose(packet, &header.destination, &header.source, F::ICMP, length as u16)?;
        let body = packet.window::<{ ICMP_HEADER + 4 * QUOTE }>(F::TRANSPORT)?;
        let kind = u16::from_ne_bytes(F::TOO_BIG);
        write16(body, 0, kind);
        write16(body, 2, 0);
        write32(body, 4, mtu.to_be());
        let mut total = pseudo_header + kind as u64 + mtu.to_be() as u64;
        let mut i = 0;
        while i < QUOTE {
            write32(body, ICMP_HEADER + 4 * i, quote[i]);
            total += quote[i] as u64;
            i += 1;
        }
        write16(body, 2, !fold(total));
        turn_back(packet, arrival)
    })();
    tables.count(Reason::TooBigAnswered);
    sent(answered, arrival.interface)
}

/// Addresses a frame to where it came from.
#[inline(always)]
fn turn_back<P: Packet>(packet: &mut P, arrival: Arrival) -> Option<()> {
    let link = Link::back(arrival.interface, packet.window::<LINK_HEADER>(0)?);
    address(packet, &link)
}

#[inline(always)]
fn sent(done: Option<()>, interface: u32) -> Step {
    Step::Done(if done.is_some() { Action::Transmit { interface } } else { Action::Drop })
}
