//! One way of a link without its packets' bytes and without a clock: when does what arrive?
//!
//! ```text
//!   offer -> waiting (bounded, tail drop) -> transmitter (rate) -> line (delay, jitter, loss) -> take
//! ```
//!
//! Time is an argument, counted from any beginning, and must not go back. All is computed from the times at which frames
//! were offered, not from those at which somebody looked: who looks late gets frames late, but the transmitter has not
//! stood still.

use std::collections::VecDeque;
use std::time::Duration;

use super::spec::{Counters, QueueLimit, WaySpec};

/// Bytes that a line without a rate carries at once; more is dropped as by a full queue. It bounds the emulator's memory.
const LINE_BYTES: u64 = 256 << 20;

/// What a packet is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Ethernet frames that it is cut into.
    pub(crate) frames: u64,
    /// Bytes of these, with all their headers.
    pub(crate) bytes: u64,
}

/// What became of an offered packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It comes out of [`Queue::take`] when it is due, unless it is lost.
    Taken,
    /// It is due now and nothing is before it: the caller passes it on, and nothing was kept.
    Passes,
    /// It was dropped and counted.
    Dropped,
}

/// One way of a link: packets of type `T` on their way.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    spec: WaySpec,
    random: Random,
    is_cut: bool,
    waiting: VecDeque<Waiting<T>>,
    waiting_size: Size,
    /// When the transmitter is done with what it has begun.
    free_at: Duration,
    line: VecDeque<OnLine<T>>,
    line_bytes: u64,
    /// When the last packet on the line is due.
    last_due: Duration,
    counters: Counters,
}

#[derive(Debug)]
struct Waiting<T> {
    offered: Duration,
    size: Size,
    packet: T,
}

#[derive(Debug)]
struct OnLine<T> {
    due: Duration,
    size: Size,
    /// `None`: it is lost, and takes its time all the same.
    packet: Option<T>,
}

impl<T> Queue<T> {
    /// Empty and healed.
    pub(crate) fn new(spec: WaySpec) -> Queue<T> {
        Queue {
            spec,
            random: Random(spec.seed),
            is_cut: false,
            waiting: VecDeque::new(),
            waiting_size: Size { frames: 0, bytes: 0 },
            free_at: Duration::ZERO,
            line: VecDeque::new(),
            line_bytes: 0,
            last_due: Duration::ZERO,
            counters: Counters::default(),
        }
    }

    /// Changes the settings. What is on the line arrives as it would have; what waits is sent at the new rate, and what
    /// no longer fits the queue stays. The random sequence begins anew.
    pub(crate) fn set(&mut self, now: Duration, spec: WaySpec) {
        self.transmit(now);
        self.spec = spec;
        self.random = Random(spec.seed);
    }

    /// From now on nothing passes; what is under way is lost too.
    pub(crate) fn cut(&mut self) {
        self.is_cut = true;
        let lost = self.line.drain(..).filter(|on_line| on_line.packet.is_some()).map(|on_line| on_line.size);
        self.counters.dropped_by_cut += lost.map(|size| size.frames).sum::<u64>() + self.waiting_size.frames;
        self.waiting.clear();
        self.waiting_size = Size { frames: 0, bytes: 0 };
        self.line_bytes = 0;
        self.free_at = Duration::ZERO;
        self.last_due = Duration::ZERO;
    }

    /// Ends a cut.
    pub(crate) fn heal(&mut self) {
        self.is_cut = false;
    }

    /// What happened so far.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Counts a packet, handed out before, that the other end did not take.
    pub(crate) fn refused(&mut self, size: Size) {
        self.counters.forwarded -= size.frames;
        self.counters.forwarded_bytes -= size.bytes;
        self.counters.refused += size.frames;
    }

