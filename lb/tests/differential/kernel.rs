//! The kernel's side: the programs over maps pinned for this process alone.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::SchedClassifier;
use aya::{Ebpf, TestRun, TestRunOptions};
use lb::datapath::xdp::batch::BatchMap;
use lb::datapath::xdp::program;
use lb::datapath::xdp::records::{from_bytes, to_bytes};
use lb::datapath::xdp::ticks::TickClock;
use lb_core::record::{HoldCounters, NatSource, SampleHead, Settings, Traffic};
use lb_core::{Flow, FlowKey, Reason};

use crate::world::{BACKENDS, BackendState, Hook, World, places};

/// More than the largest packet grows to.
const OUTPUT: usize = 4096;

/// Removed last.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The programs and what both address families share.
pub struct Kernel {
    ebpf: Ebpf,
    backends: Array<MapData, [u8; 40]>,
    holds: Array<MapData, [u8; 24]>,
    locations: Array<MapData, [u8; 64]>,
    settings: Array<MapData, [u8; 16]>,
    reasons: PerCpuArray<MapData, u64>,
    traffic: PerCpuArray<MapData, [u8; 48]>,
    capture: RingBuf<MapData>,
    samples: RingBuf<MapData>,
    clock: TickClock,
    windows: u64,
    output: Vec<u8>,
    _pins: Pins,
}

/// One family's tables; the numbers are sizes in bytes of a service's key, the NAT source and a fragment's key.
pub struct FamilyTables<const W: usize, const SERVICE: usize, const NAT: usize, const FRAGMENT: usize> {
    flows: BatchMap<FlowKey<W>, Flow<W>>,
    newcomers: BatchMap<FlowKey<W>, Flow<W>>,
    fragments: BpfHashMap<MapData, [u8; FRAGMENT], u32>,
    services: BpfHashMap<MapData, [u8; SERVICE], [u8; 16]>,
    nat: Array<MapData, [u8; NAT]>,
}

pub type Four = FamilyTables<1, 8, 8, 16>;
pub type Six = FamilyTables<4, 20, 32, 40>;

/// Flows as text, without the time of their last packets, which the two sides read at different moments.
pub type FlowTexts<const W: usize> = BTreeMap<FlowKey<W>, String>;

impl Kernel {
    pub fn load() -> (Self, Four, Six) {
        static LOADED: AtomicU32 = AtomicU32::new(0);
        let number = LOADED.fetch_add(1, Relaxed);
        let name = format!("/sys/fs/bpf/drover-differential-{}-{number}", std::process::id());
        let pins = Pins(PathBuf::from(name));
        let mut ebpf = program::load(&pins.0).expect("root, and a kernel with XDP");
        let classifier: &mut SchedClassifier = ebpf.program_mut("drover_tc").unwrap().try_into().unwrap();
        classifier.load().expect("the verifier accepts the program of the tc hook");
        let mut take = |name: &str| ebpf.take_map(name).unwrap();
        let mut rings: Array<MapData, u64> = take("RINGS").try_into().unwrap();
        for (index, place) in places().iter().enumerate() {
            rings.set(index as u32, place.bits(), 0).unwrap();
        }
        let kernel = Self {
            backends: take("BACKENDS").try_into().unwrap(),
            holds: take("HOLDS").try_into().unwrap(),
            locations: take("LOCATIONS").try_into().unwrap(),
            settings: take("SETTINGS").try_into().unwrap(),
            reasons: take("REASONS").try_into().unwrap(),
            traffic: take("TRAFFIC").try_into().unwrap(),
            capture: take("CAPTURE").try_into().unwrap(),
            samples: take("SAMPLES").try_into().unwrap(),
            clock: TickClock::new().unwrap(),
            windows: 2,
            output: vec![0; OUTPUT],
            ebpf,
            _pins: pins,
        };
        let mut kernel = kernel;
        let four = FamilyTables::take(&mut kernel.ebpf, "V4");
        let six = FamilyTables::take(&mut kernel.ebpf, "V6");
        (kernel, four, six)
    }

    /// Fills the shared tables for a round and answers with the round's settings and time.
    pub fn reset(&mut self, world: &World) -> (Settings, u64) {
        for (number, state) in world.backends.iter().enumerate() {
            self.set_backend(world, number as u32, state);
            self.set_hold(number as u32, &HoldCounters::default());
        }
        for (number, location) in world.locations.iter().enumerate() {
            self.locations.set(number as u32, to_bytes(location), 0).unwrap();
        }
        while self.captured().is_some() {}
        while self.sampled().is_some() {}
        let now = self.clock.now().unwrap();
        // Another window for each round, and now in its middle: what was spent in earlier rounds is of another window.
        self.windows = 2 + (self.windows - 1) % 20_000;
        let window = if world.bounded { (2 * now / (2 * self.windows + 1)) as u32 } else { 0 };
        let settings = Settings { window, ..world.settings };
        self.settings.set(0, to_bytes(&settings), 0).unwrap();
        (settings, now)
    }

    pub fn set_backend(&mut self, world: &World, number: u32, state: &BackendState) {
        self.backends.set(number, to_bytes(&world.backend(number, state)), 0).unwrap();
    }

    pub fn set_hold(&mut self, number: u32, record: &HoldCounters) {
        self.holds.set(number, to_bytes(record), 0).unwrap();
    }

