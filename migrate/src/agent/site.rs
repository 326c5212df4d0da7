//! The workloads of a site: starting, stopping, adopting, and which migration each is part of.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::config::{self, Config, Kind, Workload};
use super::containers;
use super::images::{self, ImagesError};
use super::readiness::Readiness;
use super::session::{Ask, Session, View};
use crate::coordinator::machine::LEASE;
use crate::criu::program::Program;
use crate::decapsulator::{Decapsulator, DecapsulatorError};
use crate::net::repair;
use crate::net::silence::{Scope, Silence, SilenceError};
use crate::protocol::{WorkloadState, WorkloadStatus};
use crate::workload::cgroup::CgroupError;
use crate::workload::container::{ContainerError, Runtime};
use crate::workload::holder::{FIRST_WORKLOAD_PID, Holder, HolderError, HolderPid};
use crate::workload::podman::Podman;
use crate::workload::processes::{self, Process};
use crate::workload::record::{self, Debt, Left, Records, root_of};
use crate::workload::sys;
use crate::workload::user::{Identity, UserError};

/// Numbers of offers after an agent's restart begin here.
const FIRST_OFFER: u32 = 1 << 16;
/// So many ended migrations can still be asked about.
const REMEMBERED: usize = 64;
/// How long a workload that was just started or resumed may take to be seen.
const SEEN_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks for it.
const LOOK_PAUSE: Duration = Duration::from_millis(1);
/// A program that cannot run ends at once.
const EARLY_END: Duration = Duration::from_millis(50);

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
    /// CRIU.
    pub criu: Program,
    /// runc.
    pub runtime: Runtime,
    /// podman.
    pub podman: Podman,
    /// Which workloads outlive this agent.
    pub records: Records,
    /// Where images are.
    pub images: PathBuf,
    /// The end of the load balancer's tunnels, where it is ours.
    pub decapsulator: Option<Decapsulator>,
    /// What checks have found out.
    pub readiness: Readiness,
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
        let criu = Program::find(config.criu.as_deref());
        let runtime = containers::runtime(&config)?;
        let podman = Podman::new(config.podman.clone(), config.state_dir.join("podman"));
        let records = Records::open(config.state_dir.join("workloads"))?;
        let images = images::open_root(&config.state_dir)?;
        let destinations = config.workloads.iter().map(|workload| workload.address.ip()).collect();
        let memory = config.state_dir.join("decapsulator");
        let decapsulator =
            Decapsulator::as_configured(config.decapsulator.as_ref(), &destinations, &memory).await?;
        let site = Arc::new(Self {
            config,
            criu,
            runtime,
            podman,
            records,
            images,
            decapsulator,
            readiness: Readiness::default(),
            places: Mutex::default(),
            sessions: Mutex::default(),
            offers: Mutex::default(),
        });
        let looking = site.clone();
        tokio::spawn(async move { looking.look_at_criu().await });
        for workload in &site.config.workloads {
            let name = &workload.name;
            if site.adopt(name).await || site.adopt_running(workload).await {
                // A source that its CRIU was still letting go stayed silent until it ran. What is not here stays so: its
                // clients' connections may be live at the other site, and would be ended from here.
                site.silence(workload).sweep().await?;
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
        let Some(holder) = self.records.find(name) else { return false };
        // If the former agent died in a migration, its CRIU is letting the workload go at this moment.
        let until = std::time::Instant::now() + SEEN_LIMIT;
        while root_of(holder).is_some_and(|root| root.tracer != 0) && std::time::Instant::now() < until {
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        for helper in record::stopped_helpers(holder) {
            // It was stopped with the workload that it had just restored, and would not let go of it, or drop it.
            tracing::info!(workload = name, pid = helper.pid, "a helper that a former agent left is ended");
            let _ = kill(Pid::from_raw(helper.pid), Signal::SIGKILL);
            processes::wait_end(helper.pid, SEEN_LIMIT).await;
        }
        if root_of(holder).is_none() {
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
        let Some(holder) = self.find_running(workload).await else { return false };
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
        self.images.join("criu.kdat")
    }

    /// Its silence.
    pub fn silence(&self, workload: &Workload) -> Silence {
        let shared = self
            .config
            .workloads
            .iter()
            .any(|other| other.name != workload.name && other.address.ip() == workload.address.ip());
        let scope = if shared { Scope::AddressAndPort } else { Scope::Address };
        Silence::new(&workload.name, workload.address, workload.protocol, scope)
    }

    /// Fails unless the site holds the workload's address.
    pub fn check_address(&self, workload: &Workload) -> Result<(), SiteError> {
        let address = workload.address.ip();
        match UdpSocket::bind((address, 0)) {
            Ok(_) => Ok(()),
            Err(source) => Err(SiteError::NoAddress { site: self.config.site.clone(), address, source }),
        }
    }

    /// Starts a workload here.
    pub async fn start(self: &Arc<Self>, name: &str) -> Result<(), SiteError> {
        let workload = self.workload(name)?;
        self.check_absent(name)?;
        self.check_address(workload)?;
        self.silence(workload).sweep().await?;
        let started = self.start_absent(name, workload).await;
        if started.is_err() {
            self.remove_remains(name).await;
        }
        started
    }

    async fn start_absent(self: &Arc<Self>, name: &str, workload: &Workload) -> Result<(), SiteError> {
        let (holder, what) = match &workload.kind {
            Kind::Podman(container) => {
                let monitor = self.start_podmans(name, container).await?;
                (Holder::watch(monitor)?, container.clone())
            }
            Kind::Process(process) => {
                let holder = Holder::start(Some(FIRST_WORKLOAD_PID), &self.kernel_cache()).await?;
                self.start_process(name, workload, process, holder.pid()).await?;
                (holder, process.command.join(" "))
            }
            Kind::Runc(container) => {
                self.make_room(workload).await?;
                let holder = Holder::start(None, &self.kernel_cache()).await?;
                self.run_container(name, container, holder.pid()).await?;
                (holder, container.name.clone())
            }
        };
        // A program that cannot use its arguments or its address ends before anything else is done.
        let until = std::time::Instant::now() + EARLY_END;
        while std::time::Instant::now() < until {
            if root_of(holder.pid()).is_none() {
                let why = format!("{what:?} ended at once");
                return Err(SiteError::Start { name: name.to_owned(), why });
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        if let Some(cgroup) = &workload.cgroup {
            cgroup.set_bounds()?;
        }
        self.records.write(name, holder.pid())?;
        self.mark_left(name, None);
        let holder = holder.keep().await?;
        self.set_running(name, holder);
        tracing::info!(workload = name, "started");
        Ok(())
    }

    async fn start_process(
        &self,
        name: &str,
        workload: &Workload,
        process: &config::Process,
        holder: HolderPid,
    ) -> Result<(), SiteError> {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args(["enter", "--holder", &holder.to_string()]);
        for folder in workload.make_cgroup()? {
            command.arg("--cgroup").arg(folder);
        }
        // They come to the workload through the programs in between, and stand in no list of arguments.
        command.arg("workload").envs(&process.env).arg("--dir").arg(&process.dir);
        if let Some(user) = &process.user {
            command.arg("--user").arg(Identity::find(user)?.to_string());
        }
        if let Some(log) = &process.log {
            command.arg("--log").arg(log);
        }
        command.arg("--").args(&process.command).stdin(Stdio::null());
        let failed = |why: String| SiteError::Start { name: name.to_owned(), why };
        let output = command.output().await.map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
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
        let mut offers = lock(&self.offers);
        // Other numbers than the former agent's.
        let number = offers.get(name).map_or(FIRST_OFFER, |(number, _)| number + 1);
        offers.insert(name.to_owned(), (number, Instant::now()));
        Ok(Some(number))
    }

    /// Lets such a copy run, if that offer was the last one and stands.
    pub fn take_up(&self, name: &str, number: u32) -> Result<(), SiteError> {
        let (holder, root) = self.running(name)?;
        if root.state != 'T' {
            return Ok(());
        }
        let offer = lock(&self.offers).remove(name);
        if !offer.is_some_and(|(known, since)| known == number && since.elapsed() < LEASE) {
            return Err(SiteError::Busy(
                name.to_owned(),
                "stopped",
                "that offer of it is over: ask for another",
            ));
        }
        self.revive(name, holder);
        Ok(())
    }

    /// Lets a copy run that a former agent's death has left stopped.
    pub fn revive(&self, name: &str, holder: HolderPid) {
        repair::reconnect(holder.pid);
        repair::signal(holder.pid, Signal::SIGCONT);
        tracing::info!(workload = name, "set running again");
    }

    /// Kills a copy that was left behind when the other site's became the one. Its clients' connections live
    /// on there, so nothing may be said on them from here.
    pub async fn stop_unheard(&self, name: &str) -> Result<(), SiteError> {
        if let Place::Running(holder) = self.place(name) {
            self.mark_left(name, Some(&Left::default()));
            repair::disconnect(holder.pid).await;
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
            Place::Running(holder) => root_of(holder).map(|root| (holder, root)).ok_or_else(absent),
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
        self.records.remove(name);
        if !holder.kill().await {
            tracing::warn!(workload = name, %holder, "the workload's namespaces do not go away");
        }
        self.remove_remains(name).await;
    }

    /// Removes what a workload that is not here any more has left: its control group, runc's record of it.
    pub async fn remove_remains(&self, name: &str) {
        let Ok(workload) = self.workload(name) else { return };
        if let Some(cgroup) = &workload.cgroup {
            cgroup.remove().await;
        }
        match &workload.kind {
            Kind::Process(_) => {}
            Kind::Runc(container) => self.delete_container(container).await,
            Kind::Podman(container) => self.forget_podmans(container),
        }
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
        let Some(pidfd) = root_of(holder).and_then(|root| sys::pidfd_open(root.pid).ok()) else {
            // It ended between two breaths; the next one who asks sees it.
            return;
        };
        let (site, name) = (Arc::downgrade(self), name.to_owned());
        tokio::spawn(async move {
            processes::wait_pidfd(pidfd).await;
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
            Place::Running(holder) => match root_of(holder) {
                Some(root) if root.state == 'T' => (WorkloadState::Frozen, Some(root.pid), None),
                Some(root) => (WorkloadState::Running, Some(root.pid), None),
                None => (WorkloadState::Absent, None, None),
            },
            Place::Migrating(session) => {
                let View { workload, .. } = session.view();
                let pid = self.records.find(name).and_then(root_of).map(|root| root.pid);
                (workload, pid, Some(session.id.clone()))
            }
        };
        WorkloadStatus { name: name.to_owned(), state, pid, migration }
    }
}
