//! The migrations of this load balancer: at most one per backend at a time, and the finished ones that are
//! still remembered.
//!
//! The `migrate` crate runs a migration; here it is started, written down (`journal`), watched, aborted and reported,
//! and after a restart of the daemon what a former one left behind is brought to an end (`recovery`). Not here: what a
//! migration does to the gate (`control`), and HTTP (`admin`).

mod coordinator;
mod cutover;
mod journal;
mod migration;
mod recovery;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migrate::coordinator::{DEFAULT_DRAIN, HoldRequest, Orders, Outcome, Progress, Report, Spec, Verdict};
use migrate::system;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_util::task::TaskTracker;

pub use coordinator::{Agents, Coordinator, Leftover};
pub use journal::{Journal, JournalError};
pub use migration::{Migration, MigrationState, MigrationView, PhaseView, ReportView, Told};

use crate::cli::chain;
use crate::config::Current;
use crate::control::{Control, ControlError, Policy, State};
use crate::datapath::Protocol;
use cutover::{MigrationCutover, blocking};
use journal::{Entry, Step};
use migration::Counts;

/// How many finished migrations are remembered.
const REMEMBERED: usize = 256;
/// How long the report of a finished migration waits for the end of its replay.
const REPLAY_PATIENCE: Duration = Duration::from_secs(30);

/// A wish for a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The backend that is to move.
    pub backend: String,
    /// The site where it is to go.
    pub to: String,
    /// What happens to its packets meanwhile.
    pub policy: Policy,
    /// How long they may be held; `None` for the configuration's default.
    pub deadline: Option<Duration>,
}

/// Why a migration does not start, or does not stop.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The backend or the site is not in the configuration.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// There is nobody at the site to migrate with.
    #[error(
        "site {site:?} has no agent: start `migrate agent` there and set agent = \"https://HOST:PORT\" in its [[sites]] table"
    )]
    NoAgent {
        /// The site.
        site: String,
    },
    /// The target is where the backend is.
    #[error("backend {backend:?} runs at site {site:?} already")]
    SameLocation {
        /// The backend.
        backend: String,
        /// The site.
        site: String,
    },
    /// The tables say that the backend is at a site which the configuration does not have.
    #[error(
        "backend {backend:?} runs at a site that the configuration no longer has; put its [[sites]] table back and restart"
    )]
    LostLocation {
        /// The backend.
        backend: String,
    },
    /// One at a time.
    #[error(
        "migration {id} of backend {backend:?} is under way; wait for it or abort it (DELETE /v1/migrations/{id})"
    )]
    UnderWay {
        /// The backend.
        backend: String,
        /// The migration.
        id: String,
    },
    /// Somebody holds the backend by hand.
    #[error("backend {backend:?} is {state}; a migration starts from an open gate: flip or resume it first")]
    NotForward {
        /// The backend.
        backend: String,
        /// The state's name.
        state: &'static str,
    },
    /// An operator's word that is not taken.
    #[error("migration {id} cannot be resolved like that: {reason}")]
    NotResolvable {
        /// The migration.
        id: String,
        /// Why not.
        reason: String,
    },
    /// It could not be written down.
    #[error("nothing is begun that cannot be written down")]
    Journal(#[from] JournalError),
    /// The daemon is about to end.
    #[error("the load balancer is stopping and starts no more migrations")]
    Stopping,
    /// Never heard of, or forgotten.
    #[error("there is no migration {0:?}")]
    UnknownMigration(String),
    /// Too late to abort.
    #[error("migration {id} {what}; there is nothing to abort")]
    NotAbortable {
        /// The migration.
        id: String,
        /// Why not.
        what: &'static str,
    },
}

#[derive(Default)]
struct Inner {
    /// In the order of their start, since ids grow.
    all: BTreeMap<String, Arc<Migration>>,
    /// Id of the one under way, by backend.
    active: HashMap<String, String>,
    last_id: u64,
    stopping: bool,
    outcomes: Outcomes,
}

/// How many migrations have ended in which way since the daemon's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// Committed.
    pub committed: u64,
    /// Rolled back.
    pub rolled_back: u64,
    /// In doubt.
    pub in_doubt: u64,
}

