//! What the machine is told, and what it says.

use serde::{Deserialize, Serialize};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    /// The target waits for images.
    TargetPrepared,
    /// The source's memory goes over: nobody has forgotten it.
    SourceCopies,
    /// The source's CRIU waits to freeze it.
    SourcePrepared,
    /// The gate holds new connections.
    HeldNew {
        /// The gate's new generation.
        generation: u32,
    },
    /// The gate holds.
    Held {
        /// The gate's new generation.
        generation: u32,
    },
    /// The source: its queues are empty.
    Drained,
    /// The source: no task runs.
    Frozen,
    /// The source: the images are complete.
    Dumped,
    /// The target: the images are here.
    Received,
    /// The target: restored, or suspended; not running.
    Restored {
        /// Number of its offer.
        offer: u32,
    },
    /// The gate points at the target.
    Flipped,
    /// The gate could not be staged, held or flipped.
    CutoverRefused(String),
    /// The target: its tasks run.
    Running,
    /// The target: it knows that it is the one.
    Confirmed,
    /// The source is gone.
    Released,
    /// The source runs again.
    SourceResumed,
    /// The target holds nothing any more.
    TargetDropped,
    /// The gate is open to the source again, be it by [`Command::ResumeGate`] or [`Command::FlipBack`].
    GateResumed,
    /// The gate could not be opened again.
    ResumeRefused(String),
    /// The source cannot be released yet: the target still fetches memory from it.
    SourceIndebted(String),
    /// The source said that it failed, or its agent cannot be reached.
    SourceFailed(String),
    /// The target said that it failed, or its agent cannot be reached.
    TargetFailed(String),
    /// An operator wants it to end.
    Abort,
    /// An operator says how a migration in doubt ends; see [`Machine::may_resolve`](super::Machine::may_resolve).
    Resolve(Verdict),
    /// Nothing happened; time went on.
    Tick,
}

/// An operator's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, PartialOrd, Ord, Hash)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The target has the copy that counts, and the operator has seen it run.
    Committed,
    /// The source has. On the way back already: the operator has seen it run, and nothing in its agent that would stop it.
    RolledBack,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stage the target's location, then ask the target to prepare.
    PrepareTarget,
    /// Ask the source to prepare.
    PrepareSource,
    /// Close the gate for new connections.
    HoldNew,
    /// Close the gate.
    Hold,
    /// Ask the source to drain, freeze, dump and send.
    Freeze,
    /// Point the gate at the target.
    Flip {
        /// The generation that the hold gave.
        generation: u32,
    },
    /// Ask the target for another offer; the answer is [`Event::Restored`].
    Offer,
    /// Let the target run, until [`LEASE`](super::LEASE) after it made the offer.
    Go {
        /// The offer.
        offer: u32,
    },
    /// Take the target's lease off.
    Confirm,
    /// Let the source die.
    Release,
    /// Let the source run again.
    ResumeSource,
    /// Let the target forget.
    DropTarget,
    /// Open the gate where it was.
    ResumeGate {
        /// The generation that the hold gave.
        generation: u32,
    },
    /// Point a gate that was flipped, and is held again, at the source.
    FlipBack {
        /// The generation that the second hold gave.
        generation: u32,
    },
}
