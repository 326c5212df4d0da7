//! Messages to a game server of the Quake 3 family, over its out-of-band protocol (UDP).
//!
//! Message n of a client is `getinfo` or `getstatus` with the challenge `<client>-<n>`, which the server
//! repeats in its reply.
//!
//! **Rate limits.** ioquake3 answers an address at most 10 times in a burst and once a second in the long
//! run, and all addresses together at most 10 times in a burst and ten times a second (`SVC_RateLimit` in
//! its sv_main.c). What exceeds that it ignores without a word, which looks like a lost message. So drills
//! stay below: see [`MAX_RATE_PER_S`] and [`MAX_CLIENT_RATE_PER_S`].

use super::{Decoder, Protocol, ReplyError, Transport};

/// Messages a second that one server answers in the long run, from all clients together.
pub const MAX_RATE_PER_S: f64 = 10.0;

/// Messages a second that one server answers one source address in the long run.
pub const MAX_CLIENT_RATE_PER_S: f64 = 1.0;

/// "Out of band": not part of a player's connection.
const OUT_OF_BAND: &[u8] = b"\xff\xff\xff\xff";

/// Which question is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// The server's name, map and player count: a short reply.
    Info,
    /// All public settings and the players: a reply of about a kilobyte.
    Status,
}

/// `getinfo` or `getstatus` per message.
#[derive(Clone, Copy, Debug)]
pub struct Quake3 {
    query: Query,
}

impl Quake3 {
    /// Asks this question with each message.
    pub fn new(query: Query) -> Self {
        Self { query }
    }
}

impl Protocol for Quake3 {
    fn transport(&self) -> Transport {
        Transport::Udp
    }

    fn encode(&self, client: u32, sequence: u64, out: &mut Vec<u8>) {
        let command = match self.query {
            Query::Info => "getinfo",
            Query::Status => "getstatus",
        };
        out.extend_from_slice(OUT_OF_BAND);
        out.extend_from_slice(format!("{command} {client}-{sequence}").as_bytes());
    }

    fn decoder(&self, client: u32) -> Box<dyn Decoder> {
        Box::new(Challenges { client, query: self.query })
    }
}

/// Decodes one reply per datagram.
#[derive(Debug)]
struct Challenges {
    client: u32,
    query: Query,
}

impl Decoder for Challenges {
    fn feed(&mut self, bytes: &[u8], replies: &mut Vec<u64>) -> Result<(), ReplyError> {
        let header: &[u8] = match self.query {
            Query::Info => b"infoResponse\n",
            Query::Status => b"statusResponse\n",
        };
        let settings = bytes
            .strip_prefix(OUT_OF_BAND)
            .and_then(|rest| rest.strip_prefix(header))
            .ok_or_else(|| ReplyError::malformed("an out-of-band response", bytes))?;
        let settings = String::from_utf8_lossy(settings);
        let challenge = challenge(&settings).ok_or_else(|| ReplyError::malformed("a challenge", bytes))?;
        let (client, sequence) = challenge
            .split_once('-')
            .and_then(|(client, sequence)| Some((client.parse::<u32>().ok()?, sequence.parse().ok()?)))
            .ok_or_else(|| {
                ReplyError::malformed("a challenge of the form <client>-<n>", challenge.as_bytes())
            })?;
        if client != self.client {
            return Err(ReplyError::Misdelivered { client: self.client, got: challenge.to_owned() });
        }
        replies.push(sequence);
        Ok(())
    }
}

/// The challenge in `\key\value\key\value`; the players follow on lines of their own.
fn challenge(settings: &str) -> Option<&str> {
    let first_line = settings.lines().next()?;
    let mut words = first_line.strip_prefix('\\')?.split('\\');
    while let (Some(key), Some(value)) = (words.next(), words.next()) {
        if key == "challenge" {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn feed(query: Query, client: u32, datagram: &[u8]) -> Result<Vec<u64>, ReplyError> {
        let mut replies = Vec::new();
        Quake3::new(query).decoder(client).feed(datagram, &mut replies)?;
        Ok(replies)
    }

    #[test]
    fn a_message_carries_its_number_as_the_challenge() {
        let mut out = Vec::new();
        Quake3::new(Query::Info).encode(4, 12, &mut out);
        assert_eq!(out, b"\xff\xff\xff\xffgetinfo 4-12");
        out.clear();
        Quake3::new(Query::Status).encode(0, 1, &mut out);
        assert_eq!(out, b"\xff\xff\xff\xffgetstatus 0-1");
    }

    #[test]
    fn replies_as_the_real_server_sends_them_are_read() {
        let info = b"\xff\xff\xff\xffinfoResponse\n\\voip\\opus\\g_needpass\\0\\mapname\\oa_dm1\\gamename\\Quake3Arena\\challenge\\4-12";
        assert_eq!(feed(Query::Info, 4, info).unwrap(), [12]);
        let status = b"\xff\xff\xff\xffstatusResponse\n\\challenge\\0-1\\version\\ioq3 1.36\\mapname\\oa_dm1\n0 50 \"a \\challenge\\9-9 player\"\n";
        assert_eq!(feed(Query::Status, 0, status).unwrap(), [1]);
    }

    #[test]
    fn what_is_not_a_reply_to_this_client_is_an_error() {
        for (datagram, misdelivered) in [
            (&b""[..], false),
            (b"infoResponse\n\\challenge\\4-12", false),
            (b"\xff\xff\xff\xffdisconnect", false),
            (b"\xff\xff\xff\xffstatusResponse\n\\challenge\\4-12", false),
            (b"\xff\xff\xff\xffinfoResponse\n\\mapname\\oa_dm1", false),
            (b"\xff\xff\xff\xffinfoResponse\n\\mapname\\challenge", false),
            (b"\xff\xff\xff\xffinfoResponse\n\\challenge\\4", false),
            (b"\xff\xff\xff\xffinfoResponse\n\\challenge\\4-x", false),
            (b"\xff\xff\xff\xffinfoResponse\n\\challenge\\5-12", true),
        ] {
            let error = feed(Query::Info, 4, datagram).unwrap_err();
            assert_eq!(matches!(error, ReplyError::Misdelivered { .. }), misdelivered, "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_datagram_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut datagram = b"\xff\xff\xff\xffinfoResponse\n".to_vec();
            datagram.extend_from_slice(&bytes);
            let _ = feed(Query::Info, 0, &datagram);
            let _ = feed(Query::Info, 0, &bytes);
        }
    }
}
