//! When what arrives, row by row, and what holds for any settings and any packets.

use std::num::NonZeroU64;

use proptest::prelude::*;

use super::*;

const fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

const fn frame(bytes: u64) -> Size {
    Size { frames: 1, bytes }
}

/// 1 Mb/s: a byte takes 8 us.
fn at_1_mbit() -> WaySpec {
    WaySpec { rate_bits_per_s: NonZeroU64::new(1_000_000), ..WaySpec::default() }
}

/// Takes what there is, punctually, until `end`: packets and when they came.
fn drain(queue: &mut Queue<u32>, end: Duration) -> Vec<(u32, Duration)> {
    let mut taken = Vec::new();
    while let Some(next) = queue.next().filter(|next| *next <= end) {
        taken.extend(std::iter::from_fn(|| queue.take(next)).map(|(packet, _)| (packet, next)));
    }
    taken
}

#[test]
fn what_is_offered_arrives_when_it_is_due() {
    let limited = |queue| WaySpec { queue, ..at_1_mbit() };
    let far = WaySpec { delay: us(5000), ..WaySpec::default() };
    // Settings, when frames of 100 bytes are offered, and when which arrive, in us.
    let rows = [
        ("delay", far, vec![0, 10, 9000], vec![(0, 5000), (1, 5010), (2, 14_000)]),
        ("rate", at_1_mbit(), vec![0, 0, 100, 5000], vec![(0, 800), (1, 1600), (2, 2400), (3, 5800)]),
        ("rate and delay", WaySpec { delay: us(50), ..at_1_mbit() }, vec![0, 0], vec![(0, 850), (1, 1650)]),
        (
            "room for one, which is free when the frame before is being sent",
            limited(QueueLimit::Packets(1)),
            vec![0, 0, 0, 799, 800, 801],
            vec![(0, 800), (1, 1600), (4, 2400)],
        ),
        (
            "room for 250 bytes",
            limited(QueueLimit::Bytes(250)),
            vec![0, 0, 0, 0],
            vec![(0, 800), (1, 1600), (2, 2400)],
        ),
        (
            "no room, but a free transmitter",
            limited(QueueLimit::Bytes(0)),
            vec![0, 0, 800],
            vec![(0, 800), (2, 1600)],
        ),
        ("all is lost", WaySpec { loss: 1.0, ..at_1_mbit() }, vec![0, 0], vec![]),
    ];
    for (what, spec, offered, expected) in rows {
        let mut queue = Queue::new(spec);
        let mut arrived = Vec::new();
        for (number, at) in (0u32..).zip(&offered) {
            arrived.extend(drain(&mut queue, us(*at)));
            assert_ne!(queue.offer(us(*at), frame(100), || number), Offer::Passes, "{what}");
        }
        arrived.extend(drain(&mut queue, Duration::MAX));
        let expected: Vec<_> = expected.into_iter().map(|(number, at)| (number, us(at))).collect();
        assert_eq!(arrived, expected, "{what}");
        let Counters { forwarded, dropped_by_queue, dropped_by_loss, .. } = queue.counters();
        assert_eq!(forwarded, expected.len() as u64, "{what}");
        assert_eq!(forwarded + dropped_by_queue + dropped_by_loss, offered.len() as u64, "{what}");
    }
}

#[test]
fn what_nothing_holds_up_passes_and_what_comes_behind_others_does_not() {
    let mut queue = Queue::new(WaySpec::default());
    assert_eq!(queue.offer(us(0), frame(100), || 0), Offer::Passes);
    assert_eq!(queue.counters(), Counters { forwarded: 1, forwarded_bytes: 100, ..Counters::default() });
    queue.set(us(0), WaySpec { delay: us(500), ..WaySpec::default() });
    assert_eq!(queue.offer(us(0), frame(100), || 1), Offer::Taken);
    queue.set(us(100), WaySpec::default());
    assert_eq!(queue.offer(us(100), frame(100), || 2), Offer::Taken);
    assert_eq!(drain(&mut queue, Duration::MAX), [(1, us(500)), (2, us(500))]);
}

