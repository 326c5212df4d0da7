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
mod locator;
mod log;
mod mapped;
mod maps;
mod observe;
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

use std::sync::{Arc, Mutex, MutexGuard};

use aya::maps::{MapData, PerCpuArray};
use lb_core::record;
use lb_core::{Direction, GateWord, Reason};
use tokio::sync::mpsc::UnboundedSender;

use self::drains::Drains;
use self::maps::{Parts, TrafficBytes};
use self::observe::Observer;
use self::probes::ProbeFlows;
use self::pump::Pump;
use self::shared::SharedTables;
use self::sites::Sites;
use self::tables::Tables;
use super::observe::Member;
use super::{
    BackendNumber, BackendState, Datapath, DatapathError, Event, HoldLimits, HoldStats, Hook, Plan,
    ProbeFlow, ServicePlan, SiteNumber, Traffic,
};
use crate::config;

/// Packets are forwarded in the kernel by an XDP program on every interface.
pub struct XdpDatapath {
    hooks: Vec<Hook>,
    shared: Arc<SharedTables>,
    tables: Mutex<Tables>,
    sites: Sites,
    drains: Drains,
    pump: Pump,
    reasons: PerCpuArray<MapData, u64>,
    traffic: PerCpuArray<MapData, TrafficBytes>,
    observer: Observer,
    probes: ProbeFlows,
    /// Keeps the loaded program's descriptor open; its pinned links keep it running without us.
    ebpf: Mutex<aya::Ebpf>,
}

impl XdpDatapath {
    /// Loads the program over the pinned tables (or makes them) and attaches it to the interfaces, in the
    /// calling thread's network namespace. What it finds out by itself is sent to `events`.
    pub fn open(config: &config::Datapath, events: UnboundedSender<Event>) -> Result<Self, DatapathError> {
        let mut ebpf = program::load(&config.pin_path)?;
        log::forward(&mut ebpf)?;
        let (maps, Parts { shared, locations, capture, reasons, traffic }) = maps::take(&mut ebpf, config)?;
        let shared = Arc::new(shared);
        let tables = Tables::new(maps, shared.clone())?;
        let sites =
            Sites::start(locations, shared.clone()).map_err(program::kernel("starting the sites' thread"))?;
        let pump = Pump::start(capture, shared.clone(), events)
            .map_err(program::kernel("starting the hold's thread"))?;
        let observer = Observer::start(&config.pin_path)?;
        let hooks = program::attach(&mut ebpf, &config.interfaces, &config.pin_path)?;
        let drains = Drains::new(&config.pin_path);
        let probes = ProbeFlows::open(config)?;
        Ok(Self {
            hooks,
            shared,
            tables: Mutex::new(tables),
            sites,
            drains,
            pump,
            reasons,
            traffic,
            observer,
            probes,
            ebpf: Mutex::new(ebpf),
        })
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
        self.tables().install(plan, &self.sites)?;
        self.drains.keep(plan.backends.iter().map(|backend| &*backend.name))
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
        let (name, next_hop) = {
            let tables = self.tables();
            (tables.site_name(site), tables.next_hop(site))
        };
        let unreachable = |reason: String| DatapathError::Unreachable { site: name.clone(), reason };
        let next_hop =
            next_hop.ok_or_else(|| unreachable("it is not in the configuration any more".to_owned()))?;
        let link = self.sites.probe(next_hop).map_err(|error| unreachable(error.to_string()))?;
        self.sites.keep(site, next_hop, link);
        self.shared.stage(backend, self.shared.state(backend).spare(), site);
        Ok(())
    }

    fn begin_hold(&self, backend: BackendNumber, limits: HoldLimits) {
        self.pump.begin(backend, limits, self.shared.refused(backend));
    }

    fn store(&self, backend: BackendNumber, word: GateWord) {
        self.shared.store(backend, word);
        self.pump.wake();
    }

    fn hold_stats(&self, backend: BackendNumber) -> HoldStats {
        self.pump.stats(backend, self.shared.refused(backend))
    }

    fn traffic(&self, backend: BackendNumber) -> Traffic {
        self.counters(backend.0).0
    }

    fn carry_probes(&self, interface: &str) -> Result<(), DatapathError> {
        let mut ebpf = self.ebpf.lock().expect("nothing panics while it attaches");
        program::attach_while_alive(&mut ebpf, interface, &self.hooks)
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
