//! Writing a plan into the tables: numbers for names, records, Maglev rings, services.
//!
//! Numbers live as long as the pinned tables: flows refer to backends by number, so a name that is known keeps
//! its number, gate and locations, and a number that is given to another name gets another incarnation.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use aya::Pod;
use aya::maps::{Array, HashMap as BpfHashMap, MapData};
use lb_core::maglev::{Candidate, Turn, identity, populate};
use lb_core::record::{Backend, Link, Place, Service, ServiceKey, ServiceOptions};
use lb_core::{Gate, Slot};

use super::mapped::MappedArray;
use super::maps::{BACKENDS_MOST, Maps, RING_PLACES, RINGS_MOST, SITES_MOST};
use super::program::kernel;
use super::records::{from_bytes, to_bytes};
use super::shared::SharedTables;
use super::sites::Sites;
use crate::datapath::{BackendNumber, BackendPlan, DatapathError, Plan, Protocol, ServicePlan, SiteNumber};

const NAME: usize = 64;
/// A name's bytes, zeroes behind; all zeroes: the number is free.
pub type Names = Array<MapData, [u8; NAME]>;
/// Records of the backends.
pub type Backends = Array<MapData, [u8; size_of::<Backend>()]>;
/// Services of IPv4 addresses.
pub type ServicesV4 = BpfHashMap<MapData, [u8; size_of::<ServiceKey<1>>()], ServiceBytes>;
/// Services of IPv6 addresses.
pub type ServicesV6 = BpfHashMap<MapData, [u8; size_of::<ServiceKey<4>>()], ServiceBytes>;
type ServiceBytes = [u8; size_of::<Service>()];

/// The tables that only a plan changes.
pub struct Tables {
    backends: Backends,
    backend_names: Names,
    site_names: Names,
    rings: MappedArray<AtomicU64>,
    services_v4: ServicesV4,
    services_v6: ServicesV6,
    shared: Arc<SharedTables>,
    backend_numbers: HashMap<String, BackendNumber>,
    site_numbers: HashMap<String, SiteNumber>,
    next_hops: HashMap<SiteNumber, IpAddr>,
    /// Member number, service and backend of the last plan.
    members: Vec<(u32, String, String)>,
}

impl Tables {
    /// Takes the maps and reads the names that they know.
    pub fn new(maps: Maps, shared: Arc<SharedTables>) -> Result<Self, DatapathError> {
        let backend_numbers = names(&maps.backend_names, BACKENDS_MOST)?
            .map(|(name, number)| (name, BackendNumber(number)))
            .collect();
        let site_numbers =
            names(&maps.site_names, SITES_MOST)?.map(|(name, number)| (name, SiteNumber(number))).collect();
        Ok(Self {
            backends: maps.backends,
            backend_names: maps.backend_names,
            site_names: maps.site_names,
            rings: maps.rings,
            services_v4: maps.services_v4,
            services_v6: maps.services_v6,
            shared,
            backend_numbers,
            site_numbers,
            next_hops: HashMap::new(),
            members: Vec::new(),
        })
    }

    /// The number of a backend.
    pub fn backend(&self, name: &str) -> Option<BackendNumber> {
        self.backend_numbers.get(name).copied()
    }

    /// The member that flows of a service to a backend are counted for, as the rings' places have it.
    pub fn member(&self, _service: &str, backend: BackendNumber) -> u32 {
        backend.0
    }

    /// The number of a site.
    pub fn site(&self, name: &str) -> Option<SiteNumber> {
        self.site_numbers.get(name).copied()
    }

    /// The next hop of a site that the last plan had.
    pub fn next_hop(&self, site: SiteNumber) -> Option<IpAddr> {
        self.next_hops.get(&site).copied()
    }

    /// The name of a site, for messages.
    pub fn site_name(&self, site: SiteNumber) -> String {
        let name =
            self.site_numbers.iter().find_map(|(name, number)| (*number == site).then(|| name.clone()));
        name.unwrap_or_else(|| format!("number {}", site.0))
    }

    /// Writes a plan. Whatever can be refused is refused before the first write.
    pub fn install(&mut self, plan: &Plan, sites: &Sites) -> Result<(), DatapathError> {
        let links = probe(plan, sites)?;
        room("backend", plan.backends.len(), BACKENDS_MOST)?;
        room("site", plan.sites.len(), SITES_MOST)?;
        // One ring is always free, so that a service's choice can be replaced as a whole.
        room("service", plan.services.len(), RINGS_MOST - 1)?;

        self.forget(plan)?;
        for (site, link) in plan.sites.iter().zip(links) {
            let number = self.number_site(&site.name)?;
            self.next_hops.insert(number, site.next_hop);
            sites.keep(number, site.next_hop, link);
        }
        for backend in &plan.backends {
            self.write_backend(backend)?;
        }
        self.write_services(plan)?;
        self.members = plan
            .services
            .iter()
            .flat_map(|service| service.backends.iter().map(|backend| (&service.name, backend)))
            .map(|(service, backend)| (self.backend_numbers[backend].0, service.clone(), backend.clone()))
            .collect();
        Ok(())
    }

