//! The agent's HTTP API on hyper: HTTP/2 for coordinators and agents, HTTP/1.1 for curl.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json};
use http::{StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;

use super::admission::{self, HEALTH, IMAGES, MANIFEST, MEMORY};
use super::door::{Caller, Door, Entered};
use super::readiness::ReadinessError;
use super::refusal::Refusal;
use super::session::{Ask, Peer, Session};
use super::site::{Place, Site, SiteError};
use super::{source, target};
use crate::client::chain;
use crate::criu::relay;
use crate::decapsulator;
use crate::memory::serve;
use crate::protocol::manifest::{Manifest, Welcome};
use crate::protocol::{
    AgentEvent, Freeze, Go, MigrationStatus, Part, Prepare, Prepared, Role, Running, Served, WorkloadState,
    WorkloadStatus, is_valid_id,
};
use crate::system::{self, Spawner, Stream, now_unix_us};
use crate::workload::processes;

/// Images come faster than the default windows of HTTP/2 would let them: in one go, up to this much.
const WINDOW_BYTES: u32 = 64 << 20;
/// See [`crate::client`].
const MAX_FRAME_BYTES: u32 = 1 << 20;
/// A manifest names each file once: room for a hundred thousand of them.
const MAX_MANIFEST_BYTES: usize = 32 << 20;
/// How long a migration that is just ending, or was called off, may take before another begins.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
/// How long `go`, `release` and `abort` wait; less than the coordinator does.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);

/// Serves whom `door` lets in, until the listener breaks.
pub async fn serve(site: Arc<Site>, door: Door, listener: TcpListener) -> std::io::Result<Infallible> {
    let router = router(site);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Of one connection, not of the listener.
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => return Err(error),
        };
        // An answer in the freeze window must not wait for another to share its packet.
        stream.set_nodelay(true)?;
        let (door, router) = (door.clone(), router.clone());
        system::spawn(async move {
            let ended = match door.let_in(stream).await {
                Ok(Entered::Plain(stream)) => speak(stream, Caller::Anyone, false, router).await,
                Ok(Entered::Tls { stream, caller, is_http2 }) => {
                    speak(stream, Caller::Known(caller), is_http2, router).await
                }
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(error.into()),
                Err(error) => {
                    tracing::warn!(%peer, "a caller is not let in: {}", chain(&error));
                    return;
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%peer, error = chain(&*error), "connection ended");
            }
        });
    }
}

/// Answers one caller whom nobody has asked who it is, on a connection of a simulation.
pub async fn answer(site: Arc<Site>, stream: Box<dyn Stream>) {
    if let Err(error) = speak(stream, Caller::Anyone, false, router(site)).await {
        tracing::debug!(error = chain(&*error), "connection ended");
    }
}

/// Answers one caller until the connection ends.
pub(crate) async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    caller: Caller,
    is_http2: bool,
    router: axum::Router,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut builder = auto::Builder::new(Spawner);
    if is_http2 {
        // The settings are sent at once: the caller waits for them, see `tls::dial`.
        builder = builder.http2_only();
    }
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES);
    let service = TowerToHyperService::new(router.layer(Extension(caller)));
    builder.serve_connection(TokioIo::new(stream), service).await
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn router(site: Arc<Site>) -> axum::Router {
    axum::Router::new()
        .route(HEALTH, get(|| async { "ok\n" }))
        .route(
            "/v1/workloads",
            get(async |State(site): State<Arc<Site>>| Json::<Vec<WorkloadStatus>>(site.list())),
        )
        .route("/v1/decapsulator", get(decapsulator))
        .route("/v1/workloads/{name}/start", post(start))
        .route("/v1/workloads/{name}/stop", post(stop))
        .route("/v1/migrations/{id}", get(status).put(prepare))
        .route("/v1/migrations/{id}/events", get(events))
        .route("/v1/migrations/{id}/freeze", post(freeze))
        .route(MANIFEST, post(manifest).layer(DefaultBodyLimit::max(MAX_MANIFEST_BYTES)))
        .route(IMAGES, post(images))
        .route(MEMORY, post(memory))
        .route("/v1/migrations/{id}/offer", post(offer))
        .route("/v1/migrations/{id}/go", post(go))
        .route("/v1/migrations/{id}/confirm", post(confirm))
        .route("/v1/migrations/{id}/release", post(release))
        .route("/v1/migrations/{id}/abort", post(abort))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .layer(axum::middleware::from_fn_with_state(site.clone(), admission::admit))
        .with_state(site)
}

