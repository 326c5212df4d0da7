//! A backend's hold queue: frames in the order of their capture, bounded in bytes and age. Pure.
//!
//! Of what TCP clients send while they are held, half says nothing new: unanswered segments are sent again, and the
//! last answers are acknowledged twice, alone and with the next request. A retransmission of what waits already is
//! absorbed, and an acknowledgement gives its place to the next frame of its flow: each would take room, time at
//! the replay, and the server's time after it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::ops::Add;
use std::time::Instant;

use lb_core::Mode;

use super::held::HeldFrame;
use super::segment::{Content, Flow, Segment, read};
use super::{HoldLimits, Overflow};

/// First in, first out; so each flow's packets keep their order whatever flows they are mixed with.
#[derive(Debug)]
pub struct HoldQueue {
    limits: HoldLimits,
    frames: VecDeque<HeldFrame>,
    bytes: usize,
    counts: QueueCounts,
    /// Frames that have left the queue since it was made: the number of its first one.
    gone: u64,
    flows: HashMap<Flow, Waiting>,
}

/// What a queue has taken and given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Frames put in.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Frames dropped for want of room.
    pub overflow: u64,
    /// Frames dropped for their age.
    pub aged: u64,
    /// Frames that said nothing beyond what was waiting already, or what came after them.
    pub absorbed: u64,
}

impl Add for QueueCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            held_packets: self.held_packets + other.held_packets,
            held_bytes: self.held_bytes + other.held_bytes,
            overflow: self.overflow + other.overflow,
            aged: self.aged + other.aged,
            absorbed: self.absorbed + other.absorbed,
        }
    }
}

/// What waits of a TCP flow.
#[derive(Debug, Default)]
struct Waiting {
    frames: usize,
    covered: Covered,
    /// Number of its last frame, if that is an acknowledgement and nothing else.
    last_acknowledgement: Option<u64>,
}

/// What of a flow's sequence space waits for certain.
#[derive(Debug, Default)]
enum Covered {
    #[default]
    Nothing,
    From(Segment),
    /// Something of the flow has left the queue; a retransmission may be needed.
    Unknown,
}

impl Covered {
    fn has(&self, segment: Segment) -> bool {
        matches!(self, Self::From(covered) if covered.covers(segment))
    }

    fn add(&mut self, segment: Segment) {
        match self {
            Self::Nothing => *self = Self::From(segment),
            Self::From(covered) => covered.extend(segment),
            Self::Unknown => {}
        }
    }
}

impl HoldQueue {
    /// An empty queue.
    pub fn new(limits: HoldLimits) -> Self {
        Self {
            limits,
            frames: VecDeque::new(),
            bytes: 0,
            counts: QueueCounts::default(),
            gone: 0,
            flows: HashMap::new(),
        }
    }

    /// Bytes waiting.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets another bound; what waits already stays.
    pub fn set_max_bytes(&mut self, max_bytes: usize) {
        self.limits.max_bytes = max_bytes;
    }

    /// Puts a frame of a service of this mode in, or drops it or older ones as the limits say.
    pub fn push(&mut self, now: Instant, frame: &[u8], mode: Mode) {
        let most = self.limits.max_bytes;
        if frame.len() > most
            || self.bytes + frame.len() > most && self.limits.overflow == Overflow::DropNewest
        {
            self.counts.overflow += 1;
            return;
        }
        let tcp = read(frame);
        if tcp.as_ref().is_some_and(|(flow, content)| self.absorb(now, frame, mode, flow, *content)) {
            self.counts.absorbed += 1;
            return;
        }
        while self.bytes + frame.len() > most {
            self.remove_first();
            self.counts.overflow += 1;
        }
        if let Some((flow, content)) = tcp {
            self.note(flow, content);
        }
        self.bytes += frame.len();
        self.counts.held_packets += 1;
        self.counts.held_bytes += frame.len() as u64;
        self.frames.push_back(HeldFrame::new(now, frame, mode));
    }

