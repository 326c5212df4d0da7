//! The admin API: HTTP in front of `control` and `migrations`.
//!
//! Every error is a [`Problem`]; a refused request changes nothing. The routes are described in
//! `openapi.json` beside this file, and a test holds them to it. Not here: any decision about a gate or a
//! migration.

mod capture;
mod cutover;
mod extract;
mod flows;
mod guard;
mod metrics;
mod migrations;
mod problem;
mod reload;
mod serve;
mod shares;
mod status;
mod traffic;

use std::sync::Arc;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{Method, StatusCode, Uri, header};
use tokio_util::sync::CancellationToken;

pub use flows::{FlowView, FlowsView};
pub use problem::Problem;
pub use serve::serve;
pub use status::{HookView, ServiceView, StatusView};
pub use traffic::{BackendTraffic, FlowTableView, FlowTablesView, MemberView, TrafficReport};

use crate::config::Current;
use crate::control::Control;
use crate::health::Board;
use crate::migrations::Migrations;
use crate::reload::Reloader;

/// What the handlers work on.
pub struct Admin {
    /// What the load balancer was told to be.
    pub config: Current,
    /// The gates.
    pub control: Arc<Control>,
    /// What the health checks have found out.
    pub health: Board,
    /// The migrations.
    pub migrations: Arc<Migrations>,
    /// Reads the configuration again.
    pub reloader: Arc<Reloader>,
    /// Cancelled when the server is to stop; ends the streams of events.
    pub stop: CancellationToken,
}

/// The routes.
pub fn router(admin: Arc<Admin>) -> Router {
    let loopback = admin.config.get().admin.listen.ip().is_loopback();
    let hosts = if loopback { guard::Hosts::Loopback } else { guard::Hosts::Any };
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi))
        .route("/v1/status", get(status::status))
        .route("/v1/services", get(status::services))
        .route("/v1/backends", get(status::backends))
        .route("/v1/backends/{name}", get(status::backend))
        .route("/v1/backends/{name}/hold", post(cutover::hold))
        .route("/v1/backends/{name}/flip", post(cutover::flip))
        .route("/v1/backends/{name}/resume", post(cutover::resume))
        .route("/v1/backends/{name}/drain", post(shares::drain))
        .route("/v1/backends/{name}/undrain", post(shares::undrain))
        .route("/v1/reload", post(reload::reload))
        .route("/v1/flows", get(flows::flows))
        .route("/v1/traffic", get(traffic::traffic))
        .route("/v1/capture", get(capture::capture))
        .route("/v1/migrations", get(migrations::all).post(migrations::start))
        .route("/v1/migrations/{id}", get(migrations::one).delete(migrations::abort))
        .route("/v1/migrations/{id}/events", get(migrations::events))
        .route("/v1/migrations/{id}/resolve", post(migrations::resolve))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::middleware::from_fn_with_state(hosts, guard::guard))
        .with_state(admin)
}

async fn unknown_route(uri: Uri) -> Problem {
    let detail = format!("there is nothing at {}; /openapi.json lists what there is", uri.path());
    Problem::new(StatusCode::NOT_FOUND, "unknown-route", detail)
}

async fn wrong_method(method: Method, uri: Uri) -> Problem {
    let detail = format!("{method} means nothing at {}; the Allow header says what does", uri.path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "wrong-method", detail)
}

async fn openapi() -> Response {
    let text = include_str!("openapi.json").replace("0.0.0", env!("CARGO_PKG_VERSION"));
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

#[cfg(test)]
pub(crate) mod tests;
