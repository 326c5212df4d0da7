//! Where a system is measured: a lab with its links set, addresses and settings for many connections, and the server.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use bench::interrupt::Interrupt;
use bench::path::processors::Busy;
use lab::process::Process;
use lab::{Lab, Namespace, Site, processors};
use serde::de::DeserializeOwned;

/// The server's port, TCP and UDP, at the backend and at the virtual address.
pub const PORT: u16 = 7000;
/// iperf3's port at both.
pub const IPERF_PORT: u16 = 7100;
/// Addresses of the client: each has some 64,000 ports, of which new connections use up many.
const SOURCES: u8 = 8;
/// How soon a worker's end is noticed.
const NOTICED_WITHIN: Duration = Duration::from_millis(10);
/// How long a worker may take longer than it was told to.
const PATIENCE: Duration = Duration::from_secs(20);
/// The load balancer's interfaces towards the client and the server.
pub const INTERFACES: [&str; 2] = ["c0", "a0"];

const SYSCTLS: [(&str, &str); 3] = [
    ("ipv4/ip_local_port_range", "1024 65535"),
    ("ipv4/tcp_tw_reuse", "1"),
    // What one round learned about a path is no advantage for the next.
    ("ipv4/tcp_no_metrics_save", "1"),
];

/// Some machines' default paces with timers, which would be measured too.
const CONGESTION_CONTROL: (&str, &str) = ("ipv4/tcp_congestion_control", "cubic");

/// Offloads of the links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offloads {
    /// No TSO, GSO and checksum offload anywhere and no GRO at the load balancer: frames are what they would be on a
    /// wire, and XDP programs can read them. The lab is made like that.
    Off,
    /// All that veth has.
    On,
}

impl Offloads {
    /// For the report.
    pub fn describe(self) -> &'static str {
        match self {
            Offloads::Off => "tx, tso and gso off everywhere; gro off at the load balancer, on at the hosts",
            Offloads::On => "tx, tso, gso and gro on everywhere",
        }
    }
}

/// Which processors are whose; everywhere all where there is only one.
#[derive(Clone, Debug)]
pub struct Processors {
    client: Vec<usize>,
    server: Vec<usize>,
}

impl Processors {
    /// The client has one half, the server the other.
    pub fn split() -> Processors {
        let (client, server) = processors::halves().unwrap_or_default();
        Processors { client, server }
    }

    /// For the report.
    pub fn describe(&self) -> String {
        if self.client.is_empty() {
            return "one processor for all".to_owned();
        }
        format!(
            "client on processor {:?}, server on {:?}, load balancers' processes on any",
            self.client, self.server
        )
    }
}

/// A lab with a server in it. Dropping it ends everything.
pub struct Place {
    // Dropped in this order: processes before their lab.
    _servers: Vec<Process>,
    processors: Processors,
    offloads: Offloads,
    lab: Lab,
    workers: u32,
}

