//! Services, their members and rings.
//!
//! A ring is never changed in place: the new one is written to a free region, the service's record is replaced, and
//! the old region is free when the next change comes: no packet is still looking there by then.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use aya::Pod;
use aya::maps::{HashMap as BpfHashMap, MapData, PerCpuArray, PerCpuValues};
use lb_core::maglev::ring_size;
use lb_core::record::{Place, Service, ServiceKey, ServiceOptions, Traffic};

use super::numbers::{Members, Numbers, pack};
use super::regions::{Region, Regions};
use super::ring::{Seat, ring};
use super::{Known, words};
use crate::datapath::xdp::mapped::MappedArray;
use crate::datapath::xdp::program::kernel;
use crate::datapath::xdp::records::{from_bytes, to_bytes};
use crate::datapath::{DatapathError, DuringHold, Mode, Plan, Protocol, ServicePlan};

/// Services of IPv4 addresses.
pub type ServicesV4 = BpfHashMap<MapData, [u8; size_of::<ServiceKey<1>>()], ServiceBytes>;
/// Services of IPv6 addresses.
pub type ServicesV6 = BpfHashMap<MapData, [u8; size_of::<ServiceKey<4>>()], ServiceBytes>;
/// Counters of the members.
pub type TrafficTable = PerCpuArray<MapData, [u8; size_of::<Traffic>()]>;
type ServiceBytes = [u8; size_of::<Service>()];

/// IP protocol numbers whose services answer echo.
const ICMP: u16 = 1;
const ICMP_V6: u16 = 58;

/// The maps that services are written to.
pub struct ServiceMaps {
    /// By address, IPv4.
    pub v4: ServicesV4,
    /// By address, IPv6.
    pub v6: ServicesV6,
    /// Services that each of the two has room for.
    pub most: u32,
    /// Places of all rings.
    pub rings: MappedArray<AtomicU64>,
    /// Which pair a member is.
    pub members: MappedArray<AtomicU64>,
    /// To clear a member's counters when its number is given out.
    pub traffic: TrafficTable,
}

/// A service that is in the tables.
struct Installed {
    number: u32,
    region: Region,
    options: ServiceOptions,
    /// What it was made of; `None`: a former daemon made it.
    plan: Option<ServicePlan>,
}

/// What the tables have of services.
pub struct Services {
    maps: ServiceMaps,
    installed: HashMap<Key, Installed>,
    /// Numbers of the last plan's services.
    by_name: HashMap<String, u32>,
    /// Virtual addresses that answer echo.
    echoes: HashSet<Key>,
    numbers: Numbers,
    members: Members,
    regions: Regions,
    /// Regions that were given up: free again when a while has passed, for packets that still look there.
    retired: Vec<Region>,
}

impl Services {
    /// Takes the maps and reads what a former daemon left in them.
    pub fn new(maps: ServiceMaps) -> Result<Self, DatapathError> {
        let mut entries: Vec<(Key, Service)> = Vec::new();
        entries.extend(read(&maps.v4)?.map(|(key, service)| (Key::V4(key), service)));
        entries.extend(read(&maps.v6)?.map(|(key, service)| (Key::V6(key), service)));
        let table: Vec<u64> = maps.members.iter().map(|member| member.load(Relaxed)).collect();
        let mut regions = Regions::new(maps.rings.length());
        let (mut installed, mut echoes) = (HashMap::new(), HashSet::new());
        for (key, service) in entries {
            if key.is_echo() {
                echoes.insert(key);
                continue;
            }
            let region = Region { start: service.ring, length: service.places };
            // A region that is nobody's or somebody else's is left alone; the service gets another one.
            let ours = region.length == 0 || regions.reserve(region);
            let region = if ours { region } else { Region::default() };
            let Service { number, options, .. } = service;
            installed.insert(key, Installed { number, region, options, plan: None });
        }
        let numbers = Numbers::new(1..maps.most + 1, installed.values().map(|service| service.number));
        let members = Members::new(&table);
        let (by_name, retired) = Default::default();
        Ok(Self { members, maps, installed, by_name, echoes, numbers, regions, retired })
    }

