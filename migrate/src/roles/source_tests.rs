//! Every (state, event) pair as a table, and random histories against a model of CRIU and the rules.

use proptest::prelude::*;

use super::*;

const AT: i64 = 1;

fn text() -> String {
    "x".to_owned()
}

fn ended(failed: Option<&str>, in_flight: bool) -> Event {
    Event::CriuEnded { at_unix_us: AT, failed: failed.map(str::to_owned), in_flight }
}

fn every_event() -> Vec<Event> {
    vec![
        Event::Freeze,
        Event::Drained,
        Event::DrainFailed(text()),
        Event::HookFrozen { at_unix_us: AT },
        Event::HookPostDump { image_bytes: 9 },
        Event::HookPreDump,
        Event::Silenced,
        Event::SilenceFailed(text()),
        Event::SendFailed(text()),
        ended(None, false),
        ended(Some("x"), false),
        ended(Some("x"), true),
        Event::Lifted,
        Event::Release,
        Event::Abort,
        Event::Expired,
    ]
}

fn every_state() -> Vec<State> {
    let mut states = vec![State::Ready, State::Draining { tries: 3 }];
    for silence in [Silence::Off, Silence::Pending, Silence::On] {
        for tries in [0, 2] {
            for doomed in [None, Some(text())] {
                states.push(State::Dumping { tries, silence, doomed });
            }
        }
    }
    for flag in [false, true] {
        for other in [false, true] {
            if flag || !other {
                states.push(State::Retrying { tries: 2, silent: flag, hooked: other });
            }
        }
        states.push(State::Frozen { silence: Silence::Pending, release: flag });
        states.push(State::Stopped { silence: Silence::Pending, release: flag });
        states.push(State::Resuming { runs_at: None, silent: flag });
        states.push(State::Releasing { killed: flag });
    }
    for silence in [Silence::Off, Silence::On] {
        states.push(State::Frozen { silence, release: false });
        states.push(State::Stopped { silence, release: false });
    }
    states.push(State::Resuming { runs_at: Some(AT), silent: true });
    states.push(State::Ended(End::Released));
    states.push(State::Ended(End::Resumed { at_unix_us: AT }));
    states
}

#[test]
fn every_pair() {
    for state in every_state() {
        for event in every_event() {
            let (next, commands) = state.clone().on(event.clone());
            let pair = format!("{state:?} + {event:?} -> {next:?} {commands:?}");
            let releases = |state: &State| {
                matches!(state, State::Releasing { .. } | State::Ended(End::Released))
                    || matches!(
                        state,
                        State::Frozen { release: true, .. } | State::Stopped { release: true, .. }
                    )
            };
            let fenced = |state: &State| matches!(state, State::Frozen { .. } | State::Stopped { .. });
            if releases(&next) && !releases(&state) {
                assert_eq!(event, Event::Release, "only `release` leads to the source's end: {pair}");
            }
            if releases(&state) && !matches!(event, Event::CriuEnded { .. }) {
                assert!(releases(&next), "the target runs, so there is no way back: {pair}");
            }
            if matches!(state, State::Ended(_)) {
                assert!(commands.is_empty() && next == state, "{pair}");
            }
            if fenced(&state) && !fenced(&next) && !releases(&next) {
                assert_eq!(event, Event::Abort, "only the coordinator lets a fenced source run: {pair}");
            }
            if event == Event::Abort && !releases(&state)
                || event == Event::Expired && !fenced(&state) && !releases(&state)
            {
                let on_its_way = match &next {
                    State::Resuming { .. } | State::Ended(_) => true,
                    State::Dumping { doomed, .. } => doomed.is_some(),
                    _ => false,
                };
                assert!(on_its_way, "the way back is taken, or remembered: {pair}");
            }
            let ends = commands.contains(&Command::End);
            assert_eq!(ends, matches!(next, State::Ended(_)) && next != state, "{pair}");
        }
    }
}

