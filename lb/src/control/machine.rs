//! One backend's gate as a state machine: event and now in, commands out. No I/O, no clock.
//!
//! ```text
//!            Hold                    Flip, Resume                Replayed
//! Forward ---------> Holding ---------------------> Replaying ------------> Forward
//!    |                ^  |                           ^   ^
//!    |           Hold |  | Tick after the deadline   |   | Flip, Resume
//!    |                |  +-----------> Expired ------|---+
//!    | HoldNew        |                              |
//!    +---------> HoldingNew -------------------------+
//!                          Resume, Tick after the deadline
//! ```
//!
//! The gate is `forward` only in `Forward`, and the way back there leads through `Replaying`: what was held
//! is sent before anything new. `HoldingNew` keeps what opens connections and nothing else, so that the server still
//! gets everything of those that it has: nothing can have moved behind it, and its deadline opens it. A hold whose deadline passed keeps its queue behind a closed gate and waits
//! for a word from outside; it never opens by itself.

use tokio::time::Instant;

use lb_core::{Gate, GateWord};

use crate::datapath::{BackendState, HoldLimits, SiteNumber};

/// What happens to the packets of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Kept in the hold queue.
    Hold,
    /// Dropped; TCP sends them again.
    Drop,
}

/// Where a backend's gate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Packets go to the location.
    Forward,
    /// Packets that open connections are kept, until a hold, a resume or the deadline.
    HoldingNew {
        /// When it gives up and forwards again.
        deadline: Instant,
    },
    /// Packets are kept (or dropped, as the policy says) until a flip, a resume or the deadline.
    Holding {
        /// When the hold gives up.
        deadline: Instant,
        /// What happens to the packets.
        policy: Policy,
    },
    /// The deadline passed: new packets are dropped, the queue is kept.
    Expired {
        /// The generation that the hold was given, which its holder still knows.
        hold: u32,
    },
    /// The queue is being sent to the location; new packets queue behind it.
    Replaying,
}

impl State {
    /// The state's name in the admin API.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::HoldingNew { .. } => "holding_new",
            Self::Holding { .. } => "holding",
            Self::Expired { .. } => "expired",
            Self::Replaying => "replaying",
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody wants the gate closed for new connections, and soon for all.
    HoldNew {
        /// When that gives up.
        deadline: Instant,
        /// Bounds of the queue.
        limits: HoldLimits,
    },
    /// Somebody wants the gate closed.
    Hold {
        /// What happens to the packets.
        policy: Policy,
        /// When the hold gives up.
        deadline: Instant,
        /// Bounds of the queue.
        limits: HoldLimits,
    },
    /// The spare slot now leads to this site.
    Staged {
        /// The site.
        site: SiteNumber,
    },
    /// Whoever holds wants the gate open at the other location.
    Flip {
        /// The generation of the hold.
        generation: u32,
        /// The site that the spare slot has to lead to.
        to: SiteNumber,
    },
    /// Whoever holds wants the gate open where it was.
    Resume {
        /// The generation of the hold.
        generation: u32,
    },
    /// Time has passed.
    Tick,
    /// Captured equals replayed.
    Replayed,
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// Make the hold queue ready.
    pub begin_hold: Option<HoldLimits>,
    /// Store the gate word.
    pub store: Option<GateWord>,
}

/// Why an event changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The generation is not the backend's.
    #[error(
        "generation {given} is not the backend's generation {current}: something has changed it since; read it anew"
    )]
    Stale {
        /// What was given.
        given: u32,
        /// What it is.
        current: u32,
    },
    /// There is nothing to flip or resume.
    #[error("the backend is not held (it is {state}); hold it first")]
    NotHeld {
        /// The state's name.
        state: &'static str,
    },
    /// It is held already, or the queue of the last hold is still being sent.
    #[error("the backend is {state} already; flip or resume it, or wait until its replay has ended")]
    AlreadyHeld {
        /// The state's name.
        state: &'static str,
    },
    /// The flip came after the deadline.
    #[error(
        "the hold's deadline has passed and the gate drops packets now; resume it where it was, or, if the backend \
         really runs at the other site, flip with generation {current}"
    )]
    DeadlinePassed {
        /// The generation to show that one knows.
        current: u32,
    },
    /// The flip leads to where the backend is.
    #[error("the backend is at that site already; resume it instead")]
    SameLocation,
    /// The flip leads to a site that the spare slot does not lead to.
    #[error("that site is not staged")]
    NotStaged,
}

/// One backend's gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    word: GateWord,
    sites: [SiteNumber; 2],
    state: State,
}

