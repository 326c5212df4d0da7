//! `GET /metrics`: counters and gauges in Prometheus' text format.

use std::fmt::{Display, Write as _};
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use lb_core::{Class, Reason};

use super::Admin;
use crate::control::BackendView;
use crate::datapath::observe::{FlowTables, Member};
use crate::health::{CheckState, CheckView};

pub(super) async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, text(&admin)).into_response()
}

/// One metric: its samples come after its description.
struct Metric<'t> {
    text: &'t mut String,
    name: &'static str,
}

impl Metric<'_> {
    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        let mut list = String::new();
        for (name, value) in labels {
            let comma = if list.is_empty() { "" } else { "," };
            // Names are checked and reasons are ours: nothing here needs escaping.
            let _ = write!(list, "{comma}{name}=\"{value}\"");
        }
        let braces = if list.is_empty() { String::new() } else { format!("{{{list}}}") };
        let _ = writeln!(self.text, "{}{braces} {value}", self.name);
    }
}

fn metric<'t>(text: &'t mut String, name: &'static str, kind: &str, help: &str) -> Metric<'t> {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    Metric { text, name }
}

fn text(admin: &Admin) -> String {
    let mut text = String::new();
    metric(&mut text, "drover_build_info", "gauge", "Version of the load balancer.")
        .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    packets(&mut text, admin);
    let backends = admin.backends();
    gates(&mut text, &backends);
    traffic(&mut text, &backends);
    members(&mut text, admin);
    flows(&mut text, admin);
    holds(&mut text, &backends);
    checks(&mut text, &backends);
    migrations(&mut text, admin);
    text
}

fn packets(text: &mut String, admin: &Admin) {
    let mut packets =
        metric(text, "drover_packets_total", "counter", "Packets by what was done with them and why.");
    for (label, count) in admin.control.datapath().reasons() {
        let class = Reason::ALL.iter().find(|reason| reason.label() == label).map(|reason| reason.class());
        let class = match class {
            Some(Class::Forward) => "forward",
            Some(Class::Hold) => "hold",
            Some(Class::Pass) => "pass",
            Some(Class::Drop) => "drop",
            None => "other",
        };
        packets.sample(&[("reason", label), ("class", class)], count);
    }
}

fn gates(text: &mut String, backends: &[BackendView]) {
    let mut gates = metric(text, "drover_backend_gate", "gauge", "1 for the gate that the backend has.");
    for backend in backends {
        for gate in ["forward", "hold_new", "hold", "drop", "replay"] {
            gates.sample(&[("backend", &backend.name), ("gate", gate)], u8::from(backend.gate == gate));
        }
    }
    let mut locations =
        metric(text, "drover_backend_location", "gauge", "1 for the site where the backend runs.");
    for backend in backends {
        let site = backend.location.as_deref().unwrap_or("unknown");
        locations.sample(&[("backend", &backend.name), ("site", site)], 1);
    }
    let mut generations =
        metric(text, "drover_backend_generation", "gauge", "Grows with each change of gate or location.");
    for backend in backends {
        generations.sample(&[("backend", &backend.name)], backend.generation);
    }
}

fn traffic(text: &mut String, backends: &[BackendView]) {
    let directions = |backend: &BackendView| {
        let traffic = backend.traffic;
        [
            ("to_backend", traffic.to_backend_packets, traffic.to_backend_bytes),
            ("to_clients", traffic.to_clients_packets, traffic.to_clients_bytes),
        ]
    };
    let mut packets =
        metric(text, "drover_backend_packets_total", "counter", "Packets of a backend by direction.");
    for backend in backends {
        for (direction, count, _) in directions(backend) {
            packets.sample(&[("backend", &backend.name), ("direction", direction)], count);
        }
    }
    let mut bytes =
        metric(text, "drover_backend_bytes_total", "counter", "Bytes of those, with link headers.");
    for backend in backends {
        for (direction, _, count) in directions(backend) {
            bytes.sample(&[("backend", &backend.name), ("direction", direction)], count);
        }
    }
}

