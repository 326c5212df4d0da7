//! Passes over the kernel's maps. Need root.

use std::collections::BTreeSet;
use std::time::Duration;

use lb_core::decide::{TCP, UDP};

use super::*;
use crate::datapath::xdp::flows::tests::{Id, add, entry, keys, maps};

const NONE: State = State::NEW;

struct Bench {
    walker: Walker,
    pace: Pace,
    now: u64,
}

impl Bench {
    fn new() -> Self {
        let clock = Arc::new(TickClock::new().unwrap());
        let now = clock.now().unwrap();
        let pace = Pace::new(f64::INFINITY, Arc::default());
        Self { walker: Walker::new(Arc::new(maps()), clock), pace, now }
    }

    fn maps(&self) -> Arc<FlowMaps> {
        self.walker.maps.clone()
    }

    /// A minute for idle connections, five seconds for closed ones; in ticks.
    fn limits(&self) -> Limits {
        let times = crate::config::FlowTimes {
            tcp_idle: Duration::from_secs(60),
            tcp_half_open: Duration::from_secs(10),
            tcp_closing: Duration::from_secs(5),
            udp_idle: Duration::from_secs(20),
        };
        Limits::new(&times, self.walker.clock.tick())
    }

    fn ago(&self, seconds: u64) -> u64 {
        let per_second = 1.0 / self.walker.clock.tick().as_secs_f64();
        self.now - (seconds as f64 * per_second) as u64
    }

    fn pass(&mut self) -> FlowTables {
        let limits = self.limits();
        assert!(self.walker.pass(&limits, &self.pace).unwrap());
        self.walker.report(Duration::ZERO)
    }
}

fn tcp(client_port: u16) -> Id {
    Id { client_port, protocol: TCP, backend: 0 }
}

/// Client ports of the entries that are there, by direction.
fn entries(map: &FlowMap<1>) -> [BTreeSet<u16>; 2] {
    let mut found = [BTreeSet::new(), BTreeSet::new()];
    let mut chunks = map.chunks(64);
    while let Some(chunk) = chunks.next_chunk().unwrap() {
        for (key, flow) in chunk {
            let [a, b, c, d] = key.ports.to_ne_bytes();
            match flow.kind.direction() {
                Direction::ToBackend => found[0].insert(u16::from_be_bytes([a, b])),
                Direction::ToClient => found[1].insert(u16::from_be_bytes([c, d]) ^ 0x8000),
            };
        }
    }
    found
}

fn removed(report: &FlowTables, cause: Cause) -> u64 {
    report.removed.iter().find(|(label, _)| *label == cause.label()).unwrap().1
}

#[test]
fn both_entries_of_what_is_over_go_and_everything_else_stays() {
    let mut bench = Bench::new();
    let maps = bench.maps();
    let (recent, closing, idle) = (bench.ago(1), bench.ago(6), bench.ago(61));
    let (fin, reset) = (State::FINISHED, State::RESET);
    let established = &maps.v4.established;
    let mut stay = BTreeSet::new();
    for (port, seen, states, stays) in [
        (1, [recent, recent], [NONE, NONE], true),
        (2, [idle, recent], [NONE, NONE], true),
        (3, [recent, idle], [NONE, NONE], true),
        (4, [idle, idle], [NONE, NONE], false),
        (5, [closing, closing], [NONE, NONE], true),
        (6, [closing, closing], [fin, fin], false),
        (7, [closing, recent], [fin, fin], true),
        (8, [closing, closing], [fin, NONE], true),
        (9, [closing, closing], [NONE, reset], false),
        (10, [recent, closing], [NONE, reset], true),
        (11, [closing, idle], [reset, NONE], false),
    ] {
        add(established, tcp(port), seen, states);
        if stays {
            stay.insert(port);
        }
    }
    let udp = |client_port| Id { client_port, protocol: UDP, backend: 0 };
    add(established, udp(20), [bench.ago(21); 2], [NONE; 2]);
    add(established, udp(21), [bench.ago(19); 2], [NONE; 2]);
    stay.insert(21);
    let report = bench.pass();
    assert_eq!(entries(established), [stay.clone(), stay]);
    let counts = Cause::ALL.map(|cause| removed(&report, cause));
    assert_eq!(counts, [1, 2, 2, 0, 0], "{:?}", Cause::ALL);
    // Everything that was there when the pass began.
    let table = report.tables[0];
    assert_eq!((table.tcp_flows, table.other_flows, table.entries, table.most), (11, 2, 26, 20_000));
    let report = bench.pass();
    assert_eq!((report.tables[0].tcp_flows, report.tables[0].entries), (7, 16));
}

