//! How a link behaves, and what it counts.

use std::num::NonZeroU64;
use std::time::Duration;

/// Which way a packet goes over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the first of the two namespaces ([`Site::A`](crate::Site::A)) to the second.
    AToB,
    /// From the second to the first.
    BToA,
}

impl Way {
    /// Both, in order.
    pub const ALL: [Way; 2] = [Way::AToB, Way::BToA];
}

/// How a link behaves: each way by itself. The default is a link that only carries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spec {
    /// From the first namespace to the second.
    pub a_to_b: WaySpec,
    /// From the second to the first.
    pub b_to_a: WaySpec,
}

impl Spec {
    /// The same both ways, but for the loss, which is drawn independently.
    pub fn symmetric(way: WaySpec) -> Spec {
        Spec { a_to_b: way, b_to_a: WaySpec { seed: !way.seed, ..way } }
    }

    /// The settings of one way.
    pub fn way(&self, way: Way) -> &WaySpec {
        match way {
            Way::AToB => &self.a_to_b,
            Way::BToA => &self.b_to_a,
        }
    }
}

/// How one way of a link behaves: a queue, a transmitter behind it, and a line behind that.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WaySpec {
    /// The line's length: how long after its last bit was sent a frame arrives, at least.
    pub delay: Duration,
    /// Added to the delay, drawn evenly between zero and this for each frame. Order is kept: a frame that would overtake
    /// another arrives with it.
    pub jitter: Duration,
    /// The transmitter's speed in bits per second, counted over Ethernet frames (14 bytes of header each, without
    /// preamble and checksum, as `tc` counts); without limit where it is `None`.
    pub rate_bits_per_s: Option<NonZeroU64>,
    /// What may wait for the transmitter; the rest is dropped at the tail.
    pub queue: QueueLimit,
    /// Share of the frames that are lost on the line, 0 to 1. They have used the transmitter.
    pub loss: f64,
    /// Begins the sequence that losses and jitter are drawn from: the same frames give the same losses.
    pub seed: u64,
}

/// A transmitter's queue. The frame that is being sent is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueLimit {
    /// In bytes, of Ethernet frames.
    Bytes(u64),
    /// In frames.
    Packets(u64),
}

impl Default for QueueLimit {
    /// 256 KiB, as in a small router: 21 ms at 100 Mb/s.
    fn default() -> QueueLimit {
        QueueLimit::Bytes(256 * 1024)
    }
}

/// What happened to frames that went one way, since the link was made. A segment too large for one frame counts as the
/// frames it would be cut into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Arrived.
    pub forwarded: u64,
    /// Bytes of the frames that arrived, with their Ethernet headers.
    pub forwarded_bytes: u64,
    /// Dropped because the queue was full.
    pub dropped_by_queue: u64,
    /// Lost on the line.
    pub dropped_by_loss: u64,
    /// Sent into the cut link, or under way when it was cut.
    pub dropped_by_cut: u64,
    /// Refused by the device at the other end: it is down, or memory is short.
    pub refused: u64,
    /// The longest that a frame left after it was due, because the link's thread did not get a processor in time: how far
    /// what was measured over the link can be trusted.
    pub latest: Duration,
}
