//! The coordinator: the one place that decides how a migration goes on. It runs inside the load balancer.
//!
//! [`machine`] decides and knows no I/O; [`drive`] performs what it says; [`crate::client`] talks to the agents.
//! What is not here: how a gate is held, flipped or resumed. The load balancer implements [`Cutover`].

mod drive;
pub mod machine;
mod operator;
pub mod phases;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

pub use machine::Verdict;
pub use operator::{Operator, Orders, Resolution};

pub use crate::client::AgentAt;
pub use crate::protocol::Protocol;

/// What the coordinator needs of the load balancer. Each call returns at once: no network is waited for.
pub trait Cutover: Send + Sync + 'static {
    /// Closes the backend's gate for new connections only; gives the gate's new generation. At the deadline the gate
    /// opens by itself, unless it was closed for all.
    fn hold_new(&self, backend: &str, deadline: Duration) -> Result<u32, CutoverError>;
    /// Closes the backend's gate; gives the gate's new generation.
    fn hold(&self, backend: &str, hold: HoldRequest) -> Result<u32, CutoverError>;
    /// Writes the target's location beforehand, so that the flip is one store. Fails if the site has no route.
    fn stage(&self, backend: &str, to_site: &str) -> Result<(), CutoverError>;
    /// Points the backend at the other site and lets the held packets go; gives the new generation.
    fn flip(&self, backend: &str, generation: u32, to_site: &str) -> Result<u32, CutoverError>;
    /// Opens the gate where it was; gives the new generation.
    fn resume(&self, backend: &str, generation: u32) -> Result<u32, CutoverError>;
    /// Writes down, so that it survives the load balancer, what is about to be decided; see [`Left`].
    fn record(&self, decision: Decision) -> Result<(), CutoverError>;
}

/// What a later coordinator has to know of this one, beside the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// The target is told that its copy is the one.
    Confirm,
    /// An operator said that the source's copy counts.
    Return,
}

/// Where a former coordinator left a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The gate points at the source, closed or open again.
    Before {
        /// The gate's generation.
        generation: u32,
    },
    /// The gate points at the target.
    After {
        /// Whether [`Decision::Confirm`] was written down.
        confirmed: bool,
    },
    /// [`Decision::Return`] was written down.
    Returning {
        /// Whether the gate points at the target still.
        at_target: bool,
        /// The gate's generation.
        generation: u32,
    },
}

/// How a gate is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldRequest {
    /// How long the hold may last before the migration rolls back.
    pub deadline: Duration,
    /// What happens to packets meanwhile.
    pub policy: Policy,
}

/// What a closed gate does with packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// They are kept and sent on afterwards, in order.
    #[default]
    Hold,
    /// They are dropped.
    Drop,
}

/// Why the load balancer refused, for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CutoverError(pub String);

/// One migration to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Unique at both agents; letters, digits, `-`, `_` and `.`, at most 64.
    pub id: String,
    /// The backend's name, which is the workload's name at both agents.
    pub backend: String,
    /// The address that its sockets are bound to.
    pub address: SocketAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it runs.
    pub source: AgentAt,
    /// Where it is to run.
    pub target: AgentAt,
    /// How the gate is to hold.
    pub hold: HoldRequest,
    /// How long new connections alone are held before all is, so that those in their handshake can finish it; zero:
    /// not at all.
    pub handshakes: Duration,
    /// The least time between hold and freeze, in which packets under way arrive.
    pub drain: Duration,
}

/// The default of [`Spec::drain`].
pub const DEFAULT_DRAIN: Duration = Duration::from_millis(1);

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The backend runs at the target.
    Committed,
    /// The backend runs at the source, as before.
    RolledBack,
    /// An operator has to look; the report's reason says at what.
    InDoubt,
}

/// When a phase was, in milliseconds since the migration's start.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhaseTime {
    /// One of [`phases::PHASES`], or `rollback`.
    pub name: &'static str,
    /// Its start.
    pub start_ms: f64,
    /// Its end.
    pub end_ms: f64,
}

impl PhaseTime {
    fn new(name: &'static str, start: Duration, end: Duration) -> Self {
        Self { name, start_ms: start.as_secs_f64() * 1e3, end_ms: end.as_secs_f64() * 1e3 }
    }
}

/// What a migration came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless all went well.
    pub reason: Option<String>,
    /// Every phase with its times, in order.
    pub phases: Vec<PhaseTime>,
    /// From the source's freeze to the target's tasks running (or the source's, after a rollback); 0 if
    /// nothing was frozen.
    pub freeze_ms: f64,
    /// From the arrival of the target's report to the return of the gate's store; 0 if there was no flip.
    pub flip_us: f64,
    /// When the freeze window began, by the source agent's `CLOCK_REALTIME`.
    pub frozen_at_unix_us: Option<i64>,
    /// When it ended, by the agent's `CLOCK_REALTIME` where the tasks run.
    pub running_at_unix_us: Option<i64>,
    /// Bytes of the images.
    pub image_bytes: u64,
    /// Bytes sent from source to target, be it with the images or after them.
    pub sent_bytes: u64,
    /// How long the running target still lacked memory that was at the source: the loss of either would have been the
    /// loss of the workload. 0 if all memory came with the images.
    pub exposed_ms: f64,
}

/// What happens while a migration runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "progress", rename_all = "snake_case")]
pub enum Progress {
    /// A phase began (no end) or ended.
    Phase {
        /// Its name.
        name: &'static str,
        /// Milliseconds since the migration's start.
        start_ms: f64,
        /// Likewise, once it has ended.
        end_ms: Option<f64>,
    },
    /// It is in doubt, for this reason, or (none) no longer. It still goes on.
    Doubt(Option<String>),
    /// It is over.
    Finished(Report),
}

/// Runs one migration to its end.
///
/// On [`Outcome::Committed`] the backend runs at the target and the gate points there; on
/// [`Outcome::RolledBack`] it runs at the source and the gate is open to it.
pub async fn run(
    spec: Spec,
    cutover: Arc<dyn Cutover>,
    orders: Orders,
    progress: mpsc::UnboundedSender<Progress>,
) -> Report {
    let start = machine::Machine::start(spec.hold.deadline, spec.handshakes);
    drive::drive(spec, start, cutover, orders, progress).await
}

/// Ends a migration that a former coordinator left behind: one whose flip has happened is finished, any other is
/// rolled back.
pub async fn recover(
    spec: Spec,
    left: Left,
    cutover: Arc<dyn Cutover>,
    orders: Orders,
    progress: mpsc::UnboundedSender<Progress>,
) -> Report {
    use machine::Machine;
    let deadline = spec.hold.deadline;
    let start = match left {
        Left::Before { generation } => Machine::recover_back(generation, deadline),
        Left::After { confirmed } => Machine::recover_forward(confirmed, deadline),
        Left::Returning { at_target, generation } => {
            Machine::recover_returned(at_target, generation, deadline)
        }
    };
    drive::drive(spec, start, cutover, orders, progress).await
}

#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod model;
