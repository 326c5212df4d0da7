//! Every (state, event) pair as a table, whole migrations step by step, and random histories.

use proptest::prelude::*;

use super::*;
use crate::coordinator::machine::*;
use crate::coordinator::phases::PHASES;

const HOLD: Duration = Duration::from_secs(5);
const HANDSHAKES: Duration = Duration::from_millis(250);
const GENERATION: u32 = 7;
const OFFER: u32 = 3;

fn text() -> String {
    "x".to_owned()
}

fn every_event() -> Vec<Event> {
    vec![
        Event::TargetPrepared,
        Event::SourceCopies,
        Event::SourcePrepared,
        Event::HeldNew { generation: GENERATION - 1 },
        Event::Held { generation: GENERATION },
        Event::Drained,
        Event::Frozen,
        Event::Dumped,
        Event::Received,
        Event::Restored { offer: OFFER },
        Event::Flipped,
        Event::CutoverRefused(text()),
        Event::Running,
        Event::Confirmed,
        Event::Released,
        Event::SourceResumed,
        Event::TargetDropped,
        Event::GateResumed,
        Event::ResumeRefused(text()),
        Event::SourceFailed(text()),
        Event::TargetFailed(text()),
        Event::Abort,
        Event::Resolve(Verdict::Committed),
        Event::Resolve(Verdict::RolledBack),
        Event::Tick,
    ]
}

fn after(events: &[Event]) -> Machine {
    let (mut machine, _) = Machine::start(HOLD, Duration::ZERO);
    for (step, event) in events.iter().enumerate() {
        machine.on(event.clone(), ms(step as u64));
    }
    machine
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The way forward, up to each step.
fn forward() -> Vec<Event> {
    vec![
        Event::TargetPrepared,
        Event::SourcePrepared,
        Event::Held { generation: GENERATION },
        Event::Drained,
        Event::Frozen,
        Event::Dumped,
        Event::Received,
        Event::Restored { offer: OFFER },
        Event::Flipped,
        Event::Running,
        Event::Confirmed,
        Event::Released,
    ]
}

/// Holding new connections since the third millisecond.
fn holding_new() -> Machine {
    let (mut machine, _) = Machine::start(HOLD, HANDSHAKES);
    machine.on(Event::TargetPrepared, ms(1));
    assert_eq!(machine.on(Event::SourcePrepared, ms(2)), [Command::HoldNew]);
    assert_eq!(machine.on(Event::HeldNew { generation: GENERATION - 1 }, ms(3)), []);
    machine
}

/// Lets time pass until an operator is wanted; every question fails.
fn doubtful(mut machine: Machine) -> Machine {
    while machine.doubt().is_none() {
        let now = machine.wake_at().expect("something is waited for");
        for command in machine.on(Event::Tick, now) {
            let failed = match command {
                Command::Go { .. } | Command::Offer | Command::Confirm => {
                    Event::TargetFailed("connection reset".to_owned())
                }
                Command::ResumeSource => Event::SourceFailed("connection reset".to_owned()),
                other => panic!("{other:?}"),
            };
            machine.on(failed, now);
        }
    }
    machine
}

/// One machine in each state, with its name.
fn every_state() -> Vec<(&'static str, Machine)> {
    let way = forward();
    let back = |events: &[Event]| [&way[..3], events].concat();
    vec![
        ("preparing target", after(&way[..0])),
        ("preparing source", after(&way[..1])),
        ("holding new", holding_new()),
        ("holding", after(&way[..2])),
        ("moving", after(&way[..3])),
        ("restoring", after(&way[..7])),
        ("flipping", after(&way[..8])),
        ("starting", after(&way[..9])),
        ("starting, in doubt", doubtful(after(&way[..9]))),
        ("confirming", after(&way[..10])),
        ("confirming, in doubt", doubtful(after(&way[..10]))),
        ("releasing", after(&way[..11])),
        ("rolling back", after(&back(&[Event::Abort]))),
        ("rolling back, in doubt", doubtful(after(&back(&[Event::Abort])))),
        ("rolling back, source runs", after(&back(&[Event::Abort, Event::SourceResumed]))),
        ("committed", after(&way)),
        ("in doubt", after(&back(&[Event::Abort, Event::SourceResumed, Event::ResumeRefused(text())]))),
    ]
}

/// The direction in which a state lies; nothing may go from a later one to an earlier one.
fn direction(machine: &Machine) -> &'static str {
    match machine.state() {
        State::Before(_) => "before",
        State::After(_) => "after",
        State::RollingBack(_) => "back",
        State::Finished { .. } => "finished",
    }
}

