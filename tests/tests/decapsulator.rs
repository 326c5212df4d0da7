//! The agent's decapsulator in a lab: encapsulated packets reach real TCP and UDP servers that are bound to the virtual
//! address and answer their clients directly.
//!
//! In the load balancer's place stands a thread that puts what a client sends into another packet, by hand: what is
//! tested here is the site's end alone.

#![expect(clippy::unwrap_used, reason = "a test states what it expects by unwrapping")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use lab::process::Process;
use lab::{Lab, Namespace, Site, address, http, program, wait_for};
use lb_core::decapsulate::Encapsulation;
use lb_core::host::{Frame, Outer};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

const PORT: u16 = 7000;
const LIMIT: Duration = Duration::from_secs(10);
/// Enough for segments to be merged on the way.
const LARGE: usize = 1 << 20;

fn inner_is_v4(encapsulation: Encapsulation) -> bool {
    encapsulation != Encapsulation::V6InV6
}

fn service(encapsulation: Encapsulation) -> SocketAddr {
    let ip: IpAddr =
        if inner_is_v4(encapsulation) { address::VIRTUAL4.into() } else { address::VIRTUAL6.into() };
    SocketAddr::new(ip, PORT)
}

fn outer(encapsulation: Encapsulation) -> Outer {
    match encapsulation {
        Encapsulation::V4InV4 => {
            Outer::new(address::lb_at4(Site::A).into(), address::tunnel4(Site::A).into())
        }
        Encapsulation::V6InV6 | Encapsulation::V4InV6 => {
            Outer::new(address::lb_at6(Site::A).into(), address::tunnel6(Site::A).into())
        }
    }
}

fn ip(namespace: &Namespace, args: &str) {
    let output = namespace.command("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {output:?}");
}

/// A packet socket on an interface of the calling thread's namespace, and the interface's hardware address.
fn packet_socket(interface: &str) -> (OwnedFd, [u8; 6]) {
    let found = getifaddrs().unwrap().find_map(|found| {
        (found.interface_name == interface).then_some(*found.address.as_ref()?.as_link_addr()?)
    });
    let link: LinkAddr = found.unwrap();
    let socket =
        socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
    bind(socket.as_raw_fd(), &link).unwrap();
    // To look at its flag now and then.
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50)).unwrap();
    setsockopt(&socket, sockopt::RcvBuf, &(8 << 20)).unwrap();
    (socket, link.addr().unwrap())
}

/// Stands in the load balancer's place: what comes from the client for a virtual address goes to site A in another
/// packet.
struct Encapsulator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Encapsulator {
    fn start(lab: &Lab, encapsulation: Encapsulation) -> Self {
        let (_, to_site) = lab.site(Site::A).run(|| packet_socket("eth0"));
        let ((from_client, _), (towards_site, own)) =
            lab.lb().run(|| (packet_socket("c0"), packet_socket("a0")));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while !stopped.load(Relaxed) {
                let Ok(length) = recv(from_client.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
                    continue;
                };
                let frame = &buffer[..length];
                if destination(frame) != Some(service(encapsulation).ip()) {
                    continue;
                }
                let link = [&to_site[..], &own, &frame[12..14]].concat();
                let inner = Frame([&link, &frame[14..]].concat());
                let sent = outer(encapsulation).encapsulate(&inner);
                assert_eq!(
                    send(towards_site.as_raw_fd(), &sent.0, MsgFlags::empty()),
                    Ok(sent.0.len()),
                    "{} bytes",
                    sent.0.len()
                );
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Encapsulator {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn destination(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [8, 0] => Some(Ipv4Addr::from(*frame.get(30..)?.first_chunk()?).into()),
        [0x86, 0xdd] => Some(Ipv6Addr::from(*frame.get(38..)?.first_chunk()?).into()),
        _ => None,
    }
}

/// Echoes over TCP and UDP at the service's address in site A, for as long as the lab is there.
fn serve(lab: &Lab, service: SocketAddr) {
    let (listener, udp) =
        lab.site(Site::A).run(|| (TcpListener::bind(service).unwrap(), UdpSocket::bind(service).unwrap()));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = &stream;
                let _ = std::io::copy(&mut reader, &mut &stream);
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(&buffer[..length], from);
        }
    });
}

/// A lab whose site A has an agent, and no daemon.
struct Bench {
    agent: Option<Process>,
    hook: &'static str,
    lab: Lab,
}