/// A JSON body whose errors look like every other error.
struct Body_<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body_<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let Json(body) = Json::from_request(request, state).await?;
        Ok(Self(body))
    }
}

type Answer<T> = Result<T, Refusal>;

/// Does something on a task of its own: a coordinator that goes away must not leave half of it.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = Answer<T>> + Send + 'static) -> Answer<T> {
    let done = system::spawn(work).await;
    done.map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?
}

async fn decapsulator(State(site): State<Arc<Site>>) -> Answer<Json<decapsulator::Status>> {
    site.decapsulator.as_ref().map(|running| Json(running.status())).ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, "the agent's configuration has no section [decapsulator]")
    })
}

async fn start(State(site): State<Arc<Site>>, Path(name): Path<String>) -> Answer<()> {
    to_the_end(async move { Ok(site.start(&name).await?) }).await
}

async fn stop(State(site): State<Arc<Site>>, Path(name): Path<String>) -> Answer<()> {
    to_the_end(async move { Ok(site.stop(&name).await?) }).await
}

async fn prepare(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(prepare): Body_<Prepare>,
) -> Answer<Json<Prepared>> {
    if !is_valid_id(&id) {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "a migration's id is at most 64 letters, digits, `-`, `_` and `.`",
        ));
    }
    if site.session(&id).is_some() {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            format!("migration {id:?} has been begun here before"),
        ));
    }
    let workload = site.workload(&prepare.workload)?;
    if (workload.address, workload.protocol) != (prepare.address, prepare.protocol) {
        let text = |address, protocol: crate::protocol::Protocol| format!("{address}/{}", protocol.as_str());
        return Err(SiteError::Address {
            name: workload.name.clone(),
            site: site.config.site.clone(),
            here: text(workload.address, workload.protocol),
            there: text(prepare.address, prepare.protocol),
        }
        .into());
    }
    if !is_valid_id(&prepare.peer_site) {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "`peer_site` has to name the other agent's site"));
    }
    to_the_end(get_ready(site.clone(), id, prepare)).await?;
    Ok(Json(Prepared { site: site.config.site.clone() }))
}

async fn get_ready(site: Arc<Site>, id: String, prepare: Prepare) -> Answer<()> {
    perform_prepare(&site, &id, &prepare).await?;
    if let Some(session) = site.session(&id) {
        // It is prepared once.
        let _ = session.peer.set(Peer { site: prepare.peer_site, url: prepare.peer_url });
    }
    Ok(())
}

async fn perform_prepare(site: &Arc<Site>, id: &str, prepare: &Prepare) -> Answer<()> {
    settle(site, &prepare.workload).await;
    let broken =
        |error: &dyn std::error::Error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, chain(error));
    match prepare.role {
        Role::Source => source::prepare(site, id, prepare).await.map_err(|error| match error {
            source::PrepareError::Site(error) => error.into(),
            source::PrepareError::Readiness(error) => error.into(),
            source::PrepareError::Unwelcome(detail) => Refusal::new(StatusCode::CONFLICT, detail),
            source::PrepareError::Indebted(_) => Refusal::new(StatusCode::CONFLICT, error.to_string()),
            error => broken(&error),
        }),
        Role::Target => target::prepare(site, id, prepare).await.map_err(|error| match error {
            target::PrepareError::Site(error) => error.into(),
            target::PrepareError::Readiness(error) => error.into(),
            error => broken(&error),
        }),
    }
}

/// Lets a migration that is ending end, and calls off one whose coordinator never came back: there is one
/// coordinator, and it has just begun another.
async fn settle(site: &Site, workload: &str) {
    let Place::Migrating(session) = site.place(workload) else { return };
    if session.view().idle {
        session.ask(Ask::Abort);
    }
    // Whatever it is by then is dealt with by the one who called.
    let _ = tokio::time::timeout(SETTLE_LIMIT, session.wait_end()).await;
}

fn known(site: &Site, id: &str) -> Answer<Arc<Session>> {
    site.session(id).ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, format!("no migration {id:?} at site {:?}", site.config.site))
    })
}

pub(super) fn known_as(site: &Site, id: &str, role: Role) -> Answer<Arc<Session>> {
    let session = known(site, id)?;
    if session.role != role {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            format!("site {:?} is the {:?} of migration {id:?}", site.config.site, session.role),
        ));
    }
    Ok(session)
}