#[test]
fn the_way_forward() {
    let mut state = State::Ready;
    let steps: [(Event, &[Command]); 8] = [
        (Event::Freeze, &[Command::Drain]),
        (Event::Drained, &[Command::Yes, Command::Report(AgentEvent::Drained)]),
        (
            Event::HookFrozen { at_unix_us: AT },
            &[Command::Yes, Command::Silence, Command::Report(AgentEvent::Frozen { at_unix_us: AT })],
        ),
        (
            Event::HookPostDump { image_bytes: 9 },
            &[Command::Fence, Command::Send, Command::Report(AgentEvent::Dumped { image_bytes: 9 })],
        ),
        (Event::Release, &[]),
        (Event::Silenced, &[Command::Yes]),
        (ended(None, false), &[Command::Lift]),
        (Event::Lifted, &[Command::Report(AgentEvent::Released), Command::End]),
    ];
    for (event, expected) in steps {
        let (next, commands) = state.on(event);
        assert_eq!(commands, expected);
        state = next;
    }
    assert_eq!(state, State::Ended(End::Released));
}

#[test]
fn a_connection_in_flight_is_tried_again_and_not_for_ever() {
    let mut state = State::Draining { tries: IN_FLIGHT_TRIES };
    for left in (0..IN_FLIGHT_TRIES).rev() {
        (state, _) = state.on(Event::Drained);
        (state, _) = state.on(Event::HookFrozen { at_unix_us: AT });
        (state, _) = state.on(Event::Silenced);
        let (next, commands) = state.on(ended(Some("In-flight connection"), true));
        state = next;
        if left == 0 {
            assert!(commands.contains(&Command::Lift));
            break;
        }
        assert_eq!(commands, [Command::Lift, Command::DumpAgain]);
        // The rules have to be gone before new ones come.
        let (next, commands) = state.on(Event::HookPreDump);
        assert!(commands.is_empty());
        let (next, commands) = next.on(Event::Lifted);
        assert_eq!(commands, [Command::Drain]);
        state = next;
    }
    let (state, commands) = state.on(Event::Lifted);
    assert_eq!(state, State::Ended(End::Resumed { at_unix_us: AT }));
    assert!(commands.contains(&Command::End));
}

/// What is outside of the state machine: CRIU and the rules, as they answer to its commands.
#[derive(Debug, Default)]
struct World {
    criu: Criu,
    draining: bool,
    starting: bool,
    /// Changes of the rules under way, in order: true puts them in place.
    changes: std::collections::VecDeque<bool>,
    rules: bool,
    release_asked: bool,
    sent: bool,
    silence_failed: bool,
    /// The tasks stay stopped whatever CRIU does.
    fenced: bool,
    abort_asked: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Criu {
    #[default]
    PreDump,
    Dumping,
    Frozen,
    PostDump,
    Undoing,
    Killing,
    /// It ended, or was killed itself, and left the tasks as they are.
    Gone,
    Reviving,
    Killed,
}

impl World {
    fn perform(&mut self, command: &Command) {
        match command {
            Command::Drain => self.draining = true,
            Command::Yes => {
                self.criu = match self.criu {
                    Criu::PreDump => Criu::Dumping,
                    // The question at query-ext-files.
                    Criu::Frozen => Criu::Frozen,
                    Criu::PostDump => {
                        assert!(self.release_asked, "killed without `release`");
                        assert!(self.rules || self.silence_failed, "killed while it could be heard");
                        Criu::Killing
                    }
                    other => panic!("yes to {other:?}"),
                }
            }
            Command::No => {
                assert!(
                    matches!(self.criu, Criu::PreDump | Criu::PostDump | Criu::Gone),
                    "no to {:?}",
                    self.criu
                );
                if self.criu != Criu::Gone {
                    self.criu = Criu::Undoing;
                }
            }
            Command::Fence => {
                assert_eq!(self.criu, Criu::PostDump, "too early: it would be in the images");
                assert!(!self.sent, "another copy may be alive already");
                self.fenced = true;
            }
            Command::Unfence => self.unfence(),
            Command::Revive => {
                self.unfence();
                assert_eq!(self.criu, Criu::Gone);
                self.criu = Criu::Reviving;
            }
            Command::Kill => {
                assert!(self.release_asked && self.criu == Criu::Gone);
                self.criu = Criu::Killing;
            }
            Command::DumpAgain => self.starting = true,
            Command::Silence => self.changes.push_back(true),
            Command::Lift => self.changes.push_back(false),
            Command::Send => self.sent = true,
            Command::Report(_) | Command::End => {}
        }
    }

