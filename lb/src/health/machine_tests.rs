//! Every state with every input, and what holds for any sequence of them.

use proptest::prelude::*;

use super::*;

const PACE: Pace = Pace {
    interval: Duration::from_secs(2),
    rise: 2,
    fall: 3,
    probes: true,
    resets: Some(ResetLimit { most: 10, window: Duration::from_secs(5) }),
};

/// A machine that does `activity`.
fn machine(verdict: Verdict, activity: Activity, now: Instant) -> Machine {
    Machine { verdict, activity, ..Machine::new(PACE, 7, now) }
}

fn probing(verdict: Verdict, now: Instant) -> Machine {
    machine(verdict, Activity::Probing { since: now }, now)
}

const UNTRIED: Verdict = Verdict::Untried;

const fn up(failures: u32) -> Verdict {
    Verdict::Up { failures }
}

const fn down(successes: u32) -> Verdict {
    Verdict::Down { successes }
}

#[test]
fn results_in_a_row_turn_the_verdict() {
    let now = Instant::now();
    for (before, input, after, turned) in [
        (UNTRIED, Input::Success, up(0), None),
        (UNTRIED, Input::Failure, down(0), Some(false)),
        (UNTRIED, Input::NotProbed, UNTRIED, None),
        (up(0), Input::Success, up(0), None),
        (up(0), Input::Failure, up(1), None),
        (up(1), Input::Failure, up(2), None),
        (up(2), Input::Success, up(0), None),
        (up(2), Input::NotProbed, up(2), None),
        (up(2), Input::Failure, down(0), Some(false)),
        (down(0), Input::Failure, down(0), None),
        (down(0), Input::Success, down(1), None),
        (down(1), Input::Failure, down(0), None),
        (down(1), Input::NotProbed, down(1), None),
        (down(1), Input::Success, up(0), Some(true)),
    ] {
        let mut machine = probing(before, now);
        let commands = machine.on(input, now);
        assert_eq!((machine.verdict(), commands.turned), (after, turned), "{before:?} {input:?}");
        assert!(!commands.probe, "{before:?} {input:?}: the next probe has its time");
    }
}

#[test]
fn every_activity_with_every_input() {
    let now = Instant::now();
    let later = now + Duration::from_secs(1);
    let waiting = Activity::Waiting { until: later };
    let due = Activity::Waiting { until: now };
    let under_way = Activity::Probing { since: now };
    let (suspended, watching) = (Activity::Suspended, Activity::Watching);
    // What `now` leads to: the same activity, a probe, or the named one. `Waiting` stands for any time.
    for (before, input, after, probe) in [
        (waiting, Input::Tick, waiting, false),
        (due, Input::Tick, under_way, true),
        (under_way, Input::Tick, under_way, false),
        (suspended, Input::Tick, suspended, false),
        (watching, Input::Tick, watching, false),
        (waiting, Input::Failure, waiting, false),
        (under_way, Input::Failure, waiting, false),
        (under_way, Input::NotProbed, waiting, false),
        (suspended, Input::Failure, suspended, false),
        (watching, Input::Failure, watching, false),
        (waiting, Input::Suspend, suspended, false),
        (under_way, Input::Suspend, suspended, false),
        (suspended, Input::Suspend, suspended, false),
        (watching, Input::Suspend, suspended, false),
        (waiting, Input::Resume, waiting, false),
        (under_way, Input::Resume, under_way, false),
        (suspended, Input::Resume, waiting, false),
        (watching, Input::Resume, watching, false),
        (suspended, Input::Resets(1000), suspended, false),
    ] {
        let mut machine = machine(up(0), before, now);
        let commands = machine.on(input, now);
        let same = std::mem::discriminant(&machine.activity) == std::mem::discriminant(&after);
        assert!(same, "{before:?} {input:?}: {:?} instead of {after:?}", machine.activity);
        assert_eq!(commands.probe, probe, "{before:?} {input:?}");
    }
}

#[test]
fn a_suspension_overtakes_the_probe_and_grants_grace_afterwards() {
    let now = Instant::now();
    let mut machine = probing(up(2), now);
    machine.on(Input::Suspend, now);
    assert!(machine.is_suspended());
    // The frozen backend did not answer: that is no failure.
    let frozen = now + Duration::from_secs(1);
    assert_eq!(machine.on(Input::Failure, frozen), Commands::default());
    assert_eq!((machine.verdict(), machine.next_probe()), (up(0), None));
    let open = now + Duration::from_secs(60);
    machine.on(Input::Resume, open);
    let next = machine.next_probe().expect("it is probed again");
    assert!(next >= open + PACE.interval * 9 / 10, "{:?}", next - open);
    // A machine without probes goes back to watching.
    let mut machine = Machine::new(Pace { probes: false, ..PACE }, 1, now);
    machine.on(Input::Suspend, now);
    machine.on(Input::Resume, now);
    assert_eq!(machine.activity, Activity::Watching);
}

