//! The tunnel's end: what is stripped, what is left alone, what is dropped, and that nothing else changes.

use std::net::{IpAddr, SocketAddr};

use lb_core::Packet;
use lb_core::decapsulate::{Class, Encapsulation, Reason, Verdict};
use lb_core::host::{Frame, FrameBuilder, HostTunnels, Outer, Segment};
use lb_core::packet::LINK_HEADER;
use proptest::prelude::*;

const ALL: [Encapsulation; 3] = Encapsulation::ALL;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn outer_is_v4(encapsulation: Encapsulation) -> bool {
    encapsulation == Encapsulation::V4InV4
}

fn inner_is_v4(encapsulation: Encapsulation) -> bool {
    encapsulation != Encapsulation::V6InV6
}

fn tunnels() -> HostTunnels {
    let mut tunnels = HostTunnels::default();
    tunnels.endpoints.extend([ip("10.2.1.2"), ip("fd00:2:1::2")]);
    tunnels.sources.extend([ip("10.2.1.254"), ip("fd00:2:1::fe")]);
    tunnels.destinations.extend([ip("10.0.0.100"), ip("fd00::100")]);
    tunnels
}

fn outer(encapsulation: Encapsulation) -> Outer {
    if outer_is_v4(encapsulation) {
        Outer::new(ip("10.2.1.254"), ip("10.2.1.2"))
    } else {
        Outer::new(ip("fd00:2:1::fe"), ip("fd00:2:1::2"))
    }
}

fn inner(encapsulation: Encapsulation, payload: &[u8]) -> Frame {
    let (source, destination) = if inner_is_v4(encapsulation) {
        (ip("10.0.0.1"), ip("10.0.0.100"))
    } else {
        (ip("fd00::1"), ip("fd00::100"))
    };
    FrameBuilder {
        link: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
        source: SocketAddr::new(source, 40_000),
        destination: SocketAddr::new(destination, 6379),
        ttl: 60,
        segment: Segment::Tcp { flags: 0x18 },
        payload: payload.to_vec(),
    }
    .build()
}

/// Sets the traffic class of a frame's (outer) header, with its checksum.
fn with_traffic_class(frame: &Frame, class: u8) -> Frame {
    let mut frame = frame.clone();
    let header = &mut frame.0[LINK_HEADER..];
    if header[0] >> 4 == 4 {
        header[1] = class;
        mend(&mut frame);
    } else {
        header[0] = 0x60 | class >> 4;
        header[1] = class << 4 | header[1] & 0xf;
    }
    frame
}

