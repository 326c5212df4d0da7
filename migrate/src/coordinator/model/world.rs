//! Everything that there is at one moment, and how it takes what happens.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::source::{Criu, SourceWorld};
use super::{Broken, HOLD, NOW};
use crate::coordinator::machine::{self, Machine};
use crate::protocol::AgentEvent;
use crate::roles::{source, target};

/// What a party says to another; once said, it may come at any time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Message {
    ToSource(source::Event),
    ToTarget(target::Event),
    ToCoordinator(machine::Event),
    /// From the coordinator to both, before anything else.
    PrepareTarget,
    PrepareSource,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct TargetWorld {
    pub(super) state: Option<target::State>,
    pub(super) restoring: bool,
    pub(super) starting: bool,
    pub(super) ending: bool,
    pub(super) dropping: bool,
    /// Its tasks run.
    pub(super) runs: bool,
    pub(super) has_run: bool,
}

/// The coordinator; compared without its times' history.
#[derive(Clone, Debug)]
pub(super) struct Coordinator(pub(super) Machine);

impl Coordinator {
    pub(super) fn new(mut machine: Machine) -> Self {
        machine.rebase(Duration::ZERO, NOW);
        Self(machine)
    }

    pub(super) fn key(&self) -> String {
        self.0.essence(NOW).0
    }
}

impl PartialEq for Coordinator {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Coordinator {}

impl Hash for Coordinator {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

/// What outlives the load balancer's daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Gate {
    pub(super) closed: bool,
    /// Closed for new connections only.
    pub(super) holds_new: bool,
    pub(super) at_target: bool,
    pub(super) generation: u32,
    /// The journal: an operator has said that the source's copy counts.
    pub(super) resolved_back: bool,
    /// The journal: `confirm` is about to be said.
    pub(super) confirmed: bool,
}

impl Gate {
    pub(super) fn is_open(self) -> bool {
        !self.closed && !self.holds_new
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) coordinator: Coordinator,
    pub(super) gate: Gate,
    pub(super) network: BTreeSet<Message>,
    pub(super) source: SourceWorld,
    pub(super) target: TargetWorld,
    /// Faults left.
    pub(super) crashes: u8,
    pub(super) failures: u8,
}

impl World {
    pub(super) fn tell_source(&mut self, event: source::Event) {
        let Some(state) = self.source.state.clone() else { return };
        let (next, commands) = state.on(event);
        self.source.state = Some(next);
        for command in commands {
            use source::Command;
            let world = &mut self.source;
            match command {
                Command::Drain => world.draining = true,
                Command::Yes => {
                    world.criu = match world.criu {
                        Criu::Waiting => Criu::Dumping,
                        Criu::Dumped => Criu::Killing,
                        other => other,
                    }
                }
                Command::No => {
                    world.criu = match world.criu {
                        Criu::Waiting => Criu::Leaving,
                        Criu::Gone => Criu::Gone,
                        _ => Criu::Undoing,
                    }
                }
                Command::Fence => world.fenced = true,
                Command::Unfence => world.fenced = false,
                Command::Revive => (world.fenced, world.criu) = (false, Criu::Undoing),
                Command::Kill => world.criu = Criu::Killing,
                // Tried again or not makes no difference to who may run.
                Command::DumpAgain => {}
                Command::Silence => world.rules.push(true),
                Command::Lift => world.rules.push(false),
                Command::Send => {
                    self.network.insert(Message::ToTarget(target::Event::ImagesComplete { sent_bytes: 0 }));
                }
                Command::Report(event) => self.report(event, true),
                Command::End => {}
            }
        }
    }

    pub(super) fn tell_target(&mut self, event: target::Event) {
        let Some(state) = self.target.state.clone() else { return };
        let (next, commands) = state.on(event);
        self.target.state = Some(next);
        for command in commands {
            use target::Command;
            let world = &mut self.target;
            match command {
                Command::Restore => world.restoring = true,
                Command::Keep => world.starting = true,
                Command::Yes => world.ending = true,
                Command::Suspend => world.runs = false,
                Command::Continue => world.runs = true,
                Command::Drop => (world.dropping, world.runs) = (true, false),
                Command::Report(event) => {
                    self.report(event, false);
                }
                Command::End => {}
            }
        }
    }

