//! The backends of the present plan, each with its machine.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::time::Instant;

use tokio::sync::watch;

use super::{ControlError, Machine, Replay, lock, perform};
use crate::config;
use crate::datapath::{BackendNumber, BackendPlan, Datapath, Plan, SiteNumber};

/// One backend.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) number: BackendNumber,
    pub(super) address: std::net::SocketAddr,
    machine: Mutex<Machine>,
    /// A reload takes the backend away: its number may belong to another one soon. Changed under the machine's
    /// lock, so that nothing is stored under the number afterwards.
    gone: AtomicBool,
    /// Held while the spare slot is written, which may take as long as the network: not the machine's lock.
    pub(super) staging: Mutex<()>,
    pub(super) replay: watch::Sender<Replay>,
}

impl Entry {
    /// Takes a backend over as the tables have it.
    fn take_over(
        datapath: &dyn Datapath,
        plan: &BackendPlan,
        hold: config::Hold,
    ) -> Result<Self, ControlError> {
        let number =
            datapath.backend(&plan.name).ok_or_else(|| ControlError::UnknownBackend(plan.name.clone()))?;
        let deadline = Instant::now() + hold.deadline;
        let (machine, commands) = Machine::take_over(datapath.state(number), deadline, hold.limits);
        perform(datapath, number, commands);
        Ok(Self {
            name: plan.name.clone(),
            number,
            address: plan.address,
            machine: Mutex::new(machine),
            gone: AtomicBool::new(false),
            staging: Mutex::default(),
            replay: watch::Sender::new(Replay::default()),
        })
    }

    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        // A machine is changed in one assignment after all checks: a panic elsewhere leaves it whole.
        lock(&self.machine)
    }

    /// The machine of a backend that is not being taken away.
    pub(super) fn live(&self) -> Result<MutexGuard<'_, Machine>, ControlError> {
        let machine = self.machine();
        if self.gone.load(Relaxed) {
            return Err(ControlError::UnknownBackend(self.name.clone()));
        }
        Ok(machine)
    }

    /// Nothing is decided about this backend from here on, or again.
    pub(super) fn set_gone(&self, gone: bool) {
        let _machine = self.machine();
        self.gone.store(gone, Relaxed);
    }
}

/// The backends and sites of one plan.
pub(super) struct Table {
    pub(super) entries: BTreeMap<String, Arc<Entry>>,
    pub(super) by_number: HashMap<BackendNumber, Arc<Entry>>,
    pub(super) sites: BTreeMap<String, SiteNumber>,
    site_names: HashMap<SiteNumber, String>,
}

impl Table {
    /// The entries of a plan that the datapath has. Those of a former plan go on, if they still live.
    pub(super) fn new(
        datapath: &dyn Datapath,
        plan: &Plan,
        former: Option<&Self>,
        hold: config::Hold,
    ) -> Result<Self, ControlError> {
        let mut sites = BTreeMap::new();
        for site in &plan.sites {
            let unknown = || ControlError::UnknownSite(site.name.clone());
            sites.insert(site.name.clone(), datapath.site(&site.name).ok_or_else(unknown)?);
        }
        let mut entries = BTreeMap::new();
        for backend in &plan.backends {
            let known = former
                .and_then(|former| former.entries.get(&backend.name))
                .filter(|entry| !entry.gone.load(Relaxed));
            let entry = match known {
                Some(entry) => entry.clone(),
                None => Arc::new(Entry::take_over(datapath, backend, hold)?),
            };
            entries.insert(backend.name.clone(), entry);
        }
        let by_number = entries.values().map(|entry: &Arc<Entry>| (entry.number, entry.clone())).collect();
        let site_names = sites.iter().map(|(name, number)| (*number, name.clone())).collect();
        Ok(Self { entries, by_number, sites, site_names })
    }

    /// The name of a site; `None` for one that the tables know and the configuration no longer does.
    pub(super) fn site_name(&self, number: SiteNumber) -> Option<String> {
        self.site_names.get(&number).cloned()
    }
}
