//! A request and its answer: 64 bytes each, eight words. The first word says what is asked, and is flipped in the answer;
//! the second is the request's number on its connection.

use crate::path::exchange::REQUEST_BYTES;

/// Bytes of a request, and of its answer.
pub const BYTES: usize = REQUEST_BYTES;

/// What a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// To count this request.
    Count,
    /// To begin to rewrite its pages, and to look for the longest time in which it did not run.
    Work,
    /// To stop that, and to say what came of it.
    Rest,
    /// To compare each of its pages with what it has written there.
    Check,
}

impl Ask {
    const ALL: [Ask; 4] = [Ask::Count, Ask::Work, Ask::Rest, Ask::Check];

    fn word(self) -> u64 {
        // Far from what zeroed or shifted bytes would be.
        0x6472_6f76_6572_0000 | self as u64
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub ask: Ask,
    /// Which one it is on its connection, from 1.
    pub number: u64,
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request.
    pub to: Request,
    /// Requests to count that this connection has brought so far, as the server's memory has it.
    pub counted: u64,
    /// The longest time in which the server did not run since it was told to work, in nanoseconds.
    pub longest_gap_ns: u64,
    /// Pages that it has rewritten since then.
    pub rewritten_pages: u64,
    /// Pages that hold something else than was written there.
    pub wrong_pages: u64,
}

impl Request {
    /// As it is sent.
    pub fn bytes(self) -> [u8; BYTES] {
        bytes([self.ask.word(), self.number, 0, 0, 0, 0, 0, 0])
    }

    /// Reads one; nothing where the bytes are none.
    pub fn read(from: &[u8; BYTES]) -> Option<Request> {
        let [word, number, rest @ ..] = words(from);
        request(word, number).filter(|_| rest == [0; 6])
    }
}

impl Answer {
    /// As it is sent.
    pub fn bytes(self) -> [u8; BYTES] {
        let Answer { to, counted, longest_gap_ns, rewritten_pages, wrong_pages } = self;
        bytes([!to.ask.word(), to.number, counted, longest_gap_ns, rewritten_pages, wrong_pages, 0, 0])
    }

    /// Reads one; nothing where the bytes are none.
    pub fn read(from: &[u8; BYTES]) -> Option<Answer> {
        let [word, number, counted, longest_gap_ns, rewritten_pages, wrong_pages, 0, 0] = words(from) else {
            return None;
        };
        let to = request(!word, number)?;
        Some(Answer { to, counted, longest_gap_ns, rewritten_pages, wrong_pages })
    }
}

fn request(word: u64, number: u64) -> Option<Request> {
    let ask = Ask::ALL.into_iter().find(|ask| ask.word() == word)?;
    Some(Request { ask, number })
}

fn bytes(words: [u64; BYTES / 8]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (place, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
        *place = word.to_be_bytes();
    }
    bytes
}

fn words(bytes: &[u8; BYTES]) -> [u64; BYTES / 8] {
    let mut words = [0; BYTES / 8];
    for (word, place) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_be_bytes(*place);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_are_read_as_they_were_written_and_not_as_each_other() {
        for ask in Ask::ALL {
            let to = Request { ask, number: 7 };
            let answer = Answer { to, counted: 1, longest_gap_ns: 2, rewritten_pages: 3, wrong_pages: 4 };
            assert_eq!(Request::read(&to.bytes()), Some(to));
            assert_eq!(Answer::read(&answer.bytes()), Some(answer));
            assert_eq!((Request::read(&answer.bytes()), Answer::read(&to.bytes())), (None, None));
        }
    }

    #[test]
    fn a_stream_that_lost_a_byte_holds_no_request() {
        let sent =
            [Request { ask: Ask::Count, number: 1 }.bytes(), Request { ask: Ask::Count, number: 2 }.bytes()];
        let mut shifted = [0; BYTES];
        shifted.copy_from_slice(&sent.concat()[1..=BYTES]);
        assert_eq!(Request::read(&shifted), None);
        assert_eq!(Request::read(&[0; BYTES]), None);
    }
}
