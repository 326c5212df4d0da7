//! The datapaths: what carries packets between clients and backends.
//!
//! Control decides (see `control`), a datapath performs: each call here is one store or one message
//! and never waits for the network. What a datapath finds out by itself comes back as an [`Event`].

mod held;
mod merged;
pub mod observe;
mod queue;
mod queues;
mod segment;
pub mod xdp;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use self::observe::Observe;
use lb_core::record::Link;
use lb_core::{GateWord, Slot};

/// Number of a backend in the data path's tables; stays the same for as long as the tables live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendNumber(pub u32);

/// Number of a site in the data path's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteNumber(pub u32);

/// Number of a service in the data path's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceNumber(pub u32);

/// Transport protocol of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

/// What a datapath is to carry: the validated configuration in the data path's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Sites, with how they are reached. The index is meaningless; the name identifies.
    pub sites: Vec<SitePlan>,
    /// Backends, each at a site of `sites`.
    pub backends: Vec<BackendPlan>,
    /// Services, each over backends of `backends`.
    pub services: Vec<ServicePlan>,
}

/// A site and its locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SitePlan {
    /// Unique name.
    pub name: String,
    /// Next hop; must be on a link of this machine or reachable by a route.
    pub next_hop: IpAddr,
    /// Packets to the site are put into packets to this address.
    pub tunnel: Option<Tunnel>,
}

impl SitePlan {
    /// A site that is reached without a tunnel.
    pub fn new(name: impl Into<String>, next_hop: IpAddr) -> Self {
        Self { name: name.into(), next_hop, tunnel: None }
    }

    /// Whether packets to an address can be sent there: IPv4 carries IPv4 only, IPv6 carries both.
    pub fn carries(&self, address: IpAddr) -> bool {
        self.tunnel.is_none_or(|tunnel| tunnel.endpoint.is_ipv6() || address.is_ipv4())
    }
}

/// A tunnel to a site: IP in IP (RFC 2003, RFC 2473).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Destination of the outer packets.
    pub endpoint: IpAddr,
    /// Their source; `None`: this machine's address on the way there.
    pub source: Option<IpAddr>,
}

/// A backend as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendPlan {
    /// Unique name.
    pub name: String,
    /// What its sockets are bound to, wherever it runs.
    pub address: SocketAddr,
    /// Name of the site where it runs when the tables are new; tables that live know better.
    pub site: String,
    /// Share of new flows beside its siblings, 1..=1000.
    pub weight: u32,
    /// Whether the configuration wants no new flows on it.
    pub drain: bool,
}

impl BackendPlan {
    /// A backend with the usual weight.
    pub fn new(name: impl Into<String>, address: SocketAddr, site: impl Into<String>) -> Self {
        Self { name: name.into(), address, site: site.into(), weight: 100, drain: false }
    }
}

/// A service as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// Unique name.
    pub name: String,
    /// What clients connect to.
    pub address: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// What is done to packets on their way to a backend.
    pub mode: Mode,
    /// What becomes of new flows whose backend is held.
    pub during_hold: DuringHold,
    /// How long a backend that is new or came back takes to its full share; zero: no time.
    pub slow_start: Duration,
    /// What becomes of new flows when every backend is down.
    pub all_down: AllDown,
    /// Names of its backends, at least one.
    pub backends: Vec<String>,
    /// Their shares of new flows, in the same order: as configured, or what `control` made of it (0: none).
    pub weights: Vec<u32>,
}

impl ServicePlan {
    /// A service with everything as it is by default, all backends of the same weight.
    pub fn new(
        name: impl Into<String>,
        address: SocketAddr,
        protocol: Protocol,
        backends: Vec<String>,
    ) -> Self {
        Self {
            name: name.into(),
            address,
            protocol,
            mode: Mode::Nat,
            during_hold: DuringHold::Hold,
            slow_start: Duration::ZERO,
            all_down: AllDown::Open,
            weights: vec![100; backends.len()],
            backends,
        }
    }
}

