//! The source of a migration: the workload runs here and is to leave.
//!
//! ```text
//! Ready -> Draining -> Dumping -> Frozen, Stopped -> Releasing -> Ended(Released)
//!    \________\___________\________________\--------> Resuming  -> Ended(Resumed)
//! ```
//!
//! `Ready` is CRIU waiting in its pre-dump hook: nothing is frozen yet. `Frozen` is CRIU waiting in its
//! post-dump hook; `Stopped` is the same without CRIU.
//!
//! Until the first byte of the images leaves, whatever fails or falls silent, the source ends up running, with its
//! silence rules gone. From then on another copy may come to life, and this one stays stopped until the coordinator
//! says what becomes of it: neither patience that runs out, nor a failure, nor a crash of CRIU or the agent lets it
//! run. Only [`Event::Release`] leads to its death, and that only after the address is known to be silent.

use crate::protocol::{AgentEvent, Running};

/// How often a dump that met a connection in the accept queue is tried again.
pub const IN_FLIGHT_TRIES: u32 = 3;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    /// The coordinator: the gate is closed.
    Freeze,
    /// The queues are empty.
    Drained,
    /// The queues could not be watched, or did not get empty.
    DrainFailed(String),
    /// CRIU's query-ext-files hook: every task is frozen.
    HookFrozen {
        /// `CLOCK_REALTIME`.
        at_unix_us: i64,
    },
    /// CRIU's post-dump hook: the images are complete, and nothing has been sent.
    HookPostDump {
        /// Bytes of all images.
        image_bytes: u64,
    },
    /// A new CRIU waits in its pre-dump hook, after a dump that failed for a connection in flight.
    HookPreDump,
    /// The silence rules are in place.
    Silenced,
    /// They are not, and will not be.
    SilenceFailed(String),
    /// The images could not be sent, or the target did not take them.
    SendFailed(String),
    /// CRIU has ended; the tasks are killed if it was told so, stopped if they are fenced, else they run. Also the
    /// answer to `Revive` (they run) and to `Kill` (they are killed).
    CriuEnded {
        /// `CLOCK_REALTIME`.
        at_unix_us: i64,
        /// Why it failed, if it did.
        failed: Option<String>,
        /// It failed for a connection in the accept queue: trying again may help.
        in_flight: bool,
    },
    /// The silence rules are gone.
    Lifted,
    /// The coordinator: the target runs.
    Release,
    /// The coordinator: go back.
    Abort,
    /// The coordinator has been silent for too long.
    Expired,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Watch the queues; answer with `Drained` or `DrainFailed`.
    Drain,
    /// Tell CRIU to go on.
    Yes,
    /// Tell CRIU to undo and let the tasks run.
    No,
    /// Stop every task so that it stays stopped, whatever becomes of CRIU and of this agent.
    Fence,
    /// Undo `Fence`; they run when CRIU lets them.
    Unfence,
    /// Undo `Fence` and what a CRIU that is gone has left; answer with `CriuEnded`.
    Revive,
    /// Kill every task without a word on its connections; answer with `CriuEnded`.
    Kill,
    /// Start another CRIU for another dump, up to its pre-dump hook.
    DumpAgain,
    /// Put the silence rules in place; answer with `Silenced` or `SilenceFailed`.
    Silence,
    /// Remove them; answer with `Lifted`.
    Lift,
    /// Send the images; answer with `SendFailed` if that fails.
    Send,
    /// Tell the coordinator.
    Report(AgentEvent),
    /// The role is over: forget images and locks.
    End,
}

/// What is known of the silence rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Silence {
    /// Nothing was asked for.
    Off,
    /// They are being put in place.
    Pending,
    /// They are in place.
    On,
}

