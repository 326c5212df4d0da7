//! Who decides what happens to a backend's packets.
//!
//! `machine` is the decision, pure; this driver locks one backend's machine, performs its commands on the
//! datapath and hands the datapath's reports back. A flip is a look-up, a lock, a few comparisons and the
//! store: nothing is awaited, logged or resolved before the store has returned.
//!
//! Not here: how packets are carried (`datapath`), and who asks (`admin`, `migrations`).

mod machine;
mod view;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use machine::{Commands, Event, Machine, Policy, Refusal, State};
pub use view::{BackendView, HoldView, TrafficView};

use crate::config;
use crate::datapath::{self, BackendNumber, Datapath, DatapathError, HoldStats, Plan, SiteNumber};

/// Why control does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The name is not in the configuration.
    #[error("there is no backend {0:?}")]
    UnknownBackend(String),
    /// The name is not in the configuration.
    #[error("there is no site {0:?}")]
    UnknownSite(String),
    /// Not in this state.
    #[error("backend {backend:?}: {refusal}")]
    Refused {
        /// The backend.
        backend: String,
        /// The reason.
        refusal: Refusal,
    },
    /// A location is being written that the flip would make the active one.
    #[error("backend {0:?}: a site is being staged for it right now; try again")]
    Staging(String),
    /// The datapath cannot.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// What one replay has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// The generation of the flip or resume that started it.
    pub generation: u32,
    /// From the store of the gate word to the first held packet leaving; `None` where nothing was held.
    pub first_after: Option<Duration>,
    /// What the hold kept and lost, once the replay has ended.
    pub ended: Option<HoldStats>,
}

struct Entry {
    name: String,
    number: BackendNumber,
    address: std::net::SocketAddr,
    machine: Mutex<Machine>,
    /// Held while the spare slot is written, which may take as long as the network: not the machine's lock.
    staging: Mutex<()>,
    replay: watch::Sender<Replay>,
}

impl Entry {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        // A machine is changed in one assignment after all checks: a panic elsewhere leaves it whole.
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The backends' gates.
pub struct Control {
    datapath: Arc<dyn Datapath>,
    hold: config::Hold,
    entries: BTreeMap<String, Entry>,
    by_number: HashMap<BackendNumber, String>,
    sites: BTreeMap<String, SiteNumber>,
    /// A hold began: the driver has to look at the deadlines again.
    deadlines: Notify,
}

impl Control {
    /// Installs the plan and takes over the gates as the tables have them.
    pub fn start(datapath: Arc<dyn Datapath>, plan: &Plan, hold: config::Hold) -> Result<Self, ControlError> {
        datapath.install(plan)?;
        let mut sites = BTreeMap::new();
        for site in &plan.sites {
            let number =
                datapath.site(&site.name).ok_or_else(|| ControlError::UnknownSite(site.name.clone()))?;
            sites.insert(site.name.clone(), number);
        }
        let mut entries = BTreeMap::new();
        let mut by_number = HashMap::new();
        for backend in &plan.backends {
            let name = backend.name.clone();
            let number = datapath.backend(&name).ok_or_else(|| ControlError::UnknownBackend(name.clone()))?;
            let tables = datapath.state(number);
            let (machine, commands) = Machine::take_over(tables, Instant::now() + hold.deadline, hold.limits);
            perform(&*datapath, number, commands);
            if machine.state() != State::Forward {
                tracing::warn!(backend = %name, gate = ?machine.word(), state = machine.state().label(),
                    "took over a gate that is not forward");
            }
            by_number.insert(number, name.clone());
            let entry = Entry {
                name: name.clone(),
                number,
                address: backend.address,
                machine: Mutex::new(machine),
                staging: Mutex::new(()),
                replay: watch::Sender::new(Replay::default()),
            };
            entries.insert(name, entry);
        }
        Ok(Self { datapath, hold, entries, by_number, sites, deadlines: Notify::new() })
    }

    /// What carries the packets.
    pub fn datapath(&self) -> &dyn Datapath {
        &*self.datapath
    }

    /// Defaults and bounds of holds.
    pub fn hold_defaults(&self) -> config::Hold {
        self.hold
    }

