//! How numbered messages look on the wire.
//!
//! Codecs only: bytes in, replies out. Sockets and clocks are the driver's.

pub mod quake3;
pub mod redis;

/// What carries a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A byte stream: replies may arrive split or several at once.
    Tcp,
    /// Datagrams: each is one reply, or none.
    Udp,
}

/// A protocol whose messages carry a client's number and a sequence number, and whose replies say which
/// message they answer.
pub trait Protocol: Send + Sync {
    /// What carries it.
    fn transport(&self) -> Transport;

    /// Appends message `sequence` (1, 2, 3, ...) of `client` to `out`.
    fn encode(&self, client: u32, sequence: u64, out: &mut Vec<u8>);

    /// A decoder for the replies to one client, at the beginning of its connection.
    fn decoder(&self, client: u32) -> Box<dyn Decoder>;
}

/// Turns the bytes that one client receives into replies.
pub trait Decoder: Send {
    /// Takes the next bytes (TCP: any split; UDP: one whole datagram) and appends the sequence numbers that
    /// are answered by now to `replies`.
    ///
    /// After an error a stream cannot be read on: the decoder no longer knows where a reply begins.
    fn feed(&mut self, bytes: &[u8], replies: &mut Vec<u64>) -> Result<(), ReplyError>;
}

/// A reply that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The server understood the message and refused it.
    #[error("the server refused a message: {0}")]
    Refused(String),
    /// These bytes are not what the protocol prescribes: damaged, or not from this kind of server.
    #[error("unreadable reply: expected {expected}, got {got:?}")]
    Malformed {
        /// What should have been there.
        expected: &'static str,
        /// The beginning of what was there.
        got: String,
    },
    /// A reply to another client's message arrived here.
    #[error("client {client} received the reply {got:?} of another client")]
    Misdelivered {
        /// The client that received it.
        client: u32,
        /// The challenge of the reply.
        got: String,
    },
}

impl ReplyError {
    /// `Malformed` with as much of the bytes as an operator wants to see.
    fn malformed(expected: &'static str, bytes: &[u8]) -> Self {
        const SHOWN_BYTES: usize = 64;
        let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
        Self::Malformed { expected, got: String::from_utf8_lossy(shown).into_owned() }
    }
}