/// Computes the checksum of the first IPv4 header anew, in the plainest way.
fn mend(frame: &mut Frame) {
    let header = &mut frame.0[LINK_HEADER..LINK_HEADER + 20];
    header[10..12].fill(0);
    let mut sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    header[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// What becomes of an encapsulated packet after `change` was made to its frame.
fn fate(encapsulation: Encapsulation, change: impl FnOnce(&mut Frame)) -> (Verdict, Reason) {
    let mut frame = outer(encapsulation).encapsulate(&inner(encapsulation, b"hello"));
    change(&mut frame);
    fate_of(&mut frame)
}

fn fate_of(frame: &mut Frame) -> (Verdict, Reason) {
    let tunnels = tunnels();
    let before = frame.clone();
    let verdict = tunnels.process(frame);
    let mut counted = Reason::ALL.iter().filter(|reason| tunnels.counted(**reason) > 0);
    let reason = *counted.next().expect("every packet is counted");
    assert_eq!((counted.next(), tunnels.counted(reason)), (None, 1), "once");
    match verdict {
        Verdict::Strip(_) => assert_eq!(reason.class(), Class::Strip),
        Verdict::Pass => assert_eq!(reason.class(), Class::Pass),
        Verdict::Drop => assert_eq!(reason.class(), Class::Drop),
    }
    if !matches!(verdict, Verdict::Strip(_)) {
        assert_eq!(*frame, before, "what is not stripped is not touched");
    }
    (verdict, reason)
}

#[test]
fn each_encapsulation_is_taken_off() {
    for encapsulation in ALL {
        let sent = inner(encapsulation, b"hello");
        let mut frame = outer(encapsulation).encapsulate(&sent);
        let (verdict, reason) = fate_of(&mut frame);
        assert!(matches!(verdict, Verdict::Strip(strip) if strip.encapsulation == encapsulation));
        let expected = match encapsulation {
            Encapsulation::V4InV4 => Reason::V4InV4,
            Encapsulation::V6InV6 => Reason::V6InV6,
            Encapsulation::V4InV6 => Reason::V4InV6,
        };
        assert_eq!(reason, expected);
        assert_eq!(frame, sent);
    }
}

#[test]
fn what_is_not_for_us_is_left_alone() {
    for encapsulation in ALL {
        let v4 = outer_is_v4(encapsulation);
        // Protocol or next header; last byte of the outer destination and source; of the inner destination.
        let (protocol, destination, source) = if v4 { (23, 33, 29) } else { (20, 53, 37) };
        let inner_destination = if v4 { 34 } else { 54 } + if inner_is_v4(encapsulation) { 19 } else { 39 };
        for (at, value, reason) in [
            (12, 0x81, Reason::NotATunnel),
            (protocol, 6, Reason::NotATunnel),
            (destination, 77, Reason::NotAnEndpoint),
            (source, 77, Reason::SourceRefused),
            (inner_destination, 77, Reason::NotAWorkload),
        ] {
            let (_, found) = fate(encapsulation, |frame| {
                frame.0[at] = value;
                if v4 {
                    mend(frame);
                }
            });
            assert_eq!(found, reason, "{encapsulation:?}: {value} at {at}");
        }
    }
    // Options and fragments exist in IPv4 headers only; IPv6 has extension headers instead, which are other protocols.
    for (at, value, reason) in
        [(14, 0x46, Reason::IpOptions), (20, 0x20, Reason::Fragment), (21, 9, Reason::Fragment)]
    {
        let change = |frame: &mut Frame| {
            frame.0[at] = value;
            mend(frame);
        };
        assert_eq!(fate(Encapsulation::V4InV4, change).1, reason);
    }
    assert_eq!(fate(Encapsulation::V6InV6, |frame| frame.0[20] = 44).1, Reason::NotATunnel);
}

#[test]
fn what_a_tunnel_must_drop_is_dropped() {
    for encapsulation in ALL {
        let v4 = outer_is_v4(encapsulation);
        let (ttl, inner) = if v4 { (22, 34) } else { (21, 54) };
        let inner_length = inner + if inner_is_v4(encapsulation) { 3 } else { 5 };
        for (at, value, reason) in [
            (ttl, 0, Reason::TtlExpired),
            (inner, 0x55, Reason::Malformed),
            // Longer than the packet around it.
            (inner_length, 255, Reason::Malformed),
        ] {
            let (_, found) = fate(encapsulation, |frame| {
                frame.0[at] = value;
                if v4 {
                    mend(frame);
                }
            });
            assert_eq!(found, reason, "{encapsulation:?}: {value} at {at}");
        }
    }
    assert_eq!(fate(Encapsulation::V4InV4, |frame| frame.0[24] ^= 1).1, Reason::BadChecksum);
    // A header that is shorter than a header.
    assert_eq!(fate(Encapsulation::V4InV6, |frame| frame.0[54] = 0x44).1, Reason::Malformed);
}

#[test]
fn a_hop_that_counted_down_to_one_was_not_one_too_many() {
    // RFC 1122 section 3.2.1.7: a receiver does not discard for it.
    for encapsulation in ALL {
        let last = Outer { ttl: 1, ..outer(encapsulation) };
        let mut frame = last.encapsulate(&inner(encapsulation, b""));
        assert!(matches!(fate_of(&mut frame).0, Verdict::Strip(_)));
    }
}

#[test]
fn every_cut_is_survived() {
    for encapsulation in ALL {
        let whole = outer(encapsulation).encapsulate(&inner(encapsulation, b"hello"));
        for length in 0..whole.0.len() {
            let mut frame = Frame(whole.0[..length].to_vec());
            let reason = fate_of(&mut frame).1;
            assert_eq!(reason, Reason::Truncated, "{encapsulation:?} cut to {length}");
        }
    }
}

#[test]
fn padding_stays_behind_the_inner_packet() {
    for encapsulation in ALL {
        let sent = inner(encapsulation, b"");
        let mut frame = outer(encapsulation).encapsulate(&sent);
        frame.0.extend([0xee; 7]);
        assert!(matches!(fate_of(&mut frame).0, Verdict::Strip(_)));
        assert_eq!(frame.0, [&sent.0[..], &[0xee; 7]].concat());
    }
}

#[test]
fn congestion_is_passed_on() {
    const NOT: u8 = 0b00;
    const ECT1: u8 = 0b01;
    const ECT0: u8 = 0b10;
    const CE: u8 = 0b11;
    // RFC 6040, figure 4: rows are the inner mark, columns the outer one (not-ECT, ECT(0), ECT(1), CE).
    let table = [
        (NOT, [Some(NOT), Some(NOT), Some(NOT), None]),
        (ECT0, [Some(ECT0), Some(ECT0), Some(ECT1), Some(CE)]),
        (ECT1, [Some(ECT1), Some(ECT1), Some(ECT1), Some(CE)]),
        (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
    ];
    // The inner DSCP stays, whatever the outer one is (RFC 2983's pipe model).
    const INNER_DSCP: u8 = 46 << 2;
    const OUTER_DSCP: u8 = 10 << 2;
    for encapsulation in ALL {
        for (inner_mark, row) in table {
            for (outer_mark, expected) in [NOT, ECT0, ECT1, CE].into_iter().zip(row) {
                let plain = inner(encapsulation, b"hello");
                let sent = with_traffic_class(&plain, INNER_DSCP | inner_mark);
                let outer = Outer { traffic_class: OUTER_DSCP | outer_mark, ..outer(encapsulation) };
                let mut frame = outer.encapsulate(&sent);
                let (verdict, reason) = fate_of(&mut frame);
                let what = format!("{encapsulation:?}: {inner_mark:02b} in {outer_mark:02b}");
                let Some(expected) = expected else {
                    assert_eq!((verdict, reason), (Verdict::Drop, Reason::Congested), "{what}");
                    continue;
                };
                assert_eq!(frame, with_traffic_class(&plain, INNER_DSCP | expected), "{what}");
                assert!(frame.has_true_checksums(), "{what}");
                let Verdict::Strip(strip) = verdict else { panic!("{what}: {verdict:?}") };
                let changed = frame != sent && !inner_is_v4(encapsulation);
                assert_eq!(strip.change != 0, changed, "{what}");
                assert_eq!(sum(&sent.0, strip.change), sum(&frame.0, 0), "{what}");
            }
        }
    }
}

/// The ones' complement sum of a frame's IP packet and a word, as a network card reports it.
fn sum(frame: &[u8], more: u16) -> u16 {
    let words = frame[LINK_HEADER..].chunks(2);
    let words = words.map(|word| u16::from_ne_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    words.chain([more]).fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

fn any_encapsulation() -> impl Strategy<Value = Encapsulation> {
    prop::sample::select(ALL.to_vec())
}

proptest! {
    #[test]
    fn encapsulated_and_taken_out_again_it_is_the_same(
        encapsulation in any_encapsulation(),
        payload in prop::collection::vec(any::<u8>(), 0..1400),
        ttl in 1..=255_u8,
        outer_dscp in 0..64_u8,
        inner_class: u8,
        protocol: u8,
        link: [u8; 12],
    ) {
        let mut sent = with_traffic_class(&inner(encapsulation, &payload), inner_class);
        sent.0[..12].copy_from_slice(&link);
        // Whatever it carries.
        if inner_is_v4(encapsulation) {
            sent.0[23] = protocol;
            mend(&mut sent);
        } else {
            sent.0[20] = protocol;
        }
        // RFC 6040 section 4.1: the encapsulator copies the mark.
        let traffic_class = outer_dscp << 2 | inner_class & 3;
        // Unless there is nothing to copy it to, what goes in comes out.
        let outer = Outer { ttl, traffic_class, ..outer(encapsulation) };
        let mut frame = outer.encapsulate(&sent);
        let verdict = tunnels().process(&mut frame);
        prop_assert!(matches!(verdict, Verdict::Strip(strip) if strip.change == 0), "{:?}", verdict);
        prop_assert_eq!(frame, sent);
    }

    #[test]
    fn any_damage_is_decided_about(
        encapsulation in any_encapsulation(),
        damage in prop::collection::vec((0..120_usize, any::<u8>()), 0..6),
        length in 0..140_usize,
    ) {
        let mut frame = outer(encapsulation).encapsulate(&inner(encapsulation, &[7; 40]));
        frame.0.truncate(length);
        for (at, value) in damage {
            if let Some(byte) = frame.0.get_mut(at) {
                *byte = value;
            }
        }
        let before = frame.clone();
        if let (Verdict::Strip(strip), _) = fate_of(&mut frame) {
            prop_assert_eq!(frame.length() + strip.encapsulation.outer_header(), before.length());
        }
    }
}
