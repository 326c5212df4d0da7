//! Arbitrary bytes through the whole core, over tables with flows in them.
//!
//! An input is a byte that chooses the service's mode and its backend's gate, and then packets: a byte of [`hints`], a
//! byte of length in units of eight bytes, and the frame. Hints let bytes become packets that get somewhere; without
//! them nearly everything would end at the first address.
//!
//! What must hold: no panic; a packet that is passed, or dropped by its verdict, is as it came; lengths change by
//! encapsulation and by answers of our own only; true checksums stay true; and the answer to a packet that reached a
//! backend reaches the client under the name that the client knows.
#![no_main]

use lb_core::host::{Frame, HostTables};
use lb_core::packet::LINK_HEADER;
use lb_core::record::{
    Backend, HoldCounters, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions,
};
use lb_core::{Action, Arrival, Family, Gate, GateWord, Mode, Reason, Slot, V4, V6, process};
use libfuzzer_sys::fuzz_target;
use std::sync::atomic::Ordering::Relaxed;

/// What is made of a packet's bytes before it arrives.
mod hints {
    /// Version, header length and EtherType are those of the family.
    pub const HEADER: u8 = 1;
    /// From the client to the service.
    pub const CLIENT: u8 = 2;
    /// From the backend, to whom the last packet that reached it came from.
    pub const ANSWER: u8 = 4;
    /// TCP (else UDP), where the two above hold.
    pub const TCP: u8 = 8;
    /// Lengths say what there is.
    pub const LENGTH: u8 = 16;
    /// Checksums are made true.
    pub const CHECKSUMS: u8 = 32;
    /// Not a fragment.
    pub const WHOLE: u8 = 64;
}

const CLIENT_SIDE: u32 = 3;
const SITE_SIDE: u32 = 4;
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
const SITE: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const OWN: [u8; 6] = [2, 0, 0, 0, 1, 0xa];

fuzz_target!(|data: &[u8]| {
    let Some((&choice, packets)) = data.split_first() else { return };
    if choice & 0x80 == 0 {
        World::<1, V4>::new(V4, choice).play(packets);
    } else {
        World::<4, V6>::new(V6, choice).play(packets);
    }
});

struct World<const W: usize, F> {
    family: F,
    tables: HostTables<W>,
    mode: Mode,
    gate: Gate,
    /// Addresses and ports of the last packet that reached the backend.
    reached: Option<Name>,
    /// Bytes of the site's tunnel header, if it is not reached directly.
    overhead: usize,
}

/// Addresses, ports and protocol of a packet, as they lie in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    source: Vec<u8>,
    destination: Vec<u8>,
    ports: [u8; 4],
    protocol: u8,
}

impl Name {
    fn reversed(&self) -> Self {
        let [a, b, c, d] = self.ports;
        Self {
            source: self.destination.clone(),
            destination: self.source.clone(),
            ports: [c, d, a, b],
            protocol: self.protocol,
        }
    }
}

fn address<const W: usize>(last: u8) -> [u32; W] {
    let mut words = [0; W];
    words[0] = u32::from_ne_bytes([if W == 1 { 10 } else { 0xfd }, 0, 0, if W == 1 { last } else { 0 }]);
    if W > 1 {
        words[W - 1] = u32::from_ne_bytes([0, 0, 0, last]);
    }
    words
}

impl<const W: usize, F: Family<W>> World<W, F> {
    fn new(family: F, choice: u8) -> Self {
        let mode = [Mode::Nat, Mode::Transparent, Mode::Dsr, Mode::Nat][usize::from(choice & 3)];
        let gate = [Gate::Forward, Gate::Forward, Gate::Hold, Gate::Drop][usize::from(choice >> 2 & 3)];
        let mut tables = HostTables::<W>::default();
        let mut wide = [0; 4];
        wide[4 - W..].copy_from_slice(&address::<W>(2));
        let backend = Backend { address: wide, port: 8080_u16.to_be(), incarnation: 1, ..Backend::default() };
        backend.word.store(GateWord::new(gate, Slot::A, 1).bits(), Relaxed);
        tables.backends.push(backend);
        tables.holds.push(HoldCounters::default());
        tables.places.push(Place::new(0, 0));
        let link = Link::new(SITE_SIDE, SITE, OWN);
        let mtu = if choice & 0x10 == 0 { 0 } else { 400 };
        let location = match choice >> 5 & 3 {
            0 => Location::plain(link, mtu),
            1 => Location::tunnel4(link, mtu, 0x0101_0101, 0x0202_0202),
            _ => Location::tunnel6(link, mtu, [1; 4], [2; 4]),
        };
        tables.locations.push(location);
        tables.nat_source = Some(NatSource { base: address(9), host_mask: [0; W] });
        let service = Service { number: 0, ring: 0, places: 1, options: ServiceOptions::new(mode, false) };
        for (port, protocol) in [(80, 6), (80, 17), (0, u16::from(F::ICMP))] {
            let key = ServiceKey { address: address(1), port: u16::to_be(port), protocol };
            tables.services.insert(key, service);
        }
        let overhead = if mode == Mode::Dsr { location.overhead() } else { 0 };
        Self { family, tables, mode, gate, reached: None, overhead }
    }

