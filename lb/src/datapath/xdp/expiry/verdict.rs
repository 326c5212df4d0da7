//! When a flow is over: a pure decision about what its entries say.

use std::time::Duration;

use crate::config::FlowTimes;

/// A number of ticks of the clock that stamps flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticks(pub u64);

/// How long flows may be idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Established TCP.
    pub tcp_idle: Ticks,
    /// TCP of newcomers.
    pub tcp_half_open: Ticks,
    /// TCP that ended.
    pub tcp_closing: Ticks,
    /// UDP.
    pub udp_idle: Ticks,
    /// An entry without its partner: a new flow's entries are made one after the other.
    pub orphan: Ticks,
}

impl Limits {
    /// How long an entry may be without its partner: making both takes microseconds.
    const ORPHAN: Duration = Duration::from_secs(2);

    /// The configured times in ticks, each rounded up and at least one.
    pub fn new(times: &FlowTimes, tick: Duration) -> Self {
        let ticks = |time: Duration| Ticks((time.as_nanos().div_ceil(tick.as_nanos().max(1)) as u64).max(1));
        Self {
            tcp_idle: ticks(times.tcp_idle),
            tcp_half_open: ticks(times.tcp_half_open),
            tcp_closing: ticks(times.tcp_closing),
            udp_idle: ticks(times.udp_idle),
            orphan: ticks(Self::ORPHAN),
        }
    }
}

/// Transport of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// With an end that can be seen.
    Tcp,
    /// Over when it is idle.
    Other,
}

/// Which table a flow is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The client has not shown that it hears the server.
    Newcomer,
    /// It has.
    Established,
}

/// What one direction's entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half {
    /// When its last packet came.
    pub seen: Ticks,
    /// Whether it had a FIN.
    pub finished: bool,
    /// Whether it had a reset.
    pub reset: bool,
}

/// The entries of a flow that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    /// Both directions.
    Both {
        /// Towards the backend.
        forward: Half,
        /// Towards the client.
        reply: Half,
    },
    /// Towards the backend; answers do not come this way.
    OneWay(Half),
    /// One of two, its partner being gone.
    Orphan(Half),
}

/// A flow as its entries show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Transport.
    pub transport: Transport,
    /// Its table.
    pub standing: Standing,
    /// Its entries.
    pub halves: Halves,
    /// Its backend's number belongs to another backend now: its packets reach nobody.
    pub void: bool,
}

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    Keep,
    /// It goes.
    Remove(Cause),
}

/// Why a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// Both ends had closed it, a while ago.
    Closed,
    /// One end had reset it, a while ago.
    Reset,
    /// Nothing came for long.
    Idle,
    /// Its backend is no more.
    Void,
    /// One entry of two was left.
    Orphan,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Closed, Self::Reset, Self::Idle, Self::Void, Self::Orphan];

    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Idle => "idle",
            Self::Void => "backend_gone",
            Self::Orphan => "orphan",
        }
    }
}

/// What becomes of a flow now.
pub fn verdict(flow: &Subject, now: Ticks, limits: &Limits) -> Verdict {
    if flow.void {
        return Verdict::Remove(Cause::Void);
    }
    let ended = match flow.halves {
        Halves::Both { forward, reply } => end(flow.transport, &[forward, reply]),
        Halves::OneWay(forward) => end(flow.transport, &[forward]),
        Halves::Orphan(_) => None,
    };
    let open = match (flow.transport, flow.standing) {
        (Transport::Tcp, Standing::Newcomer) => limits.tcp_half_open,
        (Transport::Tcp, Standing::Established) => limits.tcp_idle,
        (Transport::Other, _) => limits.udp_idle,
    };
    let (limit, cause) = match (flow.halves, ended) {
        (Halves::Orphan(_), _) => (limits.orphan.min(open), Cause::Orphan),
        // Where an operator lets open connections be idle for less than closed ones, the less counts.
        (_, Some(cause)) => (limits.tcp_closing.min(open), cause),
        (_, None) => (open, Cause::Idle),
    };
    if idle(flow.halves.seen(), now) >= limit { Verdict::Remove(cause) } else { Verdict::Keep }
}

/// How the flow was ended: seen in every entry, or by a reset in any.
fn end(transport: Transport, halves: &[Half]) -> Option<Cause> {
    match transport {
        Transport::Other => None,
        Transport::Tcp if halves.iter().any(|half| half.reset) => Some(Cause::Reset),
        Transport::Tcp if halves.iter().all(|half| half.finished) => Some(Cause::Closed),
        Transport::Tcp => None,
    }
}

impl Halves {
    /// When the last packet of either direction came.
    pub fn seen(&self) -> Ticks {
        match self {
            Self::Both { forward, reply } => forward.seen.max(reply.seen),
            Self::OneWay(half) | Self::Orphan(half) => half.seen,
        }
    }
}

/// How long ago that was. A packet may be newer than the look at the clock.
pub fn idle(seen: Ticks, now: Ticks) -> Ticks {
    Ticks(now.0.saturating_sub(seen.0))
}

/// Whether an entry by itself cannot be a reason to look at its flow: so most are passed over without a look-up.
pub fn is_fresh(transport: Transport, standing: Standing, half: &Half, now: Ticks, limits: &Limits) -> bool {
    // As if the partner said the same: the earliest end that both could come to.
    let halves = Halves::Both { forward: *half, reply: *half };
    verdict(&Subject { transport, standing, halves, void: false }, now, limits) == Verdict::Keep
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
