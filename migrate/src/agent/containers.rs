//! Workloads that are containers: what a site does in another way than with a process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::config::{Config, Workload};
use super::linux::Linux;
use super::site::SiteError;
use crate::criu::relay::{self, Call};
use crate::criu::rpc::Kind;
use crate::criu::swrk::{Swrk, SwrkError};
use crate::workload::container::{Container, ContainerError, Runtime};
use crate::workload::enter;
use crate::workload::holder::HolderPid;

/// runc's folder; with the `criu` that it is to find, where there are containers.
pub fn runtime(config: &Config) -> std::io::Result<Runtime> {
    let runtime = Runtime::new(&config.runc, config.state_dir.join("runc"));
    if config.workloads.iter().any(|workload| workload.container().is_some()) {
        relay::install(&runtime.programs())?;
    }
    Ok(runtime)
}

impl Linux {
    /// Fails unless what a container needs is here; gives its root file system's folder, `None` for a process.
    pub fn check_container(&self, workload: &Workload) -> Result<Option<PathBuf>, ContainerError> {
        let Some(container) = workload.container() else { return Ok(None) };
        self.runtime.look()?;
        container.look().map(Some)
    }

    /// Gets ready for a container that is to run here from now on, and fails where it could not; a process needs nothing.
    pub(super) async fn make_container_room(&self, workload: &Workload) -> Result<(), ContainerError> {
        let Some(container) = workload.container() else { return Ok(()) };
        self.check_container(workload)?;
        // Of a former one that a killed agent left.
        self.delete_container(container).await;
        container.look_for_others()
    }

    /// Starts CRIU for a dump or a restore, by itself or through the container's runtime; it waits to be told to begin.
    pub(super) async fn start_swrk(
        &self,
        workload: &Workload,
        kind: Kind,
        holder: HolderPid,
        cgroups: &[PathBuf],
        images: &Path,
    ) -> Result<Swrk, SwrkError> {
        let Some(container) = workload.container() else {
            return Swrk::start(&self.criu, holder, cgroups, images);
        };
        self.runtime.forget_complaints(container);
        let record = self.runtime.record(container);
        let argv = match kind {
            Kind::Restore => self.runtime.restore(container, images),
            _ => {
                record.give_back().map_err(SwrkError::Start)?;
                self.runtime.checkpoint(container, images)
            }
        };
        let programs = self.runtime.programs();
        let call = Call { kind, argv, programs, record, holder, criu: &self.criu, images };
        call.start(|| self.runtime.complaint(container)).await
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
        self.runtime.record(container).remove();
        let words: Vec<OsString> = self.runtime.delete(container);
        let Some((program, args)) = words.split_first() else { return };
        if !status(tokio::process::Command::new(program).args(args)).await.unwrap_or(false) {
            let why = self.runtime.complaint(container);
            tracing::warn!(container = container.name, why, "runc does not forget a container");
        }
    }
}

async fn status(command: &mut tokio::process::Command) -> std::io::Result<bool> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().await?;
    Ok(status.success())
}
