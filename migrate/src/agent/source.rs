//! The source's driver: performs what [`crate::roles::source`] says, and tells it what happened.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http::Method;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::ahead::{self, Copying, News};
use super::host::{Armed, Criu, Silencing};
use super::images::{Folder, ImagesError, Upload};
use super::readiness::ReadinessError;
use super::session::{Ask, PREPARED_LIMIT, Session, View, patience};
use super::site::{Place, Site, SiteError};
use crate::checks::clock::Offset;
use crate::client::{AgentAt, AgentClient, ClientError, chain};
use crate::coordinator::machine::MARGIN;
use crate::criu::kernel_cache;
use crate::criu::rpc::{Features, Kind};
use crate::criu::swrk::{Ended, Hook, Said, SwrkError};
use crate::memory::ahead::{Ahead, Changed};
use crate::memory::layout::{self, EARLIER_FOLDER, Earlier, Laid, LayoutError, Pages};
use crate::net::drain::{DrainError, Queues};
use crate::net::silence::SilenceError;
use crate::protocol::manifest::{Manifest, Welcome};
use crate::protocol::{AgentEvent, Prepare, Protocol, Role, Served, WorkloadState};
use crate::roles::source::{Command, End, Event, State};
use crate::system::{self, now_unix_us};
use crate::workload::holder::HolderPid;
use crate::workload::processes::{self, Process};
use crate::workload::record::{Debt, Left};

