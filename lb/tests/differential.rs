//! The kernel program against the same code on the host: every packet goes through both, and verdict, bytes,
//! captures, flows and counters must be equal.
//!
//! Needs root: the program is loaded and run with `BPF_PROG_TEST_RUN`.
#![expect(clippy::unwrap_used, reason = "fixtures state what they expect by unwrapping")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

use aya::maps::{Array, HashMap as BpfHashMap, MapData, PerCpuArray, RingBuf};
use aya::{Ebpf, Pod, TestRun, TestRunOptions};
use lb::datapath::xdp::program;
use lb::datapath::xdp::records::{Record, from_bytes, to_bytes};
use lb_core::host::{Frame, FrameBuilder, HostTables, Segment};
use lb_core::maglev::{Candidate, NO_BACKEND, Turn, identity, populate};
use lb_core::record::{
    Backend, HoldCounters, Link, Location, NatSource, Place, Service, ServiceKey, ServiceOptions, Traffic,
};
use lb_core::{Action, Arrival, Family, Flow, FlowKey, Gate, GateWord, Mode, Reason, Slot, V4, V6, process};

/// `BPF_PROG_TEST_RUN` lets packets arrive on the loopback interface.
const ARRIVAL: Arrival = Arrival { interface: 1, now: 0 };
const BACKENDS: u32 = 12;
/// Places of each of the rings.
const PLACES: u32 = 1021;
const CASES: usize = 60_000;
const SEED: u64 = 0x5eed_0001;

/// Site 0 is where test packets come from; site 1 is behind another interface, site 2 another neighbour,
/// site 3 has no route.
const SITES: [(u32, [u8; 6], [u8; 6]); 4] = [
    (1, [2, 0, 0, 0, 0, 0xa], [2, 0, 0, 0, 1, 0xa]),
    (77, [2, 0, 0, 0, 0, 0xb], [2, 0, 0, 0, 1, 0xb]),
    (1, [2, 0, 0, 0, 0, 0xc], [2, 0, 0, 0, 1, 0xc]),
    (0, [0; 6], [0; 6]),
];

fn locations() -> [Location; 4] {
    let [first, second, third, fourth] =
        SITES.map(|(interface, neighbour, own)| Link::new(interface, neighbour, own));
    let ends = ([0xfd, 0, 0, 1], [0xfd, 0, 0, 2]);
    [
        Location::tunnel4(first, 0, 0x0102_0304, 0x0506_0708),
        Location::tunnel6(second, 0, ends.0, ends.1),
        Location::plain(third, 500),
        Location::plain(fourth, 0),
    ]
}

/// The kernel's side: the program over maps pinned for this test alone.
struct Kernel {
    ebpf: Ebpf,
    /// Removed last.
    _pins: Pins,
}

struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Kernel {
    fn load() -> Self {
        let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/drover-differential-{}", std::process::id())));
        Self { ebpf: program::load(&pins.0).expect("root, and a kernel with XDP"), _pins: pins }
    }

    fn run(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut out = vec![0; 4096];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program::program(&mut self.ebpf).unwrap().test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    fn array<V: Pod>(&mut self, name: &str) -> Array<&mut MapData, V> {
        self.ebpf.map_mut(name).unwrap().try_into().unwrap()
    }

    fn set<const N: usize, T: Record>(&mut self, name: &str, index: u32, record: &T) {
        self.array::<[u8; N]>(name).set(index, to_bytes(record), 0).unwrap();
    }

    fn get<const N: usize, T: Record>(&mut self, name: &str, index: u32) -> T {
        from_bytes(&self.array::<[u8; N]>(name).get(&index, 0).unwrap())
    }
}

fn words(address: IpAddr) -> [u32; 4] {
    let octets = match address {
        IpAddr::V4(v4) => {
            let mut octets = [0; 16];
            octets[12..].copy_from_slice(&v4.octets());
            octets
        }
        IpAddr::V6(v6) => v6.octets(),
    };
    std::array::from_fn(|i| u32::from_ne_bytes(octets[4 * i..4 * i + 4].try_into().unwrap()))
}

fn narrow<const W: usize>(address: IpAddr) -> [u32; W] {
    words(address)[4 - W..].try_into().unwrap()
}

fn address(v6: bool, network: u8, host: u16) -> IpAddr {
    let [high, low] = host.to_be_bytes();
    if v6 {
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[3] = network;
        octets[14..].copy_from_slice(&[high, low]);
        octets.into()
    } else {
        [10, network, high, low].into()
    }
}

/// A gate and a location for each backend, so that every branch is taken.
fn backend_record(number: u32, v6: bool) -> Backend {
    let gate = match number % 6 {
        0 => Gate::Hold,
        1 => Gate::Drop,
        2 => Gate::Replay,
        _ => Gate::Forward,
    };
    let record = Backend {
        address: words(address(v6, 1, number as u16 + 1)),
        port: (8000 + number as u16).to_be(),
        incarnation: number,
        ..Backend::default()
    };
    record.word.store(
        GateWord::new(gate, if number.is_multiple_of(2) { Slot::A } else { Slot::B }, 7).bits(),
        Relaxed,
    );
    record.sites.store(match number {
        9 => [1, 1],
        10 => [2, 2],
        11 => [3, 3],
        _ => [0, 0],
    });
    record
}

fn hold_record(number: u32) -> HoldCounters {
    // One of the replaying backends has everything sent, the other has not.
    HoldCounters { captured: 5.into(), settled: (if number == 8 { 4 } else { 5 }).into(), refused: 0.into() }
}

/// Host tables and kernel maps with the same content.
fn fill<const W: usize, const KEY: usize, const NAT: usize>(kernel: &mut Kernel, v6: bool) -> HostTables<W> {
    let family = if v6 { "V6" } else { "V4" };
    let mut host = HostTables::<W>::default();
    for number in 0..BACKENDS {
        host.backends.push(backend_record(number, v6));
        host.holds.push(hold_record(number));
    }
    host.locations = locations().into();
    let mut ring = vec![0; PLACES as usize];
    let candidates: Vec<Candidate> = (0..BACKENDS)
        .map(|number| Candidate { identity: identity(&number.to_string()), number, weight: number + 1 })
        .collect();
    populate(&mut ring, &candidates, &mut vec![Turn::default(); candidates.len()]);
    host.places = ring.iter().map(|number| Place::new(*number, *number)).collect();
    host.places.extend(vec![Place::new(NO_BACKEND, 0); PLACES as usize]);
    host.places.extend(vec![Place::new(4_000_000, 0); PLACES as usize]);
    let services = [
        (80_u16, 0, PLACES, ServiceOptions::new(Mode::Nat, false)),
        (81, 1, PLACES, ServiceOptions::new(Mode::Nat, true)),
        (82, 2, PLACES, ServiceOptions::new(Mode::Transparent, false)),
        (83, 0, PLACES, ServiceOptions::new(Mode::Transparent, true)),
        (84, 0, PLACES, ServiceOptions::new(Mode::Dsr, false)),
        (85, 0, 0, ServiceOptions::new(Mode::Dsr, true)),
    ];
    for (port, ring, places, options) in services {
        for protocol in [6, 17] {
            let key = ServiceKey { address: narrow(address(v6, 200, 1)), port: port.to_be(), protocol };
            let service = Service { number: ring, ring: ring * PLACES, places, options };
            host.services.insert(key, service);
            let mut map: BpfHashMap<_, [u8; KEY], [u8; 16]> =
                kernel.ebpf.map_mut(&format!("SERVICES_{family}")).unwrap().try_into().unwrap();
            map.insert(to_bytes::<KEY, _>(&key), to_bytes::<16, _>(&service), 0).unwrap();
        }
    }
    let mut host_mask = [0; W];
    host_mask[W - 1] = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
    let nat = NatSource { base: narrow(address(v6, 9, 0)), host_mask };
    host.nat_source = Some(nat);
    kernel.set::<NAT, _>(&format!("NAT_{family}"), 0, &nat);
    host
}

/// What both families share in the kernel; the gates and holds of one family at a time.
fn fill_shared(kernel: &mut Kernel, v6: bool) {
    for number in 0..BACKENDS {
        kernel.set::<40, _>("BACKENDS", number, &backend_record(number, v6));
        kernel.set::<24, _>("HOLDS", number, &hold_record(number));
    }
    for (number, location) in locations().iter().enumerate() {
        kernel.set::<64, _>("LOCATIONS", number as u32, location);
    }
}

fn fill_rings<const W: usize>(kernel: &mut Kernel, host: &HostTables<W>) {
    let mut map = kernel.array::<u64>("RINGS");
    for (index, place) in host.places.iter().enumerate() {
        map.set(index as u32, place.bits(), 0).unwrap();
    }
}

/// A small fast generator (xorshift64*), so that a failing case is found again by its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A packet from a client, often to a service, sometimes damaged.
fn random_packet(random: &mut Random, v6: bool) -> Frame {
    let segment = match random.below(4) {
        0 => Segment::Udp { checksum: !random.one_in(3) },
        1 => Segment::Tcp { flags: 2 },
        2 => Segment::Tcp { flags: 0x10 },
        _ => Segment::Tcp { flags: random.next() as u8 },
    };
    let host = if random.one_in(20) { 2 } else { 1 };
    let builder = FrameBuilder {
        link: ([2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 0, random.below(4) as u8]),
        source: SocketAddr::new(address(v6, 7, random.below(40) as u16), 1000 + random.below(60) as u16),
        destination: SocketAddr::new(address(v6, 200, host), 80 + random.below(7) as u16),
        ttl: if random.one_in(30) { random.below(3) as u8 } else { 64 },
        segment,
        payload: (0..random.below(600)).map(|n| n as u8).collect(),
    };
    damage(random, builder.build())
}

fn damage(random: &mut Random, mut frame: Frame) -> Frame {
    if random.one_in(8) {
        for _ in 0..=random.below(3) {
            let at = random.below(frame.0.len().min(80) as u64) as usize;
            frame.0[at] = random.next() as u8;
        }
    }
    if random.one_in(20) {
        // The kernel takes no frame without a whole link header and a byte.
        let length = 15 + random.below(frame.0.len() as u64 - 15) as usize;
        frame.0.truncate(length);
    }
    frame
}

/// A site's answer to a translated packet; from the right place or another.
fn answer(random: &mut Random, frame: &Frame) -> Frame {
    let (source, destination, _) = frame.ends();
    let (_, neighbour, own) = SITES[random.below(3) as usize];
    let segment = if matches!(frame.0.get(if frame.0[12] == 8 { 23 } else { 20 }), Some(17)) {
        Segment::Udp { checksum: true }
    } else {
        Segment::Tcp { flags: [0x12, 0x10, 0x14][random.below(3) as usize] }
    };
    let builder = FrameBuilder {
        link: (own, neighbour),
        source: destination,
        destination: source,
        ttl: 64,
        segment,
        payload: vec![3; random.below(90) as usize],
    };
    damage(random, builder.build())
}

/// What the hook answers for an action.
fn code(action: Action) -> u32 {
    match action {
        Action::Drop | Action::Capture { .. } => 1,
        Action::Pass => 2,
        Action::Transmit { interface } if interface == ARRIVAL.interface => 3,
        Action::Transmit { .. } => 4,
    }
}

/// The next frame in the kernel's capture ring.
fn captured(ring: &mut RingBuf<MapData>) -> Option<(u32, Vec<u8>)> {
    let item = ring.next()?;
    let number = |at: usize| u32::from_ne_bytes(item[at..at + 4].try_into().unwrap());
    Some((number(0), item[16..16 + number(4) as usize].to_vec()))
}

fn compare<const W: usize, F: Family<W>, const KEY: usize, const FLOW: usize>(
    kernel: &mut Kernel,
    ring: &mut RingBuf<MapData>,
    host: &HostTables<W>,
    family: F,
    v6: bool,
) {
    let mut random = Random(SEED + u64::from(v6));
    let mut answers: VecDeque<Frame> = VecDeque::new();
    let mut actions: BTreeMap<u32, usize> = BTreeMap::new();
    let before: Vec<u64> = reasons(kernel);
    for case in 0..CASES {
        let sent = match answers.pop_front() {
            Some(answer) if random.one_in(2) => answer,
            _ => random_packet(&mut random, v6),
        };
        let (verdict, bytes) = kernel.run(&sent.0);
        let mut expected = sent.clone();
        // A damaged EtherType is the hook's business, not the core's.
        let ours = sent.0[12..14] == if v6 { [0x86, 0xdd] } else { [8, 0] };
        if !ours {
            continue;
        }
        let action = process(family, &mut expected, host, ARRIVAL);
        assert_eq!(verdict, code(action), "case {case}: {action:?} for {sent:02x?}");
        assert_eq!(bytes, expected.0, "case {case}: bytes after {action:?} of {sent:02x?}");
        if let Action::Capture { backend, .. } = action {
            assert_eq!(captured(ring), Some((backend, expected.0.clone())), "case {case}");
            host.capture(backend);
        }
        assert_eq!(captured(ring), None, "case {case}: nothing else is captured");
        *actions.entry(verdict).or_default() += 1;
        // What went into a tunnel is answered on another way.
        let is_whole = expected.0.len() == sent.0.len();
        if matches!(action, Action::Transmit { .. }) && is_whole && answers.len() < 100 {
            answers.push_back(answer(&mut random, &expected));
        }
    }
    assert_eq!(actions.len(), 4, "every action was seen: {actions:?}");

    let after = reasons(kernel);
    for (i, reason) in Reason::ALL.iter().enumerate() {
        // Frames that were skipped above are the only other ones.
        if !matches!(reason, Reason::NotIp | Reason::Truncated) {
            let counted = after[i] - before[i];
            assert_eq!(counted, host.counted(*reason), "{reason:?}, v6 {v6}");
        }
    }
    for number in 0..BACKENDS {
        let kernels: HoldCounters = kernel.get::<24, _>("HOLDS", number);
        let hosts = &host.holds[number as usize];
        assert_eq!(kernels.captured.load(Relaxed), hosts.captured.load(Relaxed), "backend {number}");
        assert_eq!(kernels.refused.load(Relaxed), hosts.refused.load(Relaxed), "backend {number}");
    }
    let family = if v6 { "V6" } else { "V4" };
    compare_flows::<W, KEY, FLOW>(kernel, host.flows(), &format!("FLOWS_{family}"));
    compare_flows::<W, KEY, FLOW>(kernel, host.newcomers(), &format!("NEWCOMERS_{family}"));
}

fn compare_flows<const W: usize, const KEY: usize, const FLOW: usize>(
    kernel: &mut Kernel,
    host: BTreeMap<FlowKey<W>, &'static Flow<W>>,
    name: &str,
) {
    let map: BpfHashMap<_, [u8; KEY], [u8; FLOW]> = kernel.ebpf.map(name).unwrap().try_into().unwrap();
    let kernels: BTreeMap<FlowKey<W>, String> = map
        .iter()
        .map(|entry| {
            let (key, value) = entry.unwrap();
            (from_bytes(&key), text(&from_bytes::<FLOW, Flow<W>>(&value)))
        })
        .collect();
    let hosts: BTreeMap<FlowKey<W>, String> = host.into_iter().map(|(key, flow)| (key, text(flow))).collect();
    assert!(hosts.len() > 100, "{} flows are too few to compare", hosts.len());
    assert_eq!(kernels, hosts);
}

/// A flow without the time of its last packet, which the two sides read from different clocks.
fn text<const W: usize>(flow: &Flow<W>) -> String {
    flow.seen.store(0, Relaxed);
    format!("{flow:?}")
}

fn reasons(kernel: &mut Kernel) -> Vec<u64> {
    let map: PerCpuArray<_, u64> = kernel.ebpf.map("REASONS").unwrap().try_into().unwrap();
    (0..Reason::ALL.len() as u32).map(|i| map.get(&i, 0).unwrap().iter().sum()).collect()
}

fn traffic(kernel: &mut Kernel, number: u32) -> Traffic {
    let map: PerCpuArray<_, [u8; 48]> = kernel.ebpf.map("TRAFFIC").unwrap().try_into().unwrap();
    map.get(&number, 0).unwrap().iter().map(from_bytes::<48, Traffic>).fold(Traffic::default(), |sum, cpu| {
        Traffic {
            packets: std::array::from_fn(|i| sum.packets[i] + cpu.packets[i]),
            bytes: std::array::from_fn(|i| sum.bytes[i] + cpu.bytes[i]),
            opened: sum.opened + cpu.opened,
            resets: sum.resets + cpu.resets,
        }
    })
}

#[test]
fn lab_kernel_and_host_decide_alike() {
    let mut kernel = Kernel::load();
    let mut ring: RingBuf<MapData> = kernel.ebpf.take_map("CAPTURE").unwrap().try_into().unwrap();
    let v4 = fill::<1, 8, 8>(&mut kernel, false);
    let v6 = fill::<4, 20, 32>(&mut kernel, true);
    fill_rings(&mut kernel, &v4);
    fill_shared(&mut kernel, false);
    compare::<1, V4, 16, 64>(&mut kernel, &mut ring, &v4, V4, false);
    fill_shared(&mut kernel, true);
    compare::<4, V6, 40, 88>(&mut kernel, &mut ring, &v6, V6, true);
    for number in 0..BACKENDS {
        let (kernels, four, six) = (traffic(&mut kernel, number), v4.traffic(number), v6.traffic(number));
        let hosts = Traffic {
            packets: std::array::from_fn(|i| four.packets[i] + six.packets[i]),
            bytes: std::array::from_fn(|i| four.bytes[i] + six.bytes[i]),
            opened: four.opened + six.opened,
            resets: four.resets + six.resets,
        };
        assert_eq!(kernels, hosts, "backend {number}");
    }
}
