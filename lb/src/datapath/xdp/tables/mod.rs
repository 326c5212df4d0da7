//! Making the tables say what a plan says: numbers for names, records, Maglev rings, services.
//!
//! Numbers live as long as the pinned tables: flows refer to backends by number, so a name that is known keeps
//! its number, gate and locations, and a number that is given to another name gets another incarnation. What a
//! plan has as before is not touched. The order of writes is: sites, backends that are new, rings, services; and
//! only when no ring leads to them any more, backends that are gone.

mod names;
mod numbers;
mod regions;
mod ring;
mod services;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use aya::Pod;
use aya::maps::{Array, MapData};
use lb_core::maglev::identity;
use lb_core::record::{Backend, Location};
use lb_core::{Gate, Slot};

pub use self::names::Names;
use self::names::name_bytes;
use self::numbers::Numbers;
use self::services::Services;
pub use self::services::{ServiceMaps, TrafficTable};
use super::locator::Locator;
use super::maps::Maps;
use super::program::kernel;
use super::records::to_bytes;
use super::shared::SharedTables;
use super::sites::Sites;
use crate::datapath::{BackendNumber, BackendPlan, DatapathError, Mode, Plan, ServicePlan, SiteNumber};

/// Records of the backends.
pub type Backends = Array<MapData, [u8; size_of::<Backend>()]>;

/// A backend that has a number.
#[derive(Clone, Copy)]
struct Known {
    number: BackendNumber,
    /// Hash of its name.
    identity: u64,
}

/// The tables that only a plan changes.
pub struct Tables {
    backends: Backends,
    backend_names: Names,
    site_names: Names,
    services: Services,
    shared: Arc<SharedTables>,
    known: HashMap<String, Known>,
    backend_numbers: Numbers,
    sites: HashMap<String, SiteNumber>,
    site_numbers: Numbers,
    sites_most: u32,
    backends_most: u32,
    /// How the last plan's sites are reached.
    locators: HashMap<SiteNumber, Locator>,
    /// Backends whose packets need a tunnel, and the family that it has to carry.
    tunnelled: HashMap<BackendNumber, IpAddr>,
}

impl Tables {
    /// Takes the maps and reads what a former daemon left in them.
    pub fn new(maps: Maps, shared: Arc<SharedTables>) -> Result<Self, DatapathError> {
        let known: HashMap<String, Known> = maps
            .backend_names
            .read()?
            .into_iter()
            .map(|(name, number)| {
                let identity = identity(&name);
                (name, Known { number: BackendNumber(number), identity })
            })
            .collect();
        let sites: HashMap<String, SiteNumber> =
            maps.site_names.read()?.into_iter().map(|(name, number)| (name, SiteNumber(number))).collect();
        let (backends_most, sites_most) = (maps.backend_names.most(), maps.site_names.most());
        let taken = known.values().map(|known| known.number.0);
        let backend_numbers = Numbers::new(0..backends_most, taken);
        let site_numbers = Numbers::new(0..sites_most, sites.values().map(|number| number.0));
        Ok(Self {
            backends: maps.backends,
            backend_names: maps.backend_names,
            site_names: maps.site_names,
            services: Services::new(maps.services)?,
            shared,
            known,
            backend_numbers,
            sites,
            site_numbers,
            sites_most,
            backends_most,
            locators: HashMap::new(),
            tunnelled: HashMap::new(),
        })
    }

    /// The number of a backend.
    pub fn backend(&self, name: &str) -> Option<BackendNumber> {
        self.known.get(name).map(|known| known.number)
    }

    /// The member that flows of a service to a backend are counted for, as the rings' places have it.
    pub fn member(&self, service: &str, backend: BackendNumber) -> u32 {
        let member =
            self.services.number(service).and_then(|it| self.services.members().number(it, backend.0));
        // Of a pair that there is not: beyond the table, so that nothing is counted.
        member.unwrap_or(u32::MAX)
    }

    /// The number of a site.
    pub fn site(&self, name: &str) -> Option<SiteNumber> {
        self.sites.get(name).copied()
    }

