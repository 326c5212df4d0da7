//! The data path's tables as BPF maps, pinned by name so that they outlive the daemon.

use core::sync::atomic::AtomicU64;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use lb_core::record::{
    Backend, HoldCounters, Location, NatSource, PEERED_INTERFACES, PREFIX_BUDGETS, Place, Service,
    ServiceKey, Settings, Traffic,
};
use lb_core::{Direction, Flow, FlowKey, FragmentKey, Reason, Tables};

use crate::atomic::increment;

// Defaults; the loader sets the sizes that the configuration asks for.
const FLOWS: u32 = 2 * 262_144;
const NEWCOMERS: u32 = 2 * 65_536;
const FRAGMENTS: u32 = 8192;
const SERVICES: u32 = 1024;
const BACKENDS_MOST: u32 = 16_384;
const MEMBERS_MOST: u32 = 32_768;
const SITES_MOST: u32 = 256;
const PLACES: u32 = 4 << 20;
const CAPTURE_BYTES: u32 = 64 << 20;
const SAMPLE_RING_BYTES: u32 = 4 << 20;

/// User space maps the array into its memory, so that writing an element is a store and not a system call.
const MMAPABLE: u32 = 1 << 10;

/// One number: the layout version of everything here.
#[map]
static LAYOUT: Array<u64> = Array::pinned(1, 0);

#[map]
pub static BACKENDS: Array<Backend> = Array::pinned(BACKENDS_MOST, MMAPABLE);

#[map]
pub static HOLDS: Array<HoldCounters> = Array::pinned(BACKENDS_MOST, MMAPABLE);

#[map]
static LOCATIONS: Array<Location> = Array::pinned(SITES_MOST, 0);

/// Maglev rings, one after the other: a [`Place`] each.
#[map]
static RINGS: Array<u64> = Array::pinned(PLACES, MMAPABLE);

/// Bounds and switches: one record.
#[map]
static SETTINGS: Array<Settings> = Array::pinned(1, MMAPABLE);

/// Interfaces that are one end of a virtual pair whose other end is in another namespace: a bit each.
#[map]
static PEERED: Array<u64> = Array::pinned(PEERED_INTERFACES / u64::BITS, MMAPABLE);

/// Window and count of new flows, on each CPU.
#[map]
static CPU_BUDGET: PerCpuArray<u64> = PerCpuArray::pinned(1, 0);

/// The same of source prefixes.
#[map]
static PREFIXES: Array<u64> = Array::pinned(PREFIX_BUDGETS, 0);

#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::pinned(Reason::ALL.len() as u32, 0);

#[map]
static TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::pinned(MEMBERS_MOST, 0);

#[map]
pub static CAPTURE: RingBuf = RingBuf::pinned(CAPTURE_BYTES, 0);

/// Packets as they came in, for whoever captures.
#[map]
pub static SAMPLES: RingBuf = RingBuf::pinned(SAMPLE_RING_BYTES, 0);

/// Samples that the ring had no room for.
#[map]
static SAMPLES_LOST: PerCpuArray<u64> = PerCpuArray::pinned(1, 0);

/// Which service and backend a member is (service low, backend high); for the daemon alone.
#[map]
static MEMBERS: Array<u64> = Array::pinned(MEMBERS_MOST, MMAPABLE);

/// Which backend has which number; for the daemon alone.
#[map]
static BACKEND_NAMES: Array<[u8; 64]> = Array::pinned(BACKENDS_MOST, 0);

/// Which site has which number; for the daemon alone.
#[map]
static SITE_NAMES: Array<[u8; 64]> = Array::pinned(SITES_MOST, 0);

/// Counts a packet that the backend's hold did not keep.
#[inline(always)]
pub fn refuse(backend: u32) {
    if let Some(hold) = HOLDS.get(backend) {
        increment(&hold.refused);
    }
}

/// Counts a packet.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own element, and the program is not preempted by itself.
        unsafe { *counter += 1 };
    }
}

/// Whether packets out of an interface may be handed to its other end at once.
#[inline(always)]
pub fn is_peered(interface: u32) -> bool {
    PEERED.get(interface / u64::BITS).is_some_and(|bits| bits >> (interface % u64::BITS) & 1 != 0)
}

/// Counts a sample that the ring had no room for.
#[inline(always)]
pub fn lose_sample() {
    if let Some(counter) = SAMPLES_LOST.get_ptr_mut(0) {
        // SAFETY: this CPU's own element, and the program is not preempted by itself.
        unsafe { *counter += 1 };
    }
}

/// This CPU's counters of a member.
#[inline(always)]
fn traffic(member: u32, change: impl FnOnce(&mut Traffic)) {
    if let Some(traffic) = TRAFFIC.get_ptr_mut(member) {
        // SAFETY: this CPU's own element, and the program is not preempted by itself.
        change(unsafe { &mut *traffic });
    }
}

/// The kernel's maps as tables.
pub struct Kernel;

