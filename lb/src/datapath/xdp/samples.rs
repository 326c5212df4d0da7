//! Samples of packets: out of the kernel's ring to everybody who listens.
//!
//! The kernel program copies one packet in so many while somebody listens, and nothing otherwise. The thread lives as
//! long as there are listeners; a listener that is gone is one whose receiver was dropped.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use aya::maps::{MapData, PerCpuArray, RingBuf};
use lb_core::Reason;
use lb_core::record::SampleHead;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::records::from_bytes;
use crate::capture::stream::Sample;

const HEAD: usize = size_of::<SampleHead>();
/// How often the ring is looked at: it has room for 16,384 samples.
const POLL: Duration = Duration::from_millis(2);
/// Samples that a listener may be behind.
const BACKLOG: usize = 8192;

/// Handle on sampling.
pub struct Sampler {
    shared: Arc<Shared>,
    /// Samples that the ring had no room for, by CPU.
    refused: PerCpuArray<MapData, u64>,
    refused_before: u64,
}

struct Shared {
    state: Mutex<State>,
    /// The thread's, while there is one.
    ring: Mutex<RingBuf<MapData>>,
    /// Makes the kernel program copy one packet in so many; 0: none.
    set_rate: Box<dyn Fn(u32) + Send + Sync>,
    lost: AtomicU64,
}

struct State {
    fan: Fan,
    /// Whether there is a thread.
    is_running: bool,
}

impl Sampler {
    /// Takes the ring and the count of what it had no room for. Nothing is sampled yet, whatever a former daemon
    /// left behind.
    pub fn new(
        ring: RingBuf<MapData>,
        refused: PerCpuArray<MapData, u64>,
        set_rate: impl Fn(u32) + Send + Sync + 'static,
    ) -> Self {
        set_rate(0);
        let shared = Shared {
            state: Mutex::new(State { fan: Fan::default(), is_running: false }),
            ring: Mutex::new(ring),
            set_rate: Box::new(set_rate),
            lost: AtomicU64::new(0),
        };
        let refused_before = sum(&refused);
        Self { shared: Arc::new(shared), refused, refused_before }
    }

    /// Listens to one packet in so many.
    pub fn listen(&self, one_in: NonZeroU32) -> Receiver<Sample> {
        let mut state = self.shared.state();
        let receiver = state.fan.add(one_in);
        if !state.is_running {
            let shared = self.shared.clone();
            let thread = thread::Builder::new().name("samples".into());
            if let Err(error) = thread.spawn(move || shared.run()) {
                tracing::error!(%error, "samples cannot be taken");
                // The receiver ends at once, as its sender does.
                state.fan = Fan::default();
                return receiver;
            }
            state.is_running = true;
        }
        (self.shared.set_rate)(state.fan.rate());
        receiver
    }

    /// Samples that nobody got.
    pub fn lost(&self) -> u64 {
        let refused = sum(&self.refused).saturating_sub(self.refused_before);
        refused + self.shared.lost.load(Relaxed)
    }
}

fn sum(counter: &PerCpuArray<MapData, u64>) -> u64 {
    counter.get(&0, 0).map_or(0, |counts| counts.iter().sum())
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands samples on until nobody listens.
    fn run(&self) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            {
                let mut state = self.state();
                if state.fan.prune() {
                    (self.set_rate)(state.fan.rate());
                }
                while let Some(item) = ring.next() {
                    if let Some(sample) = parse(&item) {
                        self.lost.fetch_add(state.fan.offer(&sample), Relaxed);
                    }
                }
                if state.fan.listeners.is_empty() {
                    state.is_running = false;
                    return;
                }
            }
            thread::sleep(POLL);
        }
    }
}

/// The sample in a slot of the ring.
fn parse(slot: &[u8]) -> Option<Sample> {
    let (head, bytes) = slot.split_first_chunk::<HEAD>()?;
    let SampleHead { reason, interface, length, captured, time_ns } = from_bytes(head);
    let bytes = bytes.get(..captured as usize)?;
    let reason = Reason::ALL.get(reason as usize).copied();
    Some(Sample { reason, interface, length, time_ns, bytes: bytes.into() })
}

