//! The target of a migration: the workload is to run here.
//!
//! ```text
//! Before:    Waiting -> Restoring -> Restored --go--> Committed: Starting -> Running <--go-- Suspended
//!               \___________\___________\----> Dropping -> Dropped   \-> Lost    \---lease ends---^
//! ```
//!
//! `Restored` is CRIU waiting in its pre-resume hook: the connections are out of repair mode and not one
//! instruction has run. Once that is reported, only the coordinator says what becomes of the copy.
//!
//! `go` is the point of no return, and it is a lease: unless `confirm` follows, the copy is suspended when the lease
//! ends. It is the newest state there is, so it is never thrown away for that: another `go` sets it running again, and
//! only an operator's word, which comes as [`Event::Abort`], ends it.
//!
//! A `go` may have been on its way for long. So it takes up an offer of the target's, by number, and leases begin with
//! the offer and not with `go`: whoever got the offer knows a time after which nothing runs that was not confirmed.

use crate::protocol::{AgentEvent, Running};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    /// The end mark came, and everything before it.
    ImagesComplete {
        /// Bytes on the wire.
        sent_bytes: u64,
    },
    /// The stream broke off or made no sense.
    ImagesFailed(String),
    /// CRIU's pre-resume hook: restored, stopped.
    HookPreResume,
    /// CRIU's post-resume hook: the tasks run.
    HookPostResume {
        /// `CLOCK_REALTIME`.
        at_unix_us: i64,
    },
    /// CRIU has ended.
    CriuEnded {
        /// Why it failed, if it did.
        failed: Option<String>,
    },
    /// The coordinator: make another offer.
    Offer,
    /// The coordinator: the gate points here. Run, until the lease ends.
    Go {
        /// The offer that it takes up.
        offer: u32,
    },
    /// The coordinator: it is known that this copy runs, and it is the one.
    Confirm,
    /// The coordinator: forget it.
    Abort,
    /// The coordinator has been silent for too long, or the last offer's time is over.
    Expired,
    /// Everything that was restored or received is gone.
    Dropped,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start the restore.
    Restore,
    /// Make the workload outlive this agent, then tell CRIU to go on.
    Keep,
    /// Tell CRIU to go on.
    Yes,
    /// Stop every task so that it stays stopped.
    Suspend,
    /// Undo `Suspend`.
    Continue,
    /// Take the restored connections off the wire without a word and kill what there is; answer `Dropped`.
    Drop,
    /// Tell the coordinator. The time of an offer begins before it is told.
    Report(AgentEvent),
    /// The role is over: forget the images.
    End,
}

/// Before `go`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Before {
    /// The pid namespace and CRIU wait for images.
    Waiting,
    /// CRIU restores.
    Restoring,
    /// CRIU waits in its pre-resume hook.
    Restored(Offer),
}

/// What a `go` may take up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Offer {
    /// Grows with each offer.
    pub number: u32,
    /// Its time is over.
    pub lapsed: bool,
}

impl Offer {
    fn is_taken_up(self, number: u32) -> bool {
        !self.lapsed && self.number == number
    }

    fn next(self) -> Self {
        Self { number: self.number + 1, lapsed: false }
    }

    fn report(self) -> Vec<Command> {
        vec![Command::Report(AgentEvent::Restored { offer: self.number })]
    }
}

/// After `go`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Committed {
    /// CRIU lets the tasks go.
    Starting {
        /// That was taken up.
        offer: Offer,
    },
    /// They run.
    Running {
        /// Since when.
        running: Running,
        /// That was taken up.
        offer: Offer,
        /// The coordinator has said that this copy is the one.
        confirmed: bool,
        /// CRIU has ended.
        restored: bool,
    },
    /// The lease ended unconfirmed: every task is stopped.
    Suspended {
        /// Since when they ran.
        running: Running,
        /// That may be taken up.
        offer: Offer,
        /// CRIU has ended.
        restored: bool,
    },
}

/// Where the target is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The coordinator has not decided.
    Before(Before),
    /// The coordinator has flipped: this copy is the one.
    Committed(Committed),
    /// What there is is being removed.
    Dropping,
    /// Nothing is left here.
    Dropped,
    /// The workload broke after the flip. An operator has to look.
    Lost,
}

impl State {
    /// Where every target begins.
    pub const START: Self = Self::Before(Before::Waiting);

    /// Takes an event: the next state and what to do.
    #[must_use]
    pub fn on(self, event: Event) -> (Self, Vec<Command>) {
        match self {
            Self::Before(before) => before.on(event),
            Self::Committed(committed) => committed.on(event),
            Self::Dropping => match event {
                Event::Dropped => (Self::Dropped, vec![Command::Report(AgentEvent::Dropped), Command::End]),
                _ => (Self::Dropping, Vec::new()),
            },
            Self::Dropped => (Self::Dropped, Vec::new()),
            Self::Lost => (Self::Lost, Vec::new()),
        }
    }
}

