//! Performs what the [`machine`](super::machine) says: calls the load balancer, asks the agents, watches the
//! clock, and tells the progress. Decides nothing.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::machine::{Command, Event, LEASE, Machine, State, Verdict};
use super::operator::{Orders, Resolution};
use super::{AgentAt, Cutover, Decision, Outcome, Progress, Report, Spec};
use crate::client::{AgentClient, ClientError, chain};
use crate::protocol::{AgentEvent, Freeze, Go, Part, Prepare, Prepared, Role, Running, Served};
use crate::system;

/// An agent may have to start processes and warm caches.
const PREPARE_ANSWER: Duration = Duration::from_secs(20);
/// Every other answer: short enough to try again in time.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a target that cannot be reached is told to forget, after everybody else has gone on.
const TIDY_LIMIT: Duration = Duration::from_secs(600);
const TIDY_PAUSE: Duration = Duration::from_millis(500);
/// The agents' clocks are taken at their word unless they disagree with the coordinator's by more than this.
const CLOCK_TOLERANCE_MS: f64 = 5.0;

/// What comes back from the agents, with the moment of its arrival.
struct News {
    event: Event,
    at: Instant,
    figures: Figures,
}

/// Numbers that come with events; they go into the report and decide nothing.
#[derive(Clone, Copy, Default)]
struct Figures {
    frozen_at: Option<i64>,
    running_at: Option<i64>,
    resumed_at: Option<i64>,
    served: Option<Served>,
    image_bytes: Option<u64>,
    sent_bytes: Option<u64>,
}

struct Driver {
    spec: Spec,
    cutover: Arc<dyn Cutover>,
    started: Instant,
    machine: Machine,
    news: mpsc::UnboundedSender<News>,
    source: Option<Arc<AgentClient>>,
    target: Option<Arc<AgentClient>>,
    /// Requests and event streams under way; they end with the migration.
    tasks: JoinSet<()>,
    figures: Figures,
    frozen_seen: Option<Instant>,
    running_seen: Option<Instant>,
    /// When it was heard that the target has all memory.
    served_seen: Option<Instant>,
    /// The target was heard to fetch memory.
    is_indebted: bool,
    restored_seen: Option<Instant>,
    flip_us: f64,
    progress: mpsc::UnboundedSender<Progress>,
    told: usize,
    told_open: bool,
    doubt_told: Option<String>,
    /// The target has said that it holds nothing, or was never asked for anything.
    target_is_empty: bool,
}

pub(super) async fn drive(
    spec: Spec,
    (machine, commands): (Machine, Vec<Command>),
    cutover: Arc<dyn Cutover>,
    Orders { abort, mut verdicts }: Orders,
    progress: mpsc::UnboundedSender<Progress>,
) -> Report {
    let (news, mut inbox) = mpsc::unbounded_channel();
    let client = |at: &AgentAt| AgentClient::new(at).map(Arc::new);
    let (source, target) = (client(&spec.source), client(&spec.target));
    let trouble = source.as_ref().err().or(target.as_ref().err()).map(|error| chain(error));
    let mut driver = Driver {
        source: source.ok(),
        target: target.ok(),
        spec,
        cutover,
        started: Instant::now(),
        machine,
        news,
        tasks: JoinSet::new(),
        figures: Figures::default(),
        frozen_seen: None,
        running_seen: None,
        served_seen: None,
        is_indebted: false,
        restored_seen: None,
        flip_us: 0.0,
        progress,
        told: 0,
        told_open: false,
        doubt_told: None,
        target_is_empty: true,
    };
    match trouble {
        Some(trouble) => driver.take(Event::TargetFailed(trouble), Instant::now()),
        None => driver.perform(commands),
    }
    let mut aborted = false;
    let (outcome, reason) = loop {
        driver.tell_progress();
        driver.tell_doubt();
        if let State::Finished { outcome, reason } = driver.machine.state() {
            break (*outcome, reason.clone());
        }
        let wake_at = driver.machine.wake_at().map(|at| driver.started + at);
        let tick = async {
            match wake_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(news) = inbox.recv() => driver.take_news(news),
            () = abort.cancelled(), if !aborted => {
                aborted = true;
                driver.take(Event::Abort, Instant::now());
            }
            Some(resolution) = verdicts.recv() => driver.resolve(resolution),
            () = tick => driver.take(Event::Tick, Instant::now()),
        }
    };
    if outcome == Outcome::RolledBack && !driver.target_is_empty {
        driver.tidy_later();
    }
    let report = driver.report(outcome, reason);
    // A receiver that has gone away wants no progress.
    let _ = driver.progress.send(Progress::Finished(report.clone()));
    report
}