/// What is done to packets on their way to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Source and destination are translated; replies come back to us by themselves.
    Nat,
    /// Only the destination is translated: the server sees the client, and its network sends replies through us.
    Transparent,
    /// Nothing is translated: the server holds the service's address and answers the client itself.
    Dsr,
}

/// What becomes of new flows whose backend is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DuringHold {
    /// They wait with the others.
    Hold,
    /// They go to another backend of the service.
    Steer,
}

/// What becomes of new flows when every backend of a service is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AllDown {
    /// They are sent as if all were up: checks may be what is broken.
    Open,
    /// They are dropped.
    Closed,
}

/// What the tables say of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendState {
    /// Gate, active slot, generation.
    pub word: GateWord,
    /// The site of each slot (index: [`Slot`] as number).
    pub sites: [SiteNumber; 2],
}

impl BackendState {
    /// The site where the backend runs now.
    pub fn location(&self) -> SiteNumber {
        self.sites[self.word.slot() as usize]
    }

    /// The slot that a new location may be written to.
    pub fn spare(&self) -> Slot {
        self.word.slot().other()
    }
}

/// How one interface's packets are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Interface name.
    pub interface: String,
    /// For example `xdp native` or `xdp generic`.
    pub mode: String,
}

/// Bounds of one hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// Most bytes of frames kept for the backend.
    pub max_bytes: usize,
    /// Frames older than this are dropped instead of replayed.
    pub max_age: Duration,
    /// What gives way when `max_bytes` are kept.
    pub overflow: Overflow,
}

/// What gives way when a hold queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The packet that just came (TCP sends it again).
    DropNewest,
    /// The oldest packet of the queue (what a game server would rather miss).
    DropOldest,
}

/// What one hold has kept and lost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldStats {
    /// Packets put into the queue since the hold began.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Packets sent from the queue.
    pub replayed_packets: u64,
    /// Packets dropped: by overflow, age, the `drop` gate, or a full capture ring.
    pub dropped_packets: u64,
}

/// What a datapath reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first held packet left, this long after the gate word that started the replay was stored.
    ReplayStarted {
        /// Whose queue.
        backend: BackendNumber,
        /// Time from the store.
        after: Duration,
    },
    /// Captured equals replayed: the gate may go to `forward`.
    Replayed {
        /// Whose queue.
        backend: BackendNumber,
        /// What the hold kept and lost.
        stats: HoldStats,
    },
}

/// Packets and bytes of one backend, both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets from clients.
    pub to_backend_packets: u64,
    /// Bytes of those, with link headers.
    pub to_backend_bytes: u64,
    /// Packets from the backend.
    pub to_clients_packets: u64,
    /// Bytes of those, with link headers.
    pub to_clients_bytes: u64,
}

/// A flow that a health check is about to open: an ordinary one, but for who chose its backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeFlow {
    /// Name of the service whose way it takes.
    pub service: String,
    /// What the probe connects to: the service's address.
    pub to: SocketAddr,
    /// What is done to its packets.
    pub mode: Mode,
    /// Transport protocol of the probe, which need not be the service's.
    pub protocol: Protocol,
    /// The backend under test.
    pub backend: BackendNumber,
    /// The probe's own address; its port is the NAT port as well.
    pub from: SocketAddr,
    /// Back to the probe.
    pub back: Link,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.to_backend_packets += other.to_backend_packets;
        self.to_backend_bytes += other.to_backend_bytes;
        self.to_clients_packets += other.to_clients_packets;
        self.to_clients_bytes += other.to_clients_bytes;
    }
}

