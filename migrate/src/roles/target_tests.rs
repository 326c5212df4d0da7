//! Every (state, event) pair as a table, and random histories.

use proptest::prelude::*;

use super::*;

const RUNNING: Running = Running { at_unix_us: 1 };
const FIRST: Offer = Offer { number: 0, lapsed: false };
const LAPSED: Offer = Offer { number: 0, lapsed: true };
const GO: Event = Event::Go { offer: 0 };

fn text() -> String {
    "x".to_owned()
}

fn every_event() -> Vec<Event> {
    vec![
        Event::ImagesComplete { sent_bytes: 9 },
        Event::ImagesFailed(text()),
        Event::HookPreResume,
        Event::HookPostResume { at_unix_us: 1 },
        Event::CriuEnded { failed: None },
        Event::CriuEnded { failed: Some(text()) },
        Event::Offer,
        Event::Go { offer: 0 },
        Event::Go { offer: 1 },
        Event::Confirm,
        Event::Abort,
        Event::Expired,
        Event::Dropped,
    ]
}

fn every_state() -> Vec<State> {
    vec![
        State::Before(Before::Waiting),
        State::Before(Before::Restoring),
        State::Before(Before::Restored(FIRST)),
        State::Before(Before::Restored(LAPSED)),
        State::Committed(Committed::Starting { offer: FIRST }),
        State::Committed(Committed::Starting { offer: LAPSED }),
        State::Committed(Committed::Running {
            running: RUNNING,
            offer: FIRST,
            confirmed: false,
            restored: false,
        }),
        State::Committed(Committed::Running {
            running: RUNNING,
            offer: FIRST,
            confirmed: false,
            restored: true,
        }),
        State::Committed(Committed::Running {
            running: RUNNING,
            offer: FIRST,
            confirmed: true,
            restored: false,
        }),
        State::Committed(Committed::Running {
            running: RUNNING,
            offer: FIRST,
            confirmed: true,
            restored: true,
        }),
        State::Committed(Committed::Suspended { running: RUNNING, offer: FIRST, restored: false }),
        State::Committed(Committed::Suspended { running: RUNNING, offer: LAPSED, restored: true }),
        State::Dropping,
        State::Dropped,
        State::Lost,
    ]
}

#[test]
fn every_pair() {
    for state in every_state() {
        for event in every_event() {
            let (next, commands) = state.clone().on(event.clone());
            let pair = format!("{state:?} + {event:?} -> {next:?} {commands:?}");
            let is_committed = |state: &State| matches!(state, State::Committed(_) | State::Lost);
            if is_committed(&next) && !is_committed(&state) {
                let offered = state == State::Before(Before::Restored(FIRST));
                assert!(offered && event == GO, "only `go`, and only for what is offered: {pair}");
            }
            let suspended = |state: &State| matches!(state, State::Committed(Committed::Suspended { .. }));
            if is_committed(&state) && !(suspended(&state) && event == Event::Abort) {
                assert!(is_committed(&next), "there is no way back: {pair}");
                assert!(!commands.contains(&Command::Drop), "{pair}");
            }
            let unconfirmed = matches!(state, State::Committed(Committed::Running { confirmed: false, .. }));
            let late = state == State::Committed(Committed::Starting { offer: LAPSED })
                && matches!(event, Event::HookPostResume { .. });
            let suspends = unconfirmed && event == Event::Expired || late;
            assert_eq!(commands.contains(&Command::Suspend), suspends, "{pair}");
            let offered = matches!(state, State::Committed(Committed::Suspended { offer: FIRST, .. }));
            assert_eq!(commands.contains(&Command::Continue), offered && event == GO, "{pair}");
            let restored = matches!(state, State::Before(Before::Restored(_)));
            let failure = matches!(event, Event::ImagesFailed(_) | Event::CriuEnded { .. } | Event::Abort)
                || event == Event::Expired && !restored;
            if matches!(state, State::Before(_)) {
                assert_eq!(commands.contains(&Command::Drop), failure, "{pair}");
                assert_eq!(next == State::Dropping, failure, "{pair}");
                assert!(!commands.contains(&Command::Yes), "nothing runs before `go`: {pair}");
            }
            let running = AgentEvent::Running(RUNNING);
            let says_running = commands.contains(&Command::Report(running));
            let starts = matches!(event, Event::HookPostResume { .. })
                && matches!(state, State::Committed(Committed::Starting { .. }));
            let again = matches!(state, State::Committed(Committed::Running { .. }))
                && matches!(event, Event::Go { offer: 0 } | Event::Offer);
            assert_eq!(says_running, starts || again || commands.contains(&Command::Continue), "{pair}");
        }
    }
}

