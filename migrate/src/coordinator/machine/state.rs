//! Where a migration is. The steps carry their data.

use std::time::Duration;

use super::{Command, DOUBTFUL_PAUSE, FORWARD_LIMIT, RETRY_PAUSE};
use crate::coordinator::Outcome;

/// The steps before the flip. Each has the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Before {
    /// Staging the location and preparing the target.
    PreparingTarget,
    /// Preparing the source.
    PreparingSource,
    /// New connections are held; those in their handshake finish it, and the server accepts them.
    HoldingNew {
        /// Of the gate.
        generation: u32,
        /// When all is to be held.
        until: Duration,
    },
    /// Closing the gate.
    Holding {
        /// Of a gate that holds new connections already.
        generation: Option<u32>,
    },
    /// Drain, freeze, transfer and restore are the agents'; their reports come over two connections and
    /// may overtake each other, so only `Restored` decides anything here.
    Moving {
        /// Of the closed gate.
        generation: u32,
        /// When the hold's deadline passes.
        deadline: Duration,
    },
    /// Pointing the gate at the target.
    Flipping {
        /// Of the closed gate.
        generation: u32,
        /// The target's.
        offer: Offer,
    },
}

/// An offer of the target's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its number; `None` for one that a former coordinator had.
    pub number: Option<u32>,
    /// When it came. It was made before, so that after [`LEASE`](super::LEASE) from here nothing runs for it.
    pub came: Duration,
}

/// What is said to a site until it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asking {
    /// When an operator may be asked.
    pub give_up: Duration,
    /// When it is to be said again, if it failed.
    pub retry: Option<Duration>,
    /// The last failure.
    pub trouble: Option<String>,
}

impl Asking {
    pub(super) fn from(now: Duration) -> Self {
        Self { give_up: now + FORWARD_LIMIT, retry: None, trouble: None }
    }

    pub(super) fn failed(&mut self, trouble: String, now: Duration) {
        let pause = if now >= self.give_up { DOUBTFUL_PAUSE } else { RETRY_PAUSE };
        self.retry = Some(now + pause);
        self.trouble = Some(trouble);
    }

    /// Whether it is to be said again now.
    pub(super) fn is_due(&mut self, now: Duration) -> bool {
        let due = self.retry.is_some_and(|retry| now >= retry);
        if due {
            self.retry = None;
        }
        due
    }

    pub(super) fn trouble(&self) -> &str {
        self.trouble.as_deref().unwrap_or("no answer")
    }
}

/// The steps after the flip: forward only, but for an operator's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// The target is told to run.
    Starting {
        /// `go`, and after a failure `offer`.
        go: Asking,
        /// The last offer.
        offer: Offer,
        /// `confirm` has been said: the target may know that it is the one, whatever it answers now.
        confirmed: bool,
    },
    /// The target runs and is told that it is the one.
    Confirming {
        /// `confirm`.
        confirm: Asking,
        /// That was taken up.
        offer: Offer,
    },
    /// The source is told to go.
    Releasing(Asking),
}

/// On the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RollingBack {
    /// Why.
    pub reason: String,
    /// What is to be done with the gate once the source runs; `None` if there is nothing (more) to do.
    pub gate: Option<Closed>,
    /// The source has said that it runs.
    pub source_runs: bool,
    /// The target has said that it holds nothing, or cannot be reached.
    pub target_gone: bool,
    /// `abort`, said to the source.
    pub asking: Asking,
}

/// A closed gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// It points at the source.
    AtSource {
        /// The generation that the hold gave.
        generation: u32,
    },
    /// It was flipped, and points at the target.
    AtTarget {
        /// The generation that the second hold gave.
        generation: u32,
    },
    /// It was flipped and is about to be held again.
    Flipped,
}

impl Closed {
    /// What opens it to the source.
    pub(super) fn open(self) -> Command {
        match self {
            Self::AtSource { generation } => Command::ResumeGate { generation },
            Self::AtTarget { generation } => Command::FlipBack { generation },
            Self::Flipped => Command::Hold,
        }
    }
}

/// Where the migration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The flip has not happened.
    Before(Before),
    /// The flip has happened.
    After(After),
    /// It is being undone.
    RollingBack(RollingBack),
    /// It is over.
    Finished {
        /// How it ended.
        outcome: Outcome,
        /// Why, unless all went well.
        reason: Option<String>,
    },
}
