//! A small lab: client - router - two sites, an agent at each, and a cutover that only changes a route.
//!
//! The real load balancer holds packets; this one drops them (TCP sends them again), which is enough to see
//! that connections survive and what a freeze takes.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod outcome;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migrate::coordinator::{
    AgentAt, Cutover, CutoverError, DEFAULT_DRAIN, Decision, HoldRequest, Orders, Policy, Progress, Protocol,
    Report, Spec,
};
use migrate::tls::pki::{self, Validity};
use migrate::tls::{Credentials, Files, Identity};
use nix::sched::{CloneFlags, setns};
use tokio::sync::mpsc;

pub const DEADLINE: Duration = Duration::from_secs(5);
pub const BACKEND: &str = "chat-1";

static LABS: AtomicU32 = AtomicU32::new(0);

/// True if the test can run; says why not otherwise.
pub fn possible() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: network namespaces and CRIU need root");
    }
    root
}

pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The example `counter`, which `cargo test` builds too unless it is asked for one test file only.
pub fn counter() -> PathBuf {
    static BUILD: std::sync::Once = std::sync::Once::new();
    let counter = Path::new(env!("CARGO_BIN_EXE_migrate")).with_file_name("examples").join("counter");
    BUILD.call_once(|| {
        // Also where it exists: it may be older than its source.
        let mut args = vec!["build", "--quiet", "--package", "migrate", "--example", "counter"];
        if !cfg!(debug_assertions) {
            args.push("--release");
        }
        run(env!("CARGO"), &args);
    });
    counter
}

fn ip(args: &str) {
    run("ip", &args.split_whitespace().collect::<Vec<_>>());
}

fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

pub struct Lab {
    tag: String,
    pub dir: PathBuf,
    pub address: SocketAddr,
    /// The coordinator's, and each site's.
    pub certificates: (Files, [Files; 2]),
    agents: Mutex<[Option<Child>; 2]>,
    options: Options,
}

#[derive(Clone, Default)]
pub struct Options {
    /// Further arguments of the counter, or a whole command.
    pub arguments: Vec<String>,
    pub command: Option<Vec<String>>,
    /// A folder that is empty at site b.
    pub hide_at_b: Option<PathBuf>,
    /// At site b, the second file is where the first one is.
    pub other_at_b: Option<(PathBuf, PathBuf)>,
    /// Further lines of site b's configuration.
    pub config_at_b: String,
    /// Further lines of the workload's configuration, at each site.
    pub workload: [String; 2],
    pub ipv6: bool,
    /// The agents' CRIU, if not the default.
    pub criu: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    A,
    B,
}

impl At {
    pub fn name(self) -> &'static str {
        ["a", "b"][self as usize]
    }

    pub fn other(self) -> Self {
        if self == Self::A { Self::B } else { Self::A }
    }

    fn host(self) -> SocketAddr {
        ([10, 2, self as u8 + 1, 1], 7401).into()
    }
}

impl Lab {
    pub fn new(options: Options) -> Self {
        let tag = format!("migrate{}x{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from(format!("/dev/shm/{tag}"));
        std::fs::create_dir(&dir).unwrap();
        let address = if options.ipv6 { "[fd00:1::1]:7000" } else { "10.1.0.1:7000" };
        let certificates = certify(&dir.join("pki"));
        let (address, agents) = (address.parse().unwrap(), Mutex::new([None, None]));
        let lab = Self { tag, dir, address, certificates, agents, options };
        lab.build();
        for at in [At::A, At::B] {
            lab.start_agent(at);
        }
        lab
    }

    fn ns(&self, name: &str) -> String {
        format!("{}{name}", self.tag)
    }

    fn build(&self) {
        let ns = |name| self.ns(name);
        for name in ["c", "r", "a", "b"] {
            ip(&format!("netns add {}", ns(name)));
            ip(&format!("-n {} link set lo up", ns(name)));
        }
        for (name, subnet) in [("c", "10.0.0"), ("a", "10.2.1"), ("b", "10.2.2")] {
            ip(&format!("link add {name}0 netns {} type veth peer name eth0 netns {}", ns("r"), ns(name)));
            let six = subnet.replacen("10.", "fd00:", 1).replace('.', ":");
            for (ns, device, host) in [(ns("r"), format!("{name}0"), 254), (ns(name), "eth0".into(), 1)] {
                ip(&format!("-n {ns} address add {subnet}.{host}/24 dev {device}"));
                ip(&format!("-n {ns} -6 address add {six}::{host:x}/64 dev {device} nodad"));
                ip(&format!("-n {ns} link set {device} up"));
            }
            ip(&format!("-n {} route add default via {subnet}.254", ns(name)));
            ip(&format!("-n {} -6 route add default via {six}::fe", ns(name)));
        }
        for name in ["a", "b"] {
            ip(&format!("-n {} address add 10.1.0.1/32 dev lo", ns(name)));
            ip(&format!("-n {} -6 address add fd00:1::1/128 dev lo nodad", ns(name)));
        }
        self.inside("r", || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
            // What is held must not be answered with an error.
            std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").unwrap();
        });
        self.route(Route::To(At::A));
    }

