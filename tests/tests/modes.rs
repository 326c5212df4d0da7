//! Every mode with migrations: servers move there and back under live TCP and UDP clients, and nothing is lost.
//!
//! In mode `dsr` the sites have no tunnel device: the agents' decapsulators are the tunnels' ends, and answers go to the
//! clients without the load balancer's program having a part in it.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bench::driver::{self, Load, Source};
use bench::report::Verification;
use bench::scenario::{Scenario, redis};
use bench::verify::redis_counts;
use lab::stack::{HoldOptions, Mode, Protocol, Runner, Stack, StackOptions, Tunnels, Workload};
use lab::{Lab, Site, address, program};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);
const TCP_CLIENTS: u32 = 20;
const UDP_CLIENTS: usize = 4;
/// Between two datagrams of a client, unless answers come.
const PAUSE: Duration = Duration::from_millis(10);

/// The example `udp_counter`, which `cargo test` builds too unless it is asked for one test file only.
fn udp_counter() -> PathBuf {
    static BUILD: std::sync::Once = std::sync::Once::new();
    BUILD.call_once(|| {
        let mut args = vec!["build", "--quiet", "--package", "tests", "--example", "udp_counter"];
        if !cfg!(debug_assertions) {
            args.push("--release");
        }
        assert!(Command::new(env!("CARGO")).args(args).status().unwrap().success());
    });
    program("examples/udp_counter").unwrap()
}

fn counter(v6: bool) -> Workload {
    const PORT: u16 = 7100;
    let (own, service): (IpAddr, IpAddr) = if v6 {
        (address::backend6(2).into(), address::VIRTUAL6.into())
    } else {
        (address::backend4(2).into(), address::VIRTUAL4.into())
    };
    let address = SocketAddr::new(own, PORT);
    Workload {
        name: "counter".to_owned(),
        address,
        protocol: Protocol::Udp,
        command: vec![udp_counter().display().to_string(), address.to_string()],
        dir: None,
        site: Site::A,
        service: SocketAddr::new(service, PORT),
        mode: Mode::Nat,
        memory: lab::stack::Memory::Auto,
        runner: Runner::Agent,
    }
}

/// Clients that send numbered datagrams, whether or not the former ones have been answered.
struct Askers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Asked>>,
}

/// What one client sent and got.
struct Asked {
    sent: u64,
    /// How far the server had counted, in each answer.
    counts: BTreeSet<u64>,
}

impl Askers {
    fn start(stack: &Stack, service: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let any: IpAddr =
            if service.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let threads = (0..UDP_CLIENTS).map(|_| {
            let socket = stack.lab().client().run(|| UdpSocket::bind((any, 0)).unwrap());
            socket.connect(service).unwrap();
            socket.set_read_timeout(Some(PAUSE)).unwrap();
            let stop = stop.clone();
            std::thread::spawn(move || ask(&socket, &stop))
        });
        let threads = threads.collect();
        Self { stop, threads }
    }

    /// Every datagram was answered once, by one server that saw each of them once.
    fn must_be_whole(self) {
        self.stop.store(true, Relaxed);
        let asked: Vec<Asked> = self.threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let sent: u64 = asked.iter().map(|asked| asked.sent).sum();
        let counts: BTreeSet<u64> = asked.iter().flat_map(|asked| &asked.counts).copied().collect();
        assert!(sent > 100, "{sent}");
        assert_eq!(counts, (1..=sent).collect(), "the server counted otherwise than its clients");
    }
}

fn ask(socket: &UdpSocket, stop: &AtomicBool) -> Asked {
    let mut asked = Asked { sent: 0, counts: BTreeSet::new() };
    let mut open = BTreeSet::new();
    let mut take = |open: &mut BTreeSet<u64>| {
        let mut answer = [0; 16];
        let Ok(16) = socket.recv(&mut answer) else { return };
        let number = |at: usize| u64::from_be_bytes(answer[at..at + 8].try_into().unwrap());
        assert!(open.remove(&number(0)), "{} was answered twice", number(0));
        assert!(asked.counts.insert(number(8)), "the server said {} twice", number(8));
    };
    while !stop.load(Relaxed) {
        socket.send(&asked.sent.to_be_bytes()).unwrap();
        open.insert(asked.sent);
        asked.sent += 1;
        let next = Instant::now() + PAUSE;
        while Instant::now() < next {
            take(&mut open);
        }
    }
    let end = Instant::now() + LIMIT;
    while !open.is_empty() && Instant::now() < end {
        take(&mut open);
    }
    assert!(open.is_empty(), "{} of {} were not answered: {open:?}", open.len(), asked.sent);
    asked
}

