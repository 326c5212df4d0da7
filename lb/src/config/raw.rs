//! The configuration as the file says it: right types, no meaning checked yet.

use std::ops::Range;

use toml::de::DeTable;

use super::error::Collector;
use super::read::{Field, Reader};

pub(super) type Text = Option<Field<String>>;
pub(super) type Number = Option<Field<i64>>;

/// The whole file. What is absent, or was reported as unreadable, is `None`.
pub(super) struct Raw {
    pub(super) admin: Admin,
    pub(super) datapath: Datapath,
    pub(super) hold: Hold,
    pub(super) migrations: Migrations,
    pub(super) flows: Flows,
    pub(super) limits: Limits,
    pub(super) tls: Option<Tls>,
    pub(super) sites: Vec<Site>,
    pub(super) backends: Vec<Backend>,
    pub(super) services: Vec<Service>,
}

#[derive(Default)]
pub(super) struct Admin {
    pub(super) listen: Text,
    pub(super) allow_remote: Option<Field<bool>>,
}

#[derive(Default)]
pub(super) struct Datapath {
    pub(super) interfaces: Option<Field<Vec<String>>>,
    pub(super) pin_path: Text,
    pub(super) hook: Text,
    pub(super) nat_source4: Text,
    pub(super) nat_source6: Text,
}

#[derive(Default)]
pub(super) struct Hold {
    pub(super) max_bytes: Option<Field<toml::Value>>,
    pub(super) max_age_ms: Number,
    pub(super) deadline_ms: Number,
    pub(super) handshakes_ms: Number,
    pub(super) overflow: Text,
}

#[derive(Default)]
pub(super) struct Migrations {
    pub(super) journal: Text,
}

#[derive(Default)]
pub(super) struct Flows {
    pub(super) tcp_idle_s: Number,
    pub(super) tcp_half_open_s: Number,
    pub(super) tcp_closing_s: Number,
    pub(super) udp_idle_s: Number,
}

#[derive(Default)]
pub(super) struct Limits {
    pub(super) flows: Number,
    pub(super) newcomers: Number,
    pub(super) services: Number,
    pub(super) backends: Number,
    pub(super) members: Number,
    pub(super) sites: Number,
    pub(super) new_flows_per_second_per_cpu: Number,
    pub(super) new_flows_per_second_per_prefix: Number,
}

pub(super) struct Tls {
    pub(super) ca: Text,
    pub(super) certificate: Text,
    pub(super) key: Text,
}

pub(super) struct Site {
    pub(super) name: Text,
    /// The table's place, for what is missing in it.
    pub(super) at: Range<usize>,
    pub(super) path: String,
    pub(super) next_hop: Text,
    pub(super) tunnel: Text,
    pub(super) tunnel_source: Text,
    pub(super) agent: Text,
}

pub(super) struct Backend {
    pub(super) name: Text,
    pub(super) address: Text,
    pub(super) site: Text,
    pub(super) weight: Number,
    pub(super) drain: Option<Field<bool>>,
    pub(super) check: Option<Check>,
}

pub(super) struct Service {
    pub(super) name: Text,
    pub(super) address: Text,
    pub(super) protocol: Text,
    pub(super) backends: Option<Field<Vec<String>>>,
    pub(super) mode: Text,
    pub(super) during_hold: Text,
    pub(super) slow_start_s: Number,
    pub(super) all_down: Text,
    pub(super) check: Option<Check>,
}

/// A `check` table: of a service, or what a backend has otherwise than its services.
#[derive(Clone, Default)]
pub(super) struct Check {
    pub(super) at: Range<usize>,
    pub(super) path: String,
    pub(super) kind: Text,
    pub(super) interval_ms: Number,
    pub(super) timeout_ms: Number,
    pub(super) rise: Number,
    pub(super) fall: Number,
    pub(super) http_path: Text,
    pub(super) http_status: Option<Field<toml::Value>>,
    pub(super) http_host: Text,
    pub(super) send: Text,
    pub(super) send_hex: Text,
    pub(super) expect: Text,
    pub(super) expect_hex: Text,
    pub(super) resets_per_s: Number,
}

/// Reads the file's tables. `None` when the text is not TOML; the errors then say where.
pub(super) fn read(text: &str, errors: &mut Collector) -> Option<Raw> {
    let (document, syntax) = DeTable::parse_recoverable(text);
    for error in &syntax {
        errors.push(&error.span().unwrap_or(0..0), "", error.message().trim_end());
    }
    if !syntax.is_empty() {
        return None;
    }
    let at = document.span();
    let mut top = Reader::new(String::new(), at.start..at.start, document.into_inner());
    let raw = Raw {
        admin: top.table("admin", errors).map(|t| admin(t, errors)).unwrap_or_default(),
        datapath: match top.table("datapath", errors) {
            Some(table) => datapath(table, errors),
            None => {
                errors.push(
                    &top.at,
                    "datapath.interfaces",
                    "is missing: name the interfaces that carry packets",
                );
                Datapath::default()
            }
        },
        hold: top.table("hold", errors).map(|t| hold(t, errors)).unwrap_or_default(),
        migrations: top.table("migrations", errors).map(|t| migrations(t, errors)).unwrap_or_default(),
        flows: top.table("flows", errors).map(|t| flows(t, errors)).unwrap_or_default(),
        limits: top.table("limits", errors).map(|t| limits(t, errors)).unwrap_or_default(),
        tls: top.table("tls", errors).map(|t| tls(t, errors)),
        sites: top.tables("sites", errors).into_iter().map(|t| site(t, errors)).collect(),
        backends: top.tables("backends", errors).into_iter().map(|t| backend(t, errors)).collect(),
        services: top.tables("services", errors).into_iter().map(|t| service(t, errors)).collect(),
    };
    for (name, found) in [
        ("sites", !raw.sites.is_empty()),
        ("backends", !raw.backends.is_empty()),
        ("services", !raw.services.is_empty()),
    ] {
        if !found {
            errors.push(&top.at, name, format!("is missing or empty: at least one [[{name}]] is needed"));
        }
    }
    top.finish(errors);
    Some(raw)
}

