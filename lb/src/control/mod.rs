//! Who decides what happens to a backend's packets.
//!
//! `machine` is the decision, pure; this driver locks one backend's machine, performs its commands on the
//! datapath and hands the datapath's reports back. A flip is a look-up, a lock, a few comparisons and the
//! store: nothing is awaited, logged or resolved before the store has returned.
//!
//! Not here: how packets are carried (`datapath`), and who asks (`admin`, `migrations`).

mod entry;
mod machine;
mod reload;
mod share;
mod shares;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::Duration;
use tokio::time::Instant;

use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use entry::{Entry, Table};
pub use machine::{Commands, Event, Machine, Policy, Refusal, State};
pub use reload::Changes;
use shares::Shares;
pub use shares::Standing;
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
    /// The configuration says otherwise.
    #[error("backend {0:?} is drained by the configuration: remove its drain = true and reload")]
    DrainedByFile(String),
    /// A reload would take a backend away, or give it another address, while its packets are held.
    #[error(
        "backend {backend:?} is {state}, so it can neither be removed nor get another address; flip or resume it, \
         then reload"
    )]
    InUse {
        /// The backend.
        backend: String,
        /// The state's name.
        state: &'static str,
    },
    /// A reload would take a site away where a backend runs.
    #[error("site {site:?} is where backend {backend:?} runs: move the backend, or keep the site")]
    SiteInUse {
        /// The site.
        site: String,
        /// The backend.
        backend: String,
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

/// The backends' gates and their shares of new flows.
pub struct Control {
    datapath: Arc<dyn Datapath>,
    hold: Mutex<config::Hold>,
    table: RwLock<Arc<Table>>,
    /// Those whose gate is not, or lately was not, `forward`: who looks after deadlines looks at no others.
    closed: Mutex<BTreeMap<String, Arc<Entry>>>,
    /// A hold began: the driver has to look at the deadlines again.
    deadlines: Notify,
    shares: Mutex<Shares>,
    /// Services whose effective weights may have changed.
    stale: Mutex<BTreeSet<String>>,
    /// Something came to `stale`, or a slow start began.
    reshare: Notify,
    /// Held while a plan or weights are written, so that the last word is the newest.
    installing: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is changed in single steps: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Installs the plan and takes over the gates as the tables have them.
    pub fn start(datapath: Arc<dyn Datapath>, plan: &Plan, hold: config::Hold) -> Result<Self, ControlError> {
        let shares = Shares::new(plan, &datapath.drained());
        datapath.install_at_start(&reload::weighed(plan, &shares, Instant::now()))?;
        let table = Table::new(&*datapath, plan, None, hold)?;
        let closed = table.entries.values().filter(|entry| entry.machine().state() != State::Forward);
        let closed: BTreeMap<_, _> = closed.map(|entry| (entry.name.clone(), entry.clone())).collect();
        for entry in closed.values() {
            let machine = entry.machine();
            tracing::warn!(backend = %entry.name, gate = ?machine.word(), state = machine.state().label(),
                "took over a gate that is not forward");
        }
        Ok(Self {
            datapath,
            hold: Mutex::new(hold),
            table: RwLock::new(Arc::new(table)),
            closed: Mutex::new(closed),
            deadlines: Notify::new(),
            shares: Mutex::new(shares),
            stale: Mutex::default(),
            reshare: Notify::new(),
            installing: Mutex::default(),
        })
    }

    /// What carries the packets.
    pub fn datapath(&self) -> &dyn Datapath {
        &*self.datapath
    }

    /// Defaults and bounds of holds.
    pub fn hold_defaults(&self) -> config::Hold {
        *lock(&self.hold)
    }

    fn table(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn entry(&self, backend: &str) -> Result<Arc<Entry>, ControlError> {
        let unknown = || ControlError::UnknownBackend(backend.to_owned());
        self.table().entries.get(backend).cloned().ok_or_else(unknown)
    }

    fn site(&self, site: &str) -> Result<SiteNumber, ControlError> {
        let unknown = || ControlError::UnknownSite(site.to_owned());
        self.table().sites.get(site).copied().ok_or_else(unknown)
    }

    /// Lets the machine decide and performs what it says, under its lock; the generation after it.
    fn event(&self, entry: &Entry, event: Event) -> Result<u32, ControlError> {
        let mut machine = entry.live()?;
        match machine.on(event, Instant::now()) {
            Ok(commands) => {
                perform(&*self.datapath, entry.number, commands);
                Ok(machine.word().generation())
            }
            Err(refusal) => Err(ControlError::Refused { backend: entry.name.clone(), refusal }),
        }
    }

    /// Closes the gate for new connections; it opens again by itself at the deadline. Returns the generation.
    pub fn hold_new(&self, backend: &str, deadline: Duration) -> Result<u32, ControlError> {
        let limits = self.hold_defaults().limits;
        let generation =
            self.close(backend, Event::HoldNew { deadline: Instant::now() + deadline, limits })?;
        tracing::info!(backend, generation, ?deadline, "hold of new connections");
        Ok(generation)
    }

    /// Closes the gate. Returns the generation that the holder flips or resumes with.
    pub fn hold(
        &self,
        backend: &str,
        policy: Policy,
        deadline: Option<Duration>,
    ) -> Result<u32, ControlError> {
        let defaults = self.hold_defaults();
        let deadline_after = deadline.unwrap_or(defaults.deadline);
        let deadline = Instant::now() + deadline_after;
        let generation = self.close(backend, Event::Hold { policy, deadline, limits: defaults.limits })?;
        tracing::info!(backend, generation, ?policy, ?deadline_after, "hold");
        Ok(generation)
    }

    /// Closes the gate as the event says, and sees to it that its deadline is looked after.
    fn close(&self, backend: &str, hold: Event) -> Result<u32, ControlError> {
        let entry = self.entry(backend)?;
        let generation = self.event(&entry, hold)?;
        lock(&self.closed).insert(entry.name.clone(), entry);
        self.deadlines.notify_one();
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
        if entry.live()?.location() == site {
            return Err(refused(Refusal::SameLocation));
        }
        self.datapath.stage(entry.number, site).map_err(|error| match error {
            // Sites have names here.
            DatapathError::Unreachable { reason, .. } => {
                DatapathError::Unreachable { site: to_site.to_owned(), reason }
            }
            other => other,
        })?;
        entry.live()?.on(Event::Staged { site }, Instant::now()).map_err(refused)?;
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
        self.event(&entry, Event::Flip { generation, to })
    }

    /// Opens the gate where it was, replaying what was held. Returns the new generation.
    pub fn resume(&self, backend: &str, generation: u32) -> Result<u32, ControlError> {
        let new = self.event(&*self.entry(backend)?, Event::Resume { generation })?;
        tracing::info!(backend, generation = new, "resume");
        Ok(new)
    }

    /// Where a backend's gate stands.
    pub fn state(&self, backend: &str) -> Result<State, ControlError> {
        Ok(self.entry(backend)?.live()?.state())
    }

    /// The generation of a backend's gate.
    pub fn generation(&self, backend: &str) -> Result<u32, ControlError> {
        Ok(self.entry(backend)?.machine().word().generation())
    }

    /// Where a backend runs, and where a flip would lead; `None` for sites that the configuration lost.
    pub fn sites_of(&self, backend: &str) -> Result<(Option<String>, Option<String>), ControlError> {
        let entry = self.entry(backend)?;
        let (location, staged) = {
            let machine = entry.machine();
            (machine.location(), machine.staged())
        };
        let table = self.table();
        Ok((table.site_name(location), table.site_name(staged)))
    }

    /// Whether there is a site of this name.
    pub fn knows_site(&self, site: &str) -> bool {
        self.table().sites.contains_key(site)
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
            let replaying = |entry: &Arc<Entry>| entry.machine().state() == State::Replaying;
            if !lock(&self.closed).values().any(replaying) {
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
            let next = {
                let mut closed = lock(&self.closed);
                closed.retain(|_, entry| entry.machine().state() != State::Forward);
                closed.values().filter_map(|entry| entry.machine().next_tick()).min()
            };
            let deadline = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
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
        let closed: Vec<_> = lock(&self.closed).values().cloned().collect();
        for entry in closed {
            let before = entry.machine().state();
            match self.event(&entry, Event::Tick) {
                Ok(generation) if entry.machine().state() != before => {
                    tracing::warn!(backend = %entry.name, generation,
                        state = entry.machine().state().label(),
                        "the hold's deadline passed: a closed gate drops packets until somebody flips or resumes");
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
        let Some(entry) = self.table().by_number.get(&number).cloned() else {
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
