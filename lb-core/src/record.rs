//! The records of the data path's tables, as they lie in kernel memory.
//!
//! Addresses are arrays of `W` words as on the wire: one for IPv4, four for IPv6. Ports are as on the wire.
//! No record has implicit padding: the kernel compares and hashes keys byte by byte, and records are copied as
//! bytes between kernel and user space. Flow keys and flows are multiples of eight bytes, which is what keeps
//! them cheap on the kernel program's stack.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::gate::Slot;
use crate::packet::{LINK_HEADER, read16, read32, write32};

/// Version of everything in this file. Tables of another version are refused at start.
pub const LAYOUT_VERSION: u64 = 1;

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

/// Which way a flow's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Direction {
    /// From a client to a backend.
    ToBackend = 0,
    /// From a backend to a client.
    ToClient = 1,
}

/// What happens to one direction of a flow: a stable backend number and a translation, never a location.
#[derive(Debug)]
#[repr(C)]
pub struct Flow<const W: usize> {
    /// When a packet was last seen, in the caller's clock.
    pub seen: AtomicU64,
    /// The backend that the flow stays with.
    pub backend: u32,
    /// The backend's incarnation when the flow was made; another one makes the flow void.
    pub incarnation: u32,
    /// [`Direction`] as a number.
    pub direction: u32,
    /// Source and destination port to write.
    pub ports: u32,
    /// What the translation adds to a checksum over the addresses (IPv4 header).
    pub address_delta: u16,
    /// What it adds to a checksum over addresses and ports (TCP, UDP).
    pub transport_delta: u16,
    /// Zero.
    pub reserved: u32,
    /// Source address to write.
    pub source: [u32; W],
    /// Destination address to write.
    pub destination: [u32; W],
    /// Of [`Direction::ToClient`]: back to where the client's packets came from.
    pub link: Link,
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

/// How a service chooses its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Service {
    /// The service's number.
    pub number: u32,
    /// Which Maglev ring it picks from.
    pub ring: u32,
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

/// Packets and bytes of a backend, per CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Traffic {
    /// Packets, by [`Direction`].
    pub packets: [u64; 2],
    /// Bytes with link headers, by [`Direction`].
    pub bytes: [u64; 2],
}

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
}

/// Bytes of a small capture slot, head included.
pub const CAPTURE_SMALL: usize = 256;
/// Bytes of a large capture slot, head included; fits a frame of 1,518 bytes with room to spare.
pub const CAPTURE_LARGE: usize = 2048;

const _: () = {
    assert!(size_of::<FlowKey<1>>() == 16);
    assert!(size_of::<FlowKey<4>>() == 40);
    assert!(size_of::<Flow<1>>() == 56);
    assert!(size_of::<Flow<4>>() == 80);
    assert!(size_of::<ServiceKey<1>>() == 8);
    assert!(size_of::<ServiceKey<4>>() == 20);
    assert!(size_of::<Service>() == 8);
    assert!(size_of::<Backend>() == 40);
    assert!(size_of::<Location>() == 16);
    assert!(size_of::<HoldCounters>() == 24);
    assert!(size_of::<Traffic>() == 32);
    assert!(size_of::<CaptureHead>() == 8);
};
