//! The cutover alone, for orchestrators with a checkpoint and restore of their own: hold, flip, resume.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::Admin;
use super::extract::{Json, Name};
use super::problem::Problem;
use crate::config::MAX_DEADLINE_MS;
use crate::control::{ControlError, Policy, Refusal};
use crate::migrations::MigrationError;

/// `POST /v1/backends/{name}/hold`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HoldBody {
    policy: Option<Policy>,
    deadline_ms: Option<u64>,
}

/// `POST /v1/backends/{name}/flip`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FlipBody {
    generation: u32,
    to: String,
}

/// `POST /v1/backends/{name}/resume`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResumeBody {
    generation: u32,
}

/// What all three answer.
#[derive(Debug, Serialize)]
pub(super) struct Generation {
    generation: u32,
}

/// A deadline within its bounds.
pub(super) fn deadline(ms: Option<u64>) -> Result<Option<Duration>, Problem> {
    match ms {
        None => Ok(None),
        Some(ms @ 1..=MAX_DEADLINE_MS) => Ok(Some(Duration::from_millis(ms))),
        Some(ms) => {
            let detail = format!("deadline_ms: {ms} is outside of 1 to {MAX_DEADLINE_MS}");
            Err(Problem::new(StatusCode::BAD_REQUEST, "wrong-field", detail))
        }
    }
}

type Answer = Result<axum::Json<Generation>, Problem>;

pub(super) async fn hold(
    State(admin): State<Arc<Admin>>,
    Name(backend): Name,
    Json(body): Json<HoldBody>,
) -> Answer {
    let deadline = deadline(body.deadline_ms)?;
    let policy = body.policy.unwrap_or(Policy::Hold);
    let hold = |control: &crate::control::Control| control.hold(&backend, policy, deadline);
    let generation = admin.migrations.unless_under_way(&backend, hold)?;
    Ok(axum::Json(Generation { generation }))
}

pub(super) async fn flip(
    State(admin): State<Arc<Admin>>,
    Name(backend): Name,
    Json(FlipBody { generation: held, to }): Json<FlipBody>,
) -> Answer {
    let flip = || admin.migrations.unless_under_way(&backend, |control| control.flip(&backend, held, &to));
    let generation = match flip() {
        // Everything else is right, so stage for callers who had no occasion to. No migration can begin
        // meanwhile: it would need an open gate.
        Err(MigrationError::Control(ControlError::Refused { refusal: Refusal::NotStaged, .. })) => {
            stage(&admin, &backend, &to).await?;
            flip()?
        }
        result => result?,
    };
    tracing::info!(%backend, generation, %to, "flip by hand");
    Ok(axum::Json(Generation { generation }))
}

/// Stages a site, which may wait for the network.
async fn stage(admin: &Admin, backend: &str, to: &str) -> Result<(), Problem> {
    let (control, backend, to) = (admin.control.clone(), backend.to_owned(), to.to_owned());
    let staged = tokio::task::spawn_blocking(move || control.stage(&backend, &to)).await;
    staged.map_err(|panic| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "datapath-failed", panic.to_string())
    })??;
    Ok(())
}

pub(super) async fn resume(
    State(admin): State<Arc<Admin>>,
    Name(backend): Name,
    Json(ResumeBody { generation: held }): Json<ResumeBody>,
) -> Answer {
    let generation = admin.migrations.unless_under_way(&backend, |control| control.resume(&backend, held))?;
    Ok(axum::Json(Generation { generation }))
}
