//! The workloads of a site: starting, stopping, adopting, and which migration each is part of.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::config::{Config, Workload};
use super::host::Host;
use super::images::{self, ImagesError};
use super::linux::Linux;
use super::session::{Ask, Session, View};
use crate::client::chain;
use crate::coordinator::machine::LEASE;
use crate::decapsulator::{Decapsulator, DecapsulatorError};
use crate::net::silence::SilenceError;
use crate::protocol::{WorkloadState, WorkloadStatus};
use crate::system;
use crate::workload::cgroup::CgroupError;
use crate::workload::container::ContainerError;
use crate::workload::holder::{HolderError, HolderPid};
use crate::workload::processes::Process;
use crate::workload::record::{Debt, Left, Records};
use crate::workload::user::UserError;

/// Numbers of offers after an agent's restart begin here.
const FIRST_OFFER: u32 = 1 << 16;
/// So many ended migrations can still be asked about.
const REMEMBERED: usize = 64;
/// How long a workload that was just started or resumed may take to be seen.
const SEEN_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks for it.
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// Why something could not be done with a workload.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Not in the configuration.
    #[error("no workload {0:?} at site {1:?}: it has to be in the agent's configuration at both sites")]
    Unknown(String, String),
    /// It runs already, or is part of a migration.
    #[error("workload {0:?} is {1}: {2}")]
    Busy(String, &'static str, &'static str),
    /// It does not run here.
    #[error("workload {0:?} does not run at site {1:?}")]
    Absent(String, String),
    /// Its program does not run.
    #[error("workload {name:?} could not be started: {why}")]
    Start {
        /// The workload.
        name: String,
        /// In the system's words.
        why: String,
    },
    /// The address in the request is another.
    #[error(
        "workload {name:?} has address {here} at site {site:?}, but the load balancer says {there}: make them equal"
    )]
    Address {
        /// The workload.
        name: String,
        /// This site.
        site: String,
        /// In the agent's configuration.
        here: String,
        /// In the request.
        there: String,
    },
    /// The site does not hold the address.
    #[error("site {site:?} does not hold {address}: add it there, such as `ip address add {address} dev lo`")]
    NoAddress {
        /// This site.
        site: String,
        /// The IP address.
        address: std::net::IpAddr,
        /// In the system's words.
        #[source]
        source: io::Error,
    },
    /// As whom it is to run.
    #[error(transparent)]
    User(#[from] UserError),
    /// What bounds it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// What a container needs.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Namespaces.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// Images.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// Silence rules.
    #[error(transparent)]
    Silence(#[from] SilenceError),
    /// The tunnels' end.
    #[error("the tunnels' end is not as configured")]
    Decapsulator(#[from] DecapsulatorError),
    /// The state folder.
    #[error("the state folder cannot be used")]
    State(#[from] io::Error),
}

/// Where a workload is.
#[derive(Clone, Debug)]
pub enum Place {
    /// Not here.
    Absent,
    /// Here.
    Running(HolderPid),
    /// Part of a migration.
    Migrating(Arc<Session>),
}

/// One site.
#[derive(Debug)]
pub struct Site {
    /// As configured.
    pub config: Config,
    /// The host.
    pub host: Arc<dyn Host>,
    /// Which workloads outlive this agent.
    pub records: Records,
    /// Where images are.
    pub images: PathBuf,
    /// The end of the load balancer's tunnels, where it is ours.
    pub decapsulator: Option<Decapsulator>,
    places: Mutex<HashMap<String, Place>>,
    sessions: Mutex<VecDeque<Arc<Session>>>,
    /// Of copies that a former agent left stopped: the last offer of each, and since when.
    offers: Mutex<HashMap<String, (u32, Instant)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Site {
    /// Opens the site: sweeps what a former agent left, adopts what runs, starts what is to be started.
    pub async fn open(config: Config) -> Result<Arc<Self>, SiteError> {
        let images = images::open_root(&config.state_dir)?;
        let host = Linux::of(&config, &images)?;
        Self::open_on(Arc::new(host), config, images).await
    }

    /// Likewise on a host, with an empty folder for images.
    pub async fn open_on(
        host: Arc<dyn Host>,
        config: Config,
        images: PathBuf,
    ) -> Result<Arc<Self>, SiteError> {
        let records = Records::open(config.state_dir.join("workloads"))?;
        let destinations = config.workloads.iter().map(|workload| workload.address.ip()).collect();
        let memory = config.state_dir.join("decapsulator");
        let decapsulator =
            Decapsulator::as_configured(config.decapsulator.as_ref(), &destinations, &memory).await?;
        let site = Arc::new(Self {
            config,
            host,
            records,
            images,
            decapsulator,
            places: Mutex::default(),
            sessions: Mutex::default(),
            offers: Mutex::default(),
        });
        let looking = site.clone();
        // So that the first migration does not wait for it.
        system::spawn(async move {
            if let Err(error) = looking.host.check_criu().await {
                tracing::warn!("no workload can be moved to or from here: {}", chain(&error));
            }
        });
        for workload in &site.config.workloads {
            let name = &workload.name;
            if site.adopt(name).await || site.adopt_running(workload).await {
                // A source that its CRIU was still letting go stayed silent until it ran. What is not here stays so: its
                // clients' connections may be live at the other site, and would be ended from here.
                site.host.silence(workload).sweep().await?;
                continue;
            }
            if !workload.start {
                continue;
            }
            if site.records.has_left(name) {
                tracing::warn!(
                    workload = name,
                    "not started, as its configuration says: it has left for another site. If it runs nowhere any more, \
                     POST /v1/workloads/{name}/start starts it anew"
                );
                continue;
            }
            site.start(name).await?;
        }
        Ok(site)
    }

    /// Takes over a workload that a former agent left running; false if there is none.
    async fn adopt(self: &Arc<Self>, name: &str) -> bool {
        let Some(holder) = self.recorded(name) else { return false };
        // If the former agent died in a migration, its CRIU is letting the workload go at this moment.
        let until = Instant::now() + SEEN_LIMIT;
        while self.host.root_of(holder).is_some_and(|root| root.tracer != 0) && Instant::now() < until {
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        let helpers = self.host.end_helpers(holder).await;
        if helpers > 0 {
            tracing::info!(workload = name, helpers, "what a former agent left of a restore is ended");
        }
        if self.host.root_of(holder).is_none() {
            tracing::warn!(workload = name, "the workload's processes are gone; what is left is removed");
            self.forget(name, holder).await;
            return false;
        }
        self.set_running(name, holder);
        tracing::info!(workload = name, "adopted");
        true
    }

    /// Takes over a workload that somebody else has started; false if there is none.
    async fn adopt_running(self: &Arc<Self>, workload: &Workload) -> bool {
        let name = &workload.name;
        let Some(holder) = self.host.find_running(workload).await else { return false };
        if self.records.has_left(name) {
            tracing::error!(
                workload = name,
                "it runs here, but it has left for another site: there may be two. If this is the one, POST \
                 /v1/workloads/{name}/start adopts it"
            );
            return false;
        }
        if let Err(error) = self.records.write(name, holder) {
            tracing::error!(%error, "a restarted agent will not find the workload");
        }
        self.set_running(name, holder);
        tracing::info!(workload = name, "adopted as it runs already");
        true
    }

    /// A workload's configuration.
    pub fn workload(&self, name: &str) -> Result<&Workload, SiteError> {
        self.config
            .workloads
            .iter()
            .find(|workload| workload.name == name)
            .ok_or_else(|| SiteError::Unknown(name.to_owned(), self.config.site.clone()))
    }

    /// CRIU's cache of the kernel's features; on the tmpfs of the images, since it holds for one boot.
    pub fn kernel_cache(&self) -> PathBuf {
        images::kernel_cache(&self.images)
    }

    /// Starts a workload here.
    pub async fn start(self: &Arc<Self>, name: &str) -> Result<(), SiteError> {
        let workload = self.workload(name)?;
        self.check_absent(name)?;
        self.host.check_address(workload)?;
        self.host.silence(workload).sweep().await?;
        let started = self.start_absent(name, workload).await;
        if started.is_err() {
            self.remove_remains(name).await;
        }
        started
    }

    async fn start_absent(self: &Arc<Self>, name: &str, workload: &Workload) -> Result<(), SiteError> {
        let holder = self.host.start(workload).await?;
        self.records.write(name, holder.pid())?;
        self.mark_left(name, None);
        let holder = holder.keep().await?;
        self.set_running(name, holder);
        tracing::info!(workload = name, "started");
        Ok(())
    }

    /// Stops a workload that runs here; one that does not is stopped already.
    pub async fn stop(&self, name: &str) -> Result<(), SiteError> {
        self.workload(name)?;
        let holder = match self.place(name) {
            Place::Absent => return Ok(()),
            Place::Running(holder) => holder,
            Place::Migrating(_) => {
                return Err(SiteError::Busy(name.to_owned(), "migrating", "stop it when that is over"));
            }
        };
        self.set(name, Place::Absent);
        self.forget(name, holder).await;
        Ok(())
    }

    /// An offer of a copy that was stopped when a former agent died before it was confirmed; `None` for one that runs.
    pub fn offer(&self, name: &str) -> Result<Option<u32>, SiteError> {
        let (_, root) = self.running(name)?;
        if root.state != 'T' {
            return Ok(None);
        }
        // Other numbers than former agents': whose offer is taken up too late must be known.
        let number = self.records.next_offer(name, FIRST_OFFER)?;
        lock(&self.offers).insert(name.to_owned(), (number, Instant::now()));
        Ok(Some(number))
    }

    /// Lets such a copy run, if that offer was the last one and stands: until its lease ends, unless it is confirmed.
    pub fn take_up(self: &Arc<Self>, name: &str, number: u32) -> Result<(), SiteError> {
        let (holder, root) = self.running(name)?;
        if root.state != 'T' {
            return Ok(());
        }
        let offer = lock(&self.offers).get(name).copied();
        let Some((_, since)) = offer.filter(|(known, since)| *known == number && since.elapsed() < LEASE)
        else {
            return Err(SiteError::Busy(
                name.to_owned(),
                "stopped",
                "that offer of it is over: ask for another",
            ));
        };
        self.revive(name, holder);
        let (site, name) = (Arc::downgrade(self), name.to_owned());
        system::spawn(async move {
            tokio::time::sleep_until(since + LEASE).await;
            let Some(site) = site.upgrade() else { return };
            let is_leased = lock(&site.offers).get(&name).is_some_and(|(last, _)| *last == number);
            let is_here = matches!(site.place(&name), Place::Running(now) if now == holder);
            if is_leased && is_here {
                tracing::warn!(workload = name, "suspended, since nobody confirmed it");
                site.host.suspend(holder).await;
            }
        });
        Ok(())
    }

    /// Such a copy is the one: it runs on.
    pub fn confirm(&self, name: &str) -> Result<(), SiteError> {
        if self.running(name)?.1.state == 'T' {
            return Err(SiteError::Busy(name.to_owned(), "stopped", "take up an offer of it first"));
        }
        lock(&self.offers).remove(name);
        self.mark_left(name, None);
        Ok(())
    }

    /// Lets a copy run that a former agent's death has left stopped.
    pub fn revive(&self, name: &str, holder: HolderPid) {
        self.host.reconnect(holder);
        self.host.signal(holder, Signal::SIGCONT);
        tracing::info!(workload = name, "set running again");
    }

    /// Kills a copy that was left behind when the other site's became the one. Its clients' connections live
    /// on there, so nothing may be said on them from here.
    pub async fn stop_unheard(&self, name: &str) -> Result<(), SiteError> {
        if let Place::Running(holder) = self.place(name) {
            self.mark_left(name, Some(&Left::default()));
            self.host.disconnect(holder).await;
        }
        self.stop(name).await
    }

    /// Marks a workload as one that may run elsewhere, or takes the mark off.
    pub fn mark_left(&self, name: &str, left: Option<&Left>) {
        if let Err(error) = self.records.set_left(name, left) {
            tracing::error!(workload = name, %error, ?left, "whether the workload has left could not be written down");
        }
    }

    /// The workload whose memory a migration's target still fetches from here, and who that is.
    pub fn debt(&self, id: &str) -> Option<(String, Debt)> {
        self.config.workloads.iter().find_map(|workload| {
            let debt = self.records.debt(&workload.name)?;
            (debt.migration == id).then(|| (workload.name.clone(), debt))
        })
    }

    /// All of a workload's memory is at the target.
    pub fn settle_debt(&self, name: &str, id: &str) {
        self.mark_left(name, Some(&Left::default()));
        if let Some(session) = self.session(id) {
            session.ask(Ask::Served);
        }
    }

    /// Fails unless the workload may come here.
    pub fn check_absent(&self, name: &str) -> Result<(), SiteError> {
        match self.place(name) {
            Place::Absent => Ok(()),
            Place::Running(_) => Err(SiteError::Busy(name.to_owned(), "running here", "there cannot be two")),
            Place::Migrating(_) => {
                Err(SiteError::Busy(name.to_owned(), "migrating", "wait for the end of that migration"))
            }
        }
    }

    /// The workload's holder and root process, if it runs here.
    pub fn running(&self, name: &str) -> Result<(HolderPid, Process), SiteError> {
        let absent = || SiteError::Absent(name.to_owned(), self.config.site.clone());
        match self.place(name) {
            Place::Running(holder) => self.host.root_of(holder).map(|root| (holder, root)).ok_or_else(absent),
            Place::Absent => Err(absent()),
            Place::Migrating(_) => Err(SiteError::Busy(
                name.to_owned(),
                "migrating",
                "wait for the end of that migration, or abort it",
            )),
        }
    }

    /// Kills a holder and forgets it.
    pub async fn forget(&self, name: &str, holder: HolderPid) {
        // Not before: the agent may be killed in between, and the next one has to find what is left.
        if !self.host.kill(holder).await {
            tracing::warn!(workload = name, %holder, "the workload's namespaces do not go away");
        }
        self.records.remove(name);
        self.remove_remains(name).await;
    }

    /// Removes what a workload that is not here any more has left.
    pub async fn remove_remains(&self, name: &str) {
        if let Ok(workload) = self.workload(name) {
            self.host.remove_remains(workload).await;
        }
    }

    /// The holder that is written down, if it is alive.
    fn recorded(&self, name: &str) -> Option<HolderPid> {
        self.records.find(name, |holder| self.host.is_alive(holder))
    }

    /// The root process of a workload that is here, be it part of a migration or not.
    pub fn root(&self, name: &str) -> Option<Process> {
        self.host.root_of(self.recorded(name)?)
    }

    /// Where it is.
    pub fn place(&self, name: &str) -> Place {
        lock(&self.places).get(name).cloned().unwrap_or(Place::Absent)
    }

    /// It is elsewhere from now on.
    pub fn set(&self, name: &str, place: Place) {
        lock(&self.places).insert(name.to_owned(), place);
    }

    /// It runs here from now on, and its end will be noticed.
    pub fn set_running(self: &Arc<Self>, name: &str, holder: HolderPid) {
        self.set(name, Place::Running(holder));
        let Some(ended) = self.host.wait_end(holder) else {
            // It ended between two breaths; the next one who asks sees it.
            return;
        };
        let (site, name) = (Arc::downgrade(self), name.to_owned());
        system::spawn(async move {
            ended.await;
            let Some(site) = site.upgrade() else { return };
            let here = matches!(site.place(&name), Place::Running(now) if now == holder);
            // Where a migration killed it, or it left, somebody else tidies up.
            if here {
                tracing::warn!(workload = name, "the workload has ended by itself");
                site.set(&name, Place::Absent);
                site.forget(&name, holder).await;
            }
        });
    }

    /// Adds a session; it can be asked about until so many others have come.
    pub fn add_session(&self, session: &Arc<Session>) {
        let mut sessions = lock(&self.sessions);
        sessions.push_back(session.clone());
        if sessions.len() > REMEMBERED
            && let Some(oldest) = sessions.iter().position(|session| session.view().ended)
        {
            sessions.remove(oldest);
        }
    }

    /// A session by its migration's id.
    pub fn session(&self, id: &str) -> Option<Arc<Session>> {
        lock(&self.sessions).iter().rev().find(|session| session.id == id).cloned()
    }

    /// For the API.
    pub fn list(&self) -> Vec<WorkloadStatus> {
        self.config.workloads.iter().map(|workload| self.status(&workload.name)).collect()
    }

    fn status(&self, name: &str) -> WorkloadStatus {
        let (state, pid, migration) = match self.place(name) {
            Place::Absent => (WorkloadState::Absent, None, None),
            Place::Running(holder) => match self.host.root_of(holder) {
                Some(root) if root.state == 'T' => (WorkloadState::Frozen, Some(root.pid), None),
                Some(root) => (WorkloadState::Running, Some(root.pid), None),
                None => (WorkloadState::Absent, None, None),
            },
            Place::Migrating(session) => {
                let View { workload, .. } = session.view();
                let pid = self.root(name).map(|root| root.pid);
                (workload, pid, Some(session.id.clone()))
            }
        };
        WorkloadStatus { name: name.to_owned(), state, pid, migration }
    }
}
