//! ICMP through the core on the host: errors in both directions and every mode, echo, and packet-too-big.
#![expect(clippy::unwrap_used, reason = "fixtures state what they expect by unwrapping")]

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering::Relaxed;

use lb_core::checksum::fold;
use lb_core::host::{Frame, FrameBuilder, HostTables, Segment};
use lb_core::record::{
    Backend, HoldCounters, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions,
};
use lb_core::{Action, Arrival, Gate, GateWord, Mode, Reason, Slot, V4, V6, process};

const CLIENT_SIDE: u32 = 3;
const SITE_SIDE: u32 = 4;
const CLIENT_LINK: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 1, 0xc], [2, 0, 0, 0, 0, 0xc]);
const SITE_LINK: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 1, 0xa], [2, 0, 0, 0, 0, 0xa]);
const CLIENT: [&str; 2] = ["10.0.0.1:4000", "[fd00::1]:4000"];
const SERVICE: [&str; 2] = ["10.0.0.100:80", "[fd00::100]:80"];
const BACKEND: [&str; 2] = ["10.1.0.1:8080", "[fd00:1::1]:8080"];
const ROUTER: [&str; 2] = ["10.77.0.1", "fd77::1"];

fn words(ip: IpAddr) -> [u32; 4] {
    match ip {
        IpAddr::V4(v4) => [0, 0, 0, u32::from_ne_bytes(v4.octets())],
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            std::array::from_fn(|i| u32::from_ne_bytes(octets[4 * i..4 * i + 4].try_into().unwrap()))
        }
    }
}

fn narrow<const W: usize>(ip: IpAddr) -> [u32; W] {
    words(ip)[4 - W..].try_into().unwrap()
}

fn end(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// One service over one backend, reached through a tunnel whose way takes 1,500 bytes.
struct World {
    v6: bool,
    four: HostTables<1>,
    six: HostTables<4>,
}

fn fill<const W: usize>(tables: &mut HostTables<W>, mode: Mode, v6: bool) {
    let family = usize::from(v6);
    let record = Backend {
        address: words(end(BACKEND[family]).ip()),
        port: 8080_u16.to_be(),
        incarnation: 1,
        ..Backend::default()
    };
    record.word.store(GateWord::new(Gate::Forward, Slot::A, 1).bits(), Relaxed);
    tables.backends = vec![record];
    tables.holds = vec![HoldCounters::default()];
    let link = Link::new(SITE_SIDE, SITE_LINK.1, SITE_LINK.0);
    tables.locations = vec![Location::tunnel4(link, 1500, 0x0101_0101, 0x0202_0202)];
    tables.places = vec![Place::new(0, 0); 251];
    let nat: IpAddr = if v6 { "fd00:9::1" } else { "10.9.0.1" }.parse().unwrap();
    tables.nat_source = Some(NatSource { base: narrow(nat), host_mask: [0; W] });
    let service = Service { number: 0, ring: 0, places: 251, options: ServiceOptions::new(mode, false) };
    let address = narrow(end(SERVICE[family]).ip());
    for (port, protocol) in [(80, 6), (80, 17), (0, if v6 { 58 } else { 1 })] {
        tables.services.insert(ServiceKey { address, port: u16::to_be(port), protocol }, service);
    }
}

impl World {
    fn new(mode: Mode, v6: bool) -> Self {
        let mut world = World { v6, four: HostTables::default(), six: HostTables::default() };
        if v6 {
            fill(&mut world.six, mode, v6)
        } else {
            fill(&mut world.four, mode, v6)
        }
        world
    }

    fn run(&self, frame: &mut Frame, interface: u32) -> Action {
        let arrival = Arrival { interface, now: 1 };
        if self.v6 { process(V6, frame, &self.six, arrival) } else { process(V4, frame, &self.four, arrival) }
    }

    fn counted(&self, reason: Reason) -> u64 {
        self.four.counted(reason) + self.six.counted(reason)
    }

    fn close(&self) {
        let word = GateWord::new(Gate::Hold, Slot::A, 2).bits();
        let backend = if self.v6 { &self.six.backends[0] } else { &self.four.backends[0] };
        backend.word.store(word, Relaxed);
    }

    /// Sends a client's datagram; what arrives at the site.
    fn opened(&self, segment: Segment) -> Frame {
        let family = usize::from(self.v6);
        let mut frame = datagram(CLIENT_LINK, end(CLIENT[family]), end(SERVICE[family]), segment);
        assert_eq!(self.run(&mut frame, CLIENT_SIDE), Action::Transmit { interface: SITE_SIDE });
        frame
    }
}

fn datagram(
    link: ([u8; 6], [u8; 6]),
    source: SocketAddr,
    destination: SocketAddr,
    segment: Segment,
) -> Frame {
    FrameBuilder { link, source, destination, ttl: 64, segment, payload: vec![7; 90] }.build()
}

/// An ICMP message with true checksums around a body.
fn icmp(link: ([u8; 6], [u8; 6]), from: IpAddr, to: IpAddr, head: [u8; 8], body: &[u8]) -> Frame {
    let v6 = from.is_ipv6();
    // A datagram without checksum of the same length, made over.
    let mut frame = FrameBuilder {
        link,
        source: (from, 0).into(),
        destination: (to, 0).into(),
        ttl: 64,
        segment: Segment::Udp { checksum: false },
        payload: body.to_vec(),
    }
    .build();
    let at = if v6 { 54 } else { 34 };
    frame.0[at..at + 8].copy_from_slice(&head);
    if v6 {
        frame.0[20] = 58;
    } else {
        frame.0[23] = 1;
        frame.0[24..26].fill(0);
        let header = checksum(&frame.0[14..34], 0);
        frame.0[24..26].copy_from_slice(&header);
    }
    let sum = checksum(&frame.0[at..], pseudo_header(&frame));
    frame.0[at + 2..at + 4].copy_from_slice(&sum);
    frame
}

fn pseudo_header(frame: &Frame) -> u64 {
    if frame.0[12] == 8 {
        return 0;
    }
    let addresses = frame.0[22..54].chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])));
    addresses.sum::<u64>() + (frame.0.len() - 54) as u64 + 58
}

