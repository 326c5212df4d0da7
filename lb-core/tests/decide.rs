//! Packet fixtures through the core on the host: verdict, bytes and counters.
#![expect(clippy::unwrap_used, reason = "fixtures state what they expect by unwrapping")]

use std::net::{IpAddr, SocketAddr};

use lb_core::host::{Frame, FrameBuilder, HostTables, Segment};
use lb_core::record::{
    Backend, HoldCounters, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions,
};
use lb_core::{Action, Arrival, Gate, GateWord, Mode, Packet, Reason, Slot, Tables, V4, V6, process};

const CLIENT_SIDE: u32 = 3;
const SITE_A: Site = Site { interface: 4, neighbour: [2, 0, 0, 0, 0, 0xa], own: [2, 0, 0, 0, 1, 0xa] };
const SITE_B: Site = Site { interface: 5, neighbour: [2, 0, 0, 0, 0, 0xb], own: [2, 0, 0, 0, 1, 0xb] };
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 1, 0xc];
const SYN: u8 = 2;
const ACK: u8 = 0x10;
const RST: u8 = 4;

/// A site behind an interface.
struct Site {
    interface: u32,
    neighbour: [u8; 6],
    own: [u8; 6],
}

impl Site {
    fn location(&self) -> Location {
        Location::plain(Link::new(self.interface, self.neighbour, self.own), 0)
    }
}

/// One service over one backend at site A, in both families.
struct World {
    v4: HostTables<1>,
    v6: HostTables<4>,
}

fn words(ip: &str) -> [u32; 4] {
    match ip.parse().unwrap() {
        IpAddr::V4(v4) => [0, 0, 0, u32::from_ne_bytes(v4.octets())],
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            std::array::from_fn(|i| u32::from_ne_bytes(octets[4 * i..4 * i + 4].try_into().unwrap()))
        }
    }
}

fn backend(address: &str) -> Backend {
    let record =
        Backend { address: words(address), port: 8080_u16.to_be(), incarnation: 1, ..Backend::default() };
    record.sites.store([0, 1]);
    record.word.store(GateWord::new(Gate::Forward, Slot::A, 1).bits(), std::sync::atomic::Ordering::Relaxed);
    record
}

fn common<const W: usize>(tables: &mut HostTables<W>, address: &str, service: [u32; W], nat: [u32; W]) {
    tables.backends.push(backend(address));
    tables.holds.push(HoldCounters::default());
    tables.locations = vec![SITE_A.location(), SITE_B.location()];
    tables.places = vec![Place::new(0, 0); 251];
    tables.nat_source = Some(NatSource { base: nat, host_mask: [0; W] });
    for protocol in [6, 17] {
        let key = ServiceKey { address: service, port: 80_u16.to_be(), protocol };
        tables.services.insert(
            key,
            Service { number: 0, ring: 0, places: 251, options: ServiceOptions::new(Mode::Nat, false) },
        );
    }
}

impl World {
    fn new() -> Self {
        let mut world = World { v4: HostTables::default(), v6: HostTables::default() };
        let [_, _, _, service] = words("10.0.0.100");
        let [_, _, _, nat] = words("10.9.0.1");
        common(&mut world.v4, "10.1.0.1", [service], [nat]);
        common(&mut world.v6, "fd00:1::1", words("fd00::100"), words("fd00:9::1"));
        world
    }

    fn run(&self, frame: &mut Frame, interface: u32) -> Action {
        let arrival = Arrival { interface, now: 1 };
        match frame.0[12] {
            0x08 => process(V4, frame, &self.v4, arrival),
            _ => process(V6, frame, &self.v6, arrival),
        }
    }