    /// Runs something on a fresh thread inside a namespace.
    pub fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.ns(name), work)
    }

    fn route(&self, route: Route) {
        let via = match (route, self.options.ipv6) {
            (Route::Nowhere, _) => "blackhole",
            (Route::To(At::A), false) => "via 10.2.1.1",
            (Route::To(At::B), false) => "via 10.2.2.1",
            (Route::To(At::A), true) => "via fd00:2:1::1",
            (Route::To(At::B), true) => "via fd00:2:2::1",
        };
        let to = format!("{}/{}", self.address.ip(), if self.options.ipv6 { 128 } else { 32 });
        let (kind, via) = if via == "blackhole" { ("blackhole ", "metric 10") } else { ("", via) };
        let metric = if kind.is_empty() { " metric 10" } else { "" };
        ip(&format!("-n {} route replace {kind}{to} {via}{metric}", self.ns("r")));
    }

    fn command(&self) -> Vec<String> {
        self.options.command.clone().unwrap_or_else(|| {
            let mut command = vec![counter().to_str().unwrap().to_owned(), self.address.to_string()];
            command.extend(self.options.arguments.clone());
            command
        })
    }

    pub fn log(&self, at: At) -> String {
        std::fs::read_to_string(self.dir.join(format!("agent-{}.log", at.name()))).unwrap_or_default()
    }

    pub fn start_agent(&self, at: At) {
        let config = self.dir.join(format!("agent-{}.toml", at.name()));
        let text = format!(
            "site = {:?}\nlisten = \"{}\"\nstate_dir = {:?}\n{}{}{}[[workloads]]\nname = {BACKEND:?}\n\
             address = \"{}\"\nprotocol = \"tcp\"\ncommand = {:?}\ndir = {:?}\nstart = {}\n{}",
            at.name(),
            at.host(),
            self.dir.join(format!("state-{}", at.name())),
            self.options.criu.as_ref().map_or(String::new(), |criu| format!("criu = [{criu:?}]\n")),
            if at == At::B { &self.options.config_at_b } else { "" },
            section(&self.certificates.1[at as usize]),
            self.address,
            self.command(),
            self.dir,
            at == At::A,
            self.options.workload[at as usize],
        );
        std::fs::write(&config, text).unwrap();
        let mut hide = String::new();
        if let (Some(folder), At::B) = (&self.options.hide_at_b, at) {
            hide += &format!("mount -t tmpfs none {} && ", folder.display());
        }
        if let (Some((file, other)), At::B) = (&self.options.other_at_b, at) {
            hide += &format!("mount --bind {} {} && ", other.display(), file.display());
        }
        let log_path = self.dir.join(format!("agent-{}.log", at.name()));
        let log = File::options().create(true).append(true).open(&log_path).unwrap();
        let before = self.log(at).matches("agent ready").count();
        let script =
            format!("{hide}exec {} agent --config {}", env!("CARGO_BIN_EXE_migrate"), config.display());
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.ns(at.name())))
            .args(["unshare", "-m", "sh", "-c", &script])
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or("info".into()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agents.lock().unwrap()[at as usize] = Some(child);
        let until = Instant::now() + Duration::from_secs(15);
        while self.log(at).matches("agent ready").count() == before {
            assert!(Instant::now() < until, "agent {at:?} is not ready: {}", self.log(at));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `kill -9`.
    pub fn kill_agent(&self, at: At) {
        if let Some(mut child) = self.agents.lock().unwrap()[at as usize].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn spec(&self, id: &str, from: At, deadline: Duration) -> Spec {
        let agent = |at: At| AgentAt {
            site: at.name().to_owned(),
            url: format!("https://{}", at.host()),
            tls: Some(self.certificates.0.clone()),
        };
        Spec {
            id: id.to_owned(),
            backend: BACKEND.to_owned(),
            address: self.address,
            protocol: Protocol::Tcp,
            source: agent(from),
            target: agent(from.other()),
            hold: HoldRequest { deadline, policy: Policy::Drop },
            drain: DEFAULT_DRAIN,
        }
    }

    /// Runs one migration with the coordinator in the router's namespace; `watch` sees its progress.
    pub fn migrate(self: &Arc<Self>, spec: Spec, watch: impl FnMut(&Progress) + Send) -> Report {
        self.coordinate(watch, |lab, progress| async move {
            migrate::coordinator::run(spec, Gate::at(&lab), Orders::none(), progress).await
        })
    }

    pub fn coordinate<F: Future<Output = Report> + Send + 'static>(
        self: &Arc<Self>,
        mut watch: impl FnMut(&Progress) + Send,
        work: impl FnOnce(Arc<Self>, mpsc::UnboundedSender<Progress>) -> F + Send,
    ) -> Report {
        let lab = self.clone();
        self.inside("r", move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(async move {
                let (sender, mut receiver) = mpsc::unbounded_channel();
                let running = tokio::spawn(work(lab, sender));
                while let Some(progress) = receiver.recv().await {
                    watch(&progress);
                }
                running.await.unwrap()
            })
        })
    }

    /// The agent's answer to a GET, by HTTP/1.1.
    pub fn get(&self, at: At, path: &str) -> String {
        self.http(at, "GET", path, "")
    }

    pub fn http(&self, at: At, method: &str, path: &str, body: &str) -> String {
        self.http_as(&self.certificates.0, at, method, path, body)
    }

    /// The same, with somebody's certificate.
    pub fn http_as(&self, files: &Files, at: At, method: &str, path: &str, body: &str) -> String {
        let host = at.host();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut config = Credentials::read(files).unwrap().client_config(at.name()).unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let tls = rustls::ClientConnection::new(Arc::new(config), host.ip().into()).unwrap();
        self.inside("r", move || {
            let mut stream = rustls::StreamOwned::new(tls, TcpStream::connect(host).unwrap());
            stream.write_all(request.as_bytes()).unwrap();
            std::io::read_to_string(stream).unwrap()
        })
    }

    /// No rules of ours, or of CRIU's, at a site.
    pub fn assert_unsilenced(&self, at: At) {
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.ns(at.name())))
            .args(["nft", "list", "tables"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "rules are left at {at:?}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for at in [At::A, At::B] {
                eprintln!("--- agent {} ---\n{}", at.name(), self.log(at));
            }
        }
        for at in [At::A, At::B] {
            self.kill_agent(at);
        }
        for name in ["c", "r", "a", "b"] {
            // What lives in these namespaces was started by this lab.
            if let Ok(pids) = Command::new("ip").args(["netns", "pids", &self.ns(name)]).output() {
                for pid in String::from_utf8_lossy(&pids.stdout).split_whitespace() {
                    // One that was killed with another is gone already.
                    let _ = Command::new("kill").args(["-9", pid]).stderr(Stdio::null()).status();
                }
            }
            let _ = Command::new("ip").args(["netns", "del", &self.ns(name)]).status();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A CA, a coordinator and the agents of both sites.
fn certify(dir: &Path) -> (Files, [Files; 2]) {
    let validity = Validity::days(1).unwrap();
    pki::init(dir, "lab", validity).unwrap();
    let issue = |identity, addresses: &[String]| pki::issue(dir, &identity, addresses, validity).unwrap();
    let agent = |at: At| issue(Identity::Agent(at.name().to_owned()), &[at.host().ip().to_string()]);
    (issue(Identity::Coordinator("lb".to_owned()), &[]), [agent(At::A), agent(At::B)])
}

/// Section `[tls]` of an agent's configuration.
fn section(files: &Files) -> String {
    let keys = files.each().map(|(key, path)| format!("{key} = {path:?}\n"));
    format!("[tls]\n{}", keys.concat())
}

#[derive(Clone, Copy)]
enum Route {
    Nowhere,
    To(At),
}

/// A gate that is a route.
pub struct Gate {
    lab: Arc<Lab>,
    generation: AtomicU32,
    before: Mutex<At>,
    /// Microseconds that the changes of the route took.
    pub flip_us: AtomicU64,
}

static ACTIVE: Mutex<Vec<(String, At)>> = Mutex::new(Vec::new());

impl Gate {
    pub fn at(lab: &Arc<Lab>) -> Arc<Self> {
        let active =
            ACTIVE.lock().unwrap().iter().find(|(tag, _)| *tag == lab.tag).map_or(At::A, |(_, at)| *at);
        Arc::new(Self {
            lab: lab.clone(),
            generation: AtomicU32::new(1),
            before: Mutex::new(active),
            flip_us: AtomicU64::new(0),
        })
    }

    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    fn set(&self, route: Route) -> u32 {
        self.lab.route(route);
        self.generation.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn check(&self, generation: u32) -> Result<(), CutoverError> {
        let now = self.generation.load(Ordering::SeqCst);
        if generation == now { Ok(()) } else { Err(CutoverError(format!("generation is {now}"))) }
    }
}

impl Cutover for Gate {
    fn hold(&self, _: &str, _: HoldRequest) -> Result<u32, CutoverError> {
        Ok(self.set(Route::Nowhere))
    }

    fn stage(&self, _: &str, to_site: &str) -> Result<(), CutoverError> {
        match to_site {
            "a" | "b" => Ok(()),
            other => Err(CutoverError(format!("no route to {other}"))),
        }
    }

    fn flip(&self, _: &str, generation: u32, to_site: &str) -> Result<u32, CutoverError> {
        self.check(generation)?;
        let at = if to_site == "a" { At::A } else { At::B };
        let mut active = ACTIVE.lock().unwrap();
        active.retain(|(tag, _)| *tag != self.lab.tag);
        active.push((self.lab.tag.clone(), at));
        let started = Instant::now();
        let generation = self.set(Route::To(at));
        self.flip_us.store(started.elapsed().as_micros() as u64, Ordering::SeqCst);
        Ok(generation)
    }

    fn resume(&self, _: &str, generation: u32) -> Result<u32, CutoverError> {
        self.check(generation)?;
        let before = *self.before.lock().unwrap();
        Ok(self.set(Route::To(before)))
    }

    fn record(&self, _: Decision) -> Result<(), CutoverError> {
        Ok(())
    }
}

/// A gate whose owner crashes at the flip: just before it, or just after.
pub struct Crashing {
    pub gate: Arc<Gate>,
    pub after_flip: bool,
}

impl Cutover for Crashing {
    fn hold(&self, backend: &str, hold: HoldRequest) -> Result<u32, CutoverError> {
        self.gate.hold(backend, hold)
    }

    fn stage(&self, backend: &str, to_site: &str) -> Result<(), CutoverError> {
        self.gate.stage(backend, to_site)
    }

    fn flip(&self, backend: &str, generation: u32, to_site: &str) -> Result<u32, CutoverError> {
        if self.after_flip {
            self.gate.flip(backend, generation, to_site)?;
        }
        panic!("here the load balancer crashes, as the test wants it");
    }

    fn resume(&self, backend: &str, generation: u32) -> Result<u32, CutoverError> {
        self.gate.resume(backend, generation)
    }

    fn record(&self, decision: Decision) -> Result<(), CutoverError> {
        self.gate.record(decision)
    }
}

/// A client that counts along with the server, one line at a time, until it is told to stop.
pub struct Client {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<Duration, String>>>,
}

impl Client {
    pub fn start(lab: &Arc<Lab>) -> Self {
        Self::start_saying(lab, "x\n", "")
    }

    /// Says this each time, and expects its count after `prefix`.
    pub fn start_saying(lab: &Arc<Lab>, line: &'static str, prefix: &'static str) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (namespace, address) = (lab.ns("c"), lab.address);
        let (stopped, counted) = (stop.clone(), count.clone());
        // It must not hold the lab, which a test that fails leaves to be removed while this still waits.
        let thread = std::thread::spawn(move || {
            inside(&namespace, || talk(address, (line, prefix), &stopped, &counted))
        });
        let client = Self { stop, count, thread: Some(thread) };
        client.wait(10);
        client
    }

    /// Waits until so many more lines were answered.
    pub fn wait(&self, more: u64) {
        let goal = self.count.load(Ordering::SeqCst) + more;
        let until = Instant::now() + Duration::from_secs(20);
        while self.count.load(Ordering::SeqCst) < goal {
            let ended = self.thread.as_ref().unwrap().is_finished();
            assert!(!ended && Instant::now() < until, "the client gets no answers any more (ended: {ended})");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops; gives the longest gap, or what went wrong.
    pub fn finish(mut self) -> Result<Duration, String> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn talk(
    address: SocketAddr,
    (line, prefix): (&str, &str),
    stop: &AtomicBool,
    count: &AtomicU64,
) -> Result<Duration, String> {
    let fail = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let mut stream = TcpStream::connect(address).map_err(|error| fail("connect", error))?;
    stream.set_nodelay(true).map_err(|error| fail("nodelay", error))?;
    stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(|error| fail("timeout", error))?;
    let mut answers = BufReader::new(stream.try_clone().map_err(|error| fail("clone", error))?);
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::SeqCst) {
        let sent = Instant::now();
        stream.write_all(line.as_bytes()).map_err(|error| fail("send", error))?;
        let mut answer = String::new();
        answers.read_line(&mut answer).map_err(|error| fail("receive", error))?;
        longest = longest.max(sent.elapsed());
        let expected = count.load(Ordering::SeqCst) + 1;
        if answer.trim() != format!("{prefix}{expected}") {
            return Err(format!("expected {expected}, got {answer:?}"));
        }
        count.store(expected, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(longest)
}