impl Place {
    /// Makes the lab and starts the servers; `with_iperf`: also that of iperf3.
    pub fn new(offloads: Offloads, with_iperf: Option<&Path>) -> anyhow::Result<Place> {
        let lab = Lab::new()?;
        for namespace in [lab.client(), lab.lb(), lab.site(Site::A)] {
            set(namespace, &SYSCTLS)?;
            // Kernels without it have reno, for all systems alike.
            let _ = set(namespace, &[CONGESTION_CONTROL]);
        }
        for last in 2..=SOURCES {
            run(lab.client().command("ip").args([
                "addr",
                "add",
                &format!("10.0.0.{last}/24"),
                "dev",
                "eth0",
            ]))?;
        }
        // Off is how the lab is made.
        if offloads == Offloads::On {
            let ends =
                [(lab.client(), "eth0"), (lab.site(Site::A), "eth0"), (lab.lb(), "c0"), (lab.lb(), "a0")];
            for (namespace, device) in ends {
                set_offloads(namespace, device, offloads)?;
            }
        }
        let processors = Processors::split();
        let mut place = Place { _servers: Vec::new(), processors, offloads, lab, workers: 0 };
        // At any of its addresses: with DSR clients ask the virtual one.
        let listen = format!("0.0.0.0:{PORT}");
        place.serve("server", &own_program()?, &["worker", "serve", "--listen", &listen])?;
        if let Some(iperf) = with_iperf {
            place.serve("iperf-server", iperf, &["--server", "--port", &IPERF_PORT.to_string()])?;
        }
        Ok(place)
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// How its links are set.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// The client's addresses.
    pub fn sources(&self) -> Vec<IpAddr> {
        (1..=SOURCES).map(|last| Ipv4Addr::new(10, 0, 0, last).into()).collect()
    }

    fn serve(&mut self, name: &str, program: &Path, words: &[&str]) -> anyhow::Result<()> {
        let command = on(self.lab.site(Site::A), &self.processors.server, program, words);
        self._servers.push(Process::spawn(name, self.lab.dir(), command)?);
        Ok(())
    }

    /// Starts a client; it is to end by itself.
    pub fn client(&mut self, program: &Path, words: &[&str]) -> anyhow::Result<Worker> {
        let command = on(self.lab.client(), &self.processors.client, program, words);
        self.spawn(command)
    }

    /// Starts a receiver beside the server; it is to end by itself.
    pub fn receiver(&mut self, words: &[&str]) -> anyhow::Result<Worker> {
        let command = on(self.lab.site(Site::A), &self.processors.server, &own_program()?, words);
        self.spawn(command)
    }

    fn spawn(&mut self, command: Command) -> anyhow::Result<Worker> {
        self.workers += 1;
        let busy = Busy::now()?;
        let process = Process::spawn(&format!("worker-{}", self.workers), self.lab.dir(), command)?;
        Ok(Worker { process, busy })
    }
}

/// A process that ends by itself and prints what came of its work as JSON.
pub struct Worker {
    process: Process,
    busy: Busy,
}

impl Worker {
    /// Waits for its end; returns what it printed, and how many processor seconds the machine worked since its start.
    pub fn finish<T: DeserializeOwned>(
        mut self,
        length: Duration,
        interrupt: &Interrupt,
    ) -> anyhow::Result<(T, f64)> {
        let end = std::time::Instant::now() + length + PATIENCE;
        let status = loop {
            if let Some(status) = self.process.ended() {
                break status;
            }
            if std::time::Instant::now() > end {
                bail!("a worker does not end; the end of its output: {}", self.process.log_tail(5));
            }
            interrupt.sleep(NOTICED_WITHIN)?;
        };
        let busy_s = Busy::now()?.seconds_since(self.busy);
        let printed = std::fs::read_to_string(self.process.log()).context("cannot read a worker's output")?;
        if !status.success() {
            bail!("{}", printed.trim());
        }
        let value = serde_json::from_str(&printed)
            .with_context(|| format!("cannot understand a worker's output {:?}", printed.trim()))?;
        Ok((value, busy_s))
    }
}

/// This program, which is also the workers'.
pub fn own_program() -> io::Result<PathBuf> {
    std::env::current_exe()
}

/// Sets an interface's offloads as all of its place's have them; a host's end.
pub fn set_offloads(namespace: &Namespace, device: &str, offloads: Offloads) -> anyhow::Result<()> {
    let others = if offloads == Offloads::On { "on" } else { "off" };
    let words = ["tx", others, "tso", others, "gso", others, "gro", "on"];
    run(namespace.command("ethtool").args(["-K", device]).args(words))
}

/// Sets what is below `/proc/sys/net` in a namespace.
pub fn set(namespace: &Namespace, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    namespace.run(|| {
        settings.iter().try_for_each(|(name, value)| {
            std::fs::write(format!("/proc/sys/net/{name}"), value)
                .with_context(|| format!("cannot set net/{name} in the namespace {}", namespace.name()))
        })
    })
}

/// For the report: what [`Place::new`] sets.
pub fn describe() -> Vec<String> {
    let settings: Vec<_> = SYSCTLS
        .iter()
        .chain([&CONGESTION_CONTROL])
        .map(|(name, value)| format!("{name} = {value}"))
        .collect();
    vec![
        "veth pairs client - load balancer - server, MTU 1500".to_owned(),
        format!("{} in every namespace", settings.join(", ")),
        format!("the client connects from {SOURCES} addresses"),
    ]
}

/// Runs a command that sets something up.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot start {shown}"))?;
    if !output.status.success() {
        bail!("{shown} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn on(namespace: &Namespace, processors: &[usize], program: &Path, words: &[&str]) -> Command {
    let list = processors.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let mut all: Vec<OsString> = Vec::new();
    if !list.is_empty() {
        // Becomes the program, so that all of it stays one process.
        all.extend(["taskset", "--cpu-list", &list].map(OsString::from));
    }
    all.push(program.into());
    all.extend(words.iter().map(OsString::from));
    let mut command = namespace.command(&all[0]);
    command.args(&all[1..]);
    command
}
