//! The data path's tables in ordinary memory.

use core::cell::{Cell, RefCell};
use core::sync::atomic::Ordering::Relaxed;
use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use crate::decide::Tables;
use crate::maglev::{NO_BACKEND, RING_SIZE};
use crate::reason::Reason;
use crate::record::{
    Backend, Direction, Flow, FlowKey, HoldCounters, Location, NatSource, Service, ServiceKey, Traffic,
};

/// Tables of one address family.
///
/// Flows are never freed, so that references into the table stay valid as they do in the kernel: fit for
/// tests, not for a daemon.
#[derive(Default)]
pub struct HostTables<const W: usize> {
    flows: RefCell<BTreeMap<FlowKey<W>, &'static Flow<W>>>,
    /// Services by key.
    pub services: BTreeMap<ServiceKey<W>, Service>,
    /// Backend numbers of all rings, one ring after the other.
    pub rings: Vec<u32>,
    /// Backends by number.
    pub backends: Vec<Backend>,
    /// Locations by site number.
    pub locations: Vec<Location>,
    /// Hold counters by backend number.
    pub holds: Vec<HoldCounters>,
    /// Source prefix towards backends.
    pub nat_source: Option<NatSource<W>>,
    reasons: [Cell<u64>; Reason::ALL.len()],
    traffic: RefCell<BTreeMap<u32, Traffic>>,
}

impl<const W: usize> HostTables<W> {
    /// How often a reason was counted.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.reasons[reason as usize].get()
    }

    /// Packets and bytes of a backend.
    pub fn traffic(&self, backend: u32) -> Traffic {
        self.traffic.borrow().get(&backend).copied().unwrap_or_default()
    }

    /// Every flow.
    pub fn flows(&self) -> BTreeMap<FlowKey<W>, &'static Flow<W>> {
        self.flows.borrow().clone()
    }

    /// Counts a capture, as the kernel program does when the ring had room.
    pub fn capture(&self, backend: u32) {
        self.holds[backend as usize].captured.fetch_add(1, Relaxed);
    }

    fn keep(flow: &Flow<W>) -> &'static Flow<W> {
        Box::leak(Box::new(Flow { seen: flow.seen.load(Relaxed).into(), ..*flow }))
    }
}

impl<const W: usize> Tables<W> for HostTables<W> {
    fn flow(&self, key: &FlowKey<W>) -> Option<&Flow<W>> {
        self.flows.borrow().get(key).copied()
    }

    fn add_flow(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
        let mut flows = self.flows.borrow_mut();
        let is_new = !flows.contains_key(key);
        if is_new {
            flows.insert(*key, Self::keep(flow));
        }
        is_new
    }

    fn put_flow(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
        self.flows.borrow_mut().insert(*key, Self::keep(flow));
        true
    }

    fn service(&self, key: &ServiceKey<W>) -> Option<&Service> {
        self.services.get(key)
    }

    fn pick(&self, ring: u32, place: u32) -> Option<u32> {
        let number = *self.rings.get((ring * RING_SIZE + place) as usize)?;
        (number != NO_BACKEND).then_some(number)
    }

    fn backend(&self, number: u32) -> Option<&Backend> {
        self.backends.get(number as usize)
    }

    fn location(&self, site: u32) -> Option<&Location> {
        self.locations.get(site as usize)
    }

    fn hold(&self, backend: u32) -> Option<&HoldCounters> {
        self.holds.get(backend as usize)
    }

    fn nat_source(&self) -> Option<&NatSource<W>> {
        self.nat_source.as_ref()
    }

    fn count(&self, reason: Reason) {
        let counter = &self.reasons[reason as usize];
        counter.set(counter.get() + 1);
    }

    fn refuse(&self, backend: u32) {
        self.holds[backend as usize].refused.fetch_add(1, Relaxed);
    }

    fn account(&self, backend: u32, direction: Direction, bytes: u64) {
        let mut traffic = self.traffic.borrow_mut();
        let traffic = traffic.entry(backend).or_default();
        traffic.packets[direction as usize] += 1;
        traffic.bytes[direction as usize] += bytes;
    }
}