macro_rules! family {
    ($module:ident, $words:literal, $flows:ident, $newcomers:ident, $fragments:ident, $services:ident, $nat:ident) => {
        /// The tables of one address family.
        mod $module {
            use super::*;

            #[map]
            static $flows: HashMap<FlowKey<$words>, Flow<$words>> = HashMap::pinned(FLOWS, 0);

            #[map]
            static $newcomers: LruHashMap<FlowKey<$words>, Flow<$words>> = LruHashMap::pinned(NEWCOMERS, 0);

            #[map]
            static $fragments: LruHashMap<FragmentKey<$words>, u32> = LruHashMap::pinned(FRAGMENTS, 0);

            #[map]
            static $services: HashMap<ServiceKey<$words>, Service> = HashMap::pinned(SERVICES, 0);

            #[map]
            static $nat: Array<NatSource<$words>> = Array::pinned(1, 0);

            impl Tables<$words> for Kernel {
                #[inline(always)]
                fn flow(&self, key: &FlowKey<$words>) -> Option<&Flow<$words>> {
                    // SAFETY: elements of a preallocated map stay readable memory; a reused one is at worst
                    // another flow's translation for one packet.
                    unsafe { $flows.get(key) }
                }

                #[inline(always)]
                fn add_flow(&self, key: &FlowKey<$words>, flow: &Flow<$words>) -> bool {
                    $flows.insert(key, flow, BPF_NOEXIST as u64).is_ok()
                }

                #[inline(always)]
                fn remove_flow(&self, key: &FlowKey<$words>) {
                    let _ = $flows.remove(key);
                }

                #[inline(always)]
                fn newcomer(&self, key: &FlowKey<$words>) -> Option<&Flow<$words>> {
                    // SAFETY: as above.
                    unsafe { $newcomers.get(key) }
                }

                #[inline(always)]
                fn add_newcomer(&self, key: &FlowKey<$words>, flow: &Flow<$words>) -> bool {
                    $newcomers.insert(key, flow, BPF_NOEXIST as u64).is_ok()
                }

                #[inline(always)]
                fn put_newcomer(&self, key: &FlowKey<$words>, flow: &Flow<$words>) -> bool {
                    $newcomers.insert(key, flow, 0).is_ok()
                }

                #[inline(always)]
                fn remove_newcomer(&self, key: &FlowKey<$words>) {
                    let _ = $newcomers.remove(key);
                }

                #[inline(always)]
                fn fragment(&self, key: &FragmentKey<$words>) -> Option<u32> {
                    // SAFETY: a number, read once.
                    unsafe { $fragments.get(key) }.copied()
                }

                #[inline(always)]
                fn put_fragment(&self, key: &FragmentKey<$words>, ports: u32) {
                    let _ = $fragments.insert(key, &ports, 0);
                }

                #[inline(always)]
                fn service(&self, key: &ServiceKey<$words>) -> Option<&Service> {
                    // SAFETY: replaced as a whole, never written in place.
                    unsafe { $services.get(key) }
                }

                #[inline(always)]
                fn place(&self, index: u32) -> Option<Place> {
                    RINGS.get(index).copied().map(Place::from_bits)
                }

                #[inline(always)]
                fn backend(&self, number: u32) -> Option<&Backend> {
                    BACKENDS.get(number)
                }

                #[inline(always)]
                fn location(&self, site: u32) -> Option<&Location> {
                    LOCATIONS.get(site)
                }

                #[inline(always)]
                fn hold(&self, backend: u32) -> Option<&HoldCounters> {
                    HOLDS.get(backend)
                }

                #[inline(always)]
                fn nat_source(&self) -> Option<&NatSource<$words>> {
                    let prefix = $nat.get(0)?;
                    // A prefix of all zeroes is an element that was never written.
                    if prefix.base[0] == 0 { None } else { Some(prefix) }
                }

                #[inline(always)]
                fn settings(&self) -> Option<&Settings> {
                    SETTINGS.get(0)
                }

                #[inline(always)]
                fn cpu_budget(&self) -> Option<&AtomicU64> {
                    // SAFETY: this CPU's own element, aligned for a word.
                    CPU_BUDGET.get_ptr_mut(0).map(|budget| unsafe { AtomicU64::from_ptr(budget) })
                }

                #[inline(always)]
                fn prefix_budget(&self, index: u32) -> Option<&AtomicU64> {
                    // SAFETY: an element of the array, aligned for a word.
                    PREFIXES.get_ptr_mut(index).map(|budget| unsafe { AtomicU64::from_ptr(budget) })
                }

                #[inline(always)]
                fn count(&self, reason: Reason) {
                    count(reason);
                }

                #[inline(always)]
                fn refuse(&self, backend: u32) {
                    refuse(backend);
                }

                #[inline(always)]
                fn account(&self, member: u32, direction: Direction, bytes: u64) {
                    traffic(member, |traffic| {
                        traffic.packets[direction as usize] += 1;
                        traffic.bytes[direction as usize] += bytes;
                    });
                }

                #[inline(always)]
                fn account_opened(&self, member: u32) {
                    traffic(member, |traffic| traffic.opened += 1);
                }

                #[inline(always)]
                fn account_reset(&self, member: u32) {
                    traffic(member, |traffic| traffic.resets += 1);
                }
            }
        }
    };
}

family!(v4, 1, FLOWS_V4, NEWCOMERS_V4, FRAGMENTS_V4, SERVICES_V4, NAT_V4);
family!(v6, 4, FLOWS_V6, NEWCOMERS_V6, FRAGMENTS_V6, SERVICES_V6, NAT_V6);
