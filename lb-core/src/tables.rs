//! The tables that decisions read and write, wherever they are kept: BPF maps, or memory of the host.

use core::sync::atomic::AtomicU64;

use crate::flow::{Direction, Flow, FlowKey};
use crate::name::FragmentKey;
use crate::reason::Reason;
use crate::record::{Backend, HoldCounters, Location, NatSource, Place, Service, ServiceKey, Settings};

/// The tables of one address family.
pub trait Tables<const W: usize> {
    /// The established flow of a packet.
    fn flow(&self, key: &FlowKey<W>) -> Option<&Flow<W>>;
    /// Adds an established flow; false where there is one of that key, or no room.
    fn add_flow(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool;
    /// Removes an established flow.
    fn remove_flow(&self, key: &FlowKey<W>);
    /// The newcomer of a packet.
    fn newcomer(&self, key: &FlowKey<W>) -> Option<&Flow<W>>;
    /// Adds a newcomer where there is none of that key; false where there is one, or no room.
    fn add_newcomer(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool;
    /// Writes a newcomer, over one of the same key too; false where there is no room.
    fn put_newcomer(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool;
    /// Removes a newcomer.
    fn remove_newcomer(&self, key: &FlowKey<W>);
    /// The ports of the datagram that a fragment is a part of.
    fn fragment(&self, key: &FragmentKey<W>) -> Option<u32>;
    /// Remembers the ports of a datagram.
    fn put_fragment(&self, key: &FragmentKey<W>, ports: u32);
    /// The service at an address.
    fn service(&self, key: &ServiceKey<W>) -> Option<&Service>;
    /// A place among all rings' places.
    fn place(&self, index: u32) -> Option<Place>;
    /// A backend's record.
    fn backend(&self, number: u32) -> Option<&Backend>;
    /// A site's location.
    fn location(&self, site: u32) -> Option<&Location>;
    /// A backend's hold counters.
    fn hold(&self, backend: u32) -> Option<&HoldCounters>;
    /// Source prefix towards backends.
    fn nat_source(&self) -> Option<&NatSource<W>>;
    /// Bounds and switches.
    fn settings(&self) -> Option<&Settings>;
    /// Window and count of new flows of this CPU.
    fn cpu_budget(&self) -> Option<&AtomicU64>;
    /// Window and count of new flows of a source prefix, one of [`crate::record::PREFIX_BUDGETS`].
    fn prefix_budget(&self, index: u32) -> Option<&AtomicU64>;
    /// Counts a packet.
    fn count(&self, reason: Reason);
    /// Counts a packet that the backend's hold did not keep.
    fn refuse(&self, backend: u32);
    /// Counts a packet of a member.
    fn account(&self, member: u32, direction: Direction, bytes: u64);
    /// Counts a new flow of a member.
    fn account_opened(&self, member: u32);
    /// Counts a reset from a member's backend.
    fn account_reset(&self, member: u32);
}
