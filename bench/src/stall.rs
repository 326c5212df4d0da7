//! What a migration cost each client, from a timeline and the migration's times.
//!
//! The *stall* of a client is its longest message latency around the migration, and its *added stall* how much
//! longer that is than the freeze window: what a client that asks all the time waits beyond what the freeze
//! explains. A client whose message came late in the freeze window waits for a part of it only, so that its
//! added stall is zero whatever happened then. Therefore there is a stricter figure too, the time *besides the
//! freeze*: a message's latency minus that part of it during which no server ran anywhere. It includes the time
//! that the restored server takes to answer everything that has waited.

use serde::Serialize;

use crate::timeline::{Message, Timeline};

/// How long before the hold a message may have been due to be looked at.
const BEFORE_HOLD_NS: i64 = 50_000_000;

/// How long after the first replay a message is still looked at: longer than a first retransmission timeout.
const AFTER_REPLAY_NS: i64 = 1_000_000_000;

/// Times of one migration in a timeline's nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The gate closed.
    pub hold_ns: i64,
    /// From the source's freeze to the moment the restored process ran; none if nothing was frozen.
    pub freeze: Option<(i64, i64)>,
    /// The first held packet left, or, where none was held, the gate opened.
    pub replay_ns: i64,
}

/// One client's worst message around one migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClientStall {
    /// Which client.
    pub client: u32,
    /// Its longest latency in milliseconds.
    pub stall_ms: f64,
    /// What that is more than the freeze window, in milliseconds.
    pub added_ms: f64,
    /// The longest that a message of its waited outside of the freeze window, in milliseconds.
    pub beside_freeze_ms: f64,
}

/// The stalls of all clients that had a message under way in the freeze window (where nothing was frozen:
/// between hold and replay). The others did not notice.
pub fn stalls(timeline: &Timeline, window: &Window) -> Vec<ClientStall> {
    let (from_ns, to_ns) = window.freeze.unwrap_or((window.hold_ns, window.replay_ns));
    let freeze_ms =
        window.freeze.map_or(0.0, |(frozen_ns, running_ns)| (running_ns - frozen_ns) as f64 / 1e6);
    let mut worst: Vec<Option<ClientStall>> = vec![None; timeline.clients as usize];
    for message in timeline.touching(from_ns, to_ns) {
        let client = message.client;
        worst[client as usize] =
            Some(ClientStall { client, stall_ms: 0.0, added_ms: 0.0, beside_freeze_ms: 0.0 });
    }
    for message in timeline.touching(window.hold_ns - BEFORE_HOLD_NS, window.replay_ns + AFTER_REPLAY_NS) {
        if let Some(stall) = &mut worst[message.client as usize] {
            let latency_ns = (timeline.end_of(message) - message.due_ns) as i64;
            let beside_ns = latency_ns - frozen_ns(timeline, message, window.freeze);
            stall.stall_ms = stall.stall_ms.max(latency_ns as f64 / 1e6);
            stall.added_ms = (stall.stall_ms - freeze_ms).max(0.0);
            stall.beside_freeze_ms = stall.beside_freeze_ms.max(beside_ns as f64 / 1e6);
        }
    }
    worst.into_iter().flatten().collect()
}

/// How much of a message's time was in the freeze window.
fn frozen_ns(timeline: &Timeline, message: &Message, freeze: Option<(i64, i64)>) -> i64 {
    let Some((frozen_ns, running_ns)) = freeze else { return 0 };
    let from_ns = (message.due_ns as i64).max(frozen_ns);
    let to_ns = (timeline.end_of(message) as i64).min(running_ns);
    (to_ns - from_ns).max(0)
}

/// Three percentiles of a set of values, in the values' unit; zeros for an empty set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half of the values are at most this.
    pub p50: f64,
    /// 99 of 100 values are at most this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// By nearest rank: each result is one of the values.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let rank = |part: f64| {
            let rank = (part * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied().unwrap_or_default()
        };
        Self { p50: rank(0.5), p99: rank(0.99), max: values.last().copied().unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::constructed::{message, timeline};

    const MS: i64 = 1_000_000;

    /// Hold at 1000 ms, frozen from 1005 to 1020, first replay at 1021.
    fn window() -> Window {
        Window { hold_ns: 1000 * MS, freeze: Some((1005 * MS, 1020 * MS)), replay_ns: 1021 * MS }
    }

    /// Stall, added stall and time besides the freeze of the only client after messages due and answered at these
    /// times.
    fn stall_of(messages: &[(f64, Option<f64>)]) -> Option<(f64, f64, f64)> {
        let messages = messages
            .iter()
            .enumerate()
            .map(|(index, &(due, answered))| message(0, index as u64 + 1, due, answered))
            .collect();
        let found = stalls(&timeline(1, messages), &window());
        found.first().map(|stall| (stall.stall_ms, stall.added_ms, stall.beside_freeze_ms))
    }

    #[test]
    fn the_freeze_window_is_taken_off_as_far_as_a_message_waited_in_it() {
        let cases = [
            ("waited from before the freeze", 1001.0, 1022.0, (21.0, 6.0, 6.0)),
            ("due in the middle of it", 1010.0, 1023.0, (13.0, 0.0, 3.0)),
            ("answered in the middle of it", 1001.0, 1006.0, (5.0, 0.0, 4.0)),
        ];
        for (name, due, answered, expected) in cases {
            assert_eq!(stall_of(&[(due, Some(answered))]), Some(expected), "{name}");
        }
    }

    #[test]
    fn only_clients_with_a_message_in_the_freeze_window_count() {
        assert_eq!(stall_of(&[(900.0, Some(901.0)), (1021.0, Some(1025.0))]), None);
    }

    #[test]
    fn a_client_that_counts_counts_with_its_worst_message_around_the_migration() {
        let in_freeze = (1019.0, Some(1022.0));
        for (name, other, expected) in [
            ("before the hold", (950.0, Some(999.0)), (49.0, 34.0, 49.0)),
            ("a retransmission later", (1030.0, Some(1250.0)), (220.0, 205.0, 220.0)),
            ("answered too long before", (900.0, Some(940.0)), (3.0, 0.0, 2.0)),
            ("due too long after", (2100.0, Some(2900.0)), (3.0, 0.0, 2.0)),
        ] {
            assert_eq!(stall_of(&[in_freeze, other]), Some(expected), "{name}");
        }
    }

    #[test]
    fn a_lost_message_stalls_its_client_to_the_end_of_the_run() {
        assert_eq!(stall_of(&[(1010.0, None)]), Some((8990.0, 8975.0, 8980.0)));
    }

    #[test]
    fn without_a_freeze_the_hold_decides_and_nothing_is_taken_off() {
        let run = timeline(2, vec![message(0, 1, 1002.0, Some(1022.0)), message(1, 1, 1030.0, Some(1031.0))]);
        let found = stalls(&run, &Window { freeze: None, ..window() });
        assert_eq!(
            found,
            [ClientStall { client: 0, stall_ms: 20.0, added_ms: 20.0, beside_freeze_ms: 20.0 }]
        );
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let of = |values: &[f64]| {
            let found = Percentiles::of(values.to_vec());
            (found.p50, found.p99, found.max)
        };
        assert_eq!(of(&[]), (0.0, 0.0, 0.0));
        assert_eq!(of(&[7.0]), (7.0, 7.0, 7.0));
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0]), (2.0, 4.0, 4.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(of(&hundred), (50.0, 99.0, 100.0));
    }
}