/// Where the source is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// CRIU waits in its pre-dump hook; the workload runs.
    Ready,
    /// The gate is closed; the queues are being watched. The workload runs.
    Draining {
        /// Dumps left to try.
        tries: u32,
    },
    /// CRIU dumps. It cannot be stopped in the middle, so a wish to go back waits for its next question.
    Dumping {
        /// Dumps left to try.
        tries: u32,
        /// The silence rules.
        silence: Silence,
        /// Why this dump is to be undone, if so.
        doomed: Option<String>,
    },
    /// A dump failed for a connection in flight; another CRIU is being started. The workload runs.
    Retrying {
        /// Dumps left to try.
        tries: u32,
        /// The silence rules may still be there.
        silent: bool,
        /// The other CRIU waits in its pre-dump hook.
        hooked: bool,
    },
    /// Dumped, frozen, in CRIU's post-dump hook.
    Frozen {
        /// The silence rules.
        silence: Silence,
        /// The coordinator wants it released, and the silence is waited for.
        release: bool,
    },
    /// Dumped and stopped, but CRIU is gone.
    Stopped {
        /// The silence rules.
        silence: Silence,
        /// The coordinator wants it released, and the silence is waited for.
        release: bool,
    },
    /// CRIU undoes the dump and the silence rules are being removed.
    Resuming {
        /// CRIU has ended, at this `CLOCK_REALTIME`.
        runs_at: Option<i64>,
        /// The silence rules may still be there.
        silent: bool,
    },
    /// CRIU kills the tasks; then the silence rules go.
    Releasing {
        /// CRIU has ended.
        killed: bool,
    },
    /// Over.
    Ended(End),
}

/// How the source's part ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The workload is gone from here.
    Released,
    /// The workload runs here since this `CLOCK_REALTIME`.
    Resumed {
        /// Microseconds.
        at_unix_us: i64,
    },
}

impl State {
    /// Takes an event: the next state and what to do.
    #[must_use]
    pub fn on(self, event: Event) -> (Self, Vec<Command>) {
        match self {
            Self::Ready => Self::ready(event),
            Self::Draining { tries } => Self::draining(tries, event),
            Self::Dumping { tries, silence, doomed } => Self::dumping(tries, silence, doomed, event),
            Self::Retrying { tries, silent, hooked } => Self::retrying(tries, silent, hooked, event),
            Self::Frozen { silence, release } => Self::fenced(true, silence, release, event),
            Self::Stopped { silence, release } => Self::fenced(false, silence, release, event),
            Self::Resuming { runs_at, silent } => Self::resuming(runs_at, silent, event),
            Self::Releasing { killed } => Self::releasing(killed, event),
            Self::Ended(end) => (Self::Ended(end), Vec::new()),
        }
    }

    fn ready(event: Event) -> (Self, Vec<Command>) {
        match event {
            Event::Freeze => (Self::Draining { tries: IN_FLIGHT_TRIES }, vec![Command::Drain]),
            Event::CriuEnded { at_unix_us, failed, .. } => Self::gone(at_unix_us, failed, Silence::Off),
            Event::Abort => Self::undo(None, Silence::Off),
            Event::Expired => Self::undo(Some(expired()), Silence::Off),
            _ => (Self::Ready, Vec::new()),
        }
    }

    fn draining(tries: u32, event: Event) -> (Self, Vec<Command>) {
        match event {
            Event::Drained => (
                Self::Dumping { tries: tries - 1, silence: Silence::Off, doomed: None },
                // CRIU first: the report may wait, the clients do not.
                vec![Command::Yes, Command::Report(AgentEvent::Drained)],
            ),
            Event::DrainFailed(reason) => Self::undo(Some(reason), Silence::Off),
            Event::CriuEnded { at_unix_us, failed, .. } => Self::gone(at_unix_us, failed, Silence::Off),
            Event::Abort => Self::undo(None, Silence::Off),
            Event::Expired => Self::undo(Some(expired()), Silence::Off),
            _ => (Self::Draining { tries }, Vec::new()),
        }
    }