#[test]
fn a_new_rate_is_for_what_waits() {
    let mut queue = Queue::new(at_1_mbit());
    (0..3).for_each(|number| assert_eq!(queue.offer(us(0), frame(100), || number), Offer::Taken));
    queue.set(us(400), WaySpec { rate_bits_per_s: NonZeroU64::new(8_000_000), ..WaySpec::default() });
    assert_eq!(drain(&mut queue, Duration::MAX), [(0, us(800)), (1, us(900)), (2, us(1000))]);
}

#[test]
fn who_looks_late_is_told_how_late() {
    let mut queue = Queue::new(at_1_mbit());
    (0..2).for_each(|number| assert_eq!(queue.offer(us(0), frame(100), || number), Offer::Taken));
    for (now, taken, latest) in [(799, None, 0), (810, Some(0), 10), (1605, Some(1), 10)] {
        assert_eq!(queue.take(us(now)), taken.map(|number| (number, frame(100))));
        assert_eq!(queue.counters().latest, us(latest));
    }
}

#[test]
fn a_cut_loses_what_is_under_way_and_what_comes() {
    let mut queue = Queue::new(WaySpec { delay: us(500), ..at_1_mbit() });
    (0..3).for_each(|number| assert_eq!(queue.offer(us(0), frame(100), || number), Offer::Taken));
    queue.cut();
    assert_eq!((queue.next(), queue.take(Duration::MAX)), (None, None));
    assert_eq!(queue.offer(us(10), frame(100), || 3), Offer::Dropped);
    assert_eq!(queue.counters().dropped_by_cut, 4);
    queue.heal();
    assert_eq!(queue.offer(us(20), frame(100), || 4), Offer::Taken);
    assert_eq!(drain(&mut queue, Duration::MAX), [(4, us(1320))]);
}

#[test]
fn a_line_without_rate_is_bounded_too() {
    let mut queue = Queue::new(WaySpec { delay: us(1), ..WaySpec::default() });
    let half = frame(LINE_BYTES / 2);
    let offers = [0, 0, 0].map(|now| queue.offer(us(now), half, || ()));
    assert_eq!(offers, [Offer::Taken, Offer::Taken, Offer::Dropped]);
    while queue.take(us(1)).is_some() {}
    assert_eq!(queue.offer(us(1), half, || ()), Offer::Taken);
}

#[test]
fn losses_are_as_many_as_asked_and_do_not_come_in_turn() {
    let mut queue = Queue::new(WaySpec { loss: 0.1, seed: 7, ..WaySpec::default() });
    let mut pairs = 0;
    let mut before = 0;
    for _ in 0..50_000 {
        let had = queue.counters().dropped_by_loss;
        assert_eq!(queue.offer(us(0), frame(100), || ()), Offer::Taken);
        while queue.take(us(0)).is_some() {}
        let lost = queue.counters().dropped_by_loss - had;
        pairs += lost * before;
        before = lost;
    }
    // 5000 and 500 expected, with deviations of 67 and 22.
    let lost = queue.counters().dropped_by_loss;
    assert!(
        (4700..5300).contains(&lost) && (400..600).contains(&pairs),
        "{lost} lost, {pairs} after another"
    );
}

fn spec() -> impl Strategy<Value = WaySpec> {
    let queue =
        prop_oneof![(0u64..20_000).prop_map(QueueLimit::Bytes), (0u64..20).prop_map(QueueLimit::Packets)];
    let rate = prop_oneof![Just(0), 10_000u64..1_000_000_000];
    let loss = prop_oneof![Just(0.0), 0.0..1.0];
    let delay = prop_oneof![Just(0), 0u64..50_000];
    let jitter = prop_oneof![Just(0), 0u64..10_000];
    (delay, jitter, rate, queue, loss, any::<u64>()).prop_map(|(delay, jitter, rate, queue, loss, seed)| {
        WaySpec {
            delay: us(delay),
            jitter: us(jitter),
            rate_bits_per_s: NonZeroU64::new(rate),
            queue,
            loss,
            seed,
        }
    })
}