fn checksum(bytes: &[u8], start: u64) -> [u8; 2] {
    let words =
        bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    (!fold(words.sum::<u64>() + start)).to_be_bytes()
}

fn has_true_checksums(frame: &Frame) -> bool {
    let at = if frame.0[12] == 8 { 34 } else { 54 };
    let header = frame.0[12] != 8 || checksum(&frame.0[14..34], 0) == [0, 0];
    header && checksum(&frame.0[at..], pseudo_header(frame)) == [0, 0]
}

/// Sender and receiver of the packet that an error quotes.
fn quoted(frame: &Frame) -> (SocketAddr, SocketAddr) {
    let v4 = frame.0[12] == 8;
    let at = if v4 { 42 } else { 62 };
    let whole = [&[0; 12][..], if v4 { &[8, 0] } else { &[0x86, 0xdd] }, &frame.0[at..]].concat();
    let (source, destination, _) = Frame(whole).ends();
    (source, destination)
}

fn unreachable(v6: bool) -> [u8; 8] {
    if v6 { [1, 4, 0, 0, 0, 0, 0, 0] } else { [3, 3, 0, 0, 0, 0, 0, 0] }
}

#[test]
fn an_error_from_the_sites_side_reaches_the_client_as_if_there_were_no_load_balancer() {
    for v6 in [false, true] {
        for mode in [Mode::Nat, Mode::Transparent] {
            let family = usize::from(v6);
            let world = World::new(mode, v6);
            let sent = world.opened(Segment::Udp { checksum: true });
            let (nat, backend, _) = sent.ends();
            let router: IpAddr = ROUTER[family].parse().unwrap();
            for (reporter, shown) in [(router, router), (backend.ip(), end(SERVICE[family]).ip())] {
                let mut error = icmp(SITE_LINK, reporter, nat.ip(), unreachable(v6), &sent.0[14..]);
                let action = world.run(&mut error, SITE_SIDE);
                assert_eq!(action, Action::Transmit { interface: CLIENT_SIDE }, "{mode:?} v6 {v6}");
                let (source, destination, _) = error.ends();
                assert_eq!((source.ip(), destination.ip()), (shown, end(CLIENT[family]).ip()));
                assert_eq!(quoted(&error), (end(CLIENT[family]), end(SERVICE[family])));
                assert!(has_true_checksums(&error), "{mode:?} v6 {v6}");
            }
            assert_eq!(world.counted(Reason::ErrorToClient), 2);

            let mut elsewhere = icmp(CLIENT_LINK, router, nat.ip(), unreachable(v6), &sent.0[14..]);
            assert_eq!(world.run(&mut elsewhere, SITE_SIDE), Action::Drop);
            assert_eq!(world.counted(Reason::StaleSite), 1);

            world.close();
            let mut late = icmp(SITE_LINK, router, nat.ip(), unreachable(v6), &sent.0[14..]);
            assert_eq!(
                world.run(&mut late, SITE_SIDE),
                Action::Drop,
                "a server that moves is not unreachable"
            );
            assert_eq!(world.counted(Reason::ResetWhileHeld), 1);
        }
    }
}