    fn entry(&self, backend: &str) -> Result<&Entry, ControlError> {
        self.entries.get(backend).ok_or_else(|| ControlError::UnknownBackend(backend.to_owned()))
    }

    fn site(&self, site: &str) -> Result<SiteNumber, ControlError> {
        self.sites.get(site).copied().ok_or_else(|| ControlError::UnknownSite(site.to_owned()))
    }

    /// The name of a site; `None` for one that the tables know and the configuration no longer does.
    fn site_name(&self, number: SiteNumber) -> Option<String> {
        self.sites.iter().find(|(_, site)| **site == number).map(|(name, _)| name.clone())
    }

    /// Lets the machine decide and performs what it says, under its lock; the generation after it.
    fn event(&self, entry: &Entry, event: Event) -> Result<u32, ControlError> {
        let mut machine = entry.machine();
        match machine.on(event, Instant::now()) {
            Ok(commands) => {
                perform(&*self.datapath, entry.number, commands);
                Ok(machine.word().generation())
            }
            Err(refusal) => Err(ControlError::Refused { backend: entry.name.clone(), refusal }),
        }
    }

    /// Closes the gate. Returns the generation that the holder flips or resumes with.
    pub fn hold(
        &self,
        backend: &str,
        policy: Policy,
        deadline: Option<Duration>,
    ) -> Result<u32, ControlError> {
        let entry = self.entry(backend)?;
        let deadline_after = deadline.unwrap_or(self.hold.deadline);
        let deadline = Instant::now() + deadline_after;
        let generation = self.event(entry, Event::Hold { policy, deadline, limits: self.hold.limits })?;
        self.deadlines.notify_one();
        tracing::info!(backend, generation, ?policy, ?deadline_after, "hold");
        Ok(generation)
    }

    /// Writes a site into the backend's spare slot, so that a flip there is one store. May take as long as
    /// the datapath needs to resolve the site's next hop.
    pub fn stage(&self, backend: &str, to_site: &str) -> Result<(), ControlError> {
        let entry = self.entry(backend)?;
        let site = self.site(to_site)?;
        // No flip in between: it would make the slot that is being written the active one.
        let _staging = entry.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = |refusal| ControlError::Refused { backend: entry.name.clone(), refusal };
        if entry.machine().location() == site {
            return Err(refused(Refusal::SameLocation));
        }
        self.datapath.stage(entry.number, site).map_err(|error| match error {
            // Sites have names here.
            DatapathError::Unreachable { reason, .. } => {
                DatapathError::Unreachable { site: to_site.to_owned(), reason }
            }
            other => other,
        })?;
        entry.machine().on(Event::Staged { site }, Instant::now()).map_err(refused)?;
        Ok(())
    }

    /// Opens the gate at a staged site, replaying what was held. Returns the new generation.
    pub fn flip(&self, backend: &str, generation: u32, to_site: &str) -> Result<u32, ControlError> {
        let to = self.site(to_site)?;
        let entry = self.entry(backend)?;
        let _unless_staging = match entry.staging.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(ControlError::Staging(backend.to_owned())),
            free => free,
        };
        // Not a word to the log here: a caller measures from the target's report to this store.
        self.event(entry, Event::Flip { generation, to })
    }

    /// Opens the gate where it was, replaying what was held. Returns the new generation.
    pub fn resume(&self, backend: &str, generation: u32) -> Result<u32, ControlError> {
        let new = self.event(self.entry(backend)?, Event::Resume { generation })?;
        tracing::info!(backend, generation = new, "resume");
        Ok(new)
    }

    /// Where a backend's gate stands.
    pub fn state(&self, backend: &str) -> Result<State, ControlError> {
        Ok(self.entry(backend)?.machine().state())
    }

    /// The generation of a backend's gate.
    pub fn generation(&self, backend: &str) -> Result<u32, ControlError> {
        Ok(self.entry(backend)?.machine().word().generation())
    }

    /// Where a backend runs, and where a flip would lead; `None` for sites that the configuration lost.
    pub fn sites_of(&self, backend: &str) -> Result<(Option<String>, Option<String>), ControlError> {
        let (location, staged) = {
            let machine = self.entry(backend)?.machine();
            (machine.location(), machine.staged())
        };
        Ok((self.site_name(location), self.site_name(staged)))
    }

