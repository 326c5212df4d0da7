//! One migration as the admin API shows it, while it runs and afterwards.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, Stream};
use migrate::coordinator::{Outcome, Report};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::cutover::MigrationCutover;
use super::journal::{Entry, Step};

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// It is under way.
    Running,
    /// The backend runs at the target.
    Committed,
    /// The backend runs where it was.
    RolledBack,
    /// An operator is wanted. It may still be under way, and end by itself.
    InDoubt,
}

impl From<Outcome> for MigrationState {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Committed => Self::Committed,
            Outcome::RolledBack => Self::RolledBack,
            Outcome::InDoubt => Self::InDoubt,
        }
    }
}

/// A phase and its times, in milliseconds since the migration's start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseView {
    /// Its name.
    pub name: String,
    /// Its start.
    pub start_ms: f64,
    /// Its end; `null` while it lasts.
    pub end_ms: Option<f64>,
}

/// What a migration came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportView {
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless all went well.
    pub reason: Option<String>,
    /// Every phase, in order.
    pub phases: Vec<PhaseView>,
    /// Length of the freeze window in milliseconds; 0 if nothing was frozen.
    pub freeze_ms: f64,
    /// From the arrival of the target's report to the store of the gate word, in microseconds.
    pub flip_us: f64,
    /// When the freeze window began, microseconds since the Unix epoch.
    pub frozen_at_unix_us: Option<i64>,
    /// When it ended, microseconds since the Unix epoch.
    pub running_at_unix_us: Option<i64>,
    /// Bytes of the checkpoint.
    pub image_bytes: u64,
    /// Bytes that were sent from site to site.
    pub sent_bytes: u64,
    /// How long the running server still fetched memory from the site that it had left, in milliseconds; 0 if it brought
    /// all of it along.
    #[serde(default)]
    pub exposed_ms: f64,
    /// Packets that were held.
    pub held_packets: u64,
    /// Bytes that were held.
    pub held_bytes: u64,
    /// Packets that the hold dropped.
    pub dropped_packets: u64,
    /// Held packets that were sent on.
    pub replayed_packets: u64,
    /// From the store of the gate word to the first held packet leaving, in microseconds; `null` if nothing
    /// was held.
    pub first_replay_us: Option<f64>,
}

impl ReportView {
    pub(super) fn new(report: Report, counts: Counts) -> Self {
        let phase = |phase: &migrate::coordinator::PhaseTime| PhaseView {
            name: phase.name.to_owned(),
            start_ms: phase.start_ms,
            end_ms: Some(phase.end_ms),
        };
        let stats = counts.stats;
        Self {
            outcome: report.outcome,
            reason: report.reason,
            phases: report.phases.iter().map(phase).collect(),
            freeze_ms: report.freeze_ms,
            flip_us: report.flip_us,
            frozen_at_unix_us: report.frozen_at_unix_us,
            running_at_unix_us: report.running_at_unix_us,
            image_bytes: report.image_bytes,
            sent_bytes: report.sent_bytes,
            exposed_ms: report.exposed_ms,
            held_packets: stats.held_packets,
            held_bytes: stats.held_bytes,
            dropped_packets: stats.dropped_packets,
            replayed_packets: stats.replayed_packets,
            first_replay_us: counts.first_replay.map(|after| after.as_secs_f64() * 1e6),
        }
    }
}

/// What the datapath counted of a migration.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) stats: crate::datapath::HoldStats,
    pub(super) first_replay: Option<std::time::Duration>,
}

/// A migration as the admin API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationView {
    /// Its id.
    pub id: String,
    /// The backend that moves.
    pub backend: String,
    /// From this site.
    pub from: String,
    /// To this one.
    pub to: String,
    /// When it began, microseconds since the Unix epoch.
    pub started_at_unix_us: u64,
    /// Where it stands.
    pub state: MigrationState,
    /// While it is in doubt and goes on asking: why.
    pub doubt: Option<String>,
    /// Its phases so far.
    pub phases: Vec<PhaseView>,
    /// What it came to; `null` while it runs.
    pub report: Option<ReportView>,
}

/// Something that a follower of a migration is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// A phase began or ended.
    Phase(PhaseView),
    /// It is in doubt, for this reason; it goes on.
    Doubt(String),
    /// It is over.
    Finished(Box<MigrationView>),
}

