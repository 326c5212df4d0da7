//! New flows: which backend takes them, under which port, and when they are established.
//!
//! ```text
//!               SYN, first datagram            the client acknowledges the server's SYN-ACK;
//!                                              a second datagram after an answer
//!   (nothing) ---------------------> newcomer --------------------------------------------> established
//!                                       |                                                        |
//!                                       | pushed out by newer ones (LRU)                         | expiry
//! ```
//!
//! Whoever only sends (a SYN flood from made-up addresses) never gets past the newcomers, and there pushes out nobody
//! but other newcomers. What an acknowledgement has to say to be believed is a number that only the server's answer
//! tells.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::decide::{ACK, Arrival, RST, SYN, TCP, Transport, Verdict, follow};
use crate::family::Family;
use crate::flow::{Common, Direction, Flow, FlowKey, Mode, State};
use crate::gate::{Gate, GateWord};
use crate::maglev;
use crate::name::{Named, Part};
use crate::packet::{LINK_HEADER, Packet, read32};
use crate::reason::Reason;
use crate::record::{Link, NatSource, PREFIX_BUDGETS, Place, Service, ServiceKey};
use crate::tables::Tables;

/// Client's NAT ports start here: well-known ones stay out of servers' access rules and logs, and those below are the
/// daemon's own, for its health checks.
pub const LOWEST_NAT_PORT: u16 = 2048;

/// Ports tried for a new flow before it is refused. Each is drawn anew out of the whole prefix, so that even at nine
/// tenths full a flow is refused once in six times, at half full never.
const PORT_TRIES: u32 = 16;

/// Places of the ring tried to steer a new flow away from a backend that is held.
const STEER_TRIES: u32 = 8;

/// How far beyond the expected number an acknowledgement may be: what a server says in its first moment.
const ACKNOWLEDGED_AHEAD: u32 = 1 << 16;

/// The verdict for a packet that takes a closer look; `None` where it may open a flow.
#[inline(always)]
pub(crate) fn search<'t, const W: usize, P: Packet, T: Tables<W>>(
    packet: &mut P,
    tables: &'t T,
    named: &Named<W>,
    arrival: Arrival,
) -> Option<Verdict<'t, W>> {
    let Named { key, transport, part } = named;
    let flow = match tables.flow(key) {
        // A SYN on a connection that was seen to end is a new flow. On one that lives it goes to the server, which
        // knows better (RFC 5961, section 4): nobody outside can end a connection with it.
        Some(flow) if transport.opens() && is_over(tables, flow, key.protocol) => {
            if flow.kind.mode() != Mode::Dsr {
                tables.remove_flow(&flow.answers(key.protocol));
            }
            tables.remove_flow(key);
            return None;
        }
        Some(flow) => flow,
        None => {
            let newcomer = tables.newcomer(key)?;
            // Established, it is looked up again: the newcomer's memory may be another's from then on.
            if note_newcomer(packet, tables, newcomer, transport, part) && establish(tables, key, newcomer) {
                tables.flow(key)?
            } else {
                newcomer
            }
        }
    };
    // Where the flow is void, since its backend's number was given on, a new one takes its place.
    follow(packet, tables, flow, transport, arrival)
}

/// Whether the connection was seen to end: reset by the server, or finished in both directions. A reset in the
/// client's name may be anybody's; if the server believed it, it takes the SYN that follows as the next connection.
#[inline(always)]
fn is_over<const W: usize, T: Tables<W>>(tables: &T, flow: &Flow<W>, protocol: u32) -> bool {
    let ours = flow.state();
    if ours.has(State::PINNED) {
        return false;
    }
    if flow.kind.mode() == Mode::Dsr {
        return ours.has_any(State::FINISHED.and(State::RESET));
    }
    let theirs = match tables.flow(&flow.answers(protocol)) {
        Some(answers) => answers.state(),
        None => return true,
    };
    theirs.has(State::RESET) || ours.has(State::FINISHED) && theirs.has(State::FINISHED)
}

