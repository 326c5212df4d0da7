//! A SYN flood from made-up addresses, as fast as a sender can, through the real daemon: established connections go on
//! without a loss, real newcomers get in, and the server sees no more of the flood than the bounds admit.
//!
//! What the flood does to response times is printed, not asserted: the sender shares the machine with everybody else.
//! So it is printed beside what the same sender does to them when none of its packets gets anywhere.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping, in its helpers too")]

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::maps::MapData;
use lab::stack::{Stack, StackOptions, Workload};
use lab::{Lab, Namespace};
use lb::datapath::xdp::settings::SettingsTable;
use lb::datapath::xdp::ticks::TickClock;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, SockaddrIn, sendmmsg, socket,
};

const LIMIT: Duration = Duration::from_secs(5);
const FLOOD: Duration = Duration::from_secs(3);
const CONNECTIONS: usize = 8;
/// Networks that the flood says to come from.
const PREFIXES: u8 = 16;
/// New flows that each of them is admitted in a second.
const PER_PREFIX: u32 = 50;
const PER_CPU: u32 = 200_000;
/// Where nothing ever arrives.
const NOWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 80);

/// A connection to a redis server that asks and waits for the answer, again and again.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(service: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&service, LIMIT).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(BufReader::new(stream))
    }

    /// How long an answer took.
    fn ask(&mut self) -> Duration {
        let started = Instant::now();
        self.0.get_mut().write_all(b"PING\r\n").expect("the connection lives");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("nothing is lost for good");
        assert_eq!(answer, "+PONG\r\n");
        started.elapsed()
    }
}