    fn play(mut self, mut packets: &[u8]) {
        while let Some((&[hints, eighths], rest)) = packets.split_first_chunk() {
            let length = usize::from(eighths) * 8 + 3;
            let (frame, rest) = rest.split_at(length.min(rest.len()));
            packets = rest;
            if frame.len() >= LINK_HEADER {
                self.arrive(hints, frame.to_vec());
            }
        }
    }

    fn arrive(&mut self, hints: u8, mut bytes: Vec<u8>) {
        let from_site = hints & hints::ANSWER != 0 && self.reached.is_some();
        self.prepare(hints, from_site, &mut bytes);
        let interface = if from_site { SITE_SIDE } else { CLIENT_SIDE };
        let before = Frame(bytes);
        let was_true = self.is_whole(&before) && before.has_true_checksums();
        let dropped_by_verdict = self.tables.counted(Reason::TooBigAnswered);
        let mut frame = before.clone();
        let action = process(self.family, &mut frame, &self.tables, Arrival { interface, now: 0 });
        match action {
            Action::Pass => assert_eq!(frame, before, "what is passed is as it came"),
            Action::Drop => {}
            Action::Capture { .. } => {
                assert_eq!(frame.0.len(), before.0.len());
                assert!(!was_true || frame.has_true_checksums(), "held, {before:02x?} became {frame:02x?}");
            }
            Action::Transmit { .. } if self.tables.counted(Reason::TooBigAnswered) > dropped_by_verdict => {
                assert!(frame.0.len() <= LINK_HEADER + F::HEADER + 56, "an answer of ours is short");
            }
            Action::Transmit { interface } => {
                if frame.0.len() != before.0.len() {
                    assert_eq!(self.mode, Mode::Dsr);
                    assert_eq!(frame.0.len(), before.0.len() + self.overhead, "grown by encapsulation only");
                    return;
                }
                assert!(!was_true || frame.has_true_checksums(), "{before:02x?} became {frame:02x?}");
                if interface == SITE_SIDE && was_true {
                    self.answer(&before, &frame);
                }
            }
        }
    }

    /// Lets the backend answer a packet that reached it.
    fn answer(&mut self, before: &Frame, reached: &Frame) {
        let (asked, name) = (self.name(before), self.name(reached));
        self.reached = Some(name.clone());
        let mut answer = reached.clone();
        self.rename(&mut answer.0, &name.reversed());
        answer.0[..6].copy_from_slice(&OWN);
        answer.0[6..12].copy_from_slice(&SITE);
        answer.0[LINK_HEADER + if W == 1 { 8 } else { 7 }] = 64;
        if name.protocol == 6 {
            // Neither opens nor ends anything.
            answer.0[F::TRANSPORT + 13] = 0x10;
        }
        let arrival = Arrival { interface: SITE_SIDE, now: 0 };
        let action = process(self.family, &mut answer, &self.tables, arrival);
        assert_eq!(action, Action::Transmit { interface: CLIENT_SIDE }, "gate {:?}", self.gate);
        assert_eq!(self.name(&answer), asked.reversed(), "the client hears whom it asked");
    }