fn moves_there_and_back(mode: Mode, v6: bool, tunnels: Option<Tunnels>) {
    let redis_server = if v6 { Workload::redis6(1) } else { Workload::redis(1) }.in_mode(mode);
    let counter = counter(v6).in_mode(mode);
    let service = redis_server.service;
    // Deadlines have tests of their own; here other tests may take the processors.
    let hold = HoldOptions { deadline_ms: Some(15_000), max_age_ms: Some(20_000), ..HoldOptions::default() };
    let workloads = vec![redis_server, counter];
    let options = StackOptions { workloads, tunnels, hold, ..StackOptions::default() };
    let stack = Stack::start(Lab::new().unwrap(), options).unwrap();
    let load = Load {
        target: service,
        source: Source::Any,
        clients: TCP_CLIENTS,
        rate_per_s: 400.0,
        connect_timeout: LIMIT,
        drain: LIMIT,
    };
    let clients = stack
        .lab()
        .client()
        .run(|| driver::connect(load, Scenario::Redis.protocol()).unwrap().start().unwrap());
    let askers = Askers::start(&stack, stack.workloads()[1].service);
    servers_see(&stack, service, mode);
    for to in [Site::B, Site::A] {
        for workload in stack.workloads() {
            std::thread::sleep(Duration::from_millis(200));
            let id = stack.start_migration(&workload.name, to, &Value::Null).unwrap();
            let migration = stack.finished_migration(&id, LIMIT).unwrap();
            assert_eq!(migration["state"], "committed", "{}: {migration:#}", workload.name);
        }
        if let Some(tunnels) = tunnels {
            decapsulates(&stack, to, v6, tunnels);
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    askers.must_be_whole();
    let timeline = clients.stop().unwrap();
    let faults = &timeline.faults;
    assert_eq!(
        (faults.lost, faults.duplicated, faults.reordered, faults.resets),
        (0, 0, 0, 0),
        "{:?}",
        timeline.errors
    );
    let counts = stack.lab().client().run(|| redis_counts(service, &redis(), TCP_CLIENTS).unwrap());
    assert_eq!(Verification::compare(&timeline, &counts), Verification::default());
    assert!(timeline.answered() > 100);
}

/// The server sees its clients' own addresses, unless they are translated.
fn servers_see(stack: &Stack, service: SocketAddr, mode: Mode) {
    let (ip, port) = (service.ip().to_string(), service.port().to_string());
    let mut command = stack.lab().client().command("redis-cli");
    let output = command.args(["-h", &ip, "-p", &port, "CLIENT", "LIST"]).output().unwrap();
    let listing = String::from_utf8_lossy(&output.stdout);
    let client = if service.is_ipv4() {
        format!(" addr={}:", address::CLIENT4)
    } else {
        format!(" addr=[{}]:", address::CLIENT6)
    };
    assert!(listing.lines().count() > TCP_CLIENTS as usize, "{listing}");
    let first = listing.lines().next().unwrap();
    assert_eq!(listing.contains(&client), mode != Mode::Nat, "{mode:?}: {first}");
}

/// The site's decapsulator has done what is expected of it, and nothing else.
fn decapsulates(stack: &Stack, site: Site, v6: bool, tunnels: Tunnels) {
    let (status, answer) = stack.agent(site, "GET", "/v1/decapsulator", None).unwrap();
    assert_eq!(status, 200, "{answer}");
    let expected = match (tunnels, v6) {
        (Tunnels::V4, _) => "v4_in_v4",
        (Tunnels::V6, true) => "v6_in_v6",
        (Tunnels::V6, false) => "v4_in_v6",
    };
    for label in ["v4_in_v4", "v6_in_v6", "v4_in_v6"] {
        let packets = answer["packets"][label].as_u64().unwrap();
        assert_eq!(packets > 0, label == expected, "{answer:#}");
    }
    for label in ["refused", "malformed", "bad_checksum", "not_a_workload", "source_refused"] {
        assert_eq!(answer["packets"][label], 0, "{answer:#}");
    }
}

#[test]
fn nat_of_ipv4() {
    moves_there_and_back(Mode::Nat, false, None);
}

#[test]
fn nat_of_ipv6() {
    moves_there_and_back(Mode::Nat, true, None);
}

#[test]
fn transparent_with_ipv4() {
    moves_there_and_back(Mode::Transparent, false, None);
}

#[test]
fn transparent_with_ipv6() {
    moves_there_and_back(Mode::Transparent, true, None);
}

#[test]
fn dsr_with_ipv4_in_ipv4() {
    moves_there_and_back(Mode::Dsr, false, Some(Tunnels::V4));
}

#[test]
fn dsr_with_ipv6_in_ipv6() {
    moves_there_and_back(Mode::Dsr, true, Some(Tunnels::V6));
}

#[test]
fn dsr_with_ipv4_in_ipv6() {
    moves_there_and_back(Mode::Dsr, false, Some(Tunnels::V6));
}