#[test]
fn every_pair() {
    let failures = [
        Event::CutoverRefused(text()),
        Event::SourceFailed(text()),
        Event::TargetFailed(text()),
        Event::Abort,
        Event::SourceResumed,
        Event::TargetDropped,
        Event::Released,
    ];
    for (name, machine) in every_state() {
        for event in every_event() {
            let mut next = machine.clone();
            let now = ms(20) + FORWARD_LIMIT;
            let commands = next.on(event.clone(), if machine.doubt().is_some() { now } else { ms(20) });
            let pair = format!("{name} + {event:?} -> {:?} {commands:?}", next.state());
            let (from, to) = (direction(&machine), direction(&next));
            match from {
                "before" if failures.contains(&event) => {
                    assert!(to == "back" || to == "finished", "{pair}");
                    assert!(commands.contains(&Command::DropTarget), "{pair}");
                    let touched = name != "preparing target";
                    assert_eq!(commands.contains(&Command::ResumeSource), touched, "{pair}");
                }
                "before" => {
                    assert!(to == "before" || (name, &event) == ("flipping", &Event::Flipped), "{pair}")
                }
                "after"
                    if name == "starting, in doubt" && event == Event::Resolve(Verdict::RolledBack)
                        || name.starts_with("starting") && event == Event::TargetDropped =>
                {
                    assert_eq!(to, "back", "{pair}");
                    assert_eq!(commands, [Command::Hold], "{pair}");
                }
                "after" => {
                    assert!(to == "after" || to == "finished", "{pair}");
                    let only_forward = |c: &Command| {
                        matches!(c, Command::Go { .. } | Command::Offer | Command::Confirm | Command::Release)
                    };
                    assert!(commands.iter().all(only_forward), "{pair}");
                }
                "back" => {
                    assert!(to == "back" || to == "finished", "{pair}");
                    let only_back =
                        |c: &Command| matches!(c, Command::ResumeSource | Command::ResumeGate { .. });
                    assert!(commands.iter().all(only_back), "{pair}");
                }
                _ => assert!(to == "finished" && commands.is_empty(), "{pair}"),
            }
            if to == "finished" {
                assert_eq!(next.wake_at(), None, "{pair}");
                assert!(!next.phases().last_is_open(), "{pair}");
            }
        }
    }
}

#[test]
fn the_way_forward() {
    let (mut machine, commands) = Machine::start(HOLD, Duration::ZERO);
    assert_eq!(commands, [Command::PrepareTarget]);
    let expected: [&[Command]; 12] = [
        &[Command::PrepareSource],
        &[Command::Hold],
        &[Command::Freeze],
        &[],
        &[],
        &[],
        &[],
        &[Command::Flip { generation: GENERATION }],
        &[Command::Go { offer: OFFER }],
        &[Command::Confirm],
        &[],
        &[],
    ];
    for (step, (event, expected)) in forward().into_iter().zip(expected).enumerate() {
        let now = ms(10 * (step as u64 + 1));
        let runs = event == Event::Confirmed;
        assert_eq!(machine.on(event, now), expected);
        if runs {
            assert_eq!(machine.wake_at(), Some(now + CATCHING_UP));
            assert_eq!(machine.on(Event::Tick, now + CATCHING_UP), [Command::Release]);
        }
    }
    assert_eq!(*machine.state(), State::Finished { outcome: Outcome::Committed, reason: None });
    let names: Vec<_> = machine.phases().list().iter().map(|phase| phase.name).collect();
    assert_eq!(names, PHASES);
    assert!(machine.phases().list().iter().is_sorted_by(|a, b| a.end_ms == b.start_ms));
    assert_eq!(machine.phases().list()[0].start_ms, 0.0);
    assert_eq!(machine.phases().list()[9].end_ms, 120.0);
}

