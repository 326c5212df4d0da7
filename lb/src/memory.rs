//! A datapath in memory, for the tests of everything above the trait: it carries nothing and remembers
//! everything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use lb_core::{Gate, GateWord, Slot};
use tokio::sync::mpsc::UnboundedSender;

use crate::capture::stream::Sample;
use crate::config::FlowTimes;
use crate::datapath::observe::{FlowFilter, FlowList, FlowRow, FlowTable, FlowTables, Member, Observe};
use crate::datapath::{
    BackendNumber, BackendState, Datapath, DatapathError, Event, HoldLimits, HoldStats, Hook, Plan,
    ProbeFlow, ServicePlan, SiteNumber, Traffic,
};

/// What was asked of the datapath, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    BeginHold(BackendNumber, HoldLimits),
    Stage(BackendNumber, SiteNumber),
    Store(BackendNumber, GateWord),
    /// A service's effective weights.
    Weigh(String, Vec<u32>),
}

#[derive(Default)]
struct Inner {
    sites: Vec<String>,
    backends: Vec<String>,
    states: HashMap<BackendNumber, BackendState>,
    stats: HoldStats,
    unreachable: BTreeSet<String>,
    drained: BTreeSet<String>,
    weights: BTreeMap<String, Vec<u32>>,
    calls: Vec<Call>,
    slow: Option<(Sender<()>, Receiver<()>)>,
    flows: Vec<FlowRow>,
    captures: Vec<(u32, tokio::sync::mpsc::Sender<Sample>)>,
}

/// The test's end of a network that takes its time with the next staging.
pub(crate) struct SlowNetwork {
    /// Says that the staging waits.
    pub(crate) waiting: Receiver<()>,
    /// Lets it go on.
    pub(crate) answer: Sender<()>,
}

pub(crate) struct MemoryDatapath {
    inner: Mutex<Inner>,
    events: UnboundedSender<Event>,
    /// Whether a stored `replay` is reported as done at once.
    replays: bool,
}

impl MemoryDatapath {
    /// Tables that are new, and replays that end as soon as they begin.
    pub(crate) fn new(events: UnboundedSender<Event>) -> Self {
        Self { inner: Mutex::default(), events, replays: true }
    }

    /// Replays only end when the test reports it.
    pub(crate) fn without_replays(events: UnboundedSender<Event>) -> Self {
        Self { inner: Mutex::default(), events, replays: false }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// As if a former daemon had left this behind. Sites are numbered in the order of the plan.
    pub(crate) fn pin(&self, plan: &Plan, backend: &str, word: GateWord, sites: [u32; 2]) {
        self.install(plan).unwrap();
        let number = self.backend(backend).unwrap();
        let state = BackendState { word, sites: sites.map(SiteNumber) };
        self.inner().states.insert(number, state);
    }

    /// What the next hold will have kept.
    pub(crate) fn set_stats(&self, stats: HoldStats) {
        self.inner().stats = stats;
    }

    /// What the flow tables have.
    pub(crate) fn set_flows(&self, flows: Vec<FlowRow>) {
        self.inner().flows = flows;
    }

    /// A packet was sampled.
    pub(crate) fn offer_sample(&self, sample: &Sample) {
        for (_, capture) in &self.inner().captures {
            let _ = capture.try_send(sample.clone());
        }
    }

    /// One packet in so many, for each capture that is still read.
    pub(crate) fn captures(&self) -> Vec<u32> {
        let mut inner = self.inner();
        inner.captures.retain(|(_, capture)| !capture.is_closed());
        inner.captures.iter().map(|(one_in, _)| *one_in).collect()
    }

    pub(crate) fn make_unreachable(&self, site: &str) {
        self.inner().unreachable.insert(site.to_owned());
    }

    /// The next staging waits for the test.
    pub(crate) fn slow_network(&self) -> SlowNetwork {
        let ((wait, waiting), (answer, answered)) = (channel(), channel());
        self.inner().slow = Some((wait, answered));
        SlowNetwork { waiting, answer }
    }

    /// The effective weights of a service.
    pub(crate) fn weights(&self, service: &str) -> Vec<u32> {
        self.inner().weights.get(service).cloned().unwrap_or_default()
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.inner().calls.clone()
    }

    /// The gate words stored, in order.
    pub(crate) fn stored(&self) -> Vec<GateWord> {
        let stored = |call: Call| match call {
            Call::Store(_, word) => Some(word),
            _ => None,
        };
        self.calls().into_iter().filter_map(stored).collect()
    }

    pub(crate) fn finish_replay(&self, backend: BackendNumber) {
        let stats = self.inner().stats;
        if stats.held_packets > 0 {
            let _ = self.events.send(Event::ReplayStarted { backend, after: Duration::from_micros(40) });
        }
        let _ = self.events.send(Event::Replayed { backend, stats });
    }
}

impl Datapath for MemoryDatapath {
    fn hooks(&self) -> Vec<Hook> {
        vec![Hook { interface: "mem0".into(), mode: "memory".into() }]
    }

    fn install(&self, plan: &Plan) -> Result<(), DatapathError> {
        let unreachable = self.inner().unreachable.clone();
        match plan.sites.iter().find(|site| unreachable.contains(&site.name)) {
            Some(site) => {
                Err(DatapathError::Unreachable { site: site.name.clone(), reason: "no route".into() })
            }
            None => self.install_at_start(plan),
        }
    }

