//! The XDP datapath: the kernel program's tables, its hooks, and the hold's thread.
//!
//! ```text
//!   control -> store ------> BACKENDS (memory-mapped) <------ kernel program
//!                                                              | capture
//!              sender <----- queue <------ pump <----------- CAPTURE ring
//! ```

pub mod batch;
mod bpf;
mod drains;
pub mod expiry;
pub mod flows;
mod hook;
mod locator;
mod log;
mod mapped;
mod maps;
mod observe;
mod peers;
mod priority;
mod probes;
pub mod program;
mod pump;
pub mod records;
mod samples;
mod sender;
pub mod settings;
mod shared;
mod sites;
mod tables;
pub mod ticks;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use aya::maps::{MapData, PerCpuArray};
use lb_core::record::{self, Location};
use lb_core::{Direction, GateWord, Reason};
use tokio::sync::mpsc::UnboundedSender;

use self::drains::Drains;
use self::locator::LocatorError;
use self::maps::Parts;
use self::observe::Observer;
use self::probes::ProbeFlows;
use self::pump::Pump;
use self::shared::SharedTables;
use self::sites::Sites;
use self::tables::{Tables, TrafficTable};
use super::observe::Member;
use super::{
    BackendNumber, BackendState, Datapath, DatapathError, Event, HoldLimits, HoldStats, Hook, Plan,
    ProbeFlow, ServicePlan, SiteNumber, Traffic,
};
use crate::config;

/// Packets are forwarded in the kernel by an XDP program on every interface.
pub struct XdpDatapath {
    hook: hook::Chosen,
    hooks: Vec<Hook>,
    shared: Arc<SharedTables>,
    tables: Mutex<Tables>,
    sites: Sites,
    drains: Drains,
    pump: Pump,
    reasons: PerCpuArray<MapData, u64>,
    traffic: TrafficTable,
    observer: Observer,
    probes: ProbeFlows,
    /// Keeps the loaded program's descriptor open; its pinned links keep it running without us.
    ebpf: Mutex<aya::Ebpf>,
}

impl XdpDatapath {
    /// Loads the programs over the pinned tables (or makes them) and attaches one to the interfaces, in the
    /// calling thread's network namespace. What it finds out by itself is sent to `events`.
    pub fn open(config: &config::Datapath, events: UnboundedSender<Event>) -> Result<Self, DatapathError> {
        let mut ebpf = program::prepare(&config.pin_path, &config.limits)?;
        let hook = hook::load(&mut ebpf, config)?;
        log::forward(&mut ebpf)?;
        let (maps, Parts { shared, locations, capture, reasons, traffic }) = maps::take(&mut ebpf, config)?;
        let shared = Arc::new(shared);
        let tables = Tables::new(maps, shared.clone())?;
        let sites =
            Sites::start(locations, shared.clone()).map_err(program::kernel("starting the sites' thread"))?;
        let pump = Pump::start(capture, shared.clone(), events)
            .map_err(program::kernel("starting the hold's thread"))?;
        let observer = Observer::start(&config.pin_path)?;
        let drains = Drains::new(&config.pin_path);
        let probes = ProbeFlows::open(config)?;
        let hooks = hook::attach(&mut ebpf, hook, config)?;
        let tables = Mutex::new(tables);
        let ebpf = Mutex::new(ebpf);
        Ok(Self {
            hook,
            hooks,
            shared,
            tables,
            sites,
            drains,
            pump,
            reasons,
            traffic,
            observer,
            probes,
            ebpf,
        })
    }

    /// The locations of a plan's sites that nobody looks after yet, and why others cannot be reached.
    fn probe(&self, plan: &Plan) -> (HashMap<String, Location>, Vec<(String, LocatorError)>) {
        // Not under the lock: this waits for the network.
        let unknown = self.tables().unknown_sites(plan);
        let begin = |(site, locator)| (site, self.sites.begin_probe(locator));
        // All at once: together they take as long as the slowest.
        let probes: Vec<_> = unknown.into_iter().map(begin).collect();
        let (mut locations, mut unreached) = (HashMap::new(), Vec::new());
        for (site, location) in probes {
            match location() {
                Ok(location) => drop(locations.insert(site, location)),
                Err(error) => unreached.push((site, error)),
            }
        }
        (locations, unreached)
    }

    fn write(&self, plan: &Plan, locations: &HashMap<String, Location>) -> Result<(), DatapathError> {
        self.tables().install(plan, locations, &self.sites)?;
        self.drains.keep(plan.backends.iter().map(|backend| &*backend.name))
    }