    /// How a site of the last plan is reached, by a backend's packets; why it cannot be.
    pub fn locator(&self, site: SiteNumber, backend: BackendNumber) -> Result<Locator, String> {
        let locator = self.locators.get(&site).ok_or("it is not in the configuration any more")?;
        match (self.tunnelled.get(&backend), locator.tunnel) {
            (None, _) => {}
            (Some(_), None) => return Err("it has no tunnel, which mode = \"dsr\" needs".to_owned()),
            (Some(address), Some(tunnel)) if address.is_ipv6() && tunnel.endpoint.is_ipv4() => {
                return Err("its IPv4 tunnel does not carry the backend's IPv6".to_owned());
            }
            (Some(_), Some(_)) => {}
        }
        Ok(*locator)
    }

    /// The name of a site, for messages.
    pub fn site_name(&self, site: SiteNumber) -> String {
        let name = self.sites.iter().find_map(|(name, number)| (*number == site).then(|| name.clone()));
        name.unwrap_or_else(|| format!("number {}", site.0))
    }

    /// Members of a backend.
    pub fn members_of(&self, backend: BackendNumber) -> Vec<u32> {
        self.services.members().of_backend(backend.0).to_vec()
    }

    /// Every member's number, service and backend.
    pub fn members(&self) -> Vec<(u32, String, String)> {
        let backends: HashMap<u32, &String> =
            self.known.iter().map(|(name, known)| (known.number.0, name)).collect();
        let services = self.services.names();
        let named = |(service, backend, number): (u32, u32, u32)| {
            let service = (*services.get(&service)?).to_owned();
            Some((number, service, (*backends.get(&backend)?).clone()))
        };
        self.services.members().all().filter_map(named).collect()
    }

    /// Sites of a plan that nobody looks after yet, with how they are to be reached.
    pub fn unknown_sites(&self, plan: &Plan) -> Vec<(String, Locator)> {
        let kept = |name: &str| self.sites.get(name).and_then(|number| self.locators.get(number));
        let sites = plan.sites.iter().map(|site| (site.name.clone(), Locator::of(site)));
        sites.filter(|(name, locator)| kept(name) != Some(locator)).collect()
    }

    /// Writes what a plan has otherwise than the tables. `locations` are those of the plan's new sites; those that
    /// are missing are looked for. Whatever can be refused is refused before the first write.
    pub fn install(
        &mut self,
        plan: &Plan,
        locations: &HashMap<String, Location>,
        sites: &Sites,
    ) -> Result<(), DatapathError> {
        self.check_room(plan)?;
        for site in &plan.sites {
            let is_new = !self.sites.contains_key(&site.name);
            let number = self.number_site(&site.name)?;
            let locator = Locator::of(site);
            let former = self.locators.insert(number, locator);
            match locations.get(&site.name) {
                Some(location) => sites.keep(number, locator, *location),
                None if former == Some(locator) => {}
                None => sites.seek(number, locator, is_new),
            }
        }
        let stay: HashSet<SiteNumber> = plan.sites.iter().map(|site| self.sites[&site.name]).collect();
        self.locators.retain(|number, _| stay.contains(number));
        sites.retain(stay);
        for backend in &plan.backends {
            self.write_backend(backend)?;
        }
        self.services.write(plan, &self.known)?;
        self.forget(plan)?;
        self.tunnelled = tunnelled(plan, &self.known);
        Ok(())
    }

    /// Shares new flows of services out by other weights.
    pub fn weigh(&mut self, services: &[ServicePlan]) -> Result<(), DatapathError> {
        self.services.weigh(services, &self.known)
    }

    fn check_room(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        let new = plan.backends.iter().filter(|backend| !self.known.contains_key(&backend.name)).count();
        if new > self.backend_numbers.left() {
            return Err(DatapathError::Full { what: "backend", most: self.backends_most });
        }
        let new = plan.sites.iter().filter(|site| !self.sites.contains_key(&site.name)).count();
        if new > self.site_numbers.left() {
            self.forget_sites(plan)?;
        }
        if new > self.site_numbers.left() {
            return Err(DatapathError::Full { what: "site", most: self.sites_most });
        }
        self.services.check_room(plan)
    }