impl Driver {
    fn take_news(&mut self, news: News) {
        let figures = &mut self.figures;
        figures.frozen_at = figures.frozen_at.or(news.figures.frozen_at);
        figures.running_at = figures.running_at.or(news.figures.running_at);
        figures.resumed_at = figures.resumed_at.or(news.figures.resumed_at);
        figures.image_bytes = news.figures.image_bytes.or(figures.image_bytes);
        figures.sent_bytes = news.figures.sent_bytes.or(figures.sent_bytes);
        figures.served = figures.served.or(news.figures.served);
        if news.figures.served.is_some() {
            self.served_seen = self.served_seen.or(Some(news.at));
        }
        match news.event {
            Event::SourceIndebted(_) => self.is_indebted = true,
            // An agent that was restarted does not know when that was.
            Event::Released if self.is_indebted => self.served_seen = self.served_seen.or(Some(news.at)),
            Event::Frozen => self.frozen_seen = self.frozen_seen.or(Some(news.at)),
            Event::Restored { .. } => self.restored_seen = Some(news.at),
            Event::Running | Event::SourceResumed => {
                self.running_seen = self.running_seen.or(Some(news.at));
            }
            _ => {}
        }
        self.take(news.event, news.at);
    }

    fn take(&mut self, event: Event, at: Instant) {
        tracing::debug!(migration = %self.spec.id, ?event, "event");
        self.target_is_empty |= event == Event::TargetDropped;
        let commands = self.machine.on(event, at.saturating_duration_since(self.started));
        self.perform(commands);
    }

