//! From what the file says to what it means.
//!
//! Every check reports and goes on. A value that could not be understood is left out of the result, which
//! is thrown away anyway when there are errors.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::error::Collector;
use super::prefix::{Family, Prefix};
use super::raw::{self, Number, Raw, Text};
use super::read::Field;
use super::{Admin, Config, Datapath, Hold, MAX_DEADLINE_MS, size};
use crate::datapath::{BackendPlan, HoldLimits, Overflow, Plan, Protocol, ServicePlan, SitePlan};

/// A queue below this would overflow with the first burst of one client's window.
const MIN_HOLD_BYTES: u64 = 64 << 10;
/// Beyond this a replay takes longer than any client waits.
const MAX_HOLD_BYTES: u64 = 16 << 30;

pub(super) fn validate(raw: Raw, errors: &mut Collector<'_>) -> Option<Config> {
    let mut warnings = Vec::new();
    let admin = admin(&raw.admin, &mut warnings, errors);
    // A prefix that was given and not understood has its error already.
    let nat_given = [raw.datapath.nat_source4.is_some(), raw.datapath.nat_source6.is_some()];
    let datapath = datapath(raw.datapath, errors);
    let hold = hold(&raw.hold, errors);
    let (sites, agents) = sites(&raw.sites, errors);
    let backends = backends(&raw.backends, &raw.sites, &datapath, nat_given, errors);
    let services = services(&raw.services, &raw.backends, &backends, &datapath, errors);
    for backend in &backends {
        if !services.iter().any(|service| service.backends.contains(&backend.name)) {
            warnings.push(format!("backend {:?} is in no service: no client can reach it", backend.name));
        }
    }
    Some(Config { admin: admin?, datapath, hold, plan: Plan { sites, backends, services }, agents, warnings })
}

fn admin(raw: &raw::Admin, warnings: &mut Vec<String>, errors: &mut Collector<'_>) -> Option<Admin> {
    let default = SocketAddr::from((Ipv4Addr::LOCALHOST, 7400));
    let Some(field) = &raw.listen else { return Some(Admin { listen: default }) };
    let listen: SocketAddr = match field.value.parse() {
        Ok(listen) => listen,
        Err(_) => {
            let message = format!("{:?} is not an address with a port, such as {default}", field.value);
            errors.push(&field.at, &field.path, message);
            return None;
        }
    };
    if listen.port() == 0 {
        errors.push(&field.at, &field.path, "port 0 cannot be found by anybody; choose a port");
    }
    if !listen.ip().is_loopback() {
        if raw.allow_remote.as_ref().is_some_and(|allow| allow.value) {
            warnings.push(format!(
                "the admin API listens on {listen}: whoever reaches it controls the load balancer, it asks for no password"
            ));
        } else {
            let message = format!(
                "{} is not a loopback address, and whoever reaches the admin API controls the load balancer; \
                 if that is meant, set allow_remote = true in [admin]",
                listen.ip()
            );
            errors.push(&field.at, &field.path, message);
        }
    }
    Some(Admin { listen })
}

fn datapath(raw: raw::Datapath, errors: &mut Collector<'_>) -> Datapath {
    let interfaces = raw.interfaces.map(|field| interfaces(field, errors)).unwrap_or_default();
    let pin_path = match &raw.pin_path {
        Some(field) => {
            let path = PathBuf::from(&field.value);
            if !path.is_absolute() {
                errors.push(&field.at, &field.path, format!("{:?} is not an absolute path", field.value));
            }
            path
        }
        None => PathBuf::from("/sys/fs/bpf/drover"),
    };
    Datapath {
        interfaces,
        pin_path,
        nat_source4: nat_source::<Ipv4Addr>(&raw.nat_source4, errors),
        nat_source6: nat_source::<Ipv6Addr>(&raw.nat_source6, errors),
    }
}