#[test]
fn too_many_resets_count_once_a_window_and_bring_the_probe_forward() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut machine = machine(up(0), Activity::Waiting { until: at(100) }, now);
    assert_eq!(machine.on(Input::Resets(500), at(0)), Commands::default(), "what was before does not count");
    assert_eq!(machine.on(Input::Resets(510), at(1)), Commands::default(), "ten are all right");
    assert_eq!(machine.on(Input::Resets(511), at(2)), Commands { probe: true, turned: None });
    assert_eq!(machine.verdict(), up(1));
    assert_eq!(machine.on(Input::Resets(900), at(3)), Commands::default(), "once a window");
    assert_eq!(machine.on(Input::Failure, at(3)).turned, None);
    machine.on(Input::Resets(900), at(5));
    assert_eq!(
        machine.on(Input::Resets(911), at(6)),
        Commands { probe: true, turned: Some(false) },
        "the third failure"
    );
    assert_eq!(machine.verdict(), down(0));
}

#[test]
fn resets_alone_take_a_backend_out_and_quiet_windows_bring_it_back() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut machine = Machine::new(Pace { probes: false, ..PACE }, 1, now);
    let mut total = 0;
    let mut turns = Vec::new();
    for second in 0..60 {
        if second < 15 {
            total += 20;
        }
        turns.extend(machine.on(Input::Resets(total), at(second)).turned);
        assert_eq!(machine.next_probe(), None);
    }
    // Untried, so the first result decides; two quiet windows are its rise.
    assert_eq!((turns, machine.verdict()), (vec![false, true], up(0)));
}

#[test]
fn first_probes_are_spread_over_the_interval_and_later_ones_move() {
    let now = Instant::now();
    let first: Vec<Duration> =
        (0..1000).map(|seed| Machine::new(PACE, seed, now).next_probe().unwrap() - now).collect();
    for tenth in 0..10 {
        let from = PACE.interval * tenth / 10;
        let within = first.iter().filter(|after| (from..from + PACE.interval / 10).contains(*after)).count();
        assert!((50..200).contains(&within), "{within} of 1000 in tenth {tenth}");
    }
}

#[test]
fn another_pace_keeps_the_verdict() {
    let now = Instant::now();
    let mut machine = probing(down(1), now);
    machine.set_pace(Pace { rise: 5, ..PACE }, now);
    assert_eq!(machine.activity, Activity::Probing { since: now });
    machine.on(Input::Success, now);
    assert_eq!(machine.verdict(), down(2));
    machine.set_pace(Pace { probes: false, ..PACE }, now);
    assert_eq!((machine.next_probe(), machine.verdict()), (None, down(2)));
    machine.set_pace(PACE, now);
    assert!(machine.next_probe().is_some());
    machine.on(Input::Suspend, now);
    machine.set_pace(PACE, now);
    assert!(machine.is_suspended());
}

fn inputs() -> impl Strategy<Value = Vec<(Input, u64)>> {
    let input = prop_oneof![
        4 => Just(Input::Tick),
        3 => Just(Input::Success),
        3 => Just(Input::Failure),
        1 => Just(Input::NotProbed),
        1 => Just(Input::Suspend),
        1 => Just(Input::Resume),
        1 => (0..200_u64).prop_map(Input::Resets),
    ];
    prop::collection::vec((input, 0..3000_u64), 0..200)
}

proptest! {
    #[test]
    fn whatever_happens(
        history in inputs(), seed: u64, rise in 1..5_u32, fall in 1..5_u32, probes: bool, resets: bool,
    ) {
        let mut now = Instant::now();
        let limit = PACE.resets.filter(|_| resets);
        let pace = Pace { rise, fall, probes, resets: limit, ..PACE };
        let mut machine = Machine::new(pace, seed, now);
        let (mut failures, mut under_way) = (0, false);
        for (input, later) in history {
            now += Duration::from_millis(later);
            let before = machine.clone();
            let commands = machine.on(input, now);
            // A turn is reported exactly when it happens.
            let turned = (before.verdict().is_up() != machine.verdict().is_up())
                .then_some(machine.verdict().is_up());
            prop_assert_eq!(commands.turned, turned);
            // One probe at a time, and none while suspended.
            if commands.probe {
                prop_assert!(!before.is_suspended() && before.next_probe().is_some() && !under_way && probes);
            }
            match (input, before.activity) {
                (Input::Success | Input::Failure | Input::NotProbed, Activity::Probing { .. })
                | (Input::Suspend, _) => under_way = false,
                _ => under_way |= commands.probe,
            }
            prop_assert_eq!(under_way, matches!(machine.activity, Activity::Probing { .. }));
            // Nothing but its own failures takes a backend out: `fall` in a row, or the first result.
            match (input, before.activity, machine.verdict()) {
                (Input::Failure, Activity::Probing { .. }, _) => failures += 1,
                (Input::Resets(_), _, after) if after != before.verdict() && commands.turned != Some(true) =>
                    failures += 1,
                _ => {}
            }
            if commands.turned == Some(false) {
                prop_assert!(before.verdict() == Verdict::Untried || failures >= fall);
            }
            if matches!(machine.verdict(), Verdict::Up { failures: 0 }) {
                failures = 0;
            }
            if input == Input::Suspend {
                prop_assert!(machine.is_suspended() && commands == Commands::default());
                failures = 0;
            }
            // Somebody will look again.
            if probes && !machine.is_suspended() && !under_way {
                let next = machine.next_probe().expect("a probe is due some time");
                prop_assert!(next <= now + PACE.interval * 11 / 10);
            }
        }
    }
}
