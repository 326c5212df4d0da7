//! The data path's tables as BPF maps, pinned by name so that they outlive the daemon.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use lb_core::maglev::{NO_BACKEND, RING_SIZE};
use lb_core::record::{
    Backend, Direction, Flow, FlowKey, HoldCounters, Location, NatSource, Service, ServiceKey, Traffic,
};
use lb_core::{Reason, Tables};

use crate::atomic::increment;

// Defaults; the loader sets the sizes that the configuration asks for.
const FLOWS: u32 = 262_144;
const SERVICES: u32 = 1024;
const BACKENDS_MOST: u32 = 4096;
const SITES_MOST: u32 = 256;
const RINGS_MOST: u32 = 64;
const CAPTURE_BYTES: u32 = 64 << 20;

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

/// Maglev rings, one after the other. The kernel spends eight bytes on an element in any case.
#[map]
static RINGS: Array<u64> = Array::pinned(RINGS_MOST * RING_SIZE, MMAPABLE);

#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::pinned(Reason::ALL.len() as u32, 0);

#[map]
static TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::pinned(BACKENDS_MOST, 0);

#[map]
pub static CAPTURE: RingBuf = RingBuf::pinned(CAPTURE_BYTES, 0);

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

macro_rules! family {
    ($module:ident, $words:literal, $flows:ident, $services:ident, $nat:ident) => {
        /// The tables of one address family.
        pub mod $module {
            use super::*;

            #[map]
            static $flows: LruHashMap<FlowKey<$words>, Flow<$words>> = LruHashMap::pinned(FLOWS, 0);

            #[map]
            static $services: HashMap<ServiceKey<$words>, Service> = HashMap::pinned(SERVICES, 0);

            #[map]
            static $nat: Array<NatSource<$words>> = Array::pinned(1, 0);

            /// The kernel's maps as tables.
            pub struct Kernel;

            impl Tables<$words> for Kernel {
                #[inline(always)]
                fn flow(&self, key: &FlowKey<$words>) -> Option<&Flow<$words>> {
                    // SAFETY: elements of a preallocated LRU map stay readable memory; a reused one is at
                    // worst another flow's translation for one packet, as with every LRU flow table.
                    unsafe { $flows.get(key) }
                }

                #[inline(always)]
                fn add_flow(&self, key: &FlowKey<$words>, flow: &Flow<$words>) -> bool {
                    $flows.insert(key, flow, aya_ebpf::bindings::BPF_NOEXIST as u64).is_ok()
                }

                #[inline(always)]
                fn put_flow(&self, key: &FlowKey<$words>, flow: &Flow<$words>) -> bool {
                    $flows.insert(key, flow, 0).is_ok()
                }

                #[inline(always)]
                fn service(&self, key: &ServiceKey<$words>) -> Option<&Service> {
                    // SAFETY: replaced as a whole, never written in place.
                    unsafe { $services.get(key) }
                }

                #[inline(always)]
                fn pick(&self, ring: u32, place: u32) -> Option<u32> {
                    let number = *RINGS.get(ring * RING_SIZE + place)? as u32;
                    if number == NO_BACKEND { None } else { Some(number) }
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
                fn count(&self, reason: Reason) {
                    count(reason);
                }

                #[inline(always)]
                fn refuse(&self, backend: u32) {
                    refuse(backend);
                }

                #[inline(always)]
                fn account(&self, backend: u32, direction: Direction, bytes: u64) {
                    if let Some(traffic) = TRAFFIC.get_ptr_mut(backend) {
                        // SAFETY: this CPU's own element, and the program is not preempted by itself.
                        unsafe {
                            (*traffic).packets[direction as usize] += 1;
                            (*traffic).bytes[direction as usize] += bytes;
                        }
                    }
                }
            }
        }
    };
}

family!(v4, 1, FLOWS_V4, SERVICES_V4, NAT_V4);
family!(v6, 4, FLOWS_V6, SERVICES_V6, NAT_V6);
