//! The migration as a pure state machine: event and time in, commands out. No I/O, no clock.
//!
//! ```text
//! Before: PreparingTarget -> PreparingSource -> Holding -> Moving -> Flipping --flip--> After
//!    \______________________any failure, abort, deadline______________/               /     \
//!                             |                                             Confirming -> Releasing
//!                        RollingBack -> Finished(rolled_back | in_doubt)        |            |
//!                                                        Finished(in_doubt | committed) <----'
//! ```
//!
//! The flip is the point of no return: [`After`] has no function that leads to [`RollingBack`], and a
//! failure there can only be retried or reported. Before it, every failure leads through [`RollingBack`],
//! which opens the gate only after the source has said that it runs (or after it had all the time it
//! needs to fall back by itself).

use std::time::Duration;

use super::Outcome;
use super::phases::Phases;

/// How long the preparation may take before the migration is given up. Nobody is held meanwhile.
pub const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// How long past its hold deadline a silent coordinator is waited for by the agents.
pub const MARGIN: Duration = Duration::from_secs(2);
/// How long after the flip `go` and `release` are tried before an operator is asked.
pub const FORWARD_LIMIT: Duration = Duration::from_secs(15);
/// How long the target has the network and the machine to itself before the source is killed: it has a backlog to
/// answer, nobody waits for the release, and taking a server with many connections apart is work.
pub const CATCHING_UP: Duration = Duration::from_millis(100);
/// Pause before something that failed is tried again.
pub const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The target waits for images.
    TargetPrepared,
    /// The source's CRIU waits to freeze it.
    SourcePrepared,
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
    /// The target: restored, not running.
    Restored,
    /// The gate points at the target.
    Flipped,
    /// The gate could not be staged, held or flipped.
    CutoverRefused(String),
    /// The target: its tasks run.
    Running,
    /// The source is gone.
    Released,
    /// The source runs again.
    SourceResumed,
    /// The target holds nothing any more.
    TargetDropped,
    /// The gate is open to the source again.
    GateResumed,
    /// The gate could not be opened again.
    ResumeRefused(String),
    /// The source said that it failed, or its agent cannot be reached.
    SourceFailed(String),
    /// The target said that it failed, or its agent cannot be reached.
    TargetFailed(String),
    /// An operator wants it to end.
    Abort,
    /// Nothing happened; time went on.
    Tick,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stage the target's location, then ask the target to prepare.
    PrepareTarget,
    /// Ask the source to prepare.
    PrepareSource,
    /// Close the gate.
    Hold,
    /// Ask the source to drain, freeze, dump and send.
    Freeze,
    /// Point the gate at the target.
    Flip {
        /// The generation that the hold gave.
        generation: u32,
    },
    /// Let the target run.
    Go,
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
}

/// The steps before the flip. Each has the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Before {
    /// Staging the location and preparing the target.
    PreparingTarget,
    /// Preparing the source.
    PreparingSource,
    /// Closing the gate.
    Holding,
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
    },
}

/// The steps after the flip: forward only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// The target is told to run.
    Confirming {
        /// When an operator is asked.
        give_up: Duration,
        /// When `go` is to be said again, if it failed.
        retry: Option<Duration>,
        /// The last failure.
        trouble: Option<String>,
    },
    /// The target runs; the source is told to go.
    Releasing {
        /// When the source is left to its own fallback.
        give_up: Duration,
        /// When `release` is to be said again, if it failed.
        retry: Option<Duration>,
        /// The last failure.
        trouble: Option<String>,
    },
}

/// On the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RollingBack {
    /// Why.
    pub reason: String,
    /// The closed gate's generation; `None` if it was never closed or is open again.
    pub gate: Option<u32>,
    /// The source has said that it runs.
    pub source_runs: bool,
    /// The target has said that it holds nothing, or cannot be reached.
    pub target_gone: bool,
    /// When the source is taken to run: by then it has fallen back by itself.
    pub give_up: Duration,
    /// When the source is to be asked again, if it failed to answer.
    pub retry: Option<Duration>,
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

/// The whole of one migration.
#[derive(Clone, Debug)]
pub struct Machine {
    state: State,
    phases: Phases,
    hold_deadline: Duration,
    prepare_until: Duration,
}