/// SYNs of one batch, complete with IP headers, which a raw socket sends as they are.
fn segments(service: SocketAddrV4, batch: u32) -> Vec<Vec<u8>> {
    (0..64_u32)
        .map(|i| {
            let number = batch.wrapping_mul(64).wrapping_add(i).wrapping_mul(0x9e37_79b9);
            let [a, b, c, d] = number.to_be_bytes();
            let source = Ipv4Addr::new(10, 66, a % PREFIXES, b);
            let mut segment = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
            segment.extend(source.octets());
            segment.extend(service.ip().octets());
            segment.extend([c | 4, d]);
            segment.extend(service.port().to_be_bytes());
            segment.extend(number.to_be_bytes());
            segment.extend([0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
            let mut sum: u32 = 6 + 20;
            sum += segment[12..]
                .chunks(2)
                .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
                .sum::<u32>();
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            segment[36..38].copy_from_slice(&sum.to_be_bytes());
            segment
        })
        .collect()
}

/// Sends SYNs until told to stop; how many were sent.
fn flood(from: &Namespace, service: SocketAddrV4, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    let socket = from
        .run(|| socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw))
        .unwrap();
    std::thread::spawn(move || {
        use std::os::fd::AsRawFd as _;
        let address = Some(SockaddrIn::from(service));
        let mut headers = MultiHeaders::preallocate(64, None);
        let (mut sent, mut batch) = (0, 0);
        while !stop.load(Relaxed) {
            let segments = segments(service, batch);
            batch += 1;
            let slices: Vec<[IoSlice<'_>; 1]> = segments.iter().map(|bytes| [IoSlice::new(bytes)]).collect();
            // A full queue refuses some, which is as good as sending them.
            if let Ok(results) =
                sendmmsg(socket.as_raw_fd(), &mut headers, &slices, vec![address; 64], [], MsgFlags::empty())
            {
                sent += results.count() as u64;
            }
        }
        sent
    })
}

/// Connections that ask as fast as they are answered, until told to stop: how long each answer took.
fn askers(from: &Namespace, service: SocketAddr, stop: &Arc<AtomicBool>) -> Vec<JoinHandle<Vec<Duration>>> {
    let start = |_| {
        let (mut client, stop) = (from.run(|| Client::connect(service)), stop.clone());
        client.ask();
        std::thread::spawn(move || {
            let mut times = Vec::new();
            while !stop.load(Relaxed) {
                times.push(client.ask());
            }
            // Still there after the flood.
            client.ask();
            times
        })
    };
    (0..CONNECTIONS).map(start).collect()
}

/// How long answers took in a third of the flood's time.
fn asked_meanwhile(from: &Namespace, service: SocketAddr, at_end: impl FnOnce()) -> Vec<Duration> {
    let stop = Arc::new(AtomicBool::new(false));
    let asking = askers(from, service, &stop);
    std::thread::sleep(FLOOD / 3);
    stop.store(true, Relaxed);
    at_end();
    answered(asking)
}

fn answered(askers: Vec<JoinHandle<Vec<Duration>>>) -> Vec<Duration> {
    let mut times: Vec<_> = askers
        .into_iter()
        .flat_map(|asker| {
            let times = asker.join().expect("no established connection loses anything");
            assert!(!times.is_empty(), "each connection was answered during that time");
            times
        })
        .collect();
    times.sort();
    times
}

/// Sum of a metric's samples whose line holds a text.
fn metric(stack: &Stack, name: &str, with: &str) -> u64 {
    let answer = stack.admin_raw("GET", "/metrics", "text/plain", &[]).unwrap();
    let text = String::from_utf8(answer.body).unwrap();
    let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(with));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_flood_of_made_up_clients_leaves_established_connections_alone() {
    let options = StackOptions { workloads: vec![Workload::redis(1)], ..StackOptions::default() };
    let stack = Stack::start(Lab::new().unwrap(), options).unwrap();
    let service = stack.workloads()[0].service;
    let SocketAddr::V4(service4) = service else { panic!("the workload has an IPv4 service") };
    let settings = MapData::from_pin(stack.lab().pin_path().join("maps/SETTINGS")).unwrap();
    let second = Duration::from_secs(1).div_duration_f64(TickClock::new().unwrap().tick()) as u32;
    SettingsTable::new(&settings).unwrap().set_bounds(second, PER_CPU, PER_PREFIX);
    let client = stack.lab().client();

    let quiet = asked_meanwhile(client, service, || ());
    let route = ["route", "add", "blackhole", &NOWHERE.ip().to_string()];
    assert!(client.command("ip").args(route).status().unwrap().success());
    let stop = Arc::new(AtomicBool::new(false));
    let idle_sender = flood(client, NOWHERE, stop.clone());
    let crowded = asked_meanwhile(client, service, || stop.store(true, Relaxed));
    assert_eq!(idle_sender.join().unwrap(), 0, "its packets get nowhere");

    let stop = Arc::new(AtomicBool::new(false));
    let flooded = askers(client, service, &stop);
    let (opened, refused) = ("drover_member_flows_opened_total", "reason=\"new_flow_limit\"");
    let before = (metric(&stack, opened, ""), metric(&stack, "drover_packets_total", refused));
    let started = Instant::now();
    let sender = flood(client, service4, stop.clone());
    let mut newcomers = 0;
    while started.elapsed() < FLOOD {
        client.run(|| Client::connect(service)).ask();
        newcomers += 1;
        std::thread::sleep(Duration::from_millis(100));
    }
    stop.store(true, Relaxed);
    let sent = sender.join().unwrap();
    let seconds = started.elapsed().as_secs_f64();
    let flooded = answered(flooded);

    assert!(newcomers > 1, "real clients get in meanwhile");
    let admitted = metric(&stack, opened, "") - before.0;
    let refused = metric(&stack, "drover_packets_total", refused) - before.1;
    // Windows that were begun and not finished, and two processors that took the same one (see `admit::take`).
    let most = 2.0 * f64::from(PER_PREFIX) * f64::from(PREFIXES) * (seconds + 2.0);
    assert!((admitted as f64) < most + f64::from(newcomers), "{admitted} admitted in {seconds:.1} s");
    assert!(sent > 10 * u64::from(PER_PREFIX) * u64::from(PREFIXES), "{sent} SYNs are no flood");
    assert!(refused > sent / 4, "{refused} of {sent} refused");
    let percentile = |times: &[Duration]| times[times.len() * 99 / 100];
    println!(
        "{:.0} SYNs/s, {admitted} admitted, {refused} refused; answers' p99 {:?}, {:?} while the sender's packets get \
         nowhere, {:?} without it",
        sent as f64 / seconds,
        percentile(&flooded),
        percentile(&crowded),
        percentile(&quiet),
    );
}