    /// Number, service and backend of each member.
    pub fn members(&self) -> Vec<(u32, String, String)> {
        self.members.clone()
    }

    /// Frees what a former plan had and this one has not: its flows are void from then on.
    fn forget(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        let stay: HashSet<&str> = plan.backends.iter().map(|backend| &*backend.name).collect();
        let gone: Vec<String> =
            self.backend_numbers.keys().filter(|name| !stay.contains(&***name)).cloned().collect();
        for name in gone {
            let number = self.backend_numbers.remove(&name).expect("it was among the keys");
            self.shared.store(number, self.shared.word(number).with_gate(Gate::Drop));
            set(&mut self.backend_names, number.0, [0; NAME])?;
        }
        Ok(())
    }

    fn number_site(&mut self, name: &str) -> Result<SiteNumber, DatapathError> {
        if let Some(number) = self.site_numbers.get(name) {
            return Ok(*number);
        }
        // A site that left the plan keeps its number: a backend may still be there.
        let taken: HashSet<u32> = self.site_numbers.values().map(|number| number.0).collect();
        let number = free(&taken, SITES_MOST).ok_or(full("site", SITES_MOST))?;
        set(&mut self.site_names, number, name_bytes(name))?;
        self.site_numbers.insert(name.into(), SiteNumber(number));
        Ok(SiteNumber(number))
    }

    fn write_backend(&mut self, plan: &BackendPlan) -> Result<(), DatapathError> {
        let (address, port) = (words(plan.address.ip()), plan.address.port().to_be());
        let known = self.backend_numbers.get(&plan.name).copied();
        let number = match known {
            Some(number) => number,
            None => {
                let taken: HashSet<u32> = self.backend_numbers.values().map(|number| number.0).collect();
                BackendNumber(free(&taken, BACKENDS_MOST).ok_or(full("backend", BACKENDS_MOST))?)
            }
        };
        let old: Backend = from_bytes(&self.backends.get(&number.0, 0).map_err(kernel("reading a backend"))?);
        if known.is_some() && (old.address, old.port) == (address, port) {
            return Ok(());
        }
        let site = self.site_numbers[&plan.site];
        // Under another address or another name, flows of the number's former holder must not reach it.
        let closed = self.shared.word(number).with_gate(Gate::Drop);
        let record = Backend {
            word: AtomicU64::new(closed.bits()),
            sites: old.sites,
            address,
            port,
            reserved: 0,
            incarnation: old.incarnation.wrapping_add(1),
        };
        set(&mut self.backends, number.0, to_bytes(&record))?;
        if known.is_none() {
            self.shared.stage(number, Slot::A, site);
            self.shared.stage(number, Slot::B, site);
        }
        set(&mut self.backend_names, number.0, name_bytes(&plan.name))?;
        self.backend_numbers.insert(plan.name.clone(), number);
        self.shared.store(number, closed.with_gate(Gate::Forward));
        Ok(())
    }

    fn write_services(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        let mut rings: HashSet<u32> = HashSet::new();
        let mut former: HashMap<SocketKey, u32> = HashMap::new();
        for (key, service) in entries(&self.services_v4)? {
            former.insert(SocketKey::V4(key), service.ring / RING_PLACES);
        }
        for (key, service) in entries(&self.services_v6)? {
            former.insert(SocketKey::V6(key), service.ring / RING_PLACES);
        }
        rings.extend(former.values());
        for service in &plan.services {
            let ring = free(&rings, RINGS_MOST).ok_or(full("service", RINGS_MOST - 1))?;
            self.write_ring(ring, service);
            let key = SocketKey::of(service);
            // From here on new flows pick from the new ring.
            self.put_service(key, record(ring))?;
            rings.insert(ring);
            if let Some(old) = former.remove(&key) {
                rings.remove(&old);
            }
        }
        for key in former.into_keys() {
            self.remove_service(key)?;
        }
        Ok(())
    }

    /// Writes rings anew, each to a free one, for services with other weights.
    pub fn weigh(&mut self, services: &[ServicePlan]) -> Result<(), DatapathError> {
        let mut rings: HashSet<u32> = HashSet::new();
        let mut former: HashMap<SocketKey, u32> = HashMap::new();
        for (key, service) in entries(&self.services_v4)? {
            former.insert(SocketKey::V4(key), service.ring / RING_PLACES);
        }
        for (key, service) in entries(&self.services_v6)? {
            former.insert(SocketKey::V6(key), service.ring / RING_PLACES);
        }
        rings.extend(former.values());
        for service in services {
            let key = SocketKey::of(service);
            let ring = free(&rings, RINGS_MOST).ok_or(full("service", RINGS_MOST - 1))?;
            self.write_ring(ring, service);
            self.put_service(key, record(ring))?;
            rings.insert(ring);
            if let Some(old) = former.insert(key, ring) {
                rings.remove(&old);
            }
        }
        Ok(())
    }

