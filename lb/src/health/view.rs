//! What the admin API shows of health checks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::machine::Verdict;
use super::target::{Key, Target};
use crate::config::Probe;

/// What a check says of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    /// Nothing yet; the backend counts as up.
    Untried,
    /// The backend takes new flows.
    Up,
    /// It takes none.
    Down,
}

impl From<Verdict> for CheckState {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Untried => Self::Untried,
            Verdict::Up { .. } => Self::Up,
            Verdict::Down { .. } => Self::Down,
        }
    }
}

/// One check of a backend as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckView {
    /// The service whose way the probes take.
    pub service: String,
    /// `tcp`, `http` or `udp`; `resets` where nothing but resets is looked at.
    pub kind: String,
    /// What the check says.
    pub state: CheckState,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_unix_ms: u64,
    /// Whether the check rests because the backend's gate is closed or it moves.
    pub suspended: bool,
    /// Probes that came to a result.
    pub probes: u64,
    /// Those of them that failed, and windows with too many resets.
    pub failures: u64,
    /// How long the last good answer took, in microseconds.
    pub answer_us: Option<u64>,
    /// What the last failure was.
    pub last_error: Option<String>,
    /// When it was, in milliseconds since the Unix epoch.
    pub last_error_unix_ms: Option<u64>,
}

impl CheckView {
    /// A check that has found out nothing.
    pub(super) fn new(target: &Target) -> Self {
        let kind = match target.check.probe {
            Some(Probe::Tcp) => "tcp",
            Some(Probe::Http { .. }) => "http",
            Some(Probe::Udp { .. }) => "udp",
            None => "resets",
        };
        Self {
            service: target.service.clone(),
            kind: kind.to_owned(),
            state: CheckState::Untried,
            since_unix_ms: unix_ms(),
            suspended: false,
            probes: 0,
            failures: 0,
            answer_us: None,
            last_error: None,
            last_error_unix_ms: None,
        }
    }

    /// Takes what the machine says.
    pub(super) fn turn(&mut self, verdict: Verdict) {
        let state = verdict.into();
        if self.state != state {
            self.state = state;
            self.since_unix_ms = unix_ms();
        }
    }

    /// Takes a failure in plain words.
    pub(super) fn failed(&mut self, words: String) {
        self.failures += 1;
        self.error(words);
    }

    /// Takes words about what did not work, without counting it against the backend.
    pub(super) fn error(&mut self, words: String) {
        self.last_error = Some(words);
        self.last_error_unix_ms = Some(unix_ms());
    }

    /// Takes a good answer.
    pub(super) fn answered(&mut self, after: Duration) {
        self.answer_us = Some(u64::try_from(after.as_micros()).unwrap_or(u64::MAX));
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Where the scheduler writes and the admin API reads.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<BTreeMap<Key, CheckView>>>);

impl Board {
    pub(super) fn views(&self) -> MutexGuard<'_, BTreeMap<Key, CheckView>> {
        // A view is changed field by field; one that a panic left half-changed is still one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A board with one check, which has failed once.
    #[cfg(test)]
    pub(crate) fn of_one(backend: &str, service: &str, error: &str) -> Self {
        let mut view = CheckView {
            service: service.to_owned(),
            kind: "tcp".to_owned(),
            state: CheckState::Up,
            since_unix_ms: 1,
            suspended: false,
            probes: 2,
            failures: 0,
            answer_us: Some(300),
            last_error: None,
            last_error_unix_ms: None,
        };
        view.failed(error.to_owned());
        let board = Self::default();
        board.views().insert(Key { backend: backend.into(), service: service.into() }, view);
        board
    }

    /// The checks of a backend.
    pub fn of(&self, backend: &str) -> Vec<CheckView> {
        let from = Key { backend: backend.into(), service: "".into() };
        let views = self.views();
        let own = views.range(from..).take_while(|(key, _)| &*key.backend == backend);
        own.map(|(_, view)| view.clone()).collect()
    }
}
