//! Whether a workload can leave this site, or enter it: what the two roles' *prepare* look at before anything is held.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::OnceCell;

use super::config::Workload;
use super::images::{Folder, ImagesError};
use super::linux::Linux;
use crate::checks::hashes::Hashes;
use crate::checks::problem::{Problem, Refused};
use crate::checks::room::Room;
use crate::checks::{container, cpu, files, room, sockets, tasks};
use crate::client::chain;
use crate::criu::check::{self, CheckError};
use crate::protocol::manifest::{Manifest, Processor};
use crate::workload::container::ContainerError;
use crate::workload::holder::HolderPid;
use crate::workload::processes::Process;

/// A folder for CRIU's question about a processor; no migration's id begins with a dot.
const PROCESSOR_FOLDER: &str = ".processor";

/// Why a workload cannot move.
#[derive(Debug, thiserror::Error)]
pub enum ReadinessError {
    /// Something about the workload or the site, to be put right by an operator.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// CRIU is of no use here.
    #[error("CRIU cannot work at site {site:?}")]
    Criu {
        /// This site.
        site: String,
        /// Why.
        #[source]
        source: CheckError,
    },
    /// What a container needs.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A folder of ours.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// Something of the system's.
    #[error("this host's memory or processor cannot be asked for")]
    Host(#[from] std::io::Error),
    /// The checks themselves.
    #[error("the checks ended before they were done: {0}")]
    Broken(String),
}

/// What is known of this site from one migration to the next.
#[derive(Debug, Default)]
pub struct Readiness {
    /// Contents of programs.
    hashes: Arc<Hashes>,
    /// This processor, once CRIU was found to work.
    processor: OnceCell<Processor>,
    /// The last processor that this one was found to be good enough for.
    fits: tokio::sync::Mutex<Option<Processor>>,
}

impl Linux {
    /// This processor. Fails as long as CRIU does not work: an operator may be about to install it.
    pub(super) async fn processor(&self) -> Result<&Processor, ReadinessError> {
        let look = async || {
            let failed = |source| ReadinessError::Criu { site: self.config.site.clone(), source };
            check::can_work(&self.criu).await.map_err(failed)?;
            let folder = Folder::create(&self.images, PROCESSOR_FOLDER)?;
            let criu_image = match check::processor(&self.criu, folder.path()).await {
                Ok(image) => Some(to_hex(&image)),
                Err(CheckError::Failed { said, .. }) => {
                    tracing::info!(
                        said,
                        "CRIU does not describe this processor: its instruction sets are compared"
                    );
                    None
                }
                Err(error) => return Err(failed(error)),
            };
            Ok(Processor { instructions: cpu::instructions_here()?, criu_image })
        };
        self.readiness.processor.get_or_try_init(look).await
    }

    /// See [`super::host::Host::may_leave`].
    pub(super) async fn look_at(
        &self,
        workload: &Workload,
        holder: HolderPid,
        root: &Process,
    ) -> Result<Manifest, ReadinessError> {
        let started = Instant::now();
        let (hashes, root) = (self.readiness.hashes.clone(), root.pid);
        let looking = tokio::task::spawn_blocking(move || tasks::look(holder.pid, root, &hashes));
        let (processor, found) = tokio::join!(self.processor(), looking);
        let mut found = found.map_err(|error| ReadinessError::Broken(error.to_string()))?;
        let space = Room::here(&self.images, self.config.spare_memory_bytes)?;
        found.problems.extend(space.for_images(found.memory_bytes, &self.images));
        let is_container = workload.is_container();
        let image = self.image_of(workload, root).await?;
        let (memory, workload) = (workload.memory, &workload.name);
        let head = || format!("workload {workload:?} cannot leave site {:?}", self.config.site);
        Refused::unless_none(head, found.problems)?;
        let files = found.files.into_values().collect();
        let manifest = Manifest {
            memory_bytes: found.memory_bytes,
            later: memory.is_later(found.memory_bytes),
            files: if is_container { container::on_root(files, root) } else { files },
            sockets: found.sockets.into_iter().collect(),
            processor: processor?.clone(),
            is_container,
            image,
        };
        tracing::info!(
            workload,
            files = manifest.files.len(),
            memory_mib = manifest.memory_bytes >> 20,
            took_ms = started.elapsed().as_secs_f64() * 1e3,
            "may leave"
        );
        Ok(manifest)
    }

    /// See [`super::host::Host::may_enter`].
    pub(super) async fn compare(
        &self,
        workload: &Workload,
        manifest: Manifest,
    ) -> Result<(), ReadinessError> {
        let started = Instant::now();
        let hashes = self.readiness.hashes.clone();
        let space = Room::here(&self.images, self.config.spare_memory_bytes)?;
        let mut problems = space.for_restore(manifest.memory_bytes, &self.images);
        let bound = workload.cgroup.as_ref().and_then(|cgroup| cgroup.memory_max_bytes);
        problems.extend(bound.and_then(|bound| room::exceeds(manifest.memory_bytes, bound)));
        let processor = manifest.processor.clone();
        let files = match self.check_container(workload)? {
            Some(root) if manifest.is_container => container::below(manifest.files, &root),
            None if !manifest.is_container => manifest.files,
            here => {
                problems.push(Problem::OtherKind { is_container_here: here.is_some() });
                Vec::new()
            }
        };
        problems.extend(self.lacks_image(workload, manifest.image.as_ref()));
        let workload = &workload.name;
        let comparing = tokio::task::spawn_blocking(move || {
            let mut problems = files::compare(&files, &hashes);
            problems.extend(sockets::compare(&manifest.sockets));
            problems
        });
        let (lacking, found) = tokio::join!(self.lacks(&processor), comparing);
        problems.extend(found.map_err(|error| ReadinessError::Broken(error.to_string()))?);
        problems.extend(lacking?);
        let head = || format!("workload {workload:?} cannot enter site {:?}", self.config.site);
        Refused::unless_none(head, problems)?;
        tracing::info!(workload, took_ms = started.elapsed().as_secs_f64() * 1e3, "may enter");
        Ok(())
    }

    /// What this processor lacks of another.
    async fn lacks(&self, other: &Processor) -> Result<Option<Problem>, ReadinessError> {
        let here = self.processor().await?;
        let mut fits = self.readiness.fits.lock().await;
        if fits.as_ref() == Some(other) {
            return Ok(None);
        }
        let missing = cpu::missing(&other.instructions, &here.instructions);
        let said = match other.criu_image.as_deref().map(from_hex) {
            Some(Some(image)) => {
                let folder = Folder::create(&self.images, PROCESSOR_FOLDER)?;
                let fits = check::processor_fits(&self.criu, folder.path(), &image).await;
                fits.err().map(|error| chain(&error))
            }
            Some(None) => Some("what the source says of its processor makes no sense".to_owned()),
            None => (!missing.is_empty()).then(|| "they are not in its /proc/cpuinfo".to_owned()),
        };
        match said {
            None => {
                *fits = Some(other.clone());
                Ok(None)
            }
            Some(said) => Ok(Some(Problem::Processor { missing, said })),
        }
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_go_there_and_back() {
        assert_eq!(to_hex(&[0, 0xab, 255]), "00abff");
        assert_eq!(from_hex("00abff").unwrap(), [0, 0xab, 255]);
        assert_eq!(from_hex("").unwrap(), [0u8; 0]);
        for bad in ["0", "0g", "é", "+1"] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