impl Machine {
    /// Takes over what the tables say, with what has to be done for it. A closed gate gets a fresh deadline:
    /// how much of the old one was left died with the daemon that knew.
    pub fn take_over(tables: BackendState, deadline: Instant, limits: HoldLimits) -> (Self, Commands) {
        let word = tables.word;
        let (state, commands) = match word.gate() {
            Gate::Forward => (State::Forward, Commands::default()),
            Gate::HoldNew => {
                (State::HoldingNew { deadline }, Commands { begin_hold: Some(limits), store: None })
            }
            Gate::Hold => (
                State::Holding { deadline, policy: Policy::Hold },
                Commands { begin_hold: Some(limits), store: None },
            ),
            Gate::Drop => (
                State::Holding { deadline, policy: Policy::Drop },
                Commands { begin_hold: Some(limits), store: None },
            ),
            // The same word once more: it starts the replay of what the capture ring still has.
            Gate::Replay => (State::Replaying, Commands { begin_hold: Some(limits), store: Some(word) }),
        };
        (Self { word, sites: tables.sites, state }, commands)
    }

    /// Where the gate stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// The word as it was stored last.
    pub fn word(&self) -> GateWord {
        self.word
    }

    /// The site where the backend runs.
    pub fn location(&self) -> SiteNumber {
        self.sites[self.word.slot() as usize]
    }

    /// The site that a flip would lead to.
    pub fn staged(&self) -> SiteNumber {
        self.sites[self.word.slot().other() as usize]
    }

    /// When the machine next wants a [`Event::Tick`].
    pub fn next_tick(&self) -> Option<Instant> {
        match self.state {
            State::HoldingNew { deadline } | State::Holding { deadline, .. } => Some(deadline),
            State::Forward | State::Expired { .. } | State::Replaying => None,
        }
    }

    /// Takes an event. A refused event changes nothing.
    pub fn on(&mut self, event: Event, now: Instant) -> Result<Commands, Refusal> {
        match (event, self.state) {
            (Event::HoldNew { deadline, limits }, State::Forward) => {
                self.state = State::HoldingNew { deadline };
                let store = self.store(self.word.with_gate(Gate::HoldNew));
                Ok(Commands { begin_hold: Some(limits), ..store })
            }
            (
                Event::Hold { policy, deadline, limits },
                state @ (State::Forward | State::HoldingNew { .. }),
            ) => {
                let gate = match policy {
                    Policy::Hold => Gate::Hold,
                    Policy::Drop => Gate::Drop,
                };
                self.state = State::Holding { deadline, policy };
                let store = self.store(self.word.with_gate(gate));
                // What was held of new connections waits in the same queue.
                let begin_hold = (state == State::Forward).then_some(limits);
                Ok(Commands { begin_hold, ..store })
            }
            (Event::HoldNew { .. } | Event::Hold { .. }, state) => {
                Err(Refusal::AlreadyHeld { state: state.label() })
            }

            (Event::Staged { site }, _) => {
                self.sites[self.word.slot().other() as usize] = site;
                Ok(Commands::default())
            }

            (Event::Flip { generation, to }, state) => {
                match state {
                    State::Expired { hold } if generation == hold => {
                        return Err(Refusal::DeadlinePassed { current: self.word.generation() });
                    }
                    _ => self.check(generation, None)?,
                }
                if matches!(state, State::HoldingNew { .. }) {
                    return Err(Refusal::NotHeld { state: state.label() });
                }
                if to == self.location() {
                    return Err(Refusal::SameLocation);
                }
                if to != self.staged() {
                    return Err(Refusal::NotStaged);
                }
                self.state = State::Replaying;
                Ok(self.store(self.word.flipped(Gate::Replay)))
            }
            (Event::Resume { generation }, state) => {
                let late = match state {
                    State::Expired { hold } => Some(hold),
                    _ => None,
                };
                self.check(generation, late)?;
                self.state = State::Replaying;
                Ok(self.store(self.word.with_gate(Gate::Replay)))
            }

            (Event::Tick, State::Holding { deadline, .. }) if now >= deadline => {
                self.state = State::Expired { hold: self.word.generation() };
                Ok(self.store(self.word.with_gate(Gate::Drop)))
            }
            (Event::Tick, State::HoldingNew { deadline }) if now >= deadline => {
                self.state = State::Replaying;
                Ok(self.store(self.word.with_gate(Gate::Replay)))
            }
            (Event::Tick, _) => Ok(Commands::default()),

            (Event::Replayed, State::Replaying) => {
                self.state = State::Forward;
                Ok(self.store(self.word.with_gate(Gate::Forward)))
            }
            // A report that has nothing to do with the present hold.
            (Event::Replayed, _) => Ok(Commands::default()),
        }
    }

    /// Whether this generation may open the gate.
    fn check(&self, given: u32, also: Option<u32>) -> Result<(), Refusal> {
        let current = self.word.generation();
        if given != current && Some(given) != also {
            return Err(Refusal::Stale { given, current });
        }
        match self.state {
            State::HoldingNew { .. } | State::Holding { .. } | State::Expired { .. } => Ok(()),
            State::Forward | State::Replaying => Err(Refusal::NotHeld { state: self.state.label() }),
        }
    }

    fn store(&mut self, word: GateWord) -> Commands {
        self.word = word;
        Commands { begin_hold: None, store: Some(word) }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
