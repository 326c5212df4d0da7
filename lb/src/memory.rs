//! A datapath in memory, for the tests of everything above the trait: it carries nothing and remembers
//! everything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use lb_core::{Gate, GateWord, Slot};
use tokio::sync::mpsc::UnboundedSender;

use crate::datapath::{
    BackendNumber, BackendState, Datapath, DatapathError, Event, HoldLimits, HoldStats, Hook, Plan,
    ServicePlan, SiteNumber, Traffic,
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
        let mut inner = self.inner();
        if let Some(site) = plan.sites.iter().find(|site| inner.unreachable.contains(&site.name)) {
            return Err(DatapathError::Unreachable { site: site.name.clone(), reason: "no route".into() });
        }
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

    fn reasons(&self) -> Vec<(&'static str, u64)> {
        lb_core::Reason::ALL.iter().enumerate().map(|(i, reason)| (reason.label(), i as u64)).collect()
    }
}
