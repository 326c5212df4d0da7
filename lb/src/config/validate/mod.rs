//! From what the file says to what it means.
//!
//! Every check reports and goes on. A value that could not be understood is left out of the result, which
//! is thrown away anyway when there are errors.

mod backends;
mod check;
mod limits;
mod services;
mod sites;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::error::Collector;
use super::prefix::{Family, Prefix};
use super::raw::{self, Number, Raw, Text};
use super::read::Field;
use super::{
    Admin, Config, Datapath, Hold, HookChoice, MAX_DEADLINE_MS, MAX_HANDSHAKES_MS, Migrations, size,
};
use crate::datapath::{HoldLimits, Overflow, Plan};

/// A queue below this would overflow with the first burst of one client's window.
const MIN_HOLD_BYTES: u64 = 64 << 10;
/// Beyond this a replay takes longer than any client waits.
const MAX_HOLD_BYTES: u64 = 16 << 30;

pub(super) fn validate(raw: Raw, errors: &mut Collector) -> Option<Config> {
    let mut warnings = Vec::new();
    let admin = admin(&raw.admin, &mut warnings, errors);
    let limits = limits::limits(&raw.limits, errors);
    let datapath = datapath(&raw.datapath, limits, errors);
    let hold = hold(&raw.hold, errors);
    let journal = absolute(&raw.migrations.journal, "/var/lib/drover/lb.redb", errors);
    let migrations = Migrations { journal };
    let flows = limits::flow_times(&raw.flows, errors);
    let (sites, agents) = sites::sites(&raw, errors);
    let tls = raw.tls.as_ref().and_then(|raw| tls(raw, errors));
    let modes = services::modes(&raw.services, errors);
    let backends = backends::backends(&raw, &sites, &datapath, &modes, errors);
    let services = services::services(&raw, &backends, &modes, &datapath, errors);
    let checks = check::checks(&raw, &services, errors);
    let used: HashSet<&String> = services.iter().flat_map(|service| &service.backends).collect();
    for backend in backends.iter().filter(|backend| !used.contains(&backend.name)) {
        warnings.push(format!("backend {:?} is in no service: no client can reach it", backend.name));
    }
    services::warn_of_dsr(&services, &backends, &mut warnings);
    room(&raw, services.iter().map(|service| service.backends.len()).sum(), &limits, errors);
    let plan = Plan { sites, backends, services };
    Some(Config { admin: admin?, datapath, hold, migrations, flows, plan, checks, agents, tls, warnings })
}

/// Whether the tables will have room.
fn room(raw: &Raw, members: usize, limits: &super::Limits, errors: &mut Collector) {
    let last = |at: Option<&Text>| at.and_then(|name| name.as_ref()).map(|name| name.at.clone());
    let rows = [
        ("services", raw.services.len(), limits.services, last(raw.services.last().map(|s| &s.name))),
        ("backends", raw.backends.len(), limits.backends, last(raw.backends.last().map(|b| &b.name))),
        ("sites", raw.sites.len(), limits.sites, last(raw.sites.last().map(|s| &s.name))),
        ("members", members, limits.members, last(raw.services.last().map(|s| &s.name))),
    ];
    for (what, wanted, most, at) in rows {
        if wanted > most as usize {
            let things = if what == "members" { "pairs of a service and a backend" } else { what };
            let message =
                format!("{wanted} {things} are more than the tables take: raise limits.{what} ({most})");
            errors.push(&at.unwrap_or(0..0), what, message);
        }
    }
}

