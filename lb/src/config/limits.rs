//! How much there may be of everything, and how long flows may be idle.

use std::time::Duration;

/// Section `[limits]`: the sizes of the data path's tables, fixed when they are made, and what new flows may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Established connections of each address family.
    pub flows: u32,
    /// Flows of each family that are not confirmed by an answer yet.
    pub newcomers: u32,
    /// Services.
    pub services: u32,
    /// Backends.
    pub backends: u32,
    /// Pairs of a service and a backend of it.
    pub members: u32,
    /// Sites.
    pub sites: u32,
    /// New flows that one processor admits in a second.
    pub new_flows_per_second_per_cpu: u32,
    /// New flows that one prefix of clients (/24 or /56) is admitted in a second.
    pub new_flows_per_second_per_prefix: u32,
}

/// Places of Maglev rings that the tables have for each pair of a service and a backend: a hundred that it takes
/// in its service's ring, and something for sizes in between and rings that are being replaced.
const PLACES_PER_MEMBER: u32 = 128;
/// The largest ring four times.
const PLACES_LEAST: u32 = 4 << 17;

impl Limits {
    /// Places of all Maglev rings together.
    pub fn places(&self) -> u32 {
        self.members.saturating_mul(PLACES_PER_MEMBER).max(PLACES_LEAST)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 262_144,
            newcomers: 65_536,
            services: 1024,
            backends: 16_384,
            members: 32_768,
            sites: 256,
            new_flows_per_second_per_cpu: 200_000,
            new_flows_per_second_per_prefix: 100_000,
        }
    }
}

/// Section `[flows]`: after how long without a packet a flow is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowTimes {
    /// An established TCP connection.
    pub tcp_idle: Duration,
    /// A TCP connection whose client has not confirmed the server's answer.
    pub tcp_half_open: Duration,
    /// A TCP connection after both ends' FIN, or after a reset.
    pub tcp_closing: Duration,
    /// UDP.
    pub udp_idle: Duration,
}

impl Default for FlowTimes {
    fn default() -> Self {
        Self {
            // RFC 5382 REQ-5: not less than two hours and four minutes, so that keep-alives with their usual
            // interval of two hours come in time.
            tcp_idle: Duration::from_secs(7440),
            // A client's SYN and the server's answer are repeated for about half a minute.
            tcp_half_open: Duration::from_secs(30),
            // Two maximum segment lifetimes, as stacks have them today (RFC 9293 3.6.1 says what they are for).
            tcp_closing: Duration::from_secs(60),
            // RFC 4787 REQ-5: not less than two minutes.
            udp_idle: Duration::from_secs(120),
        }
    }
}