impl Machine {
    /// A new migration at time zero, and what to do first.
    pub fn start(hold_deadline: Duration) -> (Self, Vec<Command>) {
        let mut machine = Self::new(State::Before(Before::PreparingTarget), hold_deadline);
        machine.phases.enter("prepare", Duration::ZERO);
        (machine, vec![Command::PrepareTarget])
    }

    /// A migration that a former coordinator left before its flip: roll it back.
    pub fn recover_back(generation: u32, hold_deadline: Duration) -> (Self, Vec<Command>) {
        let mut machine = Self::new(State::Before(Before::Flipping { generation }), hold_deadline);
        let reason = "the load balancer was restarted before the flip".to_owned();
        let commands = machine.roll_back(Some(generation), reason, Duration::ZERO);
        (machine, commands)
    }

    /// A migration that a former coordinator left after its flip: finish it.
    pub fn recover_forward(hold_deadline: Duration) -> (Self, Vec<Command>) {
        let mut machine = Self::new(State::Before(Before::PreparingTarget), hold_deadline);
        let commands = machine.go_forward(Duration::ZERO);
        (machine, commands)
    }

    fn new(state: State, hold_deadline: Duration) -> Self {
        Self { state, phases: Phases::default(), hold_deadline, prepare_until: PREPARE_LIMIT }
    }

    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The phases so far.
    pub fn phases(&self) -> &Phases {
        &self.phases
    }

    /// When [`Event::Tick`] is wanted at the latest.
    pub fn wake_at(&self) -> Option<Duration> {
        match &self.state {
            State::Before(Before::PreparingTarget | Before::PreparingSource) => Some(self.prepare_until),
            State::Before(Before::Holding | Before::Flipping { .. }) => None,
            State::Before(Before::Moving { deadline, .. }) => Some(*deadline),
            State::After(
                After::Confirming { give_up, retry, .. } | After::Releasing { give_up, retry, .. },
            )
            | State::RollingBack(RollingBack { give_up, retry, .. }) => {
                Some(retry.map_or(*give_up, |retry| retry.min(*give_up)))
            }
            State::Finished { .. } => None,
        }
    }