    fn install_at_start(&self, plan: &Plan) -> Result<(), DatapathError> {
        let mut inner = self.inner();
        // As in real tables, a number goes with its name; here it is never given to another.
        let stays: BTreeSet<&String> = plan.backends.iter().map(|backend| &backend.name).collect();
        for known in inner.backends.iter_mut().filter(|known| !stays.contains(&**known)) {
            *known = String::new();
        }
        inner.weights =
            plan.services.iter().map(|service| (service.name.clone(), service.weights.clone())).collect();
        for site in &plan.sites {
            if !inner.sites.contains(&site.name) {
                inner.sites.push(site.name.clone());
            }
        }
        for backend in &plan.backends {
            if !inner.backends.contains(&backend.name) {
                let site = inner.sites.iter().position(|name| *name == backend.site).expect("a checked plan");
                let site = SiteNumber(site as u32);
                let number = BackendNumber(inner.backends.len() as u32);
                inner.backends.push(backend.name.clone());
                let word = GateWord::new(Gate::Forward, Slot::A, 1);
                inner.states.insert(number, BackendState { word, sites: [site, site] });
            }
        }
        Ok(())
    }

    fn weigh(&self, services: &[ServicePlan]) -> Result<(), DatapathError> {
        let mut inner = self.inner();
        for service in services {
            inner.weights.insert(service.name.clone(), service.weights.clone());
            inner.calls.push(Call::Weigh(service.name.clone(), service.weights.clone()));
        }
        Ok(())
    }

    fn drained(&self) -> Vec<String> {
        self.inner().drained.iter().cloned().collect()
    }

    fn set_drained(&self, backend: &str, drained: bool) -> Result<(), DatapathError> {
        let mut inner = self.inner();
        if drained {
            inner.drained.insert(backend.to_owned());
        } else {
            inner.drained.remove(backend);
        }
        Ok(())
    }

    fn backend(&self, name: &str) -> Option<BackendNumber> {
        self.inner().backends.iter().position(|known| known == name).map(|i| BackendNumber(i as u32))
    }

    fn site(&self, name: &str) -> Option<SiteNumber> {
        self.inner().sites.iter().position(|known| known == name).map(|i| SiteNumber(i as u32))
    }

    fn state(&self, backend: BackendNumber) -> BackendState {
        self.inner().states[&backend]
    }

    fn stage(&self, backend: BackendNumber, site: SiteNumber) -> Result<(), DatapathError> {
        let slow = self.inner().slow.take();
        if let Some((wait, answered)) = slow {
            wait.send(()).unwrap();
            answered.recv().unwrap();
        }
        let mut inner = self.inner();
        let name = inner.sites[site.0 as usize].clone();
        if inner.unreachable.contains(&name) {
            return Err(DatapathError::Unreachable { site: name, reason: "no route".into() });
        }
        let state = inner.states.get_mut(&backend).expect("a number that was given out");
        let spare = state.spare() as usize;
        state.sites[spare] = site;
        inner.calls.push(Call::Stage(backend, site));
        Ok(())
    }

    fn begin_hold(&self, backend: BackendNumber, limits: HoldLimits) {
        self.inner().calls.push(Call::BeginHold(backend, limits));
    }

    fn store(&self, backend: BackendNumber, word: GateWord) {
        {
            let mut inner = self.inner();
            inner.states.get_mut(&backend).expect("a number that was given out").word = word;
            inner.calls.push(Call::Store(backend, word));
        }
        if word.gate() == Gate::Replay && self.replays {
            self.finish_replay(backend);
        }
    }

    fn hold_stats(&self, _: BackendNumber) -> HoldStats {
        self.inner().stats
    }

    fn traffic(&self, _: BackendNumber) -> Traffic {
        Traffic { to_backend_packets: 3, to_backend_bytes: 300, to_clients_packets: 2, to_clients_bytes: 200 }
    }

    fn carry_probes(&self, _: &str) -> Result<(), DatapathError> {
        Ok(())
    }

    fn open_probe(&self, _: &ProbeFlow) -> Result<(), DatapathError> {
        Ok(())
    }

    fn close_probe(&self, _: &ProbeFlow) {}

    fn reasons(&self) -> Vec<(&'static str, u64)> {
        lb_core::Reason::ALL.iter().enumerate().map(|(i, reason)| (reason.label(), i as u64)).collect()
    }
}

impl Observe for MemoryDatapath {
    fn set_flow_times(&self, _: FlowTimes) {}

    fn flows(&self, filter: &FlowFilter) -> Result<FlowList, DatapathError> {
        let inner = self.inner();
        let mut flows = inner.flows.clone();
        flows.retain(|flow| filter.backend.is_none_or(|backend| backend == flow.backend));
        flows.retain(|flow| filter.client.is_none_or(|client| client.contains(flow.client.ip())));
        let is_cut = flows.len() > filter.limit;
        flows.truncate(filter.limit);
        Ok(FlowList { flows, is_cut })
    }

    fn flow_tables(&self) -> FlowTables {
        let table = FlowTable {
            family: "ipv4",
            standing: "established",
            tcp_flows: 5,
            other_flows: 2,
            entries: 14,
            most: 1000,
        };
        FlowTables { tables: vec![table], removed: vec![("idle", 3)], pass: Some(Duration::from_millis(20)) }
    }

    fn members(&self) -> Vec<Member> {
        let member = |backend: &String| Member {
            service: "chat".to_owned(),
            backend: backend.clone(),
            traffic: self.traffic(BackendNumber(0)),
            opened: 4,
            resets: 1,
        };
        self.inner().backends.iter().filter(|backend| !backend.is_empty()).map(member).collect()
    }

    fn sample(&self, one_in: NonZeroU32) -> tokio::sync::mpsc::Receiver<Sample> {
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        self.inner().captures.push((one_in.get(), sender));
        receiver
    }

    fn lost_samples(&self) -> u64 {
        6
    }
}
