//! `POST /v1/reload`: the configuration is read again.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use serde::Deserialize;

use super::Admin;
use super::extract::Json;
use super::problem::Problem;
use crate::config::LoadError;
use crate::reload::{ReloadError, ReloadReport};

/// `POST /v1/reload`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReloadBody {
    check: Option<bool>,
}

pub(super) async fn reload(
    State(admin): State<Arc<Admin>>,
    Json(body): Json<ReloadBody>,
) -> Result<axum::Json<ReloadReport>, Problem> {
    Ok(axum::Json(admin.reloader.reload(body.check.unwrap_or(false)).await?))
}

impl From<ReloadError> for Problem {
    fn from(error: ReloadError) -> Self {
        let kind = match error {
            ReloadError::Control(error) => return error.into(),
            ReloadError::Config(LoadError::Read { .. }) => "unreadable-configuration",
            ReloadError::Config(LoadError::Invalid(_)) => "invalid-configuration",
            ReloadError::Fixed(_) => "needs-restart",
            ReloadError::NoFile => "no-configuration-file",
        };
        Self::new(StatusCode::CONFLICT, kind, crate::cli::chain(&error))
    }
}
