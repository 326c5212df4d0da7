//! Every state with every event, and what holds for any sequence of them.

use std::time::Duration;

use lb_core::Slot;
use proptest::prelude::*;

use super::*;
use crate::datapath::Overflow;

const HERE: SiteNumber = SiteNumber(3);
const THERE: SiteNumber = SiteNumber(5);
const ELSEWHERE: SiteNumber = SiteNumber(7);
const LIMITS: HoldLimits =
    HoldLimits { max_bytes: 1 << 20, max_age: Duration::from_secs(1), overflow: Overflow::DropNewest };

/// A machine in the named state; its hold had generation 8, slot A leads here and B there.
fn machine(state: &str, now: Instant) -> Machine {
    let word = |gate, generation| GateWord::new(gate, Slot::A, generation);
    let deadline = now + Duration::from_secs(5);
    let (word, state) = match state {
        "forward" => (word(Gate::Forward, 8), State::Forward),
        "holding_new" => (word(Gate::HoldNew, 8), State::HoldingNew { deadline }),
        "holding" => (word(Gate::Hold, 8), State::Holding { deadline, policy: Policy::Hold }),
        "dropping" => (word(Gate::Drop, 8), State::Holding { deadline, policy: Policy::Drop }),
        "expired" => (word(Gate::Drop, 9), State::Expired { hold: 8 }),
        "replaying" => (word(Gate::Replay, 8), State::Replaying),
        other => unreachable!("{other}"),
    };
    Machine { word, sites: [HERE, THERE], state }
}

const STATES: [&str; 6] = ["forward", "holding_new", "holding", "dropping", "expired", "replaying"];