fn interfaces(field: Field<Vec<String>>, errors: &mut Collector<'_>) -> Vec<String> {
    let names = &field.value;
    if names.is_empty() {
        errors.push(&field.at, &field.path, "is empty: name the interfaces that carry packets");
    }
    for (i, name) in names.iter().enumerate() {
        // IFNAMSIZ with its final zero byte.
        if name.is_empty() || name.len() > 15 || name.contains(|c: char| c == '/' || c.is_whitespace()) {
            errors.push(&field.at, &field.path, format!("{name:?} cannot be the name of an interface"));
        }
        if names[..i].contains(name) {
            errors.push(&field.at, &field.path, format!("{name:?} is named twice"));
        }
    }
    field.value
}

fn nat_source<A: Family>(field: &Text, errors: &mut Collector<'_>) -> Option<Prefix<A>> {
    let field = field.as_ref()?;
    match field.value.parse() {
        Ok(prefix) => Some(prefix),
        Err(message) => {
            let message: String = message;
            errors.push(&field.at, &field.path, message);
            None
        }
    }
}

fn hold(raw: &raw::Hold, errors: &mut Collector<'_>) -> Hold {
    let max_bytes = raw.max_bytes.as_ref().and_then(|field| {
        let bytes = match &field.value {
            toml::Value::Integer(bytes) => {
                u64::try_from(*bytes).map_err(|_| format!("{bytes} is less than nothing"))
            }
            toml::Value::String(text) => size::parse(text),
            other => Err(format!(
                "expected a size such as \"64 MiB\" or an integer of bytes, found {}",
                other.type_str()
            )),
        };
        let bytes = bytes.and_then(|bytes| match bytes {
            MIN_HOLD_BYTES..=MAX_HOLD_BYTES => Ok(bytes),
            _ => Err(format!("{bytes} bytes is outside of 64 KiB to 16 GiB")),
        });
        bytes.map_err(|message| errors.push(&field.at, &field.path, message)).ok()
    });
    let overflow = match &raw.overflow {
        None => Overflow::DropNewest,
        Some(field) => match field.value.as_str() {
            "drop-newest" => Overflow::DropNewest,
            "drop-oldest" => Overflow::DropOldest,
            other => {
                errors.push(
                    &field.at,
                    &field.path,
                    format!("{other:?} is neither \"drop-newest\" nor \"drop-oldest\""),
                );
                Overflow::DropNewest
            }
        },
    };
    let max_age_ms = bounded(&raw.max_age_ms, 1..=MAX_DEADLINE_MS, 10_000, errors);
    let deadline_ms = bounded(&raw.deadline_ms, 1..=MAX_DEADLINE_MS, 5_000, errors);
    Hold {
        limits: HoldLimits {
            // A hold beyond the address space is bounded by memory anyway.
            max_bytes: usize::try_from(max_bytes.unwrap_or(64 << 20)).unwrap_or(usize::MAX),
            max_age: Duration::from_millis(max_age_ms),
            overflow,
        },
        deadline: Duration::from_millis(deadline_ms),
    }
}

fn bounded(
    field: &Number,
    bounds: std::ops::RangeInclusive<u64>,
    default: u64,
    errors: &mut Collector<'_>,
) -> u64 {
    let Some(field) = field else { return default };
    match u64::try_from(field.value).ok().filter(|value| bounds.contains(value)) {
        Some(value) => value,
        None => {
            let message = format!("{} is outside of {} to {}", field.value, bounds.start(), bounds.end());
            errors.push(&field.at, &field.path, message);
            default
        }
    }
}

fn sites(raw: &[raw::Site], errors: &mut Collector<'_>) -> (Vec<SitePlan>, BTreeMap<String, String>) {
    unique("site", raw.iter().map(|site| &site.name), errors);
    let mut sites = Vec::new();
    let mut agents = BTreeMap::new();
    for site in raw {
        let next_hop = site.next_hop.as_ref().and_then(|field| next_hop(field, errors));
        let agent = site.agent.as_ref().and_then(|field| agent(field, errors));
        let Some(name) = &site.name else { continue };
        if let Some(agent) = agent {
            agents.insert(name.value.clone(), agent);
        }
        if let Some(next_hop) = next_hop {
            sites.push(SitePlan { name: name.value.clone(), next_hop });
        }
    }
    (sites, agents)
}

