//! Health checks of the real daemon: its probes take clients' way, its verdicts move clients' new connections.
//!
//! Servers are threads in the sites' namespaces that greet with their name; what is asserted is whom clients reach,
//! and what the admin API says of it.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::process::Process;
use lab::stack::{Mode, Stack, StackOptions, Tunnels, Workload};
use lab::{Lab, Site, address, http, program, wait_for};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;
/// As in [`CHECK`].
const INTERVAL: Duration = Duration::from_millis(200);
const FALL: u32 = 3;
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(3);
const CHECK: &str = "interval_ms = 200\ntimeout_ms = 150\nrise = 2\nfall = 3\n";

fn config(lab: &Lab, rest: &str) -> String {
    format!(
        "[admin]\nlisten = {:?}\n[datapath]\ninterfaces = [\"c0\", \"a0\", \"b0\"]\npin_path = {:?}\n\
         nat_source4 = {:?}\nnat_source6 = {:?}\n\
         [[sites]]\nname = \"ams\"\nnext_hop = \"10.2.1.1\"\n[[sites]]\nname = \"fra\"\nnext_hop = \"10.2.2.1\"\n{rest}",
        address::ADMIN,
        lab.pin_path(),
        address::NAT_SOURCE4,
        address::NAT_SOURCE6
    )
}

fn backend(name: &str, address: SocketAddr) -> String {
    format!("[[backends]]\nname = {name:?}\naddress = \"{address}\"\nsite = \"ams\"\n")
}

fn service(name: &str, address: SocketAddr, protocol: &str, backends: &[&str], more: &str) -> String {
    format!(
        "[[services]]\nname = {name:?}\naddress = \"{address}\"\nprotocol = {protocol:?}\nbackends = {backends:?}\n{more}\n"
    )
}

fn virtual4(port: u16) -> SocketAddr {
    SocketAddr::new(address::VIRTUAL4.into(), port)
}

fn at4(number: u8) -> SocketAddr {
    SocketAddr::new(address::backend4(number).into(), PORT)
}

/// A daemon in a lab.
struct Bench {
    daemon: Process,
    lab: Lab,
}

impl Bench {
    fn start(rest: &str) -> Bench {
        let lab = Lab::new().unwrap();
        std::fs::write(lab.dir().join("lb.toml"), config(&lab, rest)).unwrap();
        let daemon = spawn(&lab);
        let mut bench = Bench { daemon, lab };
        bench.wait_ready();
        bench
    }

    fn wait_ready(&mut self) {
        let ready = wait_for(LIMIT, || {
            assert!(self.daemon.ended().is_none(), "the daemon ended:\n{}", self.daemon.log_tail(30));
            http::request(self.lab.lb(), address::ADMIN.parse().unwrap(), "GET", "/healthz", "", b"").ok()
        });
        assert!(ready.is_some(), "{}", self.daemon.log_tail(30));
    }

    fn admin(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let server = address::ADMIN.parse().unwrap();
        let answer =
            http::request(self.lab.lb(), server, method, path, "application/json", body.as_bytes()).unwrap();
        assert!(answer.status < 300, "{method} {path}: {}", answer.json());
        answer.json()
    }

    /// The only check of a backend.
    fn check(&self, backend: &str) -> Value {
        self.admin("GET", &format!("/v1/backends/{backend}"), &Value::Null)["checks"][0].clone()
    }

    /// Waits until the backend's check says so; how long that took.
    fn wait_state(&self, backend: &str, state: &str) -> Duration {
        let start = Instant::now();
        let found = wait_for(LIMIT, || (self.check(backend)["state"] == state).then(|| start.elapsed()));
        found.unwrap_or_else(|| {
            panic!("{backend} is not {state}: {:#}\n{}", self.check(backend), self.daemon.log_tail(40))
        })
    }

    /// Whom a new connection reaches.
    fn reach(&self, service: SocketAddr) -> std::io::Result<String> {
        let mut stream =
            self.lab.client().run(|| TcpStream::connect_timeout(&service, Duration::from_secs(2)))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut name = String::new();
        stream.read_to_string(&mut name)?;
        Ok(name)
    }

    /// Whom forty new connections reach.
    fn reached(&self, service: SocketAddr) -> BTreeSet<String> {
        (0..40).map(|_| self.reach(service).unwrap()).collect()
    }