/// Why a datapath cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The locator of a site leads nowhere.
    #[error(
        "site {site:?}: {reason}; give its locator a next hop that this machine has a route and a neighbour for"
    )]
    Unreachable {
        /// The site.
        site: String,
        /// What was missing.
        reason: String,
    },
    /// A table is full.
    #[error(
        "no room for another {what}: the tables take {most}. They keep the size that they were made with: take less, \
         or raise [limits] and make them anew (stop the daemon, remove datapath.pin_path, start it)"
    )]
    Full {
        /// What there are too many of.
        what: &'static str,
        /// The bound.
        most: u32,
    },
    /// The pinned tables are another version's.
    #[error(
        "the tables pinned below {pins} have layout {found}, and this version has layout {needed}: nothing was touched, \
         and packets keep flowing. To change over, let another load balancer take the traffic (connections through \
         this one will end), stop the former daemon, remove {pins} with all below it, and start again"
    )]
    Layout {
        /// What the tables say.
        found: u64,
        /// What this daemon has.
        needed: u64,
        /// Where they are.
        pins: String,
    },
    /// The kernel refused.
    #[error("{doing}: {source}")]
    Kernel {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// One way of carrying packets. All calls are safe from any thread.
pub trait Datapath: Observe {
    /// Which hooks carry packets.
    fn hooks(&self) -> Vec<Hook>;

    /// Makes the tables say what the plan says, by what differs. Backends that are there already keep their
    /// number, gate, generation and locations. All or nothing: a site that is new and cannot be reached is refused.
    fn install(&self, plan: &Plan) -> Result<(), DatapathError>;

    /// As [`Datapath::install`], for a daemon that starts: sites that cannot be reached keep nobody from the others,
    /// and are looked for until they can.
    fn install_at_start(&self, plan: &Plan) -> Result<(), DatapathError>;

    /// Shares new flows out by other weights. Only for services of the last plan, with the same backends.
    fn weigh(&self, services: &[ServicePlan]) -> Result<(), DatapathError>;

    /// Backends that were drained by hand, as [`Datapath::set_drained`] wrote it down.
    fn drained(&self) -> Vec<String>;

    /// Writes down, for daemons to come, that a backend is drained by hand or is not any more.
    fn set_drained(&self, backend: &str, drained: bool) -> Result<(), DatapathError>;

    /// The number of a backend by name, if the tables have it.
    fn backend(&self, name: &str) -> Option<BackendNumber>;

    /// The number of a site by name, if the tables have it.
    fn site(&self, name: &str) -> Option<SiteNumber>;

    /// What the tables say of a backend.
    fn state(&self, backend: BackendNumber) -> BackendState;

    /// Resolves the site's locator anew and writes it into the backend's spare slot, so that a flip is one store.
    fn stage(&self, backend: BackendNumber, site: SiteNumber) -> Result<(), DatapathError>;

    /// Makes the hold queue ready. Called before the gate closes, also after a restart with a closed gate.
    fn begin_hold(&self, backend: BackendNumber, limits: HoldLimits);

    /// The one store. With gate `Replay` the queue is sent to the word's location from then on and, when it is
    /// empty, [`Event::Replayed`] is reported. Wakes nobody: it takes as long for one flow as for millions.
    fn store(&self, backend: BackendNumber, word: GateWord);

    /// What the current (or last) hold of the backend has kept and lost.
    fn hold_stats(&self, backend: BackendNumber) -> HoldStats;

    /// Packets and bytes of a backend since the tables were made.
    fn traffic(&self, backend: BackendNumber) -> Traffic;

    /// Takes the packets of health checks from one more interface of the calling thread's namespace, as those of the
    /// configured ones, for as long as this process lives.
    fn carry_probes(&self, interface: &str) -> Result<(), DatapathError>;

    /// Writes the flow that a probe is about to open, so that it reaches that backend and no other.
    fn open_probe(&self, probe: &ProbeFlow) -> Result<(), DatapathError>;

    /// Removes it.
    fn close_probe(&self, probe: &ProbeFlow);

    /// Every counter by reason label (`lb_core::Reason`), in the enum's order, summed over CPUs.
    fn reasons(&self) -> Vec<(&'static str, u64)>;
}