    /// The members.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// The number of a service of the last plan.
    pub fn number(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Names of the services by number.
    pub fn names(&self) -> HashMap<u32, &str> {
        self.by_name.iter().map(|(name, number)| (*number, &**name)).collect()
    }

    /// Whether a plan fits: services, members, and regions for the rings that change, each while the one that it
    /// replaces still stands.
    pub fn check_room(&self, plan: &Plan) -> Result<(), DatapathError> {
        let keys: HashSet<Key> = plan.services.iter().map(Key::of).collect();
        let new = keys.iter().filter(|key| !self.installed.contains_key(key)).count();
        if plan.services.len() > self.maps.most as usize || new > self.numbers.left() {
            return Err(DatapathError::Full { what: "service", most: self.maps.most });
        }
        let most = self.maps.members.length();
        let pairs: usize = plan.services.iter().map(|service| service.backends.len()).sum();
        if pairs > most as usize {
            return Err(DatapathError::Full { what: "pair of a service and a backend", most });
        }
        let mut regions = self.regions.clone();
        self.retired.iter().for_each(|region| regions.give(*region));
        for service in &plan.services {
            let former = self.installed.get(&Key::of(service));
            if former.and_then(|former| former.plan.as_ref()) == Some(service) {
                continue;
            }
            let places = ring_size(service.backends.len());
            let full = DatapathError::Full { what: "place in a ring", most: self.maps.rings.length() };
            regions.take(places).ok_or(full)?;
            regions.give(former.map(|former| former.region).unwrap_or_default());
        }
        Ok(())
    }

    /// Writes what a plan has otherwise.
    pub fn write(&mut self, plan: &Plan, known: &HashMap<String, Known>) -> Result<(), DatapathError> {
        self.free_retired();
        self.make_room_for_members(plan, known)?;
        let mut gone: HashSet<Key> = self.installed.keys().copied().collect();
        for service in &plan.services {
            let key = Key::of(service);
            gone.remove(&key);
            self.write_one(key, service, known)?;
        }
        for key in gone {
            self.remove(&key)?;
            if let Some(service) = self.installed.remove(&key) {
                self.retired.push(service.region);
                self.numbers.give(service.number);
            }
        }
        let number = |service: &ServicePlan| self.installed.get(&Key::of(service)).map(|it| it.number);
        let named = |service: &ServicePlan| Some((service.name.clone(), number(service)?));
        self.by_name = plan.services.iter().filter_map(named).collect();
        self.write_echoes(plan)?;
        self.forget_members(plan, known);
        Ok(())
    }

    /// Other rings for services of the last plan.
    pub fn weigh(
        &mut self,
        services: &[ServicePlan],
        known: &HashMap<String, Known>,
    ) -> Result<(), DatapathError> {
        self.free_retired();
        services.iter().try_for_each(|service| self.weigh_one(service, known))
    }

    fn free_retired(&mut self) {
        for region in std::mem::take(&mut self.retired) {
            self.regions.give(region);
        }
    }

    fn weigh_one(
        &mut self,
        service: &ServicePlan,
        known: &HashMap<String, Known>,
    ) -> Result<(), DatapathError> {
        let key = Key::of(service);
        let same = |plan: &ServicePlan| plan.name == service.name && plan.backends == service.backends;
        let is_ours = self.installed.get(&key).and_then(|known| known.plan.as_ref()).is_some_and(same);
        // A plan that came in between has other services; it was given the weights as well.
        if is_ours { self.write_one(key, service, known) } else { Ok(()) }
    }

    fn write_one(
        &mut self,
        key: Key,
        service: &ServicePlan,
        known: &HashMap<String, Known>,
    ) -> Result<(), DatapathError> {
        let former = self.installed.get(&key);
        if former.and_then(|former| former.plan.as_ref()) == Some(service) {
            return Ok(());
        }
        let options = options(service);
        let full = DatapathError::Full { what: "service", most: self.maps.most };
        let number = match former {
            Some(former) => former.number,
            None => self.numbers.take().ok_or(full)?,
        };
        let old = former.map(|former| former.region).unwrap_or_default();
        let unchanged_options = former.is_some_and(|former| former.options == options);
        let places = ring(self.seats(number, service, known)?);
        let region = if self.holds(old, &places) { old } else { self.put_ring(&places)? };
        if region != old || !unchanged_options {
            let record = Service { number, ring: region.start, places: region.length, options };
            // From here on new flows pick from the new ring.
            self.put(&key, record)?;
        }
        if region != old {
            self.retired.push(old);
        }
        self.installed.insert(key, Installed { number, region, options, plan: Some(service.clone()) });
        Ok(())
    }

    fn seats(
        &mut self,
        number: u32,
        service: &ServicePlan,
        known: &HashMap<String, Known>,
    ) -> Result<Vec<Seat>, DatapathError> {
        let mut seats = Vec::with_capacity(service.backends.len());
        for (name, weight) in service.backends.iter().zip(&service.weights) {
            let Some(Known { number: backend, identity }) = known.get(name).copied() else { continue };
            let member = match self.members.number(number, backend.0) {
                Some(member) => member,
                None => self.add_member(number, backend.0)?,
            };
            seats.push(Seat { identity, place: Place::new(backend.0, member), weight: *weight });
        }
        Ok(seats)
    }

    fn add_member(&mut self, service: u32, backend: u32) -> Result<u32, DatapathError> {
        let most = self.maps.members.length();
        let full = DatapathError::Full { what: "pair of a service and a backend", most };
        let member = self.members.add(service, backend).ok_or(full)?;
        // What the number's former holder carried is not ours.
        let nothing = aya::util::nr_cpus()
            .map_err(|(_, error)| error)
            .and_then(|cpus| PerCpuValues::try_from(vec![[0; size_of::<Traffic>()]; cpus]))
            .map_err(kernel("counting the processors"))?;
        self.maps.traffic.set(member, nothing, 0).map_err(kernel("clearing a member's counters"))?;
        let slot = self.maps.members.get(member).expect("numbers are given out below the table's size");
        slot.store(pack(service, backend), Relaxed);
        Ok(member)
    }

    /// Frees members that no plan wants, when there would not be enough otherwise: their counters go with them.
    fn make_room_for_members(
        &mut self,
        plan: &Plan,
        known: &HashMap<String, Known>,
    ) -> Result<(), DatapathError> {
        let pairs: usize = plan.services.iter().map(|service| service.backends.len()).sum();
        if pairs <= self.members.left() {
            return Ok(());
        }
        let mut wanted: HashSet<(u32, u32)> = HashSet::new();
        for service in &plan.services {
            let Some(number) = self.installed.get(&Key::of(service)).map(|service| service.number) else {
                continue;
            };
            let backends = service.backends.iter().filter_map(|name| known.get(name));
            wanted.extend(backends.map(|backend| (number, backend.number.0)));
        }
        self.free_members(|service, backend| wanted.contains(&(service, backend)));
        Ok(())
    }

    /// Frees the members of services and backends that are gone: another one may get their number.
    fn forget_members(&mut self, plan: &Plan, known: &HashMap<String, Known>) {
        let services: HashSet<u32> = self.installed.values().map(|service| service.number).collect();
        let backends: HashSet<u32> = plan
            .backends
            .iter()
            .filter_map(|backend| known.get(&backend.name))
            .map(|backend| backend.number.0)
            .collect();
        self.free_members(|service, backend| services.contains(&service) && backends.contains(&backend));
    }

    fn free_members(&mut self, stays: impl FnMut(u32, u32) -> bool) {
        for member in self.members.retain(stays) {
            if let Some(slot) = self.maps.members.get(member) {
                slot.store(0, Relaxed);
            }
        }
    }

    /// Whether a region holds these places already.
    fn holds(&self, region: Region, places: &[u64]) -> bool {
        region.length as usize == places.len()
            && (region.start..).zip(places).all(|(index, place)| {
                self.maps.rings.get(index).is_some_and(|slot| slot.load(Relaxed) == *place)
            })
    }

    fn put_ring(&mut self, places: &[u64]) -> Result<Region, DatapathError> {
        let length = u32::try_from(places.len()).expect("rings are short");
        let full = DatapathError::Full { what: "place in a ring", most: self.maps.rings.length() };
        let region = match self.regions.take(length) {
            Some(region) => region,
            None => {
                self.free_retired();
                self.regions.take(length).ok_or(full)?
            }
        };
        for (index, place) in (region.start..).zip(places) {
            self.maps.rings.get(index).expect("regions lie within the table").store(*place, Relaxed);
        }
        Ok(region)
    }

    /// Lets each virtual address answer echo.
    fn write_echoes(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        let wanted: HashSet<Key> = plan.services.iter().map(Key::echo_of).collect();
        let nothing = Service { number: 0, ring: 0, places: 0, options: ServiceOptions::default() };
        for key in wanted.difference(&self.echoes) {
            self.maps.put(key, nothing)?;
        }
        for key in self.echoes.difference(&wanted) {
            self.maps.remove(key)?;
        }
        self.echoes = wanted;
        Ok(())
    }

    fn put(&mut self, key: &Key, service: Service) -> Result<(), DatapathError> {
        self.maps.put(key, service)
    }

    fn remove(&mut self, key: &Key) -> Result<(), DatapathError> {
        self.maps.remove(key)
    }
}

impl ServiceMaps {
    fn put(&mut self, key: &Key, service: Service) -> Result<(), DatapathError> {
        let value = to_bytes(&service);
        match key {
            Key::V4(key) => self.v4.insert(key, value, 0),
            Key::V6(key) => self.v6.insert(key, value, 0),
        }
        .map_err(kernel("writing a service"))
    }

