//! Every (state, event) pair as a table, and random histories.

use proptest::prelude::*;

use super::*;

const RUNNING: Running = Running { at_unix_us: 1 };

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
        Event::Go,
        Event::Abort,
        Event::Expired,
        Event::Dropped,
    ]
}

fn every_state() -> Vec<State> {
    vec![
        State::Before(Before::Waiting),
        State::Before(Before::Restoring),
        State::Before(Before::Restored),
        State::Committed(Committed::Starting),
        State::Committed(Committed::Running(RUNNING)),
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
                let restored = state == State::Before(Before::Restored);
                assert!(restored && event == Event::Go, "only `go`, and only once restored: {pair}");
            }
            if is_committed(&state) {
                assert!(is_committed(&next), "there is no way back: {pair}");
                assert!(!commands.contains(&Command::Drop), "{pair}");
            }
            let failure = matches!(
                event,
                Event::ImagesFailed(_) | Event::CriuEnded { .. } | Event::Abort | Event::Expired
            );
            if matches!(state, State::Before(_)) {
                assert_eq!(commands.contains(&Command::Drop), failure, "{pair}");
                assert_eq!(next == State::Dropping, failure, "{pair}");
                assert!(!commands.contains(&Command::Yes), "nothing runs before `go`: {pair}");
            }
            let running = AgentEvent::Running(RUNNING);
            let says_running = commands.contains(&Command::Report(running));
            assert_eq!(
                says_running,
                matches!(event, Event::HookPostResume { .. })
                    && state == State::Committed(Committed::Starting),
                "{pair}"
            );
        }
    }
}

#[test]
fn the_way_forward() {
    let mut state = State::START;
    let steps: [(Event, &[Command]); 5] = [
        (
            Event::ImagesComplete { sent_bytes: 9 },
            &[Command::Restore, Command::Report(AgentEvent::Received { sent_bytes: 9 })],
        ),
        (Event::HookPreResume, &[Command::Report(AgentEvent::Restored)]),
        (Event::Go, &[Command::Keep]),
        (
            Event::HookPostResume { at_unix_us: 1 },
            &[Command::Report(AgentEvent::Running(RUNNING)), Command::Yes],
        ),
        (Event::CriuEnded { failed: None }, &[Command::End]),
    ];
    for (event, expected) in steps {
        let (next, commands) = state.on(event);
        assert_eq!(commands, expected);
        state = next;
    }
    assert_eq!(state, State::Committed(Committed::Running(RUNNING)));
}

proptest! {
    /// The copy is kept exactly if `go` came while it was restored; else, once the coordinator is silent for
    /// too long, nothing is left of it.
    #[test]
    fn any_history_ends_safely(history in prop::collection::vec(prop::sample::select(every_event()), 0..40)) {
        let mut state = State::START;
        let (mut kept, mut dropped, mut ended) = (0, 0, 0);
        let tail = [Event::Expired, Event::Dropped];
        for event in history.into_iter().chain(tail) {
            let restored = state == State::Before(Before::Restored);
            let go = event == Event::Go;
            let (next, commands) = state.on(event);
            state = next;
            for command in commands {
                match command {
                    Command::Keep => {
                        prop_assert!(restored && go);
                        kept += 1;
                    }
                    Command::Drop => dropped += 1,
                    Command::End => ended += 1,
                    Command::Restore | Command::Yes | Command::Report(_) => {}
                }
            }
        }
        prop_assert_eq!(kept + dropped, 1);
        match state {
            State::Dropped => prop_assert!(kept == 0 && ended == 1),
            State::Committed(_) | State::Lost => prop_assert!(kept == 1),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