    /// Makes a packet of the bytes as far as the hints say.
    fn prepare(&self, hints: u8, from_site: bool, bytes: &mut Vec<u8>) {
        let (neighbour, own) = if from_site { (SITE, OWN) } else { (CLIENT, OWN) };
        bytes[..6].copy_from_slice(&own);
        bytes[6..12].copy_from_slice(&neighbour);
        if hints & hints::HEADER == 0 || bytes.len() < F::TRANSPORT + 4 {
            return;
        }
        bytes[12..14].copy_from_slice(&F::ETHER_TYPE.to_be_bytes());
        bytes[14] = if W == 1 { 0x45 } else { 0x60 };
        let length = (bytes.len() - LINK_HEADER) as u16;
        if hints & hints::WHOLE != 0 && W == 1 {
            bytes[20..22].fill(0);
        }
        if hints & hints::LENGTH != 0 {
            let (at, value) = if W == 1 { (16, length) } else { (18, length - 40) };
            bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
        }
        let protocol = if hints & hints::TCP != 0 { 6 } else { 17 };
        if from_site {
            let name = self.reached.as_ref().expect("asked before").reversed();
            self.rename(bytes, &name);
        } else if hints & hints::CLIENT != 0 {
            let [p0, p1, ..] = self.name(&Frame(bytes.clone())).ports;
            let octets = |words: [u32; W]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let name = Name {
                source: octets(address(100)),
                destination: octets(address(1)),
                // A few clients, so that they come again.
                ports: [4, p0 & 3 | p1 & 4, 0, 80],
                protocol,
            };
            self.rename(bytes, &name);
        }
        if hints & hints::CHECKSUMS != 0 {
            self.sum(bytes);
        }
    }

    fn name(&self, frame: &Frame) -> Name {
        let bytes = &frame.0;
        let at = LINK_HEADER + F::ADDRESSES;
        Name {
            source: bytes[at..at + 4 * W].to_vec(),
            destination: bytes[at + 4 * W..at + 8 * W].to_vec(),
            ports: bytes[F::TRANSPORT..F::TRANSPORT + 4].try_into().expect("four bytes"),
            protocol: bytes[self.protocol_at()],
        }
    }

    fn rename(&self, bytes: &mut [u8], name: &Name) {
        let at = LINK_HEADER + F::ADDRESSES;
        bytes[at..at + 4 * W].copy_from_slice(&name.source);
        bytes[at + 4 * W..at + 8 * W].copy_from_slice(&name.destination);
        bytes[F::TRANSPORT..F::TRANSPORT + 4].copy_from_slice(&name.ports);
        let protocol_at = self.protocol_at();
        bytes[protocol_at] = name.protocol;
    }

    fn protocol_at(&self) -> usize {
        if W == 1 { 23 } else { 20 }
    }

    /// Whether the frame is one TCP or UDP packet, all of it there and nothing else.
    fn is_whole(&self, frame: &Frame) -> bool {
        let bytes = &frame.0;
        if bytes.len() < F::TRANSPORT + 8 || bytes[12..14] != F::ETHER_TYPE.to_be_bytes() {
            return false;
        }
        let word = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        let ip = if W == 1 {
            bytes[14] == 0x45 && word(16) + LINK_HEADER == bytes.len() && word(20) & 0x3fff == 0
        } else {
            bytes[14] >> 4 == 6 && word(18) + F::TRANSPORT == bytes.len()
        };
        ip && match bytes[self.protocol_at()] {
            6 => bytes.len() >= F::TRANSPORT + 20,
            17 => true,
            _ => false,
        }
    }

    fn sum(&self, bytes: &mut [u8]) {
        if W == 1 {
            bytes[24..26].fill(0);
            let sum = checksum(&[&bytes[14..34]]);
            bytes[24..26].copy_from_slice(&sum);
        }
        let protocol = bytes[self.protocol_at()];
        let at = F::TRANSPORT + if protocol == 6 { 16 } else { 6 };
        if ![6, 17].contains(&protocol) || bytes.len() < at + 2 {
            return;
        }
        bytes[at..at + 2].fill(0);
        let length = ((bytes.len() - F::TRANSPORT) as u16).to_be_bytes();
        let addresses = &bytes[LINK_HEADER + F::ADDRESSES..F::TRANSPORT];
        let sum = checksum(&[addresses, &length, &[0, protocol], &bytes[F::TRANSPORT..]]);
        bytes[at..at + 2].copy_from_slice(&if protocol == 17 && sum == [0, 0] { [0xff; 2] } else { sum });
    }
}

/// The Internet checksum (RFC 1071) over parts of which only the last may have an odd length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u64 =
        words.map(|word| u64::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