/// The migrations.
pub struct Migrations {
    control: Arc<Control>,
    config: Current,
    coordinator: Arc<dyn Coordinator>,
    journal: Arc<Journal>,
    inner: Mutex<Inner>,
    tasks: TaskTracker,
}

impl Migrations {
    /// None yet.
    pub fn new(
        control: Arc<Control>,
        config: Current,
        coordinator: Arc<dyn Coordinator>,
        journal: Journal,
    ) -> Self {
        let journal = Arc::new(journal);
        Self { control, config, coordinator, journal, inner: Mutex::default(), tasks: TaskTracker::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a migration, or says why not and changes nothing.
    pub fn start(self: &Arc<Self>, wish: &Wish) -> Result<Arc<Migration>, MigrationError> {
        let backend = &wish.backend;
        let state = self.control.state(backend)?;
        if !self.control.knows_site(&wish.to) {
            return Err(ControlError::UnknownSite(wish.to.clone()).into());
        }
        let mut inner = self.inner();
        if inner.stopping {
            return Err(MigrationError::Stopping);
        }
        inner.free(backend)?;
        let (from, _) = self.control.sites_of(backend)?;
        let from = from.ok_or_else(|| MigrationError::LostLocation { backend: backend.clone() })?;
        if from == wish.to {
            return Err(MigrationError::SameLocation { backend: backend.clone(), site: from });
        }
        if state != State::Forward {
            return Err(MigrationError::NotForward { backend: backend.clone(), state: state.label() });
        }
        let hold = HoldRequest {
            deadline: wish.deadline.unwrap_or(self.config.get().hold.deadline),
            policy: match wish.policy {
                Policy::Hold => migrate::coordinator::Policy::Hold,
                Policy::Drop => migrate::coordinator::Policy::Drop,
            },
        };
        let spec = self.spec(inner.new_id(), backend, &from, &wish.to, hold)?;
        let entry = Entry {
            id: spec.id.clone(),
            backend: backend.clone(),
            from,
            to: wish.to.clone(),
            started_at_unix_us: now_unix_us(),
            step: Step::Begun,
            report: None,
        };
        blocking(|| self.journal.begin(&entry))?;
        let Registered { migration, cutover, orders } = self.register(&mut inner, entry, false);
        drop(inner);
        tracing::info!(id = %migration.id, %backend, from = %migration.from, to = %wish.to, "migration started");
        let (tell, progress) = unbounded_channel();
        let run = self.coordinator.run(spec, cutover, orders, tell);
        self.watch(migration.clone(), run, progress);
        Ok(migration)
    }

    fn register(&self, inner: &mut Inner, entry: Entry, recovering: bool) -> Registered {
        let (control, journal) = (self.control.clone(), self.journal.clone());
        let (cutover, orders) = MigrationCutover::new(control, journal, entry.id.clone(), recovering);
        let migration = Arc::new(Migration::new(entry, cutover.clone()));
        inner.active.insert(migration.backend.clone(), migration.id.clone());
        inner.all.insert(migration.id.clone(), migration.clone());
        Registered { migration, cutover, orders }
    }

    fn spec(
        &self,
        id: String,
        backend: &str,
        source: &str,
        target: &str,
        hold: HoldRequest,
    ) -> Result<Spec, MigrationError> {
        let agent = |site: &str| {
            let at = self.config.get().agent_at(site);
            at.ok_or_else(|| MigrationError::NoAgent { site: site.to_owned() })
        };
        let (protocol, handshakes) = match self.config.get().protocol_of(backend) {
            Protocol::Tcp => (migrate::coordinator::Protocol::Tcp, self.control.hold_defaults().handshakes),
            // A datagram needs no other one: what the server has read is in the checkpoint.
            Protocol::Udp => (migrate::coordinator::Protocol::Udp, Duration::ZERO),
        };
        Ok(Spec {
            id,
            backend: backend.to_owned(),
            address: self.control.view(backend)?.address,
            protocol,
            source: agent(source)?,
            target: agent(target)?,
            hold,
            handshakes,
            drain: DEFAULT_DRAIN,
        })
    }

    /// Lets a migration run in the background and writes down what it tells.
    fn watch(
        self: &Arc<Self>,
        migration: Arc<Migration>,
        run: impl Future<Output = Report> + Send + 'static,
        mut progress: UnboundedReceiver<Progress>,
    ) {
        let this = self.clone();
        system::spawn(self.tasks.track_future(async move {
            let mut run = system::spawn(run);
            let mut open = true;
            let report = loop {
                tokio::select! {
                    biased;
                    told = progress.recv(), if open => match told {
                        Some(Progress::Phase { name, start_ms, end_ms }) => {
                            migration.phase(PhaseView { name: name.to_owned(), start_ms, end_ms });
                        }
                        Some(Progress::Doubt(doubt)) => migration.doubt(doubt),
                        Some(Progress::Finished(_)) => {}
                        None => open = false,
                    },
                    report = &mut run => break report,
                }
            };
            let report = report.unwrap_or_else(|panic| broken(&panic));
            this.finish(&migration, report).await;
        }));
    }

    async fn finish(&self, migration: &Migration, report: Report) {
        let mut counts = Counts::default();
        let cutover = migration.cutover.as_ref();
        if cutover.is_some_and(|cutover| cutover.held()) {
            counts.stats = self.control.hold_stats(&migration.backend).unwrap_or_default();
        }
        if let Some(generation) = cutover.and_then(|cutover| cutover.opened()) {
            let replaying =
                self.control.state(&migration.backend).is_ok_and(|state| state == State::Replaying);
            let patience = if replaying { REPLAY_PATIENCE } else { Duration::ZERO };
            match self.control.replay_ended(&migration.backend, generation, patience).await {
                Some(replay) => {
                    counts.stats = replay.ended.unwrap_or(counts.stats);
                    counts.first_replay = replay.first_after;
                }
                None if replaying => {
                    tracing::error!(id = %migration.id, "the replay has not ended; the report lacks its counts");
                }
                None => {}
            }
        }
        let report = ReportView::new(report, counts);
        let (id, backend, outcome) = (&migration.id, &migration.backend, report.outcome);
        let reason = report.reason.as_deref().unwrap_or_default();
        match outcome {
            Outcome::Committed => tracing::info!(%id, %backend, freeze_ms = report.freeze_ms,
                flip_us = report.flip_us, "migration committed"),
            Outcome::RolledBack => tracing::warn!(%id, %backend, reason, "migration rolled back"),
            Outcome::InDoubt => tracing::error!(%id, %backend, reason, "migration in doubt"),
        }
        if let Err(error) = blocking(|| self.journal.end(&migration.ended(&report), REMEMBERED)) {
            tracing::error!(%id, "{}: the next daemon will look after it again", chain(&error));
        }
        // Whoever reads of the end may start the next one.
        let mut inner = self.inner();
        inner.active.remove(backend);
        match outcome {
            Outcome::Committed => inner.outcomes.committed += 1,
            Outcome::RolledBack => inner.outcomes.rolled_back += 1,
            Outcome::InDoubt => inner.outcomes.in_doubt += 1,
        }
        migration.finish(report);
        inner.forget();
    }

    /// Calls a migration off, as long as it has not flipped.
    pub fn abort(&self, id: &str) -> Result<Arc<Migration>, MigrationError> {
        let migration = self.get(id)?;
        let not = |what| MigrationError::NotAbortable { id: id.to_owned(), what };
        let Some(cutover) = migration.cutover.as_ref().filter(|_| !migration.is_over()) else {
            return Err(not("is not under way"));
        };
        if !cutover.abort() {
            return Err(not("is past its flip and only goes forward"));
        }
        tracing::info!(%id, "abort");
        Ok(migration)
    }

    /// Takes an operator's word on how a migration in doubt ends, or says why not.
    pub async fn resolve(&self, id: &str, verdict: Verdict) -> Result<Arc<Migration>, MigrationError> {
        let migration = self.get(id)?;
        let not = |reason| MigrationError::NotResolvable { id: id.to_owned(), reason };
        if migration.is_over() {
            return Err(not("it has ended".to_owned()));
        }
        let unknown = || not("the load balancer could not take it up; see why, and start it anew".to_owned());
        let cutover = migration.cutover.as_ref().ok_or_else(unknown)?;
        cutover.resolve(verdict).await.map_err(not)?;
        tracing::warn!(%id, ?verdict, "resolved by an operator");
        Ok(migration)
    }

    /// A migration by id.
    pub fn get(&self, id: &str) -> Result<Arc<Migration>, MigrationError> {
        self.inner().all.get(id).cloned().ok_or_else(|| MigrationError::UnknownMigration(id.to_owned()))
    }

    /// All that are remembered, the oldest first.
    pub fn all(&self) -> Vec<Arc<Migration>> {
        self.inner().all.values().cloned().collect()
    }

    /// How the ones that have ended ended.
    pub fn outcomes(&self) -> Outcomes {
        self.inner().outcomes
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        self.inner().active.len()
    }

    /// Does something to a backend's gate by hand, unless a migration has its hand on it.
    pub fn unless_under_way<T>(
        &self,
        backend: &str,
        act: impl FnOnce(&Control) -> Result<T, ControlError>,
    ) -> Result<T, MigrationError> {
        let inner = self.inner();
        inner.free(backend)?;
        Ok(act(&self.control)?)
    }

    /// Whether a migration of a backend is under way.
    pub fn is_under_way(&self, backend: &str) -> bool {
        self.inner().active.contains_key(backend)
    }

    /// Starts no more, aborts those that can be aborted, and waits for all to end. Whether they did.
    pub async fn stop(&self, patience: Duration) -> bool {
        let under_way: Vec<_> = {
            let mut inner = self.inner();
            inner.stopping = true;
            inner.active.values().filter_map(|id| inner.all.get(id).cloned()).collect()
        };
        for migration in under_way {
            let aborted = migration.cutover.as_ref().is_some_and(|cutover| cutover.abort());
            tracing::info!(id = %migration.id, aborted, "waiting for a migration to end");
        }
        self.tasks.close();
        tokio::time::timeout(patience, self.tasks.wait()).await.is_ok()
    }
}

/// A migration and what its coordinator gets.
struct Registered {
    migration: Arc<Migration>,
    cutover: Arc<MigrationCutover>,
    orders: Orders,
}

impl Inner {
    fn free(&self, backend: &str) -> Result<(), MigrationError> {
        match self.active.get(backend) {
            Some(id) => Err(MigrationError::UnderWay { backend: backend.to_owned(), id: id.clone() }),
            None => Ok(()),
        }
    }

    /// Microseconds since the epoch, so that ids do not come again after a restart; they grow.
    fn new_id(&mut self) -> String {
        self.last_id = now_unix_us().max(self.last_id + 1);
        format!("m-{:x}", self.last_id)
    }

    /// Drops the oldest of the finished ones beyond those remembered.
    fn forget(&mut self) {
        let excess = self.all.values().filter(|m| m.is_over()).count().saturating_sub(REMEMBERED);
        let oldest: Vec<String> =
            self.all.iter().filter(|(_, m)| m.is_over()).take(excess).map(|(id, _)| id.clone()).collect();
        for id in oldest {
            self.all.remove(&id);
        }
    }
}

/// Microseconds since the Unix epoch.
fn now_unix_us() -> u64 {
    u64::try_from(system::now_unix_us()).unwrap_or(0)
}

/// The report of a coordinator that did not come to its end.
fn broken(panic: &tokio::task::JoinError) -> Report {
    Report {
        outcome: Outcome::InDoubt,
        reason: Some(format!(
            "the coordinator broke off ({panic}); look at the workload at both sites, then flip or resume by hand"
        )),
        phases: Vec::new(),
        freeze_ms: 0.0,
        flip_us: 0.0,
        frozen_at_unix_us: None,
        running_at_unix_us: None,
        image_bytes: 0,
        sent_bytes: 0,
        exposed_ms: 0.0,
    }
}

#[cfg(test)]
mod script;
#[cfg(test)]
mod simulation;
#[cfg(test)]
pub(crate) use script::{Play, Script};
#[cfg(test)]
mod tests;
