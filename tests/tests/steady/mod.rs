//! A daemon in a lab under a steady load: numbered datagrams, requests over connections that stay, and connections
//! that come and go, of both families. What is lost, answered twice, reset or moved to another port is seen.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::http::Response;
use lab::process::Process;
use lab::{Lab, Site, address, http, program, wait_for};
use nix::sys::socket::{setsockopt, sockopt};

pub const LIMIT: Duration = Duration::from_secs(20);
/// Of the services under load and of their backends.
pub const PORT: u16 = 7000;
/// Between two messages of one client.
const PAUSE: Duration = Duration::from_millis(2);
/// Between two connections that come and go.
const NEXT_CONNECTION: Duration = Duration::from_millis(10);
/// A number, whom the server saw (address and port), and which server it was.
const ANSWER: usize = 8 + 16 + 2 + 1;

/// The servers under load: `four` and `six` at `ams`, each for a TCP and a UDP service. There are servers at the next
/// address too, 10.1.0.2 and fd00:1::2, which may be added.
pub const UNDER_LOAD: &str = "\
[[backends]]\nname = \"four\"\naddress = \"10.1.0.1:7000\"\nsite = \"ams\"\n\
[[backends]]\nname = \"six\"\naddress = \"[fd00:1::1]:7000\"\nsite = \"ams\"\n\
[[services]]\nname = \"tcp4\"\naddress = \"10.0.0.100:7000\"\nprotocol = \"tcp\"\nbackends = [\"four\"]\n\
[[services]]\nname = \"udp4\"\naddress = \"10.0.0.100:7000\"\nprotocol = \"udp\"\nbackends = [\"four\"]\n\
[[services]]\nname = \"tcp6\"\naddress = \"[fd00::100]:7000\"\nprotocol = \"tcp\"\nbackends = [\"six\"]\n\
[[services]]\nname = \"udp6\"\naddress = \"[fd00::100]:7000\"\nprotocol = \"udp\"\nbackends = [\"six\"]\n";

/// A daemon in a lab.
pub struct Bench {
    pub daemon: Process,
    pub lab: Lab,
}

impl Bench {
    /// Starts a daemon with this hook, and `rest` after the sections that all have.
    pub fn start(hook: &str, rest: &str) -> Bench {
        let lab = Lab::new().unwrap();
        configure(&lab, hook, rest);
        let daemon = spawn(&lab);
        let mut bench = Bench { daemon, lab };
        bench.wait_ready();
        bench
    }

    /// Writes another configuration.
    pub fn configure(&self, hook: &str, rest: &str) {
        configure(&self.lab, hook, rest);
    }

    pub fn wait_ready(&mut self) {
        let ready = wait_for(LIMIT, || {
            assert!(self.daemon.ended().is_none(), "the daemon ended:\n{}", self.daemon.log_tail(30));
            http::request(self.lab.lb(), address::ADMIN.parse().unwrap(), "GET", "/healthz", "", b"").ok()
        });
        assert!(ready.is_some(), "{}", self.daemon.log_tail(30));
    }

    /// Asks the admin API.
    pub fn admin(&self, method: &str, path: &str, body: &str) -> Response {
        let server = address::ADMIN.parse().unwrap();
        http::request(self.lab.lb(), server, method, path, "application/json", body.as_bytes()).unwrap()
    }
}

fn configure(lab: &Lab, hook: &str, rest: &str) {
    let text = format!(
        "[admin]\nlisten = {:?}\n[datapath]\ninterfaces = [\"c0\", \"a0\", \"b0\"]\nhook = {hook:?}\npin_path = {:?}\n\
         nat_source4 = {:?}\nnat_source6 = {:?}\n\
         [[sites]]\nname = \"ams\"\nnext_hop = \"10.2.1.1\"\n[[sites]]\nname = \"fra\"\nnext_hop = \"10.2.2.1\"\n{rest}",
        address::ADMIN,
        lab.pin_path(),
        address::NAT_SOURCE4,
        address::NAT_SOURCE6
    );
    std::fs::write(lab.dir().join("lb.toml"), text).unwrap();
}

/// Starts a daemon with the lab's configuration.
pub fn spawn(lab: &Lab) -> Process {
    let mut command = lab.lb().command(program("lb").unwrap());
    command.env("RUST_LOG", "info").args(["run", "--config"]).arg(lab.dir().join("lb.toml"));
    Process::spawn("lb", lab.dir(), command).unwrap()
}

/// Clients and servers at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    /// Connections that came and went, by the server that they reached.
    reached: Arc<[AtomicU64; 3]>,
    clients: Vec<JoinHandle<u64>>,
}

