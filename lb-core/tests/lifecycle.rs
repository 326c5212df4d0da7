//! A flow's life against a small model: who does not hear the server never gets past the newcomers, and nobody takes an
//! established flow away from its owner.
#![expect(clippy::unwrap_used, reason = "fixtures state what they expect by unwrapping")]

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use lb_core::host::{Frame, FrameBuilder, HostTables, Segment};
use lb_core::record::{
    Backend, HoldCounters, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions,
};
use lb_core::{Action, Arrival, Gate, GateWord, Mode, Slot, V4, process};
use proptest::prelude::*;

const CLIENT_SIDE: u32 = 3;
const SITE_SIDE: u32 = 4;
const OWN: [u8; 6] = [2, 0, 0, 0, 1, 1];
const CLIENT_LINK: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
const SITE_LINK: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 0x10;
/// What a client may acknowledge beyond the server's first number and still be believed: an attacker that draws one at
/// random hits it once in 65,536 times.
const BELIEVED: u32 = 1 << 16;

/// One service over one backend, and a server behind it that does as RFC 9293 says.
struct World {
    tables: HostTables<1>,
    listens: bool,
    server_first: u32,
}

impl World {
    fn new(mode: Mode, listens: bool, server_first: u32) -> Self {
        let mut tables = HostTables::default();
        let address = |octets: [u8; 4]| u32::from_ne_bytes(octets);
        let backend = Backend {
            address: [0, 0, 0, address([10, 1, 0, 1])],
            port: 8080_u16.to_be(),
            incarnation: 1,
            ..Backend::default()
        };
        backend.word.store(GateWord::new(Gate::Forward, Slot::A, 1).bits(), Relaxed);
        tables.backends.push(backend);
        tables.holds.push(HoldCounters::default());
        tables.locations.push(Location::plain(Link::new(SITE_SIDE, SITE_LINK, OWN), 0));
        tables.places.push(Place::new(0, 0));
        tables.nat_source = Some(NatSource { base: [address([10, 9, 0, 1])], host_mask: [0] });
        let key = ServiceKey { address: [address([10, 0, 0, 100])], port: 80_u16.to_be(), protocol: 6 };
        let options = ServiceOptions::new(mode, false);
        tables.services.insert(key, Service { number: 0, ring: 0, places: 1, options });
        Self { tables, listens, server_first }
    }

    fn run(&self, frame: &mut Frame, interface: u32) -> Action {
        process(V4, frame, &self.tables, Arrival { interface, now: 1 })
    }

    /// Lets somebody on the clients' side send a segment; the server's answer, as the sender named by it gets it.
    fn send(&self, from: SocketAddr, flags: u8, sequence: u32, acknowledgement: u32) -> Option<Frame> {
        let service = "10.0.0.100:80".parse().unwrap();
        let mut frame = segment((OWN, CLIENT_LINK), from, service, flags, sequence, acknowledgement);
        let action = self.run(&mut frame, CLIENT_SIDE);
        (action == Action::Transmit { interface: SITE_SIDE }).then(|| self.answer(&frame))?
    }

    fn answer(&self, reached: &Frame) -> Option<Frame> {
        let (client, server, _) = reached.ends();
        let flags = reached.0[47];
        let (sequence, acknowledgement) = numbers(reached);
        // Section 3.10.7: who does not listen resets, taking its number from the segment, if it has one; who listens
        // answers a SYN, and resets what belongs to no connection.
        let (flags, own, other) = match (flags & RST != 0, flags & ACK != 0, flags & SYN != 0) {
            (true, ..) => return None,
            (_, true, _) if sequence_is_of_nobody(acknowledgement, self.server_first) => {
                (RST, acknowledgement, 0)
            }
            (_, true, _) => (ACK, self.server_first.wrapping_add(1), sequence),
            (_, false, true) if self.listens => (SYN | ACK, self.server_first, sequence.wrapping_add(1)),
            (_, false, _) => (RST | ACK, 0, sequence.wrapping_add(1)),
        };
        let mut frame = segment((OWN, SITE_LINK), server, client, flags, own, other);
        let action = self.run(&mut frame, SITE_SIDE);
        (action == Action::Transmit { interface: CLIENT_SIDE }).then_some(frame)
    }

    fn established(&self) -> usize {
        self.tables.flows().len()
    }
}

/// Whether no connection of the model has this acknowledgement.
fn sequence_is_of_nobody(acknowledgement: u32, server_first: u32) -> bool {
    acknowledgement != server_first.wrapping_add(1)
}

