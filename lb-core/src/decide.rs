//! What happens to a packet of a flow that is known: the path that nearly every packet takes.
//!
//! Whatever else there is (new flows, fragments, ICMP) is looked at in `admit`, `name` and `icmp`.

use core::sync::atomic::Ordering::Relaxed;

use crate::family::{Family, IpHeader};
use crate::flow::{Direction, Flow, FlowKey, Mode, State};
use crate::gate::{Gate, GateWord};
use crate::packet::{LINK_HEADER, Packet, read32};
use crate::reason::Reason;
use crate::record::Location;
use crate::tables::Tables;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

const TCP_FLAGS: usize = 13;
pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// Where and when a packet came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Interface that it came in on.
    pub interface: u32,
    /// The caller's coarse clock, the unit of [`Flow::seen`].
    pub now: u64,
}

/// What happens to a packet. Payloads are references into the tables, since by value the compiler would spill
/// whole records to the kernel program's small stack.
pub enum Verdict<'t, const W: usize> {
    /// Translate or encapsulate as the flow says and send on.
    Forward {
        /// How to translate, and which way.
        flow: &'t Flow<W>,
        /// The backend's location.
        location: &'t Location,
    },
    /// Translate as the flow says and capture for the backend's hold queue.
    Hold {
        /// How to translate; names the backend.
        flow: &'t Flow<W>,
    },
    /// Tell the sender that its packets have to be smaller.
    TooBig {
        /// Largest packet that fits, in bytes.
        mtu: u32,
    },
    /// Drop, or leave to this machine's own network stack, as the reason says.
    Refuse(Reason),
}

/// What a decision needs to know of the transport header.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// TTL or hop limit of the packet.
    pub ttl: u8,
    /// TCP flags; zero for UDP.
    pub flags: u8,
}

impl Transport {
    /// Whether the packet opens a connection.
    #[inline(always)]
    pub(crate) fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }
}

/// The verdict for a packet of an established flow, or `None` where the packet needs a closer look.
#[inline(always)]
pub fn decide<'t, const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &'t T,
    arrival: Arrival,
) -> Option<(Verdict<'t, W>, u8)> {
    let IpHeader { source, destination, protocol, ttl, is_fragment } = family.parse(packet).ok()?;
    if is_fragment {
        return None;
    }
    let mut flags = 0;
    let ports;
    if protocol == TCP {
        let header = packet.window::<20>(F::TRANSPORT)?;
        ports = read32(header, 0);
        flags = header[TCP_FLAGS];
    } else if protocol == UDP {
        ports = read32(packet.window::<8>(F::TRANSPORT)?, 0);
    } else {
        return None;
    }
    let transport = Transport { protocol, ttl, flags };
    if transport.opens() {
        return None;
    }
    let key = FlowKey { source, destination, ports, protocol: protocol as u32 };
    let flow = tables.flow(&key)?;
    Some((follow(packet, tables, flow, &transport, arrival)?, protocol))
}

/// The verdict for a known flow, or `None` where the flow is void because its backend's number was given on.
#[inline(always)]
pub(crate) fn follow<'t, const W: usize, P: Packet, T: Tables<W>>(
    packet: &mut P,
    tables: &'t T,
    flow: &'t Flow<W>,
    transport: &Transport,
    arrival: Arrival,
) -> Option<Verdict<'t, W>> {
    let backend = tables.backend(flow.backend)?;
    if backend.incarnation != flow.incarnation {
        return None;
    }
    if transport.ttl <= 1 {
        return Some(Verdict::Refuse(Reason::TtlExpired));
    }
    // One load: gate, location and generation always belong together.
    let word = GateWord::from_bits(backend.word.load(Relaxed));
    let gate = word.gate_of_known();
    let Some(location) = tables.location(backend.sites.at(word.slot())) else {
        return Some(Verdict::Refuse(Reason::NoRoute));
    };
    let direction = flow.kind.direction();
    match direction {
        Direction::ToBackend => {
            match gate {
                // Never so for a known flow, where `opens` is false already.
                Gate::Forward if transport.opens() && word.holds_new() => {
                    return Some(Verdict::Hold { flow });
                }
                Gate::Forward => {}
                Gate::Drop => {
                    tables.refuse(flow.backend);
                    return Some(Verdict::Refuse(Reason::GateClosed));
                }
                // New packets queue behind those of their flow that still wait; with none waiting, they pass.
                Gate::Replay if is_drained(tables, flow.backend) => {}
                Gate::Hold | Gate::HoldNew | Gate::Replay => return Some(Verdict::Hold { flow }),
            }
            if location.link.interface == 0 {
                return Some(Verdict::Refuse(Reason::NoRoute));
            }
            let mut room = location.mtu as usize;
            if flow.kind.mode() == Mode::Dsr {
                if location.tunnel == 0 {
                    return Some(Verdict::Refuse(Reason::NoTunnel));
                }
                room = room.saturating_sub(location.overhead());
            }
            // Merged segments are cut anew on their way out, as small as they have to be.
            let fits = location.mtu == 0 || packet.length() - LINK_HEADER <= room || packet.segment() != 0;
            if !fits {
                return Some(Verdict::TooBig { mtu: room as u32 });
            }
        }
        Direction::ToClient => {
            let Some(header) = packet.window::<LINK_HEADER>(0) else {
                return Some(Verdict::Refuse(Reason::Truncated));
            };
            if !location.link.is_origin_of(header, arrival.interface) {
                return Some(Verdict::Refuse(Reason::StaleSite));
            }
            if transport.flags & RST != 0 {
                if !matches!(gate, Gate::Forward) {
                    return Some(Verdict::Refuse(Reason::ResetWhileHeld));
                }
                tables.account_reset(flow.member);
            }
        }
    }
    // Written only when the coarse clock has moved on, so that the record's cache line stays shared.
    if flow.seen.load(Relaxed) != arrival.now {
        flow.seen.store(arrival.now, Relaxed);
    }
    if transport.flags & (FIN | RST) != 0 {
        flow.note(if transport.flags & RST != 0 { State::RESET } else { State::FINISHED });
    }
    tables.account(flow.member, direction, packet.length() as u64);
    Some(Verdict::Forward { flow, location })
}

/// Whether everything that was captured for the backend has been sent.
#[inline(always)]
fn is_drained<const W: usize, T: Tables<W>>(tables: &T, backend: u32) -> bool {
    match tables.hold(backend) {
        Some(hold) => hold.captured.load(Relaxed) == hold.settled.load(Relaxed),
        None => false,
    }
}
