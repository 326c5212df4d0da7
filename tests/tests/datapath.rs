//! The XDP datapath in a lab, without the daemon around it: packets of both families and protocols, every gate,
//! bounds, order, and what a crash leaves behind.
//!
//! Servers are threads in the sites' namespaces; what is asserted is what clients and servers received.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::{Lab, Site, address, wait_for};
use lb::config;
use lb::datapath::xdp::XdpDatapath;
use lb::datapath::{
    BackendNumber, BackendPlan, Datapath, Event, HoldLimits, Overflow, Plan, Protocol, ServicePlan, SitePlan,
};
use lb_core::Gate;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const PORT: u16 = 7000;
const LIMIT: Duration = Duration::from_secs(5);

/// A lab with an opened datapath: services on both families and protocols, each over one backend.
struct Bench {
    datapath: Option<XdpDatapath>,
    events: UnboundedReceiver<Event>,
    lab: Lab,
}

impl Bench {
    fn new() -> Self {
        let lab = Lab::new().unwrap();
        let (datapath, events) = open(&lab);
        Self { datapath: Some(datapath), events, lab }
    }

    fn datapath(&self) -> &XdpDatapath {
        self.datapath.as_ref().unwrap()
    }

    fn backend(&self, v6: bool) -> BackendNumber {
        self.datapath().backend(if v6 { "six" } else { "four" }).unwrap()
    }

    /// Ends the daemon's part without a word, as a crash does (the process's memory is all that it had).
    fn crash(&mut self) {
        self.datapath = None;
    }

    fn restart(&mut self) {
        let (datapath, events) = open(&self.lab);
        (self.datapath, self.events) = (Some(datapath), events);
    }

    fn hold(&self, backend: BackendNumber, limits: HoldLimits) {
        let word = self.datapath().state(backend).word;
        self.datapath().begin_hold(backend, limits);
        self.datapath().store(backend, word.with_gate(Gate::Hold));
    }

    /// Replays to another site and opens the gate there.
    fn flip(&mut self, backend: BackendNumber, to: Site) {
        let site = self.datapath().site(to.name()).unwrap();
        self.datapath().stage(backend, site).unwrap();
        let word = self.datapath().state(backend).word.flipped(Gate::Replay);
        self.datapath().store(backend, word);
        self.replayed(backend);
        self.datapath().store(backend, word.with_gate(Gate::Forward));
        assert_eq!(self.datapath().state(backend).location(), site);
    }

    fn replayed(&mut self, backend: BackendNumber) {
        wait_for(LIMIT, || match self.events.try_recv() {
            Ok(Event::Replayed { backend: whose, .. }) if whose == backend => Some(()),
            _ => None,
        })
        .expect("the replay comes to an end");
    }

    fn reason(&self, label: &str) -> u64 {
        self.datapath().reasons().into_iter().find(|(name, _)| *name == label).unwrap().1
    }
}

fn open(lab: &Lab) -> (XdpDatapath, UnboundedReceiver<Event>) {
    let (sender, events) = unbounded_channel();
    let text = format!(
        "[datapath]\ninterfaces = [\"c0\", \"a0\", \"b0\"]\npin_path = {:?}\nnat_source4 = {:?}\nnat_source6 = {:?}\n\
         [[sites]]\nname = \"ams\"\nnext_hop = \"10.2.1.1\"\n\
         [[backends]]\nname = \"b\"\naddress = \"10.1.0.1:1\"\nsite = \"ams\"\n\
         [[services]]\nname = \"s\"\naddress = \"10.0.0.100:1\"\nprotocol = \"tcp\"\nbackends = [\"b\"]\n",
        lab.pin_path(),
        address::NAT_SOURCE4,
        address::NAT_SOURCE6
    );
    let config = config::Config::parse(&text, "lab").unwrap();
    let datapath = lab.lb().run(|| {
        let datapath = XdpDatapath::open(&config.datapath, sender).unwrap();
        datapath.install(&plan()).unwrap();
        datapath
    });
    (datapath, events)
}