    pub(super) fn report(&mut self, event: AgentEvent, by_source: bool) {
        use machine::Event;
        let failed =
            |reason| if by_source { Event::SourceFailed(reason) } else { Event::TargetFailed(reason) };
        let event = match event {
            // They decide nothing, or are not the role's but its driver's: a prepared source is ready here.
            AgentEvent::Copying { .. }
            | AgentEvent::CopiedAhead { .. }
            | AgentEvent::Drained
            | AgentEvent::Frozen { .. }
            | AgentEvent::Dumped { .. }
            | AgentEvent::Served(_)
            | AgentEvent::Received { .. } => return,
            AgentEvent::Restored { offer } => Event::Restored { offer },
            AgentEvent::Running(_) => Event::Running,
            AgentEvent::Confirmed => Event::Confirmed,
            AgentEvent::Released => Event::Released,
            AgentEvent::Resumed(_) => Event::SourceResumed,
            AgentEvent::Dropped => Event::TargetDropped,
            AgentEvent::Suspended => failed("suspended".to_owned()),
            AgentEvent::Failed { .. } => failed("x".to_owned()),
        };
        self.network.insert(Message::ToCoordinator(event));
    }

    /// Gives the coordinator an event at a time from [`NOW`] on.
    pub(super) fn tell_coordinator(&mut self, event: machine::Event, at: Duration, broken: Broken) {
        // By then the offer that the coordinator knows, or any that a former one knew, is over at the target, too.
        if let Some(number) = self.coordinator.0.essence(at).1
            && (number.is_none() || number == self.offered())
        {
            self.expire_target(broken);
        }
        let commands = self.coordinator.0.on(event, at);
        self.coordinator.0.rebase(at, NOW);
        self.perform(commands);
    }

    pub(super) fn expire_target(&mut self, broken: Broken) {
        if broken != Broken::Lease {
            self.tell_target(target::Event::Expired);
        }
    }

    pub(super) fn perform(&mut self, commands: Vec<machine::Command>) {
        use machine::{Command, Event};
        for command in commands {
            let answer = match command {
                Command::PrepareTarget => {
                    self.network.insert(Message::PrepareTarget);
                    None
                }
                Command::PrepareSource => {
                    self.network.insert(Message::PrepareSource);
                    None
                }
                Command::HoldNew => {
                    self.gate.holds_new = true;
                    self.gate.generation += 1;
                    Some(Event::HeldNew { generation: self.gate.generation })
                }
                Command::Hold => {
                    (self.gate.closed, self.gate.holds_new) = (true, false);
                    self.gate.generation += 1;
                    Some(Event::Held { generation: self.gate.generation })
                }
                Command::Flip { .. } => {
                    (self.gate.closed, self.gate.at_target) = (false, true);
                    Some(Event::Flipped)
                }
                Command::ResumeGate { .. } => {
                    (self.gate.closed, self.gate.holds_new) = (false, false);
                    Some(Event::GateResumed)
                }
                Command::FlipBack { .. } => {
                    (self.gate.closed, self.gate.at_target) = (false, false);
                    Some(Event::GateResumed)
                }
                Command::Freeze => self.say(Message::ToSource(source::Event::Freeze)),
                Command::Release => self.say(Message::ToSource(source::Event::Release)),
                Command::ResumeSource => self.say(Message::ToSource(source::Event::Abort)),
                Command::Offer => self.say(Message::ToTarget(target::Event::Offer)),
                Command::Go { offer } => self.say(Message::ToTarget(target::Event::Go { offer })),
                Command::Confirm => {
                    self.gate.confirmed = true;
                    self.say(Message::ToTarget(target::Event::Confirm))
                }
                Command::DropTarget => self.say(Message::ToTarget(target::Event::Abort)),
            };
            if let Some(event) = answer {
                let commands = self.coordinator.0.on(event, NOW);
                self.perform(commands);
            }
        }
    }

