//! Flows as they are shown, and the maps that tests of flows share.

use std::sync::atomic::AtomicU64;

use lb_core::flow::{Common, Kind};
use lb_core::record::{Backend, Link};

use super::*;
use crate::datapath::xdp::bpf;

/// Tables of their own; every backend has incarnation 7.
pub(in crate::datapath::xdp) fn maps() -> FlowMaps {
    let backends = BatchMap::create(bpf::ARRAY, 4).unwrap();
    for number in 0..4 {
        backends.put(&number, &Backend { incarnation: 7, ..Backend::default() }).unwrap();
    }
    FlowMaps { v4: family(), v6: family(), backends }
}

fn family<const W: usize>() -> FamilyFlows<W> {
    FamilyFlows {
        established: BatchMap::create(bpf::HASH, 20_000).unwrap(),
        newcomers: BatchMap::create(bpf::LRU_HASH, 1000).unwrap(),
    }
}

/// A flow by the numbers that tests tell flows apart with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::datapath::xdp) struct Id {
    pub(in crate::datapath::xdp) client_port: u16,
    pub(in crate::datapath::xdp) protocol: u8,
    pub(in crate::datapath::xdp) backend: u32,
}

fn word(address: &str) -> u32 {
    u32::from_ne_bytes(address.parse::<Ipv4Addr>().unwrap().octets())
}

