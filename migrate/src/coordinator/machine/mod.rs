//! The migration as a pure state machine: event and time in, commands out. No I/O, no clock.
//!
//! ```text
//! Before: PreparingTarget -> PreparingSource -> HoldingNew -> Holding -> Moving -> Flipping --flip--> After:
//!    \______________________any failure, abort, deadline____________________________/    Starting -> Confirming -> Releasing
//!                             |                                                            |           |           |
//!                        RollingBack -> Finished(rolled back)                              '-- doubt --'  Finished(committed)
//! ```
//!
//! The flip is the point of no return: no event leads from [`After`] to [`RollingBack`] but an operator's word, and the
//! target's that its copy is gone and never ran; a failure there can only be retried or reported. Before it, every
//! failure leads through [`RollingBack`], which opens the gate only after the source has said that it runs. A source
//! that may have sent images never runs of its own accord, and a target never before `go`: so there are never two live
//! copies.
//!
//! Where a site does not answer for too long the migration is in doubt ([`Machine::doubt`]): it goes on asking, and
//! ends when the site comes back or an operator says how ([`Event::Resolve`]).

mod event;
mod state;
#[cfg(test)]
mod timeless;

use std::time::Duration;

use super::Outcome;
use super::phases::Phases;
pub use event::{Command, Event, Verdict};
pub use state::{After, Asking, Before, Closed, Offer, RollingBack, State};

/// How long the preparation may take before the migration is given up. Nobody is held meanwhile.
pub const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// How long past its hold deadline a silent coordinator is waited for by agents that have sent and restored nothing,
/// and by how much clocks may drift apart during a lease.
pub const MARGIN: Duration = Duration::from_secs(2);
/// How long a site that does not answer is asked before an operator may be.
pub const FORWARD_LIMIT: Duration = Duration::from_secs(15);
/// How long a target runs unconfirmed before it suspends itself.
pub const LEASE: Duration = Duration::from_secs(10);
/// How long the target has the network and the machine to itself before the source is killed: it has a backlog to
/// answer, nobody waits for the release, and taking a server with many connections apart is work.
pub const CATCHING_UP: Duration = Duration::from_millis(100);
/// Pause before something that failed is tried again.
pub const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// The same in doubt.
pub const DOUBTFUL_PAUSE: Duration = Duration::from_secs(1);

/// The whole of one migration.
#[derive(Clone, Debug)]
pub struct Machine {
    state: State,
    phases: Phases,
    hold_deadline: Duration,
    handshakes: Duration,
    prepare_until: Duration,
    doubt: Option<String>,
}

impl Machine {
    /// A new migration at time zero, and what to do first. `handshakes`: how long new connections alone are held.
    pub fn start(hold_deadline: Duration, handshakes: Duration) -> (Self, Vec<Command>) {
        let start = Self::new(State::Before(Before::PreparingTarget), hold_deadline);
        let mut machine = Self { handshakes, ..start };
        machine.phases.enter("prepare", Duration::ZERO);
        (machine, vec![Command::PrepareTarget])
    }

    /// A migration that a former coordinator left before its flip: roll it back.
    pub fn recover_back(generation: u32, hold_deadline: Duration) -> (Self, Vec<Command>) {
        let mut machine = Self::new(State::Before(Before::Holding { generation: None }), hold_deadline);
        let reason = "the load balancer was restarted before the flip".to_owned();
        let commands = machine.roll_back(Some(Closed::AtSource { generation }), reason, Duration::ZERO);
        (machine, commands)
    }

    /// A migration that a former coordinator left after its flip: finish it. `confirmed`: it may have said `confirm`.
    pub fn recover_forward(confirmed: bool, hold_deadline: Duration) -> (Self, Vec<Command>) {
        let mut machine = Self::new(State::Before(Before::PreparingTarget), hold_deadline);
        machine.phases.enter("confirm", Duration::ZERO);
        let offer = Offer { number: None, came: Duration::ZERO };
        machine.state = State::After(After::Starting { go: Asking::from(Duration::ZERO), offer, confirmed });
        (machine, vec![Command::Offer])
    }

