//! `GET /v1/flows`: the connections that the data path knows.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use lb_core::Mode;
use serde::{Deserialize, Serialize};

use super::Admin;
use super::extract::Parameters;
use super::problem::Problem;
use crate::config::Config;
use crate::control::ControlError;
use crate::datapath::observe::{FlowFilter, FlowRow};
use crate::datapath::{BackendNumber, Protocol};

/// Flows in an answer, unless the request says otherwise.
const LIMIT: usize = 1000;
/// Flows in an answer at most.
pub(crate) const MOST: usize = 100_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FlowsQuery {
    client: Option<String>,
    service: Option<String>,
    backend: Option<String>,
    protocol: Option<String>,
    limit: Option<usize>,
}

/// `GET /v1/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowsView {
    /// The flows, in no order.
    pub flows: Vec<FlowView>,
    /// There are more than the limit.
    pub is_cut: bool,
    /// The limit.
    pub limit: usize,
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The service's name; `null` for one that the configuration no longer has.
    pub service: Option<String>,
    /// The virtual address and port that the client sends to.
    pub service_address: SocketAddr,
    /// The backend's name; `null` for one that the configuration no longer has.
    pub backend: Option<String>,
    /// The site where it runs; `null` for one that the configuration no longer has.
    pub location: Option<String>,
    /// What the backend sees as the packets' source.
    pub source: SocketAddr,
    /// `nat`, `transparent` or `dsr`.
    pub mode: String,
    /// `new`, `established`, `half_closed`, `closed` or `reset`.
    pub state: String,
    /// Since when nothing came, in milliseconds.
    pub idle_ms: u64,
}

pub(super) async fn flows(
    State(admin): State<Arc<Admin>>,
    Parameters(query): Parameters<FlowsQuery>,
) -> Result<axum::Json<FlowsView>, Problem> {
    let config = admin.config.get();
    let filter = filter(&admin, &config, &query)?;
    // Tables of millions of entries are read: not on a thread that others wait for.
    let listed = tokio::task::spawn_blocking(move || {
        let list = admin.control.datapath().flows(&filter).map_err(ControlError::from)?;
        let names = Names::new(&admin, &config);
        let flows = list.flows.iter().map(|row| names.view(row)).collect();
        Ok(FlowsView { flows, is_cut: list.is_cut, limit: filter.limit })
    });
    let listed: Result<FlowsView, ControlError> = listed.await.map_err(|panic| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "datapath-failed", panic.to_string())
    })?;
    Ok(axum::Json(listed?))
}

fn filter(admin: &Admin, config: &Config, query: &FlowsQuery) -> Result<FlowFilter, Problem> {
    let wrong = |detail: String| Problem::new(StatusCode::BAD_REQUEST, "wrong-parameter", detail);
    let client = query.client.as_ref().map(|text| text.parse()).transpose().map_err(wrong)?;
    let backend = match &query.backend {
        None => None,
        Some(name) => {
            let unknown = || ControlError::UnknownBackend(name.clone());
            Some(admin.control.datapath().backend(name).ok_or_else(unknown)?)
        }
    };
    let service = match &query.service {
        None => None,
        Some(name) => {
            let service = config.plan.services.iter().find(|service| service.name == *name);
            let service = service.ok_or_else(|| unknown_service(name))?;
            Some((service.address, service.protocol))
        }
    };
    let protocol = match query.protocol.as_deref() {
        None => None,
        Some("tcp") => Some(Protocol::Tcp),
        Some("udp") => Some(Protocol::Udp),
        Some(other) => return Err(wrong(format!("protocol {other:?} is neither tcp nor udp"))),
    };
    let limit = query.limit.unwrap_or(LIMIT);
    if !(1..=MOST).contains(&limit) {
        return Err(wrong(format!("limit {limit} is not within 1..={MOST}")));
    }
    Ok(FlowFilter { client, service, backend, protocol, limit })
}

fn unknown_service(name: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "unknown-service", format!("there is no service {name:?}"))
}

/// Names for what the tables know by number and address.
struct Names<'a> {
    services: HashMap<(SocketAddr, Protocol), &'a str>,
    backends: HashMap<BackendNumber, &'a str>,
    locations: BTreeMap<&'a str, Option<String>>,
}

impl<'a> Names<'a> {
    fn new(admin: &Admin, config: &'a Config) -> Self {
        let services = config.plan.services.iter();
        let backends = config.plan.backends.iter().map(|backend| &*backend.name);
        let datapath = admin.control.datapath();
        let location = |name: &str| admin.control.sites_of(name).ok().and_then(|(location, _)| location);
        Self {
            services: services.map(|service| ((service.address, service.protocol), &*service.name)).collect(),
            backends: backends.clone().filter_map(|name| Some((datapath.backend(name)?, name))).collect(),
            locations: backends.map(|name| (name, location(name))).collect(),
        }
    }

    fn view(&self, row: &FlowRow) -> FlowView {
        let backend = self.backends.get(&row.backend);
        FlowView {
            protocol: match row.protocol {
                Protocol::Tcp => "tcp".to_owned(),
                Protocol::Udp => "udp".to_owned(),
            },
            client: row.client,
            service: self.services.get(&(row.service, row.protocol)).map(|name| (*name).to_owned()),
            service_address: row.service,
            backend: backend.map(|name| (*name).to_owned()),
            location: backend.and_then(|name| self.locations.get(name)?.clone()),
            source: row.source,
            mode: match row.mode {
                Mode::Nat => "nat".to_owned(),
                Mode::Transparent => "transparent".to_owned(),
                Mode::Dsr => "dsr".to_owned(),
            },
            state: row.state.label().to_owned(),
            idle_ms: u64::try_from(row.idle.as_millis()).unwrap_or(u64::MAX),
        }
    }
}
