//! What the drivers of both roles share: the event log that the coordinator follows, and the view that the
//! API shows.

use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use crate::coordinator::machine::MARGIN;
use crate::protocol::{AgentEvent, MigrationStatus, Role, WorkloadState};

/// A role that was prepared and then forgotten goes back after this.
pub const PREPARED_LIMIT: Duration = Duration::from_secs(60);

/// How long a role waits for its coordinator once the hold has begun.
pub fn patience(hold_deadline_ms: u64) -> Duration {
    Duration::from_millis(hold_deadline_ms) + MARGIN
}

/// What is asked of a role from outside.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Source: the gate is closed.
    Freeze {
        /// At least this long passes before the freeze.
        settle: Duration,
    },
    /// Target: the gate points here.
    Go {
        /// The offer that is taken up.
        offer: u32,
    },
    /// Target: make another offer.
    Offer,
    /// Target: it is the one.
    Confirm,
    /// Source: the target runs.
    Release,
    /// Go back.
    Abort,
    /// Target: memory is fetched after the restore, and this end of its guard is pid 1's.
    Fetch(Arc<OwnedFd>),
    /// Source: the target has all memory.
    Served,
    /// Target: the source has opened the way of the images.
    ImagesExpected,
    /// Target: memory comes ahead of the images.
    ImagesAhead,
    /// Target: the images' first bytes have come.
    ImagesBegun,
    /// Target: the images are complete.
    ImagesComplete {
        /// Bytes on the wire.
        sent_bytes: u64,
    },
    /// Target: the images broke off.
    ImagesFailed(String),
}

/// A role's state as others see it.
#[derive(Clone, Debug)]
pub struct View {
    /// In words.
    pub state: String,
    /// For the list of workloads.
    pub workload: WorkloadState,
    /// Nothing is frozen or restored yet: it may be called off for another migration.
    pub idle: bool,
    /// Nothing more happens.
    pub ended: bool,
}

/// The other role's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its site.
    pub site: String,
    /// Its address.
    pub url: String,
}

/// One role in one migration, as the API and the site see it. The driver's task has the other ends.
#[derive(Debug)]
pub struct Session {
    /// The migration.
    pub id: String,
    /// The side.
    pub role: Role,
    /// The workload.
    pub workload: String,
    /// The other agent, once the role is prepared.
    pub peer: OnceLock<Peer>,
    /// Target: whether memory can be fetched after the restore.
    pub can_fetch: OnceLock<bool>,
    inbox: mpsc::UnboundedSender<Ask>,
    events: Mutex<Vec<AgentEvent>>,
    /// Tells of each event and change of the view, in the order in which they wait for it.
    changed: Notify,
    view: Mutex<View>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// A new one, and the inbox for its driver.
    pub fn new(
        id: &str,
        role: Role,
        workload: &str,
        state: WorkloadState,
    ) -> (Self, mpsc::UnboundedReceiver<Ask>) {
        let (inbox, asks) = mpsc::unbounded_channel();
        let view = View { state: "preparing".to_owned(), workload: state, idle: true, ended: false };
        let session = Self {
            id: id.to_owned(),
            role,
            workload: workload.to_owned(),
            peer: OnceLock::new(),
            can_fetch: OnceLock::new(),
            inbox,
            events: Mutex::default(),
            changed: Notify::new(),
            view: Mutex::new(view),
        };
        (session, asks)
    }

    /// Asks something of the role; one that has ended does not listen any more.
    pub fn ask(&self, ask: Ask) {
        let _ = self.inbox.send(ask);
    }

    /// Tells whoever follows.
    pub fn report(&self, event: AgentEvent) {
        tracing::debug!(migration = %self.id, role = ?self.role, ?event, "event");
        lock(&self.events).push(event);
        self.changed.notify_waiters();
    }

    /// Shows a new state.
    pub fn show(&self, view: View) {
        tracing::debug!(migration = %self.id, role = ?self.role, state = %view.state, "state");
        *lock(&self.view) = view;
        self.changed.notify_waiters();
    }

    /// The state as others see it.
    pub fn view(&self) -> View {
        lock(&self.view).clone()
    }

    /// For the API.
    pub fn status(&self) -> MigrationStatus {
        let view = self.view();
        MigrationStatus {
            id: self.id.clone(),
            role: self.role,
            workload: self.workload.clone(),
            state: view.state,
            ended: view.ended,
        }
    }

    /// Something of what was told so far.
    pub fn find<T>(&self, pick: impl FnMut(&AgentEvent) -> Option<T>) -> Option<T> {
        lock(&self.events).iter().find_map(pick)
    }

    /// Asks something and waits for an event that `pick` takes, of those that come from now on; `None` if the role ends
    /// without one.
    pub async fn ask_for<T>(&self, ask: Ask, pick: impl FnMut(&AgentEvent) -> Option<T>) -> Option<T> {
        let so_far = lock(&self.events).len();
        self.ask(ask);
        self.wait_from(so_far, pick).await
    }

    /// Waits for an event that `pick` takes, from the first on; `None` if the role ends without one.
    pub async fn wait_for<T>(&self, pick: impl FnMut(&AgentEvent) -> Option<T>) -> Option<T> {
        self.wait_from(0, pick).await
    }

    async fn wait_from<T>(
        &self,
        mut seen: usize,
        mut pick: impl FnMut(&AgentEvent) -> Option<T>,
    ) -> Option<T> {
        loop {
            let mut changed = pin!(self.changed.notified());
            // What comes from now on is not missed.
            changed.as_mut().enable();
            // The view first: an end that comes after this look brings another change.
            let ended = self.view().ended;
            {
                let events = lock(&self.events);
                if let Some(found) = events[seen..].iter().find_map(&mut pick) {
                    return Some(found);
                }
                seen = events.len();
            }
            if ended {
                return None;
            }
            changed.await;
        }
    }

    /// Waits for the end.
    pub async fn wait_end(&self) {
        let _ = self.wait_for(|_| None::<()>).await;
    }

    /// The lines that were not yet taken from `seen` on, waiting for one if need be; `None` at the end.
    pub async fn next_lines(&self, seen: &mut usize) -> Option<Bytes> {
        loop {
            let mut changed = pin!(self.changed.notified());
            // What comes from now on is not missed.
            changed.as_mut().enable();
            let ended = self.view().ended;
            {
                let events = lock(&self.events);
                if events.len() > *seen {
                    let mut lines = Vec::new();
                    for event in &events[*seen..] {
                        serde_json::to_writer(&mut lines, event)
                            .expect("the protocol's types have only string keys");
                        lines.push(b'\n');
                    }
                    *seen = events.len();
                    return Some(lines.into());
                }
            }
            if ended {
                return None;
            }
            changed.await;
        }
    }
}