#[test]
fn handshakes_get_their_time_before_anything_else_is_held() {
    let mut machine = holding_new();
    let until = ms(3) + HANDSHAKES;
    assert_eq!(machine.wake_at(), Some(until));
    assert_eq!(machine.on(Event::Tick, until - ms(1)), []);
    assert_eq!(machine.on(Event::Tick, until), [Command::Hold]);
    assert_eq!(machine.on(Event::Held { generation: GENERATION }, until), [Command::Freeze]);
    assert_eq!(machine.wake_at(), Some(until + HOLD), "the deadline is that of the whole hold");
    assert_eq!(machine.on(Event::Abort, until), [Command::ResumeSource, Command::DropTarget]);
}

#[test]
fn a_gate_that_holds_new_connections_opens_without_waiting_for_any_agent() {
    let open = Command::ResumeGate { generation: GENERATION - 1 };
    for late in [false, true] {
        let mut machine = holding_new();
        let refused = Event::CutoverRefused("no".to_owned());
        let back = match late {
            false => machine.on(Event::SourceFailed(text()), ms(50)),
            true => {
                machine.on(Event::Tick, ms(3) + HANDSHAKES);
                machine.on(refused, ms(3) + HANDSHAKES)
            }
        };
        assert_eq!(back, [open, Command::ResumeSource, Command::DropTarget]);
        machine.on(Event::GateResumed, ms(300));
        machine.on(Event::SourceFailed(text()), ms(301));
        machine.on(Event::TargetDropped, ms(302));
        assert!(matches!(machine.state(), State::Finished { outcome: Outcome::RolledBack, .. }));
    }
}

#[test]
fn reports_that_overtake_each_other_change_no_decision() {
    let mut machine = after(&forward()[..3]);
    // The target's connection was faster than the source's.
    machine.on(Event::Received, ms(30));
    assert_eq!(machine.on(Event::Dumped, ms(31)), []);
    let flip = Command::Flip { generation: GENERATION };
    assert_eq!(machine.on(Event::Restored { offer: OFFER }, ms(40)), [flip]);
    machine.on(Event::Flipped, ms(41));
    assert_eq!(machine.on(Event::Drained, ms(42)), []);
    machine.on(Event::Running, ms(43));
    machine.on(Event::Confirmed, ms(43));
    machine.on(Event::Released, ms(44));
    let names: Vec<_> = machine.phases().list().iter().map(|phase| phase.name).collect();
    assert_eq!(names, PHASES);
    assert!(machine.phases().list().iter().all(|phase| phase.start_ms <= phase.end_ms));
}

#[test]
fn the_gate_opens_only_when_the_source_runs() {
    let mut machine = after(&forward()[..7]);
    let back = machine.on(Event::TargetFailed("no memory".to_owned()), ms(50));
    assert_eq!(back, [Command::ResumeSource, Command::DropTarget]);
    assert_eq!(machine.on(Event::TargetDropped, ms(51)), []);
    let open = Command::ResumeGate { generation: GENERATION };
    assert_eq!(machine.on(Event::SourceResumed, ms(52)), [open]);
    assert_eq!(machine.on(Event::SourceResumed, ms(53)), []);
    machine.on(Event::GateResumed, ms(53));
    let State::Finished { outcome: Outcome::RolledBack, reason: Some(reason) } = machine.state() else {
        panic!("{:?}", machine.state())
    };
    assert!(reason.contains("no memory"));
    assert_eq!(machine.phases().list().last().map(|phase| phase.name), Some("rollback"));
}