fn admin(raw: &raw::Admin, warnings: &mut Vec<String>, errors: &mut Collector) -> Option<Admin> {
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

/// Where the files are; whether they can be used is seen when they are.
fn tls(raw: &raw::Tls, errors: &mut Collector) -> Option<migrate::tls::Files> {
    let mut path = |field: &Text| field.is_some().then(|| absolute(field, "", errors));
    let (ca, certificate, key) = (path(&raw.ca), path(&raw.certificate), path(&raw.key));
    Some(migrate::tls::Files { ca: ca?, certificate: certificate?, key: key? })
}

fn datapath(raw: &raw::Datapath, limits: super::Limits, errors: &mut Collector) -> Datapath {
    let interfaces = raw.interfaces.as_ref().map(|field| interfaces(field, errors)).unwrap_or_default();
    let pin_path = absolute(&raw.pin_path, "/sys/fs/bpf/drover", errors);
    let hooks = [("xdp", HookChoice::Xdp), ("tc", HookChoice::Tc), ("auto", HookChoice::Auto)];
    Datapath {
        interfaces,
        pin_path,
        hook: choice(&raw.hook, &hooks, HookChoice::Auto, errors),
        limits,
        nat_source4: nat_source::<Ipv4Addr>(&raw.nat_source4, errors),
        nat_source6: nat_source::<Ipv6Addr>(&raw.nat_source6, errors),
    }
}

/// A path, which must not depend on where the daemon was started.
fn absolute(field: &Text, default: &str, errors: &mut Collector) -> PathBuf {
    let Some(field) = field else { return PathBuf::from(default) };
    let path = PathBuf::from(&field.value);
    if !path.is_absolute() {
        errors.push(&field.at, &field.path, format!("{:?} is not an absolute path", field.value));
    }
    path
}

fn interfaces(field: &Field<Vec<String>>, errors: &mut Collector) -> Vec<String> {
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
    names.clone()
}

fn nat_source<A: Family>(field: &Text, errors: &mut Collector) -> Option<Prefix<A>> {
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

fn hold(raw: &raw::Hold, errors: &mut Collector) -> Hold {
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
    let overflows = [("drop-newest", Overflow::DropNewest), ("drop-oldest", Overflow::DropOldest)];
    let overflow = choice(&raw.overflow, &overflows, Overflow::DropNewest, errors);
    let max_age_ms = bounded(&raw.max_age_ms, 1..=MAX_DEADLINE_MS, 10_000, errors);
    let deadline_ms = bounded(&raw.deadline_ms, 1..=MAX_DEADLINE_MS, 5_000, errors);
    // Longer than nearly everybody's round trip, and, with a freeze, shorter than the second after which a client
    // sends its SYN again (RFC 6298, section 2).
    let handshakes_ms = bounded(&raw.handshakes_ms, 0..=MAX_HANDSHAKES_MS, 250, errors);
    Hold {
        limits: HoldLimits {
            // A hold beyond the address space is bounded by memory anyway.
            max_bytes: usize::try_from(max_bytes.unwrap_or(64 << 20)).unwrap_or(usize::MAX),
            max_age: Duration::from_millis(max_age_ms),
            overflow,
        },
        deadline: Duration::from_millis(deadline_ms),
        handshakes: Duration::from_millis(handshakes_ms),
    }
}

fn bounded(
    field: &Number,
    bounds: std::ops::RangeInclusive<u64>,
    default: u64,
    errors: &mut Collector,
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

/// One of a few words.
fn choice<T: Copy>(field: &Text, choices: &[(&str, T)], default: T, errors: &mut Collector) -> T {
    let Some(field) = field else { return default };
    if let Some((_, chosen)) = choices.iter().find(|(word, _)| *word == field.value) {
        return *chosen;
    }
    let words: Vec<String> = choices.iter().map(|(word, _)| format!("{word:?}")).collect();
    let message = match &words[..] {
        [one, other] => format!("{:?} is neither {one} nor {other}", field.value),
        words => format!("{:?} is none of {}", field.value, words.join(", ")),
    };
    errors.push(&field.at, &field.path, message);
    default
}

/// An address that packets can be sent to, with a port.
fn endpoint(field: &Field<String>, datapath: &Datapath, errors: &mut Collector) -> Option<SocketAddr> {
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
fn unique<'a>(what: &str, names: impl Iterator<Item = &'a Text>, errors: &mut Collector) {
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