/// Packets: how long after the one before, in us, and how large.
fn packets() -> impl Strategy<Value = Vec<(u64, Size)>> {
    let size = (1u64..4, 60u64..1514).prop_map(|(frames, bytes)| Size { frames, bytes: frames * bytes });
    proptest::collection::vec((prop_oneof![Just(0), 0u64..3000], size), 1..80)
}

/// How long `bytes` take at least, in ns, at the spec's rate.
fn least_ns(spec: &WaySpec, bytes: u64) -> u128 {
    spec.rate_bits_per_s.map_or(0, |rate| u128::from(bytes) * 8_000_000_000 / u128::from(rate.get()))
}

proptest! {
    #[test]
    fn never_early_never_reordered_never_too_fast_and_bounded(spec in spec(), packets in packets()) {
        let mut queue = Queue::new(spec);
        let (mut now, mut offered, mut arrived) = (Duration::ZERO, Vec::new(), Vec::new());
        for (number, (gap_us, size)) in (0u32..).zip(&packets) {
            now += us(*gap_us);
            arrived.extend(drain(&mut queue, now));
            offered.push(now);
            if queue.offer(now, *size, || number) == Offer::Passes {
                arrived.push((number, now));
            }
            let within = match spec.queue {
                QueueLimit::Bytes(limit) => queue.waiting_size.bytes <= limit,
                QueueLimit::Packets(limit) => queue.waiting_size.frames <= limit,
            };
            prop_assert!(within || spec.rate_bits_per_s.is_none(), "the queue is bounded");
        }
        arrived.extend(drain(&mut queue, Duration::MAX));

        for (number, at) in &arrived {
            let asked = spec.delay.as_nanos() + least_ns(&spec, packets[*number as usize].1.bytes);
            prop_assert!((*at - offered[*number as usize]).as_nanos() >= asked, "early");
        }
        for pair in arrived.windows(2) {
            prop_assert!(pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1, "reordered");
        }
        // From any arrival on: what came later than it, at the rate; jitter shifts both ends.
        for (position, (_, start)) in arrived.iter().enumerate() {
            let mut bytes = 0;
            for (number, end) in &arrived[position + 1..] {
                bytes += packets[*number as usize].1.bytes;
                let took = (*end - *start + spec.jitter).as_nanos();
                prop_assert!(took >= least_ns(&spec, bytes), "faster than the rate");
            }
        }
        let frames: u64 = packets.iter().map(|(_, size)| size.frames).sum();
        let Counters { forwarded, dropped_by_queue, dropped_by_loss, .. } = queue.counters();
        prop_assert_eq!(forwarded + dropped_by_queue + dropped_by_loss, frames, "all are accounted for");
        prop_assert_eq!((queue.next(), queue.line_bytes, queue.waiting_size), (None, 0, Size { frames: 0, bytes: 0 }));
    }

    #[test]
    fn who_looks_late_gets_the_same(spec in spec(), packets in packets()) {
        let mut punctual = Queue::new(spec);
        let mut late = Queue::new(spec);
        let (mut now, mut of_punctual, mut of_late) = (Duration::ZERO, Vec::new(), Vec::new());
        for (number, (gap_us, size)) in (0u32..).zip(&packets) {
            now += us(*gap_us);
            of_punctual.extend(drain(&mut punctual, now).into_iter().map(|(number, _)| number));
            let offers = [punctual.offer(now, *size, || number), late.offer(now, *size, || number)];
            prop_assert_eq!(offers[0], offers[1]);
            if offers[0] == Offer::Passes {
                of_punctual.push(number);
                of_late.push(number);
            }
        }
        of_punctual.extend(drain(&mut punctual, Duration::MAX).into_iter().map(|(number, _)| number));
        of_late.extend(std::iter::from_fn(|| late.take(Duration::MAX)).map(|(number, _)| number));
        prop_assert_eq!(of_punctual, of_late);
        prop_assert_eq!(punctual.counters().latest, Duration::ZERO);
        prop_assert_eq!(punctual.counters(), Counters { latest: Duration::ZERO, ..late.counters() });
    }
}