async fn status(State(site): State<Arc<Site>>, Path(id): Path<String>) -> Answer<Json<MigrationStatus>> {
    Ok(Json(known(&site, &id)?.status()))
}

async fn events(State(site): State<Arc<Site>>, Path(id): Path<String>) -> Answer<Response> {
    let session = known(&site, &id)?;
    let lines = futures_util::stream::unfold((session, 0), |(session, mut seen)| async move {
        let lines = session.next_lines(&mut seen).await?;
        Some((Ok::<_, Infallible>(lines), (session, seen)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

async fn freeze(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(freeze): Body_<Freeze>,
) -> Answer<StatusCode> {
    let settle = Duration::from_micros(freeze.settle_us);
    known_as(&site, &id, Role::Source)?.ask(Ask::Freeze { settle });
    Ok(StatusCode::ACCEPTED)
}

async fn manifest(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(manifest): Body_<Manifest>,
) -> Answer<Json<Welcome>> {
    let received_unix_us = now_unix_us();
    let session = known_as(&site, &id, Role::Target)?;
    let wants_later = manifest.later;
    let streams = manifest.image.as_ref().map(|image| image.streams.clone());
    site.host.may_enter(site.workload(&session.workload)?, manifest).await?;
    if let Some(streams) = streams {
        relay::note_streams(&site.images.join(&session.id), &streams).map_err(ReadinessError::from)?;
    }
    let later = wants_later && target::fetch_later(&site, &session).await?;
    Ok(Json(Welcome { later, received_unix_us, answered_unix_us: now_unix_us() }))
}

/// Gives the target memory that did not come with the images.
async fn memory(State(site): State<Arc<Site>>, Path(id): Path<String>, request: Request) -> Answer<Body> {
    let gone = || Refusal::new(StatusCode::NOT_FOUND, format!("migration {id:?} owes no memory"));
    let (workload, _) = site.debt(&id).ok_or_else(gone)?;
    let root = site.root(&workload).ok_or_else(gone)?;
    let questions = request.into_body().into_data_stream();
    let done = {
        let (site, id) = (site.clone(), id.clone());
        move || site.settle_debt(&workload, &id)
    };
    Ok(Body::from_stream(serve::answers(questions, processes::tree(root.pid), done)))
}

async fn images(State(site): State<Arc<Site>>, Path(id): Path<String>, request: Request) -> Answer<()> {
    let session = known_as(&site, &id, Role::Target)?;
    let stream = request.into_body().into_data_stream();
    target::receive(&site, &session, stream)
        .await
        .map_err(|error| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, chain(&error)))
}

async fn go(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(body): Body_<Go>,
) -> Answer<Json<Running>> {
    let Some(session) = site.session(&id) else {
        // An agent that was restarted after `go` has adopted what runs.
        let running = site.running(&body.workload).map_err(gone)?;
        site.take_up(&body.workload, body.offer)?;
        tracing::info!(migration = id, workload = body.workload, pid = running.1.pid, "runs already");
        return Ok(Json(Running { at_unix_us: now_unix_us() }));
    };
    if runs_for_good(&session) {
        return Ok(Json(Running { at_unix_us: now_unix_us() }));
    }
    let answer = session.ask_for(Ask::Go { offer: body.offer }, |event| match event {
        AgentEvent::Running(running) => Some(Ok(*running)),
        AgentEvent::Failed { reason } => Some(Err(reason.clone())),
        _ => None,
    });
    match tokio::time::timeout(ANSWER_LIMIT, answer).await {
        Ok(Some(Ok(running))) => Ok(Json(running)),
        Ok(Some(Err(reason))) => Err(Refusal::new(StatusCode::CONFLICT, reason)),
        Ok(None) | Err(_) => Err(not_for_this(&session)),
    }
}

async fn offer(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(part): Body_<Part>,
) -> Answer<Json<Option<u32>>> {
    let Some(session) = site.session(&id) else {
        // An agent that was restarted after `go` has adopted what runs.
        return Ok(Json(site.offer(&part.workload).map_err(gone)?));
    };
    if runs_for_good(&session) {
        return Ok(Json(None));
    }
    let answer = session.ask_for(Ask::Offer, |event| match event {
        AgentEvent::Restored { offer } => Some(Some(*offer)),
        AgentEvent::Running(_) => Some(None),
        _ => None,
    });
    match tokio::time::timeout(ANSWER_LIMIT, answer).await {
        Ok(Some(offer)) => Ok(Json(offer)),
        Ok(None) | Err(_) => Err(not_for_this(&session)),
    }
}

async fn confirm(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(part): Body_<Part>,
) -> Answer<Json<()>> {
    let Some(session) = site.session(&id) else {
        // An agent that was restarted after `go` has adopted what runs.
        site.confirm(&part.workload)?;
        return Ok(Json(()));
    };
    if runs_for_good(&session) {
        return Ok(Json(()));
    }
    let confirmed = |event: &AgentEvent| matches!(event, AgentEvent::Confirmed).then_some(());
    match tokio::time::timeout(ANSWER_LIMIT, session.ask_for(Ask::Confirm, confirmed)).await {
        Ok(Some(())) => Ok(Json(())),
        Ok(None) | Err(_) => Err(not_for_this(&session)),
    }
}

/// Whether the role is over and the workload runs.
fn runs_for_good(session: &Session) -> bool {
    let view = session.view();
    view.ended && view.workload == WorkloadState::Running
}

/// A copy that had not run died with a former agent.
fn gone(error: SiteError) -> Refusal {
    match error {
        SiteError::Absent(..) => Refusal::new(StatusCode::GONE, chain(&error)),
        error => error.into(),
    }
}

fn not_for_this(session: &Session) -> Refusal {
    let was = |told: fn(&AgentEvent) -> bool| session.find(|event| told(event).then_some(())).is_some();
    let has_run = was(|event| matches!(event, AgentEvent::Running(_)));
    if was(|event| *event == AgentEvent::Dropped) && !has_run {
        // The coordinator may not have heard of it.
        return Refusal::new(StatusCode::GONE, "the copy was dropped before it ran");
    }
    let state = session.view().state;
    Refusal::new(StatusCode::CONFLICT, format!("the migration is {state:?} here, which this does not fit"))
}

async fn release(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(part): Body_<Part>,
) -> Answer<Json<Option<Served>>> {
    let mut served = None;
    if let Some(session) = site.session(&id) {
        session.ask(Ask::Release);
        let ended = ended(&session).await;
        refuse_to_indebted(&site, &id)?;
        ended?;
        served = session.find(|event| match event {
            AgentEvent::Served(served) => Some(*served),
            _ => None,
        });
        if session.view().workload == WorkloadState::Absent {
            // Whatever runs here now has come back in a later migration.
            return Ok(Json(served));
        }
    }
    refuse_to_indebted(&site, &id)?;
    // It may have fallen back by itself before the word came, or its agent may have been restarted. The
    // target's copy is the one now.
    to_the_end(async move { Ok(site.stop_unheard(&part.workload).await?) }).await?;
    Ok(Json(served))
}

/// The target lives on memory that is here.
fn refuse_to_indebted(site: &Site, id: &str) -> Answer<()> {
    match site.debt(id) {
        None => Ok(()),
        Some((_, debt)) => Err(Refusal::new(
            StatusCode::TOO_EARLY,
            format!("the agent of site {:?} still fetches the workload's memory from here", debt.to),
        )),
    }
}

async fn abort(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    Body_(part): Body_<Part>,
) -> Answer<Json<Option<Running>>> {
    let Some(session) = site.session(&id) else {
        if part.role == Role::Source {
            // A former agent may have died while it was fenced.
            let (holder, root) = site.running(&part.workload)?;
            if root.state == 'T' {
                site.revive(&part.workload, holder);
            }
            site.mark_left(&part.workload, None);
        }
        return Ok(Json(None));
    };
    session.ask(Ask::Abort);
    let resumed = session.wait_for(|event| match event {
        AgentEvent::Resumed(running) => Some(*running),
        _ => None,
    });
    let resumed = tokio::time::timeout(ANSWER_LIMIT, resumed).await.ok().flatten();
    ended(&session).await?;
    let absent = session.view().workload == WorkloadState::Absent;
    match session.role {
        Role::Source if absent => Err(Refusal::new(StatusCode::CONFLICT, "the source has been released")),
        Role::Target if !absent => {
            Err(Refusal::new(StatusCode::CONFLICT, "the target runs: it was told `go`"))
        }
        Role::Source | Role::Target => Ok(Json(resumed)),
    }
}

async fn ended(session: &Session) -> Answer<()> {
    tokio::time::timeout(ANSWER_LIMIT, session.wait_end()).await.map_err(|_| {
        Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("the migration is still {:?} here: ask again", session.view().state),
        )
    })
}