    pub fn hold(&self, number: u32) -> HoldCounters {
        from_bytes(&self.holds.get(&number, 0).unwrap())
    }

    /// Runs a hook's program on a frame: what it answers, and the frame afterwards.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> (i32, &[u8]) {
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut self.output),
            ..TestRunOptions::new()
        };
        let result = match hook {
            Hook::Xdp => program::program(&mut self.ebpf).unwrap().test_run(options),
            Hook::Tc => {
                let classifier: &mut SchedClassifier =
                    self.ebpf.program_mut("drover_tc").unwrap().try_into().unwrap();
                classifier.test_run(options)
            }
        };
        let result = result.unwrap();
        (result.return_value as i32, &self.output[..result.data_size_out as usize])
    }

    /// The next frame in the capture ring: whose queue, and its bytes.
    pub fn captured(&mut self) -> Option<(u32, Vec<u8>)> {
        let item = self.capture.next()?;
        let number = |at: usize| u32::from_ne_bytes(item[at..at + 4].try_into().unwrap());
        Some((number(0), item[16..16 + number(4) as usize].to_vec()))
    }

    /// The next sample: reason, length, and the bytes of it that were kept.
    pub fn sampled(&mut self) -> Option<(u32, u32, Vec<u8>)> {
        let item = self.samples.next()?;
        let (head, bytes) = item.split_at(size_of::<SampleHead>());
        let head: SampleHead = from_bytes::<24, _>(head.try_into().unwrap());
        Some((head.reason, head.length, bytes[..head.captured as usize].to_vec()))
    }

    /// Packets counted so far, by reason.
    pub fn reasons(&self) -> Vec<u64> {
        (0..Reason::ALL.len() as u32).map(|i| self.reasons.get(&i, 0).unwrap().iter().sum()).collect()
    }

    /// Traffic of each member so far, as plain numbers.
    pub fn traffic(&self) -> Vec<[u64; 6]> {
        let member = |number| {
            let all = self.traffic.get(&number, 0).unwrap();
            all.iter().map(from_bytes::<48, Traffic>).fold([0; 6], |sum, cpu| {
                let own = numbers(&cpu);
                std::array::from_fn(|i| sum[i] + own[i])
            })
        };
        (0..BACKENDS).map(member).collect()
    }
}

/// A traffic record as plain numbers.
pub fn numbers(traffic: &Traffic) -> [u64; 6] {
    let Traffic { packets, bytes, opened, resets } = traffic;
    [packets[0], packets[1], bytes[0], bytes[1], *opened, *resets]
}

/// A flow without the time of its last packet.
pub fn text<const W: usize>(flow: &Flow<W>) -> String {
    let Flow {
        seen: _,
        state,
        backend,
        incarnation,
        ports,
        address_delta,
        transport_delta,
        source,
        destination,
        link,
        member,
        kind,
    } = flow;
    format!(
        "state {:x} backend {backend} ({incarnation}) ports {ports:x} deltas {address_delta:x} {transport_delta:x} \
         from {source:x?} to {destination:x?} link {link:x?} member {member} {kind:?}",
        state.load(Relaxed)
    )
}

impl<const W: usize, const SERVICE: usize, const NAT: usize, const FRAGMENT: usize>
    FamilyTables<W, SERVICE, NAT, FRAGMENT>
{
    fn take(ebpf: &mut Ebpf, family: &str) -> Self {
        let mut take = |name: &str| ebpf.take_map(&format!("{name}_{family}")).unwrap();
        let data = |map: Map| match map {
            Map::HashMap(data) | Map::LruHashMap(data) => data,
            _ => panic!("flows are kept in hash maps"),
        };
        Self {
            flows: BatchMap::new(data(take("FLOWS"))).unwrap(),
            newcomers: BatchMap::new(data(take("NEWCOMERS"))).unwrap(),
            fragments: take("FRAGMENTS").try_into().unwrap(),
            services: take("SERVICES").try_into().unwrap(),
            nat: take("NAT").try_into().unwrap(),
        }
    }

    /// Empties the tables and fills them for a round.
    pub fn reset(&mut self, world: &World) {
        for map in [&self.flows, &self.newcomers] {
            let keys: Vec<_> = read(map).into_keys().collect();
            assert_eq!(map.delete(&keys).unwrap(), keys.len());
        }
        let fragments: Vec<_> = self.fragments.keys().map(|key| key.unwrap()).collect();
        for key in fragments {
            self.fragments.remove(&key).unwrap();
        }
        for (port, protocol, service) in &world.services {
            let key = world.service_key::<W>(*port, *protocol);
            self.services.insert(to_bytes::<SERVICE, _>(&key), to_bytes::<16, _>(service), 0).unwrap();
        }
        let none = NatSource { base: [0; W], host_mask: [0; W] };
        self.nat.set(0, to_bytes(&world.nat().unwrap_or(none)), 0).unwrap();
    }

    /// Established flows and newcomers.
    pub fn flows(&self) -> [FlowTexts<W>; 2] {
        [read(&self.flows), read(&self.newcomers)]
    }
}

fn read<const W: usize>(map: &BatchMap<FlowKey<W>, Flow<W>>) -> FlowTexts<W> {
    let mut all = BTreeMap::new();
    let mut chunks = map.chunks(4096);
    while let Some(chunk) = chunks.next_chunk().unwrap() {
        all.extend(chunk.map(|(key, flow)| (*key, text(flow))));
    }
    all
}
