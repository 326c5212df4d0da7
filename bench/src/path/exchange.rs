//! A request and its answer. The server knows no messages: it flips every bit, so that an answer cannot be mistaken
//! for the request coming back, nor for the answer to another one.

/// Bytes of a request, and of its answer.
pub const REQUEST_BYTES: usize = 64;

/// The `number`th request on a connection.
pub fn request(connection: u32, number: u64) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0x5a; REQUEST_BYTES];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..12].copy_from_slice(&connection.to_be_bytes());
    bytes
}

/// Makes an answer, or a part of one, out of what was received.
pub fn answer(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
}

/// Whether these bytes answer that request.
pub fn is_answer(received: &[u8; REQUEST_BYTES], connection: u32, number: u64) -> bool {
    let mut expected = request(connection, number);
    answer(&mut expected);
    *received == expected
}

/// Puts an answer together from what a stream brings.
#[derive(Clone, Debug)]
pub struct Partial {
    bytes: [u8; REQUEST_BYTES],
    filled: usize,
}

impl Default for Partial {
    fn default() -> Self {
        Self { bytes: [0; REQUEST_BYTES], filled: 0 }
    }
}

impl Partial {
    /// Where the next bytes go.
    pub fn rest(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// Notes how many were put there; the whole answer, once it is there.
    pub fn received(&mut self, count: usize) -> Option<&[u8; REQUEST_BYTES]> {
        self.filled += count;
        if self.filled < REQUEST_BYTES {
            return None;
        }
        self.filled = 0;
        Some(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_recognized_and_nothing_else_is() {
        let mut bytes = request(7, 42);
        assert!(!is_answer(&bytes, 7, 42), "the request itself is no answer");
        answer(&mut bytes);
        assert!(is_answer(&bytes, 7, 42));
        assert!(!is_answer(&bytes, 7, 43));
        assert!(!is_answer(&bytes, 8, 42));
    }

    #[test]
    fn an_answer_may_come_in_pieces() {
        let mut whole = request(1, 2);
        answer(&mut whole);
        let mut partial = Partial::default();
        for _ in 0..2 {
            let (first, second) = whole.split_at(10);
            partial.rest()[..10].copy_from_slice(first);
            assert!(partial.received(10).is_none());
            assert_eq!(partial.rest().len(), REQUEST_BYTES - 10);
            partial.rest().copy_from_slice(second);
            assert_eq!(partial.received(REQUEST_BYTES - 10), Some(&whole));
        }
    }
}