    fn store(&self, word: GateWord) {
        for backends in [&self.v4.backends, &self.v6.backends] {
            backends[0].word.store(word.bits(), std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn counted(&self, reason: Reason) -> u64 {
        self.v4.counted(reason) + self.v6.counted(reason)
    }
}

fn from_client(v6: bool, segment: Segment) -> FrameBuilder {
    let (source, destination) =
        if v6 { ("[fd00::1]:4000", "[fd00::100]:80") } else { ("10.0.0.1:4000", "10.0.0.100:80") };
    FrameBuilder {
        link: (OUR_MAC, CLIENT_MAC),
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        ttl: 64,
        segment,
        payload: vec![7; 9],
    }
}

/// The answer to a frame as the site at the other end of `link` would send it.
fn answer(frame: &Frame, link: &Site, segment: Segment) -> Frame {
    let (source, destination, _) = frame.ends();
    FrameBuilder {
        link: (link.own, link.neighbour),
        source: destination,
        destination: source,
        ttl: 60,
        segment,
        payload: vec![1; 30],
    }
    .build()
}

const SEGMENTS: [Segment; 3] =
    [Segment::Tcp { flags: SYN }, Segment::Udp { checksum: true }, Segment::Udp { checksum: false }];

#[test]
fn a_flow_goes_to_its_backend_and_its_answers_back_to_the_client() {
    for v6 in [false, true] {
        for segment in SEGMENTS {
            let world = World::new();
            let sent = from_client(v6, segment).build();
            let mut frame = sent.clone();
            assert_eq!(world.run(&mut frame, CLIENT_SIDE), Action::Transmit { interface: 4 });
            let (source, destination, ttl) = frame.ends();
            let (nat, address): (IpAddr, SocketAddr) = if v6 {
                ("fd00:9::1".parse().unwrap(), "[fd00:1::1]:8080".parse().unwrap())
            } else {
                ("10.9.0.1".parse().unwrap(), "10.1.0.1:8080".parse().unwrap())
            };
            assert_eq!((source.ip(), destination, ttl), (nat, address, 63));
            assert!(source.port() >= 2048);
            assert_eq!(frame.0[..12], [SITE_A.neighbour, SITE_A.own].concat());
            assert!(frame.has_true_checksums(), "{segment:?} v6 {v6}");

            let reply =
                if let Segment::Tcp { .. } = segment { Segment::Tcp { flags: SYN | ACK } } else { segment };
            let mut back = answer(&frame, &SITE_A, reply);
            assert_eq!(world.run(&mut back, 4), Action::Transmit { interface: CLIENT_SIDE });
            let (source, destination, ttl) = back.ends();
            let (client, service, _) = sent.ends();
            assert_eq!((source, destination, ttl), (service, client, 59));
            assert_eq!(back.0[..12], [CLIENT_MAC, OUR_MAC].concat());
            assert!(back.has_true_checksums());
            assert_eq!((world.counted(Reason::ToBackend), world.counted(Reason::ToClient)), (1, 1));
        }
    }
}

#[test]
fn each_gate_does_what_its_name_says() {
    for v6 in [false, true] {
        let world = World::new();
        let tables = |world: &World| {
            if v6 {
                world.v6.holds[0].refused.load(std::sync::atomic::Ordering::Relaxed)
            } else {
                world.v4.holds[0].refused.load(std::sync::atomic::Ordering::Relaxed)
            }
        };
        let frame = || from_client(v6, Segment::Udp { checksum: true }).build();
        world.store(GateWord::new(Gate::Hold, Slot::A, 2));
        let mut held = frame();
        assert_eq!(world.run(&mut held, CLIENT_SIDE), Action::Capture { backend: 0, mode: Mode::Nat });
        assert_ne!(held.ends(), frame().ends(), "a held packet is translated already");
        assert!(held.has_true_checksums());
        assert_eq!(world.counted(Reason::Held), 1);

        world.store(GateWord::new(Gate::Drop, Slot::A, 3));
        assert_eq!(world.run(&mut frame(), CLIENT_SIDE), Action::Drop);
        assert_eq!((world.counted(Reason::GateClosed), tables(&world)), (1, 1));

        // Replay lets new packets through only when nothing waits.
        world.store(GateWord::new(Gate::Replay, Slot::B, 4));
        assert_eq!(world.run(&mut frame(), CLIENT_SIDE), Action::Transmit { interface: 5 });
        if v6 {
            world.v6.capture(0)
        } else {
            world.v4.capture(0)
        }
        assert_eq!(world.run(&mut frame(), CLIENT_SIDE), Action::Capture { backend: 0, mode: Mode::Nat });

        world.store(GateWord::new(Gate::Forward, Slot::B, 5));
        assert_eq!(world.run(&mut frame(), CLIENT_SIDE), Action::Transmit { interface: 5 });
    }
}

#[test]
fn where_new_connections_are_held_everything_else_passes() {
    for v6 in [false, true] {
        let world = World::new();
        let captured = Action::Capture { backend: 0, mode: Mode::Nat };
        let (syn, ack) = (Segment::Tcp { flags: SYN }, Segment::Tcp { flags: ACK });
        let under_way = || from_client(v6, syn).build();
        world.run(&mut under_way(), CLIENT_SIDE);
        world.store(GateWord::new(Gate::HoldNew, Slot::A, 2));
        // What belongs to a handshake goes on, and so does a datagram, known or not.
        let passes = Action::Transmit { interface: 4 };
        assert_eq!(world.run(&mut from_client(v6, ack).build(), CLIENT_SIDE), passes);
        let datagram = Segment::Udp { checksum: true };
        assert_eq!(world.run(&mut from_client(v6, datagram).build(), CLIENT_SIDE), passes);
        assert_eq!(world.run(&mut under_way(), CLIENT_SIDE), captured, "a SYN again");
        let other = || {
            let mut frame = from_client(v6, syn);
            frame.source.set_port(4001);
            frame.build()
        };
        assert_eq!(world.run(&mut other(), CLIENT_SIDE), captured);
        assert_eq!(world.counted(Reason::Held), 2);
        world.store(GateWord::new(Gate::Forward, Slot::B, 3));
        assert_eq!(world.run(&mut other(), CLIENT_SIDE), Action::Transmit { interface: 5 });
    }
}

#[test]
fn only_the_backends_location_is_heard() {
    let world = World::new();
    let mut frame = from_client(false, Segment::Tcp { flags: SYN }).build();
    world.run(&mut frame, CLIENT_SIDE);
    let from_a = answer(&frame, &SITE_A, Segment::Tcp { flags: ACK });
    let from_b = answer(&frame, &SITE_B, Segment::Tcp { flags: RST });
    assert_eq!(world.run(&mut from_b.clone(), 5), Action::Drop);
    assert_eq!(world.run(&mut from_a.clone(), 5), Action::Drop, "right neighbour, wrong interface");
    assert_eq!(world.run(&mut from_b.clone(), 4), Action::Drop, "right interface, wrong neighbour");
    assert_eq!(world.counted(Reason::StaleSite), 3);
    assert_eq!(world.run(&mut from_a.clone(), 4), Action::Transmit { interface: CLIENT_SIDE });
    world.store(GateWord::new(Gate::Forward, Slot::B, 2));
    assert_eq!(world.run(&mut from_a.clone(), 4), Action::Drop);
    assert_eq!(world.run(&mut from_b.clone(), 5), Action::Transmit { interface: CLIENT_SIDE });
}

#[test]
fn no_reset_leaves_while_the_gate_is_not_forward() {
    for gate in [Gate::Hold, Gate::Replay, Gate::Drop] {
        let world = World::new();
        let mut frame = from_client(false, Segment::Tcp { flags: SYN }).build();
        world.run(&mut frame, CLIENT_SIDE);
        world.store(GateWord::new(gate, Slot::A, 2));
        let mut reset = answer(&frame, &SITE_A, Segment::Tcp { flags: RST | ACK });
        assert_eq!(world.run(&mut reset, 4), Action::Drop, "{gate:?}");
        assert_eq!(world.counted(Reason::ResetWhileHeld), 1);
        let mut data = answer(&frame, &SITE_A, Segment::Tcp { flags: ACK });
        assert_eq!(world.run(&mut data, 4), Action::Transmit { interface: CLIENT_SIDE }, "{gate:?}");
    }
}

#[test]
fn a_syn_opens_a_flow_and_a_retransmitted_one_keeps_its_port() {
    let world = World::new();
    let stray = from_client(false, Segment::Tcp { flags: ACK });
    assert_eq!(world.run(&mut stray.build(), CLIENT_SIDE), Action::Drop);
    assert_eq!(world.counted(Reason::NoFlow), 1);

    let syn = from_client(false, Segment::Tcp { flags: SYN });
    let (mut first, mut again) = (syn.build(), syn.build());
    world.run(&mut first, CLIENT_SIDE);
    world.run(&mut again, CLIENT_SIDE);
    assert_eq!(first, again);
    assert_eq!((world.v4.newcomers().len(), world.v4.flows().len()), (2, 0));
}

#[test]
fn a_number_given_to_another_backend_voids_its_flows() {
    let mut world = World::new();
    let data = from_client(false, Segment::Tcp { flags: ACK });
    world.run(&mut from_client(false, Segment::Tcp { flags: SYN }).build(), CLIENT_SIDE);
    assert_eq!(world.run(&mut data.build(), CLIENT_SIDE), Action::Transmit { interface: 4 });
    world.v4.backends[0].incarnation = 2;
    assert_eq!(world.run(&mut data.build(), CLIENT_SIDE), Action::Drop);
    assert_eq!(world.counted(Reason::NoFlow), 1);
}

#[test]
fn ports_run_out_with_a_reason() {
    let world = World::new();
    let mut refused = 0;
    for client in 0..70_000_u32 {
        let mut frame = from_client(false, Segment::Udp { checksum: true });
        frame.source = SocketAddr::from(([10, 0, (client >> 16) as u8, 1], client as u16));
        if world.run(&mut frame.build(), CLIENT_SIDE) == Action::Drop {
            refused += 1;
        }
    }
    assert_eq!(world.counted(Reason::NoPort), refused);
    assert!(refused > 6_512, "63,488 ports cannot serve 70,000 flows");
    // Both entries of a flow or none.
    assert_eq!(world.v4.newcomers().len() as u64, 2 * (70_000 - refused));
}

#[test]
fn what_is_not_ours_passes_untouched() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Reason, Change); 6] = [
        ("another port", Reason::NotAService, |bytes| bytes[37] = 81),
        ("ICMP", Reason::OtherProtocol, |bytes| bytes[23] = 1),
        ("options", Reason::IpOptions, |bytes| bytes[14] = 0x46),
        ("later fragment", Reason::UnknownFragment, |bytes| bytes[21] = 1),
        ("cut in the IP header", Reason::Truncated, |bytes| bytes.truncate(30)),
        ("cut in the TCP header", Reason::Truncated, |bytes| bytes.truncate(50)),
    ];
    for (what, reason, change) in changes {
        let world = World::new();
        let mut frame = from_client(false, Segment::Tcp { flags: SYN }).build();
        change(&mut frame.0);
        let before = frame.clone();
        assert_eq!(world.run(&mut frame, CLIENT_SIDE), Action::Pass, "{what}");
        assert_eq!(frame, before, "{what}");
        assert_eq!(world.counted(reason), 1, "{what}");
    }
}

