//! A histogram of times: constant memory, quantiles within 1.6 percent.

/// Each power of two is divided into this many steps.
const STEPS: u64 = 64;
const STEPS_LOG2: u32 = STEPS.trailing_zeros();
const BUCKETS: usize = ((64 - STEPS_LOG2 as usize) + 1) * STEPS as usize;

/// How often which time was seen, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    buckets: Box<[u64]>,
    count: u64,
    max_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS].into(), count: 0, max_ns: 0 }
    }
}

impl Latencies {
    /// Counts one.
    pub fn record(&mut self, ns: u64) {
        self.buckets[bucket(ns)] += 1;
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest, exactly.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The time that this share of them (0 to 1) did not exceed; 0 where none was counted.
    pub fn quantile_ns(&self, share: f64) -> u64 {
        let wanted = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper(bucket).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

fn bucket(ns: u64) -> usize {
    // Up to twice the steps each value has its own bucket; above, the first 7 bits choose it.
    let shift = (64 - ns.leading_zeros()).saturating_sub(STEPS_LOG2 + 1);
    (u64::from(shift) * STEPS + (ns >> shift)) as usize
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket / STEPS).saturating_sub(1);
    let first = (bucket - shift * STEPS) << shift;
    first + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_times_are_exact() {
        let mut latencies = Latencies::default();
        (1..=100).for_each(|ns| latencies.record(ns));
        assert_eq!(latencies.quantile_ns(0.5), 50);
        assert_eq!(latencies.quantile_ns(0.99), 99);
        assert_eq!(latencies.quantile_ns(1.0), 100);
        assert_eq!((latencies.count(), latencies.max_ns()), (100, 100));
    }

    #[test]
    fn nothing_recorded_is_zero() {
        assert_eq!(Latencies::default().quantile_ns(0.99), 0);
    }

    proptest! {
        #[test]
        fn every_time_has_a_bucket_whose_end_is_near(ns: u64) {
            let found = bucket(ns);
            prop_assert!(found < BUCKETS);
            let end = upper(found);
            prop_assert!(end >= ns && end - ns <= ns / STEPS, "{ns} in {found} until {end}");
        }
    }
}
