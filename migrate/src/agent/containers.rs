//! Workloads that are containers: what a site does in another way than with a process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::config::{Config, Kind, Workload};
use super::linux::Linux;
use super::podman;
use super::site::SiteError;
use super::target::PrepareError;
use crate::criu::relay::{self, Call, Surroundings};
use crate::criu::rpc;
use crate::criu::swrk::{Swrk, SwrkError};
use crate::protocol::manifest::Image;
use crate::workload::container::{Container, ContainerError, Runtime};
use crate::workload::enter;
use crate::workload::holder::{Holder, HolderPid};
use crate::workload::podman::PodmanError;

/// runc's folder; with the `criu` that it is to find, where there are containers.
pub fn runtime(config: &Config) -> std::io::Result<Runtime> {
    let runtime = Runtime::new(&config.runc, config.state_dir.join("runc"));
    if config.workloads.iter().any(|workload| workload.is_container()) {
        relay::install(&runtime.programs())?;
    }
    Ok(runtime)
}

impl Linux {
    /// A workload's container as runc knows it, `None` for a process.
    fn container_of(&self, workload: &Workload) -> Result<Option<Container>, ContainerError> {
        match &workload.kind {
            Kind::Process(_) => Ok(None),
            Kind::Runc(container) => Ok(Some(container.clone())),
            Kind::Podman(name) => {
                let found = self.podman.known(name).ok_or_else(|| PodmanError::Unknown(name.clone()))?;
                Ok(Some(found.container()))
            }
        }
    }

    /// Fails unless what a container needs is here; gives its root file system's folder, `None` for a process.
    pub fn check_container(&self, workload: &Workload) -> Result<Option<PathBuf>, ContainerError> {
        let Some(container) = self.container_of(workload)? else { return Ok(None) };
        self.runtime.look()?;
        container.look().map(Some)
    }

    /// Gets ready for a container that is to run here from now on, and fails where it could not; a process needs nothing.
    pub(super) async fn make_container_room(&self, workload: &Workload) -> Result<(), ContainerError> {
        match &workload.kind {
            Kind::Process(_) => Ok(()),
            Kind::Podman(name) => self.make_room_for_podmans(name).await,
            Kind::Runc(container) => {
                self.check_container(workload)?;
                // Of a former one that a killed agent left.
                self.delete_container(container).await;
                container.look_for_others()
            }
        }
    }

    /// What a container that runs here has to find at another site, besides what its tasks need.
    pub async fn image_of(&self, workload: &Workload, root: i32) -> Result<Option<Image>, ContainerError> {
        let Kind::Podman(name) = &workload.kind else { return Ok(None) };
        let id = self.look_at_podmans(name, root).await?;
        Ok(Some(Image { id, streams: podman::streams_of(root) }))
    }

    /// Makes a holder, and starts CRIU for a restore in it.
    pub(super) async fn start_swrk_for_restore(
        &self,
        workload: &Workload,
        images: &Path,
    ) -> Result<(Holder, Swrk), PrepareError> {
        if let Kind::Podman(name) = &workload.kind {
            return self.restore_podmans(name, images).await;
        }
        let holder = Holder::start(None, &self.kernel_cache()).await?;
        let cgroups = workload.make_cgroup()?;
        let swrk = self.start_swrk(workload, rpc::Kind::Restore, holder.pid(), &cgroups, images).await?;
        Ok((holder, swrk))
    }

    /// Starts CRIU for a dump or a restore, by itself or through the container's runtime; it waits to be told to begin.
    pub(super) async fn start_swrk(
        &self,
        workload: &Workload,
        kind: rpc::Kind,
        holder: HolderPid,
        cgroups: &[PathBuf],
        images: &Path,
    ) -> Result<Swrk, SwrkError> {
        let failed = |error: ContainerError| SwrkError::Failed(error.to_string());
        let Some(container) = self.container_of(workload).map_err(failed)? else {
            return Swrk::start(&self.criu, holder, cgroups, images);
        };
        let runtime = match &workload.kind {
            Kind::Podman(_) => self.runtime_of_podman(),
            _ => self.runtime.clone(),
        };
        runtime.forget_complaints(&container);
        let record = runtime.record(&container);
        let argv = match kind {
            rpc::Kind::Restore => runtime.restore(&container, images),
            _ => {
                record.give_back().map_err(SwrkError::Start)?;
                runtime.checkpoint(&container, images)
            }
        };
        let (programs, kernel_cache) = (runtime.programs(), self.kernel_cache());
        let surroundings =
            Surroundings { programs: &programs, criu: &self.criu, images, kernel_cache: &kernel_cache };
        let mut command = enter::runtime(holder);
        command.args(argv).stdout(Stdio::null()).stderr(Stdio::null());
        let call = Call { kind, command, surroundings: &surroundings, record };
        call.start(|| Some(format!("runc: {}", runtime.complaint(&container)?))).await
    }

    /// Runs a container inside of a holder.
    pub(super) async fn run_container(
        &self,
        name: &str,
        container: &Container,
        holder: HolderPid,
    ) -> Result<(), SiteError> {
        self.runtime.forget_complaints(container);
        // What it is given as its output would be the container's.
        if status(enter::runtime(holder).args(self.runtime.run(container))).await.is_ok_and(|well| well) {
            return Ok(());
        }
        let why = self.runtime.complaint(container).unwrap_or_else(|| "runc does not say why".to_owned());
        Err(SiteError::Start { name: name.to_owned(), why: format!("runc: {why}") })
    }

    /// Makes runc forget a container that is not here any more.
    pub(super) async fn delete_container(&self, container: &Container) {
        forget(&self.runtime, container).await;
    }
}

/// Makes a runtime forget a container that is not here any more.
pub(super) async fn forget(runtime: &Runtime, container: &Container) {
    runtime.record(container).remove();
    let words: Vec<OsString> = runtime.delete(container);
    let Some((program, args)) = words.split_first() else { return };
    if !status(tokio::process::Command::new(program).args(args)).await.unwrap_or(false) {
        let why = runtime.complaint(container);
        tracing::warn!(container = container.name, why, "runc does not forget a container");
    }
}

async fn status(command: &mut tokio::process::Command) -> std::io::Result<bool> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().await?;
    Ok(status.success())
}