#[test]
fn a_source_that_does_not_answer_is_asked_until_it_does_and_the_gate_stays_closed() {
    let mut machine = after(&forward()[..7]);
    machine.on(Event::Abort, ms(100));
    machine.on(Event::TargetDropped, ms(101));
    let (mut asked, mut now) = (0, ms(101));
    while now < ms(100) + 2 * FORWARD_LIMIT {
        machine.on(Event::SourceFailed("no route".to_owned()), now);
        now = machine.wake_at().unwrap();
        match machine.on(Event::Tick, now)[..] {
            [Command::ResumeSource] => asked += 1,
            [] => {}
            ref other => panic!("{other:?}"),
        }
    }
    assert!(asked > 10);
    assert!(machine.doubt().is_some_and(|doubt| doubt.contains("no route")));
    assert!(machine.may_resolve(Verdict::Committed, now).is_err(), "the target never ran");
    assert_eq!(machine.on(Event::SourceResumed, now), [Command::ResumeGate { generation: GENERATION }]);
    assert_eq!(machine.doubt(), None);
    machine.on(Event::GateResumed, now);
    assert!(matches!(machine.state(), State::Finished { outcome: Outcome::RolledBack, .. }));
}

#[test]
fn a_deadline_that_passes_rolls_back_even_if_the_restore_is_just_done() {
    for event in [Event::Tick, Event::Restored { offer: OFFER }] {
        let mut machine = after(&forward()[..7]);
        let deadline = machine.wake_at().unwrap();
        assert_eq!(machine.on(Event::Tick, deadline - ms(1)), []);
        let back = machine.on(event, deadline);
        assert_eq!(back, [Command::ResumeSource, Command::DropTarget]);
    }
}

#[test]
fn go_is_said_until_it_is_answered_however_late() {
    let mut machine = after(&forward()[..9]);
    machine.on(Event::TargetFailed("connection reset".to_owned()), ms(60));
    let retry = machine.wake_at().unwrap();
    assert_eq!(machine.on(Event::Tick, retry), [Command::Offer]);
    assert_eq!(machine.on(Event::Restored { offer: OFFER }, retry), [], "that one was tried");
    let next = Event::Restored { offer: OFFER + 1 };
    assert_eq!(machine.on(next, retry), [Command::Go { offer: OFFER + 1 }]);
    // Nothing is left to do but to wait for the answer.
    assert!(machine.on(Event::Tick, retry).is_empty());
    let mut machine = doubtful(machine);
    assert!(machine.doubt().is_some_and(|doubt| doubt.contains("connection reset")));
    assert_eq!(machine.on(Event::Running, 2 * FORWARD_LIMIT), [Command::Confirm]);
    assert_eq!(machine.doubt(), None);
}

#[test]
fn an_operator_says_how_a_doubt_ends_and_not_before_the_lease_is_over() {
    let way = forward();
    let mut machine = doubtful(after(&way[..9]));
    let early = LEASE + MARGIN - ms(1);
    assert!(machine.may_resolve(Verdict::RolledBack, early).is_err_and(|why| why.contains("lease")));
    let late = 3 * FORWARD_LIMIT;
    assert_eq!(machine.may_resolve(Verdict::RolledBack, late), Ok(()));
    assert_eq!(machine.on(Event::Resolve(Verdict::RolledBack), late), [Command::Hold]);
    let back = machine.on(Event::Held { generation: 9 }, late);
    assert_eq!(back, [Command::ResumeSource, Command::DropTarget]);
    assert_eq!(machine.on(Event::SourceResumed, late), [Command::FlipBack { generation: 9 }]);
    machine.on(Event::GateResumed, late);
    machine.on(Event::TargetFailed(text()), late);
    assert!(matches!(machine.state(), State::Finished { outcome: Outcome::RolledBack, .. }));

    let mut machine = doubtful(after(&way[..10]));
    assert!(
        machine.may_resolve(Verdict::RolledBack, late).is_err_and(|why| why.contains("only be committed"))
    );
    assert_eq!(machine.on(Event::Resolve(Verdict::Committed), late), []);
    assert!(matches!(machine.state(), State::Finished { outcome: Outcome::Committed, reason: Some(_) }));

    let mut machine = after(&way[..9]);
    assert_eq!(machine.on(Event::Resolve(Verdict::Committed), ms(70)), [], "nothing is in doubt");
    assert_eq!(direction(&machine), "after");
}

