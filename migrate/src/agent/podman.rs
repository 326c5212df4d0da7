//! Workloads that are containers of podman's: what a site does in another way than with other containers.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;

use super::config::{Kind, Workload};
use super::containers::forget;
use super::linux::Linux;
use super::site::SiteError;
use super::target::PrepareError;
use crate::checks::problem::Problem;
use crate::criu::relay::{self, Call};
use crate::criu::rpc;
use crate::criu::swrk::{Swrk, SwrkError};
use crate::protocol::manifest::Image;
use crate::workload::container::{ContainerError, Runtime};
use crate::workload::holder::{Holder, HolderPid};
use crate::workload::podman::{self, Found, PodmanError};
use crate::workload::record::root_of;

/// What podman says, in the images' folder.
const STDERR_FILE: &str = "podman.stderr";
/// The image whose presence is all that podman looks for.
const INVENTORY: &str = "inventory.img";

impl Linux {
    /// Looks at a container that runs here; gives its image.
    pub async fn look_at_podmans(&self, name: &str, root: i32) -> Result<String, ContainerError> {
        let found = self.podman.find(name).await?;
        found.container().look()?;
        let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        if network(&root.to_string()) != network("self") {
            let problem = "is not in the agent's network namespace, which holds the workload's address";
            return Err(PodmanError::Refused { container: name.to_owned(), problem }.into());
        }
        Ok(found.image)
    }

    /// Whether a container here is made of something else than one that comes.
    pub(super) fn lacks_image(&self, workload: &Workload, there: Option<&Image>) -> Option<Problem> {
        let here = match &workload.kind {
            Kind::Podman(name) => Some(self.podman.known(name)?.image),
            _ => None,
        };
        let there = there.map(|image| &image.id);
        let name = |id: Option<&String>| id.map_or("a bundle".to_owned(), |id| format!("image {id}"));
        let differs = workload.is_container() && here.as_ref() != there;
        differs.then(|| Problem::OtherImage { here: name(here.as_ref()), there: name(there) })
    }

    /// Gets ready for a container that podman is to restore.
    pub(super) async fn make_room_for_podmans(&self, name: &str) -> Result<(), ContainerError> {
        let container = self.podman.make_ready(name).await?.container();
        container.look()?;
        // What a restore that failed has left, of which podman knows nothing.
        forget(&self.runtime_of_podman(), &container).await;
        Ok(())
    }

    /// runc as podman calls it.
    pub(super) fn runtime_of_podman(&self) -> Runtime {
        Runtime::of_others(&self.config.runc, podman::RUNC_RECORDS.into(), self.runtime.folder().to_owned())
    }

    /// What keeps a container that podman runs already, if it is to be a workload of this agent's.
    pub(super) async fn find_running_podmans(&self, workload: &Workload) -> Option<HolderPid> {
        let Kind::Podman(container) = &workload.kind else { return None };
        let found = match self.podman.find(container).await {
            Ok(found) => found,
            Err(error) => {
                let error = crate::client::chain(&error);
                tracing::warn!(workload = workload.name, error, "podman has no such container to adopt");
                return None;
            }
        };
        found.monitor().filter(|monitor| root_of(*monitor).is_some())
    }

    /// Has podman start a container; one that runs already is taken as it is.
    pub(super) async fn start_podmans(&self, name: &str, container: &str) -> Result<HolderPid, SiteError> {
        let running = self.podman.find(container).await.map_err(ContainerError::from)?.monitor();
        let monitor = match running {
            Some(monitor) => Some(monitor),
            None => self.podman.start(container).await.map_err(ContainerError::from)?,
        };
        let ended = || format!("{container:?} ended at once: see `podman logs`");
        monitor.ok_or_else(|| SiteError::Start { name: name.to_owned(), why: ended() })
    }

    /// Has podman restore a container; its runtime's CRIU waits for the images.
    pub(super) async fn restore_podmans(
        &self,
        container: &str,
        images: &Path,
    ) -> Result<(Holder, Swrk), PrepareError> {
        let refused = |error: PodmanError| SiteError::Container(error.into());
        let unknown = || refused(PodmanError::Unknown(container.to_owned()));
        let found = self.podman.known(container).ok_or_else(unknown)?;
        prepare_images(&found).map_err(|error| refused(PodmanError::Write(found.images(), error)))?;
        let (programs, kernel_cache) = (self.runtime.programs(), self.kernel_cache());
        let surroundings = relay::Surroundings {
            programs: &programs,
            criu: &self.criu,
            images,
            kernel_cache: &kernel_cache,
        };
        let variables = surroundings.variables(std::env::var_os("PATH"));
        let mut command = self.podman.restore(container, &variables).map_err(refused)?;
        let stderr = images.join(STDERR_FILE);
        command.stdout(Stdio::null()).stderr(File::create(&stderr).map_err(SwrkError::Start)?);
        let record = self.runtime_of_podman().record(&found.container());
        let call = Call { kind: rpc::Kind::Restore, command, surroundings: &surroundings, record };
        let complaint = || {
            let said = std::fs::read_to_string(&stderr).ok()?;
            Some(format!("podman: {}", podman::complaint_in(&said)?))
        };
        let swrk = call.start(complaint).await?;
        let lost = || SwrkError::Failed("podman started CRIU without a monitor (conmon)".to_owned());
        let holder = Holder::watch(swrk.monitor().ok_or_else(lost)?)?;
        Ok((holder, swrk))
    }

    /// Removes what a restore needed.
    pub(super) fn forget_podmans(&self, container: &str) {
        let Some(found) = self.podman.known(container) else { return };
        self.runtime_of_podman().record(&found.container()).remove();
        // What is not there is removed.
        let _ = std::fs::remove_dir_all(found.images());
    }
}

/// What podman and runc look at before CRIU is started. The images are elsewhere.
fn prepare_images(found: &Found) -> io::Result<()> {
    let folder = found.images();
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(INVENTORY), "")?;
    relay::note_streams(&folder, &relay::any_streams())
}

/// What the first three descriptors of a container are.
pub fn streams_of(root: i32) -> Vec<String> {
    let link = |fd: usize| std::fs::read_link(format!("/proc/{root}/fd/{fd}"));
    (0..relay::STREAMS).map(|fd| link(fd).unwrap_or_default().to_string_lossy().into_owned()).collect()
}
