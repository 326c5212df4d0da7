//! Getting a source ready, before anybody is held: whatever can fail should fail here.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::super::config::Workload;
use super::super::host::Criu;
use super::super::images::{Folder, ImagesError, Upload};
use super::super::readiness::ReadinessError;
use super::super::session::{PREPARED_LIMIT, Session, View, patience};
use super::super::site::{Place, Site, SiteError};
use super::Driver;
use crate::checks::clock::Offset;
use crate::client::{AgentAt, AgentClient, ClientError};
use crate::coordinator::machine::MARGIN;
use crate::criu::kernel_cache;
use crate::criu::rpc::{Features, Kind};
use crate::criu::swrk::{Ended, Hook, Said, SwrkError};
use crate::memory::layout::{self, EARLIER_FOLDER, Laid, LayoutError, Pages};
use crate::net::silence::SilenceError;
use crate::protocol::manifest::{Manifest, Welcome};
use crate::protocol::{Prepare, Role, WorkloadState};
use crate::roles::source::{Event, State};
use crate::system::{self, now_unix_us};
use crate::workload::holder::HolderPid;
use crate::workload::processes::{self, Process};

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
    workload: Workload,
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
pub(super) async fn start_dump(swrk: &mut dyn Criu, pid: i32, leaves_pages: bool) -> Result<(), SwrkError> {
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
