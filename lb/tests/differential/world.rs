//! What both sides' tables hold in a round, drawn from its seed: gates, sites, services' modes, bounds.

use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;

use lb_core::host::HostTables;
use lb_core::maglev::{Candidate, NO_BACKEND, Turn, identity, populate};
use lb_core::record::{
    Backend, HoldCounters, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions, Settings,
};
use lb_core::{Gate, GateWord, Mode, Slot};

use crate::random::Random;
use crate::wire::{ICMP4, ICMP6, TCP, UDP, octets};

/// `BPF_PROG_TEST_RUN` lets packets arrive on the loopback interface.
pub const INTERFACE: u32 = 1;
pub const BACKENDS: u32 = 12;
/// Ports of the services, from [`FIRST_PORT`] on.
pub const PORTS: u16 = 10;
pub const FIRST_PORT: u16 = 80;
/// Places of each of the rings.
const PLACES: u32 = 1021;

/// The program to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    Tc,
}

/// A backend's record beside its address.
#[derive(Clone, Copy, Debug)]
pub struct BackendState {
    pub word: GateWord,
    pub sites: [u32; 2],
    pub incarnation: u32,
}

/// The tables' content.
pub struct World {
    pub v6: bool,
    pub hook: Hook,
    pub backends: Vec<BackendState>,
    pub locations: Vec<Location>,
    pub services: Vec<(u16, u8, Service)>,
    pub has_nat: bool,
    /// Whether new flows are bounded, and how much of what passes is sampled. The window is chosen when the round begins.
    pub bounded: bool,
    pub settings: Settings,
}

impl World {
    pub fn draw(random: &mut Random) -> Self {
        let v6 = random.one_in(2);
        Self {
            v6,
            hook: random.pick(&[Hook::Xdp, Hook::Tc]),
            backends: (0..BACKENDS).map(|number| draw_backend(random, number)).collect(),
            locations: (0..6).map(|site| draw_location(random, site)).collect(),
            services: draw_services(random, v6),
            has_nat: !random.one_in(16),
            bounded: random.one_in(3),
            settings: Settings {
                window: 0,
                new_flows_per_cpu: random.below(2000) as u32,
                new_flows_per_prefix: random.below(800) as u32,
                sample: u32::from(random.one_in(3)),
            },
        }
    }

    pub fn backend(&self, number: u32, state: &BackendState) -> Backend {
        let record = Backend {
            address: words(address(self.v6, 1, number as u16 + 1)),
            port: (8000 + number as u16).to_be(),
            incarnation: state.incarnation,
            ..Backend::default()
        };
        record.word.store(state.word.bits(), Relaxed);
        record.sites.store(state.sites);
        record
    }

    pub fn nat<const W: usize>(&self) -> Option<NatSource<W>> {
        let mut host_mask = [0; W];
        host_mask[W - 1] = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
        self.has_nat.then(|| NatSource { base: narrow(address(self.v6, 9, 0)), host_mask })
    }

    pub fn service_key<const W: usize>(&self, port: u16, protocol: u8) -> ServiceKey<W> {
        ServiceKey {
            address: narrow(virtual_address(self.v6)),
            port: port.to_be(),
            protocol: u16::from(protocol),
        }
    }

    /// The host's side.
    pub fn host<const W: usize>(&self) -> HostTables<W> {
        let mut host = HostTables::<W>::default();
        host.backends =
            self.backends.iter().zip(0..).map(|(state, number)| self.backend(number, state)).collect();
        host.holds = (0..BACKENDS).map(|_| HoldCounters::default()).collect();
        host.locations = self.locations.clone();
        host.places = places();
        for (port, protocol, service) in &self.services {
            host.services.insert(self.service_key(*port, *protocol), *service);
        }
        host.nat_source = self.nat();
        host.settings = self.settings;
        host
    }
}

