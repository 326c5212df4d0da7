//! The decapsulator's programs against the same code on the host: every packet goes through `BPF_PROG_TEST_RUN` at
//! both hooks, and verdict, bytes and counters must be equal.
#![expect(clippy::unwrap_used, reason = "fixtures state what they expect by unwrapping")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;

use aya::maps::PerCpuArray;
use aya::{Ebpf, TestRun, TestRunOptions, TestRunResult};
use lb_core::decapsulate::{Class, Encapsulation, Reason, Verdict};
use lb_core::host::{Frame, FrameBuilder, HostTunnels, Outer, Segment};
use migrate::decapsulator::config::{Config, HookChoice};
use migrate::decapsulator::hook::{self, Kind};
use migrate::decapsulator::program;
use nix::sched::{CloneFlags, unshare};

const CASES: usize = 20_000;
/// A link header and an IPv6 header.
const SHORTEST: usize = 54;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const TC_SHOT: u32 = 2;
const TC_UNSPEC: u32 = u32::MAX;

/// A small fast generator (xorshift64*), so that a failing case is found again by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }
}

struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Kernel {
    ebpf: Ebpf,
    /// Dropped last.
    pins: Pins,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

const ENDPOINTS: [&str; 2] = ["10.2.1.2", "fd00:2:1::2"];
const SOURCES: [&str; 2] = ["10.2.1.254", "fd00:2:1::fe"];
const DESTINATIONS: [&str; 2] = ["10.0.0.100", "fd00::100"];

fn host() -> HostTunnels {
    let mut host = HostTunnels::default();
    host.endpoints.extend(ENDPOINTS.map(ip));
    host.sources.extend(SOURCES.map(ip));
    host.destinations.extend(DESTINATIONS.map(ip));
    host
}

impl Kernel {
    fn load(name: &str, from: &[&str]) -> Self {
        let pins =
            Pins(PathBuf::from(format!("/sys/fs/bpf/drover-decapsulator-{name}-{}", std::process::id())));
        let config = Config {
            interfaces: vec!["none".to_owned()],
            hook: HookChoice::Auto,
            endpoints: ENDPOINTS.map(ip).into(),
            from: from.iter().map(|text| text.parse().unwrap()).collect(),
            pin_path: pins.0.clone(),
        };
        let mut ebpf = program::load(&pins.0).expect("root, and a kernel with XDP and tc");
        program::fill(&mut ebpf, &config, &DESTINATIONS.map(ip).into()).unwrap();
        Self { ebpf, pins }
    }

    fn run<P>(program: &mut P, frame: &Frame) -> (u32, Frame)
    where
        P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
    {
        let mut out = vec![0; 4096];
        let options =
            TestRunOptions { data_in: Some(&frame.0), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, Frame(out))
    }

    fn xdp(&mut self, frame: &Frame) -> (u32, Frame) {
        Self::run(program::xdp(&mut self.ebpf).unwrap(), frame)
    }

    fn tc(&mut self, frame: &Frame) -> (u32, Frame) {
        Self::run(program::tc(&mut self.ebpf).unwrap(), frame)
    }

    fn counted(&self, reason: Reason) -> u64 {
        let map: PerCpuArray<_, u64> = self.ebpf.map("REASONS").unwrap().try_into().unwrap();
        map.get(&(reason as u32), 0).unwrap().iter().sum()
    }
}

/// An encapsulated packet with something wrong now and then.
fn packet(random: &mut Random) -> Frame {
    let encapsulation = *random.choose(&Encapsulation::ALL);
    let (outer_v4, inner_v4) = match encapsulation {
        Encapsulation::V4InV4 => (true, true),
        Encapsulation::V6InV6 => (false, false),
        Encapsulation::V4InV6 => (false, true),
    };
    let mut pick = |known: [&str; 2], other: [&str; 2], v4: bool| {
        let from = if random.one_in(15) { other } else { known };
        ip(from[usize::from(!v4)])
    };
    let other = ["10.9.9.9", "fd00:9::9"];
    let (source, destination) = (pick(SOURCES, other, outer_v4), pick(ENDPOINTS, other, outer_v4));
    let inner_destination = pick(DESTINATIONS, other, inner_v4);
    let segment = if random.one_in(2) {
        Segment::Tcp { flags: 0x10 }
    } else {
        Segment::Udp { checksum: random.one_in(2) }
    };
    let builder = FrameBuilder {
        link: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
        source: SocketAddr::new(ip(if inner_v4 { "10.0.0.1" } else { "fd00::1" }), 40_000),
        destination: SocketAddr::new(inner_destination, 80),
        ttl: 60,
        segment,
        payload: vec![7; random.below(1300) as usize],
    };
    let mut inner = builder.build();
    let mark = random.byte();
    if inner_v4 {
        // The inner checksum is then wrong, which is its receiver's business, and is mended as it is.
        inner.0[15] = mark;
    } else {
        inner.0[14] = 0x60 | mark >> 4;
        inner.0[15] = mark << 4;
    }
    let ttl = if random.one_in(15) { 0 } else { 64 };
    let outer = Outer { ttl, traffic_class: random.byte(), ..Outer::new(source, destination) };
    damaged(random, outer.encapsulate(&inner))
}

fn damaged(random: &mut Random, mut frame: Frame) -> Frame {
    while random.one_in(6) {
        // Not the EtherType: the kernel has its own opinion of frames that are then none of ours.
        let at = 14 + random.below(80) as usize;
        if let Some(byte) = frame.0.get_mut(at) {
            *byte = random.byte();
        }
    }
    if random.one_in(10) {
        // The kernel takes no frame without a whole link header and a byte.
        let length = 15 + random.below(frame.0.len() as u64 - 15) as usize;
        frame.0.truncate(length);
    }
    frame
}

#[test]
fn kernel_and_host_strip_alike() {
    let mut kernel = Kernel::load("alike", &SOURCES);
    let (at_xdp, at_tc) = (host(), host());
    let mut random = Random(0x5eed_0002);
    for case in 0..CASES {
        let sent = packet(&mut random);
        let mut expected = sent.clone();
        let verdict = at_xdp.process(&mut expected);
        let (pass, drop) = ((XDP_PASS, TC_UNSPEC), (XDP_DROP, TC_SHOT));
        let (xdp, tc) = if verdict == Verdict::Drop { drop } else { pass };
        assert_eq!(
            kernel.xdp(&sent),
            (xdp, expected.clone()),
            "case {case}: XDP after {verdict:?} of {sent:02x?}"
        );
        // The kernel does not run what is shorter than an IP header at tc, where no such packet comes.
        if sent.0.len() >= SHORTEST {
            at_tc.process(&mut sent.clone());
            assert_eq!(kernel.tc(&sent), (tc, expected), "case {case}: tc after {verdict:?} of {sent:02x?}");
        }
    }
    for reason in Reason::ALL {
        let (at_xdp, at_tc) = (at_xdp.counted(*reason), at_tc.counted(*reason));
        assert_eq!(kernel.counted(*reason), at_xdp + at_tc, "{reason:?}");
        assert!(at_tc > 10 || *reason == Reason::Refused, "{reason:?} was seen {at_tc} times");
    }
}

#[test]
fn who_may_send_is_a_matter_of_prefixes() {
    let frame = |source: &str| {
        let inner = FrameBuilder {
            link: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
            source: "10.0.0.1:40000".parse().unwrap(),
            destination: "10.0.0.100:80".parse().unwrap(),
            ttl: 60,
            segment: Segment::Udp { checksum: true },
            payload: vec![1; 40],
        };
        let source = ip(source);
        let endpoint = ip(ENDPOINTS[usize::from(source.is_ipv6())]);
        Outer::new(source, endpoint).encapsulate(&inner.build())
    };
    let everybody = ["10.2.1.254", "10.2.255.255", "10.3.0.0", "fd00:2:1::fe", "fd00:2:2::1", "2001:db8::1"];
    for (from, accepted) in [
        (&[][..], &everybody[..]),
        (&["10.2.0.0/16"], &["10.2.1.254", "10.2.255.255"]),
        (&["10.2.1.254", "fd00:2:1::/48"], &["10.2.1.254", "fd00:2:1::fe"]),
        (&["0.0.0.0/0"], &["10.2.1.254", "10.2.255.255", "10.3.0.0"]),
    ] {
        let mut kernel = Kernel::load("prefixes", from);
        for source in everybody {
            let sent = frame(source);
            let stripped = kernel.xdp(&sent).1 != sent;
            assert_eq!(stripped, accepted.contains(&source), "{source} where {from:?} may");
        }
        let refused = (everybody.len() - accepted.len()) as u64;
        assert_eq!(kernel.counted(Reason::SourceRefused), refused);
        assert_eq!(Reason::SourceRefused.class(), Class::Pass);
    }
}

#[test]
fn tables_follow_the_configuration() {
    let mut kernel = Kernel::load("tables", &SOURCES);
    let config = Config {
        interfaces: vec!["none".to_owned()],
        hook: HookChoice::Auto,
        endpoints: [ip("10.2.2.2")].into(),
        from: ["10.2.2.0/24".parse().unwrap()].into(),
        pin_path: PathBuf::new(),
    };
    program::fill(&mut kernel.ebpf, &config, &[ip("10.0.0.101")].into()).unwrap();
    let frame = |source: &str, endpoint: &str, destination: &str| {
        let inner = FrameBuilder {
            link: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
            source: "10.0.0.1:40000".parse().unwrap(),
            destination: SocketAddr::new(ip(destination), 80),
            ttl: 60,
            segment: Segment::Udp { checksum: true },
            payload: vec![1; 40],
        };
        Outer::new(ip(source), ip(endpoint)).encapsulate(&inner.build())
    };
    for (source, endpoint, destination, reason) in [
        ("10.2.2.254", "10.2.2.2", "10.0.0.101", Reason::V4InV4),
        ("10.2.1.254", "10.2.2.2", "10.0.0.101", Reason::SourceRefused),
        ("10.2.2.254", "10.2.1.2", "10.0.0.101", Reason::NotAnEndpoint),
        ("10.2.2.254", "10.2.2.2", "10.0.0.100", Reason::NotAWorkload),
    ] {
        let before = kernel.counted(reason);
        kernel.tc(&frame(source, endpoint, destination));
        assert_eq!(kernel.counted(reason), before + 1, "{source} to {endpoint} for {destination}");
    }
}

/// Our filters on an interface, as `tc` shows them.
fn filters(interface: &str) -> usize {
    let output = Command::new("tc").args(["filter", "show", "dev", interface, "ingress"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).matches("handle 0x7401").count()
}

#[test]
fn each_place_is_taken_over_and_left() {
    // The thread has a network namespace of its own, which goes with it.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let output = Command::new("ip").args(["link", "set", "lo", "up"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    for kind in [Kind::Generic, Kind::Tcx, Kind::Clsact] {
        let mut kernel = Kernel::load("places", &[]);
        hook::attach_at(&mut kernel.ebpf, "lo", kind, &kernel.pins.0).unwrap();
        let mut next = program::load(&kernel.pins.0).unwrap();
        hook::attach_at(&mut next, "lo", kind, &kernel.pins.0).unwrap();
        assert_eq!(filters("lo"), usize::from(kind == Kind::Clsact), "{kind}");
        drop(kernel.ebpf);
        drop(next);
        let before = tested(&kernel.pins.0);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"hello", socket.local_addr().unwrap()).unwrap();
        assert!(tested(&kernel.pins.0) > before, "{kind}: nothing runs once its loaders are gone");
        hook::remove_all(&kernel.pins.0).unwrap();
        assert!(!kernel.pins.0.exists());
        assert_eq!(filters("lo"), 0, "{kind}");
    }
}

/// How many packets were no tunnels.
fn tested(pins: &std::path::Path) -> u64 {
    let map = aya::maps::MapData::from_pin(pins.join("maps/REASONS")).unwrap();
    let map: PerCpuArray<_, u64> = aya::maps::Map::PerCpuArray(map).try_into().unwrap();
    map.get(&(Reason::NotATunnel as u32), 0).unwrap().iter().sum()
}
