//! The three machines together, explored state by state: messages lost, doubled and as late as you like, every party
//! killed at any moment, requests that fail, patience and leases that end, operators who abort and resolve.
//!
//! The network is the set of everything that was ever said: each message may be delivered at any later moment, any
//! number of times, or never. Time is the coordinator's, shifted so that it is always [`NOW`]: it passes when nothing
//! else happens before the next deadline. A lease's end comes at the target at any moment, but at the latest when the
//! coordinator's clock has seen the lease and the margin for drift pass.

mod source;
mod world;

use std::collections::BTreeSet;
use std::time::Duration;

use stateright::{Checker, Model, Property};

use self::source::{Criu, SourceWorld};
use self::world::{Coordinator, Gate, Message, TargetWorld, World};
use super::Outcome;
use super::machine::{self, FORWARD_LIMIT, Machine, Verdict};
use crate::roles::source as source_role;
use crate::roles::target;

/// Far enough from zero for everything that may lie in the past.
const NOW: Duration = Duration::from_secs(100);
const HOLD: Duration = Duration::from_secs(5);
const HANDSHAKES: Duration = Duration::from_millis(250);
/// Offers that a target makes at most.
const OFFERS: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Deliver(Message),
    /// Of the source's own surroundings.
    AtSource(source_role::Event),
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

impl Model for Cutovers {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let (machine, commands) = Machine::start(HOLD, HANDSHAKES);
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
        actions.push(Action::AtSource(source_role::Event::Expired));
        actions.push(Action::AtTarget(target::Event::Expired));
        if faults {
            let failed = [Event::SourceFailed("x".to_owned()), Event::TargetFailed("x".to_owned())];
            actions.extend(failed.map(Action::Failed));
            actions.push(Action::AtSource(source_role::Event::SendFailed("x".to_owned())));
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
                    Some(source_role::State::Frozen { .. } | source_role::State::Stopped { .. })
                );
                if self.broken == Broken::Fence && fenced && event == source_role::Event::Expired {
                    next.tell_source(source_role::Event::Abort);
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
                next.at_source(source_role::Event::CriuEnded {
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
            Property::always("nothing freezes behind a gate that is not closed", |_, world: &World| {
                world.source.runs() || world.gate.closed || world.gate.at_target
            }),
            Property::always("an end is an end", |_, world: &World| match world.coordinator.0.state() {
                machine::State::Finished { outcome: Outcome::RolledBack, .. } => {
                    !world.gate.at_target && world.gate.is_open() && !world.target.runs && world.source.runs()
                }
                machine::State::Finished { outcome: Outcome::Committed, .. } => {
                    world.gate.at_target && world.gate.is_open() && !world.source.runs()
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

fn is_fault(event: &source_role::Event) -> bool {
    use source_role::Event;
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
