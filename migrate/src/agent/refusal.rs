//! What the API answers where it does not do what it was asked.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};

use super::readiness::ReadinessError;
use super::site::SiteError;
use crate::client::chain;
use crate::protocol::Problem;

/// An error as the API shows it.
pub(super) struct Refusal {
    status: StatusCode,
    pub(super) detail: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into() }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = Problem {
            kind: "about:blank".to_owned(),
            title: self.status.canonical_reason().unwrap_or("Error").to_owned(),
            status: self.status.as_u16(),
            detail: self.detail,
        };
        let json = [(header::CONTENT_TYPE, "application/problem+json")];
        (self.status, json, Json(problem).0.to_body()).into_response()
    }
}

impl Problem {
    fn to_body(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("the protocol's types have only string keys")
    }
}

impl From<SiteError> for Refusal {
    fn from(error: SiteError) -> Self {
        let status = match &error {
            SiteError::Unknown(..) => StatusCode::NOT_FOUND,
            SiteError::Busy(..)
            | SiteError::Absent(..)
            | SiteError::NoAddress { .. }
            | SiteError::Container(_) => StatusCode::CONFLICT,
            SiteError::Address { .. } => StatusCode::BAD_REQUEST,
            SiteError::Start { .. }
            | SiteError::User(_)
            | SiteError::Cgroup(_)
            | SiteError::Holder(_)
            | SiteError::Images(_)
            | SiteError::Silence(_)
            | SiteError::Decapsulator(_)
            | SiteError::State(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, chain(&error))
    }
}

impl From<ReadinessError> for Refusal {
    fn from(error: ReadinessError) -> Self {
        let status = match &error {
            ReadinessError::Refused(_) | ReadinessError::Container(_) => StatusCode::CONFLICT,
            ReadinessError::Criu { .. }
            | ReadinessError::Images(_)
            | ReadinessError::Host(_)
            | ReadinessError::Broken(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, chain(&error))
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}