    /// Waits until new connections reach exactly these.
    fn wait_reached(&self, service: SocketAddr, names: &[&str]) {
        let names: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut last = BTreeSet::new();
        let found = wait_for(LIMIT, || {
            last = (0..40).filter_map(|_| self.reach(service).ok()).collect();
            (last == names).then_some(())
        });
        assert!(found.is_some(), "{last:?} instead of {names:?}\n{}", self.daemon.log_tail(40));
    }

    fn reason(&self, label: &str) -> u64 {
        let server = address::ADMIN.parse().unwrap();
        let answer = http::request(self.lab.lb(), server, "GET", "/metrics", "", b"").unwrap();
        let text = String::from_utf8(answer.body).unwrap();
        let line = text.lines().find(|line| line.contains(&format!("reason=\"{label}\""))).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

fn spawn(lab: &Lab) -> Process {
    let mut command = lab.lb().command(program("lb").unwrap());
    command.arg("run").arg("--config").arg(lab.dir().join("lb.toml")).env("RUST_LOG", "info");
    Process::spawn("lb", lab.dir(), command).unwrap()
}

/// A server that greets every connection with its name and closes it.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn greeter(lab: &Lab, address: SocketAddr, name: &'static str) -> Server {
        Server::start(lab, address, move |mut stream, _| {
            // Health checks leave without a word.
            let _ = stream.write_all(name.as_bytes());
        })
    }

