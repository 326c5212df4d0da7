//! Every kind of flow at the moment before and the moment of its end.

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    tcp_idle: Ticks(1000),
    tcp_half_open: Ticks(100),
    tcp_closing: Ticks(50),
    udp_idle: Ticks(200),
    orphan: Ticks(20),
};

fn half(seen: u64, flags: &str) -> Half {
    Half { seen: Ticks(seen), finished: flags.contains('F'), reset: flags.contains('R') }
}

fn both(forward: (u64, &str), reply: (u64, &str)) -> Halves {
    Halves::Both { forward: half(forward.0, forward.1), reply: half(reply.0, reply.1) }
}

#[test]
fn flows_end_when_they_may_and_not_a_tick_before() {
    use Cause::{Closed, Idle, Orphan, Reset};
    use Standing::{Established, Newcomer};
    use Transport::{Other, Tcp};
    let one_way = |seen, flags| Halves::OneWay(half(seen, flags));
    // Entries, and how many ticks after the later one's packet the flow ends.
    for (transport, standing, halves, after, cause) in [
        (Tcp, Established, both((500, ""), (400, "")), 1000, Idle),
        (Tcp, Established, both((400, ""), (500, "")), 1000, Idle),
        (Tcp, Newcomer, both((500, ""), (400, "")), 100, Idle),
        (Tcp, Established, both((500, "F"), (400, "")), 1000, Idle),
        (Tcp, Established, both((400, ""), (500, "F")), 1000, Idle),
        (Tcp, Established, both((500, "F"), (400, "F")), 50, Closed),
        (Tcp, Established, both((500, "R"), (400, "")), 50, Reset),
        (Tcp, Established, both((400, ""), (500, "R")), 50, Reset),
        (Tcp, Established, both((400, "F"), (500, "FR")), 50, Reset),
        (Tcp, Newcomer, both((400, ""), (500, "R")), 50, Reset),
        (Tcp, Established, one_way(500, ""), 1000, Idle),
        (Tcp, Established, one_way(500, "F"), 50, Closed),
        (Tcp, Established, one_way(500, "R"), 50, Reset),
        (Other, Established, both((500, ""), (400, "")), 200, Idle),
        (Other, Newcomer, both((500, ""), (400, "")), 200, Idle),
        (Other, Established, one_way(500, "FR"), 200, Idle),
        (Tcp, Established, Halves::Orphan(half(500, "")), 20, Orphan),
        (Tcp, Newcomer, Halves::Orphan(half(500, "F")), 20, Orphan),
        (Other, Established, Halves::Orphan(half(500, "")), 20, Orphan),
    ] {
        let flow = Subject { transport, standing, halves, void: false };
        assert_eq!(verdict(&flow, Ticks(500 + after - 1), &LIMITS), Verdict::Keep, "{flow:?}");
        assert_eq!(verdict(&flow, Ticks(500 + after), &LIMITS), Verdict::Remove(cause), "{flow:?}");
        let void = Subject { void: true, ..flow };
        assert_eq!(verdict(&void, Ticks(500), &LIMITS), Verdict::Remove(Cause::Void));
        // A packet that came after the look at the clock.
        assert_eq!(verdict(&flow, Ticks(100), &LIMITS), Verdict::Keep, "{flow:?}");
    }
}

#[test]
fn the_shorter_time_counts() {
    let limits = Limits { tcp_closing: Ticks(5000), orphan: Ticks(5000), ..LIMITS };
    for halves in [both((0, "F"), (0, "F")), Halves::Orphan(half(0, ""))] {
        let flow =
            Subject { transport: Transport::Tcp, standing: Standing::Established, halves, void: false };
        assert_ne!(verdict(&flow, Ticks(1000), &limits), Verdict::Keep);
    }
}

#[test]
fn times_become_ticks_rounded_up() {
    let times = FlowTimes {
        tcp_idle: Duration::from_secs(7440),
        tcp_half_open: Duration::from_millis(9),
        tcp_closing: Duration::from_millis(4),
        udp_idle: Duration::ZERO,
    };
    let limits = Limits::new(&times, Duration::from_millis(4));
    assert_eq!((limits.tcp_idle, limits.tcp_half_open), (Ticks(1_860_000), Ticks(3)));
    assert_eq!((limits.tcp_closing, limits.udp_idle), (Ticks(1), Ticks(1)));
}

fn halves() -> impl Strategy<Value = Half> {
    (0..3000_u64, any::<bool>(), any::<bool>()).prop_map(|(seen, finished, reset)| Half {
        seen: Ticks(seen),
        finished,
        reset,
    })
}

proptest! {
    /// Passing over fresh entries loses nothing: of a flow that is over, one entry at least is not fresh.
    #[test]
    fn what_is_over_is_looked_at(
        forward in halves(), reply in halves(), tcp: bool, newcomer: bool, now in 0..4000_u64,
    ) {
        let transport = if tcp { Transport::Tcp } else { Transport::Other };
        let standing = if newcomer { Standing::Newcomer } else { Standing::Established };
        let now = Ticks(now);
        for halves in [Halves::Both { forward, reply }, Halves::OneWay(forward)] {
            let flow = Subject { transport, standing, halves, void: false };
            if verdict(&flow, now, &LIMITS) != Verdict::Keep {
                let fresh = |half| is_fresh(transport, standing, half, now, &LIMITS);
                let stale = match halves {
                    Halves::Both { forward, reply } => !fresh(&forward) || !fresh(&reply),
                    Halves::OneWay(half) | Halves::Orphan(half) => !fresh(&half),
                };
                prop_assert!(stale, "{flow:?} at {now:?}");
            }
        }
    }
}