    pub(super) fn say(&mut self, message: Message) -> Option<machine::Event> {
        self.network.insert(message);
        None
    }

    pub(super) fn deliver(&mut self, message: Message, broken: Broken) {
        match message {
            Message::PrepareTarget => {
                if self.target.state.is_none() {
                    self.target.state = Some(target::State::START);
                }
                self.network.insert(Message::ToCoordinator(machine::Event::TargetPrepared));
            }
            Message::PrepareSource => {
                if self.source.state.is_none() {
                    self.source.state = Some(source::State::Ready);
                }
                self.network.insert(Message::ToCoordinator(machine::Event::SourcePrepared));
            }
            Message::ToSource(event) => {
                self.answer_for_ended_source(&event);
                self.tell_source(event);
            }
            Message::ToTarget(event) => {
                let event = match (event, broken, self.offered()) {
                    (target::Event::Go { .. }, Broken::Offer, Some(offer)) => target::Event::Go { offer },
                    (event, _, _) => event,
                };
                self.answer_for_ended_target(&event);
                self.tell_target(event);
            }
            Message::ToCoordinator(event) => self.tell_coordinator(event, NOW, broken),
        }
    }

    /// The agents answer questions about parts that are over, or that they never had.
    pub(super) fn answer_for_ended_source(&mut self, event: &source::Event) {
        use source::{End, Event, State};
        let answer = match (event, &self.source.state) {
            (Event::Abort, None | Some(State::Ended(End::Resumed { .. }))) => machine::Event::SourceResumed,
            (Event::Release, Some(State::Ended(End::Released))) => machine::Event::Released,
            _ => return,
        };
        self.network.insert(Message::ToCoordinator(answer));
    }

    pub(super) fn answer_for_ended_target(&mut self, event: &target::Event) {
        use target::{Event, State};
        let question = matches!(event, Event::Abort | Event::Offer | Event::Go { .. });
        if question && matches!(self.target.state, None | Some(State::Dropped)) {
            self.network.insert(Message::ToCoordinator(machine::Event::TargetDropped));
        }
    }

    pub(super) fn offered(&self) -> Option<u32> {
        use target::{Before, Committed, State};
        match &self.target.state {
            Some(
                State::Before(Before::Restored(offer))
                | State::Committed(
                    Committed::Starting { offer }
                    | Committed::Running { offer, .. }
                    | Committed::Suspended { offer, .. },
                ),
            ) => Some(offer.number),
            _ => None,
        }
    }

    pub(super) fn at_source(&mut self, event: source::Event) {
        self.source.happened(&event);
        self.tell_source(event);
    }

    pub(super) fn at_target(&mut self, event: target::Event) {
        let world = &mut self.target;
        match event {
            target::Event::HookPreResume => world.restoring = false,
            target::Event::HookPostResume { .. } => {
                (world.starting, world.runs, world.has_run) = (false, true, true);
            }
            target::Event::CriuEnded { .. } => {
                (world.restoring, world.starting, world.ending) = (false, false, false);
            }
            target::Event::Dropped => world.dropping = false,
            _ => {}
        }
        self.tell_target(event);
    }

    pub(super) fn target_possible(&self, faults: bool) -> Vec<target::Event> {
        use target::Event;
        let world = &self.target;
        let mut events = Vec::new();
        if world.restoring {
            events.push(Event::HookPreResume);
            events.extend(faults.then(|| Event::CriuEnded { failed: Some("x".to_owned()) }));
        }
        if world.starting {
            events.push(Event::HookPostResume { at_unix_us: 0 });
        }
        if world.ending {
            events.push(Event::CriuEnded { failed: None });
        }
        if world.dropping {
            events.push(Event::Dropped);
        }
        events
    }