#[test]
fn a_gate_that_still_replays_is_asked_again_to_close_on_the_way_back() {
    let refused = || Event::CutoverRefused("it is replaying".to_owned());
    let flipped = || {
        let mut machine = after(&forward()[..9]);
        assert_eq!(machine.on(Event::TargetDropped, ms(70)), [Command::Hold]);
        assert_eq!(machine.on(refused(), ms(70)), []);
        machine
    };
    let mut machine = flipped();
    let retry = machine.wake_at().expect("it is asked again");
    assert_eq!(machine.on(Event::Tick, retry), [Command::Hold]);
    let back = machine.on(Event::Held { generation: 9 }, retry);
    assert_eq!(back, [Command::ResumeSource, Command::DropTarget]);
    assert_eq!(machine.on(Event::SourceResumed, retry), [Command::FlipBack { generation: 9 }]);

    let mut machine = flipped();
    while let Some(now) = machine.wake_at() {
        assert!(now <= ms(70) + FORWARD_LIMIT);
        assert_eq!(machine.on(Event::Tick, now), [Command::Hold]);
        machine.on(refused(), now);
    }
    assert!(matches!(machine.state(), State::Finished { outcome: Outcome::InDoubt, reason: Some(_) }));
}

#[test]
fn an_operators_word_for_the_source_is_reported_with_what_it_leaves_at_the_target() {
    for at_target in [false, true] {
        let (mut machine, _) = Machine::recover_returned(at_target, 9, HOLD);
        machine.on(Event::Held { generation: 10 }, ms(1));
        machine.on(Event::SourceResumed, ms(2));
        machine.on(Event::GateResumed, ms(2));
        machine.on(Event::TargetFailed(text()), ms(3));
        let State::Finished { outcome: Outcome::RolledBack, reason: Some(reason) } = machine.state() else {
            panic!("{:?}", machine.state())
        };
        assert!(reason.contains("the target may hold a suspended copy"), "{reason}");
    }
}

#[test]
fn a_source_that_cannot_be_released_is_no_reason_to_doubt_the_target() {
    let mut machine = after(&forward()[..11]);
    machine.on(Event::SourceFailed("gone".to_owned()), ms(60));
    while let Some(now) = machine.wake_at() {
        if machine.on(Event::Tick, now) == [Command::Release] {
            machine.on(Event::SourceFailed("gone".to_owned()), now);
        }
    }
    let State::Finished { outcome: Outcome::Committed, reason: Some(reason) } = machine.state() else {
        panic!("{:?}", machine.state())
    };
    assert!(reason.contains("gone"));
}

#[test]
fn recovery_takes_the_direction_that_the_gate_says() {
    let (mut back, commands) = Machine::recover_back(GENERATION, HOLD);
    assert_eq!(commands, [Command::ResumeSource, Command::DropTarget]);
    assert_eq!(back.on(Event::SourceResumed, ms(1)), [Command::ResumeGate { generation: GENERATION }]);
    let (mut ahead, commands) = Machine::recover_forward(false, HOLD);
    assert_eq!(commands, [Command::Offer]);
    assert_eq!(ahead.on(Event::Restored { offer: OFFER }, ms(0)), [Command::Go { offer: OFFER }]);
    assert_eq!(ahead.on(Event::Running, ms(1)), [Command::Confirm]);
    assert_eq!(ahead.on(Event::Confirmed, ms(1)), []);
    assert_eq!(ahead.on(Event::Tick, ms(1) + CATCHING_UP), [Command::Release]);
    ahead.on(Event::Released, ms(2));
    assert_eq!(*ahead.state(), State::Finished { outcome: Outcome::Committed, reason: None });
}

#[test]
fn a_hold_of_new_connections_that_nobody_asked_for_is_none() {
    let (mut machine, _) = Machine::start(HOLD, Duration::ZERO);
    machine.on(Event::TargetPrepared, ms(1));
    assert_eq!(machine.on(Event::SourcePrepared, ms(2)), [Command::Hold]);
    let before = machine.state().clone();
    assert_eq!(machine.on(Event::HeldNew { generation: GENERATION }, ms(3)), []);
    assert_eq!(*machine.state(), before);
}