    /// Frees the numbers of sites that left the plan, unless a backend may still be there.
    fn forget_sites(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        let mut used: HashSet<u32> = HashSet::new();
        for known in self.known.values() {
            used.extend(self.shared.state(known.number).sites.map(|site| site.0));
        }
        let planned: HashSet<&str> = plan.sites.iter().map(|site| &*site.name).collect();
        let gone = |(name, number): (&String, &SiteNumber)| {
            (!planned.contains(&**name) && !used.contains(&number.0)).then(|| (name.clone(), number.0))
        };
        for (name, number) in self.sites.iter().filter_map(gone).collect::<Vec<_>>() {
            self.site_names.clear(number)?;
            self.sites.remove(&name);
            self.site_numbers.give(number);
        }
        Ok(())
    }

    /// Frees what a former plan had and this one has not: its flows are void from then on.
    fn forget(&mut self, plan: &Plan) -> Result<(), DatapathError> {
        let stay: HashSet<&str> = plan.backends.iter().map(|backend| &*backend.name).collect();
        let gone: Vec<String> = self.known.keys().filter(|name| !stay.contains(&***name)).cloned().collect();
        for name in gone {
            let Some(Known { number, .. }) = self.known.get(&name).copied() else { continue };
            let closed = self.shared.word(number).with_gate(Gate::Drop);
            self.shared.store(number, closed);
            let former = self.shared.record(number);
            let record = Backend { incarnation: former.incarnation.wrapping_add(1), ..former };
            set(&mut self.backends, number.0, to_bytes(&record))?;
            self.backend_names.clear(number.0)?;
            self.known.remove(&name);
            self.backend_numbers.give(number.0);
        }
        Ok(())
    }

    fn number_site(&mut self, name: &str) -> Result<SiteNumber, DatapathError> {
        if let Some(number) = self.sites.get(name) {
            return Ok(*number);
        }
        let full = DatapathError::Full { what: "site", most: self.sites_most };
        let number = self.site_numbers.take().ok_or(full)?;
        self.site_names.set(number, name_bytes(name))?;
        self.sites.insert(name.into(), SiteNumber(number));
        Ok(SiteNumber(number))
    }

    fn write_backend(&mut self, plan: &BackendPlan) -> Result<(), DatapathError> {
        let (address, port) = (words(plan.address.ip()), plan.address.port().to_be());
        let known = self.known.get(&plan.name).copied();
        let number = match known {
            Some(known) => known.number,
            None => {
                let full = DatapathError::Full { what: "backend", most: self.backends_most };
                BackendNumber(self.backend_numbers.take().ok_or(full)?)
            }
        };
        let old = self.shared.record(number);
        if known.is_some() && (old.address, old.port) == (address, port) {
            return Ok(());
        }
        let site = self.sites[&plan.site];
        // Under another address or another name, flows of the number's former holder must not reach it.
        let closed = self.shared.word(number).with_gate(Gate::Drop);
        let record = Backend {
            word: AtomicU64::new(closed.bits()),
            address,
            port,
            incarnation: old.incarnation.wrapping_add(1),
            ..old
        };
        set(&mut self.backends, number.0, to_bytes(&record))?;
        if known.is_none() {
            self.shared.stage(number, Slot::A, site);
            self.shared.stage(number, Slot::B, site);
            self.backend_names.set(number.0, name_bytes(&plan.name))?;
            let identity = identity(&plan.name);
            self.known.insert(plan.name.clone(), Known { number, identity });
        }
        self.shared.store(number, closed.with_gate(Gate::Forward));
        Ok(())
    }
}

/// Backends of services whose packets go through tunnels.
fn tunnelled(plan: &Plan, known: &HashMap<String, Known>) -> HashMap<BackendNumber, IpAddr> {
    let mut tunnelled = HashMap::new();
    for service in plan.services.iter().filter(|service| service.mode == Mode::Dsr) {
        for backend in service.backends.iter().filter_map(|name| known.get(name)) {
            tunnelled.insert(backend.number, service.address.ip());
        }
    }
    tunnelled
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

fn set<V: Pod>(array: &mut Array<MapData, V>, index: u32, value: V) -> Result<(), DatapathError> {
    array.set(index, value, 0).map_err(kernel("writing a table"))
}
