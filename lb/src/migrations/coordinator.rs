//! Who runs migrations: the `migrate` crate over the network, or a script in tests.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::Method;
use migrate::client::{AgentClient, ClientError, chain};
use migrate::coordinator::{self, AgentAt, Cutover, Left, Orders, Progress, Report, Spec};
use migrate::protocol::{MigrationStatus, Role, WorkloadStatus};
use tokio::sync::mpsc::UnboundedSender;

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

/// Runs migrations and finds out what is left of old ones.
pub trait Coordinator: Send + Sync + 'static {
    /// Runs a migration to its end; see [`coordinator::run`].
    fn run(
        &self,
        spec: Spec,
        cutover: Arc<dyn Cutover>,
        orders: Orders,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report>;

    /// Ends a migration that a former daemon left behind; see [`coordinator::recover`].
    fn recover(
        &self,
        spec: Spec,
        left: Left,
        cutover: Arc<dyn Cutover>,
        orders: Orders,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report>;

    /// Asks an agent which migration of a backend it takes part in. The error is for the log.
    fn survey(&self, agent: AgentAt, backend: String)
    -> BoxFuture<'static, Result<Option<Leftover>, String>>;
}

/// The coordinator of the `migrate` crate, which talks to the sites' agents.
#[derive(Clone, Copy, Debug)]
pub struct Agents;

impl Coordinator for Agents {
    fn run(
        &self,
        spec: Spec,
        cutover: Arc<dyn Cutover>,
        orders: Orders,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report> {
        coordinator::run(spec, cutover, orders, progress).boxed()
    }

    fn recover(
        &self,
        spec: Spec,
        left: Left,
        cutover: Arc<dyn Cutover>,
        orders: Orders,
        progress: UnboundedSender<Progress>,
    ) -> BoxFuture<'static, Report> {
        coordinator::recover(spec, left, cutover, orders, progress).boxed()
    }

    fn survey(
        &self,
        agent: AgentAt,
        backend: String,
    ) -> BoxFuture<'static, Result<Option<Leftover>, String>> {
        async move { survey(&agent, &backend).await.map_err(|error| chain(&error)) }.boxed()
    }
}

async fn survey(agent: &AgentAt, backend: &str) -> Result<Option<Leftover>, ClientError> {
    let client = AgentClient::new(agent)?;
    let workloads: Vec<WorkloadStatus> =
        client.json(Method::GET, "/v1/workloads", None::<&()>, ANSWER).await?;
    let workload = workloads.into_iter().find(|workload| workload.name == backend);
    let Some(id) = workload.and_then(|workload| workload.migration) else { return Ok(None) };
    let path = format!("/v1/migrations/{id}");
    let status: MigrationStatus = client.json(Method::GET, &path, None::<&()>, ANSWER).await?;
    Ok((!status.ended).then_some(Leftover { id, role: status.role }))
}
