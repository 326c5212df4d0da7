//! The records of the data path's tables, as they lie in kernel memory.
//!
//! Addresses are arrays of `W` words as on the wire: one for IPv4, four for IPv6. Ports are as on the wire.
//! No record has implicit padding: the kernel compares and hashes keys byte by byte, and records are copied as
//! bytes between kernel and user space. Flow keys and flows are multiples of eight bytes, which is what keeps
//! them cheap on the kernel program's stack.

use core::sync::atomic::{AtomicU64, Ordering};

#[cfg(doc)]
use crate::flow::Direction;
use crate::flow::Mode;
use crate::gate::Slot;
use crate::maglev::NO_BACKEND;
use crate::packet::{LINK_HEADER, read16, read32, write32};

/// Version of everything in this file. Tables of another version are refused at start.
pub const LAYOUT_VERSION: u64 = 2;

/// Link header of frames to a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Link {
    /// Output interface; 0 where none is known.
    pub interface: u32,
    /// The neighbour's hardware address and ours, as on the wire. Words, since a six-byte array would be
    /// written to the kernel program's stack misaligned.
    words: [u32; 3],
}

impl Link {
    /// A link out of an interface, to a neighbour's hardware address, from our own.
    pub const fn new(interface: u32, neighbour: [u8; 6], own: [u8; 6]) -> Self {
        let [n0, n1, n2, n3, n4, n5] = neighbour;
        let [o0, o1, o2, o3, o4, o5] = own;
        let words = [
            u32::from_ne_bytes([n0, n1, n2, n3]),
            u32::from_ne_bytes([n4, n5, o0, o1]),
            u32::from_ne_bytes([o2, o3, o4, o5]),
        ];
        Self { interface, words }
    }

    /// The link back to where a frame came from.
    #[inline(always)]
    pub fn back(interface: u32, header: &[u8; LINK_HEADER]) -> Self {
        let middle = [read16(header, 10).to_ne_bytes(), read16(header, 0).to_ne_bytes()];
        let [[n4, n5], [o0, o1]] = middle;
        Self {
            interface,
            words: [read32(header, 6), u32::from_ne_bytes([n4, n5, o0, o1]), read32(header, 2)],
        }
    }

    /// Whether a frame that came in on an interface was sent by the neighbour.
    #[inline(always)]
    pub fn is_origin_of(&self, header: &[u8; LINK_HEADER], interface: u32) -> bool {
        let [n4, n5, _, _] = self.words[1].to_ne_bytes();
        interface == self.interface
            && read32(header, 6) == self.words[0]
            && read16(header, 10) == u16::from_ne_bytes([n4, n5])
    }

    /// Writes both hardware addresses into a frame's header.
    #[inline(always)]
    pub fn write(&self, header: &mut [u8; LINK_HEADER]) {
        write32(header, 0, self.words[0]);
        write32(header, 4, self.words[1]);
        write32(header, 8, self.words[2]);
    }
}

/// What clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct ServiceKey<const W: usize> {
    /// Virtual address.
    pub address: [u32; W],
    /// Port, as on the wire.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u16,
}

/// How a service chooses its backends and how packets reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Service {
    /// The service's number.
    pub number: u32,
    /// First place of its ring among the rings' places.
    pub ring: u32,
    /// Places of its ring; 0: it has no backend.
    pub places: u32,
    /// [`ServiceOptions`] as bits.
    pub options: ServiceOptions,
}

/// Mode and policies of a service, as one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct ServiceOptions(u32);

impl ServiceOptions {
    const STEER: u32 = 1 << 2;

    /// Puts them together. With `steer`, new flows whose backend is held go to another one.
    #[inline(always)]
    pub const fn new(mode: Mode, steer: bool) -> Self {
        Self(mode as u32 | if steer { Self::STEER } else { 0 })
    }

    /// How packets reach the backends.
    #[inline(always)]
    pub const fn mode(self) -> Mode {
        Mode::from_bits(self.0)
    }

    /// Whether new flows go to another backend while theirs is held.
    #[inline(always)]
    pub const fn steers(self) -> bool {
        self.0 & Self::STEER != 0
    }
}

/// A place of a ring: a backend and the member that its flows are counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Place(u64);

impl Place {
    /// A place that leads nowhere.
    pub const EMPTY: Self = Self(NO_BACKEND as u64);

    /// A backend's place.
    #[inline(always)]
    pub const fn new(backend: u32, member: u32) -> Self {
        Self(backend as u64 | (member as u64) << 32)
    }

    /// The place as it lies in the table.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits to put into the table.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The backend's number, if there is one.
    #[inline(always)]
    pub const fn backend(self) -> Option<u32> {
        let number = self.0 as u32;
        if number == NO_BACKEND { None } else { Some(number) }
    }

