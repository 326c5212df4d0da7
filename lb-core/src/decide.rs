//! What happens to a packet.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::checksum::{fold, sum, sum_complement};
use crate::family::{Family, IpHeader};
use crate::gate::{Gate, GateWord};
use crate::maglev::RING_SIZE;
use crate::packet::{LINK_HEADER, Packet, read32};
use crate::reason::Reason;
use crate::record::{
    Backend, Direction, Flow, FlowKey, HoldCounters, Link, Location, NatSource, Service, ServiceKey,
};

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

const TCP_FLAGS: usize = 13;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// NAT ports are taken from here up: the well-known ones stay out of servers' access rules and logs.
const LOWEST_NAT_PORT: u32 = 1024;

/// Ports tried for a new flow before it is refused. With the source prefix as wide as the port range, even at
/// nine tenths full eight misses in a row have a chance of less than one in two.
const PORT_TRIES: u32 = 8;

/// Where and when a packet came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Interface that it came in on.
    pub interface: u32,
    /// The caller's coarse clock, the unit of [`Flow::seen`].
    pub now: u64,
}

/// The tables of one address family, wherever they are kept.
pub trait Tables<const W: usize> {
    /// The flow of a packet.
    fn flow(&self, key: &FlowKey<W>) -> Option<&Flow<W>>;
    /// Adds a flow where there is none of that key; false where there is one, or no room.
    fn add_flow(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool;
    /// Writes a flow, over one of the same key too; false where there is no room.
    fn put_flow(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool;
    /// The service at an address.
    fn service(&self, key: &ServiceKey<W>) -> Option<&Service>;
    /// Backend number at a place of a Maglev ring.
    fn pick(&self, ring: u32, place: u32) -> Option<u32>;
    /// A backend's record.
    fn backend(&self, number: u32) -> Option<&Backend>;
    /// A site's location.
    fn location(&self, site: u32) -> Option<&Location>;
    /// A backend's hold counters.
    fn hold(&self, backend: u32) -> Option<&HoldCounters>;
    /// Source prefix towards backends.
    fn nat_source(&self) -> Option<&NatSource<W>>;
    /// Counts a packet.
    fn count(&self, reason: Reason);
    /// Counts a packet that the backend's hold did not keep.
    fn refuse(&self, backend: u32);
    /// Counts a packet of a backend.
    fn account(&self, backend: u32, direction: Direction, bytes: u64);
}

/// What happens to a packet. Payloads are references into the tables, since by value the compiler would spill
/// whole records to the kernel program's small stack.
pub enum Verdict<'t, const W: usize> {
    /// Translate as the flow says and send over the link.
    Forward {
        /// How to translate.
        flow: &'t Flow<W>,
        /// Where to.
        link: &'t Link,
        /// Which way, for the counters.
        direction: Direction,
        /// [`TCP`] or [`UDP`].
        protocol: u8,
    },
    /// Translate as the flow says and capture for the backend's hold queue.
    Hold {
        /// How to translate; names the backend.
        flow: &'t Flow<W>,
        /// [`TCP`] or [`UDP`].
        protocol: u8,
    },
    /// Leave to this machine's own network stack.
    Pass(Reason),
    /// Drop.
    Drop(Reason),
}

/// What the verdict is about, read once.
struct Transport {
    protocol: u8,
    ttl: u8,
    /// TCP flags; zero for UDP.
    flags: u8,
}

/// Decides about one packet. A new flow is written to the tables on the way.
#[inline(always)]
pub fn decide<'t, const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &'t T,
    arrival: Arrival,
) -> Verdict<'t, W> {
    let IpHeader { source, destination, protocol, ttl } = match family.parse(packet) {
        Ok(header) => header,
        Err(reason) => return Verdict::Pass(reason),
    };
    if protocol != TCP && protocol != UDP {
        return Verdict::Pass(Reason::OtherProtocol);
    }
    let Some(ports) = packet.window::<8>(F::TRANSPORT) else { return Verdict::Pass(Reason::Truncated) };
    let key = FlowKey { source, destination, ports: read32(ports, 0), protocol: protocol as u32 };
    let mut flags = 0;
    if protocol == TCP {
        let Some(header) = packet.window::<20>(F::TRANSPORT) else { return Verdict::Pass(Reason::Truncated) };
        flags = header[TCP_FLAGS];
    }
    let transport = Transport { protocol, ttl, flags };

    // The full tuple first and the service only on a miss: established flows are nearly all packets.
    let opens = flags & (SYN | ACK) == SYN;
    if !opens
        && let Some(flow) = tables.flow(&key)
        && let Some(verdict) = follow(packet, tables, flow, &transport, arrival)
    {
        return verdict;
    }
    if let Err(reason) = admit(family, packet, tables, &key, opens, arrival) {
        return match reason {
            Reason::NotAService | Reason::Truncated => Verdict::Pass(reason),
            _ => Verdict::Drop(reason),
        };
    }
    // Inserted, then looked up again: the verdict refers to the table, not to the stack.
    if let Some(flow) = tables.flow(&key)
        && let Some(verdict) = follow(packet, tables, flow, &transport, arrival)
    {
        return verdict;
    }
    Verdict::Drop(Reason::NoPort)
}