#[test]
fn flows_of_a_backend_that_is_no_more_go_at_once() {
    let mut bench = Bench::new();
    let maps = bench.maps();
    for port in 1..=10 {
        let id = Id { backend: u32::from(port % 2), ..tcp(port) };
        add(&maps.v4.established, id, [bench.now; 2], [NONE; 2]);
    }
    let another = lb_core::record::Backend { incarnation: 8, ..Default::default() };
    maps.backends.put(&1, &another).unwrap();
    let report = bench.pass();
    assert_eq!(removed(&report, Cause::Void), 5);
    let even: BTreeSet<u16> = [2, 4, 6, 8, 10].into();
    assert_eq!(entries(&maps.v4.established), [even.clone(), even]);
}

#[test]
fn entries_without_their_partner_go_after_a_grace() {
    let mut bench = Bench::new();
    let maps = bench.maps();
    let map = &maps.v4.established;
    for (port, direction, seconds) in [
        (1, Direction::ToBackend, 3),
        (2, Direction::ToClient, 3),
        (3, Direction::ToBackend, 0),
        (4, Direction::ToClient, 0),
    ] {
        let (key, flow) = entry(tcp(port), direction, bench.ago(seconds), NONE);
        map.put(&key, &flow).unwrap();
    }
    // A pinned one is the daemon's own, which makes one entry only.
    let (key, flow) = entry(tcp(5), Direction::ToBackend, bench.ago(3), State::PINNED);
    map.put(&key, &flow).unwrap();
    // The partner by name is a later flow's.
    let (key, flow) = entry(tcp(6), Direction::ToBackend, bench.now, NONE);
    map.put(&key, &flow).unwrap();
    let [_, translated] = keys(tcp(6));
    let (_, stale) = entry(tcp(6), Direction::ToClient, bench.ago(3), NONE);
    let mut other_port = translated.reversed();
    other_port.ports ^= 1;
    map.put(&other_port, &stale).unwrap();

    let reports: Vec<u64> = (0..TURNS).map(|_| removed(&bench.pass(), Cause::Orphan)).collect();
    assert_eq!(*reports.last().unwrap(), 3);
    assert!(reports.contains(&1) || reports.contains(&2), "they are not looked for all at once: {reports:?}");
    let [forwards, replies] = entries(map);
    assert_eq!(forwards, [3, 5, 6].into());
    assert_eq!(replies, [4].into());
}

#[test]
fn newcomers_have_less_time() {
    let mut bench = Bench::new();
    let maps = bench.maps();
    add(&maps.v4.newcomers, tcp(1), [bench.ago(11); 2], [NONE; 2]);
    add(&maps.v4.newcomers, tcp(2), [bench.ago(9); 2], [NONE; 2]);
    let report = bench.pass();
    assert_eq!(removed(&report, Cause::Idle), 1);
    assert_eq!(entries(&maps.v4.newcomers), [[2].into(), [2].into()]);
    assert_eq!((report.tables[1].standing, report.tables[1].tcp_flows), ("newcomers", 2));
}

#[test]
fn thousands_go_in_one_pass() {
    let mut bench = Bench::new();
    let maps = bench.maps();
    for port in 1..=5000 {
        add(&maps.v4.established, tcp(port), [bench.ago(6); 2], [State::FINISHED; 2]);
    }
    assert_eq!(removed(&bench.pass(), Cause::Closed), 5000);
    assert_eq!(entries(&maps.v4.established), [BTreeSet::new(), BTreeSet::new()]);
}

#[test]
fn a_pass_takes_its_time_and_ends_when_told() {
    let mut bench = Bench::new();
    let maps = bench.maps();
    for port in 1..=1000 {
        add(&maps.v4.established, tcp(port), [bench.now; 2], [NONE; 2]);
    }
    bench.pace = Pace::new(10_000.0, Arc::default());
    let begun = Instant::now();
    bench.pass();
    assert!(begun.elapsed() >= Duration::from_millis(200), "2,000 entries at 10,000 a second");
    bench.pace = Pace::new(10.0, Arc::new(AtomicBool::new(true)));
    let limits = bench.limits();
    assert!(!bench.walker.pass(&limits, &bench.pace).unwrap());
}