    fn dumping(tries: u32, silence: Silence, doomed: Option<String>, event: Event) -> (Self, Vec<Command>) {
        let doom = |doomed: Option<String>, reason: String| Some(doomed.unwrap_or(reason));
        match event {
            Event::HookFrozen { at_unix_us } => (
                Self::Dumping { tries, silence: Silence::Pending, doomed },
                vec![Command::Yes, Command::Silence, Command::Report(AgentEvent::Frozen { at_unix_us })],
            ),
            Event::HookPostDump { image_bytes } => match doomed {
                Some(reason) => Self::undo(Some(reason), silence),
                None => (
                    Self::Frozen { silence, release: false },
                    vec![Command::Fence, Command::Send, Command::Report(AgentEvent::Dumped { image_bytes })],
                ),
            },
            Event::CriuEnded { in_flight: true, .. } if tries > 0 && doomed.is_none() => {
                let mut commands = lift(silence);
                commands.push(Command::DumpAgain);
                (Self::Retrying { tries, silent: silence != Silence::Off, hooked: false }, commands)
            }
            Event::CriuEnded { at_unix_us, failed, .. } => Self::gone(at_unix_us, doomed.or(failed), silence),
            Event::Silenced => (Self::Dumping { tries, silence: Silence::On, doomed }, Vec::new()),
            Event::SilenceFailed(reason) => {
                (Self::Dumping { tries, silence, doomed: doom(doomed, reason) }, Vec::new())
            }
            Event::SendFailed(reason) => {
                (Self::Dumping { tries, silence, doomed: doom(doomed, reason) }, Vec::new())
            }
            Event::Abort => {
                let doomed = doom(doomed, "the coordinator called it off".to_owned());
                (Self::Dumping { tries, silence, doomed }, Vec::new())
            }
            Event::Expired => (Self::Dumping { tries, silence, doomed: doom(doomed, expired()) }, Vec::new()),
            _ => (Self::Dumping { tries, silence, doomed }, Vec::new()),
        }
    }

    fn retrying(tries: u32, silent: bool, hooked: bool, event: Event) -> (Self, Vec<Command>) {
        let (silent, hooked) = match event {
            Event::HookPreDump => (silent, true),
            Event::Lifted => (false, hooked),
            Event::CriuEnded { at_unix_us, failed, .. } => {
                if !silent {
                    return Self::gone(at_unix_us, failed, Silence::Off);
                }
                // The rules are on their way out already; the end only has to wait for them.
                let report = Command::Report(AgentEvent::Failed { reason: ended_early(failed) });
                return (Self::Resuming { runs_at: Some(at_unix_us), silent }, vec![report]);
            }
            Event::Abort => return Self::undo_retry(None, silent, hooked),
            Event::Expired => return Self::undo_retry(Some(expired()), silent, hooked),
            _ => (silent, hooked),
        };
        if hooked && !silent {
            return (Self::Draining { tries }, vec![Command::Drain]);
        }
        (Self::Retrying { tries, silent, hooked }, Vec::new())
    }

    /// Images may be at the target, so only the coordinator knows which copy is to live.
    fn fenced(criu: bool, silence: Silence, release: bool, event: Event) -> (Self, Vec<Command>) {
        let stay = |silence, release| match criu {
            true => Self::Frozen { silence, release },
            false => Self::Stopped { silence, release },
        };
        let failed = |reason| vec![Command::Report(AgentEvent::Failed { reason })];
        let kill = if criu { Command::Yes } else { Command::Kill };
        match event {
            // A target that runs already does not wait for rules that do not come: CRIU kills this copy with its
            // connections in repair mode, which says nothing, and the load balancer drops what a former location
            // sends.
            Event::Silenced | Event::SilenceFailed(_) if release => {
                (Self::Releasing { killed: false }, vec![kill])
            }
            Event::Silenced => (stay(Silence::On, release), Vec::new()),
            Event::SilenceFailed(reason) => (stay(Silence::Off, release), failed(reason)),
            Event::Release if silence == Silence::Pending => (stay(silence, true), Vec::new()),
            Event::Release => (Self::Releasing { killed: false }, vec![kill]),
            Event::SendFailed(reason) if !release => (stay(silence, release), failed(reason)),
            Event::CriuEnded { failed: why, .. } if criu => {
                (Self::Stopped { silence, release }, failed(ended_early(why)))
            }
            Event::Abort if !release => {
                let mut commands =
                    if criu { vec![Command::Unfence, Command::No] } else { vec![Command::Revive] };
                commands.extend(lift(silence));
                (Self::Resuming { runs_at: None, silent: silence != Silence::Off }, commands)
            }
            _ => (stay(silence, release), Vec::new()),
        }
    }