fn segment(
    link: ([u8; 6], [u8; 6]),
    source: SocketAddr,
    destination: SocketAddr,
    flags: u8,
    sequence: u32,
    acknowledgement: u32,
) -> Frame {
    let segment = Segment::Tcp { flags };
    let mut frame = FrameBuilder { link, source, destination, ttl: 64, segment, payload: Vec::new() }.build();
    frame.0[38..42].copy_from_slice(&sequence.to_be_bytes());
    frame.0[42..46].copy_from_slice(&acknowledgement.to_be_bytes());
    frame
}

/// Sequence and acknowledgement number.
fn numbers(frame: &Frame) -> (u32, u32) {
    let number = |at: usize| u32::from_be_bytes(frame.0[at..at + 4].try_into().unwrap());
    (number(38), number(42))
}

fn mode() -> impl Strategy<Value = Mode> {
    prop::sample::select(vec![Mode::Nat, Mode::Transparent])
}

fn client(number: u8) -> SocketAddr {
    SocketAddr::new([10, 0, 0, number].into(), 4000)
}

/// A true handshake; whether it established the flow.
fn shake_hands(world: &World, client: SocketAddr) -> bool {
    let before = world.established();
    let Some(answer) = world.send(client, SYN, 100, 0) else { return false };
    let (server, acknowledged) = numbers(&answer);
    world.send(client, ACK, acknowledged, server.wrapping_add(1));
    world.established() == before + 2
}

/// A segment of somebody who sees no answers: sender, flags, sequence and acknowledgement number.
fn blind() -> impl Strategy<Value = (u8, u8, u32, u32)> {
    let number = || prop_oneof![Just(0_u32), Just(1), Just(100), Just(77), any::<u32>()];
    let flags = prop_oneof![Just(SYN), Just(ACK), Just(RST), Just(FIN | ACK), Just(RST | ACK), 0_u8..64];
    (1_u8..4, flags, number(), number())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn who_does_not_hear_the_server_is_never_established(
        mode in mode(),
        listens: bool,
        server_first in 10_000_000_u32..,
        segments in prop::collection::vec(blind(), 1..30),
    ) {
        let world = World::new(mode, listens, server_first);
        for (sender, flags, sequence, acknowledgement) in segments {
            let lucky = acknowledgement.wrapping_sub(server_first) <= BELIEVED;
            if !lucky {
                world.send(client(sender), flags, sequence, acknowledgement);
                prop_assert_eq!(world.established(), 0);
            }
        }
    }

    #[test]
    fn who_hears_it_is_established_and_nobody_else_takes_the_flow_away(
        mode in mode(),
        server_first: u32,
        segments in prop::collection::vec(blind(), 0..40),
    ) {
        let world = World::new(mode, true, server_first);
        prop_assert!(shake_hands(&world, client(1)));
        let established: Vec<_> = world.tables.flows().into_keys().collect();
        // Segments of sender 1 are made up in the name of the flow's own client.
        for (sender, flags, sequence, acknowledgement) in segments {
            let mut frame =
                segment((OWN, CLIENT_LINK), client(sender), "10.0.0.100:80".parse().unwrap(), flags, sequence, acknowledgement);
            world.run(&mut frame, CLIENT_SIDE);
            for key in &established {
                prop_assert!(world.tables.flows().contains_key(key), "flags {flags:#x}");
            }
        }
        // It still hears its server under the name that it knows.
        let answer = world.send(client(1), ACK, 101, server_first.wrapping_add(1));
        prop_assert_eq!(answer.unwrap().ends().1, client(1));
    }
}

#[test]
fn a_connection_that_the_server_reset_or_both_finished_gives_way_to_the_next() {
    for mode in [Mode::Nat, Mode::Transparent] {
        for endings in [vec![(SITE_SIDE, RST)], vec![(CLIENT_SIDE, FIN | ACK), (SITE_SIDE, FIN | ACK)]] {
            let world = World::new(mode, true, 5000);
            assert!(shake_hands(&world, client(1)));
            let mut reached =
                segment((OWN, CLIENT_LINK), client(1), "10.0.0.100:80".parse().unwrap(), ACK, 101, 5001);
            world.run(&mut reached, CLIENT_SIDE);
            let (own, server, _) = reached.ends();
            for (side, flags) in endings {
                let mut frame = if side == SITE_SIDE {
                    segment((OWN, SITE_LINK), server, own, flags, 5001, 101)
                } else {
                    segment((OWN, CLIENT_LINK), client(1), "10.0.0.100:80".parse().unwrap(), flags, 101, 5001)
                };
                assert!(matches!(world.run(&mut frame, side), Action::Transmit { .. }));
            }
            world.send(client(1), SYN, 900, 0);
            assert_eq!(world.established(), 0, "the next connection is a newcomer again");
            assert!(shake_hands(&world, client(1)));
        }
    }
}