    /// A migration after whose flip an operator had decided for the source: goes on with that.
    pub fn recover_returned(
        at_target: bool,
        generation: u32,
        hold_deadline: Duration,
    ) -> (Self, Vec<Command>) {
        let mut machine = Self::new(State::Before(Before::Holding { generation: None }), hold_deadline);
        let gate = if at_target { Closed::Flipped } else { Closed::AtSource { generation } };
        let reason = "an operator said so before the load balancer was restarted; the target may hold a suspended copy";
        let commands = machine.roll_back(Some(gate), reason.to_owned(), Duration::ZERO);
        (machine, if at_target { vec![Command::Hold] } else { commands })
    }

    fn new(state: State, hold_deadline: Duration) -> Self {
        Self {
            state,
            phases: Phases::default(),
            hold_deadline,
            handshakes: Duration::ZERO,
            prepare_until: PREPARE_LIMIT,
            doubt: None,
        }
    }

    /// Why an operator is wanted, if so. It may still end by itself.
    pub fn doubt(&self) -> Option<&str> {
        self.doubt.as_deref()
    }

    /// Whether an operator's word would be taken; else why not.
    pub fn may_resolve(&self, verdict: Verdict, now: Duration) -> Result<(), String> {
        if self.doubt.is_none() {
            return Err("it is not in doubt".to_owned());
        }
        let lease_ends = match &self.state {
            State::After(After::Starting { offer, confirmed: false, .. }) => offer.came + LEASE,
            _ => Duration::ZERO,
        };
        match (&self.state, verdict) {
            (State::RollingBack(_), Verdict::Committed) => {
                Err("the target was never told to run, so it can only be rolled back".to_owned())
            }
            (
                State::After(
                    After::Starting { confirmed: true, .. } | After::Confirming { .. } | After::Releasing(_),
                ),
                Verdict::RolledBack,
            ) => Err("the target was told that its copy is the one and may serve again at any time, so it can only be \
                      committed"
                .to_owned()),
            (State::After(_), Verdict::RolledBack) if now < lease_ends + MARGIN => Err(format!(
                "the target may run until its lease ends, in {} s: wait for that",
                (lease_ends + MARGIN - now).as_secs() + 1
            )),
            _ => Ok(()),
        }
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
            State::Before(Before::HoldingNew { until, .. }) => Some(*until),
            State::Before(Before::Holding { .. } | Before::Flipping { .. }) => None,
            State::Before(Before::Moving { deadline, .. }) => Some(*deadline),
            State::After(
                After::Starting { go: asking, .. }
                | After::Confirming { confirm: asking, .. }
                | After::Releasing(asking),
            )
            | State::RollingBack(RollingBack { asking, .. }) => match (asking.retry, &self.doubt) {
                (Some(retry), None) => Some(retry.min(asking.give_up)),
                (None, None) => Some(asking.give_up),
                (retry, Some(_)) => retry,
            },
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
            Before::HoldingNew { generation, .. }
            | Before::Holding { generation: Some(generation) }
            | Before::Moving { generation, .. }
            | Before::Flipping { generation, .. } => Some(Closed::AtSource { generation }),
            Before::PreparingTarget | Before::PreparingSource | Before::Holding { generation: None } => None,
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
            (Before::PreparingSource, Event::SourceCopies) => {
                self.prepare_until = now + PREPARE_LIMIT;
                Vec::new()
            }
            (Before::PreparingSource, Event::SourcePrepared) if self.handshakes.is_zero() => {
                self.hold(None, now)
            }
            (Before::PreparingSource, Event::SourcePrepared) => {
                self.phases.enter("hold_new", now);
                self.state = State::Before(Before::Holding { generation: None });
                vec![Command::HoldNew]
            }
            (Before::Holding { generation: None }, Event::HeldNew { generation })
                if !self.handshakes.is_zero() =>
            {
                let until = now + self.handshakes;
                self.state = State::Before(Before::HoldingNew { generation, until });
                Vec::new()
            }
            (Before::HoldingNew { generation, until }, Event::Tick) if now >= *until => {
                self.hold(Some(*generation), now)
            }
            (Before::Holding { .. }, Event::Held { generation }) => {
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
            (Before::Moving { deadline, .. }, Event::Restored { .. }) if now >= *deadline => {
                self.roll_back(gate, self.deadline_passed(), now)
            }
            (Before::Moving { generation, .. }, Event::Restored { offer }) => {
                let (generation, offer) = (*generation, Offer { number: Some(offer), came: now });
                self.phases.enter("flip", now);
                self.state = State::Before(Before::Flipping { generation, offer });
                vec![Command::Flip { generation }]
            }
            (Before::Flipping { offer, .. }, Event::Flipped) => {
                let offer = *offer;
                self.phases.enter("confirm", now);
                self.state = State::After(After::Starting { go: Asking::from(now), offer, confirmed: false });
                offer.number.map(|offer| Command::Go { offer }).into_iter().collect()
            }

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
                | Event::SourceCopies
                | Event::SourcePrepared
                | Event::HeldNew { .. }
                | Event::Held { .. }
                | Event::Drained
                | Event::Frozen
                | Event::Dumped
                | Event::Received
                | Event::Restored { .. }
                | Event::Flipped
                | Event::Running
                | Event::Confirmed
                | Event::GateResumed
                | Event::ResumeRefused(_)
                | Event::SourceIndebted(_)
                | Event::Resolve(_)
                | Event::Tick,
            ) => Vec::new(),
        }
    }

    /// Closes the gate; `generation` is that of one that holds new connections already.
    fn hold(&mut self, generation: Option<u32>, now: Duration) -> Vec<Command> {
        self.phases.enter("hold", now);
        self.state = State::Before(Before::Holding { generation });
        vec![Command::Hold]
    }

    fn on_after(&mut self, after: After, event: Event, now: Duration) -> Vec<Command> {
        if let Event::Resolve(verdict) = event {
            return match self.may_resolve(verdict, now) {
                Ok(()) => self.resolve_after(verdict, now),
                Err(_) => Vec::new(),
            };
        }
        let (next, commands) = match (after, event) {
            // An older one may come late, or again.
            (After::Starting { go, offer: known, confirmed }, Event::Restored { offer })
                if known.number.is_none_or(|known| offer > known) =>
            {
                (
                    After::Starting { go, offer: Offer { number: Some(offer), came: now }, confirmed },
                    vec![Command::Go { offer }],
                )
            }
            (After::Starting { offer, .. }, Event::Running) => {
                self.doubt = None;
                (After::Confirming { confirm: Asking::from(now), offer }, vec![Command::Confirm])
            }
            (After::Starting { mut go, offer, confirmed }, Event::TargetFailed(trouble)) => {
                go.failed(trouble, now);
                (After::Starting { go, offer, confirmed }, Vec::new())
            }
            // It was lost before it ran, with its agent for instance. So the source's is the newest state.
            (After::Starting { confirmed: false, .. }, Event::TargetDropped) => {
                let reason = "the target lost its copy before it ran".to_owned();
                self.doubt = None;
                self.roll_back(Some(Closed::Flipped), reason, now);
                return vec![Command::Hold];
            }
            (After::Starting { mut go, offer, confirmed }, Event::Tick) => {
                if now >= go.give_up && self.doubt.is_none() {
                    self.doubt = Some(format!(
                        "the gate points at the target, but the target does not say that it runs: {}. It goes on when \
                         the target's agent answers; if it never will, say how it ends",
                        go.trouble()
                    ));
                }
                // The last offer's time may be over, or `go` came and its answer was lost: this one tells which.
                let commands = if go.is_due(now) { vec![Command::Offer] } else { Vec::new() };
                (After::Starting { go, offer, confirmed }, commands)
            }
            (After::Confirming { .. }, Event::Confirmed) => {
                self.doubt = None;
                self.phases.enter("release", now);
                let asking = Asking { retry: Some(now + CATCHING_UP), ..Asking::from(now) };
                (After::Releasing(asking), Vec::new())
            }
            (After::Confirming { mut confirm, offer }, Event::TargetFailed(trouble)) => {
                confirm.failed(trouble, now);
                (After::Confirming { confirm, offer }, Vec::new())
            }
            (After::Confirming { mut confirm, offer }, Event::Tick) => {
                if now >= confirm.give_up && self.doubt.is_none() {
                    self.doubt = Some(format!(
                        "the target ran, but cannot be told to go on when its lease ends: {}. It goes on when the \
                         target's agent answers; if it never will, say how it ends",
                        confirm.trouble()
                    ));
                }
                if !confirm.is_due(now) {
                    return self.stay(After::Confirming { confirm, offer });
                }
                // It may be suspended by now: the answer to this question tells.
                (After::Starting { go: confirm, offer, confirmed: true }, vec![Command::Offer])
            }
            (After::Releasing(_), Event::Released) => {
                self.finish(Outcome::Committed, None, now);
                return Vec::new();
            }
            (After::Releasing(mut release), Event::SourceFailed(trouble)) => {
                release.failed(trouble, now);
                (After::Releasing(release), Vec::new())
            }
            // That takes as long as it takes.
            (After::Releasing(mut release), Event::SourceIndebted(trouble)) => {
                release.failed(trouble, now);
                release.give_up = now + FORWARD_LIMIT;
                (After::Releasing(release), Vec::new())
            }
            (After::Releasing(mut release), Event::Tick) => {
                if now >= release.give_up {
                    let reason = format!(
                        "the target runs and serves, but the source did not confirm that its copy is gone: {}. It is \
                         stopped and clients do not hear it; remove it there",
                        release.trouble()
                    );
                    self.finish(Outcome::Committed, Some(reason), now);
                    return Vec::new();
                }
                let commands = if release.is_due(now) { vec![Command::Release] } else { Vec::new() };
                (After::Releasing(release), commands)
            }
            // There is no way back from here: neither an abort nor any failure changes the direction.
            (after, _) => (after, Vec::new()),
        };
        self.state = State::After(next);
        commands
    }

    fn stay(&mut self, after: After) -> Vec<Command> {
        self.state = State::After(after);
        Vec::new()
    }

    fn resolve_after(&mut self, verdict: Verdict, now: Duration) -> Vec<Command> {
        self.doubt = None;
        match verdict {
            Verdict::Committed => {
                let reason = "an operator said so; the source's copy is stopped and has to be removed there";
                self.finish(Outcome::Committed, Some(reason.to_owned()), now);
                Vec::new()
            }
            Verdict::RolledBack => {
                let reason = "an operator said so; the target may hold a suspended copy".to_owned();
                // What the target holds is waited for no longer than anything else that is cut off.
                self.roll_back(Some(Closed::Flipped), reason, now);
                vec![Command::Hold]
            }
        }
    }

    fn on_rolling_back(&mut self, mut back: RollingBack, event: Event, now: Duration) -> Vec<Command> {
        let mut commands = Vec::new();
        let resolved = match event {
            Event::Resolve(verdict) => self.may_resolve(verdict, now).is_ok(),
            _ => false,
        };
        match event {
            Event::Held { generation } if back.gate == Some(Closed::Flipped) => {
                back.gate = Some(Closed::AtTarget { generation });
                back.asking = Asking::from(now);
                commands.extend([Command::ResumeSource, Command::DropTarget]);
            }
            Event::SourceResumed if !back.source_runs && back.gate != Some(Closed::Flipped) => {
                self.doubt = None;
                back.source_runs = true;
                back.asking.retry = None;
                commands.extend(back.gate.map(Closed::open));
            }
            Event::Resolve(_) if resolved => {
                self.doubt = None;
                back.source_runs = true;
                back.target_gone = true;
                back.asking.retry = None;
                back.reason += "; an operator said that the source runs";
                commands.extend(back.gate.map(Closed::open));
            }
            // Only a source behind a closed gate can be frozen: without one there is nothing to wait for.
            Event::SourceFailed(_) if back.gate.is_none() => back.source_runs = true,
            Event::SourceFailed(trouble) if !back.source_runs => back.asking.failed(trouble, now),
            Event::TargetDropped | Event::TargetFailed(_) => back.target_gone = true,
            Event::GateResumed => back.gate = None,
            // What the flip let go is on its way to the target yet, which ends by itself.
            Event::CutoverRefused(why) if back.gate == Some(Closed::Flipped) && now < back.asking.give_up => {
                back.asking.failed(why, now);
            }
            Event::ResumeRefused(why) | Event::CutoverRefused(why) => {
                let reason = format!(
                    "{}; and the gate could not be opened to the source again: {why}. Resume it by hand",
                    back.reason
                );
                self.finish(Outcome::InDoubt, Some(reason), now);
                return Vec::new();
            }
            Event::Tick if back.gate == Some(Closed::Flipped) => {
                if back.asking.is_due(now) || now >= back.asking.give_up {
                    commands.push(Command::Hold);
                }
            }
            Event::Tick => {
                if now >= back.asking.give_up {
                    back.target_gone = true;
                    if !back.source_runs && self.doubt.is_none() {
                        self.doubt = Some(format!(
                            "{}; and the source's agent does not say that the source runs again: {}. It goes on when \
                             the agent answers; if it never will, say that it is rolled back once the source runs \
                             and has no part in a migration any more",
                            back.reason,
                            back.asking.trouble()
                        ));
                    }
                }
                if back.asking.is_due(now) {
                    commands.push(Command::ResumeSource);
                }
            }
            // Old news from the way forward, and answers that were already taken.
            Event::TargetPrepared
            | Event::SourceCopies
            | Event::SourcePrepared
            | Event::HeldNew { .. }
            | Event::Held { .. }
            | Event::Drained
            | Event::Frozen
            | Event::Dumped
            | Event::Received
            | Event::Restored { .. }
            | Event::Flipped
            | Event::Running
            | Event::Confirmed
            | Event::Released
            | Event::SourceResumed
            | Event::SourceFailed(_)
            | Event::SourceIndebted(_)
            | Event::Resolve(_)
            | Event::Abort => {}
        }
        if back.source_runs && back.gate.is_none() && back.target_gone {
            self.finish(Outcome::RolledBack, Some(back.reason), now);
        } else {
            self.state = State::RollingBack(back);
        }
        commands
    }

    fn roll_back(&mut self, gate: Option<Closed>, reason: String, now: Duration) -> Vec<Command> {
        let untouched = matches!(self.state, State::Before(Before::PreparingTarget));
        // Nobody has been told to freeze, whatever becomes of the agents: new connections have nothing to wait for.
        let open = match self.state {
            State::Before(Before::HoldingNew { .. } | Before::Holding { generation: Some(_) }) => {
                gate.map(Closed::open)
            }
            _ => None,
        };
        self.phases.enter("rollback", now);
        self.state = State::RollingBack(RollingBack {
            reason,
            gate,
            source_runs: untouched,
            target_gone: false,
            asking: Asking::from(now),
        });
        let resume = (!untouched).then_some(Command::ResumeSource);
        open.into_iter().chain(resume).chain([Command::DropTarget]).collect()
    }

    fn deadline_passed(&self) -> String {
        format!(
            "the hold's deadline of {} ms passed before the target was restored",
            self.hold_deadline.as_millis()
        )
    }

    fn finish(&mut self, outcome: Outcome, reason: Option<String>, now: Duration) {
        self.phases.close(now);
        self.doubt = None;
        self.state = State::Finished { outcome, reason };
    }
}
