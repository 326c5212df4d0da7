//! What there is and how it is: status, services, backends.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::Admin;
use super::extract::Name;
use super::problem::Problem;
use crate::control::BackendView;
use crate::datapath::Protocol;
use crate::migrations::MigrationView;

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// Version of the load balancer.
    pub version: String,
    /// How packets are taken.
    pub hooks: Vec<HookView>,
    /// Number of services.
    pub services: usize,
    /// The backends, by name.
    pub backends: Vec<BackendView>,
    /// The migrations that are remembered, the oldest first.
    pub migrations: Vec<MigrationView>,
}

/// How one interface's packets are taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookView {
    /// Interface name.
    pub interface: String,
    /// For example `xdp native`.
    pub mode: String,
}

/// What clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    /// Name.
    pub name: String,
    /// Virtual address and port.
    pub address: std::net::SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Names of its backends.
    pub backends: Vec<String>,
}

impl Admin {
    /// All backends with what their checks say.
    pub(super) fn backends(&self) -> Vec<BackendView> {
        let views = self.control.views().into_iter();
        views.map(|view| BackendView { checks: self.health.of(&view.name), ..view }).collect()
    }
}

pub(super) async fn status(State(admin): State<Arc<Admin>>) -> axum::Json<StatusView> {
    let hooks = admin.control.datapath().hooks().into_iter();
    axum::Json(StatusView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        hooks: hooks.map(|hook| HookView { interface: hook.interface, mode: hook.mode }).collect(),
        services: admin.config.get().plan.services.len(),
        backends: admin.backends(),
        migrations: admin.migrations.all().iter().map(|migration| migration.view()).collect(),
    })
}

pub(super) async fn services(State(admin): State<Arc<Admin>>) -> axum::Json<Vec<ServiceView>> {
    let config = admin.config.get();
    let services = config.plan.services.iter().map(|service| ServiceView {
        name: service.name.clone(),
        address: service.address,
        protocol: match service.protocol {
            Protocol::Tcp => "tcp".to_owned(),
            Protocol::Udp => "udp".to_owned(),
        },
        backends: service.backends.clone(),
    });
    axum::Json(services.collect())
}

pub(super) async fn backends(State(admin): State<Arc<Admin>>) -> axum::Json<Vec<BackendView>> {
    axum::Json(admin.backends())
}

pub(super) async fn backend(
    State(admin): State<Arc<Admin>>,
    Name(name): Name,
) -> Result<axum::Json<BackendView>, Problem> {
    let view = admin.control.view(&name)?;
    Ok(axum::Json(BackendView { checks: admin.health.of(&name), ..view }))
}