    fn unfence(&mut self) {
        assert!(self.fenced && self.abort_asked, "only the coordinator lets it run");
        self.fenced = false;
    }

    /// What may happen next of its own accord.
    fn possible(&self, luck: bool) -> Vec<Event> {
        let mut events = Vec::new();
        if self.draining {
            events.push(if luck { Event::Drained } else { Event::DrainFailed(text()) });
        }
        if self.starting {
            events.push(if luck { Event::HookPreDump } else { ended(Some("start"), false) });
        }
        match self.changes.front() {
            Some(true) => events.push(if luck { Event::Silenced } else { Event::SilenceFailed(text()) }),
            Some(false) => events.push(Event::Lifted),
            None => {}
        }
        match self.criu {
            Criu::Dumping => events.push(Event::HookFrozen { at_unix_us: AT }),
            Criu::Frozen => {
                events.push(if luck {
                    Event::HookPostDump { image_bytes: 1 }
                } else {
                    ended(Some("x"), true)
                });
            }
            Criu::PostDump if !luck => events.push(ended(Some("killed"), false)),
            Criu::Undoing => events.push(ended(Some("no"), false)),
            Criu::Reviving => events.push(ended(None, false)),
            Criu::Killing => events.push(ended(None, false)),
            Criu::PreDump | Criu::PostDump | Criu::Gone | Criu::Killed => {}
        }
        events
    }

    fn happened(&mut self, event: &Event) {
        match event {
            Event::Drained | Event::DrainFailed(_) => self.draining = false,
            Event::HookPreDump => (self.starting, self.criu) = (false, Criu::PreDump),
            Event::Silenced | Event::SilenceFailed(_) => {
                self.changes.pop_front();
                self.rules = *event == Event::Silenced;
                self.silence_failed |= !self.rules;
            }
            Event::Lifted => {
                self.changes.pop_front();
                self.rules = false;
            }
            Event::HookFrozen { .. } => self.criu = Criu::Frozen,
            Event::HookPostDump { .. } => self.criu = Criu::PostDump,
            Event::CriuEnded { .. } => {
                self.starting = false;
                self.criu = if self.criu == Criu::Killing { Criu::Killed } else { Criu::Gone };
            }
            Event::Release => self.release_asked = true,
            Event::Abort => self.abort_asked = true,
            _ => {}
        }
    }
}

proptest! {
    /// Whatever happens in whatever order, the source ends once the coordinator has said how, and it ends running and
    /// heard unless it was released.
    #[test]
    fn any_history_ends_safely(
        steps in prop::collection::vec((any::<prop::sample::Index>(), 0u8..10), 0..60),
        release_at in prop::option::of(0usize..60),
    ) {
        let mut world = World::default();
        let mut state = State::Ready;
        let mut steps = steps.into_iter().enumerate();
        for _ in 0..500 {
            if matches!(state, State::Ended(_)) {
                break;
            }
            let event = match steps.next() {
                Some((step, _)) if Some(step) == release_at && world.fenced => Event::Release,
                Some((_, (_, 0))) => Event::Abort,
                Some((_, (_, 1))) => Event::Expired,
                Some((_, (_, 2))) => Event::Freeze,
                Some((_, (_, 3))) if world.sent => Event::SendFailed(text()),
                Some((_, (which, luck))) => {
                    let possible = world.possible(luck > 4);
                    if possible.is_empty() { Event::Freeze } else { which.get(&possible).clone() }
                }
                // Then what is under way ends, patience runs out, and where it does not end that the coordinator speaks.
                None => {
                    let spoken = if world.fenced { Event::Abort } else { Event::Expired };
                    world.possible(true).into_iter().next().unwrap_or(spoken)
                }
            };
            world.happened(&event);
            let (next, commands) = state.on(event);
            state = next;
            for command in &commands {
                world.perform(command);
            }
        }
        match state {
            State::Ended(End::Resumed { .. }) => prop_assert!(world.criu == Criu::Gone && !world.fenced),
            State::Ended(End::Released) => prop_assert!(world.release_asked && world.criu == Criu::Killed),
            other => prop_assert!(false, "no end: {other:?} {world:?}"),
        }
        prop_assert!(!world.rules && world.changes.is_empty(), "the rules are left: {world:?}");
    }
}