#[test]
fn a_packet_at_its_last_hop_is_dropped() {
    for v6 in [false, true] {
        let world = World::new();
        let mut frame = from_client(v6, Segment::Udp { checksum: true });
        frame.ttl = 1;
        assert_eq!(world.run(&mut frame.build(), CLIENT_SIDE), Action::Drop);
        assert_eq!(world.counted(Reason::TtlExpired), 1);
    }
}

#[test]
fn missing_pieces_have_their_own_reasons() {
    type Break = fn(&mut HostTables<1>);
    let breaks: [(Reason, Break); 4] = [
        (Reason::NoNatSource, |tables| tables.nat_source = None),
        (Reason::NoBackend, |tables| tables.places.fill(Place::EMPTY)),
        (Reason::NoRoute, |tables| tables.locations[0].link.interface = 0),
        (Reason::NoRoute, |tables| tables.locations.clear()),
    ];
    for (reason, destroy) in breaks {
        let mut world = World::new();
        destroy(&mut world.v4);
        let mut frame = from_client(false, Segment::Udp { checksum: true }).build();
        assert_eq!(world.run(&mut frame, CLIENT_SIDE), Action::Drop, "{reason:?}");
        assert_eq!(world.counted(reason), 1, "{reason:?}");
    }
}

#[test]
fn a_window_ends_where_the_frame_ends() {
    let mut frame = Frame(vec![0; 20]);
    assert!(frame.window::<6>(14).is_some());
    assert!(frame.window::<7>(14).is_none());
    assert!(HostTables::<1>::default().location(0).is_none());
}
