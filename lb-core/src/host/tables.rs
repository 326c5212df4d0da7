//! The data path's tables in ordinary memory.

use core::cell::{Cell, OnceCell, RefCell};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use crate::flow::{Direction, Flow, FlowKey};
use crate::name::FragmentKey;
use crate::reason::Reason;
use crate::record::{
    Backend, HoldCounters, Location, NatSource, PREFIX_BUDGETS, Place, Service, ServiceKey, Settings, Traffic,
};
use crate::tables::Tables;

type FlowTable<const W: usize> = RefCell<BTreeMap<FlowKey<W>, &'static Flow<W>>>;

/// Tables of one address family.
///
/// Flows are never freed, so that references into the table stay valid as they do in the kernel: fit for
/// tests, not for a daemon. Nothing is pushed out of the newcomers either.
pub struct HostTables<const W: usize> {
    flows: FlowTable<W>,
    newcomers: FlowTable<W>,
    fragments: RefCell<BTreeMap<FragmentKey<W>, u32>>,
    /// Services by key.
    pub services: BTreeMap<ServiceKey<W>, Service>,
    /// Places of all rings, one ring after the other.
    pub places: Vec<Place>,
    /// Backends by number.
    pub backends: Vec<Backend>,
    /// Locations by site number.
    pub locations: Vec<Location>,
    /// Hold counters by backend number.
    pub holds: Vec<HoldCounters>,
    /// Source prefix towards backends.
    pub nat_source: Option<NatSource<W>>,
    /// Bounds and switches.
    pub settings: Settings,
    cpu_budget: AtomicU64,
    /// Made when the first one is asked for: most tables bound nothing, and fuzzers make many.
    prefix_budgets: OnceCell<Vec<AtomicU64>>,
    reasons: [Cell<u64>; Reason::ALL.len()],
    traffic: RefCell<BTreeMap<u32, Traffic>>,
}

impl<const W: usize> Default for HostTables<W> {
    fn default() -> Self {
        Self {
            flows: RefCell::default(),
            newcomers: RefCell::default(),
            fragments: RefCell::default(),
            services: BTreeMap::new(),
            places: Vec::new(),
            backends: Vec::new(),
            locations: Vec::new(),
            holds: Vec::new(),
            nat_source: None,
            settings: Settings::default(),
            cpu_budget: AtomicU64::default(),
            prefix_budgets: OnceCell::new(),
            reasons: [const { Cell::new(0) }; Reason::ALL.len()],
            traffic: RefCell::default(),
        }
    }
}

impl<const W: usize> HostTables<W> {
    /// How often a reason was counted.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.reasons[reason as usize].get()
    }

    /// Packets and bytes of a member.
    pub fn traffic(&self, member: u32) -> Traffic {
        self.traffic.borrow().get(&member).copied().unwrap_or_default()
    }

    /// Every established flow.
    pub fn flows(&self) -> BTreeMap<FlowKey<W>, &'static Flow<W>> {
        self.flows.borrow().clone()
    }

    /// Every newcomer.
    pub fn newcomers(&self) -> BTreeMap<FlowKey<W>, &'static Flow<W>> {
        self.newcomers.borrow().clone()
    }

    /// Counts a capture, as the kernel program does when the ring had room.
    pub fn capture(&self, backend: u32) {
        self.holds[backend as usize].captured.fetch_add(1, Relaxed);
    }

    fn keep(flow: &Flow<W>) -> &'static Flow<W> {
        let (seen, state) = (flow.seen.load(Relaxed), flow.state.load(Relaxed));
        Box::leak(Box::new(Flow { seen: seen.into(), state: state.into(), ..*flow }))
    }

    fn add(table: &FlowTable<W>, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
        let mut flows = table.borrow_mut();
        let is_new = !flows.contains_key(key);
        if is_new {
            flows.insert(*key, Self::keep(flow));
        }
        is_new
    }

    fn change(&self, member: u32, change: impl FnOnce(&mut Traffic)) {
        change(self.traffic.borrow_mut().entry(member).or_default());
    }
}

impl<const W: usize> Tables<W> for HostTables<W> {
    fn flow(&self, key: &FlowKey<W>) -> Option<&Flow<W>> {
        self.flows.borrow().get(key).copied()
    }

    fn add_flow(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
        Self::add(&self.flows, key, flow)
    }

    fn remove_flow(&self, key: &FlowKey<W>) {
        self.flows.borrow_mut().remove(key);
    }

    fn newcomer(&self, key: &FlowKey<W>) -> Option<&Flow<W>> {
        self.newcomers.borrow().get(key).copied()
    }

    fn add_newcomer(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
        Self::add(&self.newcomers, key, flow)
    }

    fn put_newcomer(&self, key: &FlowKey<W>, flow: &Flow<W>) -> bool {
        self.newcomers.borrow_mut().insert(*key, Self::keep(flow));
        true
    }

    fn remove_newcomer(&self, key: &FlowKey<W>) {
        self.newcomers.borrow_mut().remove(key);
    }

    fn fragment(&self, key: &FragmentKey<W>) -> Option<u32> {
        self.fragments.borrow().get(key).copied()
    }

    fn put_fragment(&self, key: &FragmentKey<W>, ports: u32) {
        self.fragments.borrow_mut().insert(*key, ports);
    }

    fn service(&self, key: &ServiceKey<W>) -> Option<&Service> {
        self.services.get(key)
    }

    fn place(&self, index: u32) -> Option<Place> {
        self.places.get(index as usize).copied()
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

    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn cpu_budget(&self) -> Option<&AtomicU64> {
        Some(&self.cpu_budget)
    }

    fn prefix_budget(&self, index: u32) -> Option<&AtomicU64> {
        let all = || (0..PREFIX_BUDGETS).map(|_| AtomicU64::default()).collect();
        self.prefix_budgets.get_or_init(all).get(index as usize)
    }

    fn count(&self, reason: Reason) {
        let counter = &self.reasons[reason as usize];
        counter.set(counter.get() + 1);
    }

    fn refuse(&self, backend: u32) {
        self.holds[backend as usize].refused.fetch_add(1, Relaxed);
    }

    fn account(&self, member: u32, direction: Direction, bytes: u64) {
        self.change(member, |traffic| {
            traffic.packets[direction as usize] += 1;
            traffic.bytes[direction as usize] += bytes;
        });
    }

    fn account_opened(&self, member: u32) {
        self.change(member, |traffic| traffic.opened += 1);
    }

    fn account_reset(&self, member: u32) {
        self.change(member, |traffic| traffic.resets += 1);
    }
}