#[test]
fn an_error_from_the_clients_side_reaches_the_backend() {
    for v6 in [false, true] {
        for mode in [Mode::Nat, Mode::Transparent, Mode::Dsr] {
            let family = usize::from(v6);
            let world = World::new(mode, v6);
            let sent = world.opened(Segment::Tcp { flags: 2 });
            let (client, service) = (end(CLIENT[family]), end(SERVICE[family]));
            // What the client was sent, and a router on the way found too big.
            let answer = datagram(CLIENT_LINK, service, client, Segment::Tcp { flags: 0x10 });
            let router: IpAddr = ROUTER[family].parse().unwrap();
            let head = if v6 { [2, 0, 0, 0, 0, 0, 5, 0] } else { [3, 4, 0, 0, 0, 0, 5, 0] };
            let mut error = icmp(CLIENT_LINK, router, service.ip(), head, &answer.0[14..14 + 60]);
            let before = error.clone();
            let action = world.run(&mut error, CLIENT_SIDE);
            assert_eq!(action, Action::Transmit { interface: SITE_SIDE }, "{mode:?} v6 {v6}");
            assert_eq!(world.counted(Reason::ErrorToBackend), 1);
            if mode == Mode::Dsr {
                assert_eq!(error.0.len(), before.0.len() + 20);
                assert_eq!(error.0[23], if v6 { 41 } else { 4 });
                continue;
            }
            let (near, backend, _) = sent.ends();
            let (source, destination, _) = error.ends();
            assert_eq!((source.ip(), destination.ip()), (router, backend.ip()));
            assert_eq!(quoted(&error), (backend, near), "as the backend had sent it");
            assert!(has_true_checksums(&error), "{mode:?} v6 {v6}");
        }
    }
}

#[test]
fn an_echo_to_a_virtual_address_is_answered_and_no_other() {
    for v6 in [false, true] {
        let family = usize::from(v6);
        let world = World::new(Mode::Nat, v6);
        let (client, service) = (end(CLIENT[family]).ip(), end(SERVICE[family]).ip());
        let head = [if v6 { 128 } else { 8 }, 0, 0, 0, 1, 2, 3, 4];
        let mut echo = icmp(CLIENT_LINK, client, service, head, b"ping me");
        assert_eq!(world.run(&mut echo, CLIENT_SIDE), Action::Transmit { interface: CLIENT_SIDE });
        let (source, destination, _) = echo.ends();
        assert_eq!((source.ip(), destination.ip()), (service, client));
        assert_eq!(echo.0[..12], [CLIENT_LINK.1, CLIENT_LINK.0].concat());
        let at = if v6 { 54 } else { 34 };
        assert_eq!(echo.0[at], if v6 { 129 } else { 0 });
        assert_eq!(&echo.0[at + 4..], b"\x01\x02\x03\x04ping me");
        assert!(has_true_checksums(&echo));

        let mut ours = icmp(CLIENT_LINK, client, ROUTER[family].parse().unwrap(), head, b"ping");
        assert_eq!(world.run(&mut ours, CLIENT_SIDE), Action::Pass);
    }
}

#[test]
fn a_packet_that_does_not_fit_the_tunnel_is_answered() {
    for v6 in [false, true] {
        let family = usize::from(v6);
        let world = World::new(Mode::Dsr, v6);
        let (client, service) = (end(CLIENT[family]), end(SERVICE[family]));
        let segment = Segment::Udp { checksum: true };
        let mut big = FrameBuilder {
            link: CLIENT_LINK,
            source: client,
            destination: service,
            ttl: 64,
            segment,
            payload: vec![1; 1480],
        };
        big.payload.truncate(if v6 { 1480 - 48 } else { 1480 - 28 });
        assert_eq!(world.run(&mut big.build(), CLIENT_SIDE), Action::Transmit { interface: SITE_SIDE });
        big.payload.push(1);
        let mut frame = big.build();
        assert_eq!(world.run(&mut frame, CLIENT_SIDE), Action::Transmit { interface: CLIENT_SIDE });
        assert!(has_true_checksums(&frame));
        let (source, destination, _) = frame.ends();
        assert_eq!((source.ip(), destination.ip()), (service.ip(), client.ip()));
        assert_eq!(quoted(&frame), (client, service));
        let (at, kind) = if v6 { (54, [2, 0]) } else { (34, [3, 4]) };
        assert_eq!(frame.0[at..at + 2], kind);
        assert_eq!(frame.0[at + 4..at + 8], 1480_u32.to_be_bytes());
        assert_eq!(world.counted(Reason::TooBigAnswered), 1);

        if !v6 {
            let mut may_be_fragmented = big.build();
            may_be_fragmented.0[20] = 0;
            assert_eq!(world.run(&mut may_be_fragmented, CLIENT_SIDE), Action::Drop);
            assert_eq!(world.counted(Reason::TooBig), 1);
        }
    }
}
