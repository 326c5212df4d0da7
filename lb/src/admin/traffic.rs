//! `GET /v1/traffic`: counters of everything that is carried, for whoever makes rates out of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Admin;
use crate::control::{BackendView, HoldView, TrafficView};
use crate::datapath::observe::FlowTables;
use crate::health::CheckState;

/// `GET /v1/traffic`. Counters grow from when the tables were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficReport {
    /// When the counters were read, in microseconds of a clock that never jumps.
    pub clock_us: u64,
    /// Each backend of each service.
    pub members: Vec<MemberView>,
    /// The backends, by name.
    pub backends: BTreeMap<String, BackendTraffic>,
    /// Packets by reason.
    pub reasons: BTreeMap<String, u64>,
    /// The flow tables.
    pub flow_tables: FlowTablesView,
}

/// A backend as one service uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// The service.
    pub service: String,
    /// The backend.
    pub backend: String,
    /// What was carried.
    pub traffic: TrafficView,
    /// New flows.
    pub new_flows: u64,
    /// TCP resets from the backend.
    pub resets: u64,
    /// What the service's check says of it; `null` where it is not checked.
    pub check: Option<CheckState>,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendTraffic {
    /// The site where it runs.
    pub location: Option<String>,
    /// `forward`, `hold_new`, `hold`, `drop` or `replay`.
    pub gate: String,
    /// What the current or last hold has kept and lost.
    pub hold: HoldView,
}

/// The flow tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTablesView {
    /// Each table, as it was when it was last looked at.
    pub tables: Vec<FlowTableView>,
    /// Flows removed since the daemon started, by cause.
    pub removed: BTreeMap<String, u64>,
}

/// A flow table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTableView {
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// `established` or `newcomers`.
    pub standing: String,
    /// Flows.
    pub flows: u64,
    /// Entries; most flows have two.
    pub entries: u64,
    /// Entries that it has room for.
    pub most: u64,
}

impl From<FlowTables> for FlowTablesView {
    fn from(flows: FlowTables) -> Self {
        let tables = flows.tables.iter().map(|table| FlowTableView {
            family: table.family.to_owned(),
            standing: table.standing.to_owned(),
            flows: table.tcp_flows + table.other_flows,
            entries: table.entries,
            most: table.most,
        });
        let removed = flows.removed.iter().map(|(cause, count)| ((*cause).to_owned(), *count));
        Self { tables: tables.collect(), removed: removed.collect() }
    }
}

pub(super) async fn traffic(State(admin): State<Arc<Admin>>) -> axum::Json<TrafficReport> {
    let datapath = admin.control.datapath();
    let clock = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    let check = |backend: &str, service: &str| {
        let checks = admin.health.of(backend);
        checks.into_iter().find(|check| check.service == service).map(|check| check.state)
    };
    let members = datapath.members().into_iter().map(|member| MemberView {
        check: check(&member.backend, &member.service),
        service: member.service,
        backend: member.backend,
        traffic: member.traffic.into(),
        new_flows: member.opened,
        resets: member.resets,
    });
    let backend = |view: BackendView| {
        (view.name, BackendTraffic { location: view.location, gate: view.gate, hold: view.hold })
    };
    axum::Json(TrafficReport {
        clock_us: u64::try_from(clock.as_micros()).unwrap_or(u64::MAX),
        members: members.collect(),
        backends: admin.control.views().into_iter().map(backend).collect(),
        reasons: datapath.reasons().into_iter().map(|(label, count)| (label.to_owned(), count)).collect(),
        flow_tables: datapath.flow_tables().into(),
    })
}
