//! The configuration: read from TOML (`raw`), then checked and turned into another type (`validate`).
//!
//! A [`Config`] is only made here, so whoever holds one need not check again. All errors of a file are
//! reported at once, each with its line and field. What is not here: whether the machine can do what the
//! file asks for (interfaces exist, next hops resolve); the datapath finds that out.

mod check;
mod current;
mod error;
mod limits;
mod prefix;
mod raw;
mod read;
mod size;
mod validate;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::client::{AgentAt, chain};
use migrate::tls::{self, Credentials};

pub use check::{Check, CheckPlan, Probe};
pub use current::Current;
pub use error::{ConfigError, ConfigErrors, LoadError};
pub use limits::{FlowTimes, Limits};
pub use prefix::{Family, Prefix};

use crate::datapath::{HoldLimits, Plan, Protocol};

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The admin API.
    pub admin: Admin,
    /// How packets are taken.
    pub datapath: Datapath,
    /// What a hold is when its request does not say.
    pub hold: Hold,
    /// How migrations are kept track of.
    pub migrations: Migrations,
    /// After how long without a packet flows are forgotten.
    pub flows: FlowTimes,
    /// Sites, backends and services.
    pub plan: Plan,
    /// How backends are found to be up or down; a backend that is not here counts as up.
    pub checks: Vec<CheckPlan>,
    /// Base address of each site's migrate agent (`https://10.2.1.1:7401`), by site. Sites without one can
    /// take part in a cutover, not in a migration.
    pub agents: BTreeMap<String, String>,
    /// Who the load balancer is to the agents; every agent's address is `https` with it and `http` without.
    pub tls: Option<tls::Files>,
    /// What is allowed and yet worth a line in the log.
    pub warnings: Vec<String>,
}

/// The admin API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens.
    pub listen: SocketAddr,
}

/// How packets are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datapath {
    /// Interfaces that carry packets of clients or backends, at least one.
    pub interfaces: Vec<String>,
    /// Folder in a BPF file system where maps and programs are pinned.
    pub pin_path: PathBuf,
    /// At which hook of the kernel packets are taken.
    pub hook: HookChoice,
    /// Sizes of the tables.
    pub limits: Limits,
    /// Source addresses of the load balancer towards IPv4 backends.
    pub nat_source4: Option<Prefix<std::net::Ipv4Addr>>,
    /// Source addresses of the load balancer towards IPv6 backends.
    pub nat_source6: Option<Prefix<std::net::Ipv6Addr>>,
}

/// How migrations are kept track of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrations {
    /// File of their journal.
    pub journal: PathBuf,
}

/// At which hook of the kernel packets are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookChoice {
    /// In the driver, before the kernel makes anything of a packet.
    Xdp,
    /// In traffic control, where packets of virtual interfaces still are large segments.
    Tc,
    /// `Tc` where every interface is virtual, else `Xdp`.
    Auto,
}

/// Bounds and defaults of holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Bounds of each backend's queue.
    pub limits: HoldLimits,
    /// How long a hold lasts when its request does not say.
    pub deadline: Duration,
    /// How long a migration holds new connections alone, so that those in their handshake can finish it.
    pub handshakes: Duration,
}

/// The longest deadline that a hold may have: clients have given up long before.
pub const MAX_DEADLINE_MS: u64 = 600_000;

/// The longest time for handshakes: whoever is held that long has sent the first packet several times.
pub const MAX_HANDSHAKES_MS: u64 = 10_000;

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
        Ok(Self::parse(&text, &path.display().to_string())?)
    }

    /// Checks a text; `file` is what errors call it.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigErrors> {
        let mut errors = error::Collector::new(text);
        let config = raw::read(text, &mut errors).and_then(|raw| validate::validate(raw, &mut errors));
        match config {
            Some(config) if errors.is_empty() => Ok(config),
            _ => Err(errors.into_errors(file)),
        }
    }

    /// How a site's agent is reached.
    pub fn agent_at(&self, site: &str) -> Option<AgentAt> {
        let url = self.agents.get(site)?.clone();
        Some(AgentAt { site: site.to_owned(), url, tls: self.tls.clone() })
    }

    /// What is wrong with the files of section `[tls]`, now. Packets do not need them, migrations do.
    pub fn tls_warning(&self) -> Option<String> {
        let error = Credentials::of_coordinator(self.tls.as_ref()?).err()?;
        Some(format!("no migration will begin: {}", chain(&error)))
    }

    /// The transport protocol of a backend's services. TCP where it has both, or none.
    pub fn protocol_of(&self, backend: &str) -> Protocol {
        let mut services = self.plan.services.iter().filter(|s| s.backends.iter().any(|b| b == backend));
        if services.clone().any(|service| service.protocol == Protocol::Tcp) {
            return Protocol::Tcp;
        }
        services.next().map_or(Protocol::Tcp, |service| service.protocol)
    }
}

#[cfg(test)]
mod tests;