fn next_hop(field: &Field<String>, errors: &mut Collector<'_>) -> Option<IpAddr> {
    let text = &field.value;
    let refused = match text.parse::<IpAddr>() {
        Ok(ip) => match unusable(ip) {
            None => return Some(ip),
            Some(why) => format!("{text} is {why}; give the address of the next machine on the way"),
        },
        Err(_) => format!("{text:?} is not an IP address (no port, no prefix length)"),
    };
    errors.push(&field.at, &field.path, refused);
    None
}

fn agent(field: &Field<String>, errors: &mut Collector<'_>) -> Option<String> {
    let example = "such as \"http://10.2.1.1:7401\"";
    let text = &field.value;
    let refused = match text.parse::<http::Uri>() {
        Err(_) => format!("{text:?} is not a URL {example}"),
        Ok(url) if url.scheme_str() != Some("http") => {
            format!("{text:?} does not start with http://; write a URL {example}")
        }
        Ok(url) if url.port_u16().is_none_or(|port| port == 0) => {
            format!("{text:?} has no port; write a URL {example}")
        }
        Ok(url) if !matches!(url.path(), "" | "/") || url.query().is_some() => {
            format!("{text:?} goes on after the port; write a URL {example}")
        }
        Ok(_) => return Some(text.trim_end_matches('/').to_owned()),
    };
    errors.push(&field.at, &field.path, refused);
    None
}

fn backends(
    raw: &[raw::Backend],
    sites: &[raw::Site],
    datapath: &Datapath,
    [nat4, nat6]: [bool; 2],
    errors: &mut Collector<'_>,
) -> Vec<BackendPlan> {
    unique("backend", raw.iter().map(|backend| &backend.name), errors);
    let mut taken: HashMap<SocketAddr, usize> = HashMap::new();
    let mut plans = Vec::new();
    for backend in raw {
        let address = backend.address.as_ref().and_then(|field| {
            let address = endpoint(field, datapath, errors)?;
            let line = errors.line(&field.at);
            if let Some(first) = taken.insert(address, line) {
                let message = format!("{address} is already the address of the backend in line {first}");
                errors.push(&field.at, &field.path, message);
            }
            let missing = match address {
                SocketAddr::V4(_) => (!nat4).then_some("nat_source4"),
                SocketAddr::V6(_) => (!nat6).then_some("nat_source6"),
            };
            if let Some(missing) = missing {
                let message = format!("{address} needs datapath.{missing}: addresses for packets to it");
                errors.push(&field.at, &field.path, message);
            }
            Some(address)
        });
        if let Some(site) = &backend.site
            && !sites.iter().flat_map(|site| &site.name).any(|name| name.value == site.value)
        {
            errors.push(&site.at, &site.path, format!("there is no site {:?}", site.value));
        }
        let weight = bounded(&backend.weight, 1..=1000, 100, errors);
        if let (Some(name), Some(address), Some(site)) = (&backend.name, address, &backend.site) {
            plans.push(BackendPlan {
                name: name.value.clone(),
                address,
                site: site.value.clone(),
                weight: u32::try_from(weight).expect("bounded to 1000"),
            });
        }
    }
    plans
}

