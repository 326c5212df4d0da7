//! The target's driver: performs what [`crate::roles::target`] says, and tells it what happened.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::config::Workload;
use super::host::{Armed, Criu, Held, Silencing};
use super::images::{Folder, ImagesError};
use super::readiness::ReadinessError;
use super::session::{Ask, PREPARED_LIMIT, Session, View, patience};
use super::site::{Place, Site, SiteError};
use crate::client::chain;
use crate::criu::kernel_cache;
use crate::criu::swrk::{Ended, Hook, Said, SwrkError};
use crate::net::silence::SilenceError;
use crate::protocol::{AgentEvent, Prepare, Role, WorkloadState};
use crate::roles::target::{Before, Command, Committed, Event, State};
use crate::system::{self, now_unix_us};
use crate::workload::cgroup::CgroupError;
use crate::workload::holder::{HolderError, HolderPid};

/// Why a target could not get ready.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The workload.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// CRIU does not work here.
    #[error(transparent)]
    Readiness(#[from] ReadinessError),
    /// The rules.
    #[error(transparent)]
    Silence(#[from] SilenceError),
    /// The control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The namespaces.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// CRIU.
    #[error(transparent)]
    Criu(#[from] SwrkError),
    /// The images.
    #[error(transparent)]
    Images(#[from] ImagesError),
}

/// How long what a former migration left may take to go.
const FORMER_LIMIT: Duration = Duration::from_secs(4);
/// A pager opens two connections to the source's agent.
const PAGER_LIMIT: Duration = Duration::from_secs(8);
/// When the images of a server that runs are wiped.
const WIPE_AFTER: Duration = Duration::from_millis(500);

struct Driver {
    site: Arc<Site>,
    session: Arc<Session>,
    holder_pid: HolderPid,
    /// Until it is told to stay.
    holder: Option<Box<dyn Held>>,
    /// Wiped when the driver ends, or soon after.
    folder: Option<Folder>,
    swrk: Option<Box<dyn Criu>>,
    patience: Duration,
    lease: Duration,
    silence: Arc<dyn Silencing>,
    muting: Option<Muting>,
    /// Memory comes after the restore.
    is_lazy: bool,
    expires: Instant,
    inner: mpsc::UnboundedSender<Event>,
}

/// Rules that keep a copy that may not run yet from being heard.
enum Muting {
    Armed(Armed),
    Fired(JoinHandle<Result<(), SilenceError>>),
}

/// Gets the target ready: an empty pid namespace with CRIU in it waits for images.
pub async fn prepare(site: &Arc<Site>, id: &str, prepare: &Prepare) -> Result<(), PrepareError> {
    let name = &prepare.workload;
    let workload = site.workload(name)?;
    give_up_former(site, name, id).await;
    site.check_absent(name)?;
    site.host.check_address(workload)?;
    site.host.make_room(workload).await.map_err(SiteError::from)?;
    let (session, asks) = Session::new(id, Role::Target, name, WorkloadState::Restoring);
    let session = Arc::new(session);
    site.set(name, Place::Migrating(session.clone()));
    site.add_session(&session);
    match ready(site, &session, prepare).await {
        Ok((driver, news)) => {
            driver.show(&State::START);
            system::spawn(driver.run(asks, news));
            Ok(())
        }
        Err(error) => {
            site.remove_remains(name).await;
            site.set(name, Place::Absent);
            let state = "not prepared".to_owned();
            session.show(View { state, workload: WorkloadState::Absent, idle: false, ended: true });
            Err(error)
        }
    }
}

/// Drops what a former migration has restored here, if anything: there is a next one only where that was given up,
/// and its word to say so has not come through.
async fn give_up_former(site: &Site, workload: &str, id: &str) {
    let Place::Migrating(former) = site.place(workload) else { return };
    if former.role != Role::Target || former.id == id {
        return;
    }
    tracing::warn!(migration = %former.id, workload, "given up for the next one");
    former.ask(Ask::Abort);
    if tokio::time::timeout(FORMER_LIMIT, former.wait_end()).await.is_err() {
        tracing::warn!(migration = %former.id, workload, "it does not end");
    }
}

async fn ready(
    site: &Arc<Site>,
    session: &Arc<Session>,
    prepare: &Prepare,
) -> Result<(Driver, mpsc::UnboundedReceiver<Event>), PrepareError> {
    site.host.check_criu().await?;
    // Silence of a former migration would make the restored server deaf.
    let workload = site.workload(&prepare.workload)?;
    let silence = site.host.silence(workload);
    silence.sweep().await?;
    let folder = Folder::create(&site.images, &session.id)?;
    let muting = silence.arm_muting().await?;
    let (holder, mut swrk) = site.host.start_restore(workload, folder.path()).await?;
    let features = swrk.warm().await?;
    // It is prepared once.
    let _ = session.can_fetch.set(features.lazy_pages == Some(true));
    kernel_cache::keep(&swrk.kernel_cache(holder.pid()), &site.kernel_cache());
    let (inner, news) = mpsc::unbounded_channel();
    let driver = Driver {
        site: site.clone(),
        session: session.clone(),
        holder_pid: holder.pid(),
        holder: Some(holder),
        folder: Some(folder),
        swrk: Some(swrk),
        patience: patience(prepare.hold_deadline_ms),
        lease: Duration::from_millis(prepare.lease_ms),
        silence,
        muting: Some(Muting::Armed(muting)),
        is_lazy: false,
        expires: Instant::now() + PREPARED_LIMIT,
        inner,
    };
    Ok((driver, news))
}

/// Starts who brings memory after the restore; false if that cannot be done here.
pub async fn fetch_later(site: &Site, session: &Session) -> Result<bool, ReadinessError> {
    let Some(peer) = session.peer.get().filter(|_| session.can_fetch.get() == Some(&true)) else {
        return Ok(false);
    };
    let (guard, end) = std::os::unix::net::UnixStream::pair()?;
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.args(["pager", "--id", &session.id, "--source-site", &peer.site, "--source-url", &peer.url]);
    command.arg("--folder").arg(site.images.join(&session.id));
    if let Some(files) = site.config.transport.tls() {
        command.arg("--tls").args([&files.ca, &files.certificate, &files.key]);
    }
    // A signal for the agent's terminal is not for it.
    command.stdin(OwnedFd::from(guard)).stdout(Stdio::piped()).process_group(0);
    let mut pager = command.spawn()?;
    // It has its own copy of its end, which has to be the only one.
    drop(command);
    let Some(stdout) = pager.stdout.take() else { return Ok(false) };
    let mut said = String::new();
    let heard = tokio::time::timeout(PAGER_LIMIT, BufReader::new(stdout).read_line(&mut said)).await;
    if !matches!(heard, Ok(Ok(_))) || said != "ready\n" {
        return Err(ReadinessError::Broken(format!(
            "this site's agent cannot fetch memory from {}: is that address reachable from here? Its log says more",
            peer.url
        )));
    }
    system::spawn(async move { pager.wait().await });
    session.ask(Ask::Fetch(Arc::new(end.into())));
    Ok(true)
}

/// Takes the images that the source sends.
pub async fn receive<E: std::fmt::Display>(
    site: &Site,
    session: &Session,
    stream: impl futures_util::Stream<Item = Result<bytes::Bytes, E>> + Unpin,
) -> Result<(), ImagesError> {
    session.ask(Ask::ImagesExpected);
    let path = site.images.join(&session.id);
    let (ahead, begun) = (|| session.ask(Ask::ImagesAhead), || session.ask(Ask::ImagesBegun));
    match Folder::receive(&path, stream, ahead, begun).await {
        Ok(sent_bytes) => {
            session.ask(Ask::ImagesComplete { sent_bytes });
            Ok(())
        }
        Err(error) => {
            session.ask(Ask::ImagesFailed(chain(&error)));
            Err(error)
        }
    }
}

impl Driver {
    async fn run(mut self, mut asks: mpsc::UnboundedReceiver<Ask>, mut news: mpsc::UnboundedReceiver<Event>) {
        let mut state = State::START;
        loop {
            let event = tokio::select! {
                biased;
                said = next(&mut self.swrk) => self.heard(said, &state).await,
                Some(event) = news.recv() => Some(event),
                Some(ask) = asks.recv() => self.asked(ask).await,
                () = tokio::time::sleep_until(self.expires) => {
                    self.expires = Instant::now() + self.patience;
                    Some(Event::Expired)
                }
            };
            let Some(event) = event else { continue };
            tracing::debug!(migration = %self.session.id, ?event, "target");
            let (next, commands) = state.on(event);
            state = next;
            let mut over = false;
            for command in commands {
                over |= command == Command::End;
                self.perform(command, &state).await;
            }
            if over {
                return;
            }
            self.show(&state);
        }
    }

    async fn heard(&mut self, said: Said, state: &State) -> Option<Event> {
        match said {
            // Its connections are live now.
            Said::Hook(Hook::PreResume) => match self.muted().await {
                Ok(()) => Some(Event::HookPreResume),
                Err(error) => {
                    tracing::error!(error = chain(&error), "the restored copy could not be muted");
                    Some(Event::CriuEnded { failed: Some(chain(&error)) })
                }
            },
            Said::Hook(Hook::PostResume) => Some(Event::HookPostResume { at_unix_us: now_unix_us() }),
            Said::Hook(_) => {
                self.answer().await;
                None
            }
            Said::Ended(ended) => {
                if let Some(swrk) = self.swrk.take() {
                    // It has to be gone before the workload's root is looked for.
                    swrk.end().await;
                }
                let failed = match ended {
                    Ended::Well => None,
                    Ended::Failed { reason, .. } => Some(reason),
                };
                let is_starting = matches!(state, State::Committed(Committed::Starting { .. }));
                if is_starting && failed.is_some() && self.site.host.root_of(self.holder_pid).is_some() {
                    // It was killed while it let go of the tasks, of which none was killed: they run without it.
                    let _ = self.inner.send(Event::CriuEnded { failed });
                    return Some(Event::HookPostResume { at_unix_us: now_unix_us() });
                }
                Some(Event::CriuEnded { failed })
            }
        }
    }

    async fn asked(&mut self, ask: Ask) -> Option<Event> {
        match ask {
            Ask::Offer => Some(Event::Offer),
            Ask::Go { offer } => Some(Event::Go { offer }),
            Ask::Confirm => Some(Event::Confirm),
            Ask::Abort => Some(Event::Abort),
            Ask::Fetch(end) => {
                match self.holder.as_ref().map(|holder| holder.guard(&end)) {
                    Some(Ok(())) => self.is_lazy = true,
                    // Without its guard the pager goes away, and the restore says that it is not there.
                    Some(Err(error)) => tracing::error!(error = chain(&error), "nobody guards the memory"),
                    None => {}
                }
                None
            }
            Ask::ImagesExpected => {
                if let Some(swrk) = &mut self.swrk
                    && let Err(error) = swrk.restore(self.is_lazy).await
                {
                    tracing::warn!(error = chain(&error), "CRIU could not be asked to restore");
                }
                None
            }
            // Nobody has forgotten it.
            Ask::ImagesAhead => {
                self.expires = Instant::now() + PREPARED_LIMIT;
                None
            }
            Ask::ImagesBegun => {
                self.expires = Instant::now() + self.patience;
                None
            }
            Ask::ImagesComplete { sent_bytes } => Some(Event::ImagesComplete { sent_bytes }),
            Ask::ImagesFailed(reason) => Some(Event::ImagesFailed(reason)),
            // A source's.
            Ask::Freeze { .. } | Ask::Release | Ask::Served => None,
        }
    }

    async fn perform(&mut self, command: Command, state: &State) {
        match command {
            Command::Restore => {
                if let Some(Muting::Armed(armed)) = self.muting.take() {
                    self.muting = Some(Muting::Fired(system::spawn(armed)));
                }
                if let Some(swrk) = &mut self.swrk
                    && let Err(error) = swrk.take_images()
                {
                    tracing::warn!(error = chain(&error), "CRIU could not be asked to go on");
                }
            }
            Command::Keep => {
                // From here on the workload outlives this agent. A tmpfs or disk cache takes the record at
                // once; nothing is flushed.
                if let Err(error) = self.site.records.write(&self.session.workload, self.holder_pid) {
                    tracing::error!(%error, "a restarted agent will not find the workload");
                }
                if let Some(holder) = &mut self.holder
                    && let Err(error) = holder.lease().await
                {
                    tracing::error!(error = chain(&error), "the workload's pid 1 is gone");
                }
                self.unmute().await;
                self.answer().await;
            }
            Command::Yes => self.answer().await,
            Command::Suspend => self.site.host.suspend(self.holder_pid).await,
            Command::Continue => self.site.host.signal(self.holder_pid, Signal::SIGCONT),
            Command::Drop => {
                // With its connections out of repair mode: killed like this it would say so to every client.
                self.site.host.disconnect(self.holder_pid).await;
                if !self.site.host.kill(self.holder_pid).await {
                    tracing::error!(holder = %self.holder_pid, "the restored copy does not go away");
                }
                self.holder = None;
                let _ = self.inner.send(Event::Dropped);
            }
            Command::Report(event) => {
                if matches!(event, AgentEvent::Restored { .. }) {
                    self.expires = Instant::now() + self.lease;
                }
                if event == AgentEvent::Confirmed {
                    self.site.mark_left(&self.session.workload, None);
                }
                if event == AgentEvent::Confirmed
                    && let Some(holder) = self.holder.take()
                    && let Err(error) = holder.keep().await
                {
                    tracing::error!(error = chain(&error), "the workload's pid 1 is gone");
                }
                let runs = matches!(event, AgentEvent::Running(_));
                self.session.report(event);
                if runs {
                    self.set_bounds();
                }
            }
            Command::End => self.end(state).await,
        }
    }

    /// CRIU had none; from here on the workload has.
    fn set_bounds(&self) {
        let workload = self.site.workload(&self.session.workload);
        if let Ok(Workload { cgroup: Some(cgroup), .. }) = workload
            && let Err(error) = cgroup.set_bounds()
        {
            tracing::error!(
                error = chain(&error),
                "the workload runs without the bounds of its control group"
            );
        }
    }

    /// Waits until nothing of the copy can be heard.
    async fn muted(&mut self) -> Result<(), SilenceError> {
        match self.muting.take() {
            Some(Muting::Fired(firing)) => {
                let interrupted = || SilenceError::Netlink(io::ErrorKind::Interrupted.into());
                firing.await.unwrap_or_else(|_| Err(interrupted()))
            }
            _ => Ok(()),
        }
    }

    /// Lets the copy be heard. Without that its address stays mute: the gate may point here still when it is gone, and
    /// the kernel would end clients' connections, of which it knows nothing. The next copy sweeps it away.
    async fn unmute(&self) {
        if let Err(error) = self.silence.lift().await {
            tracing::error!(error = chain(&error), "the copy is still mute; trying in another way");
            if let Err(error) = self.silence.sweep().await {
                tracing::error!(error = chain(&error), "the copy is mute");
            }
        }
    }

    async fn answer(&mut self) {
        if let Some(swrk) = &mut self.swrk
            && let Err(error) = swrk.answer(true).await
        {
            tracing::warn!(error = chain(&error), "CRIU could not be answered");
        }
    }

    fn show(&self, state: &State) {
        let (words, workload, idle, ended) = match state {
            State::Before(Before::Waiting) => ("waiting for images", WorkloadState::Restoring, true, false),
            State::Before(Before::Restoring) => ("restoring", WorkloadState::Restoring, false, false),
            State::Before(Before::Restored(_)) => ("restored", WorkloadState::Restored, false, false),
            State::Committed(Committed::Starting { .. }) => {
                ("starting", WorkloadState::Restored, false, false)
            }
            State::Committed(Committed::Running { .. }) => ("running", WorkloadState::Running, false, false),
            State::Committed(Committed::Suspended { .. }) => {
                ("suspended, since nobody confirmed it", WorkloadState::Frozen, false, false)
            }
            State::Dropping => ("dropping", WorkloadState::Restoring, false, false),
            State::Dropped => ("dropped", WorkloadState::Absent, false, true),
            State::Lost => ("lost", WorkloadState::Absent, false, true),
        };
        self.session.show(View { state: words.to_owned(), workload, idle, ended });
    }

    async fn end(&mut self, state: &State) {
        let name = self.session.workload.clone();
        let running = matches!(state, State::Committed(_));
        if running {
            self.site.set_running(&name, self.holder_pid);
            if let Some(folder) = self.folder.take() {
                wipe_later(folder);
            }
        } else {
            if matches!(self.muting, Some(Muting::Armed(_))) {
                self.unmute().await;
            }
            self.site.forget(&name, self.holder_pid).await;
            self.site.set(&name, Place::Absent);
        }
        if let Some(swrk) = self.swrk.take() {
            swrk.end().await;
        }
        let view = self.session.view();
        if running {
            self.session.show(View { ended: true, ..view });
        } else {
            self.show(state);
        }
    }
}

/// Wipes images when the restored server has had time to answer its backlog: freeing them takes a processor that it
/// needs more.
fn wipe_later(folder: Folder) {
    system::spawn(async move {
        tokio::time::sleep(WIPE_AFTER).await;
        // Nothing waits for it, and a failure is logged there.
        system::detach(move || drop(folder));
    });
}

async fn next(swrk: &mut Option<Box<dyn Criu>>) -> Said {
    match swrk {
        Some(swrk) => swrk.next().await,
        None => std::future::pending().await,
    }
}