fn plan() -> Plan {
    let sites = Site::ALL.map(|site| SitePlan::new(site.name(), address::site4(site).into())).into();
    let backend = |name: &str, ip: IpAddr| BackendPlan::new(name, SocketAddr::new(ip, PORT), Site::A.name());
    let service = |v6: bool, protocol: Protocol| {
        let backends = vec![if v6 { "six" } else { "four" }.into()];
        ServicePlan::new(format!("{protocol:?}-{v6}"), virtual_address(v6), protocol, backends)
    };
    Plan {
        sites,
        backends: vec![
            backend("four", address::backend4(1).into()),
            backend("six", address::backend6(1).into()),
        ],
        services: vec![
            service(false, Protocol::Tcp),
            service(false, Protocol::Udp),
            service(true, Protocol::Tcp),
            service(true, Protocol::Udp),
        ],
    }
}

fn virtual_address(v6: bool) -> SocketAddr {
    let ip: IpAddr = if v6 { address::VIRTUAL6.into() } else { address::VIRTUAL4.into() };
    SocketAddr::new(ip, PORT)
}

fn backend_address(v6: bool) -> SocketAddr {
    let ip: IpAddr = if v6 { address::backend6(1).into() } else { address::backend4(1).into() };
    SocketAddr::new(ip, PORT)
}

/// A UDP server that remembers what it received and sends it back with its site's name.
struct UdpServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<u64>>>,
}

