//! A lab's identity, from which all its names are made.
//!
//! It says which process made the lab (number and start time, since process numbers are used again),
//! so that whoever finds the names can tell a live lab from what a crashed process left.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::error::LabError;

/// Begins every name that a lab makes on the machine.
const PREFIX: &str = "drover-";

/// Where named network namespaces are, by iproute2's convention.
pub(crate) const NAMESPACES: &str = "/run/netns";
/// Where the BPF file system is.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// Where scratch folders are made: memory where there is some, since checkpoint images go there.
pub(crate) static SCRATCH: LazyLock<PathBuf> = LazyLock::new(|| {
    ["/dev/shm", "/run"]
        .into_iter()
        .map(PathBuf::from)
        .find(|folder| statfs(folder).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC))
        .unwrap_or_else(std::env::temp_dir)
});

/// Names a lab; shown as `pid-start-number`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LabId {
    pid: u32,
    /// In clock ticks since the machine started.
    started_ticks: u64,
    number: u32,
}

impl LabId {
    /// An identity that this process has not used yet.
    pub(crate) fn next() -> Result<LabId, LabError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        let started_ticks = start_ticks(pid)
            .map_err(LabError::io("read this process's start time from /proc (is /proc mounted?)"))?;
        Ok(LabId { pid, started_ticks, number: NUMBER.fetch_add(1, Ordering::Relaxed) })
    }

    /// Reads the identity out of a name made by [`LabId::namespace`], [`LabId::dir`] or [`LabId::pin_path`].
    pub(crate) fn from_name(name: &str) -> Option<LabId> {
        let mut parts = name.strip_prefix(PREFIX)?.splitn(4, '-');
        Some(LabId {
            pid: parts.next()?.parse().ok()?,
            started_ticks: parts.next()?.parse().ok()?,
            number: parts.next()?.parse().ok()?,
        })
    }

    /// Whether the process that made the lab still runs.
    pub(crate) fn has_creator(&self) -> bool {
        start_ticks(self.pid).is_ok_and(|ticks| ticks == self.started_ticks)
    }

    /// Name of one of the lab's namespaces.
    pub(crate) fn namespace(&self, role: &str) -> String {
        format!("{PREFIX}{self}-{role}")
    }

    /// The lab's scratch folder.
    pub(crate) fn dir(&self) -> PathBuf {
        SCRATCH.join(format!("{PREFIX}{self}"))
    }

    /// The lab's folder for pins.
    pub(crate) fn pin_path(&self) -> PathBuf {
        Path::new(BPFFS).join(format!("{PREFIX}{self}"))
    }
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.pid, self.started_ticks, self.number)
    }
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
fn start_ticks(pid: u32) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may hold anything, spaces and parentheses too.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19))
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| std::io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_the_identity() {
        let id = LabId::next().unwrap();
        let last = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        for name in [id.namespace("site-a"), last(id.dir()), last(id.pin_path())] {
            assert_eq!(LabId::from_name(&name), Some(id.clone()), "{name}");
        }
    }

    #[test]
    fn names_of_others_are_not_ours() {
        for name in ["drover", "drover-", "drover-x-1-2", "drover-1-2", "cni-1-2-3", "drover-lb"] {
            assert_eq!(LabId::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn a_used_again_process_number_is_not_the_creator() {
        let id = LabId::next().unwrap();
        assert!(id.has_creator());
        assert!(!LabId { started_ticks: id.started_ticks + 1, ..id }.has_creator());
    }
}
