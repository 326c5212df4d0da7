//! How far two sites' clocks are apart: a server that moves between them sees the wall clock jump by so much.

use crate::protocol::manifest::Welcome;

/// More than this is said as a warning. NTP keeps hosts within a few milliseconds.
pub const BOUND_US: i64 = 100_000;

/// How far the other clock is ahead, and how much that may be wrong, both in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// The other clock minus ours.
    pub ahead_us: i64,
    /// Half of the time on the way.
    pub error_us: i64,
}

impl Offset {
    /// By RFC 5905, section 8: four time stamps, of which ours are when the question was sent and the answer came.
    pub fn of(sent_unix_us: i64, welcome: Welcome, arrived_unix_us: i64) -> Self {
        let (received, answered) = (welcome.received_unix_us, welcome.answered_unix_us);
        let on_the_way = (arrived_unix_us - sent_unix_us) - (answered - received);
        Self {
            ahead_us: ((received - sent_unix_us) + (answered - arrived_unix_us)) / 2,
            error_us: on_the_way.max(0) / 2,
        }
    }

    /// Whether the clocks are certainly further apart than [`BOUND_US`].
    pub fn is_large(self) -> bool {
        self.ahead_us.abs() - self.error_us > BOUND_US
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn welcome(received_unix_us: i64, answered_unix_us: i64) -> Welcome {
        Welcome { later: false, received_unix_us, answered_unix_us }
    }

    #[test]
    fn the_time_of_the_checks_does_not_count() {
        // 1 ms each way, 80 ms of checks, and the other clock is 5 s ahead.
        let welcome = welcome(5_001_000, 5_081_000);
        let offset = Offset::of(0, welcome, 82_000);
        assert_eq!(offset, Offset { ahead_us: 5_000_000, error_us: 1000 });
        assert!(offset.is_large());
        let behind = Offset::of(5_000_000, self::welcome(1000, 1000), 5_002_000);
        assert!(behind.is_large() && behind.ahead_us == -5_000_000);
    }

    #[test]
    fn a_slow_answer_is_no_large_offset() {
        let offset = Offset::of(0, welcome(290_000, 290_000), 300_000);
        assert_eq!(offset, Offset { ahead_us: 140_000, error_us: 150_000 });
        assert!(!offset.is_large());
    }
}
