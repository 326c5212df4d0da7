//! Errors as the admin API shows them: `application/problem+json` (RFC 9457), one kind per mistake.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};

use crate::cli::chain;
use crate::control::{ControlError, Refusal};
use crate::datapath::DatapathError;
use crate::migrations::MigrationError;

/// An error's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Names the kind of mistake, for programs.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind in words.
    pub title: String,
    /// The HTTP status code.
    pub status: u16,
    /// What happened and what to do about it.
    pub detail: String,
}

impl Problem {
    /// A problem of a kind; `kind` is its title in the form of a name.
    pub fn new(status: StatusCode, kind: &str, detail: impl Into<String>) -> Self {
        let mut title = kind.replace('-', " ");
        if let Some(first) = title.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        Self { kind: format!("urn:drover:{kind}"), title, status: status.as_u16(), detail: detail.into() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self)).into_response();
        let json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let (status, kind) = match &error {
            ControlError::UnknownBackend(_) => (StatusCode::NOT_FOUND, "unknown-backend"),
            ControlError::UnknownSite(_) => (StatusCode::NOT_FOUND, "unknown-site"),
            ControlError::Refused { refusal, .. } => (
                StatusCode::CONFLICT,
                match refusal {
                    Refusal::Stale { .. } => "stale-generation",
                    Refusal::NotHeld { .. } => "not-held",
                    Refusal::AlreadyHeld { .. } => "already-held",
                    Refusal::DeadlinePassed { .. } => "deadline-passed",
                    Refusal::SameLocation => "same-location",
                    Refusal::NotStaged => "not-staged",
                },
            ),
            ControlError::DrainedByFile(_) => (StatusCode::CONFLICT, "drained-by-configuration"),
            ControlError::InUse { .. } => (StatusCode::CONFLICT, "backend-in-use"),
            ControlError::SiteInUse { .. } => (StatusCode::CONFLICT, "site-in-use"),
            ControlError::Staging(_) => (StatusCode::CONFLICT, "staging"),
            ControlError::Datapath(DatapathError::Unreachable { .. }) => {
                (StatusCode::CONFLICT, "unreachable-site")
            }
            ControlError::Datapath(DatapathError::Full { .. }) => (StatusCode::CONFLICT, "table-full"),
            ControlError::Datapath(_) => (StatusCode::INTERNAL_SERVER_ERROR, "datapath-failed"),
        };
        Self::new(status, kind, error.to_string())
    }
}

impl From<MigrationError> for Problem {
    fn from(error: MigrationError) -> Self {
        let (status, kind) = match error {
            MigrationError::Control(error) => return error.into(),
            MigrationError::NoAgent { .. } => (StatusCode::CONFLICT, "no-agent"),
            MigrationError::SameLocation { .. } => (StatusCode::CONFLICT, "same-location"),
            MigrationError::LostLocation { .. } => (StatusCode::CONFLICT, "lost-location"),
            MigrationError::UnderWay { .. } => (StatusCode::CONFLICT, "migration-under-way"),
            MigrationError::NotForward { .. } => (StatusCode::CONFLICT, "not-forward"),
            MigrationError::NotAbortable { .. } => (StatusCode::CONFLICT, "not-abortable"),
            MigrationError::NotResolvable { .. } => (StatusCode::CONFLICT, "not-resolvable"),
            MigrationError::Journal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "no-journal"),
            MigrationError::UnknownMigration(_) => (StatusCode::NOT_FOUND, "unknown-migration"),
            MigrationError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        };
        Self::new(status, kind, chain(&error))
    }
}
