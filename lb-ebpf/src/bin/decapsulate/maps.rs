//! What the tunnel's end knows as BPF maps, pinned by name so that they outlive the agent.

use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray};
use lb_core::decapsulate::{Address, Reason, Tunnels};

const ENDPOINTS_MOST: u32 = 64;
const SOURCES_MOST: u32 = 1024;
const DESTINATIONS_MOST: u32 = 4096;
/// Bits of an address.
const WHOLE: u32 = 128;

/// One number: the layout version of everything here.
#[map]
static LAYOUT: Array<u64> = Array::pinned(1, 0);

#[map]
static ENDPOINTS: HashMap<Address, u32> = HashMap::pinned(ENDPOINTS_MOST, 0);

/// Prefixes; an IPv4 one's length counts from the beginning of the mapped address.
#[map]
static SOURCES: LpmTrie<Address, u32> = LpmTrie::pinned(SOURCES_MOST, 0);

#[map]
static DESTINATIONS: HashMap<Address, u32> = HashMap::pinned(DESTINATIONS_MOST, 0);

#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::pinned(Reason::ALL.len() as u32, 0);

/// A key on the stack, its address where the compiler may write it in steps of eight bytes: the verifier refuses
/// those elsewhere.
#[repr(C, align(8))]
struct Aligned {
    padding: u32,
    prefix_length: u32,
    address: Address,
}

impl Aligned {
    #[inline(always)]
    fn key(&self) -> &Key<Address> {
        // SAFETY: a length and an address without anything between them are what a key is, and it is packed: no
        // place is misaligned for it. The pointer is made from the whole, so it may reach to its end.
        unsafe { &*(&raw const *self).byte_add(size_of::<u32>()).cast() }
    }
}

/// The kernel's maps.
pub struct Kernel;

impl Tunnels for Kernel {
    #[inline(always)]
    fn is_endpoint(&self, address: &Address) -> bool {
        ENDPOINTS.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn may_send(&self, address: &Address) -> bool {
        let key = Aligned { padding: 0, prefix_length: WHOLE, address: *address };
        SOURCES.get(key.key()).is_some()
    }

    #[inline(always)]
    fn is_destination(&self, address: &Address) -> bool {
        DESTINATIONS.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        count(reason);
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
