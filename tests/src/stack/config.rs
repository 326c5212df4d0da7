//! The configuration files of a stack, as our programs read them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use migrate::tls::Files;
use serde::Serialize;

use super::{HoldOptions, Runner, Tunnels, Workload};
use crate::{Lab, Site, address, podman};

/// The services that the workloads are behind, checked so often if at all.
pub(super) fn services(workloads: &[Workload], check_interval_ms: Option<u64>) -> Vec<Service<'_>> {
    let mut services: Vec<Service> = Vec::new();
    for workload in workloads {
        let (address, protocol) = (workload.service.to_string(), workload.protocol.name());
        match services.iter_mut().find(|found| found.address == address && found.protocol == protocol) {
            Some(service) => service.backends.push(&workload.name),
            None => services.push(Service {
                name: format!("{}-service", workload.name),
                address,
                protocol,
                mode: workload.mode.name(),
                backends: vec![&workload.name],
                check: check_interval_ms.map(|interval_ms| Check { kind: "tcp", interval_ms }),
            }),
        }
    }
    services
}

/// The daemon's configuration file.
pub(super) fn daemon(
    lab: &Lab,
    workloads: &[Workload],
    services: Vec<Service<'_>>,
    tunnels: Option<Tunnels>,
    hold: &HoldOptions,
    tls: &Files,
) -> String {
    let backends: Vec<_> = workloads
        .iter()
        .map(|workload| Backend {
            name: &workload.name,
            address: workload.address.to_string(),
            site: workload.site.name(),
        })
        .collect();
    write(&Daemon {
        admin: Admin { listen: address::ADMIN },
        datapath: Datapath {
            interfaces: ["c0", "a0", "b0"],
            pin_path: &lab.pin_path(),
            nat_source4: address::NAT_SOURCE4,
            nat_source6: address::NAT_SOURCE6,
        },
        hold,
        migrations: Migrations { journal: lab.dir().join("lb.redb") },
        tls,
        sites: Site::ALL.map(|site| SiteEntry {
            name: site.name(),
            next_hop: address::site4(site).to_string(),
            tunnel: tunnels.map(|family| match family {
                Tunnels::V4 => address::tunnel4(site).into(),
                Tunnels::V6 => address::tunnel6(site).into(),
            }),
            agent: format!("https://{}:{}", address::site4(site), address::AGENT_PORT),
        }),
        backends,
        services,
    })
}

/// A site's agent's configuration file: it knows every workload, and starts those that begin there.
pub(super) fn agent(
    lab: &Lab,
    site: Site,
    workloads: &[Workload],
    tunnels: Option<Tunnels>,
    tls: &Files,
) -> String {
    let workloads = workloads.iter().map(|workload| AgentWorkload {
        name: &workload.name,
        address: workload.address.to_string(),
        protocol: workload.protocol.name(),
        command: (workload.runner == Runner::Agent).then_some(&workload.command),
        dir: (workload.runner == Runner::Agent).then_some(workload.dir.as_deref().unwrap_or(lab.dir())),
        start: workload.site == site,
        memory: workload.memory.name(),
        runc: (workload.runner == Runner::Runc).then(|| Bundle { bundle: workload.bundle(lab, site) }),
        podman: (workload.runner == Runner::Podman).then_some(Named {}),
    });
    write(&Agent {
        site: site.name(),
        listen: format!("{}:{}", address::site4(site), address::AGENT_PORT),
        state_dir: &lab.dir().join(format!("agent-{}", site.name())),
        podman: podman::words(lab, site),
        tls,
        decapsulator: tunnels.map(|_| Decapsulator {
            interfaces: ["eth0"],
            endpoints: [address::tunnel4(site).into(), address::tunnel6(site).into()],
            from: [address::lb_at4(site).into(), address::lb_at6(site).into()],
            pin_path: lab.pin_path().join(format!("agent-{}", site.name())),
        }),
        workloads: workloads.collect(),
    })
}

fn write(config: &impl Serialize) -> String {
    toml::to_string(config).expect("names, numbers and UTF-8 paths can be written as TOML")
}

#[derive(Serialize)]
struct Daemon<'a> {
    admin: Admin,
    datapath: Datapath<'a>,
    hold: &'a HoldOptions,
    migrations: Migrations,
    tls: &'a Files,
    sites: [SiteEntry; 2],
    backends: Vec<Backend<'a>>,
    services: Vec<Service<'a>>,
}

#[derive(Serialize)]
struct Admin {
    listen: &'static str,
}

#[derive(Serialize)]
struct Datapath<'a> {
    interfaces: [&'static str; 3],
    pin_path: &'a Path,
    nat_source4: &'static str,
    nat_source6: &'static str,
}

#[derive(Serialize)]
struct Migrations {
    journal: PathBuf,
}

#[derive(Serialize)]
struct SiteEntry {
    name: &'static str,
    next_hop: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunnel: Option<IpAddr>,
    agent: String,
}

#[derive(Serialize)]
struct Backend<'a> {
    name: &'a str,
    address: String,
    site: &'static str,
}

#[derive(Serialize)]
pub(super) struct Service<'a> {
    name: String,
    address: String,
    protocol: &'static str,
    mode: &'static str,
    backends: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Check>,
}

#[derive(Serialize)]
struct Check {
    #[serde(rename = "type")]
    kind: &'static str,
    interval_ms: u64,
}

#[derive(Serialize)]
struct Agent<'a> {
    site: &'static str,
    listen: String,
    state_dir: &'a Path,
    podman: Vec<String>,
    tls: &'a Files,
    #[serde(skip_serializing_if = "Option::is_none")]
    decapsulator: Option<Decapsulator>,
    workloads: Vec<AgentWorkload<'a>>,
}

#[derive(Serialize)]
struct Decapsulator {
    interfaces: [&'static str; 1],
    endpoints: [IpAddr; 2],
    from: [IpAddr; 2],
    pin_path: PathBuf,
}

#[derive(Serialize)]
struct AgentWorkload<'a> {
    name: &'a str,
    address: String,
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'a Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dir: Option<&'a Path>,
    start: bool,
    memory: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    runc: Option<Bundle>,
    #[serde(skip_serializing_if = "Option::is_none")]
    podman: Option<Named>,
}

#[derive(Serialize)]
struct Bundle {
    bundle: PathBuf,
}

/// By the workload's name.
#[derive(Serialize)]
struct Named {}