impl UdpServer {
    fn start(lab: &Lab, site: Site, v6: bool) -> Self {
        let socket = lab.site(site).run(|| UdpSocket::bind(backend_address(v6)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        widen(&socket);
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut received = Vec::new();
            let mut datagram = [0; 2048];
            while !stopping.load(Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut datagram) else { continue };
                received.push(u64::from_be_bytes(datagram[..8].try_into().unwrap()));
                datagram[8] = site as u8;
                let _ = socket.send_to(&datagram[..length], from);
            }
            received
        });
        Self { stop, thread: Some(thread) }
    }

    fn received(mut self) -> Vec<u64> {
        self.stop.store(true, Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Room for a burst: a replay is one, and what is tested is that the load balancer loses nothing of it.
fn widen(socket: &UdpSocket) {
    setsockopt(socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
}

/// A TCP server that sends back what it gets.
fn tcp_echo(lab: &Lab, site: Site, v6: bool) {
    let listener = lab.site(site).run(|| TcpListener::bind(backend_address(v6)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 65536];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

fn connect(lab: &Lab, v6: bool) -> TcpStream {
    let stream = lab.client().run(|| TcpStream::connect_timeout(&virtual_address(v6), LIMIT)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn udp_client(lab: &Lab, v6: bool) -> UdpSocket {
    lab.client().run(|| {
        let any: IpAddr = if v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.connect(virtual_address(v6)).unwrap();
        widen(&socket);
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket
    })
}

fn datagram(number: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(9)];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn ask(client: &UdpSocket, number: u64) -> Site {
    client.send(&datagram(number, 40)).unwrap();
    let mut answer = [0; 2048];
    client.recv(&mut answer).unwrap();
    assert_eq!(answer[..8], number.to_be_bytes());
    Site::ALL[answer[8] as usize]
}

fn limits(max_bytes: usize) -> HoldLimits {
    HoldLimits { max_bytes, max_age: Duration::from_secs(10), overflow: Overflow::DropNewest }
}

#[test]
fn tcp_and_udp_of_both_families_reach_their_backend_and_come_back() {
    let bench = Bench::new();
    for v6 in [false, true] {
        tcp_echo(&bench.lab, Site::A, v6);
        let server = UdpServer::start(&bench.lab, Site::A, v6);
        let mut stream = connect(&bench.lab, v6);
        // Large enough for many full segments both ways.
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 31) as u8).collect();
        let (mut writer, expected) = (stream.try_clone().unwrap(), sent.clone());
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut echoed = vec![0; expected.len()];
        stream.read_exact(&mut echoed).unwrap();
        writing.join().unwrap();
        assert!(echoed == expected, "every byte came back as it was, v6 {v6}");

        let client = udp_client(&bench.lab, v6);
        for number in 0..100 {
            assert_eq!(ask(&client, number), Site::A);
        }
        assert_eq!(server.received(), (0..100).collect::<Vec<_>>());
        let traffic = bench.datapath().traffic(bench.backend(v6));
        assert!(traffic.to_backend_bytes > 3_000_000 && traffic.to_clients_bytes > 3_000_000);
    }
}

#[test]
fn held_packets_arrive_at_the_new_site_in_order_and_none_at_the_old() {
    for v6 in [false, true] {
        let mut bench = Bench::new();
        let servers = Site::ALL.map(|site| UdpServer::start(&bench.lab, site, v6));
        let client = udp_client(&bench.lab, v6);
        assert_eq!(ask(&client, 0), Site::A);
        let backend = bench.backend(v6);
        bench.hold(backend, limits(64 << 20));
        // Both capture slot sizes, full frames too.
        for number in 1..=500 {
            client.send(&datagram(number, [40, 300, 1400][number as usize % 3])).unwrap();
        }
        let held = wait_for(LIMIT, || {
            let stats = bench.datapath().hold_stats(backend);
            (stats.held_packets == 500).then_some(stats)
        });
        assert_eq!(held.expect("all are held").dropped_packets, 0);
        bench.flip(backend, Site::B);
        assert_eq!(bench.datapath().hold_stats(backend).replayed_packets, 500);
        // Each is answered once. In which order they are read says nothing about the load balancer: the client's
        // kernel swaps two of a burst now and then when it looks whether they can be merged (GRO).
        let mut answer = [0; 2048];
        let mut answered: Vec<u64> = (1..=500)
            .map(|_| {
                client.recv(&mut answer).unwrap();
                u64::from_be_bytes(answer[..8].try_into().unwrap())
            })
            .collect();
        answered.sort_unstable();
        assert_eq!(answered, (1..=500).collect::<Vec<_>>());
        assert_eq!(ask(&client, 501), Site::B);
        // What was held arrived in the order in which it was sent.
        let [a, b] = servers.map(UdpServer::received);
        assert_eq!(a, [0]);
        assert_eq!(b, (1..=501).collect::<Vec<_>>());
    }
}

#[test]
fn a_queue_takes_its_bytes_and_counts_the_rest() {
    for (overflow, kept) in [(Overflow::DropNewest, 1..=10), (Overflow::DropOldest, 91..=100)] {
        let mut bench = Bench::new();
        let server = UdpServer::start(&bench.lab, Site::A, false);
        let client = udp_client(&bench.lab, false);
        assert_eq!(ask(&client, 0), Site::A);
        let backend = bench.backend(false);
        // Ten frames of 1,000 bytes with their 42 bytes of headers.
        bench.hold(backend, HoldLimits { overflow, ..limits(10_420) });
        for number in 1..=100 {
            client.send(&datagram(number, 1000)).unwrap();
        }
        wait_for(LIMIT, || (bench.datapath().hold_stats(backend).dropped_packets == 90).then_some(()))
            .expect("ninety are dropped and counted");
        let word = bench.datapath().state(backend).word.with_gate(Gate::Replay);
        bench.datapath().store(backend, word);
        bench.replayed(backend);
        bench.datapath().store(backend, word.with_gate(Gate::Forward));
        let mut answer = [0; 2048];
        for _ in kept.clone() {
            client.recv(&mut answer).unwrap();
        }
        let received = server.received();
        assert_eq!(received[0], 0);
        assert_eq!(received[1..], kept.collect::<Vec<_>>(), "{overflow:?}");
    }
}

#[test]
fn order_holds_through_a_flip_under_load() {
    let mut bench = Bench::new();
    let servers = Site::ALL.map(|site| UdpServer::start(&bench.lab, site, false));
    let client = udp_client(&bench.lab, false);
    assert_eq!(ask(&client, 0), Site::A);
    let backend = bench.backend(false);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopping, sender) = (stop.clone(), client.try_clone().unwrap());
    let sending = std::thread::spawn(move || {
        let mut number = 0;
        while !stopping.load(Relaxed) && number < 200_000 {
            number += 1;
            sender.send(&datagram(number, 60)).unwrap();
            if number.is_multiple_of(10) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        number
    });
    let mut site = Site::A;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(30));
        bench.hold(backend, limits(64 << 20));
        std::thread::sleep(Duration::from_millis(20));
        site = site.other();
        bench.flip(backend, site);
        assert_eq!(bench.datapath().hold_stats(backend).dropped_packets, 0);
    }
    std::thread::sleep(Duration::from_millis(30));
    stop.store(true, Relaxed);
    let last = sending.join().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let [a, b] = servers.map(UdpServer::received);
    for (site, received) in [("a", &a), ("b", &b)] {
        let disorder = received.windows(2).find(|pair| pair[0] >= pair[1]);
        assert_eq!(disorder, None, "site {site}");
    }
    let mut all = [a, b].concat();
    all.sort_unstable();
    let gaps: Vec<_> = all.windows(2).filter(|pair| pair[0] + 1 != pair[1]).collect();
    assert!(gaps.is_empty(), "each once: {gaps:?}");
    assert_eq!(all.len() as u64, last + 1);
}

#[test]
fn a_site_that_is_not_the_location_is_not_heard() {
    let mut bench = Bench::new();
    let server = bench.lab.site(Site::A).run(|| UdpSocket::bind(backend_address(false)).unwrap());
    let client = udp_client(&bench.lab, false);
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let backend = bench.backend(false);
    let mut bytes = [0; 64];
    client.send(&datagram(1, 40)).unwrap();
    let (length, from) = server.recv_from(&mut bytes).unwrap();

    bench.hold(backend, limits(1 << 20));
    bench.flip(backend, Site::B);
    // The old site answers a question that it got while it was the location.
    server.send_to(&bytes[..length], from).unwrap();
    assert!(client.recv(&mut bytes).is_err(), "a former location was heard");
    assert_eq!(bench.reason("stale_site"), 1);

    bench.hold(backend, limits(1 << 20));
    bench.flip(backend, Site::A);
    server.send_to(&bytes[..length], from).unwrap();
    assert_eq!(client.recv(&mut bytes).unwrap(), length);
}

#[test]
fn a_site_without_a_route_is_refused_and_nothing_changes() {
    let bench = Bench::new();
    let _server = UdpServer::start(&bench.lab, Site::A, false);
    let client = udp_client(&bench.lab, false);
    let mut plan = plan();
    plan.sites.push(SitePlan::new("nowhere", "192.0.2.1".parse().unwrap()));
    plan.services.clear();
    let error = bench.datapath().install(&plan).unwrap_err().to_string();
    assert!(error.contains("nowhere") && error.contains("no route to 192.0.2.1"), "{error}");
    assert_eq!(bench.datapath().site("nowhere"), None);
    assert_eq!(ask(&client, 1), Site::A, "the services are still there");
}

#[test]
fn traffic_outlives_the_daemon_and_the_next_one_takes_over() {
    let mut bench = Bench::new();
    let server = UdpServer::start(&bench.lab, Site::A, false);
    tcp_echo(&bench.lab, Site::A, false);
    let client = udp_client(&bench.lab, false);
    let mut stream = connect(&bench.lab, false);
    assert_eq!(ask(&client, 1), Site::A);
    let backend = bench.backend(false);
    bench.crash();
    assert_eq!(ask(&client, 2), Site::A);
    let fresh = udp_client(&bench.lab, false);
    assert_eq!(ask(&fresh, 3), Site::A, "new flows too");
    bench.restart();
    assert_eq!(bench.backend(false), backend);
    assert_eq!(ask(&client, 4), Site::A);
    let mut byte = [0];
    stream.write_all(&[9]).unwrap();
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(server.received(), [1, 2, 3, 4]);
}

#[test]
fn what_is_held_while_no_daemon_runs_is_replayed_by_the_next() {
    let mut bench = Bench::new();
    let servers = Site::ALL.map(|site| UdpServer::start(&bench.lab, site, false));
    let client = udp_client(&bench.lab, false);
    assert_eq!(ask(&client, 0), Site::A);
    let backend = bench.backend(false);
    bench.hold(backend, limits(1 << 20));
    client.send(&datagram(1, 40)).unwrap();
    // The first one is in the crashed daemon's memory; it is lost, and said to be.
    wait_for(LIMIT, || (bench.datapath().hold_stats(backend).held_packets == 1).then_some(())).unwrap();
    bench.crash();
    for number in 2..=20 {
        client.send(&datagram(number, 40)).unwrap();
    }
    bench.restart();
    let state = bench.datapath().state(backend);
    assert_eq!(state.word.gate(), Gate::Hold, "the gate is as it was left");
    bench.datapath().begin_hold(backend, limits(1 << 20));
    let start = Instant::now();
    bench.flip(backend, Site::B);
    assert!(start.elapsed() < LIMIT);
    let stats = bench.datapath().hold_stats(backend);
    assert_eq!((stats.replayed_packets, stats.dropped_packets), (19, 1));
    let mut answer = [0; 2048];
    for _ in 2..=20 {
        client.recv(&mut answer).unwrap();
    }
    assert_eq!(ask(&client, 21), Site::B);
    let [a, b] = servers.map(UdpServer::received);
    assert_eq!((a, b), (vec![0], (2..=21).collect::<Vec<_>>()));
}