fn members(text: &mut String, admin: &Admin) {
    let members = admin.control.datapath().members();
    let mut each = |name, help, values: &dyn Fn(&Member) -> [(&'static str, u64); 2]| {
        let mut metric = metric(text, name, "counter", help);
        for member in &members {
            for (direction, count) in values(member) {
                let labels =
                    [("service", &*member.service), ("backend", &*member.backend), ("direction", direction)];
                metric.sample(&labels, count);
            }
        }
    };
    each(
        "drover_member_packets_total",
        "Packets of a backend of a service by direction.",
        &|Member { traffic, .. }| {
            [("to_backend", traffic.to_backend_packets), ("to_clients", traffic.to_clients_packets)]
        },
    );
    each("drover_member_bytes_total", "Bytes of those, with link headers.", &|Member { traffic, .. }| {
        [("to_backend", traffic.to_backend_bytes), ("to_clients", traffic.to_clients_bytes)]
    });
    let mut opened =
        metric(text, "drover_member_flows_opened_total", "counter", "New flows of a backend of a service.");
    for member in &members {
        opened.sample(&[("service", &member.service), ("backend", &member.backend)], member.opened);
    }
    let mut resets =
        metric(text, "drover_member_resets_total", "counter", "TCP resets from a backend of a service.");
    for member in &members {
        resets.sample(&[("service", &member.service), ("backend", &member.backend)], member.resets);
    }
}

fn flows(text: &mut String, admin: &Admin) {
    let FlowTables { tables, removed, pass } = admin.control.datapath().flow_tables();
    let mut flows = metric(text, "drover_flows", "gauge", "Flows when their table was last looked at.");
    for table in &tables {
        for (protocol, count) in [("tcp", table.tcp_flows), ("other", table.other_flows)] {
            let labels = [("family", table.family), ("standing", table.standing), ("protocol", protocol)];
            flows.sample(&labels, count);
        }
    }
    let mut entries =
        metric(text, "drover_flow_entries", "gauge", "Entries of a flow table; most flows have two.");
    for table in &tables {
        entries.sample(&[("family", table.family), ("standing", table.standing)], table.entries);
    }
    let mut most =
        metric(text, "drover_flow_entries_limit", "gauge", "Entries that a flow table has room for.");
    for table in &tables {
        most.sample(&[("family", table.family), ("standing", table.standing)], table.most);
    }
    let mut ended = metric(text, "drover_flows_removed_total", "counter", "Flows removed, by cause.");
    for (cause, count) in removed {
        ended.sample(&[("cause", cause)], count);
    }
    if let Some(pass) = pass {
        metric(text, "drover_flow_pass_seconds", "gauge", "How long the last look at every flow took.")
            .sample(&[], pass.as_secs_f64());
    }
    metric(text, "drover_samples_lost_total", "counter", "Sampled packets that no capture got.")
        .sample(&[], admin.control.datapath().lost_samples());
}

fn holds(text: &mut String, backends: &[BackendView]) {
    let mut packets = metric(
        text,
        "drover_hold_packets",
        "gauge",
        "Packets of a backend's current or last hold by what became of them.",
    );
    for backend in backends {
        let hold = backend.hold;
        for (what, count) in [
            ("held", hold.held_packets),
            ("replayed", hold.replayed_packets),
            ("dropped", hold.dropped_packets),
        ] {
            packets.sample(&[("backend", &backend.name), ("what", what)], count);
        }
    }
    let mut bytes =
        metric(text, "drover_hold_bytes", "gauge", "Bytes held by a backend's current or last hold.");
    for backend in backends {
        bytes.sample(&[("backend", &backend.name)], backend.hold.held_bytes);
    }
}

fn checks(text: &mut String, backends: &[BackendView]) {
    let of = |metric: &mut Metric<'_>, value: &dyn Fn(&CheckView) -> u64| {
        for backend in backends {
            for check in &backend.checks {
                let labels =
                    [("backend", &*backend.name), ("service", &*check.service), ("kind", &*check.kind)];
                metric.sample(&labels, value(check));
            }
        }
    };
    let mut up =
        metric(text, "drover_check_up", "gauge", "1 while the check does not say that the backend is down.");
    of(&mut up, &|check| u64::from(check.state != CheckState::Down));
    let mut suspended = metric(
        text,
        "drover_check_suspended",
        "gauge",
        "1 while the backend is held or moves and is not judged.",
    );
    of(&mut suspended, &|check| u64::from(check.suspended));
    let mut probes = metric(text, "drover_check_probes_total", "counter", "Probes that came to a result.");
    of(&mut probes, &|check| check.probes);
    let mut failures = metric(
        text,
        "drover_check_failures_total",
        "counter",
        "Probes that failed, and times with too many resets from the backend.",
    );
    of(&mut failures, &|check| check.failures);
}

fn migrations(text: &mut String, admin: &Admin) {
    let outcomes = admin.migrations.outcomes();
    let mut ended =
        metric(text, "drover_migrations_total", "counter", "Migrations that have ended, by outcome.");
    for (outcome, count) in [
        ("committed", outcomes.committed),
        ("rolled_back", outcomes.rolled_back),
        ("in_doubt", outcomes.in_doubt),
    ] {
        ended.sample(&[("outcome", outcome)], count);
    }
    metric(text, "drover_migrations_running", "gauge", "Migrations under way.")
        .sample(&[], admin.migrations.running());
}