fn services(
    raw: &[raw::Service],
    raw_backends: &[raw::Backend],
    backends: &[BackendPlan],
    datapath: &Datapath,
    errors: &mut Collector<'_>,
) -> Vec<ServicePlan> {
    unique("service", raw.iter().map(|service| &service.name), errors);
    let mut taken: HashMap<(SocketAddr, Protocol), usize> = HashMap::new();
    let mut plans = Vec::new();
    for service in raw {
        let protocol = service.protocol.as_ref().and_then(|field| protocol(field, errors));
        let address = service.address.as_ref().and_then(|field| {
            let address = endpoint(field, datapath, errors)?;
            if let Some(backend) = backends.iter().find(|backend| backend.address == address) {
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
        if let Some(field) = &service.backends {
            members(field, address.map(|(address, _)| address), raw_backends, backends, errors);
        }
        if let (Some(name), Some((address, _)), Some(protocol), Some(members)) =
            (&service.name, address, protocol, &service.backends)
        {
            let backends = members.value.clone();
            plans.push(ServicePlan { name: name.value.clone(), address, protocol, backends });
        }
    }
    plans
}

fn protocol(field: &Field<String>, errors: &mut Collector<'_>) -> Option<Protocol> {
    match field.value.as_str() {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        other => {
            errors.push(&field.at, &field.path, format!("{other:?} is neither \"tcp\" nor \"udp\""));
            None
        }
    }
}

/// Checks a service's list of backends.
fn members(
    field: &Field<Vec<String>>,
    service: Option<SocketAddr>,
    raw_backends: &[raw::Backend],
    backends: &[BackendPlan],
    errors: &mut Collector<'_>,
) {
    if field.value.is_empty() {
        errors.push(&field.at, &field.path, "is empty: name at least one backend");
    }
    for (i, name) in field.value.iter().enumerate() {
        if field.value[..i].contains(name) {
            errors.push(&field.at, &field.path, format!("backend {name:?} is named twice"));
        }
        if !raw_backends.iter().flat_map(|backend| &backend.name).any(|known| known.value == *name) {
            errors.push(&field.at, &field.path, format!("there is no backend {name:?}"));
        }
        let backend = backends.iter().find(|backend| backend.name == *name);
        if let (Some(service), Some(backend)) = (service, backend)
            && service.is_ipv4() != backend.address.is_ipv4()
        {
            let message = format!(
                "backend {name:?} has the address {}, of another family than the service's {service}",
                backend.address
            );
            errors.push(&field.at, &field.path, message);
        }
    }
}

/// An address that packets can be sent to, with a port.
fn endpoint(field: &Field<String>, datapath: &Datapath, errors: &mut Collector<'_>) -> Option<SocketAddr> {
    let text = &field.value;
    let Ok(address) = text.parse::<SocketAddr>() else {
        let message =
            format!("{text:?} is not an address with a port, such as 10.1.0.1:6379 or [fd00:1::1]:6379");
        errors.push(&field.at, &field.path, message);
        return None;
    };
    let before = (address.port() == 0).then(|| "port 0 is no port".to_owned());
    let unusable = unusable(address.ip()).map(|why| format!("{} is {why}", address.ip()));
    let covered = match &datapath.nat_source4 {
        Some(prefix) if prefix.contains(address.ip()) => Some(prefix.to_string()),
        _ => datapath.nat_source6.filter(|prefix| prefix.contains(address.ip())).map(|p| p.to_string()),
    };
    let covered =
        covered.map(|prefix| format!("{} is inside of the NAT source prefix {prefix}", address.ip()));
    let wrong: Vec<String> = [before, unusable, covered].into_iter().flatten().collect();
    if wrong.is_empty() {
        return Some(address);
    }
    for message in wrong {
        errors.push(&field.at, &field.path, message);
    }
    None
}

/// Why no packet can be forwarded to an address.
fn unusable(ip: IpAddr) -> Option<&'static str> {
    match ip {
        _ if ip.is_unspecified() => Some("the unspecified address"),
        _ if ip.is_loopback() => Some("a loopback address, which never leaves its machine"),
        _ if ip.is_multicast() => Some("a multicast address"),
        IpAddr::V4(ip) if ip.is_broadcast() => Some("the broadcast address"),
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            Some("a link-local address, which means another machine on each interface")
        }
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Some("an IPv4 address written as IPv6"),
        _ => None,
    }
}

/// Names are unique and can stand in URLs, file names and metric labels.
fn unique<'a>(what: &str, names: impl Iterator<Item = &'a Text>, errors: &mut Collector<'_>) {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for field in names.flatten() {
        let name = field.value.as_str();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) || matches!(name, "." | "..") {
            let message = format!("{name:?} cannot be a name: 1 to 64 letters, digits, '.', '_' and '-'");
            errors.push(&field.at, &field.path, message);
        }
        let line = errors.line(&field.at);
        if let Some(first) = seen.insert(name, line) {
            let message = format!("{name:?} is already the name of the {what} in line {first}");
            errors.push(&field.at, &field.path, message);
        }
    }
}