#[test]
fn the_way_forward() {
    let mut state = State::START;
    let steps: [(Event, &[Command]); 6] = [
        (
            Event::ImagesComplete { sent_bytes: 9 },
            &[Command::Restore, Command::Report(AgentEvent::Received { sent_bytes: 9 })],
        ),
        (Event::HookPreResume, &[Command::Report(AgentEvent::Restored { offer: 0 })]),
        (GO, &[Command::Keep]),
        (
            Event::HookPostResume { at_unix_us: 1 },
            &[Command::Report(AgentEvent::Running(RUNNING)), Command::Yes],
        ),
        (Event::Confirm, &[Command::Report(AgentEvent::Confirmed)]),
        (Event::CriuEnded { failed: None }, &[Command::End]),
    ];
    for (event, expected) in steps {
        let (next, commands) = state.on(event);
        assert_eq!(commands, expected);
        state = next;
    }
    let running = Committed::Running { running: RUNNING, offer: FIRST, confirmed: true, restored: true };
    assert_eq!(state, State::Committed(running));
}

#[test]
fn a_lease_that_ends_unconfirmed_suspends_and_only_a_new_offer_continues() {
    let running = Committed::Running { running: RUNNING, offer: FIRST, confirmed: false, restored: true };
    let (state, commands) = State::Committed(running).on(Event::Expired);
    assert_eq!(commands, [Command::Suspend, Command::Report(AgentEvent::Suspended)]);
    let (_, dropped) = state.clone().on(Event::Abort);
    assert_eq!(dropped, [Command::Drop], "an operator's word");
    for late in [GO, Event::Confirm] {
        let (same, commands) = state.clone().on(late);
        assert_eq!((same, commands), (state.clone(), vec![]), "it may be years old");
    }
    let (state, commands) = state.on(Event::Offer);
    assert_eq!(commands, [Command::Report(AgentEvent::Restored { offer: 1 })]);
    let (lapsed, _) = state.clone().on(Event::Expired);
    assert_eq!(lapsed.on(Event::Go { offer: 1 }).1, []);
    assert_eq!(state.clone().on(GO).1, []);
    let (state, commands) = state.on(Event::Go { offer: 1 });
    assert_eq!(commands, [Command::Continue, Command::Report(AgentEvent::Running(RUNNING))]);
    let (state, commands) = state.on(Event::Confirm);
    assert_eq!(commands, [Command::Report(AgentEvent::Confirmed), Command::End]);
    let (_, commands) = state.on(Event::Expired);
    assert_eq!(commands, [], "a confirmed one has no lease");
}

proptest! {
    /// The copy is kept exactly if `go` came while it was restored; else nothing is left of it once the coordinator
    /// says so, and what has not been restored goes by itself.
    #[test]
    fn any_history_ends_safely(history in prop::collection::vec(prop::sample::select(every_event()), 0..40)) {
        let mut state = State::START;
        let (mut kept, mut dropped, mut ended) = (0, 0, 0);
        let tail = [Event::Expired, Event::Abort, Event::Dropped];
        for event in history.into_iter().chain(tail) {
            let offer = match state {
                State::Before(Before::Restored(offer)) if !offer.lapsed => Some(offer.number),
                _ => None,
            };
            let go = offer.is_some_and(|offer| event == Event::Go { offer });
            let (next, commands) = state.on(event);
            state = next;
            for command in commands {
                match command {
                    Command::Keep => {
                        prop_assert!(go);
                        kept += 1;
                    }
                    Command::Drop => dropped += 1,
                    Command::End => ended += 1,
                    Command::Restore
                    | Command::Yes
                    | Command::Suspend
                    | Command::Continue
                    | Command::Report(_) => {}
                }
            }
        }
        match state {
            State::Dropped => prop_assert!(dropped == 1 && ended == 1),
            State::Committed(_) | State::Lost => prop_assert!(kept == 1),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