impl Load {
    /// Starts servers at `ams` and clients of each kind, over both families.
    pub fn start(lab: &Lab) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let reached = Arc::<[AtomicU64; 3]>::default();
        let mut clients: Vec<JoinHandle<u64>> = Vec::new();
        for v6 in [false, true] {
            let service: IpAddr = if v6 { address::VIRTUAL6.into() } else { address::VIRTUAL4.into() };
            let service = SocketAddr::new(service, PORT);
            for number in [1, 2] {
                let own: IpAddr =
                    if v6 { address::backend6(number).into() } else { address::backend4(number).into() };
                serve(lab, SocketAddr::new(own, PORT), number);
            }
            for _ in 0..2 {
                let (socket, stream) = (udp(lab, service), connect(lab, service));
                let (stopping, stopping_too) = (stop.clone(), stop.clone());
                clients.push(std::thread::spawn(move || send(&socket, &stopping)));
                clients.push(std::thread::spawn(move || ask(stream, &stopping_too)));
            }
            let (client, stopping, reached) = (lab.client().clone(), stop.clone(), reached.clone());
            clients.push(std::thread::spawn(move || {
                // The thread opens sockets and nothing else.
                client.enter().unwrap();
                come_and_go(service, &stopping, &reached)
            }));
        }
        Load { stop, reached, clients }
    }

    /// Connections that came and went so far, and reached the first or the second servers.
    pub fn reached(&self) -> [u64; 2] {
        [1, 2].map(|name| self.reached[name].load(Relaxed))
    }

    /// Stops, and makes sure that each message was answered once, on every client's one flow.
    pub fn must_be_whole(self) {
        self.stop.store(true, Relaxed);
        for client in self.clients {
            let answered = client.join().expect("a client lost nothing");
            assert!(answered > 20, "a client came to {answered} answers only");
        }
    }
}

fn connect(lab: &Lab, service: SocketAddr) -> TcpStream {
    lab.client().run(|| TcpStream::connect_timeout(&service, LIMIT)).unwrap()
}

fn udp(lab: &Lab, service: SocketAddr) -> UdpSocket {
    let any: IpAddr =
        if service.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = lab.client().run(|| UdpSocket::bind((any, 0))).unwrap();
    socket.connect(service).unwrap();
    // Room enough: what is counted is what the load balancer loses.
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    socket.set_read_timeout(Some(PAUSE)).unwrap();
    socket
}

/// Answers datagrams and requests with their number and whom they seem to come from.
fn serve(lab: &Lab, own: SocketAddr, name: u8) {
    let (socket, listener) =
        lab.site(Site::A).run(|| (UdpSocket::bind(own).unwrap(), TcpListener::bind(own).unwrap()));
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    std::thread::spawn(move || {
        let mut number = [0; 8];
        loop {
            let (_, from) = socket.recv_from(&mut number).unwrap();
            let _ = socket.send_to(&answer(number, from, name), from);
        }
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap();
                let mut number = [0; 8];
                while stream.read_exact(&mut number).is_ok()
                    && stream.write_all(&answer(number, peer, name)).is_ok()
                {}
            });
        }
    });
}

fn answer(number: [u8; 8], peer: SocketAddr, name: u8) -> [u8; ANSWER] {
    let mut answer = [0; ANSWER];
    let ip = match peer.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    answer[..8].copy_from_slice(&number);
    answer[8..24].copy_from_slice(&ip.octets());
    answer[24..26].copy_from_slice(&peer.port().to_be_bytes());
    answer[26] = name;
    answer
}

/// Which server answers and what it sees the client as: never another one.
#[derive(Default)]
struct Seen(Option<Vec<u8>>);

impl Seen {
    fn check(&mut self, answer: &[u8; ANSWER]) {
        let first = self.0.get_or_insert_with(|| answer[8..].to_vec());
        assert_eq!(&answer[8..], first, "another server, or the client at another address or port");
    }
}

/// Sends numbered datagrams whether or not the former ones have been answered.
fn send(socket: &UdpSocket, stop: &AtomicBool) -> u64 {
    let (mut sent, mut open, mut seen) = (0_u64, BTreeSet::new(), Seen::default());
    let mut take = |open: &mut BTreeSet<u64>| {
        let mut answer = [0; ANSWER];
        let Ok(ANSWER) = socket.recv(&mut answer) else { return };
        let number = u64::from_be_bytes(answer[..8].try_into().unwrap());
        assert!(open.remove(&number), "datagram {number} was answered twice");
        seen.check(&answer);
    };
    while !stop.load(Relaxed) {
        socket.send(&sent.to_be_bytes()).unwrap();
        open.insert(sent);
        sent += 1;
        let next = Instant::now() + PAUSE;
        while Instant::now() < next {
            take(&mut open);
        }
    }
    let end = Instant::now() + LIMIT / 4;
    while !open.is_empty() && Instant::now() < end {
        take(&mut open);
    }
    assert!(open.is_empty(), "{} of {sent} datagrams were not answered: {open:?}", open.len());
    sent
}

/// Asks over a connection and waits for each answer.
fn ask(mut stream: TcpStream, stop: &AtomicBool) -> u64 {
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (mut number, mut seen) = (0_u64, Seen::default());
    while !stop.load(Relaxed) {
        seen.check(&exchange(&mut stream, number));
        number += 1;
        std::thread::sleep(PAUSE);
    }
    number
}

/// Opens a connection, asks once, closes it.
fn come_and_go(service: SocketAddr, stop: &AtomicBool, reached: &[AtomicU64; 3]) -> u64 {
    let mut number = 0_u64;
    while !stop.load(Relaxed) {
        let mut stream = TcpStream::connect_timeout(&service, LIMIT)
            .unwrap_or_else(|error| panic!("connection {number}: {error}"));
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let answer = exchange(&mut stream, number);
        reached[usize::from(answer[26])].fetch_add(1, Relaxed);
        number += 1;
        std::thread::sleep(NEXT_CONNECTION);
    }
    number
}

fn exchange(stream: &mut TcpStream, number: u64) -> [u8; ANSWER] {
    let mut answer = [0; ANSWER];
    let exchanged = stream.write_all(&number.to_be_bytes()).and_then(|()| stream.read_exact(&mut answer));
    exchanged.unwrap_or_else(|error| panic!("request {number}: {error}"));
    assert_eq!(answer[..8], number.to_be_bytes());
    answer
}