    fn remove(&mut self, key: &Key) -> Result<(), DatapathError> {
        match key {
            Key::V4(key) => self.v4.remove(key),
            Key::V6(key) => self.v6.remove(key),
        }
        .map_err(kernel("removing a service"))
    }
}

fn options(service: &ServicePlan) -> ServiceOptions {
    let mode = match service.mode {
        Mode::Nat => lb_core::Mode::Nat,
        Mode::Transparent => lb_core::Mode::Transparent,
        Mode::Dsr => lb_core::Mode::Dsr,
    };
    ServiceOptions::new(mode, service.during_hold == DuringHold::Steer)
}

/// A service's key in the table of its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    V4([u8; size_of::<ServiceKey<1>>()]),
    V6([u8; size_of::<ServiceKey<4>>()]),
}

impl Key {
    fn of(service: &ServicePlan) -> Self {
        let protocol = match service.protocol {
            Protocol::Tcp => lb_core::decide::TCP,
            Protocol::Udp => lb_core::decide::UDP,
        };
        Self::new(service.address, service.address.port().to_be(), protocol.into())
    }

    fn echo_of(service: &ServicePlan) -> Self {
        Self::new(service.address, 0, if service.address.is_ipv4() { ICMP } else { ICMP_V6 })
    }

    fn new(address: SocketAddr, port: u16, protocol: u16) -> Self {
        let [a, b, c, d] = words(address.ip());
        match address {
            SocketAddr::V4(_) => Self::V4(to_bytes(&ServiceKey { address: [d], port, protocol })),
            SocketAddr::V6(_) => Self::V6(to_bytes(&ServiceKey { address: [a, b, c, d], port, protocol })),
        }
    }

    fn is_echo(&self) -> bool {
        let protocol = match self {
            Self::V4(key) => from_bytes::<_, ServiceKey<1>>(key).protocol,
            Self::V6(key) => from_bytes::<_, ServiceKey<4>>(key).protocol,
        };
        matches!(protocol, ICMP | ICMP_V6)
    }
}

fn read<K: Pod>(
    map: &BpfHashMap<MapData, K, ServiceBytes>,
) -> Result<impl Iterator<Item = (K, Service)> + use<K>, DatapathError> {
    let entries: Vec<_> = map
        .iter()
        .map(|entry| entry.map(|(key, value)| (key, from_bytes(&value))))
        .collect::<Result<_, _>>()
        .map_err(kernel("reading the services"))?;
    Ok(entries.into_iter())
}
