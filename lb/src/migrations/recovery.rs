//! After a restart: what did a former daemon leave behind, and how does it end?
//!
//! The pinned gate word says whether the flip has happened and where the backend belongs; the agents say
//! which migration they are part of. Where an agent still waits for a word, the migration is brought to an
//! end, whatever the gate. A hold that no agent knows a migration for is opened only where an agent says that
//! the backend is behind it (the agents fell back by themselves while there was no coordinator); any other
//! is somebody's hold by hand and stays as it is.

use std::sync::Arc;
use std::time::Duration;

use migrate::coordinator::{AgentAt, HoldRequest, Policy, Spec};
use migrate::protocol::Role;

use super::cutover::MigrationCutover;
use super::{Leftover, Migrations, Seen};
use crate::control::State;

/// Agents may start together with the load balancer.
const SURVEYS: u32 = 10;
const SURVEY_PAUSE: Duration = Duration::from_millis(500);

/// What the agents of a backend's two sites say.
enum Survey {
    /// One takes part in a migration; the role is that of the site where the gate points.
    Found { id: String, role_at_location: Role },
    /// Neither does.
    Nothing {
        /// Whether the backend is where the gate points.
        is_there: bool,
    },
    /// At least one could not be asked.
    Unknown(String),
}

impl Migrations {
    /// Starts the recovery of every backend that needs one, in the background.
    pub fn recover(self: &Arc<Self>) {
        for backend in &self.config.get().plan.backends {
            let this = self.clone();
            let name = backend.name.clone();
            self.tasks.spawn(async move { this.recover_backend(&name).await });
        }
    }

    async fn recover_backend(self: Arc<Self>, backend: &str) {
        let (Ok(state), Ok((location, staged))) =
            (self.control.state(backend), self.control.sites_of(backend))
        else {
            return;
        };
        let closed = state != State::Forward;
        let agent = |site: Option<String>| self.config.get().agent_at(&site?);
        let (Some(location), Some(other)) = (agent(location), agent(staged)) else {
            if closed {
                tracing::warn!(
                    backend,
                    state = state.label(),
                    "the gate is closed and there are no agents to ask: flip or resume it by hand"
                );
            }
            return;
        };
        if location.site == other.site {
            if closed {
                tracing::warn!(
                    backend,
                    state = state.label(),
                    "the gate is closed and no migration had begun: flip or resume it by hand"
                );
            }
            return;
        }
        match self.survey(backend, &location, &other, closed).await {
            Survey::Found { id, role_at_location } => {
                let flipped = role_at_location == Role::Target && !matches!(state, State::Holding { .. });
                self.end(Some(id), backend, location, other, flipped);
            }
            // A replay ends by itself.
            Survey::Nothing { is_there: true } if closed && state != State::Replaying => {
                self.end(None, backend, location, other, false);
            }
            Survey::Nothing { is_there: false } if closed && state != State::Replaying => {
                tracing::warn!(
                    backend,
                    state = state.label(),
                    "the gate is closed and its site's agent does not run the backend: flip or resume it by hand"
                );
            }
            Survey::Nothing { .. } => {}
            Survey::Unknown(reason) if closed => {
                tracing::warn!(
                    backend,
                    reason,
                    "an agent does not answer; trying to end the migration anyway"
                );
                self.end(None, backend, location, other, state == State::Replaying);
            }
            Survey::Unknown(reason) => {
                tracing::debug!(backend, reason, "could not ask whether a migration was left behind");
            }
        }
    }

    async fn survey(&self, backend: &str, location: &AgentAt, other: &AgentAt, closed: bool) -> Survey {
        let mut outcome = Survey::Nothing { is_there: false };
        for round in 0..SURVEYS {
            if round > 0 {
                tokio::time::sleep(SURVEY_PAUSE).await;
            }
            if self.inner().stopping {
                return Survey::Unknown("the load balancer is stopping".to_owned());
            }
            if !closed && self.inner().all.values().any(|migration| migration.backend == backend) {
                // What an agent knows of now is ours.
                return Survey::Nothing { is_there: false };
            }
            let mut is_there = false;
            outcome = Survey::Nothing { is_there };
            for agent in [location, other] {
                match self.coordinator.survey(agent.clone(), backend.to_owned()).await {
                    Ok(Seen { leftover: Some(Leftover { id, role }), .. }) => {
                        let role_at_location = match (role, agent.site == location.site) {
                            (role, true) => role,
                            (Role::Source, false) => Role::Target,
                            (Role::Target, false) => Role::Source,
                        };
                        return Survey::Found { id, role_at_location };
                    }
                    Ok(seen) => is_there |= seen.is_there && agent.site == location.site,
                    Err(reason) => outcome = Survey::Unknown(reason),
                }
            }
            if matches!(outcome, Survey::Nothing { .. }) {
                return Survey::Nothing { is_there };
            }
        }
        outcome
    }

    /// Hands a leftover migration to the coordinator, as one of ours.
    fn end(
        self: &Arc<Self>,
        id: Option<String>,
        backend: &str,
        location: AgentAt,
        other: AgentAt,
        flipped: bool,
    ) {
        let mut inner = self.inner();
        if inner.stopping
            || inner.free(backend).is_err()
            || id.as_ref().is_some_and(|id| inner.all.contains_key(id))
        {
            return;
        }
        let id = id.unwrap_or_else(|| inner.new_id());
        let active_site = location.site.clone();
        let (source, target) = if flipped { (other, location) } else { (location, other) };
        let hold = HoldRequest { deadline: self.config.get().hold.deadline, policy: Policy::Hold };
        let (Ok(spec), Ok(generation)) =
            (self.spec(id, backend, &source.site, &target.site, hold), self.control.generation(backend))
        else {
            return;
        };
        let spec: Spec = spec;
        let cutover = MigrationCutover::new(self.control.clone(), true);
        let (migration, progress, tell) = inner.register(&spec, cutover);
        drop(inner);
        tracing::warn!(id = %migration.id, backend, flipped, "ending a migration that a former daemon left behind");
        let run = self.coordinator.recover(spec, active_site, generation, migration.cutover.clone(), tell);
        self.watch(migration, run, progress);
    }
}