/// The rings: one of all backends, one that is empty, one that leads to a backend that does not exist.
pub fn places() -> Vec<Place> {
    let mut ring = vec![0; PLACES as usize];
    let candidates: Vec<Candidate> = (0..BACKENDS)
        .map(|number| Candidate { identity: identity(&number.to_string()), number, weight: number + 1 })
        .collect();
    populate(&mut ring, &candidates, &mut vec![Turn::default(); candidates.len()]);
    let filled = ring.iter().map(|number| Place::new(*number, *number));
    let empty = [NO_BACKEND, 4_000_000].map(|number| vec![Place::new(number, 0); PLACES as usize]);
    filled.chain(empty.concat()).collect()
}

/// A gate word and sites, forwarding more often than not.
pub fn draw_backend(random: &mut Random, number: u32) -> BackendState {
    let gate = match random.below(10) {
        0 => Gate::Hold,
        1 => Gate::Drop,
        2 => Gate::Replay,
        3 => Gate::HoldNew,
        _ => Gate::Forward,
    };
    let slot = random.pick(&[Slot::A, Slot::B]);
    BackendState {
        word: GateWord::new(gate, slot, random.below(100) as u32),
        sites: [random.below(6) as u32, random.below(6) as u32],
        incarnation: number + random.below(2) as u32,
    }
}

/// Most sites are where test packets come from; others are behind another interface, or have no route.
fn draw_location(random: &mut Random, site: u8) -> Location {
    let interface =
        if site == 0 { INTERFACE } else { random.pick(&[INTERFACE, INTERFACE, INTERFACE, 77, 0]) };
    let link = Link::new(interface, [2, 0, 0, 0, 0, 0xa0 + site], [2, 0, 0, 0, 1, 0xa0 + site]);
    let mtu = if random.one_in(3) { 200 + random.below(1400) as u32 } else { 0 };
    match random.below(4) {
        0 => Location::plain(link, mtu),
        1 => Location::tunnel4(link, mtu, random.next() as u32, random.next() as u32),
        2 => Location::tunnel6(link, mtu, [0xfd; 4].map(|word| word + random.next() as u32), [7; 4]),
        _ => Location::tunnel4(link, mtu, 0x0102_0304, 0x0506_0708),
    }
}

fn draw_services(random: &mut Random, v6: bool) -> Vec<(u16, u8, Service)> {
    let mut services = Vec::new();
    for port in FIRST_PORT..FIRST_PORT + PORTS {
        for protocol in [TCP, UDP] {
            let mode = random.pick(&[Mode::Nat, Mode::Nat, Mode::Transparent, Mode::Dsr]);
            let ring = if random.one_in(12) { 1 + random.below(2) as u32 } else { 0 };
            services.push((
                port,
                protocol,
                Service {
                    number: u32::from(port),
                    ring: ring * PLACES,
                    places: if random.one_in(20) { 0 } else { PLACES },
                    options: ServiceOptions::new(mode, random.one_in(3)),
                },
            ));
        }
    }
    let echo = Service { number: 0, ring: 0, places: 0, options: ServiceOptions::default() };
    services.push((0, if v6 { ICMP6 } else { ICMP4 }, echo));
    services
}

pub fn virtual_address(v6: bool) -> IpAddr {
    address(v6, 200, 1)
}

/// An address of a network.
pub fn address(v6: bool, network: u8, host: u16) -> IpAddr {
    let [high, low] = host.to_be_bytes();
    if v6 {
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[3] = network;
        octets[6] = high;
        octets[15] = low;
        octets.into()
    } else {
        [10, network, high, low].into()
    }
}

fn words(address: IpAddr) -> [u32; 4] {
    let bytes = octets(address);
    let mut all = [0; 16];
    all[16 - bytes.len()..].copy_from_slice(&bytes);
    std::array::from_fn(|i| u32::from_ne_bytes(all[4 * i..4 * i + 4].try_into().unwrap()))
}

fn narrow<const W: usize>(address: IpAddr) -> [u32; W] {
    words(address)[4 - W..].try_into().unwrap()
}
