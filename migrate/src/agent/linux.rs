//! The host as it is: processes, CRIU, runc and nft.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

use super::config::{self, Config, Kind as WorkloadKind, Workload};
use super::host::{Criu, Drained, Held, Host, Restoring, Silencing};
use super::readiness::{Readiness, ReadinessError};
use super::site::SiteError;
use super::target::PrepareError;
use super::{containers, images};
use crate::criu::program::Program;
use crate::criu::rpc::Kind;
use crate::criu::swrk::SwrkError;
use crate::net::drain::Queues;
use crate::net::repair;
use crate::net::silence::{Scope, Silence};
use crate::protocol::manifest::Manifest;
use crate::workload::container::{ContainerError, Runtime};
use crate::workload::holder::{FIRST_WORKLOAD_PID, Holder, HolderPid};
use crate::workload::podman::Podman;
use crate::workload::processes::{self, Process};
use crate::workload::record;
use crate::workload::sys;
use crate::workload::user::Identity;

/// A program that cannot run ends at once.
const EARLY_END: Duration = Duration::from_millis(50);
/// Between two looks for it.
const LOOK_PAUSE: Duration = Duration::from_millis(1);
/// A helper that is killed goes at once.
const HELPER_LIMIT: Duration = Duration::from_secs(2);

/// This host.
#[derive(Debug)]
pub struct Linux {
    pub(super) config: Config,
    pub(super) criu: Program,
    pub(super) runtime: Runtime,
    pub(super) podman: Podman,
    pub(super) images: PathBuf,
    /// What checks have found out.
    pub(super) readiness: Readiness,
}

impl Linux {
    /// As configured, with a folder for images.
    pub fn of(config: &Config, images: &Path) -> std::io::Result<Self> {
        Ok(Self {
            criu: Program::find(config.criu.as_deref()),
            runtime: containers::runtime(config)?,
            podman: Podman::new(config.podman.clone(), config.state_dir.join("podman")),
            images: images.to_owned(),
            readiness: Readiness::default(),
            config: config.clone(),
        })
    }

    pub(super) fn kernel_cache(&self) -> PathBuf {
        images::kernel_cache(&self.images)
    }

