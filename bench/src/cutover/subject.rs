//! The datapath under test: Drover's own, between the namespaces of a lab.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use lab::{Lab, Site, address};
use lb::config::Config;
use lb::datapath::xdp::XdpDatapath;
use lb::datapath::{BackendNumber, Datapath, Event, HoldLimits, Overflow, SiteNumber};
use lb_core::{Flow, FlowKey};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::ends::{BACKEND_PORT, Injector, SERVICE_PORT, SiteEnd};

type FlowKeyBytes = [u8; size_of::<FlowKey<1>>()];
type FlowBytes = [u8; size_of::<Flow<1>>()];

const BACKEND: &str = "server";

/// Entries of a flow.
const DIRECTIONS: usize = 2;

/// How long anything may take that ought to take milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bounds of the holds: none that a bench reaches.
pub const LIMITS: HoldLimits =
    HoldLimits { max_bytes: 1 << 30, max_age: PATIENCE, overflow: Overflow::DropNewest };

/// A lab with the datapath, and both ends.
pub struct Subject {
    pub datapath: XdpDatapath,
    pub injector: Injector,
    pub ends: [SiteEnd; 2],
    pub backend: BackendNumber,
    pub sites: [SiteNumber; 2],
    pub events: UnboundedReceiver<Event>,
    /// Removed last.
    pub lab: Lab,
}

impl Subject {
    /// Starts with tables for so many flows.
    pub fn start(flows: u32) -> Result<Self> {
        let lab = Lab::new()?;
        let config = Config::parse(&configuration(&lab, flows), "the benchmark's configuration")?;
        let ends = [SiteEnd::attach(lab.site(Site::A))?, SiteEnd::attach(lab.site(Site::B))?];
        let (outbox, events) = unbounded_channel();
        let datapath = lab.lb().run(|| XdpDatapath::open(&config.datapath, outbox))?;
        datapath.install(&config.plan)?;
        let backend = datapath.backend(BACKEND).context("the datapath does not know its backend")?;
        let site = |site: Site| datapath.site(site.name()).context("the datapath does not know its sites");
        let sites = [site(Site::A)?, site(Site::B)?];
        let (to, _) = interface(&lab, lab.lb().name(), "c0")?;
        let (from, index) = interface(&lab, lab.client().name(), "eth0")?;
        let injector = Injector::load(index, (to, from), address::VIRTUAL4)?;
        Ok(Self { datapath, injector, ends, backend, sites, events, lab })
    }

    /// Sends datagrams from the client's namespace.
    pub fn send(&mut self, datagrams: u32, clients: u32, first: u64, number: u64) -> Result<()> {
        let injector = &mut self.injector;
        self.lab.client().run(|| injector.send(datagrams, clients, first, number))
    }

    /// Establishes the flows of so many clients: each asks, is answered, and asks again.
    pub fn establish(&mut self, flows: u32) -> Result<()> {
        const AT_ONCE: u32 = 1 << 14;
        const ROUNDS: u32 = 5;
        let wanted = flows as usize * DIRECTIONS;
        let mut found = 0;
        // On a busy machine a datagram may be lost before its turn comes.
        for _ in 0..ROUNDS {
            for first in (0..flows).step_by(AT_ONCE as usize) {
                for _ in 0..2 {
                    self.send(AT_ONCE.min(flows), 1 << 20, u64::from(first), 0)?;
                }
            }
            found = self.established()?;
            if found == wanted {
                return Ok(());
            }
        }
        bail!("{found} of {wanted} entries of {flows} flows are in the table of established flows")
    }

    /// Entries in the table of established flows.
    fn established(&self) -> Result<usize> {
        let pin = self.lab.pin_path().join("maps/FLOWS_V4");
        let map = Map::HashMap(MapData::from_pin(&pin).context("the table of flows is not pinned")?);
        let flows: HashMap<_, FlowKeyBytes, FlowBytes> = map.try_into()?;
        Ok(flows.keys().count())
    }

    /// Waits for something that the datapath reports.
    pub fn wait<T>(&mut self, what: &str, mut is_it: impl FnMut(&Event) -> Option<T>) -> Result<T> {
        let end = Instant::now() + PATIENCE;
        loop {
            while let Ok(event) = self.events.try_recv() {
                if let Some(found) = is_it(&event) {
                    return Ok(found);
                }
            }
            ensure!(Instant::now() < end, "the datapath did not report {what} within {PATIENCE:?}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Hardware address and number of an interface.
fn interface(lab: &Lab, namespace: &str, device: &str) -> Result<([u8; 6], u32)> {
    let mut command = lab.lb().command("ip");
    let output = command.args(["-n", namespace, "-j", "link", "show", device]).output()?;
    let links: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("`ip link` does not know {device} in {namespace}"))?;
    let text = links[0]["address"].as_str().context("an interface has an address")?;
    let mut octets = [0; 6];
    for (octet, digits) in octets.iter_mut().zip(text.split(':')) {
        *octet = u8::from_str_radix(digits, 16).context("an address is written in hexadecimal digits")?;
    }
    let index = links[0]["ifindex"].as_u64().context("an interface has a number")?;
    Ok((octets, index as u32))
}

/// At XDP, where the ends' live frames can be redirected to; a virtual interface's own choice would be traffic control.
fn configuration(lab: &Lab, flows: u32) -> String {
    let sites = Site::ALL.map(|site| {
        format!("[[sites]]\nname = \"{}\"\nnext_hop = \"{}\"\n", site.name(), address::site4(site))
    });
    format!(
        "[admin]\nlisten = \"{admin}\"\n\
         [datapath]\ninterfaces = [\"c0\", \"a0\", \"b0\"]\nhook = \"xdp\"\npin_path = \"{pins}\"\nnat_source4 = \"{nat}\"\n\
         [limits]\nflows = {flows}\nnew_flows_per_second_per_cpu = {any}\nnew_flows_per_second_per_prefix = {any}\n\
         {sites}\
         [[backends]]\nname = \"{BACKEND}\"\naddress = \"{backend}:{BACKEND_PORT}\"\nsite = \"{site}\"\n\
         [[services]]\nname = \"service\"\naddress = \"{service}:{SERVICE_PORT}\"\nprotocol = \"udp\"\n\
         backends = [\"{BACKEND}\"]\n",
        admin = address::ADMIN,
        pins = lab.pin_path().display(),
        nat = address::NAT_SOURCE4,
        flows = flows.max(1024),
        any = u32::MAX,
        sites = sites.concat(),
        backend = address::backend4(1),
        site = Site::A.name(),
        service = address::VIRTUAL4,
    )
}
