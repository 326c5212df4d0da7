//! A backend's hold queue: frames in the order of their capture, bounded in bytes and age. Pure.

use std::collections::VecDeque;
use std::time::Instant;

use super::{HoldLimits, Overflow};

/// First in, first out; so each flow's packets keep their order whatever flows they are mixed with.
#[derive(Debug)]
pub struct HoldQueue {
    limits: HoldLimits,
    frames: VecDeque<Held>,
    bytes: usize,
    counts: QueueCounts,
}

#[derive(Debug)]
struct Held {
    at: Instant,
    frame: Box<[u8]>,
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
}

impl HoldQueue {
    /// An empty queue.
    pub fn new(limits: HoldLimits) -> Self {
        Self { limits, frames: VecDeque::new(), bytes: 0, counts: QueueCounts::default() }
    }

    /// Puts a frame in, or drops it or older ones as the limits say.
    pub fn push(&mut self, now: Instant, frame: &[u8]) {
        let most = self.limits.max_bytes;
        if frame.len() > most
            || self.bytes + frame.len() > most && self.limits.overflow == Overflow::DropNewest
        {
            self.counts.overflow += 1;
            return;
        }
        while self.bytes + frame.len() > most {
            self.remove_first();
            self.counts.overflow += 1;
        }
        self.bytes += frame.len();
        self.counts.held_packets += 1;
        self.counts.held_bytes += frame.len() as u64;
        self.frames.push_back(Held { at: now, frame: frame.into() });
    }

    /// Drops what is older than the limit.
    pub fn expire(&mut self, now: Instant) {
        while self.frames.front().is_some_and(|held| now.duration_since(held.at) > self.limits.max_age) {
            self.remove_first();
            self.counts.aged += 1;
        }
    }

    /// The first `most` frames, to be sent.
    pub fn first(&mut self, most: usize) -> impl Iterator<Item = &mut [u8]> {
        self.frames.iter_mut().take(most).map(|held| &mut *held.frame)
    }

    /// Forgets the first `sent` frames.
    pub fn sent(&mut self, sent: usize) {
        for _ in 0..sent {
            self.remove_first();
        }
    }

    fn remove_first(&mut self) {
        if let Some(held) = self.frames.pop_front() {
            self.bytes -= held.frame.len();
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
    use proptest::prelude::*;
    use std::time::Duration;

    fn limits(max_bytes: usize, overflow: Overflow) -> HoldLimits {
        HoldLimits { max_bytes, max_age: Duration::from_millis(100), overflow }
    }

    fn contents(queue: &mut HoldQueue) -> Vec<Vec<u8>> {
        queue.first(usize::MAX).map(|frame| frame.to_vec()).collect()
    }

    #[test]
    fn a_full_queue_keeps_its_oldest_or_its_newest() {
        let now = Instant::now();
        for (overflow, kept) in [(Overflow::DropNewest, [1, 2]), (Overflow::DropOldest, [2, 3])] {
            let mut queue = HoldQueue::new(limits(20, overflow));
            for n in 1..=3 {
                queue.push(now, &[n; 10]);
            }
            assert_eq!(contents(&mut queue), kept.map(|n| vec![n; 10]), "{overflow:?}");
            assert_eq!(queue.counts().overflow, 1);
        }
    }

    #[test]
    fn a_frame_larger_than_the_queue_displaces_nothing() {
        let mut queue = HoldQueue::new(limits(20, Overflow::DropOldest));
        queue.push(Instant::now(), &[1; 20]);
        queue.push(Instant::now(), &[2; 21]);
        assert_eq!(contents(&mut queue), [vec![1; 20]]);
    }

    #[test]
    fn old_frames_expire_and_young_ones_stay() {
        let start = Instant::now();
        let mut queue = HoldQueue::new(limits(100, Overflow::DropNewest));
        queue.push(start, &[1]);
        queue.push(start + Duration::from_millis(80), &[2]);
        queue.expire(start + Duration::from_millis(101));
        assert_eq!(contents(&mut queue), [vec![2]]);
        assert_eq!(queue.counts().aged, 1);
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
                queue.push(now, &vec![n as u8; *size]);
                prop_assert!(queue.bytes <= 200);
            }
            let kept = contents(&mut queue);
            prop_assert!(kept.windows(2).all(|pair| pair[0][0] < pair[1][0]));
            prop_assert_eq!(kept.iter().map(Vec::len).sum::<usize>(), queue.bytes);
            prop_assert_eq!(kept.len() as u64 + queue.counts().overflow, sizes.len() as u64);
        }
    }
}