/// Notes what a newcomer's packet shows; whether the flow is confirmed by it.
#[inline(always)]
fn note_newcomer<const W: usize, P: Packet, T: Tables<W>>(
    packet: &mut P,
    tables: &T,
    flow: &Flow<W>,
    transport: &Transport,
    part: &Part,
) -> bool {
    let is_tcp = transport.protocol == TCP;
    let Part::Transport { at, .. } = *part else { return false };
    let (mut sequence, mut acknowledgement) = (0, 0);
    if is_tcp {
        let Some(header) = packet.window::<20>(at) else { return false };
        (sequence, acknowledgement) = (u32::from_be(read32(header, 4)), u32::from_be(read32(header, 8)));
    }
    if flow.kind.direction() == Direction::ToClient {
        // A reset tells nothing that only the server knows: its number is zero or what the client's segment
        // acknowledged (RFC 9293, section 3.10.7.1).
        if !flow.state().has(State::ANSWERED) && transport.flags & RST == 0 {
            let expected = sequence.wrapping_add((transport.flags & SYN != 0) as u32);
            flow.note(State::answered(expected));
        }
        return false;
    }
    if is_tcp && transport.flags & (SYN | ACK) != ACK {
        return false;
    }
    if flow.kind.mode() == Mode::Dsr {
        // The answers are not seen here: a second packet has to do.
        let is_second = flow.state().has(State::ANSWERED);
        flow.note(State::ANSWERED);
        return is_second;
    }
    let Some(answers) = tables.newcomer(&flow.answers(transport.protocol as u32)) else { return false };
    let state = answers.state();
    state.has(State::ANSWERED)
        && (!is_tcp || acknowledgement.wrapping_sub(state.expected()) < ACKNOWLEDGED_AHEAD)
}

/// Moves a newcomer to the established flows, both entries or none; whether it is there.
#[inline(always)]
fn establish<const W: usize, T: Tables<W>>(tables: &T, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
    let reply = flow.answers(key.protocol);
    if flow.kind.mode() != Mode::Dsr {
        let Some(answers) = tables.newcomer(&reply) else { return false };
        if !tables.add_flow(&reply, answers) {
            return false;
        }
        if !tables.add_flow(key, flow) {
            tables.remove_flow(&reply);
            return false;
        }
        tables.remove_newcomer(&reply);
    } else if !tables.add_flow(key, flow) {
        return false;
    }
    tables.remove_newcomer(key);
    true
}

/// Picks a backend for a new flow, reserves its NAT port and writes its entries.
#[inline(always)]
pub(crate) fn open<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    named: &Named<W>,
    arrival: Arrival,
) -> Result<(), Reason> {
    let Named { key, transport, part } = named;
    let Part::Transport { at, .. } = *part else { return Err(Reason::UnknownFragment) };
    let [_, _, v0, v1] = key.ports.to_ne_bytes();
    let port = u16::from_ne_bytes([v0, v1]);
    let service = tables
        .service(&ServiceKey { address: key.destination, port, protocol: key.protocol as u16 })
        .ok_or(Reason::NotAService)?;
    let mode = service.options.mode();
    // Without its handshake a connection cannot be given a port again; without translation of ports it can go on, by
    // the same choice that another load balancer has made.
    if transport.protocol == TCP && !transport.opens() && (mode == Mode::Nat || transport.flags & SYN != 0) {
        return Err(Reason::NoFlow);
    }
    spend(family, tables, &key.source, arrival.now)?;
    let hash = hash(key);
    let place = pick(tables, service, hash)?;
    let number = place.backend().ok_or(Reason::NoBackend)?;
    let backend = tables.backend(number).ok_or(Reason::NoBackend)?;
    let header = packet.window::<LINK_HEADER>(0).ok_or(Reason::Truncated)?;
    let common = Common {
        now: arrival.now,
        backend: number,
        incarnation: backend.incarnation,
        member: place.member(),
        mode,
        state: State::NEW,
        link: Link::back(arrival.interface, header),
    };
    let mut salt = hash;
    if transport.protocol == TCP {
        // The next attempt of the same client draws other ports.
        let header = packet.window::<20>(at).ok_or(Reason::Truncated)?;
        salt ^= read32(header, 4) as u64;
    }
    let mut translated = *key;
    if mode != Mode::Dsr {
        translated.destination = family.narrow(&backend.address);
    }
    let done = match mode {
        Mode::Dsr => true,
        Mode::Transparent => {
            translated.ports = with_destination_port(key.ports, backend.port);
            reserve(tables, key, &translated, &common)
        }
        Mode::Nat => {
            let prefix = tables.nat_source().ok_or(Reason::NoNatSource)?;
            let mut attempt = 0;
            loop {
                if attempt == PORT_TRIES {
                    break false;
                }
                salt = mix(salt);
                translated.source = choose(prefix, salt);
                translated.ports = ports(nat_port(salt), backend.port);
                if reserve(tables, key, &translated, &common) {
                    break true;
                }
                attempt += 1;
            }
        }
    };
    if !done {
        return Err(Reason::NoPort);
    }
    // A void flow of the same name, if there is one, would be found before the new one. Its answers go by expiry.
    tables.remove_flow(key);
    if !tables.put_newcomer(key, &Flow::between(key, &translated, Direction::ToBackend, &common)) {
        if mode != Mode::Dsr {
            tables.remove_newcomer(&translated.reversed());
        }
        return Err(Reason::NoRoom);
    }
    tables.account_opened(common.member);
    Ok(())
}

