//! How much may be asked for ahead: as much as keeps the way full, and little enough that a page which a task waits for
//! does not wait behind the others. Looks at delay, as TCP Vegas does.

use std::time::Duration;

const START_BYTES: u64 = 1 << 20;
const MIN_BYTES: u64 = 256 << 10;
const MAX_BYTES: u64 = 32 << 20;

/// The window of one stream.
#[derive(Clone, Debug)]
pub struct Window {
    bytes: u64,
    shortest: Duration,
}

impl Default for Window {
    fn default() -> Self {
        Self { bytes: START_BYTES, shortest: Duration::MAX }
    }
}

impl Window {
    /// What may be under way.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// An answer of so many bytes took so long.
    pub fn answered(&mut self, bytes: u64, took: Duration) {
        self.shortest = self.shortest.min(took);
        if took < self.shortest * 2 {
            self.bytes = (self.bytes + bytes).min(MAX_BYTES);
        } else if took > self.shortest * 4 {
            self.bytes = (self.bytes - self.bytes / 8).max(MIN_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A way with this delay and rate, asked through a window: the bytes under way once it has settled.
    fn settled(delay: Duration, bytes_per_s: f64) -> u64 {
        const QUESTION: u64 = 256 << 10;
        let mut window = Window::default();
        for _ in 0..2000 {
            let queue = Duration::from_secs_f64(window.bytes() as f64 / bytes_per_s);
            window.answered(
                QUESTION,
                queue.max(delay + Duration::from_secs_f64(QUESTION as f64 / bytes_per_s)),
            );
        }
        window.bytes()
    }

    #[test]
    fn it_fills_the_way_and_not_much_more() {
        for (delay_ms, rate_mb) in [(80, 125.0), (80, 12.5), (1, 1000.0), (1, 12.5)] {
            let (delay, rate) = (Duration::from_millis(delay_ms), rate_mb * 1e6);
            let way = delay.as_secs_f64() * rate;
            let bytes = settled(delay, rate) as f64;
            assert!(bytes >= way.min(MAX_BYTES as f64), "{delay_ms} ms, {rate_mb} MB/s: {bytes}");
            assert!(bytes <= 5.0 * way + 2.0 * START_BYTES as f64, "{delay_ms} ms, {rate_mb} MB/s: {bytes}");
        }
    }
}