    /// Takes an event at `now` (since the migration's start) and says what to do.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Command> {
        match self.state.clone() {
            State::Before(before) => self.on_before(before, event, now),
            State::After(after) => self.on_after(after, event, now),
            State::RollingBack(back) => self.on_rolling_back(back, event, now),
            State::Finished { .. } => Vec::new(),
        }
    }

    fn on_before(&mut self, before: Before, event: Event, now: Duration) -> Vec<Command> {
        let gate = match before {
            Before::Moving { generation, .. } | Before::Flipping { generation } => Some(generation),
            Before::PreparingTarget | Before::PreparingSource | Before::Holding => None,
        };
        match (&before, event) {
            // What ends any of these steps.
            (_, Event::SourceFailed(reason)) => {
                self.roll_back(gate, format!("the source failed: {reason}"), now)
            }
            (_, Event::TargetFailed(reason)) => {
                self.roll_back(gate, format!("the target failed: {reason}"), now)
            }
            (_, Event::CutoverRefused(reason)) => {
                self.roll_back(gate, format!("the load balancer refused: {reason}"), now)
            }
            (_, Event::Abort) => self.roll_back(gate, "aborted by an operator".to_owned(), now),
            (_, Event::TargetDropped) => {
                self.roll_back(gate, "the target dropped what it had".to_owned(), now)
            }
            (_, Event::SourceResumed | Event::Released) => {
                self.roll_back(gate, "the source ended its part by itself".to_owned(), now)
            }

            // The way forward.
            (Before::PreparingTarget, Event::TargetPrepared) => {
                self.state = State::Before(Before::PreparingSource);
                vec![Command::PrepareSource]
            }
            (Before::PreparingSource, Event::SourcePrepared) => {
                self.phases.enter("hold", now);
                self.state = State::Before(Before::Holding);
                vec![Command::Hold]
            }
            (Before::Holding, Event::Held { generation }) => {
                self.phases.enter("drain", now);
                let deadline = now + self.hold_deadline;
                self.state = State::Before(Before::Moving { generation, deadline });
                vec![Command::Freeze]
            }
            (Before::Moving { .. }, Event::Drained) => {
                self.phases.enter_later("freeze", now);
                Vec::new()
            }
            (Before::Moving { .. }, Event::Dumped) => {
                self.phases.enter_later("transfer", now);
                Vec::new()
            }
            (Before::Moving { .. }, Event::Received) => {
                self.phases.enter_later("restore", now);
                Vec::new()
            }
            (Before::Moving { deadline, .. }, Event::Restored) if now >= *deadline => {
                self.roll_back(gate, self.deadline_passed(), now)
            }
            (Before::Moving { generation, .. }, Event::Restored) => {
                let generation = *generation;
                self.phases.enter("flip", now);
                self.state = State::Before(Before::Flipping { generation });
                vec![Command::Flip { generation }]
            }
            (Before::Flipping { .. }, Event::Flipped) => self.go_forward(now),

            // Time.
            (Before::PreparingTarget | Before::PreparingSource, Event::Tick) if now >= self.prepare_until => {
                let limit = PREPARE_LIMIT.as_secs();
                self.roll_back(gate, format!("an agent was not ready within {limit} s"), now)
            }
            (Before::Moving { deadline, .. }, Event::Tick) if now >= *deadline => {
                self.roll_back(gate, self.deadline_passed(), now)
            }

            // The flip's answer comes in the same breath as its question, so nothing can come between;
            // everything else is late or early news that changes nothing.
            (
                _,
                Event::TargetPrepared
                | Event::SourcePrepared
                | Event::Held { .. }
                | Event::Drained
                | Event::Frozen
                | Event::Dumped
                | Event::Received
                | Event::Restored
                | Event::Flipped
                | Event::Running
                | Event::GateResumed
                | Event::ResumeRefused(_)
                | Event::Tick,
            ) => Vec::new(),
        }
    }

    fn on_after(&mut self, after: After, event: Event, now: Duration) -> Vec<Command> {
        match (after, event) {
            (After::Confirming { .. }, Event::Running) => {
                self.phases.enter("release", now);
                self.state = State::After(After::Releasing {
                    give_up: now + FORWARD_LIMIT,
                    retry: Some(now + CATCHING_UP),
                    trouble: None,
                });
                Vec::new()
            }
            (After::Confirming { give_up, .. }, Event::TargetFailed(reason)) => {
                self.state = State::After(After::Confirming {
                    give_up,
                    retry: Some(now + RETRY_PAUSE),
                    trouble: Some(reason),
                });
                Vec::new()
            }
            (After::Confirming { give_up, retry, trouble }, Event::Tick) => {
                if now >= give_up {
                    let trouble = trouble.unwrap_or_else(|| "no answer".to_owned());
                    let reason = format!(
                        "the gate points at the target, but the target did not confirm that it runs: {trouble}. \
                         Look at both sites, then flip or resume by hand"
                    );
                    self.finish(Outcome::InDoubt, Some(reason), now);
                    Vec::new()
                } else if retry.is_some_and(|retry| now >= retry) {
                    self.state = State::After(After::Confirming { give_up, retry: None, trouble });
                    vec![Command::Go]
                } else {
                    Vec::new()
                }
            }
            (After::Releasing { .. }, Event::Released) => {
                self.finish(Outcome::Committed, None, now);
                Vec::new()
            }
            (After::Releasing { give_up, .. }, Event::SourceFailed(reason)) => {
                self.state = State::After(After::Releasing {
                    give_up,
                    retry: Some(now + RETRY_PAUSE),
                    trouble: Some(reason),
                });
                Vec::new()
            }
            (After::Releasing { give_up, retry, trouble }, Event::Tick) => {
                if now >= give_up {
                    let trouble = trouble.unwrap_or_else(|| "no answer".to_owned());
                    let reason = format!(
                        "the target runs and serves, but the source did not confirm that its copy is gone: \
                         {trouble}. Clients do not hear it; stop it there"
                    );
                    self.finish(Outcome::Committed, Some(reason), now);
                    Vec::new()
                } else if retry.is_some_and(|retry| now >= retry) {
                    self.state = State::After(After::Releasing { give_up, retry: None, trouble });
                    vec![Command::Release]
                } else {
                    Vec::new()
                }
            }
            // There is no way back from here: neither an abort nor any failure changes the direction.
            (
                After::Confirming { .. } | After::Releasing { .. },
                Event::TargetPrepared
                | Event::SourcePrepared
                | Event::Held { .. }
                | Event::Drained
                | Event::Frozen
                | Event::Dumped
                | Event::Received
                | Event::Restored
                | Event::Flipped
                | Event::CutoverRefused(_)
                | Event::Running
                | Event::Released
                | Event::SourceResumed
                | Event::TargetDropped
                | Event::GateResumed
                | Event::ResumeRefused(_)
                | Event::SourceFailed(_)
                | Event::TargetFailed(_)
                | Event::Abort,
            ) => Vec::new(),
        }
    }

    fn on_rolling_back(&mut self, mut back: RollingBack, event: Event, now: Duration) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::SourceResumed if !back.source_runs => {
                back.source_runs = true;
                back.retry = None;
                commands.extend(back.gate.map(|generation| Command::ResumeGate { generation }));
            }
            // Only a source behind a closed gate can be frozen: without one there is nothing to wait for.
            Event::SourceFailed(_) if back.gate.is_none() => back.source_runs = true,
            Event::SourceFailed(_) if !back.source_runs => back.retry = Some(now + RETRY_PAUSE),
            Event::TargetDropped | Event::TargetFailed(_) => back.target_gone = true,
            Event::GateResumed => back.gate = None,
            Event::ResumeRefused(why) => {
                let reason = format!(
                    "{}; and the gate could not be opened to the source again: {why}. Resume it by hand",
                    back.reason
                );
                self.finish(Outcome::InDoubt, Some(reason), now);
                return Vec::new();
            }
            Event::Tick if now >= back.give_up => {
                back.target_gone = true;
                if !back.source_runs {
                    // An agent that died took its CRIU's controller with it, and one that lives falls
                    // back at the deadline: by now the source runs, whether or not it could say so.
                    back.source_runs = true;
                    back.retry = None;
                    back.reason += "; the source's agent did not confirm that the source runs again";
                    commands.extend(back.gate.map(|generation| Command::ResumeGate { generation }));
                }
            }
            Event::Tick if back.retry.is_some_and(|retry| now >= retry) => {
                back.retry = None;
                commands.push(Command::ResumeSource);
            }
            // Old news from the way forward, and answers that were already taken.
            Event::TargetPrepared
            | Event::SourcePrepared
            | Event::Held { .. }
            | Event::Drained
            | Event::Frozen
            | Event::Dumped
            | Event::Received
            | Event::Restored
            | Event::Flipped
            | Event::CutoverRefused(_)
            | Event::Running
            | Event::Released
            | Event::SourceResumed
            | Event::SourceFailed(_)
            | Event::Abort
            | Event::Tick => {}
        }
        if back.source_runs && back.gate.is_none() && back.target_gone {
            self.finish(Outcome::RolledBack, Some(back.reason), now);
        } else {
            self.state = State::RollingBack(back);
        }
        commands
    }

    fn roll_back(&mut self, gate: Option<u32>, reason: String, now: Duration) -> Vec<Command> {
        let untouched = matches!(self.state, State::Before(Before::PreparingTarget));
        self.phases.enter("rollback", now);
        self.state = State::RollingBack(RollingBack {
            reason,
            gate,
            source_runs: untouched,
            target_gone: false,
            give_up: now + self.hold_deadline + MARGIN + MARGIN,
            retry: None,
        });
        if untouched { vec![Command::DropTarget] } else { vec![Command::ResumeSource, Command::DropTarget] }
    }

    fn go_forward(&mut self, now: Duration) -> Vec<Command> {
        self.phases.enter("confirm", now);
        self.state =
            State::After(After::Confirming { give_up: now + FORWARD_LIMIT, retry: None, trouble: None });
        vec![Command::Go]
    }

    fn deadline_passed(&self) -> String {
        format!(
            "the hold's deadline of {} ms passed before the target was restored",
            self.hold_deadline.as_millis()
        )
    }

    fn finish(&mut self, outcome: Outcome, reason: Option<String>, now: Duration) {
        self.phases.close(now);
        self.state = State::Finished { outcome, reason };
    }
}