fn admin(mut table: Reader<'_>, errors: &mut Collector) -> Admin {
    let admin = Admin {
        listen: table.optional("listen", errors),
        allow_remote: table.optional("allow_remote", errors),
    };
    table.finish(errors);
    admin
}

fn datapath(mut table: Reader<'_>, errors: &mut Collector) -> Datapath {
    let datapath = Datapath {
        interfaces: table.required("interfaces", errors),
        pin_path: table.optional("pin_path", errors),
        hook: table.optional("hook", errors),
        nat_source4: table.optional("nat_source4", errors),
        nat_source6: table.optional("nat_source6", errors),
    };
    table.finish(errors);
    datapath
}

fn hold(mut table: Reader<'_>, errors: &mut Collector) -> Hold {
    let hold = Hold {
        max_bytes: table.optional("max_bytes", errors),
        max_age_ms: table.optional("max_age_ms", errors),
        deadline_ms: table.optional("deadline_ms", errors),
        handshakes_ms: table.optional("handshakes_ms", errors),
        overflow: table.optional("overflow", errors),
    };
    table.finish(errors);
    hold
}

fn migrations(mut table: Reader<'_>, errors: &mut Collector) -> Migrations {
    let migrations = Migrations { journal: table.optional("journal", errors) };
    table.finish(errors);
    migrations
}

fn flows(mut table: Reader<'_>, errors: &mut Collector) -> Flows {
    let flows = Flows {
        tcp_idle_s: table.optional("tcp_idle_s", errors),
        tcp_half_open_s: table.optional("tcp_half_open_s", errors),
        tcp_closing_s: table.optional("tcp_closing_s", errors),
        udp_idle_s: table.optional("udp_idle_s", errors),
    };
    table.finish(errors);
    flows
}

fn limits(mut table: Reader<'_>, errors: &mut Collector) -> Limits {
    let limits = Limits {
        flows: table.optional("flows", errors),
        newcomers: table.optional("newcomers", errors),
        services: table.optional("services", errors),
        backends: table.optional("backends", errors),
        members: table.optional("members", errors),
        sites: table.optional("sites", errors),
        new_flows_per_second_per_cpu: table.optional("new_flows_per_second_per_cpu", errors),
        new_flows_per_second_per_prefix: table.optional("new_flows_per_second_per_prefix", errors),
    };
    table.finish(errors);
    limits
}

fn tls(mut table: Reader<'_>, errors: &mut Collector) -> Tls {
    let tls = Tls {
        ca: table.required("ca", errors),
        certificate: table.required("certificate", errors),
        key: table.required("key", errors),
    };
    table.finish(errors);
    tls
}

fn site(mut table: Reader<'_>, errors: &mut Collector) -> Site {
    let site = Site {
        name: table.required("name", errors),
        at: table.at.clone(),
        path: table.path.clone(),
        next_hop: table.optional("next_hop", errors),
        tunnel: table.optional("tunnel", errors),
        tunnel_source: table.optional("tunnel_source", errors),
        agent: table.optional("agent", errors),
    };
    table.finish(errors);
    site
}

fn backend(mut table: Reader<'_>, errors: &mut Collector) -> Backend {
    let backend = Backend {
        name: table.required("name", errors),
        address: table.required("address", errors),
        site: table.required("site", errors),
        weight: table.optional("weight", errors),
        drain: table.optional("drain", errors),
        check: table.table("check", errors).map(|t| check(t, errors)),
    };
    table.finish(errors);
    backend
}

fn service(mut table: Reader<'_>, errors: &mut Collector) -> Service {
    let service = Service {
        name: table.required("name", errors),
        address: table.required("address", errors),
        protocol: table.required("protocol", errors),
        backends: table.required("backends", errors),
        mode: table.optional("mode", errors),
        during_hold: table.optional("during_hold", errors),
        slow_start_s: table.optional("slow_start_s", errors),
        all_down: table.optional("all_down", errors),
        check: table.table("check", errors).map(|t| check(t, errors)),
    };
    table.finish(errors);
    service
}

fn check(mut table: Reader<'_>, errors: &mut Collector) -> Check {
    let check = Check {
        at: table.at.clone(),
        path: table.path.clone(),
        kind: table.optional("type", errors),
        interval_ms: table.optional("interval_ms", errors),
        timeout_ms: table.optional("timeout_ms", errors),
        rise: table.optional("rise", errors),
        fall: table.optional("fall", errors),
        http_path: table.optional("path", errors),
        http_status: table.optional("status", errors),
        http_host: table.optional("host", errors),
        send: table.optional("send", errors),
        send_hex: table.optional("send_hex", errors),
        expect: table.optional("expect", errors),
        expect_hex: table.optional("expect_hex", errors),
        resets_per_s: table.optional("resets_per_s", errors),
    };
    table.finish(errors);
    check
}
