//! What handlers take from a request, with every way of getting it wrong as a [`Problem`].

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use bytes::Bytes;
use http::request::Parts;
use http::{StatusCode, header};
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;

use super::problem::Problem;

/// The largest request of this API has four short fields.
const MAX_BODY: usize = 64 << 10;
/// So much of a body that is too large is read and thrown away, so that its sender reads the answer instead
/// of a broken connection.
const MAX_DISCARDED: usize = 64 << 20;
/// A body of this API comes with its head.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// The name in the path.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(rejection) => Err(Problem::new(StatusCode::BAD_REQUEST, "bad-path", rejection.body_text())),
        }
    }
}

/// The part behind the question mark.
pub(super) struct Parameters<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(parameters)) => Ok(Self(parameters)),
            Err(rejection) => {
                Err(Problem::new(StatusCode::BAD_REQUEST, "wrong-parameter", rejection.body_text()))
            }
        }
    }
}

/// A JSON object as the body.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let declared = declared.and_then(|value| value.parse().ok()).unwrap_or(0);
        let body = tokio::time::timeout(BODY_PATIENCE, read(request.into_body(), declared)).await;
        let body = body.unwrap_or_else(|_| {
            let detail = format!("the body did not arrive within {} s", BODY_PATIENCE.as_secs());
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "slow-body", detail))
        })?;
        parse(&body).map(Self)
    }
}

async fn read(mut body: Body, declared: usize) -> Result<Bytes, Problem> {
    let mut kept = Vec::new();
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            Problem::new(StatusCode::BAD_REQUEST, "broken-body", format!("the body broke off: {error}"))
        })?;
        let Some(data) = frame.data_ref() else { continue };
        read += data.len();
        if read.max(declared) <= MAX_BODY {
            kept.extend_from_slice(data);
        } else if read.max(declared) > MAX_DISCARDED {
            break;
        }
    }
    if read.max(declared) > MAX_BODY {
        let detail =
            format!("the body has more than {} KiB; no request of this API needs that", MAX_BODY >> 10);
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", detail));
    }
    Ok(kept.into())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let bad = |kind, detail: String| Problem::new(StatusCode::BAD_REQUEST, kind, detail);
    // Serde would take an array for a struct as well, field by field.
    let value = body.iter().find(|byte| !byte.is_ascii_whitespace());
    match value {
        None => return Err(bad("not-json", "the body is empty; a JSON object is expected".to_owned())),
        Some(b'[') => return Err(bad("wrong-field", "an array; a JSON object is expected".to_owned())),
        Some(_) => {}
    }
    // The whole of it first: a body that is not JSON is told so, whatever fields it begins with.
    serde_json::from_slice::<serde::de::IgnoredAny>(body)
        .map_err(|error| bad("not-json", format!("the body is not JSON: {error}")))?;
    serde_json::from_slice(body).map_err(|error| bad("wrong-field", error.to_string()))
}
