//! The source's driver: performs what [`crate::roles::source`] says, and tells it what happened.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use http::Method;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::images::{Folder, ImagesError, Upload};
use super::readiness::ReadinessError;
use super::session::{Ask, PREPARED_LIMIT, Session, View, now_unix_us, patience};
use super::site::{Place, Site, SiteError};
use crate::checks::clock::Offset;
use crate::client::{AgentAt, AgentClient, ClientError, chain};
use crate::coordinator::machine::MARGIN;
use crate::criu::rpc::Kind;
use crate::criu::swrk::{Ended, Hook, Said, Swrk, SwrkError};
use crate::net::drain::Queues;
use crate::net::repair;
use crate::net::silence::{Armed, Silence, SilenceError};
use crate::protocol::manifest::Manifest;
use crate::protocol::{Prepare, Role, WorkloadState};
use crate::roles::source::{Command, End, Event, State};
use crate::workload::holder::HolderPid;
use crate::workload::processes::{self, Process};

/// Why a source could not get ready.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The request lacks it.
    #[error("a source has to be told its `target_url`")]
    NoTarget,
    /// The workload.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The workload cannot leave.
    #[error(transparent)]
    Readiness(#[from] ReadinessError),
    /// The workload cannot enter the target's site, in its agent's words.
    #[error("{0}")]
    Unwelcome(String),
    /// The rules.
    #[error(transparent)]
    Silence(#[from] SilenceError),
    /// CRIU.
    #[error(transparent)]
    Criu(#[from] SwrkError),
    /// The images.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// The target.
    #[error("the source cannot reach the target's agent")]
    Target(#[from] ClientError),
}

/// The target may have to read large programs.
const WELCOME_LIMIT: Duration = Duration::from_secs(15);

struct Driver {
    site: Arc<Site>,
    session: Arc<Session>,
    workload: super::config::Workload,
    holder: HolderPid,
    /// As the holder's pid namespace counts.
    pid: i32,
    folder: Folder,
    swrk: Option<Swrk>,
    upload: Option<Upload>,
    silence: Silence,
    silence_timeout: Duration,
    armed: Option<Armed>,
    /// The last thing that was done with the rules; the next waits for it.
    rules: Option<JoinHandle<()>>,
    settle: Duration,
    patience: Duration,
    expires: Instant,
    /// From tasks of this driver.
    inner: mpsc::UnboundedSender<Event>,
    images: Vec<(String, u64)>,
    /// Found before the hold, since a server may have thousands of sockets.
    queues: Option<Queues>,
}

/// Gets the source ready: CRIU waits in its pre-dump hook, `nft` waits for its rules, the request to the
/// target is open. Nothing has been done to the workload.
pub async fn prepare(site: &Arc<Site>, id: &str, prepare: &Prepare) -> Result<(), PrepareError> {
    let name = &prepare.workload;
    let target_url = prepare.target_url.as_deref().ok_or(PrepareError::NoTarget)?;
    let workload = site.workload(name)?.clone();
    let (holder, root) = site.running(name)?;
    let (session, asks) = Session::new(id, Role::Source, name, WorkloadState::Running);
    let session = Arc::new(session);
    site.set(name, Place::Migrating(session.clone()));
    site.add_session(&session);
    // From here on, every failure has to give the workload back.
    let ready = ready(site, &session, workload, target_url, (holder, root), prepare).await;
    match ready {
        Ok((driver, news)) => {
            driver.show(&State::Ready);
            tokio::spawn(driver.run(asks, news));
            Ok(())
        }
        Err(error) => {
            site.set_running(name, holder);
            let state = "not prepared".to_owned();
            session.show(View { state, workload: WorkloadState::Running, idle: false, ended: true });
            Err(error)
        }
    }
}

async fn ready(
    site: &Arc<Site>,
    session: &Arc<Session>,
    workload: super::config::Workload,
    target_url: &str,
    (holder, root): (HolderPid, Process),
    prepare: &Prepare,
) -> Result<(Driver, mpsc::UnboundedReceiver<Event>), PrepareError> {
    let target = AgentAt {
        site: prepare.peer_site.clone(),
        url: target_url.to_owned(),
        tls: site.config.transport.tls().cloned(),
    };
    let client = Arc::new(AgentClient::new(&target)?);
    let manifest = site.may_leave(&workload, holder, &root).await?;
    introduce(&client, &session.id, &manifest).await?;

    let silence = site.silence(&workload);
    // A table of a former migration that was cut off would be in the way.
    silence.sweep().await?;
    let folder = Folder::create(&site.images, &session.id)?;
    let mut swrk = site.start_criu(&workload, Kind::Dump, holder, &[], folder.path()).await?;
    swrk.warm().await?;
    holder.save_kernel_cache(&site.kernel_cache());
    start_dump(&mut swrk, root.inner_pid).await?;

    let (inner, news) = mpsc::unbounded_channel();
    let failed = inner.clone();
    let upload = Upload::open(client, &session.id, move |error| {
        // The driver may have ended.
        let _ = failed.send(Event::SendFailed(error.to_string()));
    })
    .await?;
    let patience = patience(prepare.hold_deadline_ms);
    // The rules end by themselves only after the source would have fallen back by itself.
    let silence_timeout = patience + MARGIN;
    let driver = Driver {
        armed: Some(silence.arm(silence_timeout)?),
        site: site.clone(),
        session: session.clone(),
        workload,
        holder,
        pid: root.inner_pid,
        folder,
        swrk: Some(swrk),
        upload: Some(upload),
        silence,
        silence_timeout,
        rules: None,
        settle: Duration::ZERO,
        patience,
        expires: Instant::now() + PREPARED_LIMIT,
        inner,
        images: Vec::new(),
        queues: Some(queues_of(holder)),
    };
    Ok((driver, news))
}

/// Asks the target's agent whether the workload may come, and sees how far its clock is from ours.
async fn introduce(client: &AgentClient, id: &str, manifest: &Manifest) -> Result<(), PrepareError> {
    // So that opening the connection does not count as time on the way.
    client.connect().await?;
    let (path, sent_unix_us) = (format!("/v1/migrations/{id}/manifest"), now_unix_us());
    let welcome =
        client.json(Method::POST, &path, Some(manifest), WELCOME_LIMIT).await.map_err(
            |error| match error {
                ClientError::Refused { detail, .. } => PrepareError::Unwelcome(detail),
                error => error.into(),
            },
        )?;
    let offset = Offset::of(sent_unix_us, welcome, now_unix_us());
    let (ahead_ms, error_ms) = (offset.ahead_us as f64 / 1e3, offset.error_us as f64 / 1e3);
    if offset.is_large() {
        tracing::warn!(
            migration = id,
            ahead_ms,
            error_ms,
            "the target's clock is far from ours, and the workload will see the time jump: is NTP running at both sites?"
        );
    } else {
        tracing::info!(migration = id, ahead_ms, error_ms, "the target's clock beside ours");
    }
    Ok(())
}

fn queues_of(holder: HolderPid) -> Queues {
    Queues::of(&processes::descendants(holder.pid))
}

/// Begins a dump and waits until CRIU is in its pre-dump hook.
async fn start_dump(swrk: &mut Swrk, pid: i32) -> Result<(), SwrkError> {
    swrk.dump(pid).await?;
    loop {
        match swrk.next().await {
            Said::Hook(Hook::PreDump) => return Ok(()),
            Said::Hook(_) => swrk.answer(true).await?,
            Said::Ended(Ended::Well) => return Err(SwrkError::Failed("CRIU asked for nothing".into())),
            Said::Ended(Ended::Failed { reason, .. }) => return Err(SwrkError::Failed(reason)),
        }
    }
}

impl Driver {
    async fn run(mut self, mut asks: mpsc::UnboundedReceiver<Ask>, mut news: mpsc::UnboundedReceiver<Event>) {
        let mut state = State::Ready;
        while !matches!(state, State::Ended(_)) {
            let event = tokio::select! {
                biased;
                said = next(&mut self.swrk) => self.heard(said).await,
                Some(event) = news.recv() => Some(event),
                Some(ask) = asks.recv() => self.asked(ask),
                () = tokio::time::sleep_until(self.expires.into()) => {
                    self.expires = Instant::now() + self.patience;
                    Some(Event::Expired)
                }
            };
            let Some(event) = event else { continue };
            tracing::debug!(migration = %self.session.id, ?event, "source");
            let (next, commands) = state.on(event);
            state = next;
            for command in commands {
                self.perform(command, &state).await;
            }
            if !matches!(state, State::Ended(_)) {
                self.show(&state);
            }
        }
    }

    /// Turns what CRIU says into an event; what nobody needs to decide is answered here.
    async fn heard(&mut self, said: Said) -> Option<Event> {
        match said {
            Said::Hook(Hook::QueryExtFiles) => Some(Event::HookFrozen { at_unix_us: now_unix_us() }),
            Said::Hook(Hook::PostDump) => match self.folder.list() {
                Ok(images) => {
                    let image_bytes = images.iter().map(|(_, len)| len).sum();
                    self.images = images;
                    Some(Event::HookPostDump { image_bytes })
                }
                Err(error) => {
                    let _ = self.inner.send(Event::SendFailed(error.to_string()));
                    Some(Event::HookPostDump { image_bytes: 0 })
                }
            },
            Said::Hook(_) => {
                self.answer(true).await;
                None
            }
            Said::Ended(ended) => {
                let at_unix_us = now_unix_us();
                if let Some(swrk) = self.swrk.take() {
                    tokio::spawn(swrk.end());
                }
                let (failed, in_flight) = match ended {
                    Ended::Well => (None, false),
                    Ended::Failed { reason, in_flight } => (Some(reason), in_flight),
                };
                Some(Event::CriuEnded { at_unix_us, failed, in_flight })
            }
        }
    }

    fn asked(&mut self, ask: Ask) -> Option<Event> {
        match ask {
            Ask::Freeze { settle } => {
                self.settle = settle;
                self.expires = Instant::now() + self.patience;
                Some(Event::Freeze)
            }
            Ask::Release => Some(Event::Release),
            Ask::Abort => Some(Event::Abort),
            // A target's.
            Ask::Offer
            | Ask::Go { .. }
            | Ask::Confirm
            | Ask::ImagesBegun
            | Ask::ImagesComplete { .. }
            | Ask::ImagesFailed(_) => None,
        }
    }

    async fn perform(&mut self, command: Command, state: &State) {
        match command {
            Command::Yes => self.answer(true).await,
            Command::No => self.answer(false).await,
            Command::Drain => {
                let (settle, inner, holder) = (self.settle, self.inner.clone(), self.holder);
                let queues = self.queues.take();
                tokio::task::spawn_blocking(move || {
                    let queues = queues.unwrap_or_else(|| queues_of(holder));
                    let drained = queues.drain(settle);
                    // Before CRIU goes on: nobody else may hold these sockets then.
                    drop(queues);
                    let _ = inner.send(match drained {
                        Ok(()) => Event::Drained,
                        Err(error) => Event::DrainFailed(chain(&error)),
                    });
                });
            }
            Command::Fence => {
                repair::signal(self.holder.pid, Signal::SIGSTOP);
                self.site.mark_left(&self.workload.name, true);
            }
            Command::Unfence => repair::signal(self.holder.pid, Signal::SIGCONT),
            Command::Revive => {
                repair::reconnect(self.holder.pid);
                repair::signal(self.holder.pid, Signal::SIGCONT);
                self.answer_for_criu();
            }
            Command::Kill => {
                repair::disconnect(self.holder.pid).await;
                repair::signal(self.holder.pid, Signal::SIGKILL);
                self.answer_for_criu();
            }
            Command::DumpAgain => self.dump_again().await,
            Command::Silence => {
                let armed = self.armed.take().map_or_else(|| self.silence.arm(self.silence_timeout), Ok);
                let fire = async { armed?.fire().await };
                self.change_rules(fire, |done| match done {
                    Ok(()) => Event::Silenced,
                    Err(error) => Event::SilenceFailed(chain(&error)),
                });
            }
            Command::Lift => {
                if self.swrk.is_none() && matches!(state, State::Resuming { .. }) {
                    // A CRIU that was killed has left them in repair mode.
                    repair::reconnect(self.holder.pid);
                }
                let silence = self.silence.clone();
                self.change_rules(async move { silence.lift().await }, |done| {
                    if let Err(error) = done {
                        // They end by themselves soon.
                        tracing::error!(error = chain(&error), "the silence rules could not be removed");
                    }
                    Event::Lifted
                });
            }
            Command::Send => {
                let Some(upload) = self.upload.take() else { return };
                let folder = self.folder.path().to_owned();
                let (images, inner) = (std::mem::take(&mut self.images), self.inner.clone());
                let mut sending = Box::pin(upload.send(folder, images));
                let report = move |sent: Result<(), ImagesError>| {
                    if let Err(error) = sent {
                        let _ = inner.send(Event::SendFailed(chain(&error)));
                    }
                };
                // Small images are on their way after the first poll, without waking another thread.
                match (&mut sending).now_or_never() {
                    Some(sent) => report(sent),
                    None => drop(tokio::spawn(async move { report(sending.await) })),
                }
            }
            Command::Report(event) => self.session.report(event),
            Command::End => self.end(state).await,
        }
    }

    async fn answer(&mut self, yes: bool) {
        if let Some(swrk) = &mut self.swrk
            && let Err(error) = swrk.answer(yes).await
        {
            // What comes of it is heard as CRIU's end.
            tracing::warn!(error = chain(&error), "CRIU could not be answered");
        }
    }

    /// Answers for a CRIU that is gone.
    fn answer_for_criu(&self) {
        let _ =
            self.inner.send(Event::CriuEnded { at_unix_us: now_unix_us(), failed: None, in_flight: false });
    }

    async fn dump_again(&mut self) {
        let start = async {
            self.folder.clear().map_err(|error| error.to_string())?;
            let starting =
                self.site.start_criu(&self.workload, Kind::Dump, self.holder, &[], self.folder.path());
            let mut swrk = starting.await.map_err(|error| chain(&error))?;
            start_dump(&mut swrk, self.pid).await.map_err(|error| chain(&error))?;
            Ok::<_, String>(swrk)
        };
        let event = match start.await {
            Ok(swrk) => {
                self.swrk = Some(swrk);
                Event::HookPreDump
            }
            Err(failed) => {
                let at_unix_us = now_unix_us();
                Event::CriuEnded { at_unix_us, failed: Some(failed), in_flight: false }
            }
        };
        let _ = self.inner.send(event);
    }

    /// Changes the rules in the background, after what was begun before.
    fn change_rules(
        &mut self,
        change: impl Future<Output = Result<(), SilenceError>> + Send + 'static,
        event: impl FnOnce(Result<(), SilenceError>) -> Event + Send + 'static,
    ) {
        let (before, inner) = (self.rules.take(), self.inner.clone());
        self.rules = Some(tokio::spawn(async move {
            if let Some(before) = before {
                // It reports by itself how it went.
                let _ = before.await;
            }
            let _ = inner.send(event(change.await));
        }));
    }

    fn show(&self, state: &State) {
        let (words, workload, idle) = match state {
            State::Ready => ("ready", WorkloadState::Running, true),
            State::Draining { .. } => ("draining", WorkloadState::Running, false),
            State::Retrying { .. } => ("dumping again", WorkloadState::Running, false),
            State::Dumping { .. } => ("dumping", WorkloadState::Frozen, false),
            State::Frozen { .. } => ("frozen", WorkloadState::Frozen, false),
            State::Stopped { .. } => ("stopped without CRIU", WorkloadState::Frozen, false),
            State::Resuming { .. } => ("resuming", WorkloadState::Frozen, false),
            State::Releasing { .. } => ("releasing", WorkloadState::Frozen, false),
            State::Ended(End::Released) => ("released", WorkloadState::Absent, false),
            State::Ended(End::Resumed { .. }) => ("resumed", WorkloadState::Running, false),
        };
        let ended = matches!(state, State::Ended(_));
        self.session.show(View { state: words.to_owned(), workload, idle, ended });
    }

    /// Gives the workload back to the site, or forgets it; then says that it is over.
    async fn end(&mut self, state: &State) {
        let name = &self.workload.name;
        match state {
            State::Ended(End::Released) => {
                self.site.forget(name, self.holder).await;
                self.site.set(name, Place::Absent);
            }
            _ => {
                self.site.mark_left(name, false);
                self.site.set_running(name, self.holder);
            }
        }
        self.show(state);
    }
}

/// Waits for CRIU, or forever where there is none.
async fn next(swrk: &mut Option<Swrk>) -> Said {
    match swrk {
        Some(swrk) => swrk.next().await,
        None => std::future::pending().await,
    }
}
