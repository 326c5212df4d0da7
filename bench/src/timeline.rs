//! A finished run: every message with its times.

use crate::tally::Faults;

/// One message of one client. Times are nanoseconds since the run's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whose, from 0.
    pub client: u32,
    /// Its number at that client, from 1.
    pub sequence: u64,
    /// When it should have been sent: what latency is measured from.
    pub due_ns: u64,
    /// When the kernel took its last byte.
    pub sent_ns: Option<u64>,
    /// When its reply could be read.
    pub answered_ns: Option<u64>,
}

impl Message {
    /// From when it should have been sent to its reply.
    pub fn latency_ns(&self) -> Option<u64> {
        Some(self.answered_ns?.saturating_sub(self.due_ns))
    }
}

/// Everything that clients saw in a run.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// How many clients there were.
    pub clients: u32,
    /// The run's start on the wall clock, nanoseconds since the Unix epoch.
    pub start_unix_ns: i64,
    /// When the run was over, after the last wait for replies.
    pub end_ns: u64,
    /// All messages, in the order in which they were due.
    pub messages: Vec<Message>,
    /// What went wrong.
    pub faults: Faults,
    /// The first few errors in words, for an operator.
    pub errors: Vec<String>,
}

impl Timeline {
    /// A wall-clock time in this run's nanoseconds; negative before its start.
    pub fn from_unix_ns(&self, unix_ns: i64) -> i64 {
        unix_ns - self.start_unix_ns
    }

    /// Messages answered, each counted once.
    pub fn answered(&self) -> u64 {
        self.messages.len() as u64 - self.faults.lost
    }

    /// Messages whose time from due to answered (without an answer: to the run's end) touches the interval,
    /// in the run's nanoseconds.
    pub fn touching(&self, from_ns: i64, to_ns: i64) -> impl Iterator<Item = &Message> {
        // Sorted by `due_ns`, so that what is due after the interval need not be looked at.
        let end = self.messages.partition_point(|message| message.due_ns as i64 <= to_ns);
        self.messages[..end].iter().filter(move |message| self.end_of(message) as i64 >= from_ns)
    }

    /// When a message was answered, or, never answered, the run's end.
    pub fn end_of(&self, message: &Message) -> u64 {
        message.answered_ns.unwrap_or(self.end_ns).max(message.due_ns)
    }

    /// All latencies in milliseconds, unsorted; lost messages have none.
    pub fn latencies_ms(&self) -> Vec<f64> {
        self.messages.iter().filter_map(|message| Some(message.latency_ns()? as f64 / 1e6)).collect()
    }
}

#[cfg(test)]
pub(crate) mod constructed {
    //! Timelines made by hand for tests.

    use super::*;

    /// One message of `client`, due and answered at these milliseconds.
    pub(crate) fn message(client: u32, sequence: u64, due_ms: f64, answered_ms: Option<f64>) -> Message {
        Message {
            client,
            sequence,
            due_ns: (due_ms * 1e6) as u64,
            sent_ns: Some((due_ms * 1e6) as u64),
            answered_ns: answered_ms.map(|ms| (ms * 1e6) as u64),
        }
    }

    /// A run of 10 s that started at the Unix epoch.
    pub(crate) fn timeline(clients: u32, mut messages: Vec<Message>) -> Timeline {
        messages.sort_by_key(|message| message.due_ns);
        let lost = messages.iter().filter(|message| message.answered_ns.is_none()).count() as u64;
        Timeline {
            clients,
            start_unix_ns: 0,
            end_ns: 10_000_000_000,
            messages,
            faults: Faults { lost, ..Faults::default() },
            errors: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::constructed::{message, timeline};

    #[test]
    fn touching_finds_what_overlaps_and_nothing_else() {
        let run = timeline(
            1,
            vec![
                message(0, 1, 10.0, Some(11.0)),
                message(0, 2, 20.0, Some(60.0)),
                message(0, 3, 50.0, None),
                message(0, 4, 100.0, Some(101.0)),
            ],
        );
        let found = |from: i64, to: i64| -> Vec<u64> {
            run.touching(from * 1_000_000, to * 1_000_000).map(|message| message.sequence).collect()
        };
        assert_eq!(found(0, 5), [0u64; 0]);
        assert_eq!(found(0, 10), [1]);
        assert_eq!(found(12, 19), [0u64; 0]);
        assert_eq!(found(30, 40), [2]);
        assert_eq!(found(61, 99), [3]);
        assert_eq!(found(-5, 1000), [1, 2, 3, 4]);
    }

    #[test]
    fn latency_counts_from_when_a_message_was_due() {
        let mut late = message(0, 1, 10.0, Some(15.0));
        late.sent_ns = Some(14_000_000);
        assert_eq!(late.latency_ns(), Some(5_000_000));
        assert_eq!(message(0, 1, 10.0, None).latency_ns(), None);
    }
}