fn any_event() -> impl Strategy<Value = Event> {
    prop::sample::select(every_event())
}

proptest! {
    /// Whatever comes in whatever order: one hold before the flip, one flip, `go` only after it, `release` only after
    /// `Confirmed`, no way back after the flip but an operator's, the gate opened only while it is closed and the
    /// source runs, and no end but by an answer.
    #[test]
    fn any_history_is_safe(
        history in prop::collection::vec((any_event(), 0u64..20_000), 0..60),
        handshakes in prop::sample::select(vec![Duration::ZERO, HANDSHAKES]),
    ) {
        let (mut machine, mut commands) = Machine::start(HOLD, handshakes);
        let mut now = Duration::ZERO;
        let (mut held, mut flipped, mut confirmed, mut resumed, mut opened) = (0, false, false, false, 0);
        let (mut resolved, mut held_new) = (false, false);
        for (event, pause) in history {
            for command in &commands {
                match command {
                    Command::HoldNew => {
                        prop_assert!(!held_new && held == 0 && !flipped && !handshakes.is_zero());
                        held_new = true;
                    }
                    Command::Hold => {
                        held += 1;
                        prop_assert!(held == 1 || resolved);
                    }
                    Command::Flip { generation } => {
                        prop_assert_eq!((*generation, held), (GENERATION, 1));
                        prop_assert!(!flipped);
                    }
                    Command::Go { .. } | Command::Offer | Command::Confirm => prop_assert!(flipped && !resolved),
                    Command::Release => prop_assert!(flipped && confirmed && !resolved),
                    Command::ResumeSource | Command::DropTarget => prop_assert!(!flipped || resolved),
                    Command::ResumeGate { generation } => {
                        let only_new = held_new && *generation == GENERATION - 1;
                        prop_assert!(!flipped && (held == 1 || only_new));
                        prop_assert!(resumed || resolved || only_new);
                        opened += 1;
                    }
                    Command::FlipBack { .. } => {
                        prop_assert!(flipped && resolved);
                        opened += 1;
                    }
                    Command::PrepareTarget | Command::PrepareSource | Command::Freeze => {
                        prop_assert!(!flipped);
                    }
                }
            }
            prop_assert!(opened <= 1);
            now += ms(pause);
            let before = direction(&machine);
            let gone = event == Event::TargetDropped;
            let was_flipping = matches!(machine.state(), State::Before(Before::Flipping { .. }));
            confirmed |= before == "after" && event == Event::Confirmed;
            resumed |= event == Event::SourceResumed && before == "back";
            flipped |= was_flipping && event == Event::Flipped;
            if let Event::Resolve(verdict) = event {
                resolved |= machine.may_resolve(verdict, now).is_ok();
            }
            commands = machine.on(event, now);
            resolved |= before == "after" && !confirmed && gone && direction(&machine) == "back";
            if before == "after" && direction(&machine) == "back" {
                prop_assert!(resolved, "only an operator's word leads back");
            }
        }
        prop_assert!(machine.phases().list().iter().all(|phase| phase.start_ms <= phase.end_ms));
    }
}

#[test]
fn memory_that_goes_over_may_take_as_long_as_it_takes() {
    let (mut machine, _) = Machine::start(Duration::from_secs(5), Duration::ZERO);
    machine.on(Event::TargetPrepared, ms(1));
    let mut now = ms(1);
    for _ in 0..10 {
        now += PREPARE_LIMIT - ms(2);
        assert_eq!(machine.on(Event::Tick, now), []);
        assert_eq!(machine.on(Event::SourceCopies, now), []);
    }
    assert_eq!(machine.on(Event::SourcePrepared, now), [Command::Hold]);
    let (mut machine, _) = Machine::start(Duration::from_secs(5), Duration::ZERO);
    machine.on(Event::TargetPrepared, ms(1));
    machine.on(Event::SourceCopies, ms(2));
    machine.on(Event::Tick, ms(2) + PREPARE_LIMIT);
    assert!(matches!(machine.state(), State::RollingBack(_)), "{:?}", machine.state());
}
