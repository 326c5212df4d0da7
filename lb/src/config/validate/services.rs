//! Services: their addresses, members and manners.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use super::super::Datapath;
use super::super::error::Collector;
use super::super::raw;
use super::super::read::Field;
use super::{bounded, choice, endpoint, unique};
use crate::datapath::{AllDown, BackendPlan, DuringHold, Mode, Protocol, ServicePlan};

/// An hour: a server that takes longer to warm up needs another remedy.
const SLOW_START_MOST_S: u64 = 3600;

/// Each service's mode, and in which modes a backend is used.
#[derive(Default)]
pub(super) struct Modes {
    of_service: Vec<Mode>,
    of_backend: HashMap<String, Vec<Mode>>,
}

impl Modes {
    /// The modes of the services that a backend is in, each once; none for a backend that nobody uses.
    pub(super) fn of(&self, backend: &str) -> Vec<Mode> {
        self.of_backend.get(backend).cloned().unwrap_or_default()
    }
}

pub(super) fn modes(raw: &[raw::Service], errors: &mut Collector) -> Modes {
    let words = [("nat", Mode::Nat), ("transparent", Mode::Transparent), ("dsr", Mode::Dsr)];
    let mut modes = Modes::default();
    for service in raw {
        let mode = choice(&service.mode, &words, Mode::Nat, errors);
        modes.of_service.push(mode);
        for backend in service.backends.iter().flat_map(|field| &field.value) {
            let used = modes.of_backend.entry(backend.clone()).or_default();
            if !used.contains(&mode) {
                used.push(mode);
            }
        }
    }
    modes
}

pub(super) fn services(
    raw: &raw::Raw,
    backends: &[BackendPlan],
    modes: &Modes,
    datapath: &Datapath,
    errors: &mut Collector,
) -> Vec<ServicePlan> {
    unique("service", raw.services.iter().map(|service| &service.name), errors);
    let named: HashMap<&str, Option<&BackendPlan>> = {
        let plans: HashMap<&str, &BackendPlan> =
            backends.iter().map(|backend| (&*backend.name, backend)).collect();
        let names = raw.backends.iter().flat_map(|backend| &backend.name);
        names.map(|name| (&*name.value, plans.get(&*name.value).copied())).collect()
    };
    let by_address: HashMap<SocketAddr, &BackendPlan> =
        backends.iter().map(|backend| (backend.address, backend)).collect();
    let mut taken: HashMap<(SocketAddr, Protocol), usize> = HashMap::new();
    let mut plans = Vec::new();
    for (service, mode) in raw.services.iter().zip(&modes.of_service) {
        let protocol = protocol(&service.protocol, errors);
        let address = service.address.as_ref().and_then(|field| {
            let address = endpoint(field, datapath, errors)?;
            if let Some(backend) = by_address.get(&address)
                && modes.of(&backend.name) != [Mode::Dsr]
            {
                let message =
                    format!("{address} is the address of backend {:?}; clients need another", backend.name);
                errors.push(&field.at, &field.path, message);
            }
            Some((address, field))
        });
        if let (Some((address, field)), Some(protocol)) = (address, protocol)
            && let Some(first) = taken.insert((address, protocol), errors.line(&field.at))
        {
            let message = format!("{address} is already the address of the service in line {first}");
            errors.push(&field.at, &field.path, message);
        }
        let address = address.map(|(address, _)| address);
        if let Some(field) = &service.backends {
            members(field, address, *mode, &named, errors);
        }
        let holds = [("hold", DuringHold::Hold), ("steer", DuringHold::Steer)];
        let downs = [("open", AllDown::Open), ("closed", AllDown::Closed)];
        let during_hold = choice(&service.during_hold, &holds, DuringHold::Hold, errors);
        let slow_start_s = bounded(&service.slow_start_s, 0..=SLOW_START_MOST_S, 0, errors);
        let all_down = choice(&service.all_down, &downs, AllDown::Open, errors);
        if let (Some(name), Some(address), Some(protocol), Some(members)) =
            (&service.name, address, protocol, &service.backends)
        {
            let weight = |name: &String| named.get(&**name).copied().flatten().map_or(0, |plan| plan.weight);
            plans.push(ServicePlan {
                name: name.value.clone(),
                address,
                protocol,
                mode: *mode,
                during_hold,
                slow_start: Duration::from_secs(slow_start_s),
                all_down,
                weights: members.value.iter().map(weight).collect(),
                backends: members.value.clone(),
            });
        }
    }
    plans
}

fn protocol(field: &raw::Text, errors: &mut Collector) -> Option<Protocol> {
    field.as_ref()?;
    let words = [("tcp", Some(Protocol::Tcp)), ("udp", Some(Protocol::Udp))];
    choice(field, &words, None, errors)
}

/// Checks a service's list of backends.
fn members(
    field: &Field<Vec<String>>,
    service: Option<SocketAddr>,
    mode: Mode,
    named: &HashMap<&str, Option<&BackendPlan>>,
    errors: &mut Collector,
) {
    if field.value.is_empty() {
        errors.push(&field.at, &field.path, "is empty: name at least one backend");
    }
    let mut seen = HashSet::new();
    for name in &field.value {
        if !seen.insert(name) {
            errors.push(&field.at, &field.path, format!("backend {name:?} is named twice"));
        }
        let backend = match named.get(&**name) {
            None => {
                errors.push(&field.at, &field.path, format!("there is no backend {name:?}"));
                continue;
            }
            Some(backend) => *backend,
        };
        let (Some(service), Some(backend)) = (service, backend) else { continue };
        if service.is_ipv4() != backend.address.is_ipv4() {
            let message = format!(
                "backend {name:?} has the address {}, of another family than the service's {service}",
                backend.address
            );
            errors.push(&field.at, &field.path, message);
        } else if mode == Mode::Dsr && service.port() != backend.address.port() {
            let message = format!(
                "backend {name:?} has the port {}, but with mode = \"dsr\" packets keep the service's port {}",
                backend.address.port(),
                service.port()
            );
            errors.push(&field.at, &field.path, message);
        }
    }
}

/// What works with dsr only where the network is made for it.
pub(super) fn warn_of_dsr(services: &[ServicePlan], backends: &[BackendPlan], warnings: &mut Vec<String>) {
    let by_name: HashMap<&str, &BackendPlan> =
        backends.iter().map(|backend| (&*backend.name, backend)).collect();
    for service in services.iter().filter(|service| service.mode == Mode::Dsr) {
        let mut at: HashMap<&str, &str> = HashMap::new();
        for name in &service.backends {
            let Some(backend) = by_name.get(&**name) else { continue };
            if let Some(other) = at.insert(&backend.site, name) {
                warnings.push(format!(
                    "service {:?}: backends {other:?} and {name:?} are both at site {:?}, which receives their \
                     packets for the same address (mode = \"dsr\"): give each a site of its own",
                    service.name, backend.site
                ));
                break;
            }
        }
    }
}