/// The verdict for a known flow, or `None` where the flow is void because its backend's number was given on.
#[inline(always)]
fn follow<'t, const W: usize, P: Packet, T: Tables<W>>(
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
        return Some(Verdict::Drop(Reason::TtlExpired));
    }
    // One load: gate, location and generation always belong together.
    let word = GateWord::from_bits(backend.word.load(Relaxed));
    let gate = word.gate();
    let site = backend.sites.at(word.slot());
    let Some(location) = tables.location(site) else { return Some(Verdict::Drop(Reason::NoRoute)) };

    let (link, direction) = if flow.direction == Direction::ToBackend as u32 {
        match gate {
            Gate::Forward => {}
            Gate::Drop => {
                tables.refuse(flow.backend);
                return Some(Verdict::Drop(Reason::GateClosed));
            }
            // New packets queue behind those of their flow that still wait; with none waiting, they pass.
            Gate::Replay if is_drained(tables, flow.backend) => {}
            Gate::Hold | Gate::Replay => return Some(Verdict::Hold { flow, protocol: transport.protocol }),
        }
        if location.link.interface == 0 {
            return Some(Verdict::Drop(Reason::NoRoute));
        }
        (&location.link, Direction::ToBackend)
    } else {
        let Some(header) = packet.window::<LINK_HEADER>(0) else {
            return Some(Verdict::Pass(Reason::Truncated));
        };
        if !location.link.is_origin_of(header, arrival.interface) {
            return Some(Verdict::Drop(Reason::StaleSite));
        }
        if !matches!(gate, Gate::Forward) && transport.flags & RST != 0 {
            return Some(Verdict::Drop(Reason::ResetWhileHeld));
        }
        (&flow.link, Direction::ToClient)
    };
    // Written only when the coarse clock has moved on, so that the record's cache line stays shared.
    if flow.seen.load(Relaxed) != arrival.now {
        flow.seen.store(arrival.now, Relaxed);
    }
    tables.account(flow.backend, direction, packet.length() as u64);
    Some(Verdict::Forward { flow, link, direction, protocol: transport.protocol })
}

/// Whether everything that was captured for the backend has been sent.
#[inline(always)]
fn is_drained<const W: usize, T: Tables<W>>(tables: &T, backend: u32) -> bool {
    match tables.hold(backend) {
        Some(hold) => hold.captured.load(Relaxed) == hold.settled.load(Relaxed),
        None => false,
    }
}

