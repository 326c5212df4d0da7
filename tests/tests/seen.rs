//! What an operator sees of a running load balancer: flows, their ends, and captures; and that flows end at all.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping, in its helpers too")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::stack::{Stack, StackOptions, Workload};
use lab::{Lab, Site, address, program, wait_for};
use nix::sys::socket::{setsockopt, sockopt};
use pcap_parser::pcapng::{Block, OptionCode};
use pcap_parser::traits::PcapReaderIterator as _;
use pcap_parser::{PcapBlockOwned, PcapError, PcapNGReader};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(5);
const CLOSING: Duration = Duration::from_secs(2);
const UDP_IDLE: Duration = Duration::from_secs(3);
const ECHO_PORT: u16 = 7000;
const SERVICE: &str = "redis-1-service";

/// A redis server and a UDP echo behind the load balancer, whose flows end soon.
struct Bench {
    stack: Stack,
    stop: Arc<AtomicBool>,
    echo: Option<JoinHandle<()>>,
}

impl Bench {
    fn new() -> Self {
        let environment = vec![("RUST_LOG".to_owned(), "info,ebpf=debug".to_owned())];
        let workloads = vec![Workload::redis(1)];
        let options = StackOptions { workloads, environment, ..StackOptions::default() };
        let mut stack = Stack::start(Lab::new().unwrap(), options).unwrap();
        let echo_address = SocketAddr::new(address::backend4(2).into(), ECHO_PORT);
        let path = stack.config_path("lb");
        let config = std::fs::read_to_string(&path).unwrap()
            + &format!(
                "\n[flows]\ntcp_closing_s = {}\nudp_idle_s = {}\n\
                 [[backends]]\nname = \"echo\"\naddress = \"{echo_address}\"\nsite = \"ams\"\n\
                 [[services]]\nname = \"echo-service\"\naddress = \"{}:{ECHO_PORT}\"\nprotocol = \"udp\"\n\
                 backends = [\"echo\"]\n",
                CLOSING.as_secs(),
                UDP_IDLE.as_secs(),
                address::VIRTUAL4
            );
        std::fs::write(path, config).unwrap();
        stack.restart_daemon().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let socket = stack.lab().site(Site::A).run(|| UdpSocket::bind(echo_address)).unwrap();
        let echo = Some(echo(socket, stop.clone()));
        Self { stack, stop, echo }
    }

    fn redis(&self) -> Redis {
        Redis::connect(&self.stack, self.stack.workloads()[0].service)
    }

    /// `GET /v1/flows` with these parameters.
    fn flows(&self, query: &str) -> Vec<Value> {
        let (status, answer) = self.stack.admin("GET", &format!("/v1/flows?{query}"), None).unwrap();
        assert_eq!(status, 200, "{answer}");
        answer["flows"].as_array().unwrap().clone()
    }

    /// Waits until there are so many flows of these parameters.
    fn wait_flows(&self, query: &str, count: usize, limit: Duration) {
        let mut last = Vec::new();
        let reached = wait_for(limit, || {
            last = self.flows(query);
            (last.len() == count).then_some(())
        });
        assert!(reached.is_some(), "{count} flows of {query} expected: {last:#?}");
    }

    fn metric(&self, line: &str) -> f64 {
        self.find_metric(line).unwrap_or_else(|| panic!("there is no {line}"))
    }

    fn find_metric(&self, line: &str) -> Option<f64> {
        let (_, text) = self.stack.admin("GET", "/metrics", None).unwrap();
        text.as_str().unwrap().lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok())
    }

    /// Our command line, in the load balancer's namespace.
    fn lb(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = self.stack.lab().lb().command(program("lb").unwrap());
        command.args(arguments);
        command
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(echo) = self.echo.take() {
            let _ = echo.join();
        }
    }
}

fn echo(socket: UdpSocket, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut bytes = [0; 64];
        while !stop.load(Relaxed) {
            if let Ok((length, from)) = socket.recv_from(&mut bytes) {
                let _ = socket.send_to(&bytes[..length], from);
            }
        }
    })
}

/// A client's connection to a redis server.
struct Redis(BufReader<TcpStream>);