/// Writes the answers' entry if there is none of that name, established or not: that is what reserves the port.
#[inline(always)]
fn reserve<const W: usize, T: Tables<W>>(
    tables: &T,
    key: &FlowKey<W>,
    translated: &FlowKey<W>,
    common: &Common,
) -> bool {
    let answers = translated.reversed();
    tables.flow(&answers).is_none()
        && tables
            .add_newcomer(&answers, &Flow::between(&answers, &key.reversed(), Direction::ToClient, common))
}

/// The flow's place in the service's ring, or a later one where the service steers flows away from held backends.
#[inline(always)]
fn pick<const W: usize, T: Tables<W>>(tables: &T, service: &Service, hash: u64) -> Result<Place, Reason> {
    let mut draw = hash;
    let mut attempt = 0;
    let mut first = Place::EMPTY;
    while attempt < STEER_TRIES {
        let index = service.ring.wrapping_add(maglev::place(draw, service.places));
        let place = tables.place(index).unwrap_or(Place::EMPTY);
        if service.places == 0 {
            return Err(Reason::NoBackend);
        }
        if !service.options.steers() {
            return Ok(place);
        }
        if attempt == 0 {
            first = place;
        }
        if let Some(number) = place.backend()
            && let Some(backend) = tables.backend(number)
            && matches!(GateWord::from_bits(backend.word.load(Relaxed)).gate(), Gate::Forward)
        {
            return Ok(place);
        }
        draw = mix(draw);
        attempt += 1;
    }
    // Every backend that was asked is held: wait with the one that it would have been.
    Ok(first)
}

/// Counts a new flow against the bounds of its source prefix and of this CPU.
#[inline(always)]
pub(crate) fn spend<const W: usize, F: Family<W>, T: Tables<W>>(
    family: F,
    tables: &T,
    source: &[u32; W],
    now: u64,
) -> Result<(), Reason> {
    let Some(settings) = tables.settings() else { return Ok(()) };
    if settings.window == 0 {
        return Ok(());
    }
    let window = (now / settings.window as u64) as u32;
    let prefix = mix(family.network(source)) as u32 % PREFIX_BUDGETS;
    if let Some(budget) = tables.prefix_budget(prefix)
        && !take(budget, window, settings.new_flows_per_prefix)
    {
        return Err(Reason::NewFlowLimit);
    }
    if let Some(budget) = tables.cpu_budget()
        && !take(budget, window, settings.new_flows_per_cpu)
    {
        return Err(Reason::NewFlowLimit);
    }
    Ok(())
}

/// Takes one from a budget of `most` in each window. Two CPUs at the same time may take the same one: the bound is
/// meant against floods, not for accounts.
#[inline(always)]
fn take(budget: &AtomicU64, window: u32, most: u32) -> bool {
    let spent = budget.load(Relaxed);
    let taken = if (spent >> 32) as u32 == window { spent as u32 } else { 0 };
    if taken >= most {
        return false;
    }
    budget.store((window as u64) << 32 | (taken + 1) as u64, Relaxed);
    true
}

/// A port out of the clients' range, as on the wire.
#[inline(always)]
fn nat_port(draw: u64) -> u16 {
    let range = 0x1_0000 - LOWEST_NAT_PORT as u32;
    (LOWEST_NAT_PORT + ((draw as u16 as u32 * range) >> 16) as u16).to_be()
}

#[inline(always)]
fn ports(source: u16, destination: u16) -> u32 {
    let ([s0, s1], [d0, d1]) = (source.to_ne_bytes(), destination.to_ne_bytes());
    u32::from_ne_bytes([s0, s1, d0, d1])
}

#[inline(always)]
fn with_destination_port(both: u32, destination: u16) -> u32 {
    let [s0, s1, _, _] = both.to_ne_bytes();
    ports(u16::from_ne_bytes([s0, s1]), destination)
}

/// The flow's source address out of the prefix.
#[inline(always)]
fn choose<const W: usize>(prefix: &NatSource<W>, draw: u64) -> [u32; W] {
    let mut address = prefix.base;
    let mut i = 0;
    while i < W {
        address[i] |= (draw >> 24) as u32 & prefix.host_mask[i];
        i += 1;
    }
    address
}

/// A hash of the flow's client side and service: the same on every load balancer of a service.
#[inline(always)]
fn hash<const W: usize>(key: &FlowKey<W>) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15 ^ ((key.protocol as u64) << 32 | key.ports as u64);
    let mut i = 0;
    while i < W {
        hash = (hash ^ ((key.destination[i] as u64) << 32 | key.source[i] as u64))
            .wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
        i += 1;
    }
    mix(hash)
}

/// The last rounds of a 64-bit mixer (splitmix64), so that every bit reaches every other.
#[inline(always)]
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}