impl Bench {
    fn new(hook: &'static str) -> Self {
        let lab = Lab::new().unwrap();
        lab.hold_virtual_addresses().unwrap();
        // Only the packet socket is to see what comes for the virtual addresses: the stack would answer with resets.
        let rules = format!(
            "table inet quiet {{\nchain in {{\ntype filter hook prerouting priority -400;\niif c0 ip daddr {} drop\n\
             iif c0 ip6 daddr {} meta l4proto != icmpv6 drop\n}}\n}}",
            address::VIRTUAL4,
            address::VIRTUAL6
        );
        let output = lab.lb().command("nft").arg(rules).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self { agent: None, hook, lab }
    }

    fn config(&self, more: &str) -> String {
        let workload = |name: &str, ip: IpAddr, protocol: &str| {
            format!(
                "[[workloads]]\nname = \"{name}\"\naddress = \"{}\"\nprotocol = \"{protocol}\"\ncommand = [\"true\"]\n",
                SocketAddr::new(ip, PORT)
            )
        };
        format!(
            "site = \"ams\"\nlisten = \"{}:{}\"\ninsecure = true\nstate_dir = {:?}\n{more}{}{}",
            address::site4(Site::A),
            address::AGENT_PORT,
            self.lab.dir().join("agent"),
            workload("four", address::VIRTUAL4.into(), "tcp"),
            workload("six", address::VIRTUAL6.into(), "udp")
        )
    }

    fn section(&self) -> String {
        format!(
            "[decapsulator]\ninterfaces = [\"eth0\"]\nhook = {:?}\nendpoints = [\"{}\", \"{}\"]\nfrom = [\"{}\", \
             \"{}/64\"]\npin_path = {:?}\n",
            self.hook,
            address::tunnel4(Site::A),
            address::tunnel6(Site::A),
            address::lb_at4(Site::A),
            "fd00:2:1::",
            self.lab.pin_path().join("ams")
        )
    }

    /// Starts the agent, after killing the one that runs.
    fn start_agent(&mut self, config: &str) {
        self.agent = None;
        let path = self.lab.dir().join("agent.toml");
        std::fs::write(&path, config).unwrap();
        let mut command = self.lab.site(Site::A).command(program("migrate").unwrap());
        command.args(["agent", "--config"]).arg(&path);
        let mut agent = Process::spawn("agent", self.lab.dir(), command).unwrap();
        let ready = wait_for(LIMIT, || self.ask("/healthz").filter(|(status, _)| *status == 200));
        assert!(ready.is_some(), "{}", agent.not_ready("does not answer"));
        self.agent = Some(agent);
    }

    fn ask(&self, path: &str) -> Option<(u16, Value)> {
        let server = SocketAddr::from((address::site4(Site::A), address::AGENT_PORT));
        let answer = http::request(self.lab.site(Site::A), server, "GET", path, "application/json", &[]);
        answer.ok().map(|response| (response.status, response.json()))
    }