    /// Performs commands; the load balancer's answers are taken at once, the agents' come as news.
    fn perform(&mut self, commands: Vec<Command>) {
        let mut queue = VecDeque::from(commands);
        while let Some(command) = queue.pop_front() {
            tracing::debug!(migration = %self.spec.id, ?command, "command");
            let backend = self.spec.backend.as_str();
            let answer = match command {
                Command::PrepareTarget => match self.cutover.stage(backend, &self.spec.target.site) {
                    Ok(()) => {
                        self.target_is_empty = false;
                        self.prepare(Role::Target);
                        None
                    }
                    Err(error) => Some(Event::CutoverRefused(error.to_string())),
                },
                Command::PrepareSource => {
                    self.prepare(Role::Source);
                    None
                }
                Command::HoldNew => {
                    // Its own deadline is for a load balancer that forgets it.
                    let deadline = self.spec.handshakes + self.spec.hold.deadline;
                    Some(match self.cutover.hold_new(backend, deadline) {
                        Ok(generation) => Event::HeldNew { generation },
                        Err(error) => Event::CutoverRefused(error.to_string()),
                    })
                }
                Command::Hold => Some(match self.cutover.hold(backend, self.spec.hold) {
                    Ok(generation) => Event::Held { generation },
                    Err(error) => Event::CutoverRefused(error.to_string()),
                }),
                Command::Flip { generation } => {
                    let flipped = self.cutover.flip(backend, generation, &self.spec.target.site);
                    if let Some(arrived) = self.restored_seen {
                        self.flip_us = arrived.elapsed().as_secs_f64() * 1e6;
                    }
                    Some(match flipped {
                        Ok(_) => Event::Flipped,
                        Err(error) => Event::CutoverRefused(error.to_string()),
                    })
                }
                Command::ResumeGate { generation } => Some(match self.cutover.resume(backend, generation) {
                    Ok(_) => Event::GateResumed,
                    Err(error) => Event::ResumeRefused(error.to_string()),
                }),
                Command::FlipBack { generation } => {
                    Some(match self.cutover.flip(backend, generation, &self.spec.source.site) {
                        Ok(_) => Event::GateResumed,
                        Err(error) => Event::ResumeRefused(error.to_string()),
                    })
                }
                Command::Freeze => {
                    let settle_us = u64::try_from(self.spec.drain.as_micros()).unwrap_or(u64::MAX);
                    self.ask(Role::Source, "freeze", Freeze { settle_us }, |_: ()| None);
                    None
                }
                Command::Offer => {
                    let part = self.part(Role::Target);
                    self.ask(Role::Target, "offer", part, |offer: Option<u32>| {
                        let event = offer.map_or(Event::Running, |offer| Event::Restored { offer });
                        Some((event, Figures::default()))
                    });
                    None
                }
                Command::Go { offer } => {
                    let go = Go { workload: self.spec.backend.clone(), offer };
                    self.ask(Role::Target, "go", go, |running: Running| {
                        let figures = Figures { running_at: Some(running.at_unix_us), ..Figures::default() };
                        Some((Event::Running, figures))
                    });
                    None
                }
                Command::Confirm => match self.cutover.record(Decision::Confirm) {
                    Ok(()) => {
                        let part = self.part(Role::Target);
                        self.ask(Role::Target, "confirm", part, |_: ()| {
                            Some((Event::Confirmed, Figures::default()))
                        });
                        None
                    }
                    // Asked again later, as what the target itself cannot take.
                    Err(error) => Some(Event::TargetFailed(error.to_string())),
                },
                Command::Release => {
                    let part = self.part(Role::Source);
                    self.ask(Role::Source, "release", part, |served: Option<Served>| {
                        Some((Event::Released, Figures { served, ..Figures::default() }))
                    });
                    None
                }
                Command::ResumeSource => {
                    let part = self.part(Role::Source);
                    self.ask(Role::Source, "abort", part, |running: Option<Running>| {
                        let resumed_at = running.map(|running| running.at_unix_us);
                        Some((Event::SourceResumed, Figures { resumed_at, ..Figures::default() }))
                    });
                    None
                }
                Command::DropTarget => {
                    self.target_is_empty = false;
                    let part = self.part(Role::Target);
                    self.ask(Role::Target, "abort", part, |_: ()| {
                        Some((Event::TargetDropped, Figures::default()))
                    });
                    None
                }
            };
            if let Some(event) = answer {
                tracing::debug!(migration = %self.spec.id, ?event, "event");
                queue.extend(self.machine.on(event, self.started.elapsed()));
            }
        }
    }

    /// Goes on telling a target that could not be reached to forget, after the end: nobody waits for that.
    fn tidy_later(&self) {
        let (Some(client), part) = (self.target.clone(), self.part(Role::Target)) else { return };
        let (id, path) = (self.spec.id.clone(), format!("/v1/migrations/{}/abort", self.spec.id));
        system::spawn(async move {
            let until = Instant::now() + TIDY_LIMIT;
            while Instant::now() < until {
                let answer: Result<Option<Running>, ClientError> =
                    client.json(Method::POST, &path, Some(&part), ANSWER).await;
                match answer {
                    Ok(_) | Err(ClientError::Refused { .. }) => return,
                    Err(_) => tokio::time::sleep(TIDY_PAUSE).await,
                }
            }
            tracing::warn!(migration = %id, "the target never said that it holds nothing; its next migration drops it");
        });
    }

    fn part(&self, role: Role) -> Part {
        Part { role, workload: self.spec.backend.clone() }
    }

    fn client(&self, role: Role) -> Option<Arc<AgentClient>> {
        match role {
            Role::Source => self.source.clone(),
            Role::Target => self.target.clone(),
        }
    }