    fn start(
        lab: &Lab,
        address: SocketAddr,
        serve: impl Fn(TcpStream, SocketAddr) + Send + 'static,
    ) -> Server {
        let listener = lab.site(Site::A).run(|| TcpListener::bind(address).unwrap());
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopping.load(Relaxed) {
                match listener.accept() {
                    Ok((stream, from)) => {
                        stream.set_nonblocking(false).unwrap();
                        serve(stream, from);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Server { stop, thread: Some(thread) }
    }

    fn kill(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn two_backends(more: &str) -> String {
    backend("one", at4(1))
        + &backend("two", at4(2))
        + &service(
            "chat",
            virtual4(PORT),
            "tcp",
            &["one", "two"],
            &format!("{more}[services.check]\n{CHECK}"),
        )
}

#[test]
fn a_killed_servers_new_connections_go_elsewhere_and_come_back() {
    let bench = Bench::start(&two_backends(""));
    let chat = virtual4(PORT);
    let one = Server::greeter(&bench.lab, at4(1), "one");
    let _two = Server::greeter(&bench.lab, at4(2), "two");
    bench.wait_state("one", "up");
    bench.wait_state("two", "up");
    bench.wait_reached(chat, &["one", "two"]);

    one.kill();
    let after = bench.wait_state("one", "down");
    let allowed = INTERVAL * FALL * 11 / 10 + SLACK;
    assert!(after < allowed, "{after:?}");
    assert_eq!(bench.check("one")["last_error"], "refused");
    bench.wait_reached(chat, &["two"]);
    // From here on, none is refused.
    assert_eq!(bench.reached(chat), ["two".to_owned()].into());
    assert_eq!(bench.check("two")["state"], "up");

    let _one = Server::greeter(&bench.lab, at4(1), "one");
    bench.wait_state("one", "up");
    bench.wait_reached(chat, &["one", "two"]);
}

#[test]
fn a_held_backend_is_not_down() {
    let bench = Bench::start(&two_backends(""));
    let one = Server::greeter(&bench.lab, at4(1), "one");
    let _two = Server::greeter(&bench.lab, at4(2), "two");
    bench.wait_state("one", "up");

    let hold = bench.admin("POST", "/v1/backends/one/hold", &json!({"deadline_ms": 60_000}));
    // As frozen as a server can be: it is not there.
    one.kill();
    let suspended = wait_for(LIMIT, || (bench.check("one")["suspended"] == true).then_some(()));
    assert!(suspended.is_some(), "{:#}", bench.check("one"));
    let probes = bench.check("one")["probes"].clone();
    std::thread::sleep(INTERVAL * (2 * FALL + 4));
    let check = bench.check("one");
    assert_eq!((&check["state"], &check["probes"]), (&json!("up"), &probes), "{check:#}");
    assert!(bench.check("two")["probes"].as_u64() > probes.as_u64());

    let _one = Server::greeter(&bench.lab, at4(1), "one");
    bench.admin("POST", "/v1/backends/one/resume", &json!({"generation": hold["generation"]}));
    let probed = wait_for(LIMIT, || (bench.check("one")["probes"].as_u64() > probes.as_u64()).then_some(()));
    assert!(probed.is_some(), "{:#}", bench.check("one"));
    assert_eq!(
        (&bench.check("one")["state"], &bench.check("one")["suspended"]),
        (&json!("up"), &json!(false))
    );
    assert!(!bench.daemon.log_tail(1000).contains("backend is down"), "{}", bench.daemon.log_tail(1000));
}

#[test]
fn all_backends_down_is_a_policy() {
    let closed = virtual4(PORT + 1);
    let check = format!("[services.check]\n{CHECK}");
    let bench = Bench::start(
        &(two_backends("all_down = \"open\"\n")
            + &backend("three", at4(3))
            + &service("strict", closed, "tcp", &["three"], &format!("all_down = \"closed\"\n{check}"))),
    );
    for name in ["one", "two", "three"] {
        bench.wait_state(name, "down");
    }
    // Open: the connection goes to a backend, whose host says that nobody listens.
    let refused = wait_for(LIMIT, || match bench.reach(virtual4(PORT)) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Some(()),
        _ => None,
    });
    assert!(refused.is_some());
    // Closed: it goes nowhere.
    let dropped = wait_for(LIMIT, || {
        let before = bench.reason("no_backend");
        let reached = bench.reach(closed);
        let timed_out = reached.is_err_and(|error| error.kind() == ErrorKind::TimedOut);
        (timed_out && bench.reason("no_backend") > before).then_some(())
    });
    assert!(dropped.is_some(), "{}", bench.reason("no_backend"));
    let _three = Server::greeter(&bench.lab, at4(3), "three");
    bench.wait_state("three", "up");
    bench.wait_reached(closed, &["three"]);
}

#[test]
fn every_kind_of_check_of_both_families() {
    let six: SocketAddr = (address::backend6(1), PORT).into();
    let game: SocketAddr = (address::backend4(4), PORT).into();
    let web = "[services.check]\ntype = \"http\"\npath = \"/health\"\ninterval_ms = 200\ntimeout_ms = 150\n";
    let udp = "[services.check]\ntype = \"udp\"\nsend = \"ping\"\nexpect = \"pong\"\ninterval_ms = 200\ntimeout_ms = 150\n";
    let bench = Bench::start(
        &(backend("web", at4(1))
            + &backend("six", six)
            + &backend("game", game)
            + &service("web", virtual4(80), "tcp", &["web"], web)
            + &service(
                "six",
                (address::VIRTUAL6, PORT).into(),
                "tcp",
                &["six"],
                &format!("[services.check]\n{CHECK}"),
            )
            + &service("game", virtual4(PORT), "udp", &["game"], udp)),
    );
    let well = Arc::new(AtomicBool::new(false));
    let answers_well = well.clone();
    let _web = Server::start(&bench.lab, at4(1), move |mut stream, _| {
        let mut request = [0; 1024];
        let length = stream.read(&mut request).unwrap_or(0);
        let is_ours = request[..length].starts_with(b"GET /health HTTP/1.1\r\n");
        let status = if is_ours && answers_well.load(Relaxed) { "200 OK" } else { "503 Service Unavailable" };
        let _ = stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes());
    });
    let _six = Server::greeter(&bench.lab, six, "six");
    bench.wait_state("six", "up");
    bench.wait_state("web", "down");
    let error = bench.check("web")["last_error"].as_str().unwrap().to_owned();
    assert!(error.starts_with("status 503 instead of 2"), "{error}");
    well.store(true, Relaxed);
    bench.wait_state("web", "up");

    bench.wait_state("game", "down");
    let socket = bench.lab.site(Site::A).run(|| UdpSocket::bind(game).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let answer = |with: &[u8], until: &str| {
        let mut datagram = [0; 100];
        let found = wait_for(LIMIT, || {
            if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                assert_eq!(&datagram[..length], b"ping");
                // Through the load balancer and back, not to it.
                assert!(!matches!(from.ip(), IpAddr::V4(ip) if ip.is_link_local()), "{from}");
                socket.send_to(with, from).unwrap();
            }
            let check = bench.check("game");
            (check["state"] == until || check["last_error"] == until).then_some(())
        });
        assert!(found.is_some(), "{until}: {:#}", bench.check("game"));
    };
    answer(b"pang", "answered \"pang\"");
    answer(b"pong, and more", "up");
}

#[test]
fn a_transparent_services_check_comes_from_its_own_address_and_back() {
    let check = format!("mode = \"transparent\"\n[services.check]\n{CHECK}");
    let bench =
        Bench::start(&(backend("one", at4(1)) + &service("chat", virtual4(PORT), "tcp", &["one"], &check)));
    let (heard, hears) = std::sync::mpsc::channel();
    let _one = Server::start(&bench.lab, at4(1), move |_, from| {
        let _ = heard.send(from);
    });
    bench.wait_state("one", "up");
    let from = hears.recv_timeout(LIMIT).unwrap();
    assert_eq!(from.ip(), IpAddr::from([169, 254, 77, 1]));
}

/// Probes go through the tunnel to the site where the server runs, and its answers past the load balancer's program.
fn a_dsr_service_is_checked_where_it_runs(server: Workload, tunnels: Tunnels) {
    let server = server.in_mode(Mode::Dsr);
    let (name, service) = (server.name.clone(), server.service);
    let options = StackOptions {
        workloads: vec![server],
        tunnels: Some(tunnels),
        check_interval_ms: Some(200),
        ..StackOptions::default()
    };
    let stack = Stack::start(Lab::new().unwrap(), options).unwrap();
    let check = || {
        let (_, backend) = stack.admin("GET", &format!("/v1/backends/{name}"), None).unwrap();
        backend["checks"][0].clone()
    };
    let probes = || check()["probes"].as_u64().unwrap();
    let becomes = |state: &str| {
        let found = wait_for(LIMIT, || (check()["state"] == state).then_some(()));
        assert!(found.is_some(), "not {state}: {:#}", check());
    };
    becomes("up");
    for to in [Site::B, Site::A] {
        let id = stack.start_migration(&name, to, &Value::Null).unwrap();
        let migration = stack.finished_migration(&id, LIMIT).unwrap();
        assert_eq!(migration["state"], "committed", "{migration:#}");
        let before = (probes(), check()["failures"].clone());
        let probed = wait_for(LIMIT, || (probes() > before.0 + 1).then_some(()));
        assert!(probed.is_some(), "{:#}", check());
        assert_eq!((&check()["state"], &check()["failures"]), (&json!("up"), &before.1), "at {}", to.name());
    }

    let (ip, port) = (service.ip().to_string(), service.port().to_string());
    let mut command = stack.lab().client().command("redis-cli");
    command.args(["-h", &ip, "-p", &port, "SHUTDOWN", "NOSAVE"]).output().unwrap();
    becomes("down");
    assert_eq!(check()["last_error"], "refused");
    let (status, _) =
        stack.agent(Site::A, "POST", &format!("/v1/workloads/{name}/start"), Some(&json!({}))).unwrap();
    assert_eq!(status / 100, 2);
    becomes("up");
}

#[test]
fn a_dsr_service_of_ipv4_is_checked_through_its_tunnel() {
    a_dsr_service_is_checked_where_it_runs(Workload::redis(1), Tunnels::V4);
}

#[test]
fn a_dsr_service_of_ipv6_is_checked_through_its_tunnel() {
    a_dsr_service_is_checked_where_it_runs(Workload::redis6(1), Tunnels::V6);
}

#[test]
fn probes_leave_nothing_behind_when_the_daemon_is_killed() {
    let mut bench = Bench::start(&two_backends(""));
    let _one = Server::greeter(&bench.lab, at4(1), "one");
    let interfaces = |lab: &Lab| {
        let output = Command::new("ip").args(["-n", lab.lb().name(), "-o", "link"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for _ in 0..2 {
        bench.wait_state("one", "up");
        assert!(interfaces(&bench.lab).contains("drover-p"));
        bench.daemon.kill();
        let gone = wait_for(LIMIT, || (!interfaces(&bench.lab).contains("drover-p")).then_some(()));
        assert!(gone.is_some(), "{}", interfaces(&bench.lab));
        bench.daemon = spawn(&bench.lab);
        bench.wait_ready();
    }
}

#[test]
fn what_resets_its_clients_is_down() {
    let check =
        "[services.check]\ntype = \"none\"\nresets_per_s = 5\ninterval_ms = 1000\nfall = 1\nrise = 2\n";
    let bench = Bench::start(
        &(backend("one", at4(1))
            + &backend("two", at4(2))
            + &service("chat", virtual4(PORT), "tcp", &["one", "two"], check)),
    );
    let _two = Server::greeter(&bench.lab, at4(2), "two");
    // Nobody listens at the first: every client that comes there is reset.
    let start = Instant::now();
    while bench.check("one")["state"] != "down" {
        assert!(start.elapsed() < LIMIT, "{:#}", bench.check("one"));
        let _ = bench.reach(virtual4(PORT));
    }
    assert_eq!(bench.check("one")["last_error"], "too many resets");
    bench.wait_reached(virtual4(PORT), &["two"]);
    // Without new clients there are no resets, and it is given another chance.
    bench.wait_state("one", "up");
}