impl Redis {
    fn connect(stack: &Stack, service: SocketAddr) -> Redis {
        let stream = stack.lab().client().run(|| TcpStream::connect_timeout(&service, LIMIT)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Redis(BufReader::new(stream))
    }

    fn ping(&mut self) {
        self.0.get_mut().write_all(b"PING\r\n").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        assert_eq!(answer, "+PONG\r\n");
    }

    fn address(&self) -> String {
        self.0.get_ref().local_addr().unwrap().to_string()
    }

    /// Ends with a reset instead of a FIN.
    fn reset(self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(self.0.get_ref(), sockopt::Linger, &linger).unwrap();
    }
}

#[test]
fn flows_are_seen_with_their_filters_and_end_in_their_time() {
    let bench = Bench::new();
    let mut connections: Vec<Redis> = (0..3).map(|_| bench.redis()).collect();
    connections.iter_mut().for_each(Redis::ping);
    let client = bench.stack.lab().client();
    let udp = client.run(|| UdpSocket::bind((address::CLIENT4, 0))).unwrap();
    let ask = |socket: &UdpSocket| {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.send_to(b"hello", (address::VIRTUAL4, ECHO_PORT)).unwrap();
        let mut bytes = [0; 64];
        assert_eq!(socket.recv_from(&mut bytes).unwrap().0, 5);
    };
    ask(&udp);

    // What is shown, and what filters leave of it.
    let query = format!("service={SERVICE}");
    let flows = bench.flows(&query);
    assert_eq!(flows.len(), 3, "{flows:#?}");
    for connection in &connections {
        let flow = flows.iter().find(|flow| flow["client"] == connection.address()).unwrap();
        for (field, expected) in [
            ("protocol", "tcp"),
            ("service", SERVICE),
            ("backend", "redis-1"),
            ("location", "ams"),
            ("mode", "nat"),
            ("state", "established"),
        ] {
            assert_eq!(flow[field], expected, "{field}: {flow}");
        }
        assert!(flow["idle_ms"].as_u64().unwrap() < 5000, "{flow}");
    }
    for (query, count) in [
        (String::new(), 4),
        ("protocol=udp".to_owned(), 1),
        ("backend=echo".to_owned(), 1),
        (format!("client={}", address::CLIENT4), 4),
        (format!("client={}/8&backend=redis-1", address::CLIENT4), 3),
        ("client=203.0.113.0/24".to_owned(), 0),
        ("service=echo-service&protocol=tcp".to_owned(), 0),
    ] {
        assert_eq!(bench.flows(&query).len(), count, "{query}");
    }
    let table = bench.lb(&["flows", "--backend", "redis-1"]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert_eq!(table.lines().count(), 4, "{table}");
    assert!(connections.iter().all(|connection| table.contains(&connection.address())), "{table}");

    // A FIN of both ends, and a reset.
    let closed = Instant::now();
    drop(connections.pop());
    connections.pop().unwrap().reset();
    bench.wait_flows(&query, 1, CLOSING + LIMIT);
    assert!(closed.elapsed() >= CLOSING - Duration::from_millis(100), "ended after {:?}", closed.elapsed());
    connections[0].ping();
    // The counts come with the end of the pass that removed the flows.
    for cause in ["closed", "reset"] {
        let line = format!("drover_flows_removed_total{{cause=\"{cause}\"}}");
        let counted = wait_for(LIMIT, || (bench.metric(&line) >= 1.0).then_some(()));
        assert!(counted.is_some(), "{line} does not count");
    }

    // An idle UDP flow ends; the client's next packet makes another one of the same ports.
    bench.wait_flows("protocol=udp", 0, UDP_IDLE + LIMIT);
    ask(&udp);
    assert_eq!(bench.flows("protocol=udp").len(), 1);
    let kept_alive = Instant::now();
    while kept_alive.elapsed() < UDP_IDLE + Duration::from_secs(2) {
        ask(&udp);
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(bench.flows("protocol=udp").len(), 1, "a flow that is used stays");
    connections[0].ping();
}

#[test]
fn nothing_is_left_of_thousands_of_short_connections() {
    const CONNECTIONS: usize = 3000;
    let bench = Bench::new();
    let service = bench.stack.workloads()[0].service;
    bench.stack.lab().client().run(|| {
        for i in 0..CONNECTIONS {
            let stream = TcpStream::connect_timeout(&service, LIMIT).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let mut redis = Redis(BufReader::new(stream));
            redis.ping();
            if i % 3 == 0 {
                redis.reset();
            }
        }
    });
    // The counts of entries are those of the last pass, which may have been before all this, or not at all yet.
    let removed = || -> f64 {
        ["closed", "reset", "idle", "orphan", "backend_gone"]
            .map(|cause| bench.metric(&format!("drover_flows_removed_total{{cause=\"{cause}\"}}")))
            .iter()
            .sum()
    };
    let empty = wait_for(CLOSING + 4 * LIMIT, || {
        let entries = ["established", "newcomers"].map(|standing| {
            bench.find_metric(&format!("drover_flow_entries{{family=\"ipv4\",standing=\"{standing}\"}}"))
        });
        (entries == [Some(0.0), Some(0.0)] && removed() >= CONNECTIONS as f64).then_some(())
    });
    assert!(
        empty.is_some(),
        "{} flows were removed, entries are left: {:#?}",
        removed(),
        bench.flows("limit=5")
    );
    assert_eq!(bench.flows(""), [] as [Value; 0]);
}

/// The interface and the comment of each packet of a capture.
fn comments(capture: &[u8]) -> Vec<(String, String)> {
    let mut reader = PcapNGReader::new(1 << 16, capture).unwrap();
    let (mut interfaces, mut found) = (Vec::new(), Vec::new());
    loop {
        let (used, block) = match reader.next() {
            Ok(next) => next,
            Err(PcapError::Eof) => return found,
            Err(PcapError::Incomplete(_)) => {
                reader.refill().unwrap();
                continue;
            }
            Err(error) => panic!("not pcap-ng: {error:?}"),
        };
        let text = |options: &[pcap_parser::pcapng::PcapNGOption<'_>], code| {
            let option = options.iter().find(|option| option.code == code).unwrap();
            String::from_utf8(option.value()[..usize::from(option.len)].to_vec()).unwrap()
        };
        match block {
            PcapBlockOwned::NG(Block::InterfaceDescription(block)) => {
                interfaces.push(text(&block.options, OptionCode::IfName));
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(block)) => {
                let comment = text(&block.options, OptionCode::Comment);
                found.push((interfaces[block.if_id as usize].clone(), comment));
            }
            _ => {}
        }
        reader.consume(used);
    }
}

#[test]
fn captures_have_the_packets_of_a_connection_and_why() {
    let bench = Bench::new();
    let file = bench.stack.lab().dir().join("lb.pcapng");
    let capture = |more: &[&str]| {
        let file = file.to_str().unwrap().to_owned();
        let arguments = [&["capture", "--write", &file, "--seconds", "20"], more].concat();
        let _ = std::fs::remove_file(&file);
        let child = bench.lb(&arguments).spawn().unwrap();
        // The file is made once the load balancer has agreed.
        assert!(wait_for(LIMIT, || std::fs::metadata(&file).ok().filter(|file| file.len() > 0)).is_some());
        child
    };

    let mut all = capture(&["--count", "12"]);
    let mut redis = bench.redis();
    for _ in 0..10 {
        redis.ping();
    }
    assert!(all.wait().unwrap().success());
    let mut count: BTreeMap<(String, String), u32> = BTreeMap::new();
    for found in comments(&std::fs::read(&file).unwrap()) {
        *count.entry(found).or_default() += 1;
    }
    assert_eq!(count.values().sum::<u32>(), 12);
    for expected in [("c0", "to_backend: sent to the"), ("a0", "to_client: sent back to")] {
        let found = count
            .keys()
            .any(|(interface, comment)| interface == expected.0 && comment.starts_with(expected.1));
        assert!(found, "{expected:?} in {count:?}");
    }

    // Only what was dropped: segments of a connection that nobody knows.
    let mut some = capture(&["--reason", "no_flow", "--count", "1"]);
    redis.ping();
    bench.stack.lab().client().run(|| send_stray_segment(bench.stack.workloads()[0].service));
    assert!(some.wait().unwrap().success());
    let found = comments(&std::fs::read(&file).unwrap());
    assert_eq!(found.len(), 1);
    assert!(found[0].1.starts_with("no_flow: "), "{found:?}");

    // What the kernel program says for debugging, as it was asked to.
    let said = format!("packet refused: reason {}, interface ", lb_core::Reason::NoFlow as u32);
    let log = || std::fs::read_to_string(bench.stack.log_path("lb")).unwrap();
    assert!(wait_for(LIMIT, || log().contains(&said).then_some(())).is_some(), "{said} is not in {}", log());

    let refused = bench.lb(&["capture", "--write", "-", "--reason", "bored"]).output().unwrap();
    let problem = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{problem}");
    assert!(problem.contains("there is no reason \"bored\"; there are"), "{problem}");
    let rates = bench.lb(&["top", "--once", "--interval", "0.2"]).output().unwrap();
    let rates = String::from_utf8(rates.stdout).unwrap();
    assert!(rates.contains(SERVICE) && rates.contains("redis-1  ams"), "{rates}");
}

/// A segment of a connection that never was: an acknowledgement from nowhere.
fn send_stray_segment(to: SocketAddr) {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
    let SocketAddr::V4(to) = to else { panic!("an IPv4 service") };
    let mut segment = Vec::new();
    segment.extend(61_234_u16.to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    let sum = |bytes: &[u8]| -> u32 {
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
    };
    let pseudo = [&address::CLIENT4.octets()[..], &to.ip().octets(), &[0, 6, 0, 20]].concat();
    let mut total = sum(&pseudo) + sum(&segment);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    segment[16..18].copy_from_slice(&(!(total as u16)).to_be_bytes());
    socket.send_to(&segment, &SocketAddr::from((*to.ip(), 0)).into()).unwrap();
}
