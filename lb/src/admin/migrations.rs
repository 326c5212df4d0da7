//! Migrations over HTTP: start, look at, follow, abort, resolve.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt as _};
use http::{StatusCode, header};
use migrate::coordinator::Verdict;
use serde::{Deserialize, Serialize};

use super::Admin;
use super::cutover::deadline;
use super::extract::{Json, Name};
use super::problem::Problem;
use crate::control::Policy;
use crate::migrations::{MigrationView, Told, Wish};

/// `POST /v1/migrations`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StartBody {
    backend: String,
    to: String,
    policy: Option<Policy>,
    deadline_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Started<'a> {
    id: &'a str,
}

pub(super) async fn start(
    State(admin): State<Arc<Admin>>,
    Json(body): Json<StartBody>,
) -> Result<Response, Problem> {
    let wish = Wish {
        backend: body.backend,
        to: body.to,
        policy: body.policy.unwrap_or(Policy::Hold),
        deadline: deadline(body.deadline_ms)?,
    };
    let migration = admin.migrations.start(&wish)?;
    let location = [(header::LOCATION, format!("/v1/migrations/{}", migration.id))];
    Ok((StatusCode::ACCEPTED, location, axum::Json(Started { id: &migration.id })).into_response())
}

pub(super) async fn all(State(admin): State<Arc<Admin>>) -> axum::Json<Vec<MigrationView>> {
    axum::Json(admin.migrations.all().iter().map(|migration| migration.view()).collect())
}

pub(super) async fn one(
    State(admin): State<Arc<Admin>>,
    Name(id): Name,
) -> Result<axum::Json<MigrationView>, Problem> {
    Ok(axum::Json(admin.migrations.get(&id)?.view()))
}

pub(super) async fn abort(State(admin): State<Arc<Admin>>, Name(id): Name) -> Result<Response, Problem> {
    let migration = admin.migrations.abort(&id)?;
    Ok((StatusCode::ACCEPTED, axum::Json(migration.view())).into_response())
}

/// `POST /v1/migrations/{id}/resolve`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResolveBody {
    r#as: Verdict,
}

pub(super) async fn resolve(
    State(admin): State<Arc<Admin>>,
    Name(id): Name,
    Json(body): Json<ResolveBody>,
) -> Result<Response, Problem> {
    let migration = admin.migrations.resolve(&id, body.r#as).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(migration.view())).into_response())
}

pub(super) async fn events(
    State(admin): State<Arc<Admin>>,
    Name(id): Name,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let migration = admin.migrations.get(&id)?;
    // An open stream would keep the server from stopping.
    let stop = admin.stop.clone().cancelled_owned();
    let events = migration.follow().take_until(stop).map(|told| Ok(event(&told)));
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(10))))
}

fn event(told: &Told) -> Event {
    let (name, json) = match told {
        Told::Phase(phase) => ("phase", serde_json::to_string(phase)),
        Told::Doubt(doubt) => ("doubt", serde_json::to_string(doubt)),
        Told::Finished(view) => ("finished", serde_json::to_string(view)),
    };
    Event::default().event(name).data(json.expect("views have only string keys and finite numbers"))
}
