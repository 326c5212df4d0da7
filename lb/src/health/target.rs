//! What is checked.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::{Check, Config, Probe};
use crate::datapath::{Mode, Protocol};

/// A backend and the service that wants it checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) backend: Arc<str>,
    pub(super) service: Arc<str>,
}

/// One check of one backend, and what its probes have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Name of the backend.
    pub(super) backend: String,
    /// Name of the service whose way the probes take.
    pub(super) service: String,
    pub(super) check: Check,
    /// The service's address: what a probe connects to.
    pub(super) to: SocketAddr,
    pub(super) mode: Mode,
    /// The backend's own address.
    pub(super) address: SocketAddr,
}

impl Target {
    pub(super) fn key(&self) -> Key {
        Key { backend: self.backend.as_str().into(), service: self.service.as_str().into() }
    }

    /// The transport protocol of the probes, which need not be the service's.
    pub(super) fn protocol(&self) -> Protocol {
        match self.check.probe {
            Some(Probe::Udp { .. }) => Protocol::Udp,
            Some(Probe::Tcp | Probe::Http { .. }) | None => Protocol::Tcp,
        }
    }

    /// All that a configuration wants checked.
    pub(super) fn all(config: &Config) -> Vec<Self> {
        let services = config.plan.services.iter().map(|service| (&*service.name, service));
        let services: std::collections::HashMap<_, _> = services.collect();
        let backends = config.plan.backends.iter().map(|backend| (&*backend.name, backend.address));
        let backends: std::collections::HashMap<_, _> = backends.collect();
        let target = |plan: &crate::config::CheckPlan| {
            let service = services.get(&*plan.service)?;
            Some(Self {
                backend: plan.backend.clone(),
                service: plan.service.clone(),
                check: plan.check.clone(),
                to: service.address,
                mode: service.mode,
                address: *backends.get(&*plan.backend)?,
            })
        };
        config.checks.iter().filter_map(target).collect()
    }
}