impl Before {
    fn on(self, event: Event) -> (State, Vec<Command>) {
        match (self, event) {
            (Self::Waiting, Event::ImagesComplete { sent_bytes }) => (
                State::Before(Self::Restoring),
                vec![Command::Restore, Command::Report(AgentEvent::Received { sent_bytes })],
            ),
            (Self::Restoring, Event::HookPreResume) => {
                let offer = Offer { number: 0, lapsed: false };
                (State::Before(Self::Restored(offer)), offer.report())
            }
            (Self::Restored(offer), Event::Offer) => {
                (State::Before(Self::Restored(offer.next())), offer.next().report())
            }
            (Self::Restored(offer), Event::Go { offer: number }) if offer.is_taken_up(number) => {
                (State::Committed(Committed::Starting { offer }), vec![Command::Keep])
            }
            (_, Event::ImagesFailed(reason)) => dropping(Some(reason)),
            (_, Event::CriuEnded { failed }) => {
                dropping(Some(failed.unwrap_or_else(|| "CRIU ended before its time".to_owned())))
            }
            // The coordinator may have flipped.
            (Self::Restored(offer), Event::Expired) => {
                (State::Before(Self::Restored(Offer { lapsed: true, ..offer })), Vec::new())
            }
            (_, Event::Expired) => dropping(Some("the coordinator was silent for too long".to_owned())),
            (_, Event::Abort) => dropping(None),
            (
                before,
                Event::ImagesComplete { .. }
                | Event::HookPreResume
                | Event::HookPostResume { .. }
                | Event::Offer
                | Event::Go { .. }
                | Event::Confirm
                | Event::Dropped,
            ) => (State::Before(before), Vec::new()),
        }
    }
}

impl Committed {
    fn on(self, event: Event) -> (State, Vec<Command>) {
        let (next, commands) = match (self, event) {
            (Self::Starting { offer }, Event::HookPostResume { at_unix_us }) => {
                let running = Running { at_unix_us };
                let next = match offer.lapsed {
                    true => Self::Suspended { running, offer, restored: false },
                    false => Self::Running { running, offer, confirmed: false, restored: false },
                };
                let mut commands = vec![Command::Report(AgentEvent::Running(running)), Command::Yes];
                if offer.lapsed {
                    commands.extend(suspend());
                }
                (next, commands)
            }
            (Self::Starting { offer }, Event::Expired) => {
                (Self::Starting { offer: Offer { lapsed: true, ..offer } }, Vec::new())
            }
            (Self::Starting { .. }, Event::CriuEnded { failed }) => {
                let reason = failed.unwrap_or_else(|| "CRIU ended before its time".to_owned());
                let reason = format!("the restored workload could not be set running: {reason}");
                return (State::Lost, vec![Command::Report(AgentEvent::Failed { reason }), Command::End]);
            }
            (Self::Running { running, offer, confirmed, restored: false }, Event::CriuEnded { .. }) => (
                Self::Running { running, offer, confirmed, restored: true },
                if confirmed { vec![Command::End] } else { Vec::new() },
            ),
            (Self::Running { running, offer, confirmed: false, restored }, Event::Confirm) => {
                let mut commands = vec![Command::Report(AgentEvent::Confirmed)];
                if restored {
                    commands.push(Command::End);
                }
                (Self::Running { running, offer, confirmed: true, restored }, commands)
            }
            (Self::Running { running, offer, confirmed: false, restored }, Event::Expired) => {
                (Self::Suspended { running, offer: Offer { lapsed: true, ..offer }, restored }, suspend())
            }
            (Self::Suspended { running, offer, restored }, Event::Offer) => {
                (Self::Suspended { running, offer: offer.next(), restored }, offer.next().report())
            }
            (Self::Suspended { running, offer, restored }, Event::Expired) => {
                (Self::Suspended { running, offer: Offer { lapsed: true, ..offer }, restored }, Vec::new())
            }
            (Self::Suspended { running, offer, restored }, Event::Go { offer: number })
                if offer.is_taken_up(number) =>
            {
                (
                    Self::Running { running, offer, confirmed: false, restored },
                    vec![Command::Continue, Command::Report(AgentEvent::Running(running))],
                )
            }
            // Said again, since the answer was lost.
            (Self::Running { running, offer, confirmed, restored }, Event::Go { offer: number })
                if offer.number == number =>
            {
                let report = Command::Report(AgentEvent::Running(running));
                (Self::Running { running, offer, confirmed, restored }, vec![report])
            }
            // There is nothing to offer any more.
            (Self::Running { running, offer, confirmed, restored }, Event::Offer) => {
                let report = Command::Report(AgentEvent::Running(running));
                (Self::Running { running, offer, confirmed, restored }, vec![report])
            }
            (Self::Running { running, offer, confirmed: true, restored }, Event::Confirm) => {
                let report = Command::Report(AgentEvent::Confirmed);
                (Self::Running { running, offer, confirmed: true, restored }, vec![report])
            }
            (Self::Suspended { running, offer, .. }, Event::CriuEnded { .. }) => {
                (Self::Suspended { running, offer, restored: true }, Vec::new())
            }
            (Self::Suspended { .. }, Event::Abort) => return dropping(None),
            (committed, _) => (committed, Vec::new()),
        };
        (State::Committed(next), commands)
    }
}

fn suspend() -> Vec<Command> {
    vec![Command::Suspend, Command::Report(AgentEvent::Suspended)]
}

fn dropping(reason: Option<String>) -> (State, Vec<Command>) {
    let mut commands = vec![Command::Drop];
    commands.extend(reason.map(|reason| Command::Report(AgentEvent::Failed { reason })));
    (State::Dropping, commands)
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