    /// Asks an agent to prepare and follows its events from then on.
    fn prepare(&mut self, role: Role) {
        let Some(client) = self.client(role) else { return };
        let news = self.news.clone();
        let id = self.spec.id.clone();
        let prepare = Prepare {
            role,
            workload: self.spec.backend.clone(),
            address: self.spec.address,
            protocol: self.spec.protocol,
            peer_site: match role {
                Role::Source => self.spec.target.site.clone(),
                Role::Target => self.spec.source.site.clone(),
            },
            peer_url: match role {
                Role::Source => self.spec.target.url.clone(),
                Role::Target => self.spec.source.url.clone(),
            },
            hold_deadline_ms: u64::try_from(self.spec.hold.deadline.as_millis()).unwrap_or(u64::MAX),
            lease_ms: u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX),
        };
        let site = match role {
            Role::Source => self.spec.source.site.clone(),
            Role::Target => self.spec.target.site.clone(),
        };
        self.tasks.spawn(system::inherit(async move {
            let path = format!("/v1/migrations/{id}");
            let answer: Result<Prepared, _> =
                client.json(Method::PUT, &path, Some(&prepare), PREPARE_ANSWER).await;
            let failed = match answer {
                Ok(prepared) if prepared.site == site => {
                    follow(&client, role, &id, &news).await.err().map(|error| chain(&error))
                }
                Ok(prepared) => Some(format!(
                    "the agent that answers for site {site:?} says that it is of site {:?}: correct the site's \
                     agent address",
                    prepared.site
                )),
                Err(error) => Some(chain(&error)),
            };
            if let Some(reason) = failed {
                tell(&news, failure(role, reason));
            }
        }));
    }

    /// Sends a request; its answer or its failure comes as news.
    fn ask<Q, A>(
        &mut self,
        role: Role,
        verb: &'static str,
        body: Q,
        then: impl FnOnce(A) -> Option<(Event, Figures)> + Send + 'static,
    ) where
        Q: serde::Serialize + Send + Sync + 'static,
        A: serde::de::DeserializeOwned + Send + 'static,
    {
        let news = self.news.clone();
        let Some(client) = self.client(role) else {
            tell(&news, failure(role, "its agent's address is wrong".to_owned()));
            return;
        };
        let path = format!("/v1/migrations/{}/{verb}", self.spec.id);
        self.tasks.spawn(system::inherit(async move {
            let answer: Result<A, ClientError> = client.json(Method::POST, &path, Some(&body), ANSWER).await;
            match answer {
                Ok(answer) => {
                    if let Some((event, figures)) = then(answer) {
                        let _ = news.send(News { event, at: Instant::now(), figures });
                    }
                }
                Err(ClientError::Refused { status: StatusCode::GONE, .. }) if role == Role::Target => {
                    tell(&news, Event::TargetDropped);
                }
                Err(ClientError::Refused { status: StatusCode::TOO_EARLY, detail })
                    if role == Role::Source =>
                {
                    tell(&news, Event::SourceIndebted(detail));
                }
                Err(error) => tell(&news, failure(role, chain(&error))),
            }
        }));
    }

    /// An operator's word, written down before it is acted on.
    fn resolve(&mut self, Resolution { verdict, answer }: Resolution) {
        let now = self.started.elapsed();
        let taken = self.machine.may_resolve(verdict, now).and_then(|()| match verdict {
            Verdict::Committed => Ok(()),
            Verdict::RolledBack => self.cutover.record(Decision::Return).map_err(|error| error.to_string()),
        });
        if taken.is_ok() {
            self.take(Event::Resolve(verdict), self.started + now);
        }
        // Whoever asked may have gone away.
        let _ = answer.send(taken);
    }

    fn tell_doubt(&mut self) {
        let doubt = self.machine.doubt();
        if doubt == self.doubt_told.as_deref() {
            return;
        }
        if let Some(doubt) = doubt {
            tracing::error!(migration = %self.spec.id, backend = %self.spec.backend, "in doubt: {doubt}");
        }
        self.doubt_told = doubt.map(str::to_owned);
        let _ = self.progress.send(Progress::Doubt(self.doubt_told.clone()));
    }

    fn tell_progress(&mut self) {
        let (phases, open) = (self.machine.phases().list(), self.machine.phases().last_is_open());
        // The last one told may have been open then.
        let from = if self.told_open { self.told - 1 } else { self.told };
        for (place, phase) in phases.iter().enumerate().skip(from) {
            let is_open = open && place + 1 == phases.len();
            if is_open && place < self.told {
                continue;
            }
            let end_ms = (!is_open).then_some(phase.end_ms);
            // A receiver that has gone away wants no progress.
            let _ =
                self.progress.send(Progress::Phase { name: phase.name, start_ms: phase.start_ms, end_ms });
        }
        (self.told, self.told_open) = (phases.len(), open);
    }

    fn report(&self, outcome: Outcome, reason: Option<String>) -> Report {
        let figures = self.figures;
        let running_at = match outcome {
            Outcome::RolledBack => figures.resumed_at,
            Outcome::Committed | Outcome::InDoubt => figures.running_at,
        };
        // By the agents' clocks, unless they are too far from each other.
        let between_ms = |told: (Option<i64>, Option<i64>), seen: (Option<Instant>, Option<Instant>)| {
            let told_ms = told.0.zip(told.1).map(|(from, to)| (to - from) as f64 / 1e3);
            let seen_ms = seen.0.zip(seen.1);
            let seen_ms = seen_ms.map(|(from, to)| to.saturating_duration_since(from).as_secs_f64() * 1e3);
            match (told_ms, seen_ms) {
                (Some(told), Some(seen)) if (told - seen).abs() <= CLOCK_TOLERANCE_MS => told,
                (_, Some(seen)) => seen,
                (_, None) => 0.0,
            }
        };
        let freeze_ms = between_ms((figures.frozen_at, running_at), (self.frozen_seen, self.running_seen));
        let exposed_ms = between_ms(
            (running_at, figures.served.map(|served| served.at_unix_us)),
            (self.running_seen, self.served_seen),
        );
        Report {
            outcome,
            reason,
            phases: self.machine.phases().list().to_vec(),
            freeze_ms,
            flip_us: self.flip_us,
            frozen_at_unix_us: figures.frozen_at,
            running_at_unix_us: figures.frozen_at.and(running_at),
            image_bytes: figures.image_bytes.unwrap_or(0),
            sent_bytes: figures.sent_bytes.unwrap_or(0) + figures.served.map_or(0, |served| served.bytes),
            exposed_ms,
        }
    }
}