    fn status(&self) -> Value {
        let (status, answer) = self.ask("/v1/decapsulator").unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    fn udp(&self, service: SocketAddr) -> UdpSocket {
        let any: IpAddr =
            if service.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = self.lab.client().run(|| UdpSocket::bind((any, 0)).unwrap());
        socket.connect(service).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket
    }
}

/// Has the kernel wait for more of a connection's segments before it hands them on as one, as a busy network card does.
fn merge_segments(site: &Namespace) {
    // What /sys shows of interfaces are those of the namespace that it was mounted in.
    let script = "mount -t sysfs none /sys && echo 300000 > /sys/class/net/eth0/gro_flush_timeout";
    let output = site.command("unshare").args(["--mount", "sh", "-ec", script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn echoes_udp(socket: &UdpSocket, text: &[u8]) {
    socket.send(text).unwrap();
    let mut answer = [0; 2048];
    let length = socket.recv(&mut answer).unwrap();
    assert_eq!(&answer[..length], text);
}

/// Sends much over TCP and has it back.
fn echoes_tcp(bench: &Bench, service: SocketAddr) {
    let stream = bench.lab.client().run(|| TcpStream::connect_timeout(&service, LIMIT)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let sent: Vec<u8> = (0..LARGE).map(|i| ((i * i) >> 7) as u8).collect();
    let mut received = vec![0; LARGE];
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&sent).unwrap());
        (&stream).read_exact(&mut received).unwrap();
    });
    assert!(sent == received, "not what was sent");
}

fn each_encapsulation_reaches_its_server(hook: &'static str, attached: &[&str], merged: bool) {
    let mut bench = Bench::new(hook);
    if merged {
        merge_segments(bench.lab.site(Site::A));
    }
    serve(&bench.lab, service(Encapsulation::V4InV4));
    serve(&bench.lab, service(Encapsulation::V6InV6));
    bench.start_agent(&bench.config(&bench.section()));
    let status = bench.status();
    let found = status["hooks"][0]["hook"].as_str().unwrap();
    assert!(attached.contains(&found), "{status}");
    for (encapsulation, label) in Encapsulation::ALL.into_iter().zip(["v4_in_v4", "v6_in_v6", "v4_in_v6"]) {
        let _encapsulator = Encapsulator::start(&bench.lab, encapsulation);
        let service = service(encapsulation);
        let counted = || bench.status()["packets"][label].as_u64().unwrap();
        let before = counted();
        let udp = bench.udp(service);
        echoes_udp(&udp, b"small");
        echoes_udp(&udp, &[7; 1400]);
        assert!(counted() >= before + 2);
        let before = counted();
        echoes_tcp(&bench, service);
        let segments = LARGE as u64 / 1448;
        let arrived = counted() - before;
        assert!(if merged { arrived < segments / 2 } else { arrived >= segments }, "{arrived} of {segments}");
        let packets = bench.status()["packets"].clone();
        for dropped in ["refused", "malformed", "bad_checksum", "congested", "truncated"] {
            assert_eq!(packets[dropped], 0, "{label}: {packets}");
        }
    }
}

#[test]
fn each_encapsulation_reaches_its_server_through_tc() {
    each_encapsulation_reaches_its_server("auto", &["tcx", "tc filter"], false);
}

#[test]
fn each_encapsulation_reaches_its_server_in_merged_segments() {
    each_encapsulation_reaches_its_server("tc", &["tcx", "tc filter"], true);
}

#[test]
fn each_encapsulation_reaches_its_server_through_xdp() {
    each_encapsulation_reaches_its_server("xdp", &["xdp native"], false);
}

#[test]
fn a_killed_agent_is_not_missed_and_the_next_one_takes_over() {
    for hook in ["tc", "xdp"] {
        let mut bench = Bench::new(hook);
        let service = service(Encapsulation::V4InV4);
        serve(&bench.lab, service);
        let config = bench.config(&bench.section());
        bench.start_agent(&config);
        let _encapsulator = Encapsulator::start(&bench.lab, Encapsulation::V4InV4);
        let udp = bench.udp(service);
        echoes_udp(&udp, b"with an agent");
        bench.agent = None;
        assert_eq!(bench.ask("/healthz"), None);
        echoes_udp(&udp, b"without one");
        echoes_tcp(&bench, service);

        // Every datagram has its answer while agents come and go.
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let pinging = scope.spawn(|| {
                let mut pings = 0_u32;
                while !stop.load(Relaxed) {
                    echoes_udp(&udp, &pings.to_be_bytes());
                    pings += 1;
                }
                pings
            });
            for _ in 0..3 {
                bench.start_agent(&config);
            }
            stop.store(true, Relaxed);
            assert!(pinging.join().unwrap() > 100);
        });

        // The next agent is told to do without.
        bench.start_agent(&bench.config(""));
        assert_eq!(bench.ask("/v1/decapsulator").unwrap().0, 404);
        assert!(!bench.lab.pin_path().join("ams").exists());
        udp.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        // The kernel takes a program off its hook some time after its last pin has gone.
        let silent = wait_for(Duration::from_secs(5), || {
            udp.send(b"nobody takes it out").unwrap();
            udp.recv(&mut [0; 9]).is_err().then_some(())
        });
        assert!(silent.is_some(), "still decapsulated");
    }
}

#[test]
fn another_hook_takes_over_from_the_first() {
    let mut bench = Bench::new("xdp");
    let service = service(Encapsulation::V4InV6);
    serve(&bench.lab, service);
    let _encapsulator = Encapsulator::start(&bench.lab, Encapsulation::V4InV6);
    let udp = bench.udp(service);
    for (hook, attached) in
        [("xdp", "link-eth0-native"), ("tc", "link-eth0-tcx"), ("xdp", "link-eth0-native")]
    {
        bench.hook = hook;
        bench.start_agent(&bench.config(&bench.section()));
        echoes_udp(&udp, hook.as_bytes());
        let listing = std::fs::read_dir(bench.lab.pin_path().join("ams")).unwrap();
        let names = listing.flatten().map(|entry| entry.file_name().into_string().unwrap());
        let links: Vec<_> = names.filter(|name| name.starts_with("link-")).collect();
        assert_eq!(links, [attached]);
    }
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    let bench = Bench::new("auto");
    for (interface, problem) in [("eth7", "is not there"), ("lo", "no Ethernet")] {
        let section = bench.section().replace("eth0", interface);
        let path = bench.lab.dir().join("agent.toml");
        std::fs::write(&path, bench.config(&section)).unwrap();
        let output = bench
            .lab
            .site(Site::A)
            .command(program("migrate").unwrap())
            .args(["agent", "--config"])
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(problem) && said.contains(interface), "{said}");
    }
    ip(bench.lab.site(Site::A), "link show eth0");
}