    /// The member's number.
    #[inline(always)]
    pub const fn member(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// One running server instance. The kernel and user space share it in memory.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Backend {
    /// A [`crate::GateWord`]: the only thing that a cutover changes.
    pub word: AtomicU64,
    /// Both slots' sites. The inactive one is written before a flip.
    pub sites: Sites,
    /// The address its sockets are bound to; IPv4 uses the last word.
    pub address: [u32; 4],
    /// Its port, as on the wire.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
    /// Grows when the number is given to another backend, so that old flows do not reach it.
    pub incarnation: u32,
}

/// Site numbers of a backend's two slots, as one word (slot A low): a flip never sees half of a change.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Sites(AtomicU64);

impl Sites {
    /// The site of a slot.
    #[inline(always)]
    pub fn at(&self, slot: Slot) -> u32 {
        (self.0.load(Ordering::Relaxed) >> (32 * slot as u32)) as u32
    }

    /// Writes both, visible to whoever sees a gate word that was stored later.
    pub fn store(&self, sites: [u32; 2]) {
        self.0.store(sites[0] as u64 | (sites[1] as u64) << 32, Ordering::Release);
    }
}

/// How a site is reached and recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Location {
    /// Link header of frames to the site's next hop.
    pub link: Link,
    /// Largest IP packet, outer header included, that fits the way to the site, in bytes; 0: any.
    pub mtu: u32,
    /// IP version of the tunnel's outer header, 4 or 6; 0: there is no tunnel.
    pub tunnel: u32,
    /// Tunnel's outer source address: ours. IPv4 uses the last word.
    pub source: [u32; 4],
    /// Tunnel's outer destination address: the site's endpoint. IPv4 uses the last word.
    pub destination: [u32; 4],
    /// Of an IPv4 tunnel: sum of the words of the outer header that never change.
    pub checksum: u32,
    /// Zero.
    pub reserved: u32,
}

/// How far the hold of a backend has come. The kernel and user space share it in memory.
#[derive(Debug, Default)]
#[repr(C)]
pub struct HoldCounters {
    /// Packets that the kernel gave to the capture ring.
    pub captured: AtomicU64,
    /// Packets of those that user space sent or gave up. While equal to `captured`, nothing is queued.
    pub settled: AtomicU64,
    /// Packets that were dropped instead of captured.
    pub refused: AtomicU64,
}

/// Packets and bytes of a member, per CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Traffic {
    /// Packets, by [`Direction`].
    pub packets: [u64; 2],
    /// Bytes with link headers, by [`Direction`].
    pub bytes: [u64; 2],
    /// New flows.
    pub opened: u64,
    /// TCP resets from the backend.
    pub resets: u64,
}

/// Bounds and switches that may change while packets flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// Length of a window for the bounds below, in the unit of [`crate::Arrival::now`]; 0: no bounds.
    pub window: u32,
    /// New flows in a window, per CPU.
    pub new_flows_per_cpu: u32,
    /// New flows in a window, per source prefix (/24, /56).
    pub new_flows_per_prefix: u32,
    /// One in so many packets is copied to the samples; 0: none.
    pub sample: u32,
}

/// Interfaces whose packets may be handed over to the other end at once: a bit each.
pub const PEERED_INTERFACES: u32 = 65_536;

/// Budgets of source prefixes: a power of two. Prefixes share one by hash, so that a flood cannot fill a table.
pub const PREFIX_BUDGETS: u32 = 65_536;

/// The load balancer's own addresses towards backends: a prefix of which each flow takes one by hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct NatSource<const W: usize> {
    /// The prefix; all zeroes: there is none.
    pub base: [u32; W],
    /// Ones where the flow's hash may choose.
    pub host_mask: [u32; W],
}

/// Head of a captured frame in the ring, before the frame itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CaptureHead {
    /// Whose queue.
    pub backend: u32,
    /// Length of the frame in bytes.
    pub length: u32,
    /// [`Mode`] as a number: with `dsr` the frame still has to be encapsulated.
    pub mode: u32,
    /// Payload bytes of each segment that the frame stands for; 0: it is one packet.
    pub segment: u32,
}

/// Head of a sampled packet in its ring, before the packet's first bytes as they came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SampleHead {
    /// [`crate::Reason`] as a number.
    pub reason: u32,
    /// Interface that the packet came in on.
    pub interface: u32,
    /// Length of the packet in bytes.
    pub length: u32,
    /// Bytes of it that follow.
    pub captured: u32,
    /// When, in nanoseconds of the monotonic clock.
    pub time_ns: u64,
}

/// Most bytes of a packet that a sample keeps.
pub const SAMPLE_BYTES: usize = 232;

/// Bytes of a small capture slot, head included.
pub const CAPTURE_SMALL: usize = 256;
/// Bytes of a large capture slot, head included; fits a frame of 1,518 bytes with room to spare.
pub const CAPTURE_LARGE: usize = 2048;

/// Bytes of the largest capture slot, head included: for segments that a network card or stack has merged.
pub const CAPTURE_MERGED: usize = 65_536 + 256;

const _: () = {
    assert!(size_of::<ServiceKey<1>>() == 8);
    assert!(size_of::<ServiceKey<4>>() == 20);
    assert!(size_of::<Service>() == 16);
    assert!(size_of::<Backend>() == 40);
    assert!(size_of::<Location>() == 64);
    assert!(size_of::<HoldCounters>() == 24);
    assert!(size_of::<Traffic>() == 48);
    assert!(size_of::<Settings>() == 16);
    assert!(size_of::<CaptureHead>() == 16);
    assert!(size_of::<SampleHead>() + SAMPLE_BYTES == 256);
};