    /// Packets and bytes of a member, its new flows, and its resets.
    fn counters(&self, member: u32) -> (Traffic, u64, u64) {
        let Ok(per_cpu) = self.traffic.get(&member, 0) else { return Default::default() };
        per_cpu.iter().fold(Default::default(), |(sum, all_opened, all_resets): (Traffic, u64, u64), cpu| {
            let record::Traffic { packets, bytes, opened, resets } = records::from_bytes(cpu);
            let traffic = Traffic {
                to_backend_packets: sum.to_backend_packets + packets[Direction::ToBackend as usize],
                to_backend_bytes: sum.to_backend_bytes + bytes[Direction::ToBackend as usize],
                to_clients_packets: sum.to_clients_packets + packets[Direction::ToClient as usize],
                to_clients_bytes: sum.to_clients_bytes + bytes[Direction::ToClient as usize],
            };
            (traffic, all_opened + opened, all_resets + resets)
        })
    }

    fn read_members(&self) -> Vec<Member> {
        let members = self.tables().members();
        let member = |(number, service, backend)| {
            let (traffic, opened, resets) = self.counters(number);
            Member { service, backend, traffic, opened, resets }
        };
        members.into_iter().map(member).collect()
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().expect("nothing panics while it writes tables")
    }
}

impl Datapath for XdpDatapath {
    fn hooks(&self) -> Vec<Hook> {
        self.hooks.clone()
    }

    fn install(&self, plan: &Plan) -> Result<(), DatapathError> {
        let (locations, unreached) = self.probe(plan);
        match unreached.into_iter().next() {
            Some((site, error)) => Err(DatapathError::Unreachable { site, reason: error.to_string() }),
            None => self.write(plan, &locations),
        }
    }

    fn install_at_start(&self, plan: &Plan) -> Result<(), DatapathError> {
        let (locations, unreached) = self.probe(plan);
        for (site, error) in unreached {
            tracing::warn!(%site, %error,
                "the site cannot be reached; it is tried again every second, and packets for backends there go the \
                 last known way, or are dropped (no_route) where there is none");
        }
        self.write(plan, &locations)
    }

    fn weigh(&self, services: &[ServicePlan]) -> Result<(), DatapathError> {
        self.tables().weigh(services)
    }

    fn drained(&self) -> Vec<String> {
        self.drains.all()
    }

    fn set_drained(&self, backend: &str, drained: bool) -> Result<(), DatapathError> {
        self.drains.set(backend, drained)
    }

    fn backend(&self, name: &str) -> Option<BackendNumber> {
        self.tables().backend(name)
    }

    fn site(&self, name: &str) -> Option<SiteNumber> {
        self.tables().site(name)
    }

    fn state(&self, backend: BackendNumber) -> BackendState {
        self.shared.state(backend)
    }

    fn stage(&self, backend: BackendNumber, site: SiteNumber) -> Result<(), DatapathError> {
        let (name, locator) = {
            let tables = self.tables();
            (tables.site_name(site), tables.locator(site, backend))
        };
        let unreachable = |reason: String| DatapathError::Unreachable { site: name.clone(), reason };
        let locator = locator.map_err(unreachable)?;
        let location = self.sites.probe(locator).map_err(|error| unreachable(error.to_string()))?;
        self.sites.keep(site, locator, location);
        self.shared.stage(backend, self.shared.state(backend).spare(), site);
        Ok(())
    }

    fn begin_hold(&self, backend: BackendNumber, limits: HoldLimits) {
        self.pump.begin(backend, limits, self.shared.refused(backend));
    }

    fn store(&self, backend: BackendNumber, word: GateWord) {
        self.shared.store(backend, word);
    }

    fn hold_stats(&self, backend: BackendNumber) -> HoldStats {
        self.pump.stats(backend, self.shared.refused(backend))
    }

    fn traffic(&self, backend: BackendNumber) -> Traffic {
        let members = self.tables().members_of(backend);
        let mut sum = Traffic::default();
        members.into_iter().for_each(|member| sum += self.counters(member).0);
        sum
    }

    fn carry_probes(&self, interface: &str) -> Result<(), DatapathError> {
        let mut ebpf = self.ebpf.lock().expect("nothing panics while it attaches");
        hook::attach_while_alive(&mut ebpf, self.hook, interface, &self.hooks)
    }

    fn open_probe(&self, probe: &ProbeFlow) -> Result<(), DatapathError> {
        let member = self.tables().member(&probe.service, probe.backend);
        self.probes.put(probe, member)
    }

    fn close_probe(&self, probe: &ProbeFlow) {
        if let Err(error) = self.probes.remove(probe) {
            tracing::warn!(%error, "a health check's flow is left to expiry");
        }
    }

    fn reasons(&self) -> Vec<(&'static str, u64)> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let counts = self.reasons.get(&(*reason as u32), 0);
                (reason.label(), counts.map_or(0, |counts| counts.iter().sum()))
            })
            .collect()
    }
}
