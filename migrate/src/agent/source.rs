//! The source's driver: performs what [`crate::roles::source`] says, and tells it what happened.

mod prepare;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::prepare::start_dump;
pub use self::prepare::{PrepareError, prepare};
use super::ahead::{self, Copying, News};
use super::host::{Armed, Criu, Silencing};
use super::images::{Folder, ImagesError, Upload};
use super::session::{Ask, PREPARED_LIMIT, Session, View};
use super::site::{Place, Site};
use crate::client::chain;
use crate::criu::kernel_cache;
use crate::criu::rpc::Kind;
use crate::criu::swrk::{Ended, Hook, Said};
use crate::memory::ahead::{Ahead, Changed};
use crate::memory::layout::{self, Earlier, Laid, LayoutError, Pages};
use crate::net::drain::{DrainError, Queues};
use crate::net::silence::SilenceError;
use crate::protocol::{AgentEvent, Protocol, Served, WorkloadState};
use crate::roles::source::{Command, End, Event, State};
use crate::system::{self, now_unix_us};
use crate::workload::holder::HolderPid;
use crate::workload::processes;
use crate::workload::record::{Debt, Left};

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
