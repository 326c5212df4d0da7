//! One migration's hand on its backend's gate: [`Cutover`] over [`Control`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migrate::coordinator::{self, Cutover, CutoverError, Decision, HoldRequest, Operator, Orders, Verdict};
use tokio::runtime::RuntimeFlavor;

use super::journal::Journal;
use crate::cli::chain;
use crate::control::{Control, ControlError, Policy, Refusal, State};

/// Whether the migration can still be called off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Aborted,
    Flipped,
}

/// What the migration has done to the gate.
#[derive(Clone, Copy, Debug)]
struct Done {
    fate: Fate,
    /// Whether the gate was ever closed for this migration.
    held: bool,
    /// The generation of the flip or resume that opened it.
    opened: Option<u32>,
}

/// One migration's hand on its backend's gate.
pub(super) struct MigrationCutover {
    control: Arc<Control>,
    /// A migration of a former daemon: its gate may be open already.
    recovering: bool,
    id: String,
    journal: Arc<Journal>,
    done: Mutex<Done>,
    operator: Operator,
}

impl MigrationCutover {
    pub(super) fn new(
        control: Arc<Control>,
        journal: Arc<Journal>,
        id: String,
        recovering: bool,
    ) -> (Arc<Self>, Orders) {
        let done = Mutex::new(Done { fate: Fate::Open, held: recovering, opened: None });
        let (operator, orders) = Operator::new();
        (Arc::new(Self { control, recovering, id, journal, done, operator }), orders)
    }

    fn done(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how the migration ends, if it is in doubt; else why that cannot be.
    pub(super) async fn resolve(&self, verdict: Verdict) -> Result<(), String> {
        self.operator.resolve(verdict).await
    }

    /// Calls the migration off. False after the flip: there is no way back then. After true it never flips.
    pub(super) fn abort(&self) -> bool {
        let mut done = self.done();
        if done.fate == Fate::Flipped || self.recovering {
            return false;
        }
        done.fate = Fate::Aborted;
        self.operator.abort();
        true
    }

    /// Whether the gate was ever closed for this migration.
    pub(super) fn held(&self) -> bool {
        self.done().held
    }

    /// The generation of the flip or resume that opened the gate.
    pub(super) fn opened(&self) -> Option<u32> {
        self.done().opened
    }
}

fn refused(error: ControlError) -> CutoverError {
    CutoverError(error.to_string())
}

impl Cutover for MigrationCutover {
    fn hold_new(&self, backend: &str, deadline: Duration) -> Result<u32, CutoverError> {
        self.control.hold_new(backend, deadline).map_err(refused)
    }

    fn hold(&self, backend: &str, hold: HoldRequest) -> Result<u32, CutoverError> {
        let policy = match hold.policy {
            coordinator::Policy::Hold => Policy::Hold,
            coordinator::Policy::Drop => Policy::Drop,
        };
        // On the way back, which a former daemon may have begun.
        if self.recovering && self.is_held(backend) {
            return self.control.generation(backend).map_err(refused);
        }
        let generation = self.control.hold(backend, policy, Some(hold.deadline)).map_err(refused)?;
        self.done().held = true;
        Ok(generation)
    }

    fn stage(&self, backend: &str, to_site: &str) -> Result<(), CutoverError> {
        blocking(|| self.control.stage(backend, to_site).map_err(refused))
    }

    fn flip(&self, backend: &str, generation: u32, to_site: &str) -> Result<u32, CutoverError> {
        // Held across the store, so that an abort comes before it or is too late.
        let mut done = self.done();
        if done.fate == Fate::Aborted {
            return Err(CutoverError("the migration was aborted".to_owned()));
        }
        let is_way_back = done.fate == Fate::Flipped || self.recovering;
        let flipped = match self.control.flip(backend, generation, to_site) {
            // It drops packets by now. The source is known to run, so there is nothing else to wait for.
            Err(ControlError::Refused { refusal: Refusal::DeadlinePassed { current }, .. })
                if is_way_back =>
            {
                self.control.flip(backend, current, to_site)
            }
            flipped => flipped,
        };
        let generation = flipped.map_err(refused)?;
        done.fate = Fate::Flipped;
        done.opened = Some(generation);
        Ok(generation)
    }

    fn resume(&self, backend: &str, generation: u32) -> Result<u32, CutoverError> {
        let resumed = match self.control.resume(backend, generation) {
            // The former daemon came as far as opening it, or a hold of new connections did so by itself.
            Err(ControlError::Refused {
                refusal: Refusal::NotHeld { .. } | Refusal::Stale { .. }, ..
            }) if (self.recovering || !self.held()) && self.is_open(backend) => {
                self.control.generation(backend)
            }
            result => result,
        };
        let generation = resumed.map_err(refused)?;
        self.done().opened = Some(generation);
        Ok(generation)
    }

    fn record(&self, decision: Decision) -> Result<(), CutoverError> {
        let written = blocking(|| self.journal.reach(&self.id, decision.into()));
        written.map_err(|error| CutoverError(chain(&error)))
    }
}

impl MigrationCutover {
    fn is_open(&self, backend: &str) -> bool {
        matches!(self.control.state(backend), Ok(State::Forward | State::Replaying))
    }

    fn is_held(&self, backend: &str) -> bool {
        matches!(self.control.state(backend), Ok(State::Holding { .. } | State::Expired { .. }))
    }
}

/// Does something that waits for a disk or the network, and lets other migrations go on meanwhile.
pub(super) fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => {
            tokio::task::block_in_place(work)
        }
        _ => work(),
    }
}
