//! The target of a migration: the workload is to run here.
//!
//! ```text
//! Before:    Waiting -> Restoring -> Restored --go--> Committed: Starting -> Running
//!               \___________\___________\----> Dropping -> Ended(Dropped)      \-> Ended(Lost)
//! ```
//!
//! `Restored` is CRIU waiting in its pre-resume hook: the connections are out of repair mode and not one
//! instruction has run. `go` is the point of no return: [`Committed`] has no way to `Dropping`.

use crate::protocol::{AgentEvent, Running};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The coordinator: the gate points here.
    Go,
    /// The coordinator: forget it.
    Abort,
    /// The coordinator has been silent for too long.
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
    /// Take the restored connections off the wire without a word and kill what there is; answer `Dropped`.
    Drop,
    /// Tell the coordinator.
    Report(AgentEvent),
    /// The role is over: forget the images.
    End,
}

/// Before `go`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Before {
    /// The pid namespace and CRIU wait for images.
    Waiting,
    /// CRIU restores.
    Restoring,
    /// CRIU waits in its pre-resume hook.
    Restored,
}

/// After `go`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Committed {
    /// CRIU lets the tasks go.
    Starting,
    /// They run.
    Running(Running),
}

/// Where the target is.
#[derive(Clone, Debug, PartialEq, Eq)]
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
                (State::Before(Self::Restored), vec![Command::Report(AgentEvent::Restored)])
            }
            (Self::Restored, Event::Go) => (State::Committed(Committed::Starting), vec![Command::Keep]),
            (_, Event::ImagesFailed(reason)) => dropping(Some(reason)),
            (_, Event::CriuEnded { failed }) => {
                dropping(Some(failed.unwrap_or_else(|| "CRIU ended before its time".to_owned())))
            }
            (_, Event::Expired) => dropping(Some("the coordinator was silent for too long".to_owned())),
            (_, Event::Abort) => dropping(None),
            (
                before,
                Event::ImagesComplete { .. }
                | Event::HookPreResume
                | Event::HookPostResume { .. }
                | Event::Go
                | Event::Dropped,
            ) => (State::Before(before), Vec::new()),
        }
    }
}

impl Committed {
    fn on(self, event: Event) -> (State, Vec<Command>) {
        match (self, event) {
            (Self::Starting, Event::HookPostResume { at_unix_us }) => {
                let running = Running { at_unix_us };
                (
                    State::Committed(Self::Running(running)),
                    vec![Command::Report(AgentEvent::Running(running)), Command::Yes],
                )
            }
            (Self::Starting, Event::CriuEnded { failed }) => {
                let reason = failed.unwrap_or_else(|| "CRIU ended before its time".to_owned());
                let reason = format!("the restored workload could not be set running: {reason}");
                (State::Lost, vec![Command::Report(AgentEvent::Failed { reason }), Command::End])
            }
            (Self::Running(running), Event::CriuEnded { .. }) => {
                (State::Committed(Self::Running(running)), vec![Command::End])
            }
            (
                committed,
                Event::ImagesComplete { .. }
                | Event::ImagesFailed(_)
                | Event::HookPreResume
                | Event::HookPostResume { .. }
                | Event::Go
                | Event::Abort
                | Event::Expired
                | Event::Dropped,
            ) => (State::Committed(committed), Vec::new()),
        }
    }
}

fn dropping(reason: Option<String>) -> (State, Vec<Command>) {
    let mut commands = vec![Command::Drop];
    commands.extend(reason.map(|reason| Command::Report(AgentEvent::Failed { reason })));
    (State::Dropping, commands)
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