/// Why a source could not get ready.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The workload.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The workload cannot leave.
    #[error(transparent)]
    Readiness(#[from] ReadinessError),
    /// The workload cannot enter the target's site, in its agent's words.
    #[error("{0}")]
    Unwelcome(String),
    /// It has not all of its memory.
    #[error("workload {0:?} still fetches memory from the site where it was before: wait until that is done")]
    Indebted(String),
    /// The rules.
    #[error(transparent)]
    Silence(#[from] SilenceError),
    /// CRIU.
    #[error(transparent)]
    Criu(#[from] SwrkError),
    /// The images.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// The memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The target.
    #[error("the source cannot reach the target's agent")]
    Target(#[from] ClientError),
}

/// The target may have to read large programs.
const WELCOME_LIMIT: Duration = Duration::from_secs(15);

struct Driver {
    site: Arc<Site>,
    session: Arc<Session>,
    peer_site: String,
    workload: super::config::Workload,
    holder: HolderPid,
    /// As the holder's pid namespace counts.
    pid: i32,
    /// As the host counts.
    root: i32,
    folder: Folder,
    swrk: Option<Box<dyn Criu>>,
    /// CRIU can leave the pages to us.
    leaves_pages: bool,
    /// When they go over.
    pages: Pages,
    /// Bytes of those that the target has to fetch yet.
    later_bytes: u64,
    /// The coordinator wants it released, and the target fetches memory.
    release_waits: bool,
    upload: Option<Upload>,
    /// Memory goes over while the workload runs.
    copying: Option<Copying>,
    /// The gate is closed, and memory goes over still.
    freeze_waits: bool,
    /// What has gone over, if anything.
    ahead: Arc<Ahead>,
    /// Finds what of it has changed, since the freeze.
    comparing: Option<JoinHandle<Changed>>,
    silence: Arc<dyn Silencing>,
    silence_timeout: Duration,
    armed: Option<Armed>,
    /// The last thing that was done with the rules; the next waits for it.
    rules: Option<JoinHandle<()>>,
    settle: Duration,
    /// What was under way when the gate closed is here.
    settled_at: Instant,
    patience: Duration,
    expires: Instant,
    /// From tasks of this driver.
    inner: mpsc::UnboundedSender<Event>,
    laid: Laid,
    /// Found before the hold, since a server may have thousands of sockets.
    queues: Option<Queues>,
}

/// Gets the source ready: CRIU waits in its pre-dump hook, `nft` waits for its rules, the request to the
/// target is open. Nothing has been done to the workload.
pub async fn prepare(site: &Arc<Site>, id: &str, prepare: &Prepare) -> Result<(), PrepareError> {
    let name = &prepare.workload;
    let workload = site.workload(name)?.clone();
    let (holder, root) = site.running(name)?;
    let (session, asks) = Session::new(id, Role::Source, name, WorkloadState::Running);
    let session = Arc::new(session);
    site.set(name, Place::Migrating(session.clone()));
    site.add_session(&session);
    // From here on, every failure has to give the workload back.
    let ready = ready(site, &session, workload, (holder, root), prepare).await;
    match ready {
        Ok((driver, news)) => {
            driver.show(&State::Ready);
            system::spawn(driver.run(asks, news));
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
    (holder, root): (HolderPid, Process),
    prepare: &Prepare,
) -> Result<(Driver, mpsc::UnboundedReceiver<Event>), PrepareError> {
    let target = AgentAt {
        site: prepare.peer_site.clone(),
        url: prepare.peer_url.clone(),
        tls: site.config.transport.tls().cloned(),
    };
    let client = Arc::new(AgentClient::new(&target)?);
    if holder.lacks_memory() {
        return Err(PrepareError::Indebted(workload.name));
    }
    let manifest = site.host.may_leave(&workload, holder, &root).await?;
    let is_welcome_later = introduce(&client, &session.id, &manifest).await?;

    let silence = site.host.silence(&workload);
    // A table of a former migration that was cut off would be in the way.
    silence.sweep().await?;
    let folder = Folder::create(&site.images, &session.id)?;
    let mut swrk = site.host.start_criu(&workload, Kind::Dump, holder, &[], folder.path()).await?;
    let leaves_pages = leave_pages(&mut *swrk, holder).await?;
    kernel_cache::keep(&swrk.kernel_cache(holder), &site.kernel_cache());
    if leaves_pages {
        // Of most tasks now, to be quick about it when they are frozen.
        layout::write_earlier(folder.path(), processes::tree(root.pid).into_keys())?;
    }
    start_dump(&mut *swrk, root.inner_pid, leaves_pages).await?;

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
        armed: Some(silence.arm(silence_timeout).await?),
        site: site.clone(),
        session: session.clone(),
        peer_site: prepare.peer_site.clone(),
        workload,
        holder,
        pid: root.inner_pid,
        root: root.pid,
        folder,
        swrk: Some(swrk),
        leaves_pages,
        pages: if is_welcome_later && leaves_pages { Pages::Later } else { Pages::Now },
        later_bytes: 0,
        release_waits: false,
        upload: Some(upload),
        copying: None,
        freeze_waits: false,
        ahead: Arc::default(),
        comparing: None,
        silence,
        silence_timeout,
        rules: None,
        settle: Duration::ZERO,
        settled_at: Instant::now(),
        patience,
        expires: Instant::now() + PREPARED_LIMIT,
        inner,
        laid: Laid::default(),
        queues: Some(site.host.queues(holder)),
    };
    Ok((driver, news))
}

/// Asks the target's agent whether the workload may come, and sees how far its clock is from ours.
/// Gives whether the target fetches memory later.
async fn introduce(client: &AgentClient, id: &str, manifest: &Manifest) -> Result<bool, PrepareError> {
    // So that opening the connection does not count as time on the way.
    client.connect().await?;
    let (path, sent_unix_us) = (format!("/v1/migrations/{id}/manifest"), now_unix_us());
    let welcome: Welcome = client.json(Method::POST, &path, Some(manifest), WELCOME_LIMIT).await.map_err(
        |error| match error {
            ClientError::Refused { detail, .. } => PrepareError::Unwelcome(detail),
            error => error.into(),
        },
    )?;
    let later = welcome.later;
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
    Ok(later)
}

/// Sees to it that CRIU can be asked to leave pages out; false if it cannot.
async fn leave_pages(swrk: &mut dyn Criu, holder: HolderPid) -> Result<bool, SwrkError> {
    let can = |features: Features| features.mem_track == Some(true);
    if can(swrk.warm().await?) {
        return Ok(true);
    }
    let cache = swrk.kernel_cache(holder);
    if let Err(error) = kernel_cache::claim_tracking(&cache, true) {
        tracing::warn!(%error, "CRIU dumps the memory by itself, which takes longer");
        return Ok(false);
    }
    if can(swrk.warm().await?) {
        return Ok(true);
    }
    tracing::warn!("CRIU's cache is not as expected, so it dumps the memory by itself, which takes longer");
    if let Err(error) = kernel_cache::claim_tracking(&cache, false) {
        tracing::warn!(%error, "CRIU's cache could not be put back");
    }
    Ok(false)
}

/// Begins a dump and waits until CRIU is in its pre-dump hook.
async fn start_dump(swrk: &mut dyn Criu, pid: i32, leaves_pages: bool) -> Result<(), SwrkError> {
    swrk.dump(pid, leaves_pages.then_some(EARLIER_FOLDER)).await?;
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
        self.copy_ahead();
        while !matches!(state, State::Ended(_)) {
            let event = tokio::select! {
                biased;
                said = next(&mut self.swrk) => self.heard(said, &state).await,
                Some(event) = news.recv() => Some(event),
                news = ahead::next(&mut self.copying) => self.copied(news),
                Some(ask) = asks.recv() => self.asked(ask),
                () = tokio::time::sleep_until(self.expires) => {
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
    async fn heard(&mut self, said: Said, state: &State) -> Option<Event> {
        match said {
            Said::Hook(Hook::QueryExtFiles) => {
                let at_unix_us = now_unix_us();
                if self.leaves_pages {
                    self.leave_pages_out();
                    self.compare();
                }
                Some(Event::HookFrozen { at_unix_us })
            }
            Said::Hook(Hook::PostDump) => match self.dumped().await {
                Ok(laid) => {
                    let image_bytes = laid.bytes();
                    self.later_bytes = laid.later_bytes;
                    self.laid = laid;
                    Some(Event::HookPostDump { image_bytes })
                }
                Err(reason) => {
                    let _ = self.inner.send(Event::SendFailed(reason));
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
                    system::spawn(swrk.end());
                }
                let (failed, in_flight) = match ended {
                    Ended::Well => (None, false),
                    Ended::Failed { reason, in_flight, was_killed } => {
                        if was_killed && matches!(state, State::Resuming { .. }) {
                            // It was undoing its dump, and has left them in repair mode.
                            self.site.host.reconnect(self.holder);
                        }
                        (Some(reason), in_flight)
                    }
                };
                Some(Event::CriuEnded { at_unix_us, failed, in_flight })
            }
        }
    }

    /// Makes CRIU leave the pages of all tasks out, which do not run any more.
    fn leave_pages_out(&self) {
        let tasks = processes::tree(self.root);
        if let Err(error) = layout::write_earlier(self.folder.path(), tasks.keys().copied()) {
            // CRIU says then what it lacks, and the tasks run again.
            tracing::error!(error = chain(&error), "CRIU could not be told to leave the memory out");
        }
        // Where the kernel tracks changes, nothing may have changed since.
        for pid in tasks.values().filter(|_| kernel_cache::tracks_changes()) {
            let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "4");
        }
    }

    /// Has memory go over while the workload runs, where all of it would have to go in the freeze.
    fn copy_ahead(&mut self) {
        let goes_ahead = self.leaves_pages && self.pages == Pages::Now;
        match self.upload.take_if(|_| goes_ahead) {
            Some(upload) => self.copying = Some(Copying::start(self.root, upload)),
            None => self.session.report(AgentEvent::CopiedAhead { bytes: 0 }),
        }
    }

    fn copied(&mut self, news: News) -> Option<Event> {
        self.expires = Instant::now() + PREPARED_LIMIT;
        match news {
            News::Flows(bytes) => {
                self.session.report(AgentEvent::Copying { bytes });
                None
            }
            News::Over(copied) => {
                self.copying = None;
                match copied {
                    Ok((upload, ahead)) => {
                        let bytes = ahead.bytes();
                        (self.upload, self.ahead) = (Some(upload), Arc::new(ahead));
                        self.session.report(AgentEvent::CopiedAhead { bytes });
                    }
                    Err(error) => {
                        // The coordinator calls it off.
                        self.session.report(AgentEvent::Failed { reason: chain(&error) });
                        return None;
                    }
                }
                std::mem::take(&mut self.freeze_waits).then_some(Event::Freeze)
            }
        }
    }

    /// Begins to look for what has changed since it went over: no task runs any more, and CRIU takes one processor.
    fn compare(&mut self) {
        if self.ahead.bytes() > 0 {
            let (ahead, tasks) = (self.ahead.clone(), processes::tree(self.root));
            self.comparing = Some(tokio::task::spawn_blocking(move || ahead.changed(&tasks)));
        }
    }

    async fn dumped(&mut self) -> Result<Laid, String> {
        let files = self.folder.list().map_err(|error| chain(&error))?;
        let changed = match self.comparing.take() {
            // Without an answer all of it counts as changed.
            Some(comparing) => comparing.await.unwrap_or_default(),
            None => Changed::default(),
        };
        let earlier = (self.ahead.bytes() > 0).then_some(Earlier { ahead: &self.ahead, changed: &changed });
        let tasks = processes::tree(self.root);
        let images = layout::images(self.folder.path(), files, &tasks, self.pages, earlier);
        images.map_err(|error: LayoutError| chain(&error))
    }

    fn asked(&mut self, ask: Ask) -> Option<Event> {
        match ask {
            Ask::Freeze { settle } => {
                self.settle = settle;
                self.expires = Instant::now() + self.patience;
                match &self.copying {
                    None => Some(Event::Freeze),
                    Some(copying) => {
                        copying.stop();
                        self.freeze_waits = true;
                        None
                    }
                }
            }
            // What is here is a part of the workload that runs there. To the role the word comes later.
            Ask::Release if self.later_bytes > 0 => {
                self.release_waits = true;
                None
            }
            Ask::Release => Some(Event::Release),
            Ask::Served => {
                let bytes = std::mem::take(&mut self.later_bytes);
                self.session.report(AgentEvent::Served(Served { at_unix_us: now_unix_us(), bytes }));
                std::mem::take(&mut self.release_waits).then_some(Event::Release)
            }
            Ask::Abort => {
                (self.copying, self.freeze_waits) = (None, false);
                Some(Event::Abort)
            }
            // A target's.
            Ask::Offer
            | Ask::Go { .. }
            | Ask::Confirm
            | Ask::Fetch(_)
            | Ask::ImagesExpected
            | Ask::ImagesAhead
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
                let inner = self.inner.clone();
                let done = move |drained: Result<(), DrainError>| {
                    let _ = inner.send(match drained {
                        Ok(()) => Event::Drained,
                        Err(error) => Event::DrainFailed(chain(&error)),
                    });
                };
                self.settled_at = Instant::now() + self.settle;
                let settle = match self.workload.protocol {
                    // What comes to a frozen server's connection goes with it, so CRIU need not wait.
                    Protocol::Tcp => Duration::ZERO,
                    Protocol::Udp => self.settle,
                };
                self.site.host.drain(self.holder, self.queues.take(), settle, Box::new(done));
            }
            Command::Fence => {
                self.site.host.signal(self.holder, Signal::SIGSTOP);
                let debt = || Debt { migration: self.session.id.clone(), to: self.peer_site.clone() };
                let left = Left { debt: (self.later_bytes > 0).then(debt) };
                self.site.mark_left(&self.workload.name, Some(&left));
            }
            Command::Unfence => self.site.host.signal(self.holder, Signal::SIGCONT),
            Command::Revive => {
                self.site.host.reconnect(self.holder);
                self.site.host.signal(self.holder, Signal::SIGCONT);
                self.answer_for_criu();
            }
            Command::Kill => {
                self.site.host.disconnect(self.holder).await;
                self.site.host.signal(self.holder, Signal::SIGKILL);
                self.answer_for_criu();
            }
            Command::DumpAgain => self.dump_again().await,
            Command::Silence => {
                let (armed, silence, timeout) =
                    (self.armed.take(), self.silence.clone(), self.silence_timeout);
                let settled = self.site.host.wait_until(self.settled_at);
                let fire = async move {
                    settled.await;
                    match armed {
                        Some(armed) => armed.await,
                        None => silence.arm(timeout).await?.await,
                    }
                };
                self.change_rules(fire, |done| match done {
                    Ok(()) => Event::Silenced,
                    Err(error) => Event::SilenceFailed(chain(&error)),
                });
            }
            Command::Lift => {
                if self.swrk.is_none() && matches!(state, State::Resuming { .. }) {
                    // A CRIU that was killed has left them in repair mode.
                    self.site.host.reconnect(self.holder);
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
                let (laid, inner) = (std::mem::take(&mut self.laid), self.inner.clone());
                let mut sending = Box::pin(upload.send(folder, laid));
                let report = move |sent: Result<(), ImagesError>| {
                    if let Err(error) = sent {
                        let _ = inner.send(Event::SendFailed(chain(&error)));
                    }
                };
                // Small images are on their way after the first poll, without waking another thread.
                match (&mut sending).now_or_never() {
                    Some(sent) => report(sent),
                    None => drop(system::spawn(async move { report(sending.await) })),
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
            if self.leaves_pages {
                let tasks = processes::tree(self.root).into_keys();
                layout::write_earlier(self.folder.path(), tasks).map_err(|error| chain(&error))?;
            }
            let starting =
                self.site.host.start_criu(&self.workload, Kind::Dump, self.holder, &[], self.folder.path());
            let mut swrk = starting.await.map_err(|error| chain(&error))?;
            start_dump(&mut *swrk, self.pid, self.leaves_pages).await.map_err(|error| chain(&error))?;
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
        self.rules = Some(system::spawn(async move {
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
        if self.armed.take().is_some()
            && let Err(error) = self.silence.lift().await
        {
            tracing::warn!(error = chain(&error), "silence rules that were not needed could not be removed");
        }
        match state {
            State::Ended(End::Released) => {
                self.site.forget(name, self.holder).await;
                self.site.set(name, Place::Absent);
            }
            _ => {
                self.site.mark_left(name, None);
                self.site.set_running(name, self.holder);
            }
        }
        self.show(state);
    }
}

/// Waits for CRIU, or forever where there is none.
async fn next(swrk: &mut Option<Box<dyn Criu>>) -> Said {
    match swrk {
        Some(swrk) => swrk.next().await,
        None => std::future::pending().await,
    }
}
