//! Drains: no new flows for a backend, those that it has stay.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;

use super::Admin;
use super::extract::Name;
use super::problem::Problem;
use crate::control::BackendView;

type Answer = Result<axum::Json<BackendView>, Problem>;

pub(super) async fn drain(State(admin): State<Arc<Admin>>, Name(backend): Name) -> Answer {
    set_drained(admin, backend, true).await
}

pub(super) async fn undrain(State(admin): State<Arc<Admin>>, Name(backend): Name) -> Answer {
    set_drained(admin, backend, false).await
}

/// Computes rings, which may wait for a reload.
async fn set_drained(admin: Arc<Admin>, backend: String, drained: bool) -> Answer {
    let control = admin.control.clone();
    let done = tokio::task::spawn_blocking(move || {
        control.set_drained(&backend, drained)?;
        control.view(&backend)
    });
    let done = done.await.map_err(|panic| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "datapath-failed", panic.to_string())
    })?;
    Ok(axum::Json(done?))
}