    fn resuming(runs_at: Option<i64>, silent: bool, event: Event) -> (Self, Vec<Command>) {
        let (runs_at, silent) = match event {
            Event::HookPreDump => return (Self::Resuming { runs_at, silent }, vec![Command::No]),
            Event::CriuEnded { at_unix_us, .. } => (Some(at_unix_us), silent),
            Event::Lifted => (runs_at, false),
            _ => (runs_at, silent),
        };
        match runs_at {
            Some(at_unix_us) if !silent => (
                Self::Ended(End::Resumed { at_unix_us }),
                vec![Command::Report(AgentEvent::Resumed(Running { at_unix_us })), Command::End],
            ),
            _ => (Self::Resuming { runs_at, silent }, Vec::new()),
        }
    }

    fn releasing(killed: bool, event: Event) -> (Self, Vec<Command>) {
        match event {
            Event::CriuEnded { .. } if !killed => (Self::Releasing { killed: true }, vec![Command::Lift]),
            Event::Lifted if killed => {
                (Self::Ended(End::Released), vec![Command::Report(AgentEvent::Released), Command::End])
            }
            _ => (Self::Releasing { killed }, Vec::new()),
        }
    }

    /// CRIU is asked to undo; the rules go at the same time, since the gate is still closed.
    fn undo(reason: Option<String>, silence: Silence) -> (Self, Vec<Command>) {
        let mut commands = vec![Command::No];
        commands.extend(lift(silence));
        commands.extend(reason.map(|reason| Command::Report(AgentEvent::Failed { reason })));
        (Self::Resuming { runs_at: None, silent: silence != Silence::Off }, commands)
    }

    /// Likewise between two dumps: the rules are on their way out already, and the new CRIU may not have asked
    /// its first question yet; it is answered then.
    fn undo_retry(reason: Option<String>, silent: bool, hooked: bool) -> (Self, Vec<Command>) {
        let mut commands = Vec::new();
        if hooked {
            commands.push(Command::No);
        }
        commands.extend(reason.map(|reason| Command::Report(AgentEvent::Failed { reason })));
        (Self::Resuming { runs_at: None, silent }, commands)
    }

    /// CRIU ended by itself, which leaves the tasks running.
    fn gone(at_unix_us: i64, failed: Option<String>, silence: Silence) -> (Self, Vec<Command>) {
        let mut commands = lift(silence);
        commands.push(Command::Report(AgentEvent::Failed { reason: ended_early(failed) }));
        if silence == Silence::Off {
            commands.push(Command::Report(AgentEvent::Resumed(Running { at_unix_us })));
            commands.push(Command::End);
            return (Self::Ended(End::Resumed { at_unix_us }), commands);
        }
        (Self::Resuming { runs_at: Some(at_unix_us), silent: true }, commands)
    }
}

fn lift(silence: Silence) -> Vec<Command> {
    if silence == Silence::Off { Vec::new() } else { vec![Command::Lift] }
}

fn ended_early(failed: Option<String>) -> String {
    failed.unwrap_or_else(|| "CRIU ended before its time".to_owned())
}

fn expired() -> String {
    "the coordinator was silent for too long".to_owned()
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