    /// Whether a frame need not wait itself: all of it waits already, or it took the place of an acknowledgement.
    fn absorb(&mut self, now: Instant, frame: &[u8], mode: Mode, flow: &Flow, content: Content) -> bool {
        let Some(waiting) = self.flows.get_mut(flow) else { return false };
        let segment = if let Content::Segment(segment) = content { Some(segment) } else { None };
        if segment.is_some_and(|segment| waiting.covered.has(segment)) {
            return true;
        }
        let Some(number) = waiting.last_acknowledgement else { return false };
        let Some(held) = number.checked_sub(self.gone).and_then(|place| self.frames.get_mut(place as usize))
        else {
            return false;
        };
        let bytes = self.bytes - held.frame().len() + frame.len();
        if content == Content::Other || bytes > self.limits.max_bytes {
            return false;
        }
        *held = HeldFrame::new(now, frame, mode);
        self.bytes = bytes;
        if let Some(segment) = segment {
            waiting.last_acknowledgement = None;
            waiting.covered.add(segment);
        }
        true
    }

    /// Remembers what a frame adds to its flow, before it is put at the end.
    fn note(&mut self, flow: Flow, content: Content) {
        let number = self.gone + self.frames.len() as u64;
        let waiting = self.flows.entry(flow).or_default();
        waiting.frames += 1;
        waiting.last_acknowledgement = (content == Content::Acknowledgement).then_some(number);
        if let Content::Segment(segment) = content {
            waiting.covered.add(segment);
        }
    }

    /// Drops what is older than the limit.
    pub fn expire(&mut self, now: Instant) {
        while self.frames.front().is_some_and(|held| now.duration_since(held.at) > self.limits.max_age) {
            self.remove_first();
            self.counts.aged += 1;
        }
    }

    /// The first `most` frames, to be sent.
    pub fn first(&mut self, most: usize) -> impl Iterator<Item = &mut HeldFrame> {
        self.frames.iter_mut().take(most)
    }

    /// Forgets the first `sent` frames.
    pub fn sent(&mut self, sent: usize) {
        for _ in 0..sent {
            self.remove_first();
        }
    }

    fn remove_first(&mut self) {
        if let Some(held) = self.frames.pop_front() {
            self.bytes -= held.frame().len();
            self.gone += 1;
            if let Some((flow, _)) = read(held.frame())
                && let Entry::Occupied(mut waiting) = self.flows.entry(flow)
            {
                waiting.get_mut().frames -= 1;
                waiting.get_mut().covered = Covered::Unknown;
                if waiting.get().frames == 0 {
                    waiting.remove();
                }
            }
        }
    }

    /// Frames waiting.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// What it has taken and given up so far.
    pub fn counts(&self) -> QueueCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_core::host::FrameBuilder;
    use proptest::prelude::*;
    use std::time::Duration;

    fn limits(max_bytes: usize, overflow: Overflow) -> HoldLimits {
        HoldLimits { max_bytes, max_age: Duration::from_millis(100), overflow }
    }

    fn contents(queue: &mut HoldQueue) -> Vec<Vec<u8>> {
        queue.first(usize::MAX).map(|held| held.frame().to_vec()).collect()
    }

    #[test]
    fn a_full_queue_keeps_its_oldest_or_its_newest() {
        let now = Instant::now();
        for (overflow, kept) in [(Overflow::DropNewest, [1, 2]), (Overflow::DropOldest, [2, 3])] {
            let mut queue = HoldQueue::new(limits(20, overflow));
            for n in 1..=3 {
                queue.push(now, &[n; 10], Mode::Nat);
            }
            assert_eq!(contents(&mut queue), kept.map(|n| vec![n; 10]), "{overflow:?}");
            assert_eq!(queue.counts().overflow, 1);
        }
    }

    #[test]
    fn a_frame_larger_than_the_queue_displaces_nothing() {
        let mut queue = HoldQueue::new(limits(20, Overflow::DropOldest));
        queue.push(Instant::now(), &[1; 20], Mode::Nat);
        queue.push(Instant::now(), &[2; 21], Mode::Nat);
        assert_eq!(contents(&mut queue), [vec![1; 20]]);
    }