    /// The daemon dies and another one reads gates and journal. How long that took, nobody knows.
    pub(super) fn kill_coordinator(&mut self) {
        use machine::State;
        if matches!(self.coordinator.0.state(), State::Finished { .. }) {
            return;
        }
        let (machine, commands) = match self.gate {
            Gate { resolved_back: true, at_target, generation, .. } => {
                Machine::recover_returned(at_target, generation, HOLD)
            }
            Gate { at_target: true, confirmed, .. } => Machine::recover_forward(confirmed, HOLD),
            Gate { generation, .. } => Machine::recover_back(generation, HOLD),
        };
        // What was said to the former one went with its connections.
        self.network.retain(|message| !matches!(message, Message::ToCoordinator(_)));
        self.coordinator = Coordinator::new(machine);
        self.perform(commands);
    }

    /// CRIU loses its controller and lets go; another agent reads the records.
    pub(super) fn kill_source_agent(&mut self) {
        use source::{End, Silence, State};
        let Some(state) = &self.source.state else { return };
        if matches!(state, State::Ended(_)) {
            return;
        }
        let world = &mut self.source;
        (world.draining, world.rules) = (false, Vec::new());
        if world.criu == Criu::Killing {
            world.criu = Criu::Killed;
            world.state = Some(State::Ended(End::Released));
        } else {
            world.criu = Criu::Gone;
            world.state = Some(match world.fenced {
                true => State::Stopped { silence: Silence::Off, release: false },
                false => State::Ended(End::Resumed { at_unix_us: 0 }),
            });
        }
    }

    /// Until `go`, what there is dies with its agent; from then on it stops with it until it is confirmed.
    pub(super) fn kill_target_agent(&mut self) {
        use target::{Committed, State};
        let world = &mut self.target;
        let next = match world.state.clone() {
            None | Some(State::Lost) => return,
            Some(State::Before(_) | State::Dropping | State::Dropped) => State::Dropped,
            Some(State::Committed(Committed::Starting { .. })) => State::Lost,
            Some(State::Committed(Committed::Running { running, confirmed: true, offer, .. })) => {
                State::Committed(Committed::Running { running, offer, confirmed: true, restored: true })
            }
            Some(State::Committed(
                Committed::Running { running, offer, .. } | Committed::Suspended { running, offer, .. },
            )) => {
                world.runs = false;
                let offer = target::Offer { lapsed: true, ..offer };
                State::Committed(Committed::Suspended { running, offer, restored: true })
            }
        };
        (world.restoring, world.starting, world.ending, world.dropping) = (false, false, false, false);
        world.state = Some(next);
    }

    pub(super) fn is_finished(&self) -> bool {
        matches!(self.coordinator.0.state(), machine::State::Finished { .. })
    }

    pub(super) fn is_confirmed(&self) -> bool {
        use target::{Committed, State};
        matches!(self.target.state, Some(State::Committed(Committed::Running { confirmed: true, .. })))
    }

    pub(super) fn is_lost(&self) -> bool {
        self.target.state == Some(target::State::Lost)
    }

    /// Nothing fails any more, and everything that was under way is lost: does it end, with one live copy and the
    /// gate open to it?
    pub(super) fn ends_well(&self) -> bool {
        let mut world = self.clone();
        world.network.clear();
        for _ in 0..200 {
            let messages = std::mem::take(&mut world.network);
            for message in messages {
                world.deliver(message, Broken::Nothing);
            }
            while let Some(event) = world.source.possible(false).into_iter().next() {
                world.at_source(event);
            }
            while let Some(event) = world.target_possible(false).into_iter().next() {
                world.at_target(event);
            }
            if world.is_finished() && world.network.is_empty() {
                break;
            }
            if world.network.is_empty() {
                // Whoever waits for an answer hears that there will be none.
                for event in [
                    machine::Event::SourceFailed("lost".to_owned()),
                    machine::Event::TargetFailed("lost".to_owned()),
                ] {
                    world.tell_coordinator(event, NOW, Broken::Nothing);
                }
                if let Some(wake) = world.coordinator.0.wake_at() {
                    world.tell_coordinator(machine::Event::Tick, wake, Broken::Nothing);
                }
            }
        }
        let one = world.source.runs() != world.target.runs;
        let heard = world.gate.is_open() && world.gate.at_target == world.target.runs;
        // A source that was prepared and left behind falls back when its patience ends.
        world.is_finished() && one && heard || world.is_lost()
    }
}