/// Picks a backend for a new flow, reserves its NAT port and writes both directions' entries.
#[inline(always)]
fn admit<const W: usize, F: Family<W>, P: Packet, T: Tables<W>>(
    family: F,
    packet: &mut P,
    tables: &T,
    key: &FlowKey<W>,
    opens: bool,
    arrival: Arrival,
) -> Result<(), Reason> {
    let [c0, c1, v0, v1] = key.ports.to_ne_bytes();
    let (client_port, service_port) = (u16::from_ne_bytes([c0, c1]), u16::from_ne_bytes([v0, v1]));
    let service = tables
        .service(&ServiceKey { address: key.destination, port: service_port, protocol: key.protocol as u16 })
        .ok_or(Reason::NotAService)?;
    if key.protocol == TCP as u32 && !opens {
        return Err(Reason::NoFlow);
    }
    let hash = hash(key);
    let number = tables.pick(service.ring, (hash >> 32) as u32 % RING_SIZE).ok_or(Reason::NoBackend)?;
    let backend = tables.backend(number).ok_or(Reason::NoBackend)?;
    // A SYN on a known 5-tuple that picks the same backend keeps its port: a retransmitted SYN must not open
    // a second connection.
    if opens
        && let Some(known) = tables.flow(key)
        && known.backend == number
        && known.incarnation == backend.incarnation
    {
        return Ok(());
    }
    let prefix = tables.nat_source().ok_or(Reason::NoNatSource)?;
    let backend_address = family.narrow(&backend.address);
    let nat_address = choose(prefix, hash);
    let addresses = sum(&nat_address)
        + sum(&backend_address)
        + sum_complement(&key.source)
        + sum_complement(&key.destination);
    let address_delta = fold(addresses);
    let old_ports = !client_port as u64 + !service_port as u64;

    let header = packet.window::<LINK_HEADER>(0).ok_or(Reason::Truncated)?;
    let mut flow = Flow {
        seen: AtomicU64::new(arrival.now),
        backend: number,
        incarnation: backend.incarnation,
        direction: Direction::ToClient as u32,
        ports: u32::from_ne_bytes([v0, v1, c0, c1]),
        address_delta: !address_delta,
        transport_delta: 0,
        reserved: 0,
        source: key.destination,
        destination: key.source,
        link: Link::back(arrival.interface, header),
    };
    let [b0, b1] = backend.port.to_ne_bytes();
    let mut attempt = 0;
    while attempt < PORT_TRIES {
        let [n0, n1] = nat_port(hash as u32, attempt).to_be_bytes();
        let new_ports = u16::from_ne_bytes([n0, n1]) as u64 + backend.port as u64;
        let transport_delta = fold(addresses + old_ports + new_ports);
        let reply = FlowKey {
            source: backend_address,
            destination: nat_address,
            ports: u32::from_ne_bytes([b0, b1, n0, n1]),
            protocol: key.protocol,
        };
        flow.transport_delta = !transport_delta;
        // The reply's entry first and only if it is new: that is what reserves the port.
        if tables.add_flow(&reply, &flow) {
            flow.direction = Direction::ToBackend as u32;
            flow.ports = u32::from_ne_bytes([n0, n1, b0, b1]);
            flow.address_delta = address_delta;
            flow.transport_delta = transport_delta;
            flow.source = nat_address;
            flow.destination = backend_address;
            return if tables.put_flow(key, &flow) { Ok(()) } else { Err(Reason::NoPort) };
        }
        attempt += 1;
    }
    Err(Reason::NoPort)
}

/// The `attempt`-th port to try for a flow, in host order.
#[inline(always)]
fn nat_port(hash: u32, attempt: u32) -> u16 {
    // An odd stride visits different ports; 64,512 ports from the lowest one up.
    let offset = hash.wrapping_add(attempt.wrapping_mul(0x2f1b)) % (0x1_0000 - LOWEST_NAT_PORT);
    (LOWEST_NAT_PORT + offset) as u16
}

/// The flow's source address out of the prefix.
#[inline(always)]
fn choose<const W: usize>(prefix: &NatSource<W>, hash: u64) -> [u32; W] {
    let mut address = prefix.base;
    let mut i = 0;
    while i < W {
        address[i] |= (hash >> 16) as u32 & prefix.host_mask[i];
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
    // The last rounds of a 64-bit mixer, so that the ports reach every bit.
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 29
}