    /// A packet comes in; `packet` is called only if it is kept.
    pub(crate) fn offer(&mut self, now: Duration, size: Size, packet: impl FnOnce() -> T) -> Offer {
        if self.is_cut {
            self.counters.dropped_by_cut += size.frames;
            return Offer::Dropped;
        }
        self.transmit(now);
        let is_busy = !self.waiting.is_empty() || self.free_at > now;
        if is_busy && !self.has_room(size) || self.line_bytes + size.bytes > LINE_BYTES {
            self.counters.dropped_by_queue += size.frames;
            return Offer::Dropped;
        }
        if !is_busy && self.line.is_empty() && self.only_carries() {
            self.count_forwarded(size);
            return Offer::Passes;
        }
        self.waiting_size.frames += size.frames;
        self.waiting_size.bytes += size.bytes;
        self.waiting.push_back(Waiting { offered: now, size, packet: packet() });
        self.transmit(now);
        Offer::Taken
    }

    /// The next packet that is due, with its size.
    pub(crate) fn take(&mut self, now: Duration) -> Option<(T, Size)> {
        loop {
            self.transmit(now);
            let on_line = self.line.pop_front_if(|first| first.due <= now)?;
            self.line_bytes -= on_line.size.bytes;
            self.counters.latest = self.counters.latest.max(now.saturating_sub(on_line.due));
            if let Some(packet) = on_line.packet {
                self.count_forwarded(on_line.size);
                return Some((packet, on_line.size));
            }
        }
    }

    /// When to come back; `None`: when something is offered.
    pub(crate) fn next(&self) -> Option<Duration> {
        let line = self.line.front().map(|first| first.due);
        // Whatever waits arrives after the last on the line; an empty line only follows a transmitter that is free soon.
        line.or_else(|| self.waiting.front().map(|first| first.offered.max(self.free_at)))
    }

    /// Puts on the line what the transmitter has begun by `now`.
    fn transmit(&mut self, now: Duration) {
        while let Some(first) = self.waiting.pop_front_if(|first| first.offered.max(self.free_at) <= now) {
            self.waiting_size.frames -= first.size.frames;
            self.waiting_size.bytes -= first.size.bytes;
            self.free_at = first.offered.max(self.free_at).saturating_add(self.sending_time(first.size));
            let on_line = self.spec.delay.saturating_add(self.spec.jitter.mul_f64(self.random.share()));
            self.last_due = self.free_at.saturating_add(on_line).max(self.last_due);
            let is_lost = self.spec.loss > 0.0 && self.random.share() < self.spec.loss;
            if is_lost {
                self.counters.dropped_by_loss += first.size.frames;
            }
            self.line_bytes += first.size.bytes;
            let packet = (!is_lost).then_some(first.packet);
            self.line.push_back(OnLine { due: self.last_due, size: first.size, packet });
        }
    }

    fn sending_time(&self, size: Size) -> Duration {
        const NS_PER_BYTE_AT_1_BIT_PER_S: u128 = 8_000_000_000;
        self.spec.rate_bits_per_s.map_or(Duration::ZERO, |rate| {
            let ns = (u128::from(size.bytes) * NS_PER_BYTE_AT_1_BIT_PER_S).div_ceil(rate.get().into());
            Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
        })
    }

    fn has_room(&self, size: Size) -> bool {
        match self.spec.queue {
            QueueLimit::Bytes(limit) => self.waiting_size.bytes + size.bytes <= limit,
            QueueLimit::Packets(limit) => self.waiting_size.frames + size.frames <= limit,
        }
    }

    fn only_carries(&self) -> bool {
        let WaySpec { delay, jitter, rate_bits_per_s, queue: _, loss, seed: _ } = self.spec;
        delay.is_zero() && jitter.is_zero() && rate_bits_per_s.is_none() && loss <= 0.0
    }

    fn count_forwarded(&mut self, size: Size) {
        self.counters.forwarded += size.frames;
        self.counters.forwarded_bytes += size.bytes;
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same numbers on every machine.
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// Even in [0, 1).
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        // The upper 53 bits are what a double holds exactly.
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
