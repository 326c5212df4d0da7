//! Messages to a redis server, over RESP (the redis serialization protocol).
//!
//! Message n of a client is `INCR` of a key of its own, so the reply to it must be n: the server itself
//! notices a message that is lost, or executed twice. The counts stay at the server and can be read and
//! compared at the end of a run.

use super::{Decoder, Protocol, ReplyError, Transport};

/// A reply that we expect is an integer of at most 20 digits; an error text is one line. More without a line
/// end is not RESP.
const MAX_LINE_BYTES: usize = 1024;

/// `INCR` per message.
#[derive(Clone, Debug)]
pub struct Redis {
    prefix: String,
}

impl Redis {
    /// Keys are `<prefix>:<client>`. They must not exist before, so a run needs a prefix of its own.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    fn key(&self, client: u32) -> String {
        format!("{}:{client}", self.prefix)
    }

    /// Appends the question how many messages of `client` were counted; the reply is that number.
    /// `INCRBY 0` rather than `GET`, so that the reply is an integer even where there is no key.
    pub fn encode_count(&self, client: u32, out: &mut Vec<u8>) {
        encode_command(&["INCRBY", &self.key(client), "0"], out);
    }
}

impl Protocol for Redis {
    fn transport(&self) -> Transport {
        Transport::Tcp
    }

    fn encode(&self, client: u32, _sequence: u64, out: &mut Vec<u8>) {
        encode_command(&["INCR", &self.key(client)], out);
    }

    fn decoder(&self, _client: u32) -> Box<dyn Decoder> {
        Box::new(Integers::default())
    }
}

fn encode_command(words: &[&str], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
}

/// Decodes a stream of RESP integers.
#[derive(Debug, Default)]
pub struct Integers {
    /// The beginning of a line whose end has not arrived.
    partial: Vec<u8>,
}

impl Decoder for Integers {
    fn feed(&mut self, bytes: &[u8], replies: &mut Vec<u64>) -> Result<(), ReplyError> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let (line, after) = rest.split_at(end + 1);
            rest = after;
            if self.partial.is_empty() {
                replies.push(integer(line)?);
            } else {
                self.partial.extend_from_slice(line);
                replies.push(integer(&self.partial)?);
                self.partial.clear();
            }
        }
        self.partial.extend_from_slice(rest);
        if self.partial.len() > MAX_LINE_BYTES {
            return Err(ReplyError::malformed("a line", &self.partial));
        }
        Ok(())
    }
}

fn integer(line: &[u8]) -> Result<u64, ReplyError> {
    let malformed = || ReplyError::malformed("`:<integer>` and CRLF", line);
    let body = line.strip_suffix(b"\r\n").ok_or_else(malformed)?;
    match body.split_first() {
        Some((b':', digits)) => {
            std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).ok_or_else(malformed)
        }
        Some((b'-', text)) => Err(ReplyError::Refused(String::from_utf8_lossy(text).into_owned())),
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_an_incr_of_the_clients_own_key() {
        let mut out = Vec::new();
        Redis::new("drill").encode(17, 3, &mut out);
        assert_eq!(out, b"*2\r\n$4\r\nINCR\r\n$8\r\ndrill:17\r\n");
    }

    #[test]
    fn the_count_is_asked_for_without_changing_it() {
        let mut out = Vec::new();
        Redis::new("d").encode_count(2, &mut out);
        assert_eq!(out, b"*3\r\n$6\r\nINCRBY\r\n$3\r\nd:2\r\n$1\r\n0\r\n");
    }

    #[test]
    fn what_is_not_an_integer_line_is_an_error() {
        for (bytes, refused) in [
            (&b"-ERR unknown command\r\n"[..], true),
            (b":\r\n", false),
            (b":-1\r\n", false),
            (b":1\n", false),
            (b":12x\r\n", false),
            (b":99999999999999999999999\r\n", false),
            (b"+OK\r\n", false),
            (b"\r\n", false),
            (&[b':'; MAX_LINE_BYTES + 1], false),
        ] {
            let error = Integers::default().feed(bytes, &mut Vec::new()).unwrap_err();
            assert_eq!(matches!(error, ReplyError::Refused(_)), refused, "{bytes:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_replies(
            numbers in proptest::collection::vec(any::<u64>(), 0..20),
            cuts in proptest::collection::vec(1usize..12, 1..200),
        ) {
            let stream: Vec<u8> = numbers.iter().flat_map(|n| format!(":{n}\r\n").into_bytes()).collect();
            let mut decoder = Integers::default();
            let mut replies = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.feed(now, &mut replies).unwrap();
                rest = later;
            }
            prop_assert_eq!(replies, numbers);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Integers::default().feed(&bytes, &mut Vec::new());
        }
    }
}