fn wire(source: u16, destination: u16) -> u32 {
    let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// How a client's packets are named, and how they reach the backend.
pub(in crate::datapath::xdp) fn keys(id: Id) -> [FlowKey<1>; 2] {
    let (client, service) = (word("198.51.100.7"), word("10.0.0.100"));
    let protocol = id.protocol.into();
    let key = FlowKey { source: [client], destination: [service], ports: wire(id.client_port, 80), protocol };
    let translated = FlowKey {
        source: [word("10.9.0.1")],
        destination: [word("10.1.0.1")],
        ports: wire(id.client_port ^ 0x8000, 8080),
        protocol,
    };
    [key, translated]
}

/// An entry of the flow, last seen at `seen`.
pub(in crate::datapath::xdp) fn entry(
    id: Id,
    direction: Direction,
    seen: u64,
    state: State,
) -> (FlowKey<1>, Flow<1>) {
    let [key, translated] = keys(id);
    let common = Common {
        now: seen,
        backend: id.backend,
        incarnation: 7,
        member: 0,
        mode: Mode::Nat,
        state,
        link: Link::default(),
    };
    let (from, to) = match direction {
        Direction::ToBackend => (key, translated),
        Direction::ToClient => (translated.reversed(), key.reversed()),
    };
    let flow = Flow::between(&from, &to, direction, &common);
    assert_eq!(flow.seen.load(std::sync::atomic::Ordering::Relaxed), seen);
    (from, flow)
}

/// Adds both entries.
pub(in crate::datapath::xdp) fn add(map: &FlowMap<1>, id: Id, seen: [u64; 2], states: [State; 2]) {
    for (direction, at) in [(Direction::ToBackend, 0), (Direction::ToClient, 1)] {
        let (key, flow) = entry(id, direction, seen[at], states[at]);
        map.put(&key, &flow).unwrap();
    }
}

fn filter() -> FlowFilter {
    FlowFilter { client: None, service: None, backend: None, protocol: None, limit: 100 }
}

#[test]
fn a_flow_is_shown_as_client_and_backend_know_it() {
    let id = Id { client_port: 40_000, protocol: TCP, backend: 3 };
    let (key, flow) = entry(id, Direction::ToBackend, 5, State::NEW);
    let row = row(&key, &flow).unwrap();
    assert_eq!(row.client, "198.51.100.7:40000".parse().unwrap());
    assert_eq!(row.service, "10.0.0.100:80".parse().unwrap());
    assert_eq!(row.source, "10.9.0.1:7232".parse().unwrap());
    assert_eq!((row.protocol, row.backend, row.mode), (Protocol::Tcp, BackendNumber(3), Mode::Nat));
    let six = FlowKey::<4> {
        source: [u32::from_ne_bytes([0x20, 1, 0xd, 0xb8]), 0, 0, u32::from_ne_bytes([0, 0, 0, 1])],
        destination: [0; 4],
        ports: wire(1, 2),
        protocol: UDP.into(),
    };
    let flow = Flow::<4> {
        seen: AtomicU64::new(0),
        state: AtomicU64::new(0),
        backend: 0,
        incarnation: 0,
        ports: 0,
        address_delta: 0,
        transport_delta: 0,
        source: [0; 4],
        destination: [0; 4],
        link: Link::default(),
        member: 0,
        kind: Kind::new(Direction::ToBackend, Mode::Dsr),
    };
    let row = super::row(&six, &flow).unwrap();
    assert_eq!((row.client, row.protocol), ("[2001:db8::1]:1".parse().unwrap(), Protocol::Udp));
}

#[test]
fn filters_let_through_what_all_of_them_do() {
    let id = Id { client_port: 40_000, protocol: TCP, backend: 3 };
    let (key, flow) = entry(id, Direction::ToBackend, 5, State::NEW);
    let row = row(&key, &flow).unwrap();
    let service = Some(("10.0.0.100:80".parse().unwrap(), Protocol::Tcp));
    for (filter, through) in [
        (filter(), true),
        (FlowFilter { client: Some("198.51.100.0/24".parse().unwrap()), ..filter() }, true),
        (FlowFilter { client: Some("198.51.100.8".parse().unwrap()), ..filter() }, false),
        (FlowFilter { service, ..filter() }, true),
        (FlowFilter { service: service.map(|(address, _)| (address, Protocol::Udp)), ..filter() }, false),
        (FlowFilter { backend: Some(BackendNumber(3)), service, ..filter() }, true),
        (FlowFilter { backend: Some(BackendNumber(2)), service, ..filter() }, false),
        (FlowFilter { protocol: Some(Protocol::Udp), ..filter() }, false),
    ] {
        assert_eq!(lets_through(&filter, &row), through, "{filter:?}");
    }
}

#[test]
fn states_have_the_names_that_an_operator_expects() {
    let half = |flags: &str| {
        Some(Half { seen: Ticks(0), finished: flags.contains('F'), reset: flags.contains('R') })
    };
    for (standing, halves, expected) in [
        (Standing::Newcomer, [half(""), half("")], FlowState::New),
        (Standing::Newcomer, [half(""), half("R")], FlowState::Reset),
        (Standing::Established, [half(""), half("")], FlowState::Established),
        (Standing::Established, [half(""), None], FlowState::Established),
        (Standing::Established, [half("F"), half("")], FlowState::HalfClosed),
        (Standing::Established, [half("F"), half("F")], FlowState::Closed),
        (Standing::Established, [half("FR"), half("F")], FlowState::Reset),
    ] {
        assert_eq!(state(standing, halves), expected, "{halves:?}");
    }
}

/// Over the kernel's maps.
mod with_root {
    use super::*;

    #[test]
    fn flows_are_listed_from_all_tables_and_the_limit_is_said() {
        let (maps, clock) = (maps(), TickClock::new().unwrap());
        let now = clock.now().unwrap();
        for client_port in 1000..1040 {
            let backend = u32::from(client_port % 2);
            let id = Id { client_port, protocol: TCP, backend };
            add(&maps.v4.established, id, [now, now - 250], [State::NEW; 2]);
        }
        let newcomer = Id { client_port: 2000, protocol: UDP, backend: 2 };
        add(&maps.v4.newcomers, newcomer, [now - 1000; 2], [State::NEW; 2]);
        let all = maps.list(&clock, &filter()).unwrap();
        assert_eq!((all.flows.len(), all.is_cut), (41, false));
        let of_one = FlowFilter { backend: Some(BackendNumber(1)), ..filter() };
        assert_eq!(maps.list(&clock, &of_one).unwrap().flows.len(), 20);
        let new = maps.list(&clock, &FlowFilter { protocol: Some(Protocol::Udp), ..filter() }).unwrap();
        assert_eq!((new.flows[0].state, new.flows[0].client.port()), (FlowState::New, 2000));
        let expected = clock.tick() * 1000;
        assert!((expected..expected + Duration::from_secs(1)).contains(&new.flows[0].idle));
        let some = maps.list(&clock, &FlowFilter { limit: 7, ..filter() }).unwrap();
        assert_eq!((some.flows.len(), some.is_cut), (7, true));
        let exactly = maps.list(&clock, &FlowFilter { limit: 41, ..filter() }).unwrap();
        assert_eq!((exactly.flows.len(), exactly.is_cut), (41, false));
    }
}
