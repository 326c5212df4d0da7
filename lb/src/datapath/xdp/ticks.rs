//! The clock that the kernel program stamps flows with: jiffies, and how long one is.

use std::io;
use std::time::Duration;

use super::bpf::TickCounter;

/// Reads jiffies and knows their length.
///
/// The length is what the coarse monotonic clock has as its resolution (`clock_getres(2)`): that clock moves with each
/// jiffy. `sysconf(_SC_CLK_TCK)` would not do, it is 100 whatever the kernel was built with.
pub struct TickClock {
    counter: TickCounter,
    tick: Duration,
}

impl TickClock {
    /// The running kernel's.
    pub fn new() -> io::Result<Self> {
        let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)?;
        Ok(Self { counter: TickCounter::new()?, tick: tick.into() })
    }

    /// Jiffies now.
    pub fn now(&self) -> io::Result<u64> {
        self.counter.ticks()
    }

    /// How long one is.
    pub fn tick(&self) -> Duration {
        self.tick
    }
}

/// Against the kernel. Needs root.
#[cfg(test)]
mod with_root {
    use std::time::Instant;

    use super::*;

    #[test]
    fn ticks_are_as_long_as_said() {
        let clock = TickClock::new().unwrap();
        let per_second = 1.0 / clock.tick().as_secs_f64();
        assert!((24.0..=1200.5).contains(&per_second), "{per_second} ticks a second");
        let (begin, started) = (clock.now().unwrap(), Instant::now());
        std::thread::sleep(Duration::from_millis(500));
        let (ticks, time) = (clock.now().unwrap() - begin, started.elapsed());
        let counted = clock.tick() * u32::try_from(ticks).unwrap();
        let slack = clock.tick() * 3;
        assert!(counted <= time + slack && counted + slack >= time, "{ticks} ticks in {time:?}");
    }
}
