//! One migration's hand on its backend's gate: [`Cutover`] over [`Control`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migrate::coordinator::{self, Cutover, CutoverError, HoldRequest};
use tokio::runtime::RuntimeFlavor;
use tokio_util::sync::CancellationToken;

use crate::control::{Control, ControlError, Policy, Refusal};

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
    done: Mutex<Done>,
    abort: CancellationToken,
}

impl MigrationCutover {
    pub(super) fn new(control: Arc<Control>, recovering: bool) -> Self {
        let done = Mutex::new(Done { fate: Fate::Open, held: recovering, opened: None });
        Self { control, recovering, done, abort: CancellationToken::new() }
    }

    fn done(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancelled by [`Self::abort`].
    pub(super) fn token(&self) -> CancellationToken {
        self.abort.clone()
    }

    /// Calls the migration off. False after the flip: there is no way back then. After true it never flips.
    pub(super) fn abort(&self) -> bool {
        let mut done = self.done();
        if done.fate == Fate::Flipped || self.recovering {
            return false;
        }
        done.fate = Fate::Aborted;
        self.abort.cancel();
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
    fn hold(&self, backend: &str, hold: HoldRequest) -> Result<u32, CutoverError> {
        let policy = match hold.policy {
            coordinator::Policy::Hold => Policy::Hold,
            coordinator::Policy::Drop => Policy::Drop,
        };
        let generation = self.control.hold(backend, policy, Some(hold.deadline)).map_err(refused)?;
        self.done().held = true;
        Ok(generation)
    }

    fn stage(&self, backend: &str, to_site: &str) -> Result<(), CutoverError> {
        let stage = || self.control.stage(backend, to_site).map_err(refused);
        // It may wait for the network; other migrations must not wait with it.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => {
                tokio::task::block_in_place(stage)
            }
            _ => stage(),
        }
    }

    fn flip(&self, backend: &str, generation: u32, to_site: &str) -> Result<u32, CutoverError> {
        // Held across the store, so that an abort comes before it or is too late.
        let mut done = self.done();
        if done.fate == Fate::Aborted {
            return Err(CutoverError("the migration was aborted".to_owned()));
        }
        let generation = self.control.flip(backend, generation, to_site).map_err(refused)?;
        done.fate = Fate::Flipped;
        done.opened = Some(generation);
        Ok(generation)
    }

    fn resume(&self, backend: &str, generation: u32) -> Result<u32, CutoverError> {
        let resumed = match self.control.resume(backend, generation) {
            // The former daemon came as far as opening it.
            Err(ControlError::Refused {
                refusal: Refusal::NotHeld { .. } | Refusal::Stale { .. }, ..
            }) if self.recovering && self.is_open(backend) => self.control.generation(backend),
            result => result,
        };
        let generation = resumed.map_err(refused)?;
        self.done().opened = Some(generation);
        Ok(generation)
    }
}

impl MigrationCutover {
    fn is_open(&self, backend: &str) -> bool {
        use crate::control::State;
        matches!(self.control.state(backend), Ok(State::Forward | State::Replaying))
    }
}