    /// Whether there is a site of this name.
    pub fn knows_site(&self, site: &str) -> bool {
        self.sites.contains_key(site)
    }

    /// What the current (or last) hold of a backend has kept and lost.
    pub fn hold_stats(&self, backend: &str) -> Result<HoldStats, ControlError> {
        Ok(self.datapath.hold_stats(self.entry(backend)?.number))
    }

    /// Waits until the replay that `generation` started has ended. `None` after `patience`.
    pub async fn replay_ended(&self, backend: &str, generation: u32, patience: Duration) -> Option<Replay> {
        let mut replay = self.entry(backend).ok()?.replay.subscribe();
        let ended = replay.wait_for(|replay| replay.generation == generation && replay.ended.is_some());
        let replay = tokio::time::timeout(patience, ended).await.ok()?.ok()?;
        Some(*replay)
    }

    /// Waits until no queue is being sent, at most for `patience`; whether that is so.
    pub async fn replays_ended(&self, patience: Duration) -> bool {
        let give_up = Instant::now() + patience;
        loop {
            let replaying = |entry: &Entry| entry.machine().state() == State::Replaying;
            if !self.entries.values().any(replaying) {
                return true;
            }
            if Instant::now() >= give_up {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Acts on deadlines and on the datapath's reports until `stop`.
    pub async fn drive(&self, mut events: mpsc::UnboundedReceiver<datapath::Event>, stop: CancellationToken) {
        loop {
            let next = self.entries.values().filter_map(|entry| entry.machine().next_tick()).min();
            let deadline = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.recv() => match event {
                    Some(event) => self.report(event),
                    None => return,
                },
                () = self.deadlines.notified() => {}
                () = deadline => self.tick(),
            }
        }
    }

    /// Lets every machine look at the time.
    fn tick(&self) {
        for entry in self.entries.values() {
            let before = entry.machine().state();
            match self.event(entry, Event::Tick) {
                Ok(generation) if entry.machine().state() != before => {
                    tracing::warn!(backend = %entry.name, generation,
                        "the hold's deadline passed: packets are dropped until somebody flips or resumes");
                }
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "a tick was refused"),
            }
        }
    }

    /// Takes a report of the datapath.
    fn report(&self, event: datapath::Event) {
        let number = match &event {
            datapath::Event::ReplayStarted { backend, .. } | datapath::Event::Replayed { backend, .. } => {
                *backend
            }
        };
        let Some(entry) = self.by_number.get(&number).and_then(|name| self.entries.get(name)) else {
            tracing::debug!(?event, "a report about a backend that the configuration does not have");
            return;
        };
        // One lock for the gate and its record: who sees `forward` sees the record as well.
        let mut machine = entry.machine();
        if machine.state() != State::Replaying {
            tracing::debug!(backend = %entry.name, ?event, "a report about a replay that is over");
            return;
        }
        let generation = machine.word().generation();
        match event {
            datapath::Event::ReplayStarted { after, .. } => {
                entry.replay.send_replace(Replay { generation, first_after: Some(after), ended: None });
                drop(machine);
                tracing::info!(backend = %entry.name, ?after, "the first held packet left");
            }
            datapath::Event::Replayed { stats, .. } => {
                match machine.on(Event::Replayed, Instant::now()) {
                    Ok(commands) => perform(&*self.datapath, entry.number, commands),
                    Err(refusal) => tracing::error!(backend = %entry.name, %refusal, "the end of a replay"),
                }
                entry.replay.send_modify(|replay| {
                    if replay.generation != generation {
                        *replay = Replay { generation, first_after: None, ended: None };
                    }
                    replay.ended = Some(stats);
                });
                drop(machine);
                tracing::info!(backend = %entry.name, ?stats, "replayed; the gate forwards");
            }
        }
    }
}

fn perform(datapath: &dyn Datapath, backend: BackendNumber, commands: Commands) {
    if let Some(limits) = commands.begin_hold {
        datapath.begin_hold(backend, limits);
    }
    if let Some(word) = commands.store {
        datapath.store(backend, word);
    }
}

#[cfg(test)]
mod tests;