/// Who listens.
#[derive(Default)]
struct Fan {
    listeners: Vec<Listener>,
}

struct Listener {
    one_in: u32,
    /// Samples offered since the last one that was taken.
    passed: u32,
    sender: Sender<Sample>,
}

impl Fan {
    fn add(&mut self, one_in: NonZeroU32) -> Receiver<Sample> {
        let (sender, receiver) = channel(BACKLOG);
        self.listeners.push(Listener { one_in: one_in.get(), passed: 0, sender });
        receiver
    }

    /// One packet in so many is enough for everybody; 0: nobody listens.
    fn rate(&self) -> u32 {
        self.listeners.iter().map(|listener| listener.one_in).min().unwrap_or(0)
    }

    /// Forgets who is gone; whether somebody is.
    fn prune(&mut self) -> bool {
        let before = self.listeners.len();
        self.listeners.retain(|listener| !listener.sender.is_closed());
        self.listeners.len() < before
    }

    /// Gives a sample to everybody whose turn it is; how many could not take it.
    fn offer(&mut self, sample: &Sample) -> u64 {
        let rate = self.rate().max(1);
        let mut lost = 0;
        for listener in &mut self.listeners {
            listener.passed += 1;
            // Of those that were sampled for somebody who wants more.
            if listener.passed >= listener.one_in / rate {
                listener.passed = 0;
                if let Err(TrySendError::Full(_)) = listener.sender.try_send(sample.clone()) {
                    lost += 1;
                }
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(time_ns: u64) -> Sample {
        Sample { reason: None, interface: 1, length: 60, time_ns, bytes: [0; 60].into() }
    }

    fn one_in(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).unwrap()
    }

    fn taken(receiver: &mut Receiver<Sample>) -> Vec<u64> {
        std::iter::from_fn(|| receiver.try_recv().ok().map(|sample| sample.time_ns)).collect()
    }

    #[test]
    fn everybody_gets_the_share_that_was_asked_for() {
        let mut fan = Fan::default();
        assert_eq!(fan.rate(), 0);
        let mut some = fan.add(one_in(10));
        assert_eq!(fan.rate(), 10);
        // Sampled at one in ten already.
        fan.offer(&sample(1));
        assert_eq!(taken(&mut some), [1]);
        let mut all = fan.add(one_in(1));
        assert_eq!(fan.rate(), 1);
        for time_ns in 10..30 {
            assert_eq!(fan.offer(&sample(time_ns)), 0);
        }
        assert_eq!(taken(&mut all), (10..30).collect::<Vec<_>>());
        assert_eq!(taken(&mut some), [19, 29]);
        drop(all);
        assert!(fan.prune());
        assert!(!fan.prune());
        assert_eq!(fan.rate(), 10);
        drop(some);
        assert!(fan.prune());
        assert_eq!(fan.rate(), 0);
    }

    #[test]
    fn who_is_slow_loses_samples_and_keeps_nobody_up() {
        let mut fan = Fan::default();
        let mut slow = fan.add(one_in(1));
        let lost: u64 = (0..BACKLOG as u64 + 5).map(|time_ns| fan.offer(&sample(time_ns))).sum();
        assert_eq!(lost, 5);
        assert_eq!(taken(&mut slow).len(), BACKLOG);
        assert_eq!(fan.offer(&sample(0)), 0);
    }

    #[test]
    fn slots_are_read_as_far_as_they_are_filled() {
        let words = [Reason::StaleSite as u32, 3, 1514, 2];
        let mut slot: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        slot.extend(77_u64.to_ne_bytes());
        slot.extend([8, 9, 0, 0]);
        let expected = Sample {
            reason: Some(Reason::StaleSite),
            interface: 3,
            length: 1514,
            time_ns: 77,
            bytes: [8, 9].into(),
        };
        assert_eq!(parse(&slot), Some(expected));
        slot[..4].copy_from_slice(&9999_u32.to_ne_bytes());
        assert_eq!(parse(&slot).unwrap().reason, None);
        assert_eq!(parse(&slot[..25]), None);
        assert_eq!(parse(&slot[..20]), None);
    }
}