fn failure(role: Role, reason: String) -> Event {
    match role {
        Role::Source => Event::SourceFailed(reason),
        Role::Target => Event::TargetFailed(reason),
    }
}

fn tell(news: &mpsc::UnboundedSender<News>, event: Event) {
    // The driver drops its end only when the migration is over.
    let _ = news.send(News { event, at: Instant::now(), figures: Figures::default() });
}

/// Turns an agent's events into the machine's until the role's last one.
async fn follow(
    client: &AgentClient,
    role: Role,
    id: &str,
    news: &mpsc::UnboundedSender<News>,
) -> Result<(), ClientError> {
    // Only now: a report of the freeze window must not wait for a stream to be opened.
    let opened = || {
        // A source has memory to send first, and says when that is done.
        if role == Role::Target {
            tell(news, Event::TargetPrepared);
        }
    };
    client
        .events(id, opened, |event, at| {
            let last = matches!(event, AgentEvent::Released | AgentEvent::Resumed(_) | AgentEvent::Dropped)
                || (role == Role::Target && matches!(event, AgentEvent::Confirmed));
            let mut figures = Figures::default();
            let event = match event {
                AgentEvent::Copying { .. } => Event::SourceCopies,
                AgentEvent::CopiedAhead { .. } => Event::SourcePrepared,
                AgentEvent::Drained => Event::Drained,
                AgentEvent::Frozen { at_unix_us } => {
                    figures.frozen_at = Some(at_unix_us);
                    Event::Frozen
                }
                AgentEvent::Dumped { image_bytes } => {
                    figures.image_bytes = Some(image_bytes);
                    Event::Dumped
                }
                AgentEvent::Received { sent_bytes } => {
                    figures.sent_bytes = Some(sent_bytes);
                    Event::Received
                }
                AgentEvent::Restored { offer } => Event::Restored { offer },
                AgentEvent::Running(running) => {
                    figures.running_at = Some(running.at_unix_us);
                    Event::Running
                }
                AgentEvent::Confirmed => Event::Confirmed,
                AgentEvent::Suspended => {
                    failure(role, "its lease ended unconfirmed, so it suspended the workload".to_owned())
                }
                AgentEvent::Served(served) => {
                    figures.served = Some(served);
                    Event::Tick
                }
                AgentEvent::Released => Event::Released,
                AgentEvent::Resumed(running) => {
                    figures.resumed_at = Some(running.at_unix_us);
                    Event::SourceResumed
                }
                AgentEvent::Dropped => Event::TargetDropped,
                AgentEvent::Failed { reason } => failure(role, reason),
            };
            let _ = news.send(News { event, at, figures });
            if last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .await
}
