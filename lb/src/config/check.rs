//! Health checks as configured.

use std::ops::RangeInclusive;
use std::time::Duration;

/// How a backend is found to be up or down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is asked of the backend; `None`: nothing (only `resets_per_second` is looked at).
    pub probe: Option<Probe>,
    /// From one probe's start to the next one's.
    pub interval: Duration,
    /// How long an answer may take; not longer than the interval.
    pub timeout: Duration,
    /// Good answers in a row after which a backend that was down is up.
    pub rise: u32,
    /// Failures in a row after which a backend that was up is down.
    pub fall: u32,
    /// Resets that the backend may send to clients in a second before it counts as failing; `None`: any number.
    pub resets_per_second: Option<u32>,
}

/// What is asked of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// That it takes a connection.
    Tcp,
    /// That it answers `GET path`.
    Http {
        /// Path with query.
        path: String,
        /// Header `Host`; `None`: the backend's address.
        host: Option<String>,
        /// Status codes that count as good.
        status: RangeInclusive<u16>,
    },
    /// That it answers a datagram.
    Udp {
        /// The datagram.
        send: Vec<u8>,
        /// What the answer begins with; empty: any answer will do.
        expect: Vec<u8>,
    },
}

/// A check of a backend. One that is in several services has each different check of them once, and is up when
/// none of them finds it down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckPlan {
    /// Name of the backend.
    pub backend: String,
    /// The first service that wants it checked so, for messages.
    pub service: String,
    /// The check.
    pub check: Check,
}