    #[test]
    fn old_frames_expire_and_young_ones_stay() {
        let start = Instant::now();
        let mut queue = HoldQueue::new(limits(100, Overflow::DropNewest));
        queue.push(start, &[1], Mode::Nat);
        queue.push(start + Duration::from_millis(80), &[2], Mode::Nat);
        queue.expire(start + Duration::from_millis(101));
        assert_eq!(contents(&mut queue), [vec![2]]);
        assert_eq!(queue.counts().aged, 1);
    }

    #[test]
    fn a_retransmission_of_what_waits_is_absorbed_and_one_of_what_left_is_not() {
        let now = Instant::now();
        let mut queue = HoldQueue::new(limits(10_000, Overflow::DropNewest));
        let segments = [(100, 20), (120, 10), (100, 30), (110, 10), (125, 10), (300, 5), (300, 5)];
        for (sequence, length) in segments {
            queue.push(now, &tcp(4000, sequence, length), Mode::Nat);
        }
        // Kept: the first two, the one that goes on beyond them, and those behind a gap.
        assert_eq!((queue.len(), queue.counts().absorbed), (5, 2));
        queue.sent(1);
        queue.push(now, &tcp(4000, 100, 20), Mode::Nat);
        assert_eq!((queue.len(), queue.counts().absorbed), (5, 2));
    }

    #[test]
    fn an_acknowledgement_gives_its_place_to_the_next_frame_of_its_flow() {
        let now = Instant::now();
        let mut queue = HoldQueue::new(limits(10_000, Overflow::DropNewest));
        let sent =
            [(4000, 100, 0), (4001, 7, 3), (4000, 100, 0), (4000, 100, 20), (4000, 120, 0), (4000, 120, 9)];
        for (port, sequence, length) in sent {
            queue.push(now, &tcp(port, sequence, length), Mode::Nat);
        }
        assert_eq!(contents(&mut queue), [tcp(4000, 100, 20), tcp(4001, 7, 3), tcp(4000, 120, 9)]);
        assert_eq!(
            queue.counts(),
            QueueCounts { held_packets: 3, held_bytes: 3 * 54 + 3, absorbed: 3, ..QueueCounts::default() }
        );
        // What took its place is covered as if it had come by itself.
        queue.push(now, &tcp(4000, 100, 29), Mode::Nat);
        assert_eq!(queue.len(), 3);
        // One that has been sent has no place to give.
        queue.push(now, &tcp(4002, 1, 0), Mode::Nat);
        queue.sent(4);
        queue.push(now, &tcp(4002, 1, 5), Mode::Nat);
        assert_eq!(contents(&mut queue), [tcp(4002, 1, 5)]);
    }

    fn tcp(port: u16, sequence: u32, length: usize) -> Vec<u8> {
        let mut frame = FrameBuilder {
            link: ([1; 6], [2; 6]),
            source: ([10, 9, 0, 1], port).into(),
            destination: ([10, 1, 0, 1], 80).into(),
            ttl: 63,
            segment: lb_core::host::Segment::Tcp { flags: 0x10 },
            payload: vec![0; length],
        }
        .build()
        .0;
        frame[38..42].copy_from_slice(&sequence.to_be_bytes());
        frame
    }

    proptest! {
        #[test]
        fn bytes_stay_bounded_order_stays_and_every_frame_is_accounted_for(
            sizes in prop::collection::vec(1_usize..60, 0..60),
            oldest in any::<bool>(),
        ) {
            let overflow = if oldest { Overflow::DropOldest } else { Overflow::DropNewest };
            let mut queue = HoldQueue::new(limits(200, overflow));
            let now = Instant::now();
            for (n, size) in sizes.iter().enumerate() {
                queue.push(now, &vec![n as u8; *size], Mode::Nat);
                prop_assert!(queue.bytes <= 200);
            }
            let kept = contents(&mut queue);
            prop_assert!(kept.windows(2).all(|pair| pair[0][0] < pair[1][0]));
            prop_assert_eq!(kept.iter().map(Vec::len).sum::<usize>(), queue.bytes);
            prop_assert_eq!(kept.len() as u64 + queue.counts().overflow, sizes.len() as u64);
        }
    }
}