    fn write_ring(&self, ring: u32, service: &ServicePlan) {
        let mut members: Vec<(&String, u32)> =
            service.backends.iter().zip(service.weights.iter().copied()).collect();
        members.sort();
        let candidates: Vec<Candidate> = members
            .iter()
            .map(|(name, weight)| Candidate {
                identity: identity(name),
                number: self.backend_numbers[*name].0,
                weight: *weight,
            })
            .collect();
        let mut places = vec![0; RING_PLACES as usize];
        populate(&mut places, &candidates, &mut vec![Turn::default(); candidates.len()]);
        for (place, number) in places.into_iter().enumerate() {
            let slot = self.rings.get(ring * RING_PLACES + place as u32).expect("the ring is within the map");
            slot.store(Place::new(number, number).bits(), Relaxed);
        }
    }

    fn put_service(&mut self, key: SocketKey, service: Service) -> Result<(), DatapathError> {
        let value = to_bytes(&service);
        match key {
            SocketKey::V4(key) => self.services_v4.insert(key, value, 0),
            SocketKey::V6(key) => self.services_v6.insert(key, value, 0),
        }
        .map_err(kernel("writing a service"))
    }

    fn remove_service(&mut self, key: SocketKey) -> Result<(), DatapathError> {
        match key {
            SocketKey::V4(key) => self.services_v4.remove(&key),
            SocketKey::V6(key) => self.services_v6.remove(&key),
        }
        .map_err(kernel("removing a service"))
    }
}

fn record(ring: u32) -> Service {
    Service {
        number: ring,
        ring: ring * RING_PLACES,
        places: RING_PLACES,
        options: ServiceOptions::default(),
    }
}

/// A service's key in the table of its family.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum SocketKey {
    V4([u8; size_of::<ServiceKey<1>>()]),
    V6([u8; size_of::<ServiceKey<4>>()]),
}

impl SocketKey {
    fn of(service: &ServicePlan) -> Self {
        let protocol = match service.protocol {
            Protocol::Tcp => lb_core::decide::TCP,
            Protocol::Udp => lb_core::decide::UDP,
        } as u16;
        let port = service.address.port().to_be();
        let [a, b, c, d] = words(service.address.ip());
        match service.address {
            SocketAddr::V4(_) => Self::V4(to_bytes(&ServiceKey { address: [d], port, protocol })),
            SocketAddr::V6(_) => Self::V6(to_bytes(&ServiceKey { address: [a, b, c, d], port, protocol })),
        }
    }
}

/// Every site's link, or the first site that cannot be reached.
fn probe(plan: &Plan, sites: &Sites) -> Result<Vec<Link>, DatapathError> {
    plan.sites
        .iter()
        .map(|site| {
            sites.probe(site.next_hop).map_err(|error| DatapathError::Unreachable {
                site: site.name.clone(),
                reason: error.to_string(),
            })
        })
        .collect()
}

/// An address as the tables have it: words as on the wire, IPv4 in the last one.
pub fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(v4) => [0, 0, 0, u32::from_ne_bytes(v4.octets())],
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            std::array::from_fn(|i| {
                u32::from_ne_bytes([octets[4 * i], octets[4 * i + 1], octets[4 * i + 2], octets[4 * i + 3]])
            })
        }
    }
}

fn room(what: &'static str, wanted: usize, most: u32) -> Result<(), DatapathError> {
    if wanted > most as usize { Err(full(what, most)) } else { Ok(()) }
}

fn full(what: &'static str, most: u32) -> DatapathError {
    DatapathError::Full { what, most }
}

fn free(taken: &HashSet<u32>, most: u32) -> Option<u32> {
    (0..most).find(|number| !taken.contains(number))
}

fn set<V: Pod>(array: &mut Array<MapData, V>, index: u32, value: V) -> Result<(), DatapathError> {
    array.set(index, value, 0).map_err(kernel("writing a table"))
}

fn entries<K: Pod>(map: &BpfHashMap<MapData, K, ServiceBytes>) -> Result<Vec<(K, Service)>, DatapathError> {
    map.iter()
        .map(|entry| entry.map(|(key, value)| (key, from_bytes(&value))))
        .collect::<Result<_, _>>()
        .map_err(kernel("reading the services"))
}

fn name_bytes(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let length = name.len().min(NAME);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

fn names(table: &Names, most: u32) -> Result<impl Iterator<Item = (String, u32)>, DatapathError> {
    let mut found = Vec::new();
    for number in 0..most {
        let bytes = table.get(&number, 0).map_err(kernel("reading the names"))?;
        let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(NAME);
        if length > 0 {
            found.push((String::from_utf8_lossy(&bytes[..length]).into_owned(), number));
        }
    }
    Ok(found.into_iter())
}
