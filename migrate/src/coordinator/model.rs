//! The three machines together, explored state by state: messages lost, doubled and as late as you like, every party
//! killed at any moment, requests that fail, patience and leases that end, operators who abort and resolve.
//!
//! The network is the set of everything that was ever said: each message may be delivered at any later moment, any
//! number of times, or never. Time is the coordinator's, shifted so that it is always [`NOW`]: it passes when nothing
//! else happens before the next deadline. A lease's end comes at the target at any moment, but at the latest when the
//! coordinator's clock has seen the lease and the margin for drift pass.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use stateright::{Checker, Model, Property};

use super::Outcome;
use super::machine::{self, FORWARD_LIMIT, Machine, Verdict};
use crate::protocol::AgentEvent;
use crate::roles::{source, target};

/// Far enough from zero for everything that may lie in the past.
const NOW: Duration = Duration::from_secs(100);
const HOLD: Duration = Duration::from_secs(5);
/// Offers that a target makes at most.
const OFFERS: u32 = 2;

/// What a party says to another; once said, it may come at any time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Message {
    ToSource(source::Event),
    ToTarget(target::Event),
    ToCoordinator(machine::Event),
    /// From the coordinator to both, before anything else.
    PrepareTarget,
    PrepareSource,
}

/// CRIU at the source, and what the rules are about to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SourceWorld {
    state: Option<source::State>,
    criu: Criu,
    fenced: bool,
    draining: bool,
    rules: Vec<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Criu {
    Waiting,
    Dumping,
    Frozen,
    Dumped,
    /// It lets go of tasks that it had not frozen.
    Leaving,
    Undoing,
    Killing,
    Gone,
    Killed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TargetWorld {
    state: Option<target::State>,
    restoring: bool,
    starting: bool,
    ending: bool,
    dropping: bool,
    /// Its tasks run.
    runs: bool,
    has_run: bool,
}

/// The coordinator; compared without its times' history.
#[derive(Clone, Debug)]
struct Coordinator(Machine);

impl Coordinator {
    fn new(mut machine: Machine) -> Self {
        machine.rebase(Duration::ZERO, NOW);
        Self(machine)
    }

    fn key(&self) -> String {
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
struct Gate {
    closed: bool,
    at_target: bool,
    generation: u32,
    /// The journal: an operator has said that the source's copy counts.
    resolved_back: bool,
    /// The journal: `confirm` is about to be said.
    confirmed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    coordinator: Coordinator,
    gate: Gate,
    network: BTreeSet<Message>,
    source: SourceWorld,
    target: TargetWorld,
    /// Faults left.
    crashes: u8,
    failures: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Deliver(Message),
    /// Of the source's own surroundings.
    AtSource(source::Event),
    AtTarget(target::Event),
    /// A request failed, or its answer was lost.
    Failed(machine::Event),
    /// The coordinator's next deadline.
    Tick,
    /// Long enough for every deadline of the coordinator's.
    LongTick,
    Operator(machine::Event),
    KillCoordinator,
    KillSourceAgent,
    KillTargetAgent,
    KillCriu,
}

/// A rule that is broken, to see the checker find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A fenced source runs when its patience ends.
    Fence,
    /// A target takes up any `go`, whichever offer it is for.
    Offer,
    /// A target that is not confirmed runs on.
    Lease,
    /// The coordinator opens the gate to a source that has not said that it runs, and forgets it.
    Confirmation,
}

struct Cutovers {
    broken: Broken,
    crashes: u8,
    failures: u8,
}

impl SourceWorld {
    fn runs(&self) -> bool {
        match self.criu {
            Criu::Waiting | Criu::Dumping | Criu::Leaving => true,
            Criu::Gone => !self.fenced,
            Criu::Frozen | Criu::Dumped | Criu::Undoing | Criu::Killing | Criu::Killed => false,
        }
    }

    /// It runs, and its part is over or has not begun.
    fn is_over(&self) -> bool {
        use source::{End, State};
        self.runs() && matches!(self.state, None | Some(State::Ended(End::Resumed { .. })))
    }

    /// What may happen next of its own accord.
    fn possible(&self, faults: bool) -> Vec<source::Event> {
        use source::Event;
        let mut events = Vec::new();
        let ended = |failed: bool| Event::CriuEnded {
            at_unix_us: 0,
            failed: failed.then(|| "x".to_owned()),
            in_flight: false,
        };
        if self.draining {
            events.push(Event::Drained);
            events.extend(faults.then(|| Event::DrainFailed("x".to_owned())));
        }
        match self.rules.first() {
            Some(true) => {
                events.push(Event::Silenced);
                events.extend(faults.then(|| Event::SilenceFailed("x".to_owned())));
            }
            Some(false) => events.push(Event::Lifted),
            None => {}
        }
        match self.criu {
            Criu::Dumping => events.push(Event::HookFrozen { at_unix_us: 0 }),
            Criu::Frozen => {
                events.push(Event::HookPostDump { image_bytes: 0 });
                events.extend(faults.then(|| ended(true)));
            }
            Criu::Leaving | Criu::Undoing | Criu::Killing => events.push(ended(false)),
            Criu::Waiting | Criu::Dumped | Criu::Gone | Criu::Killed => {}
        }
        events
    }

    fn happened(&mut self, event: &source::Event) {
        use source::Event;
        match event {
            Event::Drained | Event::DrainFailed(_) => self.draining = false,
            Event::Silenced | Event::SilenceFailed(_) | Event::Lifted => drop(self.rules.remove(0)),
            Event::HookFrozen { .. } => self.criu = Criu::Frozen,
            Event::HookPostDump { .. } => self.criu = Criu::Dumped,
            Event::CriuEnded { .. } => {
                self.criu = if self.criu == Criu::Killing { Criu::Killed } else { Criu::Gone };
            }
            _ => {}
        }
    }
}

impl World {
    fn tell_source(&mut self, event: source::Event) {
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

    fn tell_target(&mut self, event: target::Event) {
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

    fn report(&mut self, event: AgentEvent, by_source: bool) {
        use machine::Event;
        let failed =
            |reason| if by_source { Event::SourceFailed(reason) } else { Event::TargetFailed(reason) };
        let event = match event {
            // They decide nothing.
            AgentEvent::Drained
            | AgentEvent::Frozen { .. }
            | AgentEvent::Dumped { .. }
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
    fn tell_coordinator(&mut self, event: machine::Event, at: Duration, broken: Broken) {
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

    fn expire_target(&mut self, broken: Broken) {
        if broken != Broken::Lease {
            self.tell_target(target::Event::Expired);
        }
    }

    fn perform(&mut self, commands: Vec<machine::Command>) {
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
                Command::Hold => {
                    self.gate.closed = true;
                    self.gate.generation += 1;
                    Some(Event::Held { generation: self.gate.generation })
                }
                Command::Flip { .. } => {
                    (self.gate.closed, self.gate.at_target) = (false, true);
                    Some(Event::Flipped)
                }
                Command::ResumeGate { .. } => {
                    self.gate.closed = false;
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

    fn say(&mut self, message: Message) -> Option<machine::Event> {
        self.network.insert(message);
        None
    }

    fn deliver(&mut self, message: Message, broken: Broken) {
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
    fn answer_for_ended_source(&mut self, event: &source::Event) {
        use source::{End, Event, State};
        let answer = match (event, &self.source.state) {
            (Event::Abort, None | Some(State::Ended(End::Resumed { .. }))) => machine::Event::SourceResumed,
            (Event::Release, Some(State::Ended(End::Released))) => machine::Event::Released,
            _ => return,
        };
        self.network.insert(Message::ToCoordinator(answer));
    }

    fn answer_for_ended_target(&mut self, event: &target::Event) {
        use target::{Event, State};
        let question = matches!(event, Event::Abort | Event::Offer | Event::Go { .. });
        if question && matches!(self.target.state, None | Some(State::Dropped)) {
            self.network.insert(Message::ToCoordinator(machine::Event::TargetDropped));
        }
    }

    fn offered(&self) -> Option<u32> {
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

    fn at_source(&mut self, event: source::Event) {
        self.source.happened(&event);
        self.tell_source(event);
    }

    fn at_target(&mut self, event: target::Event) {
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

    fn target_possible(&self, faults: bool) -> Vec<target::Event> {
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
    fn kill_coordinator(&mut self) {
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
    fn kill_source_agent(&mut self) {
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
    fn kill_target_agent(&mut self) {
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

    fn is_finished(&self) -> bool {
        matches!(self.coordinator.0.state(), machine::State::Finished { .. })
    }

    fn is_confirmed(&self) -> bool {
        use target::{Committed, State};
        matches!(self.target.state, Some(State::Committed(Committed::Running { confirmed: true, .. })))
    }

    fn is_lost(&self) -> bool {
        self.target.state == Some(target::State::Lost)
    }

    /// Nothing fails any more, and everything that was under way is lost: does it end, with one live copy and the
    /// gate open to it?
    fn ends_well(&self) -> bool {
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
        let heard = !world.gate.closed && world.gate.at_target == world.target.runs;
        // A source that was prepared and left behind falls back when its patience ends.
        world.is_finished() && one && heard || world.is_lost()
    }
}

impl Model for Cutovers {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let (machine, commands) = Machine::start(HOLD);
        let mut world = World {
            coordinator: Coordinator::new(machine),
            gate: Gate::default(),
            network: BTreeSet::new(),
            source: SourceWorld {
                state: None,
                criu: Criu::Waiting,
                fenced: false,
                draining: false,
                rules: Vec::new(),
            },
            target: TargetWorld {
                state: None,
                restoring: false,
                starting: false,
                ending: false,
                dropping: false,
                runs: false,
                has_run: false,
            },
            crashes: self.crashes,
            failures: self.failures,
        };
        world.perform(commands);
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        use machine::Event;
        let late_offer = |message: &&Message| {
            !(**message == Message::ToTarget(target::Event::Offer)
                && world.offered().is_some_and(|number| number + 1 >= OFFERS))
        };
        actions.extend(world.network.iter().filter(late_offer).cloned().map(Action::Deliver));
        let faults = world.failures > 0;
        actions.extend(world.source.possible(faults).into_iter().map(Action::AtSource));
        actions.extend(world.target_possible(faults).into_iter().map(Action::AtTarget));
        actions.push(Action::AtSource(source::Event::Expired));
        actions.push(Action::AtTarget(target::Event::Expired));
        if faults {
            let failed = [Event::SourceFailed("x".to_owned()), Event::TargetFailed("x".to_owned())];
            actions.extend(failed.map(Action::Failed));
            actions.push(Action::AtSource(source::Event::SendFailed("x".to_owned())));
            actions.push(Action::AtTarget(target::Event::ImagesFailed("x".to_owned())));
        }
        if world.coordinator.0.wake_at().is_some() {
            actions.extend([Action::Tick, Action::LongTick]);
        }
        actions.push(Action::Operator(Event::Abort));
        for verdict in [Verdict::Committed, Verdict::RolledBack] {
            // That a copy runs, operators say when they see it, and nothing in its agent that would stop it.
            let sees = match (verdict, world.coordinator.0.state()) {
                (Verdict::Committed, _) => world.target.runs && world.is_confirmed(),
                (Verdict::RolledBack, machine::State::RollingBack(_)) => world.source.is_over(),
                (Verdict::RolledBack, _) => true,
            };
            if sees && world.coordinator.0.may_resolve(verdict, NOW).is_ok() {
                actions.push(Action::Operator(Event::Resolve(verdict)));
            }
        }
        if world.crashes > 0 {
            actions.extend([Action::KillCoordinator, Action::KillSourceAgent, Action::KillTargetAgent]);
            if matches!(world.source.criu, Criu::Dumped) {
                actions.push(Action::KillCriu);
            }
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Deliver(message) => next.deliver(message, self.broken),
            Action::AtSource(event) => {
                next.failures -= u8::from(is_fault(&event));
                let fenced = matches!(
                    next.source.state,
                    Some(source::State::Frozen { .. } | source::State::Stopped { .. })
                );
                if self.broken == Broken::Fence && fenced && event == source::Event::Expired {
                    next.tell_source(source::Event::Abort);
                } else {
                    next.at_source(event);
                }
            }
            Action::AtTarget(target::Event::Expired) => next.expire_target(self.broken),
            Action::AtTarget(event) => {
                let fault = matches!(
                    event,
                    target::Event::ImagesFailed(_) | target::Event::CriuEnded { failed: Some(_) }
                );
                next.failures -= u8::from(fault);
                next.at_target(event);
            }
            Action::Failed(event) => {
                next.failures -= 1;
                let is_source = matches!(event, machine::Event::SourceFailed(_));
                next.tell_coordinator(event, NOW, self.broken);
                if self.broken == Broken::Confirmation && is_source {
                    next.tell_coordinator(machine::Event::SourceResumed, NOW, self.broken);
                }
            }
            Action::Tick => {
                let wake = next.coordinator.0.wake_at()?;
                next.tell_coordinator(machine::Event::Tick, wake, self.broken);
            }
            Action::LongTick => {
                next.tell_coordinator(machine::Event::Tick, NOW + FORWARD_LIMIT, self.broken);
            }
            Action::Operator(event) => {
                next.gate.resolved_back |= event == machine::Event::Resolve(Verdict::RolledBack)
                    && matches!(next.coordinator.0.state(), machine::State::After(_));
                next.tell_coordinator(event, NOW, self.broken);
            }
            Action::KillCoordinator => {
                next.crashes -= 1;
                next.kill_coordinator();
            }
            Action::KillSourceAgent => {
                next.crashes -= 1;
                next.kill_source_agent();
            }
            Action::KillTargetAgent => {
                next.crashes -= 1;
                next.kill_target_agent();
            }
            Action::KillCriu => {
                next.crashes -= 1;
                next.at_source(source::Event::CriuEnded {
                    at_unix_us: 0,
                    failed: Some("killed".to_owned()),
                    in_flight: false,
                });
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two live copies", |_, world: &World| {
                !(world.source.runs() && world.target.runs)
            }),
            Property::always("the newest state is not thrown away but by an operator", |_, world: &World| {
                !(world.target.has_run && world.source.runs()) || world.gate.resolved_back
            }),
            Property::always("clients hear a live copy or none", |_, world: &World| {
                world.gate.closed || world.gate.at_target || !world.target.runs
            }),
            Property::always("an end is an end", |_, world: &World| match world.coordinator.0.state() {
                machine::State::Finished { outcome: Outcome::RolledBack, .. } => {
                    !world.gate.at_target && !world.gate.closed && !world.target.runs && world.source.runs()
                }
                machine::State::Finished { outcome: Outcome::Committed, .. } => {
                    world.gate.at_target && !world.source.runs()
                }
                _ => true,
            }),
            Property::always("no dead end", |model: &Cutovers, world: &World| {
                model.broken != Broken::Nothing || world.ends_well()
            }),
            Property::sometimes("committed", |_, world: &World| {
                matches!(
                    world.coordinator.0.state(),
                    machine::State::Finished { outcome: Outcome::Committed, reason: None }
                )
            }),
            Property::sometimes("rolled back after the freeze", |_, world: &World| {
                world.source.fenced && matches!(world.coordinator.0.state(), machine::State::RollingBack(_))
            }),
            Property::sometimes("in doubt", |_, world: &World| world.coordinator.0.doubt().is_some()),
        ]
    }
}

fn is_fault(event: &source::Event) -> bool {
    use source::Event;
    match event {
        Event::DrainFailed(_) | Event::SilenceFailed(_) | Event::SendFailed(_) => true,
        Event::CriuEnded { failed, .. } => failed.is_some(),
        _ => false,
    }
}

fn explore(broken: Broken, crashes: u8, failures: u8) -> impl Checker<Cutovers> {
    let checker = Cutovers { broken, crashes, failures }.checker().threads(2);
    let checker = if broken == Broken::Nothing { checker } else { checker.target_state_count(3_000_000) };
    checker.spawn_bfs().join()
}

#[test]
fn every_reachable_state_is_safe_and_leads_to_an_end() {
    for (crashes, failures) in [(0, 0), (1, 0), (0, 1)] {
        all_is_well(crashes, failures);
    }
}

#[test]
#[ignore = "minutes without optimization; run it with --release -- --ignored"]
fn so_is_every_state_after_a_crash_and_a_failure() {
    all_is_well(1, 1);
}

/// Explores all that can be reached with so many crashes and failures.
fn all_is_well(crashes: u8, failures: u8) {
    let checker = explore(Broken::Nothing, crashes, failures);
    println!(
        "{} states explored ({} distinct) with at most {crashes} crashes and {failures} failures, depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

#[test]
fn a_broken_rule_is_found() {
    for broken in [Broken::Fence, Broken::Offer, Broken::Lease, Broken::Confirmation] {
        let checker = explore(broken, 0, 2);
        let found: Vec<_> = checker.discoveries().into_keys().collect();
        let violated = [
            "never two live copies",
            "an end is an end",
            "the newest state is not thrown away but by an operator",
        ];
        assert!(found.iter().any(|name| violated.contains(name)), "{broken:?} was not found: {found:?}");
    }
}