    async fn start_workload(&self, workload: &Workload) -> Result<Box<dyn Held>, SiteError> {
        let (holder, what) = match &workload.kind {
            WorkloadKind::Process(process) => {
                let holder = Holder::start(Some(FIRST_WORKLOAD_PID), &self.kernel_cache()).await?;
                self.start_process(workload, process, holder.pid()).await?;
                (holder, process.command.join(" "))
            }
            WorkloadKind::Runc(container) => {
                self.make_container_room(workload).await?;
                let holder = Holder::start(None, &self.kernel_cache()).await?;
                self.run_container(&workload.name, container, holder.pid()).await?;
                (holder, container.name.clone())
            }
            WorkloadKind::Podman(container) => {
                let monitor = self.start_podmans(&workload.name, container).await?;
                (Holder::watch(monitor)?, container.clone())
            }
        };
        // A program that cannot use its arguments or its address ends before anything else is done.
        let until = Instant::now() + EARLY_END;
        while Instant::now() < until {
            if record::root_of(holder.pid()).is_none() {
                let why = format!("{what:?} ended at once");
                return Err(SiteError::Start { name: workload.name.clone(), why });
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        if let Some(cgroup) = &workload.cgroup {
            cgroup.set_bounds()?;
        }
        Ok(Box::new(holder))
    }

    async fn start_process(
        &self,
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
        let failed = |why: String| SiteError::Start { name: workload.name.clone(), why };
        let output = command.output().await.map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        Ok(())
    }

    async fn end_stopped_helpers(&self, holder: HolderPid) -> usize {
        let helpers = record::stopped_helpers(holder);
        for helper in &helpers {
            // It was stopped with the workload that it had just restored, and would not let go of it, or drop it.
            let _ = kill(Pid::from_raw(helper.pid), Signal::SIGKILL);
            processes::wait_end(helper.pid, HELPER_LIMIT).await;
        }
        helpers.len()
    }

    /// Removes a control group, runc's record of a container.
    async fn remove(&self, workload: &Workload) {
        if let Some(cgroup) = &workload.cgroup {
            cgroup.remove().await;
        }
        match &workload.kind {
            WorkloadKind::Process(_) => {}
            WorkloadKind::Runc(container) => self.delete_container(container).await,
            WorkloadKind::Podman(container) => self.forget_podmans(container),
        }
    }
}

impl Host for Linux {
    fn check_criu(&self) -> BoxFuture<'_, Result<(), ReadinessError>> {
        async { self.processor().await.map(drop) }.boxed()
    }

    fn may_leave<'a>(
        &'a self,
        workload: &'a Workload,
        holder: HolderPid,
        root: &'a Process,
    ) -> BoxFuture<'a, Result<Manifest, ReadinessError>> {
        self.look_at(workload, holder, root).boxed()
    }

    fn may_enter<'a>(
        &'a self,
        workload: &'a Workload,
        manifest: Manifest,
    ) -> BoxFuture<'a, Result<(), ReadinessError>> {
        self.compare(workload, manifest).boxed()
    }

    fn check_address(&self, workload: &Workload) -> Result<(), SiteError> {
        let address = workload.address.ip();
        match UdpSocket::bind((address, 0)) {
            Ok(_) => Ok(()),
            Err(source) => Err(SiteError::NoAddress { site: self.config.site.clone(), address, source }),
        }
    }

    fn make_room<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, Result<(), ContainerError>> {
        self.make_container_room(workload).boxed()
    }

    fn remove_remains<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, ()> {
        self.remove(workload).boxed()
    }

    fn start<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, Result<Box<dyn Held>, SiteError>> {
        self.start_workload(workload).boxed()
    }

    fn find_running<'a>(&'a self, workload: &'a Workload) -> BoxFuture<'a, Option<HolderPid>> {
        self.find_running_podmans(workload).boxed()
    }

    fn start_restore<'a>(
        &'a self,
        workload: &'a Workload,
        images: &'a Path,
    ) -> BoxFuture<'a, Result<Restoring, PrepareError>> {
        async move {
            let (holder, swrk) = self.start_swrk_for_restore(workload, images).await?;
            Ok((Box::new(holder) as Box<dyn Held>, Box::new(swrk) as Box<dyn Criu>))
        }
        .boxed()
    }

    fn start_criu<'a>(
        &'a self,
        workload: &'a Workload,
        kind: Kind,
        holder: HolderPid,
        cgroups: &'a [PathBuf],
        images: &'a Path,
    ) -> BoxFuture<'a, Result<Box<dyn Criu>, SwrkError>> {
        async move {
            let swrk = self.start_swrk(workload, kind, holder, cgroups, images).await?;
            Ok(Box::new(swrk) as Box<dyn Criu>)
        }
        .boxed()
    }

    fn silence(&self, workload: &Workload) -> Arc<dyn Silencing> {
        let shared = self
            .config
            .workloads
            .iter()
            .any(|other| other.name != workload.name && other.address.ip() == workload.address.ip());
        let scope = if shared { Scope::AddressAndPort } else { Scope::Address };
        Arc::new(Silence::new(&workload.name, workload.address, workload.protocol, scope))
    }

    fn is_alive(&self, holder: HolderPid) -> bool {
        holder.is_alive()
    }

    fn root_of(&self, holder: HolderPid) -> Option<Process> {
        record::root_of(holder)
    }

    fn wait_end(&self, holder: HolderPid) -> Option<BoxFuture<'static, ()>> {
        let pidfd = sys::pidfd_open(record::root_of(holder)?.pid).ok()?;
        Some(processes::wait_pidfd(pidfd).boxed())
    }

    fn end_helpers(&self, holder: HolderPid) -> BoxFuture<'_, usize> {
        self.end_stopped_helpers(holder).boxed()
    }

    fn kill(&self, holder: HolderPid) -> BoxFuture<'_, bool> {
        holder.kill().boxed()
    }

    fn signal(&self, holder: HolderPid, signal: Signal) {
        repair::signal(holder.pid, signal);
    }

    fn suspend(&self, holder: HolderPid) -> BoxFuture<'_, ()> {
        repair::suspend(holder.pid).boxed()
    }

    fn disconnect(&self, holder: HolderPid) -> BoxFuture<'_, ()> {
        repair::disconnect(holder.pid).boxed()
    }

    fn reconnect(&self, holder: HolderPid) {
        repair::reconnect(holder.pid);
    }

    fn queues(&self, holder: HolderPid) -> Queues {
        queues_of(holder)
    }

    fn wait_until(&self, then: Instant) -> BoxFuture<'static, ()> {
        async move {
            let left = then.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                // The runtime's timer is too coarse for times that clients feel.
                let _ = tokio::task::spawn_blocking(move || std::thread::sleep(left)).await;
            }
        }
        .boxed()
    }

    fn drain(&self, holder: HolderPid, queues: Option<Queues>, settle: Duration, done: Drained) {
        if settle.is_zero() && queues.as_ref().is_some_and(Queues::are_empty) {
            drop(queues);
            return done(Ok(()));
        }
        tokio::task::spawn_blocking(move || {
            let queues = queues.unwrap_or_else(|| queues_of(holder));
            let drained = queues.drain(settle);
            // Before CRIU goes on: nobody else may hold these sockets then.
            drop(queues);
            done(drained);
        });
    }
}

fn queues_of(holder: HolderPid) -> Queues {
    Queues::of(&processes::kept_by(holder.pid))
}
