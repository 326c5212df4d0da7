//! Who runs migrations: the `migrate` crate over the network, or a script in tests.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::Method;
use migrate::client::{AgentClient, ClientError, chain};
use migrate::coordinator::{self, AgentAt, Cutover, Progress, Report, Spec};
use migrate::protocol::{MigrationStatus, Role, WorkloadState, WorkloadStatus};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

/// How long an agent may take to say what it knows.
const ANSWER: Duration = Duration::from_secs(2);

/// What an agent knows of a migration that a former daemon left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The migration's id.
    pub id: String,
    /// The agent's part in it.
    pub role: Role,
}

/// What an agent says of a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The migration that it takes part in.
    pub leftover: Option<Leftover>,
    /// Whether the backend is at the agent's site: it runs, or is frozen and would run again.
    pub is_there: bool,
}

/// Runs migrations and finds out what is left of old ones.
pub trait Coordinator: Send + Sync + 'static {
    /// Runs a migration to its end; see [`coordinator::run`].
    fn run(
        &self,
        spec: Spec,
        cutover: Arc<dyn Cutover>,
        abort: CancellationToken,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report>;

    /// Ends a migration that a former daemon left behind; see [`coordinator::recover`].
    fn recover(
        &self,
        spec: Spec,
        active_site: String,
        generation: u32,
        cutover: Arc<dyn Cutover>,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report>;

    /// Asks an agent what it knows of a backend. The error is for the log.
    fn survey(&self, agent: AgentAt, backend: String) -> BoxFuture<'static, Result<Seen, String>>;
}

/// The coordinator of the `migrate` crate, which talks to the sites' agents.
#[derive(Clone, Copy, Debug)]
pub struct Agents;

impl Coordinator for Agents {
    fn run(
        &self,
        spec: Spec,
        cutover: Arc<dyn Cutover>,
        abort: CancellationToken,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report> {
        coordinator::run(spec, cutover, abort, progress).boxed()
    }

    fn recover(
        &self,
        spec: Spec,
        active_site: String,
        generation: u32,
        cutover: Arc<dyn Cutover>,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report> {
        async move { coordinator::recover(spec, &active_site, generation, cutover, progress).await }.boxed()
    }

    fn survey(&self, agent: AgentAt, backend: String) -> BoxFuture<'static, Result<Seen, String>> {
        async move { survey(&agent, &backend).await.map_err(|error| chain(&error)) }.boxed()
    }
}

async fn survey(agent: &AgentAt, backend: &str) -> Result<Seen, ClientError> {
    let client = AgentClient::new(agent)?;
    let workloads: Vec<WorkloadStatus> =
        client.json(Method::GET, "/v1/workloads", None::<&()>, ANSWER).await?;
    let Some(workload) = workloads.into_iter().find(|workload| workload.name == backend) else {
        return Ok(Seen::default());
    };
    let is_there = matches!(workload.state, WorkloadState::Running | WorkloadState::Frozen);
    let Some(id) = workload.migration else { return Ok(Seen { leftover: None, is_there }) };
    let path = format!("/v1/migrations/{id}");
    let status: MigrationStatus = client.json(Method::GET, &path, None::<&()>, ANSWER).await?;
    let leftover = (!status.ended).then_some(Leftover { id, role: status.role });
    Ok(Seen { leftover, is_there })
}
