//! What became of each message: the bookkeeping of a run, without sockets and without a clock.
//!
//! Messages are due in turn, one client after the other, so the position of a message in the schedule
//! follows from its client and sequence number and nothing has to be searched.

use crate::timeline::Message;

/// What went wrong in a run, in messages unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Due, and never answered.
    pub lost: u64,
    /// Answered a second time, or answered before they were sent (the server counted another one twice).
    pub duplicated: u64,
    /// Answered after a later message of the same client had been.
    pub reordered: u64,
    /// Connections that the other end reset or closed, and ICMP errors.
    pub resets: u64,
    /// Replies that could not be read, or were meant for another client.
    pub unreadable: u64,
}

/// Counts a run while it happens.
#[derive(Debug)]
pub struct Tally {
    clients: Vec<Client>,
    messages: Vec<Message>,
    answered: u64,
    faults: Faults,
}

#[derive(Clone, Copy, Debug, Default)]
struct Client {
    /// The highest sequence number that was answered.
    highest: u64,
}

impl Tally {
    /// For a run with this many clients.
    pub fn new(clients: u32) -> Self {
        Self {
            clients: vec![Client::default(); clients as usize],
            messages: Vec::new(),
            answered: 0,
            faults: Faults::default(),
        }
    }

    /// The next message is due at `due_ns`; returns whose it is and its sequence number.
    pub fn due(&mut self, due_ns: u64) -> (u32, u64) {
        let position = self.messages.len();
        let client = (position % self.clients.len()) as u32;
        let sequence = (position / self.clients.len()) as u64 + 1;
        self.messages.push(Message { client, sequence, due_ns, sent_ns: None, answered_ns: None });
        (client, sequence)
    }

    /// The kernel took the last byte of a message.
    pub fn sent(&mut self, client: u32, sequence: u64, now_ns: u64) {
        if let Some(message) = self.message(client, sequence) {
            message.sent_ns = Some(now_ns);
        }
    }

    /// `client` received a reply to `sequence`.
    pub fn reply(&mut self, client: u32, sequence: u64, now_ns: u64) {
        let highest = self.clients[client as usize].highest;
        match self.message(client, sequence) {
            Some(message) if message.sent_ns.is_some() && message.answered_ns.is_none() => {
                message.answered_ns = Some(now_ns);
                self.answered += 1;
                if sequence < highest {
                    self.faults.reordered += 1;
                } else {
                    self.clients[client as usize].highest = sequence;
                }
            }
            _ => self.faults.duplicated += 1,
        }
    }

    /// The other end reset or closed a connection, or an ICMP error arrived.
    pub fn reset(&mut self) {
        self.faults.resets += 1;
    }

    /// A reply could not be read.
    pub fn unreadable(&mut self) {
        self.faults.unreadable += 1;
    }

    /// Messages that were due so far.
    pub fn due_count(&self) -> u64 {
        self.messages.len() as u64
    }

    /// Messages that were answered so far, each counted once.
    pub fn answered_count(&self) -> u64 {
        self.answered
    }

    /// Ends the run: what is unanswered now is lost.
    pub fn finish(mut self) -> (Vec<Message>, Faults) {
        self.faults.lost = self.messages.len() as u64 - self.answered;
        (self.messages, self.faults)
    }

    fn message(&mut self, client: u32, sequence: u64) -> Option<&mut Message> {
        let turn = usize::try_from(sequence.checked_sub(1)?).ok()?;
        let position = turn.checked_mul(self.clients.len())?.checked_add(client as usize)?;
        self.messages.get_mut(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two clients, three messages each, all sent.
    fn sent() -> Tally {
        let mut tally = Tally::new(2);
        for position in 0..6 {
            let (client, sequence) = tally.due(position * 10);
            tally.sent(client, sequence, position * 10 + 1);
        }
        tally
    }

    #[test]
    fn clients_take_turns() {
        let mut tally = Tally::new(3);
        let turns: Vec<_> = (0..5).map(|n| tally.due(n)).collect();
        assert_eq!(turns, [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]);
    }

    #[test]
    fn each_order_of_replies_has_its_faults() {
        type Replies = &'static [(u32, u64)];
        let cases: [(&str, Replies, Faults); 7] = [
            ("all in order", &[(0, 1), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)], Faults::default()),
            ("none", &[], Faults { lost: 6, ..Faults::default() }),
            (
                "one missing, later ones answered",
                &[(0, 1), (0, 3), (1, 1), (1, 2), (1, 3)],
                Faults { lost: 1, ..Faults::default() },
            ),
            (
                "one late",
                &[(0, 2), (0, 1), (0, 3), (1, 1), (1, 2), (1, 3)],
                Faults { reordered: 1, ..Faults::default() },
            ),
            (
                "one twice",
                &[(0, 1), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)],
                Faults { duplicated: 1, ..Faults::default() },
            ),
            (
                "numbers that nobody sent",
                &[(0, 0), (0, 4), (1, u64::MAX), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)],
                Faults { duplicated: 3, ..Faults::default() },
            ),
            (
                "a client's order is its own",
                &[(1, 1), (1, 2), (1, 3), (0, 1), (0, 2), (0, 3)],
                Faults::default(),
            ),
        ];
        for (name, replies, expected) in cases {
            let mut tally = sent();
            for &(client, sequence) in replies {
                tally.reply(client, sequence, 100);
            }
            assert_eq!(tally.finish().1, expected, "{name}");
        }
    }

    #[test]
    fn a_reply_before_the_message_was_sent_answers_nothing() {
        let mut tally = Tally::new(1);
        tally.due(0);
        tally.reply(0, 1, 5);
        tally.sent(0, 1, 10);
        tally.reply(0, 1, 15);
        let (messages, faults) = tally.finish();
        assert_eq!(faults, Faults { duplicated: 1, ..Faults::default() });
        assert_eq!(messages[0].answered_ns, Some(15));
    }

    #[test]
    fn resets_and_unreadable_replies_are_counted() {
        let mut tally = sent();
        tally.reset();
        tally.unreadable();
        tally.unreadable();
        let faults = tally.finish().1;
        assert_eq!((faults.resets, faults.unreadable, faults.lost), (1, 2, 6));
    }

    proptest! {
        #[test]
        fn due_is_answered_plus_lost_whatever_arrives(
            replies in proptest::collection::vec((0u32..2, 0u64..6), 0..40),
        ) {
            let mut tally = sent();
            for &(client, sequence) in &replies {
                tally.reply(client, sequence, 100);
            }
            let answered = tally.answered_count();
            let (messages, faults) = tally.finish();
            prop_assert_eq!(messages.len() as u64, answered + faults.lost);
            prop_assert_eq!(replies.len() as u64, answered + faults.duplicated);
        }
    }
}
