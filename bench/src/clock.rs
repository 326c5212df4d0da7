//! Time of the drills: nanoseconds of `CLOCK_MONOTONIC`, tied once to the wall clock.
//!
//! Schedules and latencies use the monotonic clock alone. The wall clock is needed because agents report
//! the freeze window in it.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has CLOCK_MONOTONIC");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Nanoseconds of the wall clock since the Unix epoch.
pub fn unix_ns() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("every Linux has CLOCK_REALTIME");
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}
