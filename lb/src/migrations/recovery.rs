//! After a restart: what did a former daemon leave behind, and how does it end?
//!
//! The journal says which migrations had begun and what was decided in them; the pinned gate word says whether the
//! flip has happened. Where the journal has nothing of a migration that an agent still waits for a word on (it was
//! lost, or is another one), the gate alone says how it ends. A closed gate without a migration is somebody's hold
//! by hand, and stays as it is.

use std::sync::Arc;
use std::time::Duration;

use migrate::coordinator::machine::{LEASE, MARGIN};
use migrate::coordinator::{AgentAt, HoldRequest, Left, Policy, Spec};
use migrate::protocol::Role;
use migrate::system;
use tokio::sync::mpsc::unbounded_channel;

use super::journal::{Entry, Step};
use super::{JournalError, Leftover, Migration, Migrations, Registered, now_unix_us};
use crate::control::State;

/// Agents may start together with the load balancer.
const SURVEYS: u32 = 10;
const SURVEY_PAUSE: Duration = Duration::from_millis(500);
/// Generation of a gate that was made and opened, and nothing since.
const NEVER_HELD: u32 = 2;

impl Migrations {
    /// Takes up what the journal says is not over, and asks the agents of all other backends, in the background.
    pub fn recover(self: &Arc<Self>) -> Result<(), JournalError> {
        for entry in self.journal.entries()? {
            if entry.step == Step::Ended {
                let migration = Arc::new(Migration::remembered(entry));
                self.inner().all.insert(migration.id.clone(), migration);
            } else {
                self.end(entry);
            }
        }
        for backend in &self.config.get().plan.backends {
            let this = self.clone();
            let name = backend.name.clone();
            let task = async move { this.recover_unwritten(&name).await };
            system::spawn(self.tasks.track_future(task));
        }
        Ok(())
    }

    /// Ends a migration of a backend that the journal does not have, if an agent takes part in one.
    async fn recover_unwritten(self: Arc<Self>, backend: &str) {
        if self.is_under_way(backend) {
            return;
        }
        let (Ok(state), Ok((location, staged))) =
            (self.control.state(backend), self.control.sites_of(backend))
        else {
            return;
        };
        if !matches!(state, State::Forward | State::Replaying) {
            tracing::warn!(
                backend,
                state = state.label(),
                "the gate is closed and no migration of it was begun: flip or resume it by hand"
            );
        }
        let agent = |site: Option<String>| self.config.get().agent_at(&site?);
        let (Some(location), Some(other)) = (agent(location), agent(staged)) else { return };
        if location.site == other.site {
            return;
        }
        let Some((id, role_at_location)) = self.survey(backend, &location, &other).await else { return };
        let is_flipped = role_at_location == Role::Target && !matches!(state, State::Holding { .. });
        let (from, to) = if is_flipped { (other, location) } else { (location, other) };
        let entry = Entry {
            id,
            backend: backend.to_owned(),
            from: from.site,
            to: to.site,
            started_at_unix_us: now_unix_us(),
            // What a former daemon said is not known: the safe side.
            step: if is_flipped { Step::Confirming } else { Step::Begun },
            report: None,
        };
        if let Err(error) = super::blocking(|| self.journal.begin(&entry)) {
            tracing::error!(id = %entry.id, "{}", super::chain(&error));
            return;
        }
        self.end(entry);
    }

    /// The migration that one of two agents takes part in, and the role of the site where the gate points.
    async fn survey(&self, backend: &str, location: &AgentAt, other: &AgentAt) -> Option<(String, Role)> {
        for round in 0..SURVEYS {
            if round > 0 {
                tokio::time::sleep(SURVEY_PAUSE).await;
            }
            // What an agent knows of from then on is ours.
            if self.inner().stopping || self.is_under_way(backend) {
                return None;
            }
            let mut unknown = None;
            for agent in [location, other] {
                match self.coordinator.survey(agent.clone(), backend.to_owned()).await {
                    Ok(Some(Leftover { id, role })) => {
                        let role_at_location = match (role, agent.site == location.site) {
                            (role, true) => role,
                            (Role::Source, false) => Role::Target,
                            (Role::Target, false) => Role::Source,
                        };
                        return Some((id, role_at_location));
                    }
                    Ok(None) => {}
                    Err(reason) => unknown = Some(reason),
                }
            }
            match unknown {
                None => return None,
                Some(reason) => tracing::debug!(backend, reason, "could not ask whether it migrates"),
            }
        }
        None
    }

    /// Hands a migration that a former daemon left behind to the coordinator, as one of ours.
    fn end(self: &Arc<Self>, entry: Entry) {
        let mut inner = self.inner();
        if inner.stopping || inner.free(&entry.backend).is_err() || inner.all.contains_key(&entry.id) {
            return;
        }
        let (spec, left) = match self.left(&entry) {
            Ok(left) => left,
            Err(problem) => {
                let (id, backend) = (&entry.id, &entry.backend);
                tracing::error!(%id, %backend, "the migration cannot be brought to its end: {problem}");
                let migration = Migration::remembered(entry);
                migration.doubt(Some(format!("it cannot be brought to its end: {problem}")));
                inner.all.insert(migration.id.clone(), Arc::new(migration));
                return;
            }
        };
        let Registered { migration, cutover, orders } = self.register(&mut inner, entry, true);
        drop(inner);
        let (id, backend) = (&migration.id, &migration.backend);
        tracing::warn!(%id, %backend, ?left, "ending a migration that a former daemon left behind");
        let (tell, progress) = unbounded_channel();
        // Tables that never held this backend may be younger than a flip that they know nothing of. Its target then
        // runs at most until its lease ends, and nobody waits for the source, since the gate is open to it.
        let may_be_new = matches!(left, Left::Before { generation: ..=NEVER_HELD });
        let patience = if may_be_new { LEASE + MARGIN } else { Duration::ZERO };
        let run = self.coordinator.recover(spec, left, cutover, orders, tell);
        let run = async move {
            tokio::time::sleep(patience).await;
            run.await
        };
        self.watch(migration, run, progress);
    }

    /// Where a migration was left.
    fn left(&self, entry: &Entry) -> Result<(Spec, Left), Box<dyn std::error::Error>> {
        let Entry { id, backend, from, to, step, .. } = entry;
        let hold = HoldRequest { deadline: self.config.get().hold.deadline, policy: Policy::Hold };
        let spec = self.spec(id.clone(), backend, from, to, hold)?;
        let (location, _) = self.control.sites_of(backend)?;
        let at_target = location.as_ref() == Some(to);
        if *step == Step::Confirming && !at_target {
            // The tables are new, the machine was started anew for instance: they know nothing of the flip.
            let generation = self.control.hold(backend, crate::control::Policy::Hold, None)?;
            self.control.stage(backend, to)?;
            self.control.flip(backend, generation, to)?;
        }
        let generation = self.control.generation(backend)?;
        let left = match step {
            Step::Returning => Left::Returning { at_target, generation },
            Step::Confirming => Left::After { confirmed: true },
            Step::Begun | Step::Ended if at_target => Left::After { confirmed: false },
            Step::Begun | Step::Ended => Left::Before { generation },
        };
        Ok((spec, left))
    }
}