/// What an event leads to: the state's name and the stored word, or the refusal.
type Row<'a> = (&'a str, Result<(&'a str, Option<GateWord>), Refusal>);

#[track_caller]
fn table(event: Event, later: Duration, rows: [Row<'_>; 6]) {
    let now = Instant::now();
    for ((state, expected), name) in rows.into_iter().zip(STATES) {
        assert_eq!(state, name, "the rows stand in the order of the states");
        let before = machine(state, now);
        let mut after = before.clone();
        let result = after.on(event, now + later);
        match expected {
            Ok((label, store)) => {
                let commands = result.unwrap_or_else(|refusal| panic!("{state}: refused: {refusal}"));
                assert_eq!(after.state().label(), label, "{state}");
                assert_eq!(commands.store, store, "{state}");
                assert_eq!(after.word(), store.unwrap_or(before.word()), "{state}");
            }
            Err(refusal) => {
                assert_eq!(result, Err(refusal), "{state}");
                assert_eq!(after, before, "{state}: refused and yet changed");
            }
        }
    }
}

fn word(gate: Gate, slot: Slot, generation: u32) -> Option<GateWord> {
    Some(GateWord::new(gate, slot, generation))
}

const SOON: Duration = Duration::from_secs(1);

#[test]
fn hold() {
    let held = |state| Err(Refusal::AlreadyHeld { state });
    for (policy, gate) in [(Policy::Hold, Gate::Hold), (Policy::Drop, Gate::Drop)] {
        let event = Event::Hold { policy, deadline: Instant::now() + SOON, limits: LIMITS };
        table(
            event,
            SOON,
            [
                ("forward", Ok(("holding", word(gate, Slot::A, 9)))),
                ("holding_new", Ok(("holding", word(gate, Slot::A, 9)))),
                ("holding", held("holding")),
                ("dropping", held("holding")),
                ("expired", held("expired")),
                ("replaying", held("replaying")),
            ],
        );
        let mut machine = machine("forward", Instant::now());
        let commands = machine.on(event, Instant::now()).unwrap();
        assert_eq!(commands.begin_hold, Some(LIMITS), "the queue is ready before the gate closes");
    }
}

#[test]
fn hold_of_new_connections_and_then_of_all_is_one_queue() {
    let held = |state| Err(Refusal::AlreadyHeld { state });
    let now = Instant::now();
    let event = Event::HoldNew { deadline: now + SOON, limits: LIMITS };
    table(
        event,
        SOON,
        [
            ("forward", Ok(("holding_new", word(Gate::HoldNew, Slot::A, 9)))),
            ("holding_new", held("holding_new")),
            ("holding", held("holding")),
            ("dropping", held("holding")),
            ("expired", held("expired")),
            ("replaying", held("replaying")),
        ],
    );
    let mut machine = machine("forward", now);
    assert_eq!(machine.on(event, now).unwrap().begin_hold, Some(LIMITS));
    assert_eq!(machine.next_tick(), Some(now + SOON));
    let hold = Event::Hold { policy: Policy::Hold, deadline: now + 2 * SOON, limits: LIMITS };
    assert_eq!(machine.on(hold, now).unwrap().begin_hold, None, "what waits is not thrown away");
    assert_eq!(machine.next_tick(), Some(now + 2 * SOON));
}

#[test]
fn flip_with_the_generation_of_the_hold() {
    table(
        Event::Flip { generation: 8, to: THERE },
        SOON,
        [
            ("forward", Err(Refusal::NotHeld { state: "forward" })),
            ("holding_new", Err(Refusal::NotHeld { state: "holding_new" })),
            ("holding", Ok(("replaying", word(Gate::Replay, Slot::B, 9)))),
            ("dropping", Ok(("replaying", word(Gate::Replay, Slot::B, 9)))),
            ("expired", Err(Refusal::DeadlinePassed { current: 9 })),
            ("replaying", Err(Refusal::NotHeld { state: "replaying" })),
        ],
    );
}

#[test]
fn flip_with_the_generation_that_only_an_expired_gate_has() {
    let stale = || Err(Refusal::Stale { given: 9, current: 8 });
    table(
        Event::Flip { generation: 9, to: THERE },
        SOON,
        [
            ("forward", stale()),
            ("holding_new", stale()),
            ("holding", stale()),
            ("dropping", stale()),
            ("expired", Ok(("replaying", word(Gate::Replay, Slot::B, 10)))),
            ("replaying", stale()),
        ],
    );
}

#[test]
fn flip_with_an_old_generation() {
    let stale = |current| Err(Refusal::Stale { given: 7, current });
    table(
        Event::Flip { generation: 7, to: THERE },
        SOON,
        [
            ("forward", stale(8)),
            ("holding_new", stale(8)),
            ("holding", stale(8)),
            ("dropping", stale(8)),
            ("expired", stale(9)),
            ("replaying", stale(8)),
        ],
    );
}

#[test]
fn flip_to_where_it_is_or_where_nothing_is_staged() {
    for (to, refusal) in [(HERE, Refusal::SameLocation), (ELSEWHERE, Refusal::NotStaged)] {
        for (state, generation) in [("holding", 8), ("dropping", 8), ("expired", 9)] {
            let before = machine(state, Instant::now());
            let mut after = before.clone();
            assert_eq!(after.on(Event::Flip { generation, to }, Instant::now()), Err(refusal), "{state}");
            assert_eq!(after, before);
        }
    }
}

#[test]
fn resume() {
    table(
        Event::Resume { generation: 8 },
        SOON,
        [
            ("forward", Err(Refusal::NotHeld { state: "forward" })),
            ("holding_new", Ok(("replaying", word(Gate::Replay, Slot::A, 9)))),
            ("holding", Ok(("replaying", word(Gate::Replay, Slot::A, 9)))),
            ("dropping", Ok(("replaying", word(Gate::Replay, Slot::A, 9)))),
            // A migration that rolls back after its deadline knows only the generation of its hold.
            ("expired", Ok(("replaying", word(Gate::Replay, Slot::A, 10)))),
            ("replaying", Err(Refusal::NotHeld { state: "replaying" })),
        ],
    );
    let stale = |current| Err(Refusal::Stale { given: 7, current });
    table(
        Event::Resume { generation: 7 },
        SOON,
        [
            ("forward", stale(8)),
            ("holding_new", stale(8)),
            ("holding", stale(8)),
            ("dropping", stale(8)),
            ("expired", stale(9)),
            ("replaying", stale(8)),
        ],
    );
}

#[test]
fn a_tick_before_the_deadline_changes_nothing() {
    table(
        Event::Tick,
        Duration::from_millis(4999),
        [
            ("forward", Ok(("forward", None))),
            ("holding_new", Ok(("holding_new", None))),
            ("holding", Ok(("holding", None))),
            ("dropping", Ok(("holding", None))),
            ("expired", Ok(("expired", None))),
            ("replaying", Ok(("replaying", None))),
        ],
    );
}

#[test]
fn a_tick_at_the_deadline_closes_the_queue() {
    table(
        Event::Tick,
        Duration::from_secs(5),
        [
            ("forward", Ok(("forward", None))),
            // Nothing has moved behind it.
            ("holding_new", Ok(("replaying", word(Gate::Replay, Slot::A, 9)))),
            ("holding", Ok(("expired", word(Gate::Drop, Slot::A, 9)))),
            ("dropping", Ok(("expired", word(Gate::Drop, Slot::A, 9)))),
            ("expired", Ok(("expired", None))),
            ("replaying", Ok(("replaying", None))),
        ],
    );
}

#[test]
fn replayed() {
    table(
        Event::Replayed,
        SOON,
        [
            ("forward", Ok(("forward", None))),
            ("holding_new", Ok(("holding_new", None))),
            ("holding", Ok(("holding", None))),
            ("dropping", Ok(("holding", None))),
            ("expired", Ok(("expired", None))),
            ("replaying", Ok(("forward", word(Gate::Forward, Slot::A, 9)))),
        ],
    );
}

#[test]
fn staging_changes_the_spare_slot_only() {
    let now = Instant::now();
    for state in STATES {
        let mut machine = machine(state, now);
        let before = machine.clone();
        let commands = machine.on(Event::Staged { site: ELSEWHERE }, now).unwrap();
        assert_eq!(commands, Commands::default());
        assert_eq!((machine.location(), machine.staged()), (HERE, ELSEWHERE), "{state}");
        assert_eq!((machine.word(), machine.state()), (before.word(), before.state()));
    }
}

#[test]
fn a_restart_takes_every_gate_over_as_it_is() {
    let deadline = Instant::now() + SOON;
    for (gate, label, store) in [
        (Gate::Forward, "forward", false),
        (Gate::HoldNew, "holding_new", false),
        (Gate::Hold, "holding", false),
        (Gate::Drop, "holding", false),
        (Gate::Replay, "replaying", true),
    ] {
        let word = GateWord::new(gate, Slot::B, 41);
        let tables = BackendState { word, sites: [HERE, THERE] };
        let (machine, commands) = Machine::take_over(tables, deadline, LIMITS);
        assert_eq!(machine.state().label(), label);
        assert_eq!((machine.word(), machine.location(), machine.staged()), (word, THERE, HERE));
        assert_eq!(commands.begin_hold.is_some(), gate != Gate::Forward);
        assert_eq!(commands.store, store.then_some(word), "the word itself does not change");
        let waits = label.starts_with("holding").then_some(deadline);
        assert_eq!(machine.next_tick(), waits);
    }
}

/// An event as a number generator writes it: generations relative to the present one.
#[derive(Clone, Copy, Debug)]
enum Step {
    HoldNew(u64),
    Hold(Policy, u64),
    Stage(u32),
    Flip(i32, u32),
    Resume(i32),
    Wait(u64),
    Replayed,
}

fn step() -> impl Strategy<Value = Step> {
    let policy = prop_oneof![Just(Policy::Hold), Just(Policy::Drop)];
    prop_oneof![
        2 => (1u64..2000).prop_map(Step::HoldNew),
        3 => (policy, 1u64..2000).prop_map(|(policy, ms)| Step::Hold(policy, ms)),
        2 => (0u32..4).prop_map(Step::Stage),
        3 => (-2i32..=1, 0u32..4).prop_map(|(generation, to)| Step::Flip(generation, to)),
        2 => (-2i32..=1).prop_map(Step::Resume),
        2 => (0u64..1500).prop_map(Step::Wait),
        3 => Just(Step::Replayed),
    ]
}

proptest! {
    #[test]
    fn whatever_happens(
        first in 0u64..4,
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let start = Instant::now();
        let mut now = start;
        let word = GateWord::from_bits(first | 8 << 32);
        let sites = [SiteNumber(0), SiteNumber(1)];
        let (mut machine, _) =
            Machine::take_over(BackendState { word, sites }, now + SOON, LIMITS);
        // What an observer of the tables would know.
        let mut slots = sites;
        let mut stored = vec![word];
        let mut begun = true;

        for step in steps {
            let generation = |offset: i32| machine.word().generation().wrapping_add_signed(offset);
            let event = match step {
                Step::HoldNew(ms) => {
                    Event::HoldNew { deadline: now + Duration::from_millis(ms), limits: LIMITS }
                }
                Step::Hold(policy, ms) => {
                    Event::Hold { policy, deadline: now + Duration::from_millis(ms), limits: LIMITS }
                }
                Step::Stage(site) => Event::Staged { site: SiteNumber(site) },
                Step::Flip(offset, to) => Event::Flip { generation: generation(offset), to: SiteNumber(to) },
                Step::Resume(offset) => Event::Resume { generation: generation(offset) },
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    Event::Tick
                }
                Step::Replayed => Event::Replayed,
            };
            let before = machine.clone();
            let Ok(commands) = machine.on(event, now) else {
                prop_assert_eq!(&machine, &before, "a refusal changes nothing");
                continue;
            };
            if let Event::Staged { site } = event {
                slots[before.word().slot().other() as usize] = site;
            }
            begun |= commands.begin_hold.is_some();
            if let Some(word) = commands.store {
                let last = *stored.last().expect("the first word is there");
                prop_assert!(word.generation() > last.generation(), "generations grow");
                if word.gate() == Gate::Forward {
                    prop_assert_eq!(last.gate(), Gate::Replay, "a replay comes first");
                }
                if matches!(word.gate(), Gate::Forward | Gate::Replay) {
                    prop_assert!(begun, "nothing is replayed that was not held");
                }
                if word.slot() != last.slot() {
                    let Event::Flip { generation, to } = event else {
                        return Err(TestCaseError::fail("only a flip changes the location"));
                    };
                    prop_assert_eq!(generation, last.generation(), "an old generation never flips");
                    prop_assert_eq!(slots[word.slot() as usize], to, "the location is the one that was told");
                    prop_assert!(matches!(last.gate(), Gate::Hold | Gate::Drop));
                }
                stored.push(word);
            }
            prop_assert_eq!(machine.word(), *stored.last().expect("the first word is there"));
            prop_assert_eq!(machine.location(), slots[machine.word().slot() as usize]);
            let open = machine.word().gate() == Gate::Forward;
            prop_assert_eq!(open, machine.state() == State::Forward);
            if let (Event::Tick, Some(deadline)) = (event, machine.next_tick()) {
                prop_assert!(deadline > now, "a deadline that passed was acted on");
            }
        }
    }
}