#[derive(Default)]
struct Log {
    /// Begins and ends of phases, and doubts, as they came.
    told: Vec<Told>,
    /// The doubt that it is in.
    doubt: Option<String>,
    report: Option<ReportView>,
}

impl Log {
    fn state(&self) -> MigrationState {
        match (&self.report, &self.doubt) {
            (Some(report), _) => report.outcome.into(),
            (None, Some(_)) => MigrationState::InDoubt,
            (None, None) => MigrationState::Running,
        }
    }
}

/// One migration.
pub struct Migration {
    /// Its id.
    pub id: String,
    /// The backend that moves.
    pub backend: String,
    /// From this site.
    pub from: String,
    /// To this one.
    pub to: String,
    /// When it began, microseconds since the Unix epoch.
    pub started_at_unix_us: u64,
    /// Its hand on the gate; none where a former daemon ended it.
    pub(super) cutover: Option<Arc<MigrationCutover>>,
    log: Mutex<Log>,
    changed: watch::Sender<()>,
}

impl Migration {
    /// One that begins, or goes on.
    pub(super) fn new(entry: Entry, cutover: Arc<MigrationCutover>) -> Self {
        Self { cutover: Some(cutover), ..Self::remembered(entry) }
    }

    /// One that a former daemon wrote down.
    pub(super) fn remembered(entry: Entry) -> Self {
        let Entry { id, backend, from, to, started_at_unix_us, step: _, report } = entry;
        let log = Mutex::new(Log { report, ..Log::default() });
        Self {
            id,
            backend,
            from,
            to,
            started_at_unix_us,
            cutover: None,
            log,
            changed: watch::Sender::new(()),
        }
    }

    /// What the journal says of it, at its end.
    pub(super) fn ended(&self, report: &ReportView) -> Entry {
        Entry {
            id: self.id.clone(),
            backend: self.backend.clone(),
            from: self.from.clone(),
            to: self.to.clone(),
            started_at_unix_us: self.started_at_unix_us,
            step: Step::Ended,
            report: Some(report.clone()),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self, phase: PhaseView) {
        self.log().told.push(Told::Phase(phase));
        self.changed.send_replace(());
    }

    pub(super) fn doubt(&self, doubt: Option<String>) {
        let mut log = self.log();
        log.told.extend(doubt.clone().map(Told::Doubt));
        log.doubt = doubt;
        drop(log);
        self.changed.send_replace(());
    }

    pub(super) fn finish(&self, report: ReportView) {
        let mut log = self.log();
        log.report = Some(report);
        log.doubt = None;
        drop(log);
        self.changed.send_replace(());
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.log().report.is_some()
    }

    /// The migration as it is now.
    pub fn view(&self) -> MigrationView {
        let log = self.log();
        let mut phases: Vec<PhaseView> = Vec::new();
        for told in &log.told {
            let Told::Phase(phase) = told else { continue };
            match phases.last_mut() {
                Some(last) if last.end_ms.is_none() && last.name == phase.name => *last = phase.clone(),
                _ => phases.push(phase.clone()),
            }
        }
        MigrationView {
            id: self.id.clone(),
            backend: self.backend.clone(),
            from: self.from.clone(),
            to: self.to.clone(),
            started_at_unix_us: self.started_at_unix_us,
            state: log.state(),
            doubt: log.doubt.clone(),
            phases: log.report.as_ref().map_or(phases, |report| report.phases.clone()),
            report: log.report.clone(),
        }
    }

    /// Everything that has happened and happens, from the first phase on; ends after [`Told::Finished`].
    pub fn follow(self: Arc<Self>) -> impl Stream<Item = Told> + Send + 'static {
        let changes = self.changed.subscribe();
        stream::unfold(Some((self, changes, 0)), |follower| async move {
            let (migration, mut changes, told) = follower?;
            loop {
                changes.borrow_and_update();
                let (next, finished) = {
                    let log = migration.log();
                    (log.told.get(told).cloned(), log.report.is_some())
                };
                if let Some(next) = next {
                    return Some((next, Some((migration, changes, told + 1))));
                }
                if finished {
                    return Some((Told::Finished(Box::new(migration.view())), None));
                }
                changes.changed().await.ok()?;
            }
        })
    }
}
