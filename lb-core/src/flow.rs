//! Flows: what a connection's packets are named by, and what happens to each direction of it.
//!
//! A flow of mode `nat` or `transparent` has two entries, one for each direction; `dsr` has one, since the answers
//! do not come this way. New flows live in a table of newcomers, out of which a flood may push them; once the client
//! has shown that it hears the server they move to the table of established flows, where nothing pushes them out.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::checksum::{fold, sum, sum_complement};
use crate::record::Link;

/// A flow as its packets name it, in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct FlowKey<const W: usize> {
    /// Source address.
    pub source: [u32; W],
    /// Destination address.
    pub destination: [u32; W],
    /// Source and destination port, as on the wire.
    pub ports: u32,
    /// IP protocol number.
    pub protocol: u32,
}

impl<const W: usize> FlowKey<W> {
    /// How the answers to such packets are named.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ports: self.ports.rotate_left(16),
            protocol: self.protocol,
        }
    }
}

/// Which way a flow's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Direction {
    /// From a client to a backend.
    ToBackend = 0,
    /// From a backend to a client.
    ToClient = 1,
}

/// How packets reach a backend, and what it sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Mode {
    /// Both addresses are rewritten: the backend sees one of ours and needs no set-up.
    #[default]
    Nat = 0,
    /// Only the destination is rewritten: the backend sees the client, and its site routes answers through us.
    Transparent = 1,
    /// Nothing is rewritten: packets are encapsulated (RFC 2003, RFC 2473) to the site, which holds the virtual
    /// address and answers the client directly.
    Dsr = 2,
}

impl Mode {
    /// The mode in the two lowest bits of a number.
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            1 => Self::Transparent,
            2 => Self::Dsr,
            _ => Self::Nat,
        }
    }
}

/// Direction and mode of a flow's entry, as one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Kind(u32);

impl Kind {
    /// Puts both together.
    #[inline(always)]
    pub const fn new(direction: Direction, mode: Mode) -> Self {
        Self(direction as u32 | (mode as u32) << 1)
    }

    /// Which way the entry's packets go.
    #[inline(always)]
    pub const fn direction(self) -> Direction {
        if self.0 & 1 == 0 { Direction::ToBackend } else { Direction::ToClient }
    }

    /// How they get there.
    #[inline(always)]
    pub const fn mode(self) -> Mode {
        Mode::from_bits(self.0 >> 1)
    }
}

/// What happens to one direction of a flow: a stable backend number and a translation, never a location.
#[derive(Debug)]
#[repr(C)]
pub struct Flow<const W: usize> {
    /// When a packet was last seen, in the caller's clock.
    pub seen: AtomicU64,
    /// A [`State`].
    pub state: AtomicU64,
    /// The backend that the flow stays with.
    pub backend: u32,
    /// The backend's incarnation when the flow was made; another one makes the flow void.
    pub incarnation: u32,
    /// Source and destination port to write.
    pub ports: u32,
    /// What the translation adds to a checksum over the addresses (IPv4 header).
    pub address_delta: u16,
    /// What it adds to a checksum over addresses and ports (TCP, UDP).
    pub transport_delta: u16,
    /// Source address to write.
    pub source: [u32; W],
    /// Destination address to write.
    pub destination: [u32; W],
    /// Of [`Direction::ToClient`]: back to where the client's packets came from.
    pub link: Link,
    /// The member (a backend of a service) that the flow's packets are counted for.
    pub member: u32,
    /// Direction and mode.
    pub kind: Kind,
}

/// What the entries of a flow have in common, whichever direction.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    /// When the flow opened, in the caller's clock.
    pub now: u64,
    /// The backend's number.
    pub backend: u32,
    /// Its incarnation.
    pub incarnation: u32,
    /// The member that is counted.
    pub member: u32,
    /// The mode of its service.
    pub mode: Mode,
    /// What the state starts with, for example [`State::PINNED`].
    pub state: State,
    /// Back to where the client's packets came from.
    pub link: Link,
}

impl<const W: usize> Flow<W> {
    /// The entry that rewrites packets named `from` into packets named `to`.
    ///
    /// A flow that opens as `key` and reaches its backend as `translated` has the entries `between(key, translated)`
    /// and, towards the client, `between(translated.reversed(), key.reversed())`.
    #[inline(always)]
    pub fn between(from: &FlowKey<W>, to: &FlowKey<W>, direction: Direction, common: &Common) -> Self {
        let addresses = sum(&to.source)
            + sum(&to.destination)
            + sum_complement(&from.source)
            + sum_complement(&from.destination);
        Self {
            seen: AtomicU64::new(common.now),
            state: AtomicU64::new(common.state.0),
            backend: common.backend,
            incarnation: common.incarnation,
            ports: to.ports,
            address_delta: fold(addresses),
            transport_delta: fold(addresses + to.ports as u64 + !from.ports as u64),
            source: to.source,
            destination: to.destination,
            link: common.link,
            member: common.member,
            kind: Kind::new(direction, common.mode),
        }
    }

    /// Of an entry towards the backend: how the answers are named before their translation.
    #[inline(always)]
    pub fn answers(&self, protocol: u32) -> FlowKey<W> {
        FlowKey {
            source: self.destination,
            destination: self.source,
            ports: self.ports.rotate_left(16),
            protocol,
        }
    }

    /// What is known of this direction.
    #[inline(always)]
    pub fn state(&self) -> State {
        State(self.state.load(Relaxed))
    }

    /// Adds to what is known of this direction. Two packets at the same time may lose one addition, which the next
    /// packet brings again or the flow's idle time makes up for.
    #[inline(always)]
    pub fn note(&self, state: State) {
        let known = self.state.load(Relaxed);
        if known | state.0 != known {
            self.state.store(known | state.0, Relaxed);
        }
    }
}

/// What was seen of one direction of a flow. The low half is the acknowledgement number that shows that the client
/// heard the server; it means something in a newcomer's entry towards the client only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct State(u64);

impl State {
    /// Nothing yet.
    pub const NEW: Self = Self(0);
    /// A packet came this way.
    pub const ANSWERED: Self = Self(1 << 32);
    /// A FIN came this way.
    pub const FINISHED: Self = Self(1 << 33);
    /// A reset came this way.
    pub const RESET: Self = Self(1 << 34);
    /// The flow's backend was chosen by the daemon (a health check's): a SYN does not choose again.
    pub const PINNED: Self = Self(1 << 35);

    /// The state as it lies in [`Flow::state`].
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits to put there.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Answered with a segment whose acknowledgement is `expected`.
    #[inline(always)]
    pub const fn answered(expected: u32) -> Self {
        Self(Self::ANSWERED.0 | expected as u64)
    }

    /// The acknowledgement number that a client which heard the answer sends, or one little after.
    #[inline(always)]
    pub const fn expected(self) -> u32 {
        self.0 as u32
    }

    /// Whether all of `other` was seen.
    #[inline(always)]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any of `other` was seen.
    #[inline(always)]
    pub const fn has_any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

const _: () = {
    assert!(size_of::<FlowKey<1>>() == 16);
    assert!(size_of::<FlowKey<4>>() == 40);
    // With the kernel's 48 bytes and the key, an entry is two cache lines exactly.
    assert!(size_of::<Flow<1>>() == 64);
    assert!(size_of::<Flow<4>>() == 88);
};
